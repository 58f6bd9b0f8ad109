"""Set the papers' numbers beside ours, from saved tables: docs/fidelity.md.

    python docs/fidelity.py

Every number of figures/index.yml is looked up in the summary of its item at `fast`, and nothing on the page is typed in
by hand. Why ours differ is read off run names and recipes: those of the table against those of `paper`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from companion.experiments import grids
from companion.experiments.grids import combine, repair, rethink
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
percent, their barriers and differences in points, losses in nats. Ours are means over pairs of seeds. The papers do not
say how many pairs they have.

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
    """A number that a paper prints, and where ours is.

    Attributes:
        words: what it is.
        unit: "%", "points", "nats", "times", or what is counted.
        ours: names in the summary of the item, default the paper's own; None: the paper quotes the number, of a method
            that is not made here. A name that ends in a width, like `bn_after_8x`, may be found at another width.
        of: what is taken of the values under these names: `max`, or `list` for both ends of a range.
        exact: whether another width says nothing about it.
    """

    words: str
    unit: str
    ours: tuple[str, ...] | None = ()
    of: Callable[[list[float]], float | list[float]] = max
    exact: bool = False


NORMS = {"bn": "BatchNorm", "ln": "LayerNorm"}
METRICS = {"loss": "nats", "accuracy": "points"}
DECAY = {"final_layer_decay": Number("decay of the variance up to the last layer, aligned", "times")}
MATCHED = {"wm": "matched by weights", "am": "matched by activations"}
VARIANTS = {
    "none": "as interpolated",
    "repair": "REPAIR",
    "rescale": "RESCALE",
    "rescale_average": "RESCALE, one scale a layer",
    "reshift": "RESHIFT",
}
STATISTICS = {"vgg_bn": ("_stats", ""), "vgg_ln": ("",), "resnet_bn": ("_stats", ""), "resnet_ln": ("",)}
ORDERS = {
    "repair": "REPAIR",
    "seq_repair": "sequential REPAIR",
    "rescale": "RESCALE",
    "seq_rescale": "sequential RESCALE",
}
CODES = {"own": "the paper's own code", "a": "Git Re-Basin's code", "b": "REPAIR's code"}
PRECISION = {"vgg": "oab", "vgg_bn": "oab", "vgg_ln": "oa", "resnet_bn": "oa", "resnet_ln": "oa"}
NETWORKS = {"vgg": "VGG", "vgg_bn": "VGG-BN", "vgg_ln": "VGG-LN", "resnet_bn": "ResNet-BN", "resnet_ln": "ResNet-LN"}


def _midpoint(words: str) -> Number:
    return Number(f"accuracy of the midpoint, {words}", "%")


NUMBERS: dict[str, dict[str, Number]] = {
    "repair/fig1-middle": {
        "barrier_before": Number("barrier before REPAIR", "points"),
        "barrier_after": Number("barrier after REPAIR", "points"),
        "reduction": Number("reduction of the barrier", "%"),
    },
    "repair/fig1-right": {
        "reduction_range": Number("reduction of barriers, least and greatest", "%", ("least", "greatest"), list)
    },
    "repair/fig2-middle": DECAY,
    "repair/fig2-right": DECAY,
    "repair/sec3-theory": {
        "corr": Number("correlation of aligned units in the first layer", ""),
        "variance": Number("variance of the midpoint's first layer, relative to endpoints", ""),
    },
    "repair/fig3-middle": {
        "endpoints": Number("accuracy of the endpoints", "%"),
        "midpoint_before": Number("accuracy of the midpoint before REPAIR", "%"),
        "midpoint_after": Number("accuracy of the midpoint after REPAIR", "%"),
        "barrier_after": Number("barrier after REPAIR", "points"),
        "reduction": Number("reduction of the barrier", "%"),
        "ot_fusion_midpoint": Number("midpoint of OT fusion (Singh and Jaggi 2020)", "%", None),
    },
    "repair/fig3-right": {
        "deepest_over_90_before": Number("deepest midpoint above 90 %, before REPAIR", "layers"),
        "deepest_over_90_closed_form": Number("deepest midpoint above 90 %, REPAIR in closed form", "layers"),
    },
    "repair/samples": {"enough": Number("calibration images that suffice", "images")},
    "repair/fig4-left": {
        "bn_ln_loss_barrier_at_16x": Number(
            "loss barrier after REPAIR at 16x, the larger of BatchNorm's and LayerNorm's",
            "nats",
            ("bn_after_16x", "ln_after_16x"),
        )
    },
    "repair/fig4-middle": {
        f"midpoint_{norm}_{when}_8x": Number(f"accuracy of the midpoint, {NORMS[norm]} at 8x, {when} REPAIR", "%")
        for norm in NORMS
        for when in ("before", "after")
    },
    "repair/fig4-right": {
        "bn_midpoint": Number("accuracy of the midpoint before REPAIR, BatchNorm", "%"),
        "ln_midpoint": Number("accuracy of the midpoint before REPAIR, LayerNorm", "%"),
        "both_after": Number("accuracy of the midpoint after REPAIR, the lower of both norms'", "%"),
        "bn_endpoints": Number("accuracy of the endpoints, BatchNorm", "%"),
        "ln_endpoints": Number("accuracy of the endpoints, LayerNorm", "%"),
    },
    "repair/fig8-left": {
        f"git_re_basin_{width}x": Number(
            f"loss barrier before REPAIR, LayerNorm at {width}x; the paper's is Git Re-Basin's",
            "nats",
            (f"ln_before_{width}x",),
            exact=True,
        )
        for width in (1, 2, 4, 8, 16, 32)
    },
    "repair/fig5-left": {
        "aligned": Number("accuracy of the midpoint before REPAIR", "%"),
        "conv_only": Number("accuracy of the midpoint, convolutions corrected", "%"),
        "full": Number("accuracy of the midpoint, blocks corrected too", "%"),
        "barrier_conv": Number("barrier, convolutions corrected", "points"),
        "barrier_full": Number("barrier, blocks corrected too", "points"),
    },
    "repair/fig5-right": {
        "resnet18": Number("accuracy of the midpoint after REPAIR, ResNet18", "%"),
        "resnet50": Number("accuracy of the midpoint after REPAIR, ResNet50", "%"),
        "resnet50x2": Number("accuracy of the midpoint after REPAIR, ResNet50x2", "%"),
        "resnet50x2_barrier": Number("barrier after REPAIR, ResNet50x2", "points"),
    },
    "repair/fig7": {
        "best_loss": Number("lowest test loss between the ends", "nats"),
        "best_alpha": Number("where it is", ""),
        "ainsworth_best_loss": Number("lowest test loss of Ainsworth et al. (2022)", "nats", None),
    },
    "combine/figB15-B18": {
        f"{scheme}_{metric}": Number(f"{metric} barrier, {scheme}", unit)
        for scheme in ("uniform", "subcube", "hyperplane", "bernoulli")
        for metric, unit in METRICS.items()
    },
    "combine/fig9": {"train_unchanged_up_to": Number("training accuracy unchanged so far beyond the ends", "")},
    "combine/fig10": {"works_up_to": Number("boxes about A work up to the half edge", "")},
    "combine/fig11b": {"worst_accuracy": Number("accuracy of the triangle's worst network", "%")},
    "combine/fig14": {"layers_that_bear_all": Number("layers that bear a full derangement", "layers")},
} | {
    f"combine/fig{number}": {f"{metric}_barrier": Number(f"{metric} barrier", unit) for metric, unit in METRICS.items()}
    for number in (2, 3, 4, 5)
} | {
    "rethink/fig2c": {
        "spawn_barrier": Number("barrier of spawned networks", "points"),
        "spawn_after_reset": Number("barrier of spawned networks after RESET", "points"),
        "rebasin_barrier": Number("barrier of independent networks, matched", "points"),
    },
    "rethink/table3": {
        f"{network}{stats}_{matching}": Number(f"distance of {name}s{' with statistics' * bool(stats)}, {words}", "")
        for network, kinds in STATISTICS.items()
        for name in [NETWORKS[network]]
        for stats in kinds
        for matching, words in {"none": "as trained", **MATCHED}.items()
    },
    "rethink/fig3cd": {
        f"{matching}_barrier_{biases}": Number(f"barrier, {MATCHED[matching]}, biases {biases}", "points")
        for matching in MATCHED
        for biases in ("kept", "removed")
    },
    "rethink/table1": {name: _midpoint(words) for name, words in VARIANTS.items()},
    "rethink/table4": {name: _midpoint(words) for name, words in VARIANTS.items()},
    "rethink/table8": {
        f"{matching}{name}": _midpoint(f"{words}{MATCHED[matching]}")
        for matching in MATCHED
        for name, words in {"": "", "_rescale": "RESCALE, ", "_rescale_average": "RESCALE, one scale a layer, "}.items()
    },
    "rethink/table9": {
        f"{name}_{metric}": Number(f"{metric} of the midpoint, {words}", unit)
        for name, words in ORDERS.items()
        for metric, unit in {"accuracy": "%", "loss": "nats"}.items()
    },
    "rethink/table10": {
        f"{data}_{matching}": _midpoint(f"RESET {words}, {MATCHED[matching]}")
        for data, words in {"original": "with data", "data_independent": "without data"}.items()
        for matching in MATCHED
    },
    "rethink/table11": {
        f"{data}_{matching}_{name}": _midpoint(f"{name.upper()} {words}, {MATCHED[matching]}")
        for data, words in {"original": "with data", "data_independent": "without data"}.items()
        for matching in MATCHED
        for name in ("repair", "rescale")
    },
    "rethink/fig4c": {"minibatches_after_wm": Number("mini-batches until 90 % of the training images are right", "")},
    "rethink/fig5a": {
        "vgg16_ln_barrier_drop": Number("barrier of VGGs with LayerNorm, less at the largest rate by", "points")
    },
    "rethink/fig6d": {"gain_at_80_sparsity": Number("gained by RESET of a ResNet50 with 80 % of zeros", "points")},
    "rethink/no-matching": {name: _midpoint(f"not aligned, {VARIANTS[name]}") for name in ("repair", "rescale")},
    "rethink/table2": {
        f"{network}_{code}": Number(f"barrier of {NETWORKS[network]}s, {words}", "points")
        for network, codes in PRECISION.items()
        for code, words in CODES.items()
        if code[0] in codes
    }
    | {f"vgg_time_{code}": Number(f"time for VGGs, {CODES[code]}, relative to the paper's", "") for code in "ab"},
} | {
    f"rethink/table{table}": {
        f"{name}_{matching}": _midpoint(f"{words}, {MATCHED[matching]}")
        for name, words in VARIANTS.items()
        for matching in MATCHED
    }
    for table in (5, 6, 7)
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ numbers


class Ours(NamedTuple):
    """Our number, and the width of the networks that it is of, if the paper's is of a certain width."""

    value: float | list[float]
    width: float | None = None


