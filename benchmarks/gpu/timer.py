"""A process that measures on the device: requests on its input, answers on its output, a line of JSON each."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from common import images, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from companion.runs import costs, models, train
from companion.runs.data.registry import Dataset, Split
from companion.runs.devices import default_device
from repairlib.evaluation import evaluate, evaluate_many
from repairlib.interpolate import interpolate_models
from repairlib.matching import match_activations
from repairlib.renorm import Repair
from repairlib.weight_matching import match_weights

DEVICE = torch.device(default_device())
CUDA = DEVICE.type == "cuda"
WARM, STEPS = (20, 100) if CUDA else (5, 10)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each tensor of each operation once; views are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
        return result


def wait() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes, with what it left to the device."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def counted(function: Callable[[], object]) -> tuple[float, float]:
    """FLOPs of a call, and bytes that its operations read and write."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        function()
    return float(flops.get_total_flops()), float(traffic.bytes)


def ceilings() -> dict[str, float]:
    """What the device can do at best: a copy in GB/s, matrix products in TFLOP/s."""
    n = 256
    while n < 8192 and _median(partial(torch.mm, *torch.randn(2, n, n, device=DEVICE)), 1) < 0.01:
        n *= 2
    source = torch.empty(n * n * 8, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy GB/s": 2 * source.numel() / 1e9 / _median(lambda: target.copy_(source))}
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    for name, dtype, tf32 in (("bfloat16", torch.bfloat16, before), ("TF32", torch.float32, True),
                              ("float32", torch.float32, False)):  # fmt: skip
        flags.allow_tf32 = tf32
        factors = torch.randn(2, n, n, device=DEVICE).to(dtype)
        found[f"{name} TFLOP/s"] = 2 * n**3 / 1e12 / _median(partial(torch.mm, *factors))
    flags.allow_tf32 = before
    return found


def _median(function: Callable[[], object], times: int = 5) -> float:
    for _ in range(2):
        function()
    return statistics.median(seconds(function) for _ in range(times))


def _random(run: costs.Run, batches: int) -> Dataset:
    """A data set like the run's, of so many batches of random images."""
    size = min(run.recipe.batch_size, run.facts.train) * batches
    channels = run.facts.shape[0]
    pixels = torch.randint(256, (size, *run.facts.shape), dtype=torch.uint8)
    split = Split(pixels, torch.arange(size) % run.facts.classes)
    return Dataset("random", split, split, run.facts.classes, (0.5,) * channels, (0.3,) * channels).to(DEVICE)


def steps(name: str, how: str = "as is", count: int = STEPS) -> dict[str, Any]:
    """Milliseconds of a training step of a run's network, the losses of the first steps, and the peak memory.

    how: "as is", "graph" (one CUDA graph a step) or "no search" (for cuDNN's fastest algorithm).
    """
    run = costs.describe(name)
    data = _random(run, WARM)
    # So small a rate that nothing diverges, but large enough that losses differ if steps do.
    recipe = replace(run.recipe, batch_size=len(data.train) // WARM, lr=1e-3, warmup_epochs=0.0, start=0, stop=None,
                     until=None, schedule="constant", milestones=())  # fmt: skip
    os.environ["REPAIRLIB_GRAPH"] = "1" if how == "graph" else "0"
    losses: list[torch.Tensor] = []

    def fit(epochs: int) -> None:
        torch.manual_seed(0)
        model = models.build(run.model, run.facts.shape, run.facts.classes)
        with mock.patch.object(train, "_fastest_convolutions", nullcontext) if how == "no search" else nullcontext():
            losses.append(train.fit(model, data, replace(recipe, epochs=epochs)))

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    fit(1)
    more = max(count // WARM, 1)
    short, long = seconds(lambda: fit(1)), seconds(lambda: fit(1 + more))
    memory = torch.cuda.max_memory_allocated() if CUDA else 0
    ms = 1000 * (long - short) / (more * WARM)
    return {"ms": ms, "losses": losses[0].tolist(), "peak GB": memory / 1e9}


def floor(name: str) -> dict[str, float]:
    """FLOPs of a training step of a run's network, and bytes that its operations read and write."""
    run = costs.describe(name)
    data = _random(run, 1)
    model = models.build(run.model, run.facts.shape, run.facts.classes)
    recipe = replace(run.recipe, batch_size=len(data.train), epochs=1, lr=1e-6, warmup_epochs=0.0, start=0, stop=None,
                     until=None, schedule="constant", milestones=())  # fmt: skip
    os.environ["REPAIRLIB_GRAPH"] = "0"
    flops, traffic = counted(lambda: train.fit(model, data, recipe))
    return {"flops": flops, "bytes": traffic}


def _network(name: str, seed: int) -> nn.Module:
    """Random weights; statistics of the images where there is BatchNorm."""
    if models.parse(name).norm in ("bn", "fused"):
        return network(name, seed)
    torch.manual_seed(seed)
    return models.build(name, shape=(3, 32, 32), classes=10).eval()


def methods(name: str, number: int) -> list[dict[str, Any]]:
    """Seconds, FLOPs and bytes of what notebooks do with two networks of random weights and so many images."""
    a, b = (_network(name, seed).to(DEVICE) for seed in (0, 1))
    batches = [x.to(DEVICE) for x in images(number)]
    labelled = [(x, torch.zeros(len(x), dtype=torch.long, device=DEVICE)) for x in batches]
    states = [interpolate_models(a, b, alpha).state_dict() for alpha in (0.2, 0.4, 0.6, 0.8)]
    calls = {
        "match_activations": lambda: match_activations(a, b, batches),
        "match_weights": lambda: match_weights(a, b, batches[0][:2]),
        "Repair, sequential": lambda: Repair(a, b, batches, limit=None)(0.5),
        "Repair, simultaneous": lambda: Repair(a, b, batches, limit=None, method="simultaneous")(0.5),
        "evaluate": lambda: evaluate(a, labelled),
        "evaluate_many, 4 networks": lambda: evaluate_many(a, states, labelled, progress=False),
    }
    rows = []
    for what, call in calls.items():
        try:
            flops, traffic = counted(call)
            took = statistics.median(seconds(call) for _ in range(3))
            rows.append({"network": name, "what": what, "seconds": took, "flops": flops, "bytes": traffic})
        except Exception as error:
            rows.append({"network": name, "what": what, "error": f"{type(error).__name__}: {error}"})
    return rows


REQUESTS = {call.__name__: call for call in (ceilings, steps, floor, methods)}


def main() -> None:
    """Answer requests [name, argument...] until the input ends: {"answer": ...} or {"error": ...}."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything else prints is no answer
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        try:
            reply = {"answer": REQUESTS[request](*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
