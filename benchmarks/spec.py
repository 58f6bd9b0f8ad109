"""Permutation groups of whole networks, derived and verified, beside torch-pruning's graph of dependencies.

torch-pruning (`pip install torch-pruning`) says which weights belong together and verifies nothing. Both are timed in
turns, in one process with one thread, and the least of some repetitions counts. Peak memory is what a process of
its own takes beyond building the network and one forward pass.
"""

import argparse
import functools
import resource
import subprocess
import sys
import warnings

import torch
import torchvision
from common import save
from floors import least
from torch import nn

from companion.runs import models
from repairlib.groups import permutation_spec, spec_of
from repairlib.tracing import trace

NETWORKS = (
    "vgg16,vit_b_16,resnet50,convnext_tiny,swin_t,densenet121,mobilenet_v3_large,"
    "resnet20-bn-w1"  # of the companion, at CIFAR-10's size
)


def build(name: str, images: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if "-" in name:
        return models.build(name, shape=(3, 32, 32), classes=10).eval(), torch.randn(images, 3, 32, 32)
    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(images, 3, 224, 224)


def forward(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        model(x)


def measure(name: str, args: argparse.Namespace) -> dict:
    model, x = build(name, args.images)
    functions = {
        "ours": lambda: permutation_spec(model, x),
        "graph": lambda: trace(model, x),
        "groups": lambda: permutation_spec(model, x, verify=False),
        "forward": functools.partial(forward, model, x),
    }
    if torch_pruning is not None:
        functions["theirs"] = lambda: torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    found = least(functions, args.times)
    net = trace(model, x)
    spec = spec_of(net, x, verify=False)
    row = {
        "what": name, "groups": len(spec.groups), "weights (million)": sum(p.numel() for p in model.parameters()) / 1e6,
        "ours (s)": found["ours"], "of it the graph (s)": found["graph"],
        "the groups (s)": found["groups"] - found["graph"], "the check (s)": found["ours"] - found["groups"],
        "a forward pass (s)": found["forward"], "ours, peak memory (MB)": memory(name, args, "ours"),
    }  # fmt: skip
    if torch_pruning is not None:
        row |= {"torch-pruning (s)": found["theirs"], "ours / torch-pruning": found["ours"] / found["theirs"],
                "torch-pruning, peak memory (MB)": memory(name, args, "theirs")}  # fmt: skip
    return row


def memory(name: str, args: argparse.Namespace, whose: str) -> float:
    """Growth of the peak memory of a process of its own, in MB."""
    command = [sys.executable, __file__, "--networks", name, "--images", str(args.images), "--memory", whose]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(name: str, images: int, whose: str) -> None:
    model, x = build(name, images)
    forward(model, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if whose == "ours":
        permutation_spec(model, x)
    else:
        torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--images", type=int, default=2, help="images of the example, as matching takes two")
    parser.add_argument("--times", type=int, default=3, help="repetitions, of which the least counts")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print_memory(args.networks, args.images, args.memory)
        return
    if torch_pruning is None:
        print("torch-pruning is not there, so ours is timed alone: pip install torch-pruning")
    settings = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "memory"})
    save(__file__, settings, [measure(name, args) for name in args.networks.split(",")])


warnings.filterwarnings("ignore", module="torch_pruning")
try:
    import torch_pruning
except ImportError:
    torch_pruning = None

if __name__ == "__main__":
    main()
