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

# Blocks of items, with the seconds that we expect each to take on an H100 once its networks are there and its notebook
# is started. A block shares networks; those come first that give most items for a second of training.
BLOCKS: dict[str, dict[str, float]] = {
    "VGG11": {"repair/fig2-middle": 5},
    "ResNet18": {"repair/fig3-left": 10, "repair/fig3-middle": 15, "repair/equivalence": 10},
    "halves of the data": {"repair/fig7": 10, "repair/fig13": 10},
    "Tiny-10": {
        "combine/figB19": 5, "combine/figB22": 10, "combine/figB20": 10, "combine/fig13": 5, "combine/fig14": 15,
        "combine/figB23-B24": 15, "combine/figB15-B18": 20,
    },
    "ResNet20, narrow": {"repair/fig4-right": 5, "repair/fig10-right": 5},
    "ResNet20 with LayerNorm": {
        "combine/fig6": 10, "combine/fig8": 10, "combine/fig11a": 10, "combine/algorithm1": 10, "combine/fig9": 15,
        "combine/fig2": 20, "combine/fig3": 20, "combine/fig4": 20, "combine/fig5": 20, "combine/fig11b": 15,
        "combine/fig10": 20, "combine/figB25-B26": 25, "combine/fig12": 20,
    },
    "VGG, deeper": {"repair/fig6-right": 10},
    "ResNet50": {
        "repair/fig2-right": 10, "repair/fig5-left": 25, "repair/fig8-right": 25, "repair/fig9": 25,
        "repair/fig14": 25,
    },
    "Tiny-10 of other widths": {"combine/figB21": 30},
}  # fmt: skip
# Seconds in which a training starts (imports, CUDA's context, the data), and a notebook.
START, NOTEBOOK = 8.0, 20.0


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
    """Jobs that train networks and make items, in the order of the items; one makes those of a block and notebook.

    Args:
        scale: smoke, quick, fast or paper.
        found: of `find`.
        extra: runs to train after all others.
        seconds: of a training, by run name.
    """
    index, stored = report.read_index(), set(Store().names())
    expected = {item: (block, value) for block, items in BLOCKS.items() for item, value in items.items()}
    groups: dict[tuple[str, str], list[str]] = {}
    for item in found:
        groups.setdefault((expected.get(item, ("",))[0], index[item]["notebook"]), []).append(item)
    jobs: dict[str, Job] = {}

    def train(runs: Iterable[str]) -> tuple[str, ...]:
        """Add what trains some runs; says which of them and of their parents are not stored."""
        new = [run for run in costs.with_parents(runs) if run not in stored]
        for run in new:
            if run not in jobs:
                before = tuple(name for name in costs.with_parents([run])[:-1] if name not in stored)
                command = (sys.executable, "-m", "companion.runs.store", "train", run)
                jobs[run] = Job(run, "train", command, seconds.get(run, 60.0) + START, before)
        return tuple(new)

    for (_, notebook), items in groups.items():
        name = ",".join(items)
        command = (sys.executable, "workflow/batch.py", f"notebooks/{notebook}.py", "--scale", scale, "--items", name)
        took = NOTEBOOK + sum(expected.get(item, ("", 30.0))[1] for item in items)
        needed = train(run for item in items for run in found[item])
        # Two jobs of one notebook would wait for one another.
        jobs[name] = Job(name, "figure", command, took, needed, alone=notebook)
    train(extra)
    return list(jobs.values())


def packed_sizes(runs: Iterable[str]) -> dict[str, int]:
    """About how many bytes each run's network takes packed, see companion.runs.packing."""
    return {run: round(0.86 * costs.describe(run).size) for run in runs}


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
