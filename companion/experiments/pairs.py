"""Two trained runs and the data to compare them on: what every experiment on a pair of networks starts from."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from torch import nn

from companion.experiments.methods import MATCHINGS, RENORMS, Path, RepairPath
from companion.runs import store, train
from companion.runs.data import Dataset, Loader, iterate, load
from companion.runs.names import seeded
from repairlib.evaluation import evaluate
from repairlib.matching import Matching
from repairlib.names import check
from repairlib.renorm import Repair

# Images. Statistics that a simultaneous pass takes depend on it, and so it is the same on every device.
CALIBRATION_BATCH = 250


@dataclass(frozen=True)
class Pair:
    """Endpoints A and B of one architecture, with their data.

    They are matched and measured once for all that is asked of them, and so must stay as they are.

    Attributes:
        runs: names of the two runs.
        a, b: the networks, as trained.
        dataset: the data that they are compared on, with its batches on the device.
        calibration: batches of training images without augmentation, for matching and statistics.
        test: batches of the test set.
        method: how units of B are matched with units of A unless another way is asked for, one of `MATCHINGS`.
        options: of that matching.
    """

    runs: tuple[str, str]
    a: nn.Module
    b: nn.Module
    dataset: Dataset
    calibration: Loader
    test: Loader
    method: str = "AM"
    options: Mapping[str, object] = field(default_factory=dict)
    _matched: dict[str, tuple[Matching, nn.Module]] = field(default_factory=dict, init=False, repr=False)
    _measured: dict[str, list[Repair]] = field(default_factory=dict, init=False, repr=False)  # by matching

    def _match(self, method: str | None) -> tuple[Matching, nn.Module]:
        method = method or self.method
        if method not in self._matched:
            match = MATCHINGS[check(method, MATCHINGS, "matching")].match
            options = self.options if method == self.method else {}
            found = match(self.a, self.b, self.calibration, **options)
            self._matched[method] = found, found.apply(self.b)
        return self._matched[method]

    def has_matched(self, method: str) -> bool:
        """Whether units have been matched by a method already."""
        return method in self._matched

    def matching_by(self, method: str | None = None) -> Matching:
        """Units of B matched with units of A; made once for each method."""
        return self._match(method)[0]

    def aligned_by(self, method: str | None = None) -> nn.Module:
        """B with its units in A's order; B itself if the method is "none"."""
        return self.b if method == "none" else self._match(method)[1]

    @property
    def matching(self) -> Matching:
        """Units of B matched with units of A, by the pair's own method."""
        return self.matching_by()

    @property
    def aligned(self) -> nn.Module:
        """B with its units in A's order, by the pair's own method."""
        return self.aligned_by()

    def path(self, matching: str | None = None, renorm: str = "none", **options) -> Path:
        """From alpha to the network between A and B, matched and renormalised in some way.

        Args:
            matching: one of `MATCHINGS`; default the pair's own.
            renorm: one of `RENORMS`.
            **options: of the renormalisation, see `renorm.Options`.
        """
        how = RENORMS[check(renorm, RENORMS, "renormalisation")]
        if isinstance(how.path, RepairPath):  # endpoints are measured once for several
            options = {"measured": self._measured.setdefault(matching or self.method, [])} | options
        return how.path(self.a, self.aligned_by(matching), self.calibration, **options)

    @cached_property
    def endpoint_accuracy(self) -> float:
        """Mean test accuracy of the two endpoints, in [0, 1]."""
        return (self.evaluate(self.a)[1] + self.evaluate(self.b)[1]) / 2

    @property
    def title(self) -> str:
        """The model and the data, to put over a figure."""
        return title_of(self.runs[0].rpartition("/")[0], self.dataset.name)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Test loss (nats) and accuracy in [0, 1]."""
        return evaluate(model, self.test)

    def compare(self, **models: nn.Module) -> pd.DataFrame:
        """Test loss (nats) and accuracy (%) of some networks, a row each."""
        measured = {name.replace("_", " "): self.evaluate(model) for name, model in models.items()}
        frame = pd.DataFrame(measured, ["loss (nats)", "accuracy (%)"]).T
        return (frame * [1, 100]).round({"loss (nats)": 3, "accuracy (%)": 1})

    def sample(self, n: int, seed: int) -> Loader:
        """n training images drawn at random without augmentation; another seed draws others."""
        chosen = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(seed))[:n]
        half = self.dataset.train.take(chosen)
        return iterate(replace(self.dataset, train=half), "train", CALIBRATION_BATCH)


def trained(run: str, device: str | torch.device) -> nn.Module:
    """The network of a run, trained first if it is not stored yet, in the layout that is mostly the fastest."""
    return store.get(run, device).to(memory_format=torch.channels_last)


def load_pair(
    runs: Sequence[str],
    calibration: int = 5000,
    device: str | None = None,
    *,
    data: str | None = None,
    test_images: int | None = None,
    matching: str = "AM",
    **options,
) -> Pair:
    """The pair of two runs, trained first if they are not stored yet.

    Args:
        runs: two run names of one data set and model, such as ``digits/resnet20-bn-w1/quick/s1``.
        calibration: training images for matching and statistics (5,000 suffice, Jordan et al. 2022, Sec. 4.2).
        device: default `train.default_device()`.
        data: the data set to compare them on. Without it they must have been trained on one, which it is then.
        test_images: evaluate on so many, always the same; default all.
        matching, **options: how units are matched, one of `MATCHINGS`, and its options; for instance
            ``matching="WM", restarts=10``.

    Raises:
        ValueError: not two runs of one model, of two data sets and none is named, or an unknown way to match.
    """
    check(matching, MATCHINGS, "matching")
    names = [train.parse_run(run) for run in runs]
    if len(names) != 2 or len({name.model for name in names}) > 1:
        raise ValueError(f"a pair is two runs of one model, not {', '.join(runs) or 'nothing'}")
    if data is None and names[0].data != names[1].data:
        raise ValueError(f"{' and '.join(runs)} were trained on two data sets: say with data= which to compare them on")
    device = device or train.default_device()
    a, b = (trained(run, device) for run in runs)
    dataset = load(data or names[0].data, device=device)
    calibration_batches = iterate(dataset, "train", CALIBRATION_BATCH, limit=calibration)
    test = iterate(dataset, "test", limit=test_images)
    return Pair(tuple(runs), a, b, dataset, calibration_batches, test, matching, options)


def pairs_of(
    run: str, seeds: Sequence[int], calibration: int = 5000, device: str | None = None, **options
) -> Iterator[tuple[str, Pair]]:
    """Every pair of seeds of a run, one after the other, by name: (1, 2, 3) gives "1-2", "1-3" and "2-3".

    Args:
        run: a run name without its seed, such as "digits/resnet20-ln-w1/quick".
        seeds: which.
        calibration, device, **options: see `load_pair`.
    """
    for a, b in itertools.combinations(seeds, 2):
        yield f"{a}-{b}", load_pair([seeded(run, a), seeded(run, b)], calibration, device, **options)


def title_of(run: str, data: str | None = None) -> str:
    """The model and the data of a run without its seed, to put over a figure; or another data set.

    >>> title_of("digits/tiny10-ln/quick")
    'tiny10-ln-w1 on digits'
    """
    name = train.parse_run(seeded(run, 1), check_data=False)
    return f"{name.model} on {data or name.data}"
