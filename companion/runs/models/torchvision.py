"""ResNets of torchvision, whose pretrained weights can be imported."""

from torch import nn

from companion.runs.models.registry import Family, ModelName, Shape, register

SIZES = {"resnet18": (18, 1.0), "resnet50": (50, 1.0), "wide_resnet50_2": (50, 2.0)}  # depth, width


def _torchvision(name: ModelName, shape: Shape, classes: int) -> nn.Module:
    from torchvision.models import get_model  # here, because importing it takes a second

    if shape[0] != 3:
        raise ValueError(f"{name} takes images of 3 channels, not {shape[0]}")
    return get_model(str(name).removeprefix("torchvision-"), weights=None, num_classes=classes)


PRESETS = {
    f"torchvision-{name}": ModelName("torchvision", depth, "bn", width) for name, (depth, width) in SIZES.items()
}
register(Family("torchvision", _torchvision, presets=PRESETS, own_init=True))
