"""Architectures and recipes as tables, to be compared with what a paper prints."""

from collections.abc import Mapping

from torch import nn

from companion.runs.recipes import Recipe


def layer_rows(model: nn.Sequential, here: nn.Sequential) -> list[dict]:
    """The layers of a network and of a wider or narrower one (Csiszarik et al. 2023, Table A.1).

    Returns:
        A row for each convolution {part: "layer", name, kernel, stride, channels, channels_here, then: what follows,
        such as "LN-ReLU"}, and one each for the pooling and the classifier {part, name}.
    """
    rows = []
    for (name, layer), other in zip(model.named_children(), here.children(), strict=True):
        if isinstance(layer, nn.Conv2d):
            shape = {"kernel": layer.kernel_size[0], "stride": layer.stride[0], "channels": layer.out_channels}
            rows.append({"part": "layer", "name": name, **shape, "channels_here": other.out_channels, "then": ""})
        elif isinstance(layer, nn.AdaptiveAvgPool2d | nn.Linear):
            rows.append({"part": "layer", "name": "average pooling" if name == "pool" else "linear"})
        elif not isinstance(layer, nn.Flatten):
            rows[-1]["then"] += "LN-" if name.startswith("ln") else type(layer).__name__
    return rows


RECIPE = ("epochs", "batch_size", "lr", "schedule", "warmup_epochs", "momentum", "weight_decay")


def recipe_rows(recipes: Mapping[str, Recipe]) -> list[dict]:
    """Rows {part: "recipe", name, epochs, batch_size, lr, ..., lr_divided_at: fractions of training, augment}."""
    return [
        {"part": "recipe", "name": name, **{column: getattr(recipe, column) for column in RECIPE}}
        | {"lr_divided_at": ", ".join(f"{at:.2f}" for at in recipe.milestones), "augment": "+".join(recipe.augment)}
        for name, recipe in recipes.items()
    ]
