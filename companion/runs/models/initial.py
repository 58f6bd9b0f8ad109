"""Initial weights of convolutions and linear layers; those of norms are what PyTorch gives them."""

from torch import nn


def _kaiming_normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Normal of variance 2 / inputs, biases zero (He et al. 2015)."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _fan_out(layer: nn.Conv2d | nn.Linear) -> None:
    """Normal of variance 2 / outputs, and of std 0.01 in linear layers; biases zero (Qu and Horvath 2024, App. F.5)."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _uniform(layer: nn.Conv2d | nn.Linear) -> None:
    """PyTorch's own: weights and biases uniform in +-1 / sqrt(inputs)."""
    layer.reset_parameters()


# By the names that recipes have for them. A convolution has channels times positions of its kernel inputs.
INITS = {"kaiming-normal": _kaiming_normal, "fan-out": _fan_out, "uniform": _uniform}


def initialise(model: nn.Module, init: str = "kaiming-normal") -> None:
    """Draw new weights for all convolutions and linear layers, from torch's global generator; KeyError if unknown."""
    draw = INITS[init]
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            draw(layer)
