"""Make all figures of a scale: what is missing, in which order, and how far it is.

    python workflow/jobs.py --scale quick [--notebooks "repair/04_repair"] [--items "repair/fig3-left"] [--cores 4]
    python workflow/jobs.py --scale paper --profile workflow/profiles/slurm

This plans the jobs, lets Snakemake run them (see the Snakefile), and meanwhile says in one line what is being made, how
much is done and about how long is left. The notebooks that are soonest there come first, each with its trainings, so
that the first picture is there after a minute or two. (Snakemake 7, for Python 3.10, begins in an order of its own.)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import batch
import needs
import psutil
import yaml

from companion.experiments.scales import SCALES
from companion.figures import gallery, report
from companion.runs import costs, train
from companion.runs.data import project_root
from companion.runs.store import Store
from repairlib.names import check

START = 4.0  # seconds that a job takes to import PyTorch
# Seconds up to which trainings share a job, as starting one takes seconds, too: before the first pictures, and after.
TOGETHER_SOON, TOGETHER = 15.0, 240.0
GALLERY = 120.0  # seconds from one gallery to the next, as it takes a second to write
SOON = 3  # notebooks that come before all others, because they are soonest there
# MB that a job asks a cluster for. Measured peaks: 1 GB for a training at smoke, 2 GB for a notebook at quick.
MEMORY = {"smoke": 3_000, "quick": 4_000, "fast": 12_000, "paper": 32_000}
DAY = 24 * 60  # minutes, the most that a job asks for. A training that needs more goes on in the next.
PASSES = 20  # passes over test and calibration images in a notebook that was never executed: the median at quick


@dataclass
class Job:
    """A job of the batch: the training of some runs, or the execution of a notebook.

    Attributes:
        name: a notebook's name; of a training its first run.
        seconds: what it takes, roughly; NaN if nothing is known.
        runs: names of the runs it trains; empty for a notebook.
        after: names of the jobs before it, as in the batch: trainings begin with "train/", notebooks with "notebook/".
        priority: what is higher comes first.
    """

    name: str
    seconds: float
    runs: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    priority: int = 0

    @property
    def key(self) -> str:
        """What its stamp is called."""
        return f"{'train' if self.runs else 'notebook'}/{self.name}"

    def described(self, scale: str, gpu: bool) -> dict[str, Any]:
        """What the Snakefile has to know, with what the job asks a cluster for: memory in MB, time in minutes."""
        minutes = DAY if math.isnan(self.seconds) else min(30 + math.ceil(3 * self.seconds / 60), DAY)
        asks = {"gpu": int(gpu), "cpus": 4 if gpu else 1, "mem_mb": MEMORY[scale], "runtime": minutes}
        return {"runs": self.runs, "after": self.after, "priority": self.priority} | asks


# -------------------------------------------------------------------------------------------------------------- plan


def due(scale: str, items: list[str], wanted: Mapping[str, dict[str, Any]]) -> set[str]:
    """Names of the notebooks that have to be executed: those not up to date, and those that read what these make.

    One is never due if all that it should make is left out, see needs.notebook_needs.

    Args:
        scale, items, wanted: see needs.find_needs.
    """
    busy = {name: need for name, need in wanted.items() if not need.get("idle")}
    found = {name for name, need in busy.items() if not needs.is_up_to_date(name, scale, items, need)}
    while more := {name for name, need in busy.items() if name not in found and found & {*need["after"]}}:
        found |= more
    return found


def plan_jobs(
    scale: str, items: list[str], wanted: Mapping[str, dict[str, Any]], device: str, speed: costs.Speed | None = None
) -> list[Job]:
    """The jobs that make what is missing, in the order in which they should begin.

    Args:
        scale, items, wanted: see needs.find_needs.
        device: where networks are trained.
        speed: see costs.train_seconds.
    """
    todo = {name for name in due(scale, items, wanted) if not wanted[name]["error"]}
    lineages = {name: costs.with_parents(wanted[name]["runs"]) for name in todo}
    stored = set(Store().names())
    runs = {
        run: costs.describe(run, stored) for run in dict.fromkeys(run for each in lineages.values() for run in each)
    }
    seconds = costs.train_seconds(runs.values(), device, speed=speed)
    missing = {name: seconds[name] for name, run in runs.items() if not run.stored}
    here = report.device_name(device)
    executing = {}
    for name in todo:
        executing[name], _ = notebook_seconds(name, scale, wanted[name]["runs"], here, costs.describe)
        if math.isnan(executing[name]):
            passes = wanted[name].get("passes", PASSES)
            executing[name] = START + sum(passes * _pass_seconds(runs[run], seconds[run]) for run in lineages[name])

    def chain(name: str) -> list[str]:
        """A notebook after those that it reads from."""
        before = [other for other in wanted[name]["after"] if other in todo]
        return list(dict.fromkeys([each for other in before for each in chain(other)] + [name]))

    def cost(names: Iterable[str]) -> float:
        """Seconds that some notebooks take, with the trainings that are not planned yet."""
        new = [name for name in names if name not in planned]
        trainings = {run for name in new for run in lineages[name] if run in missing and run not in job_of}
        total = sum(executing[each] for each in new) + sum(missing[run] for run in trainings)
        return math.inf if math.isnan(total) else total

    def waiting(name: str) -> float:
        """Seconds that notebooks take which wait for this one: begun late, it would leave them alone at the end."""
        readers = [other for other in todo if name in wanted[other]["after"]]
        return max((executing[other] + waiting(other) for other in readers if executing[other] > 0), default=0.0)

    jobs: list[Job] = []
    job_of: dict[str, Job] = {}
    planned: list[str] = []
    while left := sorted(todo - {*planned}):
        # Pictures soon; after that the longest, so that no long notebook is left for a single core at the end.
        soon = len(planned) < SOON
        following = (
            min(left, key=lambda name: cost(chain(name)))
            if soon
            else max(left, key=lambda name: cost([name]) + waiting(name))
        )
        for name in chain(following):
            if name in planned:
                continue
            planned.append(name)
            new = [run for run in lineages[name] if run in missing and run not in job_of]
            for group in _groups(new, missing, TOGETHER_SOON if soon else TOGETHER):
                job = Job(group[0], START + sum(missing[run] for run in group), group)
                parents = {parent for run in group for parent in costs.with_parents([run])[:-1]} - {*group}
                job.after = list(dict.fromkeys(job_of[parent].key for parent in sorted(parents) if parent in job_of))
                job_of |= dict.fromkeys(group, job)
                jobs.append(job)
            trainings = [job_of[run].key for run in lineages[name] if run in job_of]
            notebooks = [f"notebook/{other}" for other in wanted[name]["after"] if other in todo]
            jobs.append(Job(name, executing[name], [], list(dict.fromkeys(trainings + notebooks))))
    for number, job in enumerate(jobs):
        job.priority = len(jobs) - number
    return jobs


def _groups(names: Iterable[str], seconds: Mapping[str, float], most: float) -> list[list[str]]:
    """Runs in their order, neighbours together as long as they take up to `most` seconds."""
    groups: list[list[str]] = []
    for name in names:
        if groups and sum(seconds[each] for each in [*groups[-1], name]) <= most:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _pass_seconds(run: costs.Run, seconds: float) -> float:
    """Seconds of a pass over test and calibration images, at the speed of the training, which takes `seconds`."""
    return seconds * run.evaluation_flops / run.train_flops if run.train_flops else 0.0


def notebook_seconds(
    name: str,
    scale: str,
    needed: Iterable[str],
    device: str,
    find: Callable[[str], costs.Run],
    training: Mapping[str, float] | None = None,
    passes: int = PASSES,
) -> tuple[float, str]:
    """Seconds to execute a notebook, scaled from its last execution on a device, and a note on how.

    If there was none, it is guessed as some passes over test and calibration images with each network, where `training`
    tells how fast; NaN if nothing is known.

    Args:
        name: of the notebook.
        scale: smoke, quick, fast or paper.
        needed: the runs that it needs there.
        device: its model, as in report.device_name.
        find: gives the costs.Run of a name.
        training: seconds that these runs, and those they continue, take to train; a pass has the same FLOP/s.
        passes: of a notebook that was never executed.
    """
    work = sum(find(run).evaluation_flops for run in needed)
    at = SCALES.index(scale)
    for other in sorted(SCALES, key=lambda each: abs(SCALES.index(each) - at)):
        done = needs.read_done(name, other)
        if not done or done["device"] != device:
            continue
        # The runs it used then; it may need others by now. One that saves no items tells only what it needs now.
        saved = [report.figures_root() / other / file for file in done["files"] if file.endswith(".json")]
        used = {run for path in saved for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}
        used = used or needs.notebook_needs(needs.path_of(name), other)["runs"]
        then = sum(find(run).evaluation_flops for run in used)
        ratio = 1.0 if work == then else work / then if then else math.nan
        if math.isnan(ratio):
            return math.nan, "unknown data"
        # What a kernel takes to start does not grow with the work.
        seconds = min(done["seconds"], START) + max(done["seconds"] - START, 0) * ratio
        times = "" if f"{ratio:.2g}" == "1" else f"{ratio:,.0f} x " if ratio >= 10 else f"{ratio:.2g} x "
        return seconds, f"{times}the work of {costs.rough(done['seconds'])} at {other}"
    if training is None:
        return math.nan, "never run on this device: run it at quick first"
    runs = costs.with_parents(needed)
    if not all(training[run] > 0 for run in runs):
        return math.nan, "unknown data, or imported networks"
    seconds = START + sum(passes * _pass_seconds(find(run), training[run]) for run in runs)
    return seconds, f"never ran here: guessed as {passes} passes with each network"


# ---------------------------------------------------------------------------------------------------------- progress


class Progress:
    """How far the jobs are, by the stamps in a folder: `<key>.started`, `.done`, `.failed`.

    Args:
        jobs: all of them.
        folder: of the stamps.
        workers: how many jobs run at the same time.
    """

    def __init__(self, jobs: Iterable[Job], folder: Path, workers: int):
        self.jobs, self.folder, self.workers = {job.key: job for job in jobs}, folder, workers
        self.store = Store().root
        self.stamps: dict[str, dict[str, float]] = {key: {} for key in self.jobs}

    def look(self) -> list[str]:
        """Read the stamps; returns the keys of the jobs that are newly done."""
        new = []
        for key, stamps in self.stamps.items():
            if "failed" in stamps and not (self.folder / f"{key}.failed").exists():
                del stamps["failed"]  # it is tried again
            for kind in ("started", "failed", "done"):
                if kind not in stamps and "done" not in stamps and (path := self.folder / f"{key}.{kind}").exists():
                    stamps[kind] = path.stat().st_mtime
                    new += [key] * (kind == "done")
        return new

    def left(self, now: float) -> float:
        """Seconds until everything is there: what is estimated, corrected by how long jobs have really taken."""
        done = [key for key, stamps in self.stamps.items() if {"started", "done"} <= stamps.keys()]
        took = sum(self.stamps[key]["done"] - self.stamps[key]["started"] for key in done)
        thought = sum(self.jobs[key].seconds for key in done)
        factor = (took + 30) / (thought + 30)  # 30 s of trust in the estimate
        remaining = []
        for key, stamps in self.stamps.items():
            if "done" not in stamps and "failed" not in stamps:
                seconds = self.jobs[key].seconds * factor
                remaining.append(max(seconds - (now - stamps.get("started", now)), 0.1 * seconds))
        return max(sum(remaining) / self.workers, max(remaining, default=0.0))

    def line(self, now: float) -> str:
        """What is being made, how much is done and about how long is left."""
        runs = [run for job in self.jobs.values() for run in job.runs]
        trained = sum((self.store / run).is_dir() for run in runs)
        notebooks = [key for key, job in self.jobs.items() if not job.runs]
        made = sum("done" in self.stamps[key] for key in notebooks)
        active = [key for key, s in self.stamps.items() if "started" in s and not s.keys() & {"done", "failed"}]
        names = [key.partition("/")[2] for key in active]
        parts = [f"networks {trained}/{len(runs)}"] * bool(runs)
        left = costs.rough(self.left(now))
        parts += [f"notebooks {made}/{len(notebooks)}", "time left unknown" if left == "?" else f"about {left} left"]
        return ", ".join(parts) + (f"; now {', '.join(names)}" if names else "")


class Screen:
    """Prints lines, and below them one that is rewritten in place; where nobody is looking, now and then a line."""

    def __init__(self, out: TextIO, every: float = 60.0):
        self.out, self.every, self.shown, self.last = out, every, "", -math.inf

    def say(self, text: str, out: TextIO | None = None) -> None:
        """Print lines for good."""
        self._clear()
        print(text, file=out or self.out, flush=True)
        self._write(self.shown)

    def status(self, text: str) -> None:
        """Replace the last line."""
        if self.out.isatty():
            width = shutil.get_terminal_size().columns - 1
            text = text if len(text) <= width else text[: width - 1] + "…"
            if text != self.shown:
                self._clear()
                self.shown = text
                self._write(text)
        elif text != self.shown and time.monotonic() - self.last >= self.every:
            self.shown, self.last = text, time.monotonic()
            print(text, file=self.out, flush=True)

    def end(self) -> None:
        """Remove the last line."""
        self._clear()
        self.shown = ""

    def _clear(self) -> None:
        if self.out.isatty() and self.shown:
            print("\r\033[K", end="", file=self.out, flush=True)

    def _write(self, text: str) -> None:
        if self.out.isatty():
            print(text, end="", file=self.out, flush=True)


# ----------------------------------------------------------------------------------------------------------- execute


def make(
    scale: str,
    notebooks: str = "",
    items: str = "",
    *,
    cores: str = "all",
    gpu_jobs: str = "1",
    quiet: str = "all",
    profile: str = "",
    gpus: str = "auto",
    options: str = "",
) -> int:
    """Make what is missing; returns 0 if everything is there, 1 if something failed.

    Args:
        scale, notebooks, items: what to make, as of `make figures`.
        cores: jobs at the same time, "all" for one on each core.
        gpu_jobs: how many of them may share the GPU.
        quiet: what Snakemake leaves unsaid: "all", or "progress" for its own messages.
        profile: folder of a Snakemake profile, which says how jobs reach a cluster; empty to run them here.
        gpus: "1" if every job asks for a GPU, "0" if none does; "auto" is 1 at fast and paper on a cluster, and here if
            this machine has one.
        options: more options for Snakemake.

    Raises:
        ValueError: unknown scale, notebook, item or setting, or a profile that cannot be used.
    """
    began = time.time()
    check(gpus, ("auto", "0", "1"), "value of GPUS")
    check(quiet, ("all", "progress", "rules"), "value of QUIET")
    if profile:
        profile = str(Path(profile).expanduser())
        device, workers = "cpu", _read_profile(Path(profile)).get("jobs", 1)
        os.environ.setdefault("REPAIRLIB_TRAIN", "1")  # this machine may have no GPU, but the nodes do
    else:
        device = train.default_device()
        workers = jobs_at_a_time(cores, gpu_jobs, device)
    wanted, need = needs.find_needs(scale, notebooks, items)
    errors = {name: each["error"] for name, each in need.items() if each["error"]}
    screen = Screen(sys.stdout)
    for error in errors.values():
        screen.say(error, sys.stderr)
    screen.status(f"{scale}: looking what is missing")
    jobs = plan_jobs(scale, wanted, need, device)
    status = 0
    if jobs:
        folder = project_root() / "build" / "jobs"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{scale}-", dir=folder) as stamps:
            plan = Path(stamps) / "plan.json"
            gpu = scale in ("fast", "paper") if profile else shutil.which("nvidia-smi") is not None
            gpu = gpu if gpus == "auto" else gpus == "1"
            described = {job.key: job.described(scale, gpu) for job in jobs}
            plan.write_text(json.dumps({"scale": scale, "items": wanted, "jobs": described, "needs": need}))
            command = [sys.executable, "-m", "snakemake"]
            command += ["--profile", profile] if profile else ["--cores", cores, "--resources", f"gpu={gpu_jobs}"]
            command += ["--keep-going", "--nolock", "--drop-metadata", "--rerun-incomplete"]
            command += ["--rerun-triggers", "mtime", "--scheduler", "greedy", "--quiet", quiet]
            command += ["--config", f"plan={plan}", *shlex.split(options)]
            progress = Progress(jobs, Path(stamps), workers)
            screen.say(f"{scale}: {progress.line(began)}")
            status = _follow(command, progress, screen, show=quiet != "all", remote=bool(profile))
    screen.end()
    gallery.write_gallery()
    print(batch.summarize(scale, began, need, wanted, errors))
    gone, said = needs.left_out(need)
    if said:
        print(said)
    made = [needs.read_done(job.name, scale) for job in jobs if not job.runs]
    lacking = {*needs.find_items(items)} & {*gone}  # whoever names an item wants it
    failed = bool(status or errors or lacking or any(done and done.get("checks") for done in made))
    if status and not errors:
        again = "look into build/logs, or try: make cluster" if profile else "try: make figures"
        print(f"Not everything could be made; if nothing above says why, {again} QUIET=progress")
    return int(failed)


def jobs_at_a_time(cores: str, gpu_jobs: str, device: str) -> int:
    """How many jobs run at the same time.

    Args:
        cores: on a CPU; "all" for one on each core.
        gpu_jobs: at most on a GPU.
        device: where they run.

    Raises:
        ValueError: a number is none, or less than 1.
    """
    for name, value in {"CORES": cores, "GPU_JOBS": gpu_jobs}.items():
        if not (value.isdecimal() and int(value) > 0) and (name, value) != ("CORES", "all"):
            also = ", or all" if name == "CORES" else ""
            raise ValueError(f"{name} is how many jobs run at a time, 1 or more{also}, not {value!r}")
    number = (os.cpu_count() or 1) if cores == "all" else int(cores)
    return min(number, int(gpu_jobs)) if device.startswith("cuda") else number


def _read_profile(folder: Path) -> dict[str, Any]:
    """A Snakemake profile; ValueError, which says the way out, if Snakemake could not use it."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"PROFILE is the folder of a Snakemake profile, and {file} is not there; see docs/cluster.md")
    if sys.version_info < (3, 11):
        raise ValueError("a cluster needs Python 3.11 or newer, as Snakemake 7 for Python 3.10 has no executor plugins")
    try:
        settings = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} has no settings, such as `executor: slurm`")
    executor = str(settings.get("executor") or "")
    module = f"snakemake_executor_plugin_{executor.replace('-', '_')}"
    if executor not in ("", "local") and importlib.util.find_spec(module) is None:
        raise ValueError(f"{file} sends jobs to {executor}, and Snakemake's plugin for it is not installed: "
                         f"{sys.executable} -m pip install snakemake-executor-plugin-{executor}")  # fmt: skip
    return settings


