"""What training costs: FLOPs, bytes and seconds of runs by name, without training them.

Training a network for E epochs on n images takes about 3 E n F FLOPs, where F is those of one image's forward pass,
counted on PyTorch's `meta` device. A run takes as long as a stored run of the same network with another seed. If there
is none, its FLOPs are divided by the FLOP/s of stored runs of the same kind of network, or of a few training steps
timed here and now. Data sets are known by name, and neither downloaded nor read.
"""

import functools
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from companion.runs import models, train
from companion.runs.data import DATASETS, Dataset, Facts, Split, base_name, data_root
from companion.runs.data.folders import halves_of, stream_folder
from companion.runs.devices import device_name
from companion.runs.names import lineage, parse_run, recipe_of
from companion.runs.recipes import Recipe
from companion.runs.store import Store

CALIBRATION = (5000, 500)  # training images that notebooks match and measure on, and where there are fewer than that
STEP = {"cpu": 4e9, "cuda": 5e12}  # FLOPs of a step that is timed: about 0.1 s or less
Speed = Mapping[str, list[tuple[int, float]]]  # by kind of network: (FLOPs of one image's forward pass, FLOP/s)


@dataclass(frozen=True)
class Run:
    """A training run; without `facts`, nothing is known of its data and the numbers are zero."""

    name: str
    stored: bool
    model: models.ModelName  # as it is trained: with BatchNorm where that is fused afterwards
    recipe: Recipe
    facts: Facts | None
    forward: int = 0  # FLOPs of one image's forward pass
    size: int = 0  # bytes of the checkpoint

    @property
    def network(self) -> str:
        """The name without its seed."""
        return self.name.rpartition("/")[0]

    @property
    def train_flops(self) -> float:
        """FLOPs of training, and of the evaluation that follows it."""
        if not self.facts:
            return 0.0
        batch_size = min(self.recipe.batch_size, self.facts.train)
        images = self.recipe.trained_epochs * (self.facts.train // batch_size) * batch_size
        return self.forward * (3 * images + self.facts.train + self.facts.test)

    @property
    def evaluation_flops(self) -> float:
        """FLOPs of one pass over what a notebook evaluates on: the test set and the calibration images."""
        if not self.facts:
            return math.nan
        most, few = CALIBRATION
        return self.forward * (self.facts.test + (most if self.facts.train >= most else few))


def find_facts(name: str, root: str | Path | None = None) -> Facts | None:
    """The size of a data set, by name or by counting an image folder that is there; None if neither is possible.

    `<name>-first80` and `<name>-last80` are halves (see data.base_name); images of `<name>@64` are of 64 x 64 pixels.

    >>> find_facts("cifar100-first80")
    Facts(train=25000, test=10000, shape=(3, 32, 32), classes=100)
    """
    root = data_root(root)
    if name != base_name(name) and not halves_of(root / name):
        whole = find_facts(base_name(name), root)
        return whole and whole._replace(train=whole.train // 2)
    known, _, side = name.partition("@")
    facts = _count(root / known) if halves_of(root / known) else known in DATASETS and DATASETS[known].facts
    if facts and side:
        return facts._replace(shape=(3, int(side), int(side))) if side.isdecimal() else None
    return facts or None


@functools.cache
def _count(folder: Path) -> Facts:
    """Images and classes of an image folder, and the shape of its first image; DataMissing if a class is empty."""
    halves = stream_folder(folder, 1)
    with Image.open(halves[0].paths[0]) as image:  # only its head is read
        shape = (1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3, image.height, image.width)
    return Facts(*map(len, halves), shape, int(halves[0].labels.max()) + 1)


@functools.cache
def cost(model: models.ModelName, shape: tuple[int, int, int], classes: int) -> tuple[int, int]:
    """FLOPs of one image's forward pass (a multiplication and an addition are two), and bytes of all weights."""
    with torch.device("meta"):
        network = models.build(model, shape, classes)
    return count_flops(network, shape), sum(v.numel() * v.element_size() for v in network.state_dict().values())


def count_flops(network: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """FLOPs of one image's forward pass through a network on the `meta` device."""
    from torch.utils.flop_counter import FlopCounterMode  # here, as it takes long to import

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *shape, device="meta"))
    return counter.get_total_flops()


def describe(name: str, stored: Iterable[str] = (), root: str | Path | None = None) -> Run:
    """What training a run takes; ValueError if its name does not parse."""
    run = parse_run(name, check_data=False)
    trained = replace(run.model, norm="bn") if run.model.norm == "fused" else run.model
    recipe = recipe_of(run)
    facts = find_facts(run.data, root)
    numbers = cost(run.model, facts.shape, facts.classes) if facts else (0, 0)
    return Run(str(run), str(run) in stored, trained, recipe, facts, *numbers)


# ------------------------------------------------------------------------------------------------------------ seconds


def estimate(runs: Iterable[str], device: str | None = None, *, speed: Speed | None = None) -> tuple[list[str], float]:
    """Say which runs are missing and about how long it takes to train them, one after another.

    Args:
        runs: names.
        device: where they would be trained; default `train.default_device()`.
        speed: FLOP/s by kind of network; default from stored runs, else measured within about a second.

    Returns:
        (names of the runs that have to be trained, seconds); NaN if the data of one are unknown. Imported runs count as
        missing and take no time.

    Raises:
        ValueError: a name does not parse.
    """
    stored = set(Store().names())
    missing = [run for run in with_parents(runs) if run not in stored]
    seconds = train_seconds(map(describe, missing), device or train.default_device(), speed=speed)
    return missing, sum(seconds.values())


def with_parents(runs: Iterable[str]) -> list[str]:
    """The runs, each once and in full, and before each the runs it continues."""
    return list(dict.fromkeys(name for run in runs for name in lineage(run)))


def train_seconds(
    runs: Iterable[Run], device: str, *, speed: Speed | None = None, budget: float = 1.0
) -> dict[str, float]:
    """Seconds that each run takes to train, by name; NaN if its data are unknown, 0 if it is imported.

    Args:
        runs: see `describe`.
        device: where they would be trained.
        speed: FLOP/s by kind of network; default from stored runs, else measured.
        budget: seconds that measuring may take, roughly.
    """
    runs = list(runs)
    seconds = {run.name: 0.0 if run.recipe.name == "imported" else math.nan for run in runs}
    todo = [run for run in runs if run.facts and run.recipe.name != "imported"]
    if speed is None:
        past = _past(device, {run.model.kind for run in todo}) if todo else []
        for run in todo:
            same = [before for network, _, before in past if network.network == run.network]
            seconds[run.name] = median(same) if same else math.nan
        todo = [run for run in todo if math.isnan(seconds[run.name])]
        speed = {}
        for run, rate, _ in past:
            speed.setdefault(run.model.kind, {}).setdefault(run.forward, []).append(rate)
        speed = {kind: sorted((size, median(rates)) for size, rates in sizes.items()) for kind, sizes in speed.items()}
        speed |= calibrate((run for run in todo if run.model.kind not in speed), device, budget)
    for run in todo:
        seconds[run.name] = run.train_flops / _rate(run, speed)
    return seconds


def _past(device: str, kinds: set[str]) -> list[tuple[Run, float, float]]:
    """Stored runs of some kinds of network that were trained on this device, their FLOP/s and seconds."""
    store, found, here = Store(), [], device_name(device)
    families = {kind.partition("-")[0] for kind in kinds}
    for name in store.names():
        try:
            if parse_run(name, check_data=False).model.kind.partition("-")[0] not in families:
                continue  # before its FLOPs are counted
            run, info = describe(name), store.info(name)
            trained_here = torch.device(info["device"]).type == torch.device(device).type
            # One that comes with the repository was trained elsewhere.
            trained_here &= info.get("processor", here) == here
            if run.model.kind in kinds and trained_here and run.recipe.name != "imported" and run.facts:
                found.append((run, run.train_flops / info["seconds"], info["seconds"]))
        except (ValueError, KeyError, RuntimeError):  # it is damaged, or of a recipe that is gone
            continue
    return found


def _rate(run: Run, speed: Speed) -> float:
    """FLOP/s of training a run, interpolated over log F between networks of its kind, or of any if there are none."""
    points = speed.get(run.model.kind) or sorted(point for points in speed.values() for point in points)
    sizes, rates = np.log(np.array(points)).T
    return math.exp(np.interp(math.log(run.forward), sizes, rates))


def calibrate(runs: Iterable[Run], device: str, budget: float = 1.0) -> dict[str, list[tuple[int, float]]]:
    """Time a few training steps: by kind of network, points (FLOPs of one image's forward pass, FLOP/s), rising.

    First the middle one of each kind is timed, then the smallest and the largest of which 16 images fit in a step of
    `STEP`, until the budget (seconds) is spent. At least one network is timed.
    """
    largest = STEP.get(torch.device(device).type, 1e12) / (3 * 16)
    kinds: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.facts:
            kinds.setdefault(run.model.kind, {}).setdefault(run.forward, run)
    rounds: list[list[Run]] = [[], [], []]
    for networks in kinds.values():
        sizes = sorted(networks)
        sizes = sizes[:1] + [size for size in sizes[1:] if size <= largest]
        chosen = dict.fromkeys((sizes[len(sizes) // 2], sizes[0], sizes[-1]))
        for turn, size in zip(rounds, chosen, strict=False):
            turn.append(networks[size])
    found: dict[str, list[tuple[int, float]]] = {}
    start = time.perf_counter()
    for run in (run for turn in rounds for run in turn):
        if not found or time.perf_counter() - start < budget:
            found.setdefault(run.model.kind, []).append((run.forward, measure(run, device)))
    return {kind: sorted(points) for kind, points in found.items()}


def measure(run: Run, device: str) -> float:
    """FLOP/s of training the network of a run on random images, in batches like its own or smaller.

    The global generator is left alone.
    """
    size = STEP.get(torch.device(device).type, 1e12) / (3 * run.forward)
    size = int(min(max(size, 4), run.recipe.batch_size, run.facts.train))
    channels, threads = run.facts.shape[0], torch.get_num_threads()
    # So small a rate that nothing can diverge.
    recipe = replace(run.recipe, batch_size=size, lr=1e-6, warmup_epochs=0.0, start=0, stop=None, until=None)
    try:
        torch.set_num_threads(int(os.environ.get("REPAIRLIB_THREADS") or 1))  # as many as trainings use
        with torch.random.fork_rng(devices=[]):
            images = torch.randint(256, (size, *run.facts.shape), dtype=torch.uint8)
            network = models.build(run.model, run.facts.shape, run.facts.classes)
        split = Split(images, torch.arange(size) % run.facts.classes)
        data = Dataset("random", split, split, run.facts.classes, (0.5,) * channels, (0.3,) * channels).to(device)
        on_cpu, used = data.device.type == "cpu", torch.get_num_threads()
        # CPU time, not wall time: other processes do not change it.
        clock = (lambda: time.process_time() / used) if on_cpu else time.perf_counter

        def seconds(steps: int) -> float:
            start = clock()
            train.fit(network, data, replace(recipe, epochs=steps))
            return (clock() - start) / steps

        # The first step also allocates and, on a GPU, compiles.
        steps = min(20, max(1, round(0.1 / max(seconds(1), 1e-6))))
        return 3 * run.forward * size / max(min(seconds(steps) for _ in range(2)), 1e-9)
    finally:
        torch.set_num_threads(threads)


def rough(seconds: float) -> str:
    """Seconds to two digits, in a unit that suits them.

    >>> rough(0), rough(41.3), rough(7384), rough(2e7), rough(math.nan)
    ('0 s', '41 s', '2.1 h', '230 days', '?')
    """
    if math.isnan(seconds):
        return "?"
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, length = next((each for each in units if seconds >= 2 * each[1]), units[-1])
    number = float(f"{seconds / length:.2g}")
    return f"{number:,.2g} {unit}" if number < 10 else f"{number:,.0f} {unit}"