def width_of(name: str) -> float | None:
    """The width that the name of a number ends in.

    >>> width_of("bn_after_8x"), width_of("corr")
    (8.0, None)
    """
    found = re.search(r"_(\d+(?:\.\d+)?)x$", name)
    return float(found[1]) if found else None


def find_ours(number: Number, name: str, summary: Mapping[str, float]) -> Ours | None:
    """Our number in the summary of its item, or that of the nearest width; None if it is not there.

    >>> find_ours(Number("", "%"), "after_8x", {"after_1x": 76.3, "after_2x": 80.1})
    Ours(value=80.1, width=2.0)
    """
    if number.ours is None:
        return None
    found = []
    for each in number.ours or (name,):
        width = width_of(each)
        known = {each: width} if each in summary or width is None or number.exact else {
            other: width_of(other) for other in summary if re.fullmatch(rf"{each.rpartition('_')[0]}_[\d.]+x", other)
        }  # fmt: skip
        nearest = min(known, key=lambda other: abs(math.log(known[other] / width)) if width else 0, default="")
        if nearest not in summary:
            return None
        found.append((summary[nearest], known[nearest]))
    widths = {width for _, width in found}
    return Ours(number.of([value for value, _ in found]), widths.pop()) if len(widths) == 1 else None


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


def difference(ours: Ours, published: Any, unit: str) -> str:
    """Ours minus the paper's; for a bound, whether ours keeps it.

    >>> difference(Ours(92.1), 94.1, "%"), difference(Ours(0.2), "<0.05", "nats")
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


def row(place: str, number: Number, name: str, published: Any, ours: Ours) -> str:
    """A line of the table of a section."""
    values = ours.value if isinstance(ours.value, list) else [ours.value]
    cell = " to ".join(words(value, number.unit) for value in values)
    if ours.width != paper_width(number, name):
        cell += f", at {ours.width:g}x"
    paper = printed(published, number.unit)
    return _line([place, number.words, paper, cell, difference(ours, published, number.unit)])


def paper_width(number: Number, name: str) -> float | None:
    """The width of the networks that the paper's number is of, if it is of a certain width."""
    return width_of((number.ours or (name,))[0])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("<", "&lt;").replace(">", "&gt;")


