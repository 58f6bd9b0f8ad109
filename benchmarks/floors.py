"""What we take beside the least that could do it: matching, REPAIR, sampling, many networks, paths, layouts.

Both are timed in turns, in one process with one thread. The median of the turns' ratios counts, of layouts the least
of some repetitions. Freed memory is kept, as `make` has it.
"""

import argparse
import copy
import functools
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import images, network, save
from torch import nn

import repairlib
from companion.runs import models
from repairlib import combine
from repairlib.groups import permutation_spec
from repairlib.interpolate import interpolate_models
from repairlib.matching import match_activations, solve_assignment
from repairlib.recording import eval_mode
from repairlib.renorm import Repair
from repairlib.several import match_several
from repairlib.tracing import trace

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


def turns(functions: dict[str, Callable], times: int = 5) -> dict[str, list[float]]:
    """Seconds of CPU time of each in some repetitions, one after the other in turns, after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(times + 1):
        for name, function in functions.items():
            gc.collect()
            start = time.process_time()
            function()
            if number:
                found[name].append(time.process_time() - start)
    return found


def least(functions: dict[str, Callable], times: int = 5) -> dict[str, float]:
    """The least of `turns`."""
    return {name: min(seconds) for name, seconds in turns(functions, times).items()}


def forward(models: list[nn.Module], batches: list) -> None:
    with eval_mode(*models):
        for x in batches:
            for model in models:
                model(x)


def match_by_rethink(a: nn.Module, b: nn.Module, batches: list, taps: list[str]) -> list[torch.Tensor]:
    """Activation matching as Qu and Horvath's code does it: one pass, float64 sums of outer products and squares."""
    nets = [trace(model, batches[0][:2]) for model in (a, b)]
    sums: dict = {}
    with eval_mode(a, b):
        for x in batches:
            for (tap, u), (_, v) in zip(*(net.walk(x, taps) for net in nets), strict=True):
                u, v = (each.transpose(0, 1).flatten(1).double() for each in (u, v))
                n = u.shape[1]
                parts = (u.mean(1), v.mean(1), u.var(1), v.var(1), u @ v.T / n)
                old = sums.get(tap)
                sums[tap] = parts if old is None else tuple(p + q for p, q in zip(old, parts, strict=True))
    perms = []
    for mean_u, mean_v, var_u, var_v, outer in sums.values():
        k = len(batches)
        corr = outer / k - torch.outer(mean_u / k, mean_v / k)
        corr /= torch.outer((var_u / k).sqrt(), (var_v / k).sqrt()) + 1e-4
        perms.append(solve_assignment(torch.nan_to_num(corr)))
    return perms


