"""What a visit makes, most valuable first. Which networks that takes, the grids of the notebooks say."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

import needs  # of workflow/

from companion.figures import report
from companion.runs import costs
from companion.runs.data import is_there
from companion.runs.names import parse_run
from companion.runs.store import Store
from gpu.jobs import Job

# Blocks of items, with the seconds that we expect each to take on an H100 once its networks are there, of which 20 go
# into starting a notebook. A block shares networks; those come first that give most items for a second of training.
BLOCKS: dict[str, dict[str, float]] = {
    "VGG11": {"repair/fig2-middle": 25},
    "ResNet18": {"repair/fig3-left": 30, "repair/fig3-middle": 35, "repair/equivalence": 30},
    "halves of the data": {"repair/fig7": 30, "repair/fig13": 30},
    "Tiny-10": {
        "combine/figB19": 25, "combine/figB22": 30, "combine/figB20": 30, "combine/fig13": 25, "combine/fig14": 35,
        "combine/figB23-B24": 35, "combine/figB15-B18": 40,
    },
    "ResNet20, narrow": {"repair/fig4-right": 25, "repair/fig10-right": 25},
    "ResNet20 with LayerNorm": {
        "combine/fig6": 30, "combine/fig8": 30, "combine/fig11a": 30, "combine/algorithm1": 30, "combine/fig9": 35,
        "combine/fig2": 40, "combine/fig3": 40, "combine/fig4": 40, "combine/fig5": 40, "combine/fig11b": 35,
        "combine/fig10": 40, "combine/figB25-B26": 45, "combine/fig12": 40,
    },
    "VGG, deeper": {"repair/fig6-right": 30},
    "ResNet50": {
        "repair/fig2-right": 30, "repair/fig5-left": 45, "repair/fig8-right": 45, "repair/fig9": 45,
        "repair/fig14": 45,
    },
    "Tiny-10 of other widths": {"combine/figB21": 50},
}  # fmt: skip
START = 8.0  # seconds in which a training starts: imports, CUDA's context, the data


def items_of(blocks: Iterable[str] = BLOCKS) -> list[str]:
    """The items of some blocks."""
    return [item for block in blocks for item in BLOCKS[block]]


def find(scale: str, items: Sequence[str], again: bool = False) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What items need, and which cannot or need not be made.

    Args:
        scale: smoke, quick, fast or paper.
        items: full IDs.
        again: make also what is committed, made of today's networks.

    Returns:
        By item its runs; and by item left out, the reason.
    """
    index, found, left = report.read_index(), {}, {}
    for item in items:
        try:
            need = needs.notebook_needs(needs.path_of(index[item]["notebook"]), scale, item)
        except ValueError as error:
            left[item] = f"cannot be asked: {error}"
            continue
        runs = need["runs"]
        absent = sorted({data for run in runs if not is_there(data := parse_run(run, check_data=False).data)})
        saved = report.project_root() / "figures" / scale / f"{index[item]['output']}.json"
        if item in need.get("gone", ()):
            left[item] = "lacks every network"
        elif absent:
            left[item] = f"needs {', '.join(absent)}"
        elif not again and saved.exists() and sorted(json.loads(saved.read_text())["runs"]) == sorted(runs):
            left[item] = "is committed"
        else:
            found[item] = runs
    return found, left


def make_jobs(scale: str, found: Mapping[str, Sequence[str]], extra: Sequence[str], seconds: Mapping) -> list[Job]:
    """Jobs that train networks and make items, in the order of the items.

    Args:
        scale: smoke, quick, fast or paper.
        found: of `find`.
        extra: runs to train after all others.
        seconds: of a training, by run name.
    """
    index, expected = report.read_index(), {k: v for block in BLOCKS.values() for k, v in block.items()}
    stored, jobs = set(Store().names()), {}

    def train(run: str) -> None:
        command = (sys.executable, "-m", "companion.runs.store", "train", run)
        *before, run = costs.with_parents([run])
        if run not in stored:
            needed = tuple(name for name in before if name not in stored)
            jobs.setdefault(run, Job(run, "train", command, seconds.get(run, 60.0) + START, needed))

    for item, runs in found.items():
        every = costs.with_parents(runs)
        for run in every:
            train(run)
        notebook = index[item]["notebook"]
        command = (sys.executable, "workflow/batch.py", f"notebooks/{notebook}.py", "--scale", scale, "--items", item)
        needed = tuple(run for run in every if run in jobs)
        # Two jobs of one notebook would wait for one another.
        jobs[item] = Job(item, "figure", command, expected.get(item, 60.0), needed, alone=notebook)
    for run in costs.with_parents(extra):
        train(run)
    return list(jobs.values())


def training_seconds(runs: Sequence[str], device: str, timings: Mapping) -> dict[str, float]:
    """How long each run trains: steps times the measured milliseconds, where its network was measured."""
    described = [costs.describe(run) for run in costs.with_parents(runs)]
    graph = timings.get("choice", {}).get("graph", False)
    found = {}
    for run in described:
        rows = [row for row in timings.get("steps", []) if row["network"] == run.network and "ms" in row]
        if rows and run.facts:
            ms = min(row["ms"] for row in rows if row["how"] == "as is" or (graph and row["how"] == "graph"))
            found[run.name] = ms / 1000 * run.recipe.trained_epochs * (run.facts.train // run.recipe.batch_size)
    rest = [run for run in described if run.name not in found]
    return found | (costs.train_seconds(rest, device) if rest else {})
