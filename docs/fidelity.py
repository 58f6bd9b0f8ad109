"""Set the papers' numbers beside ours, from saved tables: docs/fidelity.md.

    python docs/fidelity.py

Every number of figures/index.yml is measured on the table of its item at `fast`, pair by pair, and nothing on the page
is typed in by hand. Why ours differ is read off run names and recipes: those of the table against those of `paper`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from companion.experiments import grids
from companion.experiments.grids import combine, repair
from companion.experiments.tables import (
    barriers,
    derangement_costs,
    name_barriers,
    name_networks,
    restore_ends,
    works_up_to,
)
from companion.figures.gallery import PAPERS
from companion.figures.report import load_item, read_index
from companion.runs.data import title_of
from companion.runs.files import atomic_write
from companion.runs.names import parse_run, recipe_of
from companion.runs.store import Store, shipped_root

SCALE = "fast"
PAGE = Path(__file__).with_name("fidelity.md")
HEADER = """# The papers' numbers and ours

Written by `docs/fidelity.py` from the tables in `figures/fast`, which has the papers' data and architectures with
shortened training. There is a row for each number that a paper prints and that we have a table for. Accuracies are in
percent, their barriers and differences in points, losses in nats. Ours are means over pairs of seeds, with the lowest
and the highest pair where there are several. The papers do not say how many pairs they have.

Below each table stands why ours may differ: what is not the same in our networks and measurements, with the paper's in
brackets. The paper's are those of the scale `paper`, from what the paper prints or its authors released.
"""
REST = """
## Not compared yet

Published numbers that no table at `fast` shows, or only one of other widths, and the networks that each would need
beside those that are trained. Those with the recipes `jordan` and `csiszarik` are wider than any of `fast`. `make
figures SCALE=fast TRAIN=1 ITEMS=repair/fig3-middle` trains those of `fast` and measures them.
"""
HYPERPARAMETERS = ("combine/tableA1",)  # items whose numbers are not measured


class Number(NamedTuple):
    """A number that a paper prints, and how it is measured.

    Attributes:
        words: what it is.
        unit: "%", "points", "nats", "times", or what is counted.
        measure: from the rows of a table, of all pairs or of one, to the number, or to both ends of a range. None: the
            paper quotes it, of a method that is not made here.
        width: the width that it is of, if the figure has several; rows of the nearest are measured.
        exact: whether another width says nothing about it.
    """

    words: str
    unit: str
    measure: Callable[[pd.DataFrame], float | list[float]] | None
    width: float | None = None
    exact: bool = False


def _mean(measure: str, alphas: Sequence[float], network: str, series: str | None = None) -> Callable:
    """Mean accuracy (%) or loss of a network at some points of its path."""

    def measured(frame: pd.DataFrame) -> float:
        rows = name_networks(frame)
        rows = rows[rows["alpha"].isin(alphas) & (rows["network"] == network)]
        rows = rows if series is None else rows[rows["series"] == series]
        return (100 if measure == "accuracy" else 1) * rows[measure].mean()

    return measured


def _midpoint(network: str, series: str | None = None) -> Callable:
    return _mean("accuracy", [0.5], network, series)


def _ends(series: str | None = None) -> Callable:
    return _mean("accuracy", [0, 1], "aligned", series)


def _barrier(network: str, series: str | None = None, metric: str = "accuracy") -> Callable:
    """Mean barrier of a network's path, in points or nats."""

    def measured(frame: pd.DataFrame) -> float:
        rows = restore_ends(name_networks(frame))
        rows = rows if series is None else rows[rows["series"] == series]
        paths = barriers(rows.dropna(subset="alpha").groupby("network").filter(lambda path: {0, 1} <= {*path["alpha"]}))
        return (100 if metric == "accuracy" else 1) * paths[paths["network"] == network][f"{metric}_barrier"].mean()

    return measured


def _rise(network: str) -> Callable:
    """How far the midpoint lies below the endpoints, in points."""
    return lambda frame: _ends()(frame) - _midpoint(network)(frame)


