"""Training on a CPU in bfloat16 (autocast, channels_last) against float32: seconds of a step, gradients, accuracies."""

import argparse
import copy
import time
from dataclasses import replace
from statistics import mean, median

import torch
import torch.nn.functional as F
from common import save

from companion.runs import models
from companion.runs.data import Dataset, Split, load
from companion.runs.recipes import Recipe
from companion.runs.train import fit, train

STEPS = ("resnet20-bn-w1", "resnet20-ln-w1", "tiny10-ln-w2", "vgg11-bn-w1", "resnet18-bn-w0.5")


def step_row(name: str, batch_size: int, steps: int) -> dict:
    """Median seconds of a training step in both precisions, and how far the first gradient is from float64's."""
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half = Split(images, torch.arange(batch_size) % 10)
    data = Dataset("random", half, half, 10, (0.5,) * 3, (0.3,) * 3)
    torch.manual_seed(0)
    start = models.build(name, data.shape, data.classes)
    x = (images.double() / 255 - 0.5) / 0.3
    exact = gradient(copy.deepcopy(start).double().train(), x, half.labels)
    row = {"network": name, "batch": batch_size}
    for precision in ("float32", "bfloat16"):
        recipe = Recipe("steps", steps, batch_size, lr=1e-3, schedule="constant", bf16=precision == "bfloat16")
        times = [time.perf_counter()]
        model = copy.deepcopy(start)
        fit(model, data, recipe, callback=lambda *_, times=times: times.append(time.perf_counter()))
        row[f"{precision}, ms a step"] = 1e3 * median(b - a for a, b in zip(times[1:], times[2:], strict=False))
        taken = copy.deepcopy(start)
        fit(taken, data, replace(recipe, epochs=1, momentum=0.0))
        moved = torch.cat(
            [(a - b).detach().flatten() for a, b in zip(start.parameters(), taken.parameters(), strict=True)]
        )
        error = (moved.double() / recipe.lr - exact).norm() / exact.norm()
        row[f"{precision}, error of the gradient"] = float(error)
    row["times as fast"] = row["float32, ms a step"] / row["bfloat16, ms a step"]
    return row


def gradient(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean cross entropy, as one vector."""
    F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def accuracy_row(run: str, seeds: list[int]) -> dict:
    """Test accuracies and seconds of some seeds of a run in both precisions."""
    data = load(run.split("/")[0])
    row = {"run": run}
    for precision, change in (("float32", "~single"), ("bfloat16", "")):
        found = [train(f"{run}{change}/s{seed}", dataset=data, device="cpu", progress=False)[1] for seed in seeds]
        assert {metrics["precision"] for metrics in found} == {precision}, "this CPU does not compute in bfloat16"
        row |= {f"{precision}, s{seed} (%)": 100 * m["test_accuracy"] for seed, m in zip(seeds, found, strict=True)}
        row[f"{precision}, seconds"] = mean(metrics["seconds"] for metrics in found)
    row["times as fast"] = row["float32, seconds"] / row["bfloat16, seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--run", default="cifar10/resnet8-bn-w0.5/fast~epochs4", help="trained in both precisions")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [step_row(name, args.batch, args.steps) for name in STEPS]
    if args.seeds:
        rows.append(accuracy_row(args.run, args.seeds))
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