def _follow(command: list[str], progress: Progress, screen: Screen, show: bool, remote: bool) -> int:
    """Run Snakemake, pass on what the jobs say, and show how far it is; returns its exit status.

    Args:
        command: of Snakemake.
        progress, screen: how far it is, and where that is shown.
        show: also what is shown anyway.
        remote: whether the jobs run on other machines.
    """
    process = subprocess.Popen(
        command, cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    lines: queue.Queue[tuple[str, TextIO]] = queue.Queue()
    readers = [
        threading.Thread(target=_read, args=(process.stdout, sys.stdout, lines), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, sys.stderr, lines), daemon=True),
    ]
    for reader in readers:
        reader.start()
    finished, written = False, -math.inf
    try:
        while any(reader.is_alive() for reader in readers) or not lines.empty():
            try:
                text, out = lines.get(timeout=1.0)
                # A trained network is counted in the status line.
                if show or not re.match(r"\S+/s\d+: test accuracy ", text):
                    screen.say(text, out)
            except queue.Empty:
                pass
            finished |= any(key.startswith("notebook/") for key in progress.look())
            if finished and time.monotonic() - written > GALLERY:
                gallery.write_gallery()  # so that whoever has it open sees more and more
                finished, written = False, time.monotonic()
            screen.status(progress.line(time.time()))
        return process.wait()
    except KeyboardInterrupt:
        screen.end()
        process.wait()  # Ctrl-C has reached it and its jobs too
        raise
    except SystemExit:  # SIGTERM, which has not
        screen.end()
        if remote:  # its answer to SIGTERM would be to wait for the jobs; to SIGINT, it cancels them
            process.send_signal(signal.SIGINT)
        for each in [] if remote else [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        process.wait()
        raise


def _read(pipe: Any, out: TextIO, lines: queue.Queue[tuple[str, TextIO]]) -> None:
    """Put the lines of a pipe in a queue."""
    for line in pipe:
        lines.put((line.rstrip("\n"), out))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if something failed and 2 if the question was wrong."""
    parser = argparse.ArgumentParser(prog="python workflow/jobs.py", description="Make what is missing.")
    parser.add_argument("--scale", default="quick", help="smoke, quick (default), fast or paper")
    parser.add_argument("--notebooks", default="", help="names of notebooks, by default all")
    parser.add_argument("--items", default="", help="names of items, by default all")
    parser.add_argument("--cores", default="all", help="jobs at the same time")
    parser.add_argument("--gpu-jobs", default="1", help="how many of them may share the GPU")
    parser.add_argument("--quiet", default="all", help="what Snakemake leaves unsaid; `progress` shows its messages")
    parser.add_argument("--profile", default="", help="folder of the Snakemake profile of a cluster; default: run here")
    parser.add_argument("--gpus", default="auto", help="whether each job asks for a GPU: 1, 0, or auto")
    parser.add_argument("--snakemake", default="", help="more options for Snakemake")
    options = parser.parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return make(
            options.scale, options.notebooks, options.items, cores=options.cores, gpu_jobs=options.gpu_jobs,
            quiet=options.quiet, profile=options.profile, gpus=options.gpus, options=options.snakemake,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. What is made stays; the same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
