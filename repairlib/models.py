"""The papers' networks by name: MLP, VGG and CIFAR ResNet, plain or with BatchNorm, in any width.

    mlp<hidden layers>-<norm>[-w<units per layer>]             mlp10-fused-w128
    vgg{11,13,16,19}-<norm>[-w<multiplier>]                    vgg11-bn-w0.25
    resnet{8,20,32,44,56,110}-<norm>[-w<multiplier>][-sc1]     resnet20-bn-w4
    resnet18-<norm>[-w<multiplier>]                            resnet18-bn-w1

norm is `plain`, `bn`, or `fused`: trained with BatchNorm, which is then folded into the layer before it, so that the
network itself is plain (the authors' way to deep MLPs). `-sc1` gives 1x1 convolutions on downsampling shortcuts
instead of 3x3. Networks are ordinary modules that torch.fx can trace, and every layer is a named attribute.
"""

import copy
import math
import re
from dataclasses import dataclass, replace

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repairlib.data import nearest

GRAMMAR = (
    "names are mlp<hidden layers>-<norm>-w<units>, vgg{11,13,16,19}-<norm>-w<multiplier>, "
    "resnet{8,18,20,32,44,56,110}-<norm>-w<multiplier>, with norm plain, bn or fused (fused not for resnets)"
)
NORMS = ("plain", "bn", "fused")
DEPTHS = {"vgg": (11, 13, 16, 19), "resnet": (8, 18, 20, 32, 44, 56, 110)}

