"""ResNets for small images: CIFAR's of three stages, and ImageNet's of four (He et al. 2016)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.runs.models.layers import MAP_NORMS, norm, scaled
from companion.runs.models.registry import Family, ModelName, Shape, register

FOUR_STAGES = {18: (2, 2, 2, 2), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # ResNets for ImageNet: blocks of each stage
BOTTLENECKS = (26, 50)
DEPTHS = (8, 18, 20, 26, 32, 44, 50, 56, 110)


class Block(nn.Module):
    """A residual block: relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))); `bn1`, `bn2` hold whatever norm it is."""

    expansion = 1  # channels that leave a block, in multiples of its stage's

    def __init__(self, inputs: int, outputs: int, stride: int, name: ModelName):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=name.biased)
        self.bn1 = norm(name, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=name.biased)
        self.bn2 = norm(name, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, name)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A residual block of three convolutions, 1x1, 3x3 and 1x1, each with its norm (He et al. 2016, Fig. 5).

    The 3x3 has the stride, as in torchvision; the paper gives it to the first 1x1.
    """

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int, name: ModelName):
        super().__init__()
        outputs = self.expansion * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=name.biased)
        self.bn1 = norm(name, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=name.biased)
        self.bn2 = norm(name, channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=name.biased)
        self.bn3 = norm(name, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, name)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class FixupBlock(nn.Module):
    """A residual block with scalars in place of norms: relu(shortcut(x) + s conv(relu(conv(x + b1) + b2) + b3) + b4).

    A convolution on the shortcut also sees x + b1: a bias stands before every convolution (Zhang et al. 2019, Sec. 3).
    """

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int, name: ModelName):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = _shortcut(inputs, outputs, stride, name)
        self.bias1, self.bias2, self.bias3, self.bias4 = (nn.Parameter(torch.zeros(1)) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        shifted = x + self.bias1
        y = F.relu(self.conv1(shifted) + self.bias2)
        y = self.conv2(y + self.bias3) * self.scale + self.bias4
        return F.relu(y + self.shortcut(shifted if len(self.shortcut) else x))


class ResNet(nn.Module):
    """ResNet for small images (He et al. 2016): CIFAR's three stages from 16 channels, or ImageNet's four from 64."""

    def __init__(self, name: ModelName, shape: Shape, classes: int):
        super().__init__()
        counts, base = ((name.depth - 2) // 6,) * 3, 16
        if name.depth in FOUR_STAGES:
            counts, base = FOUR_STAGES[name.depth], 64
        block = FixupBlock if name.norm == "fixup" else Bottleneck if name.depth in BOTTLENECKS else Block
        inputs = scaled(base, name.width)
        self.conv1 = nn.Conv2d(shape[0], inputs, 3, padding=1, bias=name.biased)
        self.bn1 = norm(name, inputs)
        self.stages = nn.Sequential()
        for i, count in enumerate(counts):
            channels, stage = scaled(base * 2**i, name.width), nn.Sequential()
            for j in range(count):
                stage.append(block(inputs, channels, 2 if i > 0 and j == 0 else 1, name))
                inputs = block.expansion * channels
            self.stages.append(stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes, bias=name.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(torch.flatten(self.pool(self.stages(x)), 1))


class FixupResNet(ResNet):
    """CIFAR ResNet of Fixup blocks, with a scalar bias after the first convolution and one before the classifier."""

    def __init__(self, name: ModelName, shape: Shape, classes: int):
        super().__init__(name, shape, classes)
        self.bias1, self.bias2 = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) + self.bias1)
        return self.head(torch.flatten(self.pool(self.stages(x)), 1) + self.bias2)


def _shortcut(inputs: int, outputs: int, stride: int, name: ModelName) -> nn.Sequential:
    """Convolution and norm where a block changes the shape, else nothing."""
    shortcut = nn.Sequential()
    kernel = 1 if "sc1" in name.flags or name.depth in FOUR_STAGES else 3
    if stride > 1 or inputs != outputs:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=name.biased)
        shortcut.add_module("conv", conv)
        if name.norm in MAP_NORMS:
            shortcut.add_module(name.norm, norm(name, outputs))
    return shortcut


def _build(name: ModelName, shape: Shape, classes: int) -> nn.Module:
    return (FixupResNet if name.norm == "fixup" else ResNet)(name, shape, classes)


def _adjust(model: nn.Module, name: ModelName) -> None:
    """Scale the branches of networks without normalisation.

    Each block would add its whole variance to the stream, which would then grow exponentially with depth. With two
    layers a branch, Fixup's L^(-1/(2m-2)) is the same factor, on the first of them, while the last and the classifier
    start at zero (Zhang et al. 2019).
    """
    blocks = [module for module in model.modules() if isinstance(module, (Block, Bottleneck, FixupBlock))]
    with torch.no_grad():
        for block in blocks:
            if name.norm == "plain":
                getattr(block, "conv3", block.conv2).weight /= math.sqrt(len(blocks))
            elif name.norm == "fixup":
                block.conv1.weight /= math.sqrt(len(blocks))
                block.conv2.weight.zero_()
        if name.norm == "fixup":
            model.head.weight.zero_()


def _problem(name: ModelName) -> str:
    if name.norm == "fixup" and name.depth in BOTTLENECKS:
        return f"Fixup is for blocks of two convolutions, and resnet{name.depth}'s have three"
    if "sc1" in name.flags and name.depth in FOUR_STAGES:
        return f"resnet{name.depth} always has 1x1 shortcuts"
    return ""


register(
    Family(
        "resnet", _build, "ResNet", DEPTHS, ("bn", "plain", "ln", "fixup"), flags=("sc1", "nobias"), problem=_problem,
        variant=lambda name: "bottleneck" if name.depth in BOTTLENECKS else "", adjust=_adjust,
    )
)  # fmt: skip
