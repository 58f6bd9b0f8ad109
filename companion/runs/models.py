"""The papers' networks by name, in any width: MLP, VGG, ResNets, Tiny-10, and three ResNets of torchvision.

    mlp<hidden layers>-<norm>[-w<units per layer>][-nobias]                     mlp10-fused-w128
    vgg{11,13,16,19}-<norm>[-w<multiplier>][-nobias]                            vgg11-bn-w0.25
    resnet{8,20,32,44,56,110}-<norm>[-w<multiplier>][-sc1][-nobias]             resnet20-ln-w4
    resnet{18,26,50}-<norm>[-w<multiplier>][-nobias]                            resnet50-bn-w0.25
    tiny10-<norm>[-w<multiplier>][-nobias]                                      tiny10-ln-w16
    torchvision-{resnet18,resnet50,wide_resnet50_2}                             torchvision-resnet50

norm is `plain`, `bn`, `ln` (LayerNorm over the channels at each position of a map), `fused`: trained with BatchNorm,
which is then folded into the layer before it, so that the network itself is plain (the authors' way to deep MLPs; not
for resnets), or `fixup`: no norm, but scalar biases and multipliers (resnets only, not those of bottlenecks). `-sc1`
gives 1x1 convolutions on downsampling shortcuts instead of 3x3, which resnet{18,26,50} always have. These three are
ImageNet's, of four stages, with a stem for small images: 3x3 with stride 1 and no pool; resnet26 and resnet50 are of
bottlenecks, whose 1x1, 3x3 and 1x1 convolutions have 1, 1 and 4 times the stage's channels. `-nobias` leaves out all
biases of a plain network, the classifier's too; layers before a norm have none anyway. Networks are ordinary modules
that torch.fx can trace; every layer is a named attribute.
"""

import copy
import math
import re
from dataclasses import dataclass, replace

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repairlib.names import nearest