def _reduction(frame: pd.DataFrame) -> float:
    """By how much REPAIR lowers the barrier of the midpoint, in percent."""
    return 100 * (1 - _rise("aligned + REPAIR")(frame) / _rise("aligned")(frame))


def _worst_norm(frame: pd.DataFrame) -> float:
    """The larger loss barrier of BatchNorm and LayerNorm after REPAIR; NaN if one is missing."""
    return pd.Series([_barrier(AFTER, norm, "loss")(frame) for norm in NORMS]).max(skipna=False)


def _decay(frame: pd.DataFrame) -> float:
    """By what factor the variance decays up to the last layer, aligned."""
    last = frame[(frame["layer"] == frame["layer"].max()) & (frame["network"] == "aligned")]
    return 1 / last["ratio"].mean()


def _first_layer_variance(frame: pd.DataFrame) -> float:
    """Variance of the midpoint's units relative to the endpoints', mean over pairs."""
    each = frame.groupby("pair") if "pair" in frame else [("", frame)]
    ratios = [2 * r["measured"].sum() / (r["variance_a"].sum() + r["variance_b"].sum()) for _, r in each]
    return sum(ratios) / len(ratios)


def _deepest(network: str) -> Callable:
    """The deepest network whose midpoint is above 90 %."""

    def measured(frame: pd.DataFrame) -> float:
        mean = frame[frame["network"] == network].groupby("depth")["accuracy"].mean()
        return max(mean.index[mean > 0.9], default=0)

    return measured


def _enough(frame: pd.DataFrame) -> float:
    """The smallest number of images from which on the barrier stays within half a point of that with all of them."""
    mean = frame[frame["network"] == "aligned + REPAIR"].groupby("examples")["barrier"].mean()
    return mean.index[((mean - mean.iloc[-1]).abs() < 0.005)[::-1].cummin()[::-1]][0]


def _reductions(frame: pd.DataFrame) -> list[float]:
    """The least and the greatest reduction of all networks, means over pairs."""
    mean = frame.groupby(["row", "norm", "width"])["reduction"].mean()
    return [mean.min(), mean.max()]


def _best_merge(frame: pd.DataFrame) -> pd.Series:
    """Loss between the ends of the REPAIRed path, by alpha, of the first kind of network."""
    rows = name_networks(frame)
    rows = rows[(rows["network"] == "aligned + REPAIR") & (rows["series"] == rows["series"].iloc[0])]
    return rows[(rows["alpha"] > 0) & (rows["alpha"] < 1)].groupby("alpha")["loss"].mean()


def _combined(name: str, scheme: str | None = None) -> Callable:
    """Empirical barrier of aligned combinations, in nats or points."""

    def measured(frame: pd.DataFrame) -> float:
        rows = frame if scheme is None else frame[frame["scheme"] == scheme]
        return name_barriers(rows)[f"{name}_barrier"]

    return measured


def _boxes_work(frame: pd.DataFrame) -> float:
    """The largest half edge up to which boxes about A cost less than 5 points."""
    rows = frame[(frame["scheme"] == "centred") & (frame["matching"] == "WM")]
    return works_up_to(rows.groupby("x")["accuracy"].mean())


def _line_unchanged(frame: pd.DataFrame) -> float:
    """The largest distance beyond the ends up to which accuracy on training images falls by less than a point."""
    rows = frame[(frame["scheme"] == "extrapolation") & (frame["matching"] == "WM") & (frame["split"] == "train")]
    beyond = (rows["x"] - 0.5).abs() - 0.5
    return works_up_to(rows["accuracy"][beyond >= 0].groupby(beyond).mean(), 0.01)


def _worst_of_triangle(frame: pd.DataFrame) -> float:
    """The lowest accuracy of a triangle of aligned networks, mean over triangles."""
    return 100 * frame[frame["matching"] == "WM"].groupby("triple")["accuracy"].min().mean()


def _robust_layers(frame: pd.DataFrame) -> float:
    """In how many layers a derangement of all pairs costs less than 5 points."""
    return int((derangement_costs(frame, share=1) < 0.05).sum())


