"""Use a GPU machine that is borrowed for a quarter of an hour: without a network, and with little that may travel.

    python benchmarks/gpu_visit.py pack        # here: what travels goes to .gpu/; prints the calls to make
    python3 benchmarks/gpu_visit.py look       # there, first call: half of the images; measures and tests
    python3 benchmarks/gpu_visit.py work       # there, second call: the other half; trains, makes figures
    python benchmarks/gpu_visit.py fold DIR    # here: networks into the store, figures beside the others
    python benchmarks/gpu_visit.py rehearse    # here: all of this on a CPU at `smoke`, in a scratch folder

What is written below $OUT comes back. The machine keeps its disk between the two calls. Nothing else needs this script.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from gpu.machine import DATA, FILES, PACKED, PIECE, ROOT, Machine  # first: budgets count from here

sys.path[:0] = [str(ROOT), str(ROOT / "workflow")]  # nothing is installed on the machine

from gpu import home  # noqa: E402
from gpu.look import PROCESSES, look  # noqa: E402
from gpu.work import work  # noqa: E402
from PIL import Image  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 3 if going on makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name) for name in ("pack", "look", "work", "fold", "rehearse")}
    add["pack"].add_argument("--runs", nargs="*", default=[], metavar="NAME", help="stored networks to take along")
    add["pack"].add_argument("--dirty", action="store_true", help="with changes that are not committed")
    for name, budget in (("look", 165), ("work", 535)):
        add[name].add_argument("--budget", type=float, default=budget, help=f"seconds, default {budget}")
        add[name].add_argument("--scale", default="fast")
        add[name].add_argument("--items", default="", help="comma-separated, in order of value; default: the plan's")
        add[name].add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "repairlib-gpu")
        add[name].add_argument("--packed", type=Path, default=PACKED, help="what `pack` made")
    add["look"].add_argument("--processes", type=int, default=PROCESSES, help="trainings at once that are tried")
    add["work"].add_argument("--runs", nargs="*", default=[], metavar="NAME", help="networks to train after the items")
    add["work"].add_argument("--again", action="store_true", help="also items that are committed")
    add["fold"].add_argument("folders", nargs="+", type=Path, help="what came back from one or both calls")
    add["fold"].add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    add["rehearse"].add_argument("--items", default="repair/fig2-left")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        home.pack(PACKED, home.commit(options.dirty), options.runs)
        home.exclude(PACKED)
        home.print_calls(PACKED)
        return 0
    if options.command == "fold":
        return home.fold(options.folders, options.results)
    if options.command == "rehearse":
        with tempfile.TemporaryDirectory() as folder:
            problems = rehearse(Path(folder), options.items)
        print("\n".join(problems) or "The rehearsal went well.")
        return int(bool(problems))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that its jobs are ended, too
    machine = Machine(options.scratch, options.packed, Path(os.environ["OUT"]))
    items = [item for item in options.items.split(",") if item]
    if options.command == "look":
        return look(machine, options.budget, options.scale, items, options.processes)
    return work(machine, options.budget, options.scale, items, options.runs, again=options.again)


def rehearse(folder: Path, items: str = "repair/fig2-left") -> list[str]:
    """Pack, look, work and fold at `smoke` on $REPAIRLIB_DEVICE (default the CPU), with images that are noise.

    Args:
        folder: an empty one, for everything.
        items: comma-separated items to make.

    Returns:
        What went wrong.
    """
    for number in range(60):
        image = folder / "data" / DATA / ("train", "test")[number % 3 == 0] / f"class{number % 2}" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).save(image)
    there = {"REPAIRLIB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | os.environ
    here = {name: str(folder / "home" / name) for name in ("runs", "figures")}
    with mock.patch.dict(os.environ, {"REPAIRLIB_DATA": str(folder / "data")}):
        home.pack(folder / "packed", "rehearsal", [], wheels=False)
    diverges = "digits/mlp2-plain-w8/smoke~lr1000000000/s1"
    problems, outs = [], []
    for name, limit, options in (("look", 300, ["--processes", "2"]), ("work", 300, ["--runs", diverges])):
        outs.append(folder / name)
        command = [sys.executable, __file__, name, "--scale", "smoke", "--items", items, "--budget", str(limit)]
        command += ["--scratch", str(folder / "machine"), "--packed", str(folder / "packed"), *options]
        code = subprocess.run(command, env=there | {"OUT": str(outs[-1])}, timeout=limit + 20).returncode
        problems += [f"{name} ended with {code}"] * bool(code)
        found = [path for path in outs[-1].rglob("*") if path.is_file()]
        if len(found) > FILES or any(path.stat().st_size > PIECE for path in found) or {*outs[-1].glob("*/*")}:
            problems.append(f"{name}: too much would come back: {found}")
    environment = {"REPAIRLIB_RUNS": here["runs"], "REPAIRLIB_FIGURES": here["figures"]}
    with mock.patch.dict(os.environ, environment):
        if home.fold(outs, folder / "gpu.json"):
            problems.append("what came back was not taken in")
        if not home.fold(outs, folder / "gpu.json"):
            problems.append("networks were taken in twice")
    done = {job["name"]: job["outcome"] for job in json.loads((folder / "gpu.json").read_text())["work"]["jobs"]}
    if "DivergedError" not in done.pop(diverges):
        problems.append(f"{diverges} did not diverge")
    return problems + [f"{name}: {outcome}" for name, outcome in done.items() if outcome != "done"]


if __name__ == "__main__":
    sys.exit(main())