GRAMMAR = (
    "names are mlp<hidden layers>-<norm>-w<units>, vgg{11,13,16,19}-<norm>-w<multiplier>, tiny10-<norm>-w<multiplier>, "
    "resnet{8,18,20,26,32,44,50,56,110}-<norm>-w<multiplier>, with norm plain, bn, ln, fused (not resnets) or fixup "
    "(only resnets, not 26 and 50), and torchvision-{resnet18,resnet50,wide_resnet50_2}"
)
NORMS = ("plain", "bn", "ln", "fused", "fixup")
DEPTHS = {"vgg": (11, 13, 16, 19), "resnet": (8, 18, 20, 26, 32, 44, 50, 56, 110), "tiny": (10,)}
FOUR_STAGES = {18: (2, 2, 2, 2), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # ResNets for ImageNet: blocks of each stage
BOTTLENECKS = (26, 50)
TORCHVISION = {"resnet18": (18, 1.0), "resnet50": (50, 1.0), "wide_resnet50_2": (50, 2.0)}  # depth, width

# Channels of each convolution and where the pools are (Simonyan and Zisserman 2014, Table 1: A, B, D, E).
VGG_LAYOUT = {
    11: (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    13: (64, 64, "pool", 128, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    16: (64, 64, "pool", 128, 128, "pool", *(256,) * 3, "pool", *(512,) * 3, "pool", *(512,) * 3, "pool"),
    19: (64, 64, "pool", 128, 128, "pool", *(256,) * 4, "pool", *(512,) * 4, "pool", *(512,) * 4, "pool"),
}


# Tiny-10, (channels, kernel size, stride) of its convolutions (Csiszarik et al. 2023, Table A.1). The table prints
# neither strides nor padding; here the first convolution of each new width halves the map, and padding keeps its size.
TINY_LAYOUT = (
    (16, 3, 1), (16, 3, 1), (32, 3, 2), (32, 3, 1), (32, 3, 1), (64, 3, 2), (64, 3, 1), (64, 1, 1)
)  # fmt: skip


@dataclass(frozen=True)
class ModelName:
    """A parsed model name; `str` gives the name back in full, with its width."""

    family: str  # mlp, vgg, resnet, tiny or torchvision
    depth: int  # hidden layers of an MLP; weight layers of the others
    norm: str  # plain, bn, ln, fused or fixup
    width: float  # units per hidden layer of an MLP; multiplier of the others' channels
    shortcut: int = 3  # kernel size of the convolution on a downsampling shortcut (resnet only)
    bias: bool = True  # whether layers that no norm follows have a bias

    def __str__(self) -> str:
        if self.family == "torchvision":
            return "torchvision-" + next(k for k, size in TORCHVISION.items() if size == (self.depth, self.width))
        suffix = ("-sc1" if self.shortcut == 1 and self.depth not in FOUR_STAGES else "") + (
            "" if self.bias else "-nobias"
        )
        return f"{self.family}{self.depth}-{self.norm}-w{self.width:.12g}{suffix}"

    @property
    def kind(self) -> str:
        """What recipes may depend on, as in `vgg-plain-nobias` or `resnet-bn-bottleneck`, what counts most first.

        Family, norm, whether it is one of our ResNets of bottlenecks, and whether biases were left out.
        """
        bottleneck = self.family == "resnet" and self.depth in BOTTLENECKS
        return f"{self.family}-{self.norm}" + "-bottleneck" * bottleneck + "-nobias" * (not self.bias)

    @property
    def biased(self) -> bool:
        """Whether hidden layers have biases; before a norm they would do nothing, and Fixup has scalars instead."""
        return self.bias and self.norm in ("plain", "fused")


def parse(name: str) -> ModelName:
    """Parse a model name; ValueError with the nearest valid name and the grammar if it is none.

    >>> parse("resnet20-bn-w4")
    ModelName(family='resnet', depth=20, norm='bn', width=4.0, shortcut=3, bias=True)
    >>> str(parse("mlp10-fused"))
    'mlp10-fused-w128'
    """
    if (known := name.removeprefix("torchvision-")) != name and known in TORCHVISION:
        depth, width = TORCHVISION[known]
        return ModelName("torchvision", depth, "bn", width, shortcut=1)
    pattern = r"(mlp|vgg|resnet|tiny)([1-9]\d*)-(plain|bn|ln|fused|fixup)(?:-w(\d+(?:\.\d+)?))?(-sc1)?(-nobias)?"
    match = re.fullmatch(pattern, name)
    if not match:
        raise ValueError(f"unknown model {name!r}; the nearest valid name is {_nearest_name(name)!r}; {GRAMMAR}")
    family, depth, norm, width, one, bare = match[1], int(match[2]), *match.groups()[2:]
    width_or_default = float(width or (128 if family == "mlp" else 1))
    parsed = ModelName(family, depth, norm, width_or_default, 1 if one else 3, not bare)
    problem = ""
    if depth not in DEPTHS.get(family, (depth,)):
        problem = f"no {family} has depth {depth}"
    elif parsed.width <= 0 or (family == "mlp" and parsed.width % 1):
        problem = f"width {width} is not possible"
    elif family == "resnet" and norm == "fused":
        problem = "residual networks are not fused: use bn or plain"
    elif family != "resnet" and norm == "fixup":
        problem = "fixup is for residual networks"
    elif norm == "fixup" and depth in BOTTLENECKS:
        problem = f"Fixup is for blocks of two convolutions, and resnet{depth}'s have three"
    elif one and (family != "resnet" or depth in FOUR_STAGES):
        problem = "-sc1 is for resnet{8,20,32,44,56,110}"
        problem += f" (resnet{depth} always has 1x1 shortcuts)" * (family == "resnet")
    elif bare and norm != "plain":
        problem = "-nobias is for plain networks"
    if problem:
        raise ValueError(
            f"unknown model {name!r}: {problem}; the nearest valid name is {_nearest_name(name)!r}; {GRAMMAR}"
        )
    return replace(parsed, shortcut=1) if depth in FOUR_STAGES and family == "resnet" else parsed


def build(name: str | ModelName, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Build a network with fresh weights from torch's global generator; `fused` gives the plain network.

    Args:
        name: see the head of this module.
        shape: (c, h, w) of one input.
        classes: number of outputs.

    Raises:
        ValueError: unknown name (see `parse`), or torchvision's network with other than 3 channels.

    >>> build("vgg11-bn-w0.25", (1, 16, 16), 10)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """
    name = parse(name) if isinstance(name, str) else name
    makers = {"mlp": _mlp, "vgg": _vgg, "resnet": ResNet, "tiny": _tiny, "torchvision": _torchvision}
    model = (FixupResNet if name.norm == "fixup" else makers[name.family])(name, shape, classes)
    if name.family == "torchvision":
        return model  # with torchvision's own initial weights
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    # Without normalisation each block would add its whole variance to the stream, which would then grow exponentially
    # with depth: scale the branches down together. With two layers a branch, Fixup's L^(-1/(2m-2)) is the same factor,
    # on the first of them, while the last and the classifier start at zero (Zhang et al. 2019).
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


class ChannelNorm(nn.Module):
    """LayerNorm over the channels at each position of a map (n, c, h, w) (Ainsworth et al. 2022)."""

    def __init__(self, channels: int):
        super().__init__()
        self.ln = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_MAP_NORMS = {"bn": nn.BatchNorm2d, "ln": ChannelNorm}


class Block(nn.Module):
    """A residual block: relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))); `bn1`, `bn2` hold whatever norm it is."""

    expansion = 1  # channels that leave a block, in multiples of its stage's

    def __init__(self, inputs: int, outputs: int, stride: int, name: ModelName):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=name.biased)
        self.bn1 = _norm(name, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=name.biased)
        self.bn2 = _norm(name, outputs)
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
        self.bn1 = _norm(name, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=name.biased)
        self.bn2 = _norm(name, channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=name.biased)
        self.bn3 = _norm(name, outputs)
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

    def __init__(self, name: ModelName, shape: tuple[int, int, int], classes: int):
        super().__init__()
        counts, base = ((name.depth - 2) // 6,) * 3, 16
        if name.depth in FOUR_STAGES:
            counts, base = FOUR_STAGES[name.depth], 64
        block = FixupBlock if name.norm == "fixup" else Bottleneck if name.depth in BOTTLENECKS else Block
        inputs = _scaled(base, name.width)
        self.conv1 = nn.Conv2d(shape[0], inputs, 3, padding=1, bias=name.biased)
        self.bn1 = _norm(name, inputs)
        self.stages = nn.Sequential()
        for i, count in enumerate(counts):
            channels, stage = _scaled(base * 2**i, name.width), nn.Sequential()
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

    def __init__(self, name: ModelName, shape: tuple[int, int, int], classes: int):
        super().__init__(name, shape, classes)
        self.bias1, self.bias2 = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) + self.bias1)
        return self.head(torch.flatten(self.pool(self.stages(x)), 1) + self.bias2)


def _norm(name: ModelName, channels: int) -> nn.Module:
    return _MAP_NORMS[name.norm](channels) if name.norm in _MAP_NORMS else nn.Identity()


def _shortcut(inputs: int, outputs: int, stride: int, name: ModelName) -> nn.Sequential:
    """Convolution and norm where a block changes the shape, else nothing."""
    shortcut = nn.Sequential()
    if stride > 1 or inputs != outputs:
        conv = nn.Conv2d(inputs, outputs, name.shortcut, stride, padding=name.shortcut // 2, bias=name.biased)
        shortcut.add_module("conv", conv)
        if name.norm in _MAP_NORMS:
            shortcut.add_module(name.norm, _norm(name, outputs))
    return shortcut


def _mlp(name: ModelName, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    inputs, units = math.prod(shape), int(name.width)
    for i in range(1, name.depth + 1):
        model.add_module(f"fc{i}", nn.Linear(inputs, units, bias=name.biased))
        if norm := {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm}.get(name.norm):
            model.add_module(f"{name.norm}{i}", norm(units))
        model.add_module(f"relu{i}", nn.ReLU())
        inputs = units
    model.add_module("head", nn.Linear(inputs, classes, bias=name.bias))
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
        _add_conv(model, i, inputs, outputs, name)
        inputs = outputs
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(inputs * height * width, classes, bias=name.bias))
    return model


def _tiny(name: ModelName, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    model = nn.Sequential()
    inputs = shape[0]
    for i, (channels, kernel, stride) in enumerate(TINY_LAYOUT, 1):
        outputs = _scaled(channels, name.width)
        _add_conv(model, i, inputs, outputs, name, kernel, stride)
        inputs = outputs
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(inputs, classes, bias=name.bias))
    return model


def _add_conv(model: nn.Sequential, i: int, inputs: int, outputs: int, name: ModelName, kernel=3, stride=1) -> None:
    """Append convolution, norm and ReLU number i."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=name.biased)
    model.add_module(f"conv{i}", conv)
    if name.norm in _MAP_NORMS:
        model.add_module(f"{name.norm}{i}", _norm(name, outputs))
    model.add_module(f"relu{i}", nn.ReLU())


def _torchvision(name: ModelName, shape: tuple[int, int, int], classes: int) -> nn.Module:
    from torchvision.models import get_model  # here, because importing it takes a second

    if shape[0] != 3:
        raise ValueError(f"{name} takes images of 3 channels, not {shape[0]}")
    return get_model(str(name).removeprefix("torchvision-"), weights=None, num_classes=classes)


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
    family = nearest(re.sub(r"\d.*", "", first), ("mlp", "vgg", "resnet", "tiny", "torchvision"))
    if family == "torchvision":
        return f"torchvision-{nearest('-'.join(rest), list(TORCHVISION))}"
    depth = int(number[0]) if number else {"mlp": 10, "vgg": 16, "resnet": 20, "tiny": 10}[family]
    if family != "mlp":
        depth = min(DEPTHS[family], key=lambda d: abs(d - depth))
    norm = nearest(rest[0], NORMS) if rest and not re.match(r"w\d|sc1|nobias", rest[0]) else "bn"
    norm = "bn" if norm == "fused" and family == "resnet" else norm
    norm = "bn" if norm == "fixup" and (family != "resnet" or depth in BOTTLENECKS) else norm
    widths = [float(m[1]) for part in rest if (m := re.fullmatch(r"w(\d+(?:\.\d+)?)", part))]
    widths = [w for w in widths if w > 0 and not (family == "mlp" and w % 1)]
    suffix = "-sc1" if "sc1" in rest and family == "resnet" and depth not in FOUR_STAGES else ""
    suffix += "-nobias" if "nobias" in rest and norm == "plain" else ""
    return f"{family}{depth}-{norm}" + (f"-w{widths[0]:.12g}" if widths else "") + suffix