BEFORE, AFTER = "aligned", "aligned + REPAIR"
NORMS = {"bn": "BatchNorm", "ln": "LayerNorm"}
DECAY = {"final_layer_decay": Number("decay of the variance up to the last layer, aligned", "times", _decay)}
NUMBERS: dict[str, dict[str, Number]] = {
    "repair/fig1-middle": {
        "barrier_before": Number("barrier before REPAIR", "points", _rise(BEFORE)),
        "barrier_after": Number("barrier after REPAIR", "points", _rise(AFTER)),
        "reduction": Number("reduction of the barrier", "%", _reduction),
    },
    "repair/fig1-right": {"reduction_range": Number("reduction of barriers, least and greatest", "%", _reductions)},
    "repair/fig2-middle": DECAY,
    "repair/fig2-right": DECAY,
    "repair/sec3-theory": {
        "corr": Number("correlation of aligned units in the first layer", "", lambda frame: frame["corr"].mean()),
        "variance": Number("variance of the midpoint's first layer, relative to endpoints", "", _first_layer_variance),
    },
    "repair/fig3-middle": {
        "endpoints": Number("accuracy of the endpoints", "%", _ends()),
        "midpoint_before": Number("accuracy of the midpoint before REPAIR", "%", _midpoint(BEFORE)),
        "midpoint_after": Number("accuracy of the midpoint after REPAIR", "%", _midpoint(AFTER)),
        "barrier_after": Number("barrier after REPAIR", "points", _rise(AFTER)),
        "reduction": Number("reduction of the barrier", "%", _reduction),
        "ot_fusion_midpoint": Number("midpoint of OT fusion (Singh and Jaggi 2020)", "%", None),
    },
    "repair/fig3-right": {
        "deepest_over_90_before": Number("deepest midpoint above 90 %, before REPAIR", "layers", _deepest(BEFORE)),
        "deepest_over_90_closed_form": Number(
            "deepest midpoint above 90 %, REPAIR in closed form", "layers", _deepest(f"{AFTER} closed form")
        ),
    },
    "repair/samples": {"enough": Number("calibration images that suffice", "images", _enough)},
    "repair/fig4-left": {
        "bn_ln_loss_barrier_at_16x": Number(
            "loss barrier after REPAIR at 16x, the larger of BatchNorm's and LayerNorm's", "nats", _worst_norm, 16
        )
    },
    "repair/fig4-middle": {
        f"midpoint_{norm}_{when}_8x": Number(
            f"accuracy of the midpoint, {NORMS[norm]} at 8x, {when} REPAIR", "%", _midpoint(network, norm), 8
        )
        for norm in NORMS
        for when, network in {"before": BEFORE, "after": AFTER}.items()
    },
    "repair/fig4-right": {
        "bn_midpoint": Number("accuracy of the midpoint before REPAIR, BatchNorm", "%", _midpoint(BEFORE, "bn")),
        "ln_midpoint": Number("accuracy of the midpoint before REPAIR, LayerNorm", "%", _midpoint(BEFORE, "ln")),
        "both_after": Number(
            "accuracy of the midpoint after REPAIR, the lower of both norms'",
            "%",
            lambda frame: pd.Series([_midpoint(AFTER, norm)(frame) for norm in NORMS]).min(skipna=False),
        ),
        "bn_endpoints": Number("accuracy of the endpoints, BatchNorm", "%", _ends("bn")),
        "ln_endpoints": Number("accuracy of the endpoints, LayerNorm", "%", _ends("ln")),
    },
    "repair/fig8-left": {
        f"git_re_basin_{width}x": Number(
            f"loss barrier before REPAIR, LayerNorm at {width}x; the paper's is Git Re-Basin's",
            "nats",
            _barrier(BEFORE, "ln", "loss"),
            width,
            exact=True,
        )
        for width in (1, 2, 4, 8, 16, 32)
    },
    "repair/fig5-left": {
        "aligned": Number("accuracy of the midpoint before REPAIR", "%", _midpoint(BEFORE)),
        "conv_only": Number("accuracy of the midpoint, convolutions corrected", "%", _midpoint("aligned + RESET")),
        "full": Number("accuracy of the midpoint, blocks corrected too", "%", _midpoint(AFTER)),
        "barrier_conv": Number("barrier, convolutions corrected", "points", _barrier("aligned + RESET")),
        "barrier_full": Number("barrier, blocks corrected too", "points", _barrier(AFTER)),
    },
    "repair/fig5-right": {
        "resnet18": Number("accuracy of the midpoint after REPAIR, ResNet18", "%", _midpoint(AFTER, "ResNet18")),
        "resnet50": Number("accuracy of the midpoint after REPAIR, ResNet50", "%", _midpoint(AFTER, "ResNet50")),
        "resnet50x2": Number("accuracy of the midpoint after REPAIR, ResNet50x2", "%", _midpoint(AFTER, "ResNet50 2x")),
        "resnet50x2_barrier": Number("barrier after REPAIR, ResNet50x2", "points", _barrier(AFTER, "ResNet50 2x")),
    },
    "repair/fig7": {
        "best_loss": Number("lowest test loss between the ends", "nats", lambda frame: _best_merge(frame).min()),
        "best_alpha": Number("where it is", "", lambda frame: _best_merge(frame).idxmin()),
        "ainsworth_best_loss": Number("lowest test loss of Ainsworth et al. (2022)", "nats", None),
    },
    "combine/figB15-B18": {
        f"{scheme}_{metric}": Number(f"{metric} barrier, {scheme}", unit, _combined(metric, scheme))
        for scheme in ("uniform", "subcube", "hyperplane", "bernoulli")
        for metric, unit in {"loss": "nats", "accuracy": "points"}.items()
    },
    "combine/fig9": {
        "train_unchanged_up_to": Number("training accuracy unchanged so far beyond the ends", "", _line_unchanged)
    },
    "combine/fig10": {"works_up_to": Number("boxes about A work up to the half edge", "", _boxes_work)},
    "combine/fig11b": {"worst_accuracy": Number("accuracy of the triangle's worst network", "%", _worst_of_triangle)},
    "combine/fig14": {"layers_that_bear_all": Number("layers that bear a full derangement", "layers", _robust_layers)},
} | {
    f"combine/fig{number}": {
        f"{metric}_barrier": Number(f"{metric} barrier", unit, _combined(metric))
        for metric, unit in {"loss": "nats", "accuracy": "points"}.items()
    }
    for number in (2, 3, 4, 5)
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ numbers


class Measured(NamedTuple):
    """A number measured on a table.

    Attributes:
        value: over all pairs.
        pairs: of each pair (or triple) by itself, if there are several.
        width: of the networks that it was measured on, if that matters.
    """

    value: float | list[float]
    pairs: list[float]
    width: float | None


def measure(number: Number, frame: pd.DataFrame) -> Measured | None:
    """Measure a number on the table of its item; None if the table has no networks that show it."""
    if number.measure is None:
        return None
    width = None
    if number.width is not None and "width" in frame:
        width = min(frame["width"].unique(), key=lambda w: abs(math.log(w / number.width)))
        if number.exact and width != number.width:
            return None
        frame = frame[frame["width"] == width]
    each = next((column for column in ("pair", "triple") if column in frame), None)
    groups = [rows for _, rows in frame.groupby(each, sort=False)] if each else []
    try:
        value = number.measure(frame)
        pairs = [number.measure(rows) for rows in groups] if len(groups) > 1 and not isinstance(value, list) else []
    except (KeyError, IndexError, ValueError):  # networks are missing
        return None
    return (
        None
        if any(pd.isna(v) for v in ([value] if not isinstance(value, list) else value))
        else Measured(value, pairs, width)
    )


def words(value: float, unit: str, sign: str = "") -> str:
    """A number as the page prints it.

    >>> words(66.03, "%"), words(-1.46, "points", "+"), words(0.0441, "nats"), words(7959.1, "times")
    ('66.0 %', '-1.5 points', '0.044 nats', '7960 times')
    """
    digits = {"%": ".1f", "points": ".1f", "nats": ".3f", "times": ".3g", "layers": ".0f", "images": ".0f"}.get(
        unit, ".2f"
    )
    number = f"{float(f'{value:.3g}'):.0f}" if unit == "times" and abs(value) >= 100 else f"{value:{digits}}"
    number = f"+{number}" if sign and value > 0 else number
    return f"{number} {unit}".strip()


def difference(ours: Measured, published: Any, unit: str) -> str:
    """Ours minus the paper's; for a bound, whether ours keeps it.

    >>> difference(Measured(92.1, [], None), 94.1, "%"), difference(Measured(0.2, [], None), "<0.05", "nats")
    ('-2.0 points', 'not below')
    """
    unit = "points" if unit == "%" else unit
    if isinstance(published, list):
        return " and ".join(words(a - b, unit, "+") for a, b in zip(ours.value, published, strict=True))
    if isinstance(published, str):
        bound = float(published.strip("<>x"))
        below = published.startswith("<")
        keeps = ours.value < bound if below else ours.value > bound
        return ("" if keeps else "not ") + ("below" if below else "above")
    return words(ours.value - published, unit, "+")


def printed(published: Any, unit: str) -> str:
    """A number as the paper prints it, with its unit.

    >>> printed(66.0, "%"), printed([60, 100], "%"), printed(">10x", "times")
    ('66.0 %', '60 to 100 %', '>10 times')
    """
    values = published if isinstance(published, list) else [str(published).removesuffix("x")]
    return f"{' to '.join(map(str, values))} {unit}".strip()


def row(place: str, number: Number, published: Any, ours: Measured) -> str:
    """A line of the table of a section."""
    values = ours.value if isinstance(ours.value, list) else [ours.value]
    cell = " to ".join(words(value, number.unit) for value in values)
    if ours.pairs:
        low, high = (words(value, number.unit) for value in (min(ours.pairs), max(ours.pairs)))
        cell += f" ({low.removesuffix(number.unit).strip()} to {high.removesuffix(number.unit).strip()})"
    if ours.width not in (None, number.width):
        cell += f", at {ours.width:g}x"
    paper = printed(published, number.unit)
    return _line([place, number.words, paper, cell, difference(ours, published, number.unit)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("<", "&lt;").replace(">", "&gt;")


# -------------------------------------------------------------------------------------------------------- differences


def grid_of(item: str, scale: str) -> grids.Grid:
    """What the section of an item needs at a scale."""
    sections = [make for module in (repair, combine) for make in vars(module).values()
                if getattr(make, "__annotations__", {}).get("return") is grids.Grid]  # fmt: skip
    return next(grid for grid in (make(scale) for make in sections) if item in grid.needs)


def runs_of(item: str, scale: str) -> list[str]:
    """The runs that an item and those that it sums up need at a scale."""
    grid = grid_of(item, scale)
    read = [run for other in grid.reads.get(item, ()) for run in runs_of(other, scale)]
    return list(dict.fromkeys([*grid.runs([item]), *read]))


def facts(runs: Iterable[str]) -> dict[str, list]:
    """What runs are and how they were trained: for each property, its values over all runs."""
    found: dict[str, dict] = {}
    norms = {"bn": "BatchNorm", "ln": "LayerNorm", "fixup": "Fixup", "fused": "BatchNorm, fused", "": "as published"}
    for name in runs:
        run = parse_run(name, check_data=False)
        recipe = recipe_of(run)
        values = {
            "data": title_of(run.data),
            "network": run.model.title,
            "norm": norms.get(run.model.norm, run.model.norm),
            "width": run.model.width,
            "epochs": recipe.trained_epochs,
            "batch size": recipe.batch_size,
            "learning rate": recipe.lr,
            "schedule": recipe.schedule,
            "warm-up epochs": recipe.warmup_epochs,
            "Nesterov momentum": "yes" if recipe.nesterov else "no",
            "weight decay": recipe.weight_decay,
            "augmentation": "+".join(recipe.augment) or "none",
        }
        for key, value in values.items():
            found.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in found.items()}


def listing(values: Sequence) -> str:
    """Some values in words.

    >>> listing([1, 2.5]), listing(range(1, 8))
    ('1, 2.5', '1 to 7, 7 in all')
    """
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(texts) if len(texts) < 6 else f"{texts[0]} to {texts[-1]}, {len(texts)} in all"


def _has_points(frame: pd.DataFrame, value: float) -> bool:
    """Whether a table has paths, or schemes of combination, of so many points."""
    column = "alpha" if "alpha" in frame else "x"
    if column not in frame:
        return False
    schemes = frame["scheme"] if "scheme" in frame else pd.Series("", frame.index)
    return frame[column].groupby(schemes).nunique().max() == value


def _has_scheme(name: str) -> Callable[[pd.DataFrame, float], bool]:
    return lambda frame, value: "scheme" in frame and name in set(frame["scheme"])


def _has_column(*names: str) -> Callable[[pd.DataFrame, float], bool]:
    return lambda frame, value: any(name in frame for name in names)


def _always(frame: pd.DataFrame, value: float) -> bool:
    return True


# Settings of a section that measurements depend on: in words, and whether a table depends on one.
SETTINGS: Mapping[str, tuple[str, Callable[[pd.DataFrame, float], bool]]] = {
    "points of a path": ("points of the path", _has_points),
    "points of a barrier": ("points of the path", _has_points),
    "points": ("points", _has_points),
    "alphas": ("points of the line", lambda frame, value: "k" in frame or _has_scheme("extrapolation")(frame, value)),
    "half_edges": ("sizes of boxes", _has_scheme("centred")),
    "samples": ("networks drawn at each point", _has_column("sample")),
    "steps": ("steps", _has_column("w_a", "k")),
    "derangements": ("derangements", _has_column("k")),
    "restarts": ("descents of weight matching", _always),
    "calibration": ("calibration images", _always),
    "test_images": ("test images", _always),
    "train_images": ("training images evaluated", lambda frame, value: "train" in {*frame.get("split", ())}),
}


def _setting(value: Any) -> Any:
    """A setting as a number: of a list, how long it is."""
    return "all" if value is None else len(value) if isinstance(value, list) else value


def why(item: str, record: Mapping[str, Any]) -> str:
    """How our networks and measurements of an item differ from the paper's, in one line."""
    frame, parts = pd.DataFrame(record["table"]), []
    ours, papers = facts(record["runs"]), facts(runs_of(item, "paper"))
    for key in ours:
        if set(ours[key]) != set(papers[key]):
            parts.append(f"{key} {listing(ours[key])} ({listing(papers[key])})")
    grids_of = grid_of(item, SCALE), grid_of(item, "paper")
    for key, (name, concerns) in SETTINGS.items():
        if key in grids_of[0].settings:
            here, there = (_setting(grid.settings[key]) for grid in grids_of)
            parts += [f"{name} {here} ({there})"] if here != there and concerns(frame, here) else []
    parts.append(f"seeds {listing(record['seeds'])}")
    store = Store(shipped_root())
    infos = [store.info(run) for run in record["runs"] if store.has(run)]
    how = sorted({f"{info['precision']} on {info['processor']}" for info in infos if "precision" in info})
    parts += [f"trained in {' and '.join(how)}"] if how else []
    return "; ".join([*parts, f"measured on {record['device']}"])


def needed(item: str, width: float | None) -> list[str]:
    """The runs that a number of an item needs, at `fast` if it has networks of that width, else at `paper`."""
    for scale in (SCALE, "paper"):
        runs = [run for run in runs_of(item, scale)
                if width is None or parse_run(run, check_data=False).model.width == width]  # fmt: skip
        if runs:
            break
    return runs


def networks(runs: Iterable[str]) -> str:
    """Runs in words.

    >>> networks(["digits/vgg11-bn-w1/quick/s1", "digits/vgg11-bn-w1/quick/s2"])
    '2 networks, `digits/vgg11-bn-w1/quick/{s1,s2}`'
    """
    seeds: dict[str, list[str]] = {}
    for run in runs:
        network, _, seed = run.rpartition("/")
        seeds.setdefault(network, []).append(seed)
    if not seeds:
        return "No more networks"
    names = [f"`{name}/{{{','.join(each)}}}`" if each[1:] else f"`{name}/{each[0]}`" for name, each in seeds.items()]
    names = names if len(names) <= 4 else [*names[:2], "...", names[-1]]
    return f"{sum(map(len, seeds.values()))} networks, {', '.join(names)}"


# --------------------------------------------------------------------------------------------------------------- page


def page() -> str:
    """The page as Markdown."""
    index, records = read_index(), {}
    for item in index:
        try:
            records[item] = load_item(item, SCALE)
        except FileNotFoundError:
            pass
    trained = {run for record in records.values() for run in record["runs"]} | {*Store(shipped_root()).names()}
    lines, rest = [HEADER.rstrip("\n")], [REST.rstrip("\n")]
    for paper, title in PAPERS.items():
        entries = {
            item: entry for item, entry in index.items() if item.startswith(f"{paper}/") and "published" in entry
        }
        compared: dict[str, tuple[list[str], list[str]]] = {}  # by section
        missing: dict[str, list[str]] = {}  # by what it needs
        for item in sorted(entries.keys() - set(HYPERPARAMETERS), key=lambda item: _order(entries[item])):
            rows, lacks = compare(item, entries[item]["published"], records.get(item), _place(entries[item]))
            if rows:
                reason = f"* {_place(entries[item])}: {why(item, records[item])}."
                tables, reasons = compared.setdefault(entries[item]["paper"]["section"], ([], []))
                tables += rows
                reasons.append(reason)
            runs = dict.fromkeys(run for _, needs in lacks for run in needs if run not in trained)
            if lacks:
                numbers = ", ".join(number for number, _ in lacks)
                missing.setdefault(networks(runs), []).append(f"{_place(entries[item])} ({numbers})")
        lines += [f"\n## {title}"] if compared else []
        for section, (rows, reasons) in compared.items():
            head = ["| figure | number | paper | ours | difference |", "|---|---|---|---|---|"]
            lines += [
                f"\n### {'Section' if section[0].isdigit() else 'Appendix'} {section}\n",
                *head,
                *rows,
                "",
                *reasons,
            ]
        rest += [f"\n### {title}, what is missing\n"] if missing else []
        rest += [f"* {need}: {'; '.join(figures)}.".replace("<", "&lt;") for need, figures in missing.items()]
    return "\n".join([*lines, *rest]) + "\n"


def compare(
    item: str, published: Mapping[str, Any], record: Mapping[str, Any] | None, place: str
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The lines of an item, and what it does not show: the paper's numbers, each with the runs that it needs.

    A number that a method prints which is not made here is in neither.
    """
    rows, lacks = [], []
    frame = None if record is None else pd.DataFrame(record["table"])
    for name, value in published.items():
        number = NUMBERS[item][name]
        if number.measure is None:
            continue
        ours = None if frame is None else measure(number, frame)
        if ours:
            rows.append(row(place, number, value, ours))
        if ours is None or ours.width not in (None, number.width):
            at = f" at {number.width:g}x" if number.width else ""
            lacks.append((printed(value, number.unit) + at, needed(item, number.width)))
    return rows, lacks


def _place(entry: Mapping[str, Any]) -> str:
    """Where the paper prints the numbers of an item: a figure, or the text of a section."""
    section, figure = entry["paper"]["section"], entry["paper"]["figure"]
    return f"Fig. {figure}" if figure[:1].isdigit() or figure[1:2] == "." else f"Sec. {section}"


def _order(entry: Mapping[str, Any]) -> tuple:
    """By sections, appendices last, then by figures."""
    figure = re.search(r"\d+", entry["paper"]["figure"])
    return entry["paper"]["section"], int(figure[0]) if figure else 0, entry["paper"]["figure"]


if __name__ == "__main__":
    atomic_write(PAGE, page())
    print(PAGE)
