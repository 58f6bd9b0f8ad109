"""What `make figures` would train and execute, and roughly how long that takes on this device; nothing is made.

    python workflow/plan.py --scale paper [--notebooks "repair/04_repair"] [--items "repair/fig3-left"]

Training a network for E epochs on n images takes about 3 E n F FLOPs, where F is those of one image's forward pass,
counted on PyTorch's `meta` device. They are divided by the FLOP/s of a few real training steps, timed here and now for
up to three networks of each kind that is to be trained, and interpolated over log F in between. A notebook takes as
long as when it was last executed on this device, times the ratio of the work now and then: F times the test and
calibration images, summed over its runs. Data sets are known by name, and neither downloaded nor read.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import batch
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from companion.experiments import scales
from companion.figures import report
from companion.runs import models, train
from companion.runs.data import ARCHIVES, DIGITS_TEST, Dataset, Split, base_name, data_root, project_root
from companion.runs.folders import halves_of, stream_folder
from companion.runs.store import Store

START = 4.0  # seconds that a job takes to import PyTorch
CALIBRATION = 5000  # images of the training set that notebooks match and measure statistics on
STEP = {"cpu": 2e10, "cuda": 5e12}  # FLOPs of a step that is timed, about a second or less


@dataclass(frozen=True)
class Facts:
    """Size of a data set: images for training and testing, shape (c, h, w) of one, classes."""

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int


_SHAPES = {"svhn": (3, 32, 32), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
FACTS = {
    **dict.fromkeys(("digits", "digits-hard"), Facts(1797 - DIGITS_TEST, DIGITS_TEST, (1, 16, 16), 10)),
    **{
        name: Facts(*sizes, _SHAPES.get(name, (1, 28, 28)), 100 if name == "cifar100" else 10)
        for name, (_, sizes, _) in ARCHIVES.items()
    },
    "imagenet": Facts(1_281_167, 50_000, (3, 224, 224), 1000),
}


@dataclass(frozen=True)
class Run:
    """A training run; without `facts`, nothing is known of its data and the numbers are zero."""

    name: str
    stored: bool
    model: models.ModelName  # as it is trained: with BatchNorm where that is fused afterwards
    recipe: train.Recipe
    facts: Facts | None
    forward: int = 0  # FLOPs of one image's forward pass
    size: int = 0  # bytes of the checkpoint

    @property
    def work(self) -> float:
        """FLOPs of training, and of the evaluation that follows it."""
        if not self.facts:
            return 0.0
        batch_size = min(self.recipe.batch_size, self.facts.train)
        images = self.recipe.epochs * (self.facts.train // batch_size) * batch_size
        return self.forward * (3 * images + self.facts.train + self.facts.test)

    @property
    def look(self) -> float:
        """FLOPs of one pass over what a notebook looks at: the test set and the calibration images."""
        return self.forward * (self.facts.test + min(CALIBRATION, self.facts.train)) if self.facts else math.nan


def find_facts(name: str, root: str | Path | None = None) -> Facts | None:
    """The size of a data set, by name or by counting an image folder that is there; None if neither is possible.

    `<name>-first80` and `<name>-last80` are halves (see data.base_name); images of `<name>@64` are of 64 x 64 pixels.

    >>> find_facts("cifar100-first80")
    Facts(train=25000, test=10000, shape=(3, 32, 32), classes=100)
    """
    root = data_root(root)
    if name != base_name(name) and not halves_of(root / name):
        whole = find_facts(base_name(name), root)
        return whole and replace(whole, train=whole.train // 2)
    known, _, side = name.partition("@")
    facts = _count(root / known) if halves_of(root / known) else FACTS.get(known)
    if facts and side:
        return replace(facts, shape=(3, int(side), int(side))) if side.isdecimal() else None
    return facts


@functools.cache
def _count(folder: Path) -> Facts:
    """Images and classes of an image folder, and the shape of its first image; DataMissing if a class is empty."""
    halves = stream_folder(folder, 1)
    with Image.open(halves[0].paths[0]) as image:  # only its head is read
        shape = (1 if image.mode in ("1", "L") else 3, image.height, image.width)
    return Facts(*map(len, halves), shape, int(halves[0].labels.max()) + 1)


@functools.cache
def cost(model: models.ModelName, shape: tuple[int, int, int], classes: int) -> tuple[int, int]:
    """FLOPs of one image's forward pass (a multiplication and an addition are two), and bytes of all weights."""
    with torch.device("meta"):
        network = models.build(model, shape, classes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *shape))
    return counter.get_total_flops(), sum(v.numel() * v.element_size() for v in network.state_dict().values())


