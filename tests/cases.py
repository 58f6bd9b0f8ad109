"""The models that every test of groups, matching and renormalisation runs on: small, of each family and norm.

torchvision's networks come in one size, which is not small: test_groups.py and test_models.py have their own tests.
"""

import copy

import torch
from torch import nn

from companion.runs import models

# name of the model, shape of an input
CASES = {
    "mlp1-plain-w6": (1, 8, 8),
    "mlp3-plain-w8": (1, 8, 8),
    "mlp2-bn-w8": (1, 8, 8),
    "vgg11-plain-w0.125": (3, 16, 16),
    "vgg11-bn-w0.125": (3, 16, 16),
    "vgg13-bn-w0.125": (3, 16, 16),
    "vgg16-plain-w0.125": (3, 16, 16),
    "vgg19-bn-w0.125": (3, 16, 16),
    "resnet8-bn-w0.5": (3, 16, 16),
    "resnet8-plain-w0.5": (3, 16, 16),
    "resnet20-bn-w0.25": (3, 16, 16),
    "resnet20-bn-w0.25-sc1": (3, 16, 16),
    "resnet32-bn-w0.25": (3, 16, 16),
    "resnet18-bn-w0.125": (3, 16, 16),
    "resnet18-plain-w0.125": (3, 16, 16),
    "resnet26-bn-w0.0625": (3, 16, 16),
    "mlp2-ln-w8": (1, 8, 8),
    "mlp2-plain-w8-nobias": (1, 8, 8),
    "vgg11-ln-w0.125": (3, 16, 16),
    "vgg11-plain-w0.125-nobias": (3, 16, 16),
    "tiny10-ln-w0.5": (3, 16, 16),
    "resnet8-ln-w0.5": (3, 16, 16),
    "resnet20-ln-w0.25-sc1": (3, 16, 16),
    "resnet8-fixup-w0.5": (3, 16, 16),
    "resnet20-fixup-w0.25-sc1": (3, 16, 16),
    "resnet8-plain-w0.5-nobias": (3, 16, 16),
}
CLASSES = 5


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The case with random weights, and normalisation as training leaves it: no ones, no zeros."""
    torch.manual_seed(seed)
    model = models.build(name, shape=CASES[name], classes=CLASSES)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
            elif isinstance(getattr(module, "bias", None), torch.Tensor):
                module.bias.uniform_(-0.3, 0.3)
        if "-fixup-" in name:
            for key, parameter in model.named_parameters():
                if parameter.numel() == 1:
                    parameter.uniform_(0.5, 1.5) if key.endswith("scale") else parameter.uniform_(-0.3, 0.3)
                elif not parameter.any():
                    nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model.to(dtype).eval()


def inputs(name: str, n: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random images (n, c, h, w) for a case."""
    return torch.randn(n, *CASES[name], generator=torch.Generator().manual_seed(seed)).to(dtype)


def batches(name: str, n: int = 60, size: int = 25, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random calibration data in uneven batches."""
    return list(inputs(name, n, seed=9, dtype=dtype).split(size))


def noisy(model: nn.Module, noise: float, seed: int = 5) -> nn.Module:
    """Copy with normal noise on every parameter, relative to its mean size."""
    generator = torch.Generator().manual_seed(seed)
    out = copy.deepcopy(model)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(noise * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return out
