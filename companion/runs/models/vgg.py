"""VGG with one linear layer, and as many of its pools as the input allows (Simonyan and Zisserman 2014)."""

from torch import nn

from companion.runs.models.layers import add_conv, scaled
from companion.runs.models.registry import Family, ModelName, Shape, register

# Channels of each convolution and where the pools are: Table 1, A, B, D and E.
LAYOUT = {
    11: (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    13: (64, 64, "pool", 128, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    16: (64, 64, "pool", 128, 128, "pool", *(256,) * 3, "pool", *(512,) * 3, "pool", *(512,) * 3, "pool"),
    19: (64, 64, "pool", 128, 128, "pool", *(256,) * 4, "pool", *(512,) * 4, "pool", *(512,) * 4, "pool"),
}


def _vgg(name: ModelName, shape: Shape, classes: int) -> nn.Sequential:
    model = nn.Sequential()
    inputs, height, width = shape
    i = 0
    for item in LAYOUT[name.depth]:
        if item == "pool":
            if min(height, width) > 1:  # a small input is down to one pixel before the last pool
                model.add_module(f"pool{i}", nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            continue
        i, outputs = i + 1, scaled(item, name.width)
        add_conv(model, i, inputs, outputs, name)
        inputs = outputs
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(inputs * height * width, classes, bias=name.bias))
    return model


register(Family("vgg", _vgg, "VGG", tuple(LAYOUT), ("bn", "plain", "ln", "fused"), flags=("nobias",)))
