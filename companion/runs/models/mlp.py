"""MLPs: all hidden layers of one width, or each with 0.7 times the units of the one before ("taper")."""

import math

from torch import nn

from companion.runs.models.registry import Family, ModelName, Shape, register


def _mlp(name: ModelName, shape: Shape, classes: int) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    inputs = math.prod(shape)
    for i in range(1, name.depth + 1):
        units = round(name.width * 0.7 ** (i - 1)) if "taper" in name.flags else int(name.width)
        model.add_module(f"fc{i}", nn.Linear(inputs, units, bias=name.biased))
        if norm := {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm}.get(name.norm):
            model.add_module(f"{name.norm}{i}", norm(units))
        model.add_module(f"relu{i}", nn.ReLU())
        inputs = units
    model.add_module("head", nn.Linear(inputs, classes, bias=name.bias))
    return model


register(
    Family("mlp", _mlp, "MLP", None, ("bn", "plain", "ln", "fused"), 128, whole_widths=True, flags=("taper", "nobias"))
)