def matching(args: argparse.Namespace) -> list[dict]:
    rows, batches = [], images(args.images)
    for name in ("resnet20-bn-w1", "vgg16-bn-w1", "resnet20-bn-w4"):
        a, b = (network(name, seed) for seed in (0, 1))
        some = batches if name != "resnet20-bn-w4" else batches[: max(1, len(batches) // 4)]
        spec = permutation_spec(a, batches[0][:2], verify=False)
        taps = [group.taps["post"] for group in spec.groups]
        found = turns({
            "ours": lambda a=a, b=b, some=some, spec=spec: match_activations(a, b, some, spec=spec),
            "floor": lambda a=a, b=b, some=some: forward([a, b], some),
            "theirs": lambda a=a, b=b, some=some, taps=taps: match_by_rethink(a, b, some, taps),
        }, args.times)  # fmt: skip
        rows.append(row(f"activation matching, {name}", "two forward passes", found))
    return rows


def repair(args: argparse.Namespace) -> list[dict]:
    rows, batches = [], images(args.images)
    for name, bn in (("vgg11-fused-w1", "frozen"), ("resnet20-bn-w1", "reset")):
        a, b = (network(name, seed) for seed in (0, 1))
        middle = interpolate_models(a, b)
        found = turns({
            "ours": lambda a=a, b=b, bn=bn: Repair(a, b, batches, bn=bn, limit=None)(0.5),
            "floor": lambda a=a, b=b, middle=middle: forward([a, b, middle], batches),
        }, args.times)  # fmt: skip
        rows.append(row(f"REPAIR of a midpoint, sequential, BatchNorms {bn}, {name}", "three forward passes", found))
    return rows


def sampling(args: argparse.Namespace) -> list[dict]:
    size, piece = args.weights // 8, 2**17
    states = [{f"layer{i}.weight": torch.randn(size) for i in range(8)} for _ in range(2)]

    def plain() -> dict:
        generator, out = torch.Generator().manual_seed(0), {}
        for name, a in states[0].items():
            b, mixed = states[1][name], torch.empty_like(a)
            for start in range(0, size, piece):
                part = slice(start, start + piece)
                u = torch.rand(len(a[part]), generator=generator)
                torch.lerp(a[part], b[part], u, out=mixed[part])
            out[name] = mixed
        return out

    found = turns({
        "ours": lambda: combine.elementwise(*states, combine.box(0.5), 0),
        "floor": plain,
    }, args.times)  # fmt: skip
    return [row(f"element-wise sampling, {8 * size * 4 / 1e9:.2g} GB of weights", "drawing and torch.lerp", found)]


def several(args: argparse.Namespace) -> list[dict]:
    batches = images(args.images // 2)
    models = [network("resnet20-bn-w1", seed) for seed in range(8)]
    spec = permutation_spec(models[0], batches[0][:2], verify=False)
    match = functools.partial(match_activations, data=batches, spec=spec)
    found = turns({
        "ours": lambda: match_several(models, match),
        "floor": lambda: forward(models, batches),
    }, args.times)  # fmt: skip
    return [row("8 networks by activations, to the first, resnet20-bn-w1", "eight forward passes", found)]


def path(args: argparse.Namespace) -> list[dict]:
    """A barrier of 101 points: of an MLP and images of the size of `digits`, and of an MLP as small as can be."""
    rows, alphas = [], [i / 100 for i in range(101)]
    for name, pixels, examples in (("mlp3-plain-w128", 16, 400), ("mlp2-plain-w32", 8, 100)):
        torch.manual_seed(0)
        a, b = (models.build(name, (1, pixels, pixels), 10) for _ in "ab")
        x, y = torch.randn(examples, 1, pixels, pixels), torch.arange(examples) % 10
        found = turns({
            "ours": lambda a=a, b=b, x=x, y=y: repairlib.barrier(a, b, [(x, y)], points=len(alphas)),
            "floor": lambda a=a, b=b, x=x, y=y: plain_path(a, b, x, y, alphas),
        }, 4 * args.times)  # fmt: skip
        rows.append(row(f"path of 101 points, {examples} images, {name}", "a plain loop", found))
    return rows


def plain_path(a: nn.Module, b: nn.Module, x: torch.Tensor, y: torch.Tensor, alphas: list[float]) -> list:
    net, ends, out = copy.deepcopy(a), [dict(m.named_parameters()) for m in (a, b)], []
    with torch.no_grad():
        for alpha in alphas:
            for name, p in net.named_parameters():
                p.copy_(torch.lerp(ends[0][name], ends[1][name], alpha))
            logits = net(x)
            out.append((float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())))
    return out


def layouts(args: argparse.Namespace) -> list[dict]:
    """Evaluation by size of the images, layout of inputs and weights, and batch: microseconds an image."""
    rows, last = [], torch.channels_last
    for name in ("resnet20-bn-w0.25", "resnet20-bn-w1", "resnet20-ln-w0.5", "tiny10-ln-w1", "vgg11-bn-w0.25",
                 "vgg11-bn-w1"):  # fmt: skip
        for channels, size in ((1, 16), (3, 32)):  # of `digits` and CIFAR-10
            model = models.build(name, shape=(channels, size, size), classes=10).eval()
            x, converted = torch.randn(200, channels, size, size), copy.deepcopy(model).to(memory_format=last)
            functions = {}
            for batch in (25, 50, 100, 200):
                plain, parts = x.split(batch), x.contiguous(memory_format=last).split(batch)
                functions[f"NCHW {batch}"] = functools.partial(forward, [model], plain)
                functions[f"NHWC inputs {batch}"] = functools.partial(forward, [model], parts)
                functions[f"NHWC {batch}"] = functools.partial(forward, [converted], parts)
            found = least(functions, args.times)
            rows.append({"what": f"evaluation, {name}", "pixels": size,
                         **{f"{key} (us)": 1e6 * value / len(x) for key, value in found.items()}})  # fmt: skip
    return rows


def allocator(args: argparse.Namespace) -> list[dict]:
    """Forward passes where freed memory is kept, as `make` sets it (see the Snakefile), and where it is given back."""
    rows = []
    for name in ("resnet20-bn-w1", "vgg16-bn-w1"):
        code = (
            "import torch, floors; torch.set_num_threads(1); batches = floors.images(250); "
            f"net = floors.network({name!r}, 0); "
            "print(floors.least({'': lambda: floors.forward([net], batches)}, 6)[''])"
        )
        found: dict[str, list[float]] = {"ours": [], "floor": []}
        for _ in range(3):
            for key, kept in (("ours", {}), ("floor", KEEP)):
                environment = {k: v for k, v in os.environ.items() if k not in KEEP} | kept
                here = {"cwd": Path(__file__).parent, "env": environment, "text": True}
                found[key].append(float(subprocess.check_output([sys.executable, "-c", code], **here)))
        rows.append(row(f"forward pass of 250 images, memory given back, {name}", "memory kept", found))
    return rows


def row(what: str, floor: str, found: dict[str, list[float]]) -> dict:
    """Median seconds, and medians of ratios turn by turn: a shared machine is slower now and faster then."""

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(found["ours"], found[other], strict=True))

    seconds = {name: statistics.median(each) for name, each in found.items()}
    out = {"what": what, "ours (s)": seconds["ours"], "floor": floor, "floor (s)": seconds["floor"],
           "ours / floor": ratio("floor")}  # fmt: skip
    if "theirs" in found:
        out |= {"Rethink's method (s)": seconds["theirs"], "ours / theirs": ratio("theirs")}
    return out


PARTS = {f.__name__: f for f in (matching, repair, sampling, several, path, layouts, allocator)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--times", type=int, default=4, help="repetitions; the median counts")
    parser.add_argument("--weights", type=int, default=300_000_000)
    usual = ",".join(part for part in PARTS if part != "layouts")  # which takes as long as all others
    parser.add_argument("--parts", default=usual, help="which to measure: these, or layouts")
    args = parser.parse_args()
    if not KEEP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    torch.set_num_threads(1)
    rows = [each for part in args.parts.split(",") for each in PARTS[part](args)]
    save(__file__ if args.parts == parser.get_default("parts") else f"floors-{args.parts}", args, rows)


if __name__ == "__main__":
    main()
