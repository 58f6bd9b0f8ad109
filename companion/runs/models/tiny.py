"""Tiny-10 (Csiszarik et al. 2023)."""

from torch import nn

from companion.runs.models.layers import add_conv, scaled
from companion.runs.models.registry import Family, ModelName, Shape, register

# (channels, kernel size, stride) of the convolutions: Table A.1. The table prints neither strides nor padding; here the
# first convolution of each new width halves the map, and padding keeps its size.
LAYOUT = (
    (16, 3, 1), (16, 3, 1), (32, 3, 2), (32, 3, 1), (32, 3, 1), (64, 3, 2), (64, 3, 1), (64, 1, 1)
)  # fmt: skip


def _tiny(name: ModelName, shape: Shape, classes: int) -> nn.Sequential:
    model = nn.Sequential()
    inputs = shape[0]
    for i, (channels, kernel, stride) in enumerate(LAYOUT, 1):
        outputs = scaled(channels, name.width)
        add_conv(model, i, inputs, outputs, name, kernel, stride)
        inputs = outputs
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(inputs, classes, bias=name.bias))
    return model


register(Family("tiny", _tiny, "Tiny-", (10,), ("bn", "plain", "ln", "fused"), flags=("nobias",)))
