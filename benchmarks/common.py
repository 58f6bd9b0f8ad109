"""What the benchmarks share: networks and images of CIFAR-10's size, timing, and the result file."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from companion.figures.report import environment
from companion.runs import models
from repairlib.corrections import fold_batchnorms
from repairlib.renorm import reset


def arguments(description: str, number: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--images", type=int, default=number)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def images(n: int, batch_size: int = 250) -> list[torch.Tensor]:
    """Random images (b, 3, 32, 32) with neighbouring pixels alike, in batches."""
    x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return list(nn.functional.interpolate(x, scale_factor=2, mode="bilinear").split(batch_size))


def network(name: str, seed: int) -> nn.Module:
    """Random weights, with the BatchNorm statistics of the images: activations as in a trained network."""
    torch.manual_seed(seed)
    model = models.build(name.replace("fused", "bn"), shape=(3, 32, 32), classes=10)
    model = reset(model, images(250)).model.eval()
    return fold_batchnorms(model, images(2)[0]) if "fused" in name else model


def timed(function: Callable) -> tuple[object, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def save(script: str, args: argparse.Namespace, rows: list[dict]) -> None:
    """Print the rows and write results/<script>.json beside this file."""
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    path = Path(__file__).parent / "results" / f"{Path(script).stem}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"arguments": vars(args), "environment": environment(), "rows": rows}, indent=1) + "\n")