def describe(name: str, stored: Iterable[str] = (), root: str | Path | None = None) -> Run:
    """What training a run takes; ValueError if its name does not parse."""
    run = train.parse_run(name, check_data=False)
    trained = replace(run.model, norm="bn") if run.model.norm == "fused" else run.model
    recipe = train.find_recipe(run.recipe, run.model.kind, run.data)
    facts = find_facts(run.data, root)
    numbers = cost(run.model, facts.shape, facts.classes) if facts else (0, 0)
    return Run(str(run), str(run) in stored, trained, recipe, facts, *numbers)


# ------------------------------------------------------------------------------------------------------------ seconds


def measure(run: Run, device: str) -> float:
    """FLOP/s of training the network of a run on random images, in batches like its own or smaller."""
    size = STEP.get(torch.device(device).type, 1e12) / (3 * run.forward)
    size = int(min(max(size, 4), run.recipe.batch_size, run.facts.train))
    images = torch.randint(256, (size, *run.facts.shape), dtype=torch.uint8)
    split = Split(images, torch.arange(size) % run.facts.classes)
    channels = run.facts.shape[0]
    data = Dataset("random", split, split, run.facts.classes, (0.5,) * channels, (0.3,) * channels).to(device)
    recipe = replace(run.recipe, batch_size=size, lr=1e-6, warmup_epochs=0.0)  # so small that nothing can diverge
    network = models.build(run.model, run.facts.shape, run.facts.classes)
    threads = torch.get_num_threads()
    # Of a processor's time other work takes nothing away, so that a busy machine gives the same estimate.
    clock = (lambda: time.process_time() / threads) if data.device.type == "cpu" else time.perf_counter

    def seconds(steps: int) -> float:
        start = clock()
        train.fit(network, data, replace(recipe, epochs=steps))
        return (clock() - start) / steps

    steps = min(20, max(1, round(0.2 / seconds(1))))  # the first step also allocates and, on a GPU, compiles
    return 3 * run.forward * size / min(seconds(steps) for _ in range(2))


def calibrate(runs: Iterable[Run], device: str) -> dict[str, list[tuple[int, float]]]:
    """By kind of model: points (FLOPs of one image's forward pass, FLOP/s of training), the first rising.

    Timed are the smallest of each kind, the largest of which 16 images fit in a step of `STEP`, and one in between.
    """
    kinds: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.facts:
            kinds.setdefault(run.model.kind, {}).setdefault(run.forward, run)
    found = {}
    for kind, networks in kinds.items():
        sizes = sorted(networks)
        sizes = sizes[:1] + [n for n in sizes[1:] if 3 * 16 * n <= STEP.get(torch.device(device).type, 1e12)]
        chosen = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
        found[kind] = [(size, measure(networks[size], device)) for size in chosen]
    return found


def train_seconds(run: Run, speed: Mapping[str, list[tuple[int, float]]]) -> float:
    """Seconds to train a run without the start of its job; NaN if its data are unknown."""
    if not run.facts:
        return math.nan
    sizes, rates = np.log(np.array(speed[run.model.kind])).T
    return run.work / math.exp(np.interp(math.log(run.forward), sizes, rates))


