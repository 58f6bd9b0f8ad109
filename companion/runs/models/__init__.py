"""Networks by name, in any width. A family of networks is one file of this folder, and one line below.

    mlp<hidden layers>-<norm>[-w<units per layer>][-taper][-nobias]             mlp10-fused-w128
    vgg{11,13,16,19}-<norm>[-w<multiplier>][-nobias]                            vgg11-bn-w0.25
    resnet{8,20,32,44,56,110}-<norm>[-w<multiplier>][-sc1][-nobias]             resnet20-ln-w4
    resnet{18,26,50}-<norm>[-w<multiplier>][-nobias]                            resnet50-bn-w0.25
    tiny10-<norm>[-w<multiplier>][-nobias]                                      tiny10-ln-w16
    torchvision-{resnet18,resnet50,wide_resnet50_2}                             torchvision-resnet50

docs/runs.md says what the parts of a name mean. Networks are ordinary modules that torch.fx can trace; every layer is a
named attribute. A network of your own gets a name by `register`.
"""

from companion.runs.models import mlp, resnet, tiny, torchvision, vgg  # each registers its family
from companion.runs.models.initial import INITS, initialise
from companion.runs.models.registry import FAMILIES, Family, ModelName, build, parse, register

__all__ = [
    "FAMILIES",
    "INITS",
    "Family",
    "ModelName",
    "build",
    "initialise",
    "mlp",
    "parse",
    "register",
    "resnet",
    "tiny",
    "torchvision",
    "vgg",
]
