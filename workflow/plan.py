"""What `make figures` would train and execute, and roughly how long that takes on this device; nothing is made.

    python workflow/plan.py --scale paper [--notebooks "repair/04_repair"] [--items "repair/fig3-left"]

What a training costs stands in companion/runs/costs.py. A notebook takes as long as when it was last executed on this
device, times the ratio of the work now and then: the FLOPs of one image's forward pass times the test and calibration
images, summed over its runs. One that was never executed here is guessed as so many of these passes, at the FLOP/s of
its trainings.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Iterable

import needs
from jobs import PASSES, START, due, jobs_at_a_time, notebook_seconds

from companion.figures import report
from companion.runs import train
from companion.runs.costs import Run, Speed, describe, rough, train_seconds, with_parents
from companion.runs.store import Store

# --------------------------------------------------------------------------------------------------------------- plan


def plan(
    scale: str,
    notebooks: str = "",
    items: str = "",
    *,
    jobs: int = 1,
    device: str | None = None,
    to_execute: Iterable[str] | None = None,
    speed: Speed | None = None,
) -> str:
    """The plan of `make figures` as text.

    Args:
        scale, notebooks, items: as of `make figures`.
        jobs: how many run at the same time.
        device: where networks are trained; default `train.default_device()`.
        to_execute: names of the notebooks that are not up to date; default see `jobs.due`.
        speed: FLOP/s by kind of network; default from stored runs, else measured, see `costs.train_seconds`.
    """
    device = device or train.default_device()
    here, stored = report.device_name(device), set(Store().names())
    wanted, needed = needs.find_needs(scale, notebooks, items)
    to_execute = due(scale, wanted, needed) if to_execute is None else set(to_execute)
    _, said = needs.left_out(needed)
    needed = {name: need for name, need in needed.items() if not need.get("idle")}
    to_execute = {name for name in to_execute if name in needed and not needed[name]["error"]}
    find = functools.cache(lambda name: describe(name, stored))
    names = with_parents(run for need in needed.values() for run in need["runs"])
    missing = [run for run in dict.fromkeys(map(find, names)) if not run.stored]
    to_import = [run for run in missing if run.recipe.name == "imported"]
    missing = [run for run in missing if run not in to_import]
    executed = with_parents(run for name in to_execute for run in needed[name]["runs"])
    rates = train_seconds([*missing, *map(find, executed)], device, speed=speed, budget=20.0)
    training = {run.name: rates[run.name] for run in missing}

    def status(run: Run) -> str:
        if run.name in shown:
            return "as above"
        if run in to_import:
            return "to import"
        return "stored" if run.stored else "to train" if run.facts else "unknown data"

    lines, shown, executing = [], set(), {}
    for name, need in needed.items():
        lines += ["", f"{name:72}  {'status':12} {'epochs':>6} {'estimate':>10}"]
        runs = [find(run) for run in with_parents(need["runs"])]
        for key, group in itertools.groupby(runs, lambda run: (run.network, status(run), run.recipe)):
            group = list(group)
            seeds = ",".join(run.name.rpartition("/")[2] for run in group)
            seconds = sum(training.get(run.name, 0.0) for run in group if run.name not in shown)
            lines.append(f"  {f'{key[0]}/{seeds}':70}  {key[1]:12} {key[2].epochs:6} {rough(seconds):>10}")
        shown |= {run.name for run in runs}
        state, seconds, note = "up to date", 0.0, ""
        if need["error"]:
            lines.append(f"  fails: {need['error']}")
            continue
        if name in to_execute:
            passes = need.get("passes", PASSES)
            seconds, note = notebook_seconds(name, scale, need["runs"], here, find, rates, passes)
            state, executing[name] = "to execute", seconds
        lines.append(f"  {f'the notebook ({note})' if note else 'the notebook':70}  {state:19} {rough(seconds):>10}")

    known = {job: seconds + START for job, seconds in (training | executing).items() if not math.isnan(seconds)}
    total = sum(known.values())

    def chain(name: str) -> float:
        """Seconds until a notebook is there if nothing else has to be made."""
        need = needed[name]
        trainings = [sum(known.get(find(each).name, 0.0) for each in with_parents([run])) for run in need["runs"]]
        before = trainings + [chain(other) for other in need["after"] if other in needed]
        return known.get(name, 0.0) + max(before, default=0.0)

    together = max([total / jobs, *map(chain, needed)])
    unknown = {
        "to import, without which `make figures` fails": len(to_import),
        "to train of unknown data": sum(math.isnan(seconds) for seconds in training.values()),
        "to execute that need unknown data, or never ran here and need imported networks": sum(
            math.isnan(seconds) for seconds in executing.values()
        ),
    }
    sums = [sum(s for s in group.values() if not math.isnan(s)) for group in (training, executing)]
    size = sum(run.size for run in missing)
    head = f"Plan of `make figures SCALE={scale}` on {here}. Nothing is made now, and all times are rough."
    lines += [
        "",
        f"{'Networks to train':40} {len(missing):5} of {len(shown):<5} {rough(sums[0]):>10}",
        f"{'Notebooks to execute':40} {len(executing):5} of {len(needed):<5} {rough(sums[1]):>10}",
        f"{'Jobs to start, ' + rough(START) + ' each':40} {len(known):5}    {'':5} {rough(START * len(known)):>10}",
        f"{'In all, one job after another':40} {'':14} {rough(total):>10}",
        f"{'In all, ' + str(jobs) + ' at the same time':40} {'':14} {rough(together):>10}",
        f"{'Checkpoints to write':40} {'':14} {size / 1e6:>7,.0f} MB",
        *[f"Not in these sums: {n} {what}." for what, n in unknown.items() if n],
        *([said] if said else []),
        "",
        "Trainings: the seconds of stored runs of the same network; without one, FLOPs over the FLOP/s of stored runs",
        "of its kind, or of a few training steps timed just now. Notebooks: the seconds of their last execution on",
        "this device, scaled by the FLOPs of the networks and images they evaluate. Expect to be off by a factor of",
        "two, and by more where a notebook was last run at a much smaller scale. One that never ran here is a guess:",
        f"{PASSES} passes over test and calibration images, or as many as its grid says, at the FLOP/s of trainings;",
        "expect a factor of five. Not counted: downloads, and decoding images that do not fit in memory.",
    ]
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 2 if the question was wrong."""
    parser = argparse.ArgumentParser(prog="python workflow/plan.py", description="What make figures would do.")
    parser.add_argument("--scale", default="quick", help="smoke, quick (default), fast or paper")
    parser.add_argument("--notebooks", default="", help="names of notebooks, by default all")
    parser.add_argument("--items", default="", help="names of items, by default all")
    parser.add_argument("--cores", default="all", help="jobs at a time where networks are trained on the CPU")
    parser.add_argument("--gpu-jobs", default="1", help="jobs at a time on a GPU")
    options = parser.parse_args(arguments)
    try:
        jobs = jobs_at_a_time(options.cores, options.gpu_jobs, train.default_device())
        print(plan(options.scale, options.notebooks, options.items, jobs=jobs))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