def notebook_seconds(name: str, scale: str, items: str, device: str, find: Callable[[str], Run]) -> tuple[float, str]:
    """Seconds to execute a notebook, scaled from its last execution on a device, and a note on how; NaN if never.

    items: comma-separated, empty for all.
    device: its model, as in report.device_name.
    find: gives the Run of a name.
    """
    path = project_root() / "notebooks" / f"{name}.py"
    work = sum(find(run).look for run in report.notebook_runs(path, scale, items))
    at = scales.SCALES.index(scale)
    for other in sorted(scales.SCALES, key=lambda each: abs(scales.SCALES.index(each) - at)):
        done = batch.read_done(name, other)
        if not done or done["device"] != device:
            continue
        # The runs it used then; it may need others by now. One that saves no items tells only what it needs now.
        saved = [report.figures_root() / other / file for file in done["files"] if file.endswith(".json")]
        used = {run for path in saved for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}
        then = sum(find(run).look for run in used or report.notebook_runs(path, other))
        ratio = 1.0 if work == then else work / then if then else math.nan
        if math.isnan(ratio):
            return math.nan, "unknown data"
        # What a kernel takes to start does not grow with the work.
        seconds = min(done["seconds"], START) + max(done["seconds"] - START, 0) * ratio
        times = "" if f"{ratio:.2g}" == "1" else f"{ratio:,.0f} x " if ratio >= 10 else f"{ratio:.2g} x "
        return seconds, f"{times}the work of {rough(done['seconds'])} at {other}"
    return math.nan, "never run on this device: run it at quick first"


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


# --------------------------------------------------------------------------------------------------------------- plan


def pending(scale: str, notebooks: str = "", items: str = "") -> set[str]:
    """The notebooks that `make figures` would execute now, by Snakemake's own account; RuntimeError if it has none."""
    config = [
        f"scale={scale}",
        *([f"notebooks={notebooks}"] if notebooks else []),
        *([f"items={items}"] if items else []),
    ]
    command = [sys.executable, "-m", "snakemake", "--summary", "--nolock", "--rerun-triggers", "mtime"]
    result = subprocess.run([*command, "--config", *config], cwd=project_root(), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"Snakemake cannot plan this: {result.stderr.strip()}")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    stamps = [row[0] for row in rows if row[0].startswith(f"build/{scale}/") and row[-1] == "update pending"]
    return {stamp.removeprefix(f"build/{scale}/").removesuffix(".done").partition("+")[0] for stamp in stamps}


