"""Fold BatchNorms into the layers before them."""

import copy

import torch
import torch.fx
from torch import nn


def fuse(model: nn.Module) -> nn.Module:
    """Copy a network with every BatchNorm folded into the convolution or linear layer before it.

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