# Channels of each convolution and where the pools are (Simonyan and Zisserman 2014, Table 1: A, B, D, E).
VGG_LAYOUT = {
    11: (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    13: (64, 64, "pool", 128, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    16: (64, 64, "pool", 128, 128, "pool", *(256,) * 3, "pool", *(512,) * 3, "pool", *(512,) * 3, "pool"),
    19: (64, 64, "pool", 128, 128, "pool", *(256,) * 4, "pool", *(512,) * 4, "pool", *(512,) * 4, "pool"),
}


@dataclass(frozen=True)
class ModelName:
    """A parsed model name; `str` gives the name back in full, with its width."""

    family: str  # mlp, vgg or resnet
    depth: int  # hidden layers of an MLP; weight layers of the others
    norm: str  # plain, bn or fused
    width: float  # units per hidden layer of an MLP; multiplier of the others' channels
    shortcut: int = 3  # kernel size of the convolution on a downsampling shortcut (resnet only)

    def __str__(self) -> str:
        suffix = "-sc1" if self.shortcut == 1 and self.depth != 18 else ""
        return f"{self.family}{self.depth}-{self.norm}-w{self.width:.12g}{suffix}"


def parse(name: str) -> ModelName:
    """Parse a model name; ValueError with the nearest valid name and the grammar if it is none.

    >>> parse("resnet20-bn-w4")
    ModelName(family='resnet', depth=20, norm='bn', width=4.0, shortcut=3)
    >>> str(parse("mlp10-fused"))
    'mlp10-fused-w128'
    """
    match = re.fullmatch(r"(mlp|vgg|resnet)([1-9]\d*)-(plain|bn|fused)(?:-w(\d+(?:\.\d+)?))?(-sc1)?", name)
    if not match:
        raise ValueError(f"unknown model {name!r}; the nearest valid name is {_nearest_name(name)!r}; {GRAMMAR}")
    family, depth, norm, width, one = match[1], int(match[2]), match[3], match[4], match[5]
    parsed = ModelName(family, depth, norm, float(width or (128 if family == "mlp" else 1)), 1 if one else 3)
    problem = ""
    if depth not in DEPTHS.get(family, (depth,)):
        problem = f"no {family} has depth {depth}"
    elif parsed.width <= 0 or (family == "mlp" and parsed.width % 1):
        problem = f"width {width} is not possible"
    elif family == "resnet" and norm == "fused":
        problem = "residual networks are not fused: use bn or plain"
    elif one and (family != "resnet" or depth == 18):
        problem = "-sc1 is for resnet{8,20,32,44,56,110}" + " (resnet18 always has 1x1 shortcuts)" * (depth == 18)
    if problem:
        raise ValueError(
            f"unknown model {name!r}: {problem}; the nearest valid name is {_nearest_name(name)!r}; {GRAMMAR}"
        )
    return replace(parsed, shortcut=1) if depth == 18 and family == "resnet" else parsed


def build(name: str | ModelName, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Build a network with fresh weights from torch's global generator; `fused` gives the plain network.

    Args:
        name: see the head of this module.
        shape: (c, h, w) of one input.
        classes: number of outputs.

    Raises:
        ValueError: unknown name (see `parse`).

    >>> build("vgg11-bn-w0.25", (1, 16, 16), 10)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """
    name = parse(name) if isinstance(name, str) else name
    maker = {"mlp": _mlp, "vgg": _vgg, "resnet": ResNet}[name.family]
    model = maker(name, shape, classes)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if name.family == "resnet" and name.norm == "plain":
        # Without normalisation each block would add its whole variance to the stream, which would then grow
        # exponentially with depth: scale the branches down together (Zhang et al. 2019).
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        with torch.no_grad():
            for block in blocks:
                block.conv2.weight /= math.sqrt(len(blocks))
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy with every BatchNorm folded into the convolution or linear layer before it.

        W' = W g / sqrt(v + eps),   b' = (b - m) g / sqrt(v + eps) + beta

    per output channel, with running mean m and variance v, gain g and shift beta; in float64, so outputs in evaluation
    mode stay the same to rounding. The copy's state dict has the keys of the same network built plain: where a
    BatchNorm was, an Identity is left. Any model that torch.fx traces will do.

    Raises:
        ValueError: a BatchNorm (named) does not directly follow such a layer, or has no running statistics.
    """
    model = copy.deepcopy(model).eval()
    nodes = list(torch.fx.symbolic_trace(model).graph.nodes)
    for node in nodes:
        norm = model.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            continue
        source = node.args[0]
        layer = model.get_submodule(source.target) if source.op == "call_module" else None
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or len(source.users) > 1 or norm.running_var is None:
            raise ValueError(f"cannot fuse {node.target!r}: it does not follow one convolution or linear layer alone, "
                             "or keeps no running statistics")  # fmt: skip
        if any(sum(n.target == m.target for n in nodes if n.op == "call_module") > 1 for m in (node, source)):
            raise ValueError(f"cannot fuse {node.target!r}: the layer is used more than once")
        _fold(layer, norm)
        model.set_submodule(node.target, nn.Identity())
    return model


class Block(nn.Module):
    """A residual block: relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool, shortcut: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, shortcut, stride, padding=shortcut // 2, bias=not norm)
            self.shortcut.add_module("conv", conv)
            if norm:
                self.shortcut.add_module("bn", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet (He et al. 2016): three stages from 16 channels, or ResNet18's four from 64, times the width."""

    def __init__(self, name: ModelName, shape: tuple[int, int, int], classes: int):
        super().__init__()
        stages, blocks, base = (4, 2, 64) if name.depth == 18 else (3, (name.depth - 2) // 6, 16)
        norm = name.norm == "bn"
        channels = [_scaled(base * 2**i, name.width) for i in range(stages)]
        self.conv1 = nn.Conv2d(shape[0], channels[0], 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(channels[0]) if norm else nn.Identity()
        self.stages = nn.Sequential()
        for i, (inputs, outputs) in enumerate(zip(channels[:1] + channels, channels, strict=False)):
            first = Block(inputs, outputs, 1 if i == 0 else 2, norm, name.shortcut)
            rest = [Block(outputs, outputs, 1, norm, name.shortcut) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(torch.flatten(self.pool(self.stages(x)), 1))


def _mlp(name: ModelName, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    inputs, units = math.prod(shape), int(name.width)
    for i in range(1, name.depth + 1):
        model.add_module(f"fc{i}", nn.Linear(inputs, units, bias=name.norm != "bn"))
        if name.norm == "bn":
            model.add_module(f"bn{i}", nn.BatchNorm1d(units))
        model.add_module(f"relu{i}", nn.ReLU())
        inputs = units
    model.add_module("head", nn.Linear(inputs, classes))
    return model


def _vgg(name: ModelName, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    model = nn.Sequential()
    inputs, height, width = shape
    i = 0
    for item in VGG_LAYOUT[name.depth]:
        if item == "pool":
            if min(height, width) > 1:  # a small input is down to one pixel before the last pool
                model.add_module(f"pool{i}", nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            continue
        i, outputs = i + 1, _scaled(item, name.width)
        model.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=name.norm != "bn"))
        if name.norm == "bn":
            model.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
        model.add_module(f"relu{i}", nn.ReLU())
        inputs = outputs
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(inputs * height * width, classes))
    return model


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _fold(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Change `layer` to do what `norm(layer(x))` does in evaluation mode."""
    with torch.no_grad():
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        gain = gain if norm.weight is None else gain * norm.weight.double()
        shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
        shift = shift * gain + (0 if norm.bias is None else norm.bias.double())
        weight = layer.weight.double() * gain.view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight.copy_(weight)
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype))


def _nearest_name(name: str) -> str:
    """Mend a name part by part, so that the answer keeps what was right about it."""
    first, *rest = name.lower().split("-")
    number = re.search(r"[1-9]\d*", first)
    family = nearest(re.sub(r"\d.*", "", first), ("mlp", "vgg", "resnet"))
    depth = int(number[0]) if number else {"mlp": 10, "vgg": 16, "resnet": 20}[family]
    if family != "mlp":
        depth = min(DEPTHS[family], key=lambda d: abs(d - depth))
    norm = nearest(rest[0], NORMS) if rest and not re.match(r"w\d", rest[0]) else "bn"
    norm = "bn" if family == "resnet" and norm == "fused" else norm
    widths = [float(m[1]) for part in rest if (m := re.fullmatch(r"w(\d+(?:\.\d+)?)", part))]
    widths = [w for w in widths if w > 0 and not (family == "mlp" and w % 1)]
    suffix = "-sc1" if "sc1" in rest and family == "resnet" and depth != 18 else ""
    return f"{family}{depth}-{norm}" + (f"-w{widths[0]:.12g}" if widths else "") + suffix
