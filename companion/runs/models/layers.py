"""Layers that several families have."""

from torch import Tensor, nn

from companion.runs.models.registry import ModelName


class ChannelNorm(nn.Module):
    """LayerNorm over the channels at each position of a map (n, c, h, w) (Ainsworth et al. 2022)."""

    def __init__(self, channels: int):
        super().__init__()
        self.ln = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


MAP_NORMS = {"bn": nn.BatchNorm2d, "ln": ChannelNorm}


def norm(name: ModelName, channels: int) -> nn.Module:
    """The norm of a convolution's outputs, Identity if it has none."""
    return MAP_NORMS[name.norm](channels) if name.norm in MAP_NORMS else nn.Identity()


def scaled(channels: int, width: float) -> int:
    """Number of channels at a width, at least 1."""
    return max(1, round(channels * width))


def add_conv(model: nn.Sequential, i: int, inputs: int, outputs: int, name: ModelName, kernel=3, stride=1) -> None:
    """Append convolution, norm and ReLU number i."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=name.biased)
    model.add_module(f"conv{i}", conv)
    if name.norm in MAP_NORMS:
        model.add_module(f"{name.norm}{i}", norm(name, outputs))
    model.add_module(f"relu{i}", nn.ReLU())
