"""Two trained runs and the data to compare them on: what every experiment on a pair of networks starts from."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from repairlib import store, train
from repairlib.data import Batches, Dataset, Split, iterate, load
from repairlib.interpolate import Path, interpolate_models, walk_path
from repairlib.matching import Matching, match_activations
from repairlib.renorm import Repair


@dataclass(frozen=True)
class Pair:
    """Endpoints A and B of one architecture, with their data.

    Attributes:
        runs: names of the two runs.
        a, b: the networks, as trained.
        dataset: the data that they were trained on, resident on the device.
        calibration: batches of training images without augmentation, for matching and statistics.
        test: batches of the test set.
    """

    runs: tuple[str, str]
    a: nn.Module
    b: nn.Module
    dataset: Dataset
    calibration: Batches
    test: Batches

    @cached_property
    def matching(self) -> Matching:
        """Units of B matched with units of A by correlation of activations."""
        return match_activations(self.a, self.b, self.calibration)

    @cached_property
    def aligned(self) -> nn.Module:
        """B with its units in A's order."""
        return self.matching.apply(self.b)

    @cached_property
    def accuracy(self) -> float:
        """Mean test accuracy of the two endpoints, in [0, 1]."""
        return (self.evaluate(self.a)[1] + self.evaluate(self.b)[1]) / 2

    def direct(self, alpha: float = 0.5) -> nn.Module:
        """Interpolation without alignment."""
        return interpolate_models(self.a, self.b, alpha)

    def midpoint(self, alpha: float = 0.5) -> nn.Module:
        """Interpolation of the aligned endpoints."""
        return interpolate_models(self.a, self.aligned, alpha)

    def repair(self, data: Iterable | None = None, **options) -> Repair:
        """REPAIR between the aligned endpoints, on the calibration data unless other data is given, all of it."""
        return Repair(self.a, self.aligned, self.calibration if data is None else data, **({"limit": None} | options))

    @property
    def title(self) -> str:
        """The model and the data, to put over a figure."""
        name = train.parse_run(self.runs[0])
        return f"{name.model} on {name.data}"

    def origin(self, start: float) -> dict:
        """How a result of this pair was made, as `report.save_item` records it; `start` is of time.perf_counter()."""
        return {"runs": self.runs, "device": self.dataset.device, "seconds": time.perf_counter() - start}

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Test loss (nats) and accuracy in [0, 1]."""
        return train.evaluate(model, self.test)

    def path(self, make, alphas: Iterable[float]) -> Path:
        """Evaluate ``make(alpha)`` on the test set for every alpha."""
        return walk_path(make, alphas, self.evaluate)

    def sample(self, n: int, seed: int) -> Batches:
        """n training images drawn at random without augmentation; another seed draws others."""
        chosen = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(seed))[:n]
        chosen = chosen.to(self.dataset.device)
        half = Split(self.dataset.train.images[chosen], self.dataset.train.labels[chosen])
        return iterate(replace(self.dataset, train=half), "train", batch_size=500)


def load_pair(runs: Sequence[str], calibration: int = 5000, device: str | None = None) -> Pair:
    """The pair of two runs, trained first if they are not stored yet.

    Args:
        runs: two run names of one data set and model, such as ``digits/resnet20-bn-w1/quick/s1``.
        calibration: training images for matching and statistics (5,000 suffice, Jordan et al. 2022, Sec. 4.2).
        device: default `train.default_device()`.

    Raises:
        ValueError: not two runs of one data set and one model.
    """
    names = [train.parse_run(run) for run in runs]
    if len(names) != 2 or len({(name.data, name.model) for name in names}) > 1:
        raise ValueError(f"a pair is two runs of one data set and one model, not {', '.join(runs) or 'nothing'}")
    device = device or train.default_device()
    a, b = (store.get(run, device) for run in runs)
    dataset = load(names[0].data, device=device)
    calibration_batches = iterate(dataset, "train", batch_size=500, limit=calibration)
    return Pair(tuple(runs), a, b, dataset, calibration_batches, iterate(dataset, "test", batch_size=1000))