# -------------------------------------------------------------------------------------------------------- differences


def grid_of(item: str, scale: str) -> grids.Grid:
    """What the section of an item needs at a scale."""
    sections = [make for module in (repair, combine, rethink) for make in vars(module).values()
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
    number = sum(map(len, seeds.values()))
    return f"{number} network{'s' * (number > 1)}, {', '.join(names)}"


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
    for name, value in published.items():
        number = NUMBERS[item][name]
        if number.ours is None:
            continue
        ours, width = find_ours(number, name, record["summary"] if record else {}), paper_width(number, name)
        if ours:
            rows.append(row(place, number, name, value, ours))
        if ours is None or ours.width != width:
            at = f" at {width:g}x" if width else ""
            lacks.append((printed(value, number.unit) + at, needed(item, width)))
    return rows, lacks


def _place(entry: Mapping[str, Any]) -> str:
    """Where the paper prints the numbers of an item: a figure, a table, or the text of a section."""
    section, figure = entry["paper"]["section"], entry["paper"]["figure"]
    if figure.startswith("Table"):
        return figure
    return f"Fig. {figure}" if figure[:1].isdigit() or figure[1:2] == "." else f"Sec. {section}"


def _order(entry: Mapping[str, Any]) -> tuple:
    """By sections, appendices last, then by figures."""
    figure = re.search(r"\d+", entry["paper"]["figure"])
    return entry["paper"]["section"], int(figure[0]) if figure else 0, entry["paper"]["figure"]


if __name__ == "__main__":
    atomic_write(PAGE, page())
    print(PAGE)