def plan(
    scale: str,
    notebooks: str = "",
    items: str = "",
    *,
    jobs: int = 1,
    device: str | None = None,
    to_execute: Iterable[str] | None = None,
    speed: Mapping[str, list[tuple[int, float]]] | None = None,
) -> str:
    """The plan of `make figures` as text.

    Args:
        scale, notebooks, items: as of `make figures`.
        jobs: how many run at the same time.
        device: where networks are trained; default `train.default_device()`.
        to_execute: names of the notebooks that are not up to date; default as Snakemake says, see `pending`.
        speed: FLOP/s by kind of model; default measured, see `calibrate`.
    """
    scales.check_scale(scale)
    device = device or train.default_device()
    here, stored = report.device_name(device), set(Store().names())
    wanted, needs = batch.find_needs(scale, notebooks, items)
    only = ",".join(wanted)
    to_execute = pending(scale, notebooks, items) if to_execute is None else set(to_execute)
    find = functools.cache(lambda name: describe(name, stored))
    names = dict.fromkeys(run for need in needs.values() for run in need["runs"])
    missing = [run for run in dict.fromkeys(map(find, names)) if not run.stored]
    to_import = [run for run in missing if run.recipe.name == "imported"]
    missing = [run for run in missing if run not in to_import]
    speed = calibrate(missing, device) if speed is None else speed
    training = {run.name: train_seconds(run, speed) for run in missing}

    def status(run: Run) -> str:
        if run.name in shown:
            return "as above"
        if run in to_import:
            return "to import"
        return "stored" if run.stored else "to train" if run.facts else "unknown data"

    lines, shown, executing = [], set(), {}
    for name, need in needs.items():
        lines += ["", f"{name:72}  {'status':12} {'epochs':>6} {'estimate':>10}"]
        runs = [find(run) for run in need["runs"]]
        for key, group in itertools.groupby(runs, lambda run: (run.name.rpartition("/")[0], status(run), run.recipe)):
            group = list(group)
            seeds = ",".join(run.name.rpartition("/")[2] for run in group)
            seconds = sum(training.get(run.name, 0.0) for run in group if run.name not in shown)
            lines.append(f"  {f'{key[0]}/{seeds}':70}  {key[1]:12} {key[2].epochs:6} {rough(seconds):>10}")
        shown |= {run.name for run in runs}
        state, seconds, note = "up to date", 0.0, ""
        if name in to_execute:
            seconds, note = notebook_seconds(name, scale, only, here, find)
            state, executing[name] = "to execute", seconds
        lines.append(f"  {f'the notebook ({note})' if note else 'the notebook':70}  {state:19} {rough(seconds):>10}")

    known = {job: seconds + START for job, seconds in (training | executing).items() if not math.isnan(seconds)}
    total = sum(known.values())

    def chain(name: str) -> float:
        """Seconds until a notebook is there if nothing else has to be made."""
        need = needs[name]
        before = [known.get(find(run).name, 0.0) for run in need["runs"]] + [chain(other) for other in need["after"]]
        return known.get(name, 0.0) + max(before, default=0.0)

    together = max([total / jobs, *map(chain, needs)])
    unknown = {
        "to import, without which `make figures` fails": len(to_import),
        "to train of unknown data": sum(math.isnan(seconds) for seconds in training.values()),
        "to execute that never ran here or need unknown data": sum(math.isnan(s) for s in executing.values()),
    }
    sums = [sum(s for s in group.values() if not math.isnan(s)) for group in (training, executing)]
    size = sum(run.size for run in missing)
    head = f"Plan of `make figures SCALE={scale}` on {here}. Nothing is made now, and all times are rough."
    lines += [
        "",
        f"{'Networks to train':40} {len(missing):5} of {len(shown):<5} {rough(sums[0]):>10}",
        f"{'Notebooks to execute':40} {len(executing):5} of {len(needs):<5} {rough(sums[1]):>10}",
        f"{'Jobs to start, ' + rough(START) + ' each':40} {len(known):5}    {'':5} {rough(START * len(known)):>10}",
        f"{'In all, one job after another':40} {'':14} {rough(total):>10}",
        f"{'In all, ' + str(jobs) + ' at the same time':40} {'':14} {rough(together):>10}",
        f"{'Checkpoints to write':40} {'':14} {size / 1e6:>7,.0f} MB",
        *[f"Not in these sums: {n} {what}." for what, n in unknown.items() if n],
        "",
        "Trainings: FLOPs of forward and backward passes over the FLOP/s of a few training steps timed just now, as on",
        "a free machine. Notebooks: the seconds of their last execution on this device, scaled by the FLOPs of the",
        "networks and images they look at. Expect to be off by a factor of two, and by more where a notebook was last",
        "run at a much smaller scale. Not counted: downloads, and decoding images that do not fit in memory.",
    ]
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 2 if the question was wrong."""
    parser = argparse.ArgumentParser(prog="python workflow/plan.py", description="What make figures would do.")
    parser.add_argument("--scale", default="quick", help="smoke, quick (default), fast or paper")
    parser.add_argument("--notebooks", default="", help="names of notebooks, by default all")
    parser.add_argument("--items", default="", help="names of items, by default all")
    parser.add_argument("--cores", default="all", help="jobs at a time where networks are trained on the CPU")
    parser.add_argument("--gpu-jobs", default=1, type=int, help="jobs at a time on a GPU")
    options = parser.parse_args(arguments)
    # As many threads as trainings use; see train.train.
    torch.set_num_threads(int(os.environ.get("REPAIRLIB_THREADS") or 1))
    jobs = (os.cpu_count() or 1) if options.cores == "all" else int(options.cores)
    if train.default_device().startswith("cuda"):
        jobs = min(jobs, options.gpu_jobs)
    try:
        print(plan(options.scale, options.notebooks, options.items, jobs=jobs))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
