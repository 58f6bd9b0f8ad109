"""What a notebook needs to state and to save its results: scales, items, their data and pictures, where they were made.

An *item* is one figure panel or table of a paper, named as in `figures/index.yml` (`repair/fig2-left`). A notebook
computes a tidy table, saves it with `save_item` as JSON beside the picture drawn from it, and says with `by_scale`
what differs between scales.
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from companion.experiments.scales import check, check_scale
from companion.runs.devices import cpu_name, default_device, device_name, tensor_float32
from companion.runs.files import atomic_write, project_root

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "safetensors")


class DamagedResult(ValueError):
    """The file of a saved item is cut off, or another's; the message names it and the way out."""


def figures_root(root: str | Path | None = None) -> Path:
    """Where figures are saved: `root`, else $REPAIRLIB_FIGURES, else `figures` in the project."""
    return Path(root or os.environ.get("REPAIRLIB_FIGURES") or project_root() / "figures").expanduser().resolve()


def read_index() -> dict[str, dict]:
    """The entries of `figures/index.yml`, by item ID."""
    return _parse_index((project_root() / "figures" / "index.yml").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=4)
def _parse_index(text: str) -> dict[str, dict]:
    """Reading YAML takes long, and every item of a scorecard looks its file up."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}  # in C, where PyYAML was built so


def save_item(
    item: str,
    scale: str,
    table: Any,
    summary: Mapping[str, float | bool | str],
    figure: Any = None,
    *,
    runs: Iterable[str] = (),
    left_out: Iterable[str] = (),
    seconds: float | None = None,
    device: Any = None,
    root: str | Path | None = None,
) -> Path:
    """Save one item as <figures>/<scale>/<output>.json, and .png (200 dpi) and .svg of its figure, each atomically.

    item: an ID of `figures/index.yml`.
    table: the tidy table the figure was drawn from, a list of flat dicts or a DataFrame.
    summary: the few numbers to compare with the paper's, under the names of the index's `published`.
    figure: a matplotlib figure; only items of `kind: table` may leave it out.
    runs: the training runs used; one that is named twice counts once.
    left_out: training runs that it does without, see available.can_train.
    seconds, device: how long it took and where; default `train.default_device()`.
    root: another figures folder, see `figures_root`.

    Returns the path of the JSON. Raises ValueError for an unknown item or scale, for NaN and for infinity, TypeError
    for values that are not scalars, each naming the item and the column.
    """
    index = read_index()
    entry = index[check(item, index, "item")]
    check_scale(scale)
    if figure is None and entry.get("kind") != "table":
        raise ValueError(f"{item} needs a figure: only items with `kind: table` in figures/index.yml go without")
    rows = table.to_dict("records") if hasattr(table, "to_dict") else list(table)
    runs = list(dict.fromkeys(runs))
    seeds = sorted({int(run.rpartition("/s")[2]) for run in runs})
    record = {
        "item": item,
        "scale": scale,
        "device": device_name(device or default_device()),
        "seeds": seeds,
        "runs": runs,
        **({"left_out": [*left_out]} if left_out else {}),
        "versions": versions(),
        "seconds": None if seconds is None else round(seconds, 1),
        "summary": {name: _plain(value, f"{item}: summary {name!r}") for name, value in summary.items()},
    }
    rows = [
        {name: _plain(value, f"{item}: column {name!r}, row {i}") for name, value in row.items()}
        for i, row in enumerate(rows)
    ]
    # One table row a line, so that a change of committed results reads well as a diff.
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
    text = json.dumps(record, indent=1, allow_nan=False)[:-2] + f',\n "table": [\n  {lines}\n ]\n}}\n'

    base = figures_root(root) / scale / entry["output"]
    base.parent.mkdir(parents=True, exist_ok=True)
    if figure is not None:
        atomic_write(base.with_name(base.name + ".png"), _picture(figure, "png"))
        atomic_write(base.with_name(base.name + ".svg"), _picture(figure, "svg"))
    path = base.with_name(base.name + ".json")
    atomic_write(path, text)
    return path


def _plain(value: Any, where: str) -> float | int | bool | str | None:
    """A JSON scalar from a Python, NumPy or torch scalar."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: results must be finite (leave the row out, or say why in a column)")
    if not isinstance(value, float | int | bool | str | None):
        raise TypeError(f"{where} is a {type(value).__name__}: only numbers, booleans and strings can be saved")
    return value


def _picture(figure: Any, suffix: str) -> bytes:
    """The figure as PNG or SVG; the same figure gives the same bytes (no date, a fixed salt for the SVG's IDs)."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "repairlib"}):
        figure.savefig(buffer, format=suffix, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
    return buffer.getvalue()


def load_item(item: str, scale: str, root: str | Path | None = None) -> dict[str, Any]:
    """What `save_item` saved of an item, for a notebook that sums up others: its summary, table, runs and so on.

    root: another figures folder, see `figures_root`. A notebook that is executed in batch saves to a folder of its own,
    and finds what others have made in $REPAIRLIB_MADE.

    Raises ValueError for an unknown item or scale, DamagedResult for a file that is cut off or another item's,
    FileNotFoundError for one that has not been made.
    """
    index = read_index()
    output = index[check(item, index, "item")]["output"]
    roots = [root] if root else dict.fromkeys([figures_root(), os.environ.get("REPAIRLIB_MADE") or figures_root()])
    paths = [Path(folder) / check_scale(scale) / f"{output}.json" for folder in roots]
    for path in paths:
        if path.exists():
            return _read_record(path, item, scale)
    raise FileNotFoundError(f"{item} has not been made ({paths[-1]}): make figures SCALE={scale} ITEMS={item}")


def _read_record(path: Path, item: str, scale: str) -> dict[str, Any]:
    """The JSON of an item; DamagedResult if it is not what `save_item` wrote for it."""
    again = f"remove it, and make figures SCALE={scale} makes it again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DamagedResult(f"{path} is damaged ({error}); {again}") from error
    parts = {"item": str, "scale": str, "device": str, "seeds": list, "runs": list, "summary": dict, "table": list}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in parts.items()):
        raise DamagedResult(f"{path} is not the result of an item; {again}")
    if (record["item"], record["scale"]) != (item, scale):
        raise DamagedResult(f"{path} is {record['item']} at {record['scale']}, not {item} at {scale}; {again}")
    return record


def saved_items(item: str, shown: Iterable[str], root: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """What is saved of an item, by scale; a file that is damaged is said to be, and left out.

    shown: the scales to look at.
    root: another figures folder, see `figures_root`.
    """
    found = {}
    for scale in shown:
        try:
            found[scale] = load_item(item, scale, root)
        except FileNotFoundError:
            continue
        except DamagedResult as error:
            _say_once(str(error))
    return found


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment(device: Any = "cpu") -> dict[str, Any]:
    """Where results were made: interpreter, machine, device, package versions, commit.

    The commit is git's, or $REPAIRLIB_COMMIT where only the files of the checkout are.
    """
    try:
        commit = _git("rev-parse", "--verify", "HEAD").strip()
        # What a run writes itself is no change of the code.
        if commit and _git("status", "--porcelain", "-uno", "--", ".", ":!figures", ":!benchmarks/results"):
            commit += "+changes"
    except FileNotFoundError:  # a machine without git
        commit = ""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": device_name(device),
        "tf32": tensor_float32(device),
        "versions": versions(),
        "commit": commit or os.environ.get("REPAIRLIB_COMMIT") or None,
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True).stdout


def versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
