"""Figures of Mode Combinability (Csiszarik et al. 2023), in the style of `plots`."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import RegularPolygon

from companion.experiments.tables import best_combinations
from companion.figures.plots import COLUMN_WIDTH, OTHERS, STYLE, curves, style

MATCHING_LOOKS = {
    "WM": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "aligned"},
    "none": {"color": "#999999", "linestyle": ":", "marker": "v", "label": "not aligned"},
    "through A": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "through A"},
    "directly": {"color": "#E69F00", "linestyle": "--", "marker": "s", "label": "directly"},
}
SPLITS = {"test": {}, "train": {"linestyle": "--", "markerfacecolor": "white"}}
METRICS = {"loss": "test loss (nats)", "accuracy": "test accuracy (%)"}


def performance(
    table: Sequence[dict] | pd.DataFrame,
    x: str = "x",
    *,
    xlabel: str,
    title: str = "",
    marks: Mapping[float, str] | None = None,
) -> Figure:
    """Loss (nats) over accuracy (%) of combined networks, aligned and not (Csiszarik et al. 2023, Figs. 2 to 6, 8).

    Lines are means over samples and pairs, bands go from the worst to the best of them; a dashed line is the mean of
    the endpoints.

    Args:
        table: rows of `mixtures.evaluate_rows`, of one split, with a column `matching`.
        x: column of the horizontal axis.
        marks: what lies at some places of that axis, such as {0: "model A", 1: "model B"}.
    """
    frame = pd.DataFrame(table)
    with style():
        figure, axes = plt.subplots(2, sharex=True, figsize=(COLUMN_WIDTH, 4.2))
        for ax, metric in zip(axes, METRICS, strict=True):
            _panel(ax, frame, x, metric)
        axes[0].set_title(title)
        axes[1].set_xlabel(xlabel)
        if marks:
            between = [tick for tick in axes[1].get_xticks() if min(marks) < tick < max(marks) and tick not in marks]
            ticks = {tick: f"{tick:g}" for tick in between} | {at: f"{at:g}\n{name}" for at, name in marks.items()}
            axes[1].set_xticks(list(ticks), list(ticks.values()))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


# Whose labels combined networks predict: colours of `agreement`, light for correct labels and dark for wrong ones.
AGREEMENT = {
    "both": ("A and B", "#B5CDE8", "#0072B2"),
    "a": ("A only", "#B7E0D3", "#009E73"),
    "b": ("B only", "#F7DDA0", "#E69F00"),
    "neither": ("neither", "#CCCCCC", "#555555"),
}
SHORT = {
    "linear": r"$\alpha$",
    "uniform": "half edge $s$",
    "subcube": r"centre $\alpha$",
    "hyperplane": r"mean $\alpha$",
    "bernoulli": "probability $p$",
}  # names of the schemes' parameters that fit below a small panel


def agreement_shares(table: Sequence[dict] | pd.DataFrame) -> pd.DataFrame:
    """Counts of labels as percent of the test images, with their sums: both, a, b, neither, and wrong.

    Args:
        table: rows of `comparisons.label_rows`; other columns stay.
    """
    frame = pd.DataFrame(table)
    parts = [f"{name}_{word}" for name in AGREEMENT for word in ("correct", "wrong")]
    share = 100 * frame[parts].div(frame[parts].sum(axis=1), axis=0)
    sums = {name: share[f"{name}_correct"] + share[f"{name}_wrong"] for name in AGREEMENT}
    return frame.assign(**share, **sums, wrong=share.filter(like="_wrong").sum(axis=1))


def agreement(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Whose labels combined networks predict, in percent of the images (Csiszarik et al. 2023, Figs. 12, B.25, B.26).

    Means over samples and pairs, one upon the other, correct labels light and wrong ones dark; dotted lines are where
    "neither" begins in the best and the worst of them. Panels of aligned networks begin where something happens.

    Args:
        table: rows of `comparisons.label_rows` with a column `model`; each matching and scheme of each
            model has a panel, in their order in the table.
    """
    frame = agreement_shares(table)
    parts = {f"{name}_{word}": (f"{label}, {word}", shades[word == "wrong"])
             for name, (label, *shades) in AGREEMENT.items() for word in ("correct", "wrong")}  # fmt: skip
    labels, colors = zip(*parts.values(), strict=True)
    panels = list(frame.groupby(["model", "scheme", "matching"], sort=False))
    lines = -(-len(panels) // 2)
    with style():
        several = frame["model"].nunique() > 1
        size = (COLUMN_WIDTH, 0.9 + (1.4 if several else 1.25) * lines)
        figure = plt.figure(figsize=size)
        body = figure.subfigures()  # apart from the legend
        axes = body.subplots(lines, 2, squeeze=False)
        shared = 10 * (frame.loc[frame["matching"] != "none", "both"].min() // 10)
        for ax, ((model, scheme, matching), rows) in zip(axes.flat, panels, strict=False):
            mean = rows.groupby("x")[list(parts)].mean()
            ax.stackplot(mean.index, mean.T, labels=labels, colors=colors, lw=0)
            name = f"{model}\n" * several + scheme + ", not aligned" * (matching == "none")
            for how, label in (("min", "neither begins, best and worst"), ("max", None)):
                shares = 100 - rows.groupby("x")["neither"].agg(how)
                ax.plot(shares.index, shares, color="black", lw=0.7, ls=":", label=label)
            ax.set(
                title=name,
                xlabel=SHORT[scheme],
                ylim=(0 if matching == "none" else shared, 100),
                xlim=(mean.index[0], mean.index[-1]),
            )
            if scheme == "uniform":  # does not go from A to B
                ax.set_xticks([0, 0.25, 0.5])
            else:
                ax.set_xticks([0, 0.5, 1], ["0 (A)", "0.5", "1 (B)"])
                for tick, align in zip(ax.get_xticklabels(), ("left", "center", "right"), strict=True):
                    tick.set_ha(align)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        body.supylabel("test images (%)", fontsize=STYLE["font.size"])
        body.suptitle(title, fontsize=STYLE["axes.titlesize"])
        return figure


def edges(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Edge lengths of the hyperrectangle, layer by layer, aligned and not (Csiszarik et al. 2023, Fig. 13).

    Lines are means over pairs, bands go from the least to the greatest of them.

    Args:
        table: rows of `comparisons.edge_rows` with a column `pair`.
    """
    frame = pd.DataFrame(table)
    layers = list(frame.groupby("layer", sort=False))
    lines = -(-len(layers) // 3)
    with style():
        figure = plt.figure(figsize=(COLUMN_WIDTH, 0.7 + 1.05 * lines))
        panels = figure.subfigures()  # apart from the legend
        axes = panels.subplots(lines, 3, sharex=True, sharey=True, squeeze=False)
        for ax, (layer, rows) in zip(axes.flat, layers, strict=False):
            for matching, of in rows.groupby("matching", sort=False):
                spread = 100 * of.groupby("bin_low")["share"].agg(["mean", "min", "max"])
                bounds, look = [*spread.index, of["bin_high"].max()], MATCHING_LOOKS[matching] | {"marker": ""}
                ax.stairs(spread["mean"], bounds, baseline=None, color=look["color"], ls=look["linestyle"],
                          label=look["label"])  # fmt: skip
                ax.stairs(spread["max"], bounds, baseline=spread["min"], fill=True, color=look["color"], alpha=0.15)
            ax.set_title(layer)
        for ax in axes.flat[len(layers) :]:
            ax.set_axis_off()
        panels.supxlabel("edge length (multiples of the layer's RMS weight)", fontsize=STYLE["font.size"])
        panels.supylabel("weights (%)", fontsize=STYLE["font.size"])
        panels.suptitle(title, fontsize=STYLE["axes.titlesize"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def robustness(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Barriers against the share of a layer's pairs that are deranged, layer by layer (Csiszarik et al. 2023, Fig. 14).

    Loss (nats) at the left, accuracy (points) at the right. Lines are means over draws and pairs, bands go from the
    least to the greatest of them; dashed is the mean barrier of networks that are not aligned.

    Args:
        table: rows of `comparisons.derangement_rows`.
    """
    frame = pd.DataFrame(table)
    frame["share"] = 100 * frame["k"] / frame["units"]
    layers = list(frame.groupby("layer", sort=False))
    columns = {"loss": "loss barrier\n(nats)", "accuracy": "accuracy barrier\n(points)"}
    with style():
        figure = plt.figure(figsize=(COLUMN_WIDTH, 0.9 + 0.68 * len(layers)))
        panels = figure.subfigures()  # apart from the legend
        axes = panels.subplots(len(layers), 2, sharex=True, sharey="col", squeeze=False)
        for line, (layer, rows) in zip(axes, layers, strict=True):
            for ax, metric in zip(line, columns, strict=True):
                unit = 100 if metric == "accuracy" else 1
                spread = rows.groupby("share")[f"{metric}_barrier"].agg(["mean", "min", "max"]) * unit
                look = MATCHING_LOOKS["WM"] | {"label": "aligned, then deranged"}
                ax.plot(spread.index, spread["mean"], **look)
                ax.fill_between(spread.index, spread["min"], spread["max"], color=look["color"], alpha=0.15, lw=0)
                not_aligned = frame[f"not_aligned_{metric}_barrier"].mean() * unit
                ax.axhline(not_aligned, **MATCHING_LOOKS["none"] | {"marker": "", "ls": "--"})
            line[0].set_ylabel(f"{layer}\n{rows['units'].iloc[0]} units", rotation=0, ha="right", va="center")
            line[0].set_xticks([0, 50, 100])
        for ax, name in zip(axes[0], columns.values(), strict=True):
            ax.set_title(name)
        panels.supxlabel("deranged pairs (% of the layer's, least correlated first)", fontsize=STYLE["font.size"])
        panels.suptitle(title, fontsize=STYLE["axes.titlesize"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


SCHEME_LOOKS = {
    "linear": {"color": "#000000", "marker": "v"},
    "uniform": {"color": "#56B4E9", "marker": "s"},
    "subcube": {"color": "#0072B2", "marker": "o"},
    "hyperplane": {"color": "#009E73", "marker": "^"},
    "bernoulli": {"color": "#D55E00", "marker": "P"},
    "stitching": {"color": "#CC79A7", "marker": "D"},
}


def widths(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Barriers in loss (nats) over those in accuracy (points) against width (Csiszarik et al. 2023, Figs. 7 and B.21).

    Full lines are of aligned pairs, dotted ones of others: means over pairs, with bars from the least to the greatest.

    Args:
        table: rows of `mixtures.sample_barriers` with a column `width`, one for each scheme, matching, width and pair.
    """
    frame = pd.DataFrame(table)
    ticks = sorted(frame["width"].unique())
    step = (ticks[-1] / ticks[0]) ** 0.012  # between bars at one width, which stand side by side
    with style():
        figure, axes = plt.subplots(2, sharex=True, figsize=(COLUMN_WIDTH, 4.6))
        for ax, metric, unit in zip(axes, ("loss_barrier", "accuracy_barrier"), (1, 100), strict=True):
            for place, (scheme, look) in enumerate(SCHEME_LOOKS.items()):
                for matching, rows in frame[frame["scheme"] == scheme].groupby("matching", sort=False):
                    spread = rows.groupby("width")[metric].agg(["mean", "min", "max"]) * unit
                    ends = [(spread["mean"] - spread["min"]).clip(0), (spread["max"] - spread["mean"]).clip(0)]
                    at = spread.index * step ** (place - (len(SCHEME_LOOKS) - 1) / 2)
                    how = {"ls": "-", "label": scheme}
                    if matching == "none":
                        how = {"ls": ":", "label": f"{scheme}, not aligned", "mfc": "white"}
                    ax.errorbar(at, spread["mean"], ends, elinewidth=0.8, **look | how)
            ax.axhline(0, color="black", lw=0.6, zorder=0)
        axes[0].set(xscale="log", title=title, ylabel="test loss barrier (nats)")
        axes[1].set(xlabel="width multiplier", ylabel="test accuracy barrier (points)")
        axes[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[1].minorticks_off()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def _panel(ax: Axes, frame: pd.DataFrame, x: str, metric: str) -> None:
    options = {"percent": metric == "accuracy", "legend": "none", "ax": ax, "looks": MATCHING_LOOKS}
    curves(frame, x, metric, "matching", xlabel="", ylabel=METRICS[metric], **options)
    end = frame[f"end_{metric}"].mean() * (100 if metric == "accuracy" else 1)
    ax.axhline(end, color="black", lw=0.8, ls="--", label="mean of the endpoints", zorder=1)
    (low, high), margin = ax.get_ylim(), 0.05 * np.ptp(ax.get_ylim())
    ax.set_ylim(min(low, end - margin), max(high, end + margin))  # not upon the frame


# Of the models in `schematic`: alike in brightness, which stands for something else there.
ENDS = {"model A": "#56B4E9", "model B": "#E69F00"}


def schematic(table: Sequence[dict] | pd.DataFrame, *, columns: int = 5) -> Figure:
    """Small combined networks, layer below layer, a cell for each weight (Csiszarik et al. 2023, Fig. 1).

    A cell's hue is its coefficient, from A's blue to B's orange, its brightness the weight.

    Args:
        table: rows {network, layer, row, column, coefficient, weight}, the last two in [0, 1].
        columns: networks beside each other.
    """
    blue, orange = (np.array(to_rgb(color)) for color in ENDS.values())

    def mix(coefficient: np.ndarray, weight: np.ndarray) -> np.ndarray:
        c, bright = coefficient[..., None], 0.3 + 0.7 * weight[..., None]
        return bright * ((1 - c) * blue + c * orange)

    networks = pd.DataFrame(table).groupby("network", sort=False)
    with style():
        figure = plt.figure(figsize=(COLUMN_WIDTH, 0.9 + 1.8 * -(-len(networks) // columns)))
        above, below = figure.subfigures(2, height_ratios=(figure.get_figheight() - 0.9, 0.9))
        axes = above.subplots(-(-len(networks) // columns), columns, squeeze=False).flatten()
        for ax in axes:
            ax.set_axis_off()
        for ax, (name, cells) in zip(axes, networks, strict=False):
            top = 0
            for _, layer in cells.groupby("layer", sort=False):
                its = (layer.pivot(index="row", columns="column", values=v) for v in ("coefficient", "weight"))
                colours = mix(*(value.to_numpy() for value in its))
                high, wide = colours.shape[:2]
                ax.imshow(colours, extent=(0, wide, top + high, top), interpolation="nearest")
                ax.add_patch(plt.Rectangle((0, top), wide, high, fill=False, lw=0.8))
                top += high + 1
            ax.set(xlim=(-0.1, wide + 0.1), ylim=(top - 0.9, -0.1))
            ax.set_title(name.replace(" ", "\n", 1), fontsize=STYLE["legend.fontsize"])
        key = below.subplots()
        grid = np.meshgrid(np.linspace(0, 1, 256), np.linspace(0, 1, 64))
        key.imshow(mix(*grid), extent=(0, 1, 0, 1), origin="lower", aspect="auto")
        key.set(xlabel="coefficient", ylabel="weight", yticks=[0, 1])
        key.set_xticks([0, 0.5, 1], ["0\nmodel A", "0.5", "1\nmodel B"])
        key.grid(False)
        return figure


def coefficients(drawn: Mapping[str, Mapping[float, np.ndarray]], *, bins: int = 20) -> Figure:
    """Histograms of drawn coefficients (%), a panel for each distribution, a line for each value of its parameter.

    Args:
        drawn: title -> parameter -> coefficients in [0, 1]; the same parameters in every panel.
        bins: of equal width, over [0, 1].
    """
    with style():
        figure, axes = plt.subplots(-(-len(drawn) // 2), 2, sharex=True, squeeze=False, figsize=(COLUMN_WIDTH, 3.4))
        for ax, (title, values) in zip(axes.flat, drawn.items(), strict=True):
            for (x, its), (color, _), line in zip(values.items(), OTHERS, ("-", "--", ":"), strict=False):
                counts, edges = np.histogram(its, bins, (0, 1))
                ax.stairs(100 * counts / len(its), edges, color=color, ls=line, lw=1.4, label=f"parameter {x:g}")
            ax.set(title=title, ylim=(0, None))
        for ax in axes[-1]:
            ax.set_xlabel("coefficient")
        figure.supylabel(f"share of the weights in a bin of {1 / bins:g} (%)", fontsize=STYLE["font.size"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


def performances(table: Sequence[dict] | pd.DataFrame, xlabels: Mapping[str, str], *, title: str = "") -> Figure:
    """`performance` of several schemes, a row of panels for each: loss on the left, accuracy on the right.

    Args:
        table: rows as of `performance`, with a column `scheme`.
        xlabels: the horizontal axis of each scheme, in the order of the rows.
    """
    frame = pd.DataFrame(table)
    with style():
        figure, axes = plt.subplots(len(xlabels), 2, squeeze=False, figsize=(COLUMN_WIDTH, 0.5 + 1.6 * len(xlabels)))
        for row, (scheme, xlabel) in zip(axes, xlabels.items(), strict=True):
            rows = frame[frame["scheme"] == scheme]
            for ax, metric in zip(row, METRICS, strict=True):
                _panel(ax, rows, "x", metric)
                ax.set_xlabel(textwrap.fill(xlabel, 26))
                ax.set_xticks(np.linspace(rows["x"].min(), rows["x"].max(), 3))
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


def descents(table: Sequence[dict] | pd.DataFrame) -> Figure:
    """Similarity of two networks' weights while their units are being matched, a line for each pair (Algorithm 1).

    Args:
        table: rows of `pairs.match_rows` with columns model and pair. Short dashes at the left are weights as trained.
    """
    frame = pd.DataFrame(table)
    with style():
        figure, ax = plt.subplots()
        for (model, rows), (color, marker) in zip(frame.groupby("model", sort=False), OTHERS, strict=False):
            for i, (_, of) in enumerate(rows.groupby("pair", sort=False)):
                label = {} if i else {"label": model}
                ax.plot(of["sweep"], of["similarity"], color=color, marker=marker, ms=3, lw=1, **label)
                ax.plot([-0.7, -0.3], [of["as_trained"].iloc[0]] * 2, color=color)
        ax.set(xlabel="sweeps over all layers", ylabel="cosine similarity of\nthe weights of A and B")
        ax.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def beyond(tables: Mapping[str, Sequence[dict] | pd.DataFrame], *, title: str = "") -> Figure:
    """Loss over accuracy of networks beyond the hypercube (Csiszarik et al. 2023, Figs. 9, 10, B.23, B.24).

    Lines are means over samples and pairs, bands go from the worst to the best of them; lines of the training set have
    open markers and are dashed. A scale that starts below 0 has models A and B marked on it.

    Args:
        tables: label of the horizontal axis -> rows of `mixtures.combination_rows`; a column of panels for each.
    """
    with style():
        figure, axes = plt.subplots(2, len(tables), sharex="col", squeeze=False,
                                    figsize=(COLUMN_WIDTH * (1 + len(tables)) / 2, 4.2))  # fmt: skip
        for (above, below), (label, table) in zip(axes.T, tables.items(), strict=True):
            frame = pd.DataFrame(table)
            frame["line"] = frame["matching"] + " " + frame["split"]
            looks = {}
            for split, matching in itertools.product(SPLITS, frame["matching"].unique()):
                look = MATCHING_LOOKS[matching]
                looks[f"{matching} {split}"] = look | SPLITS[split] | {"label": f"{look['label']}, {split}"}
            for ax, metric in ((above, "loss"), (below, "accuracy")):
                curves(frame, "x", metric, "line", xlabel="", ylabel=METRICS[metric].removeprefix("test "), ax=ax,
                       percent=metric == "accuracy", legend="none", looks=looks)  # fmt: skip
                for x in (0, 1) if frame["x"].min() < 0 else ():
                    ax.axvline(x, color="black", lw=0.6, ls=":", zorder=0)
            if frame["x"].min() < 0:
                below.set_xticks([-1, 0, 1, 2], ["-1", "0\nmodel A", "1\nmodel B", "2"])
            below.set_xlabel(textwrap.fill(label, 52 // len(tables)))
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def plane(panels: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Sampled coefficients of two weights, panel beside panel, with models A at (0, 0) and B at (1, 1).

    Args:
        panels: title -> points (c_1, c_2).
    """
    with style():
        size = (COLUMN_WIDTH, 1.6)
        figure, axes = plt.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False, figsize=size)
        for ax, (name, points) in zip(axes[0], panels.items(), strict=True):
            ax.add_patch(plt.Rectangle((0, 0), 1, 1, fill=False, lw=0.6))
            ax.plot(*zip(*points, strict=True), ".", color=MATCHING_LOOKS["WM"]["color"], ms=1.5, zorder=1)
            for which, at in (("A", (0, 0)), ("B", (1, 1))):
                ax.plot(*at, "ko", ms=3)
                behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
                ax.annotate(which, at, (3, 3), textcoords="offset points", bbox=behind)
            ax.set(title=name, aspect="equal", xticks=[0, 1], yticks=[0, 1], xlabel="$c_1$")
        axes[0, 0].set_ylabel("$c_2$")
        return figure


def matchings(found: Mapping[str, Sequence[int]]) -> Figure:
    """Permutations as points (unit of A, unit of B), panel beside panel; what differs from the first one is orange.

    Args:
        found: title -> the unit of B that each unit of A is matched with.
    """
    first = np.asarray(next(iter(found.values())))
    with style():
        figure, axes = plt.subplots(1, len(found), sharey=True, squeeze=False, figsize=(COLUMN_WIDTH, 1.7))
        for ax, (title, units) in zip(axes[0], found.items(), strict=True):
            units, places = np.asarray(units), np.arange(len(first))
            for which, look in ((units == first, OTHERS[0]), (units != first, ("#E69F00", "s"))):
                ax.plot(places[which], units[which], look[1], color=look[0], ms=4)
            ax.set(title=title, xlabel="unit of A", aspect="equal", xticks=[0, len(first) - 1])
        axes[0, 0].set(ylabel="unit of B", yticks=[0, len(first) - 1])
        return figure


CORNERS = {"a": (0.0, 0.0, "A"), "b": (1.0, 0.0, r"$\pi_B$(B)"), "c": (0.5, 0.75**0.5, r"$\pi_C$(C)")}


def triangle(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Test accuracy (%) of combinations of three models as an equilateral triangle (Csiszarik et al. 2023, Fig. 11b).

    A cell is a combination: a corner is one model, an edge lies between two. Each triple has a panel. A star marks the
    combination with the highest accuracy; the lowest loss breaks ties. Aligned models stand above, others below, each
    with a colour scale of their own.

    Args:
        table: rows {matching: "WM" or "none", triple: seeds of the three such as "1-2-3", w_a, w_b, w_c: weights of
            `combine.simplex_grid`, loss (nats), accuracy (in [0, 1])}.
    """
    frame = pd.DataFrame(table)
    frame["accuracy"] *= 100
    frame["x"], frame["y"] = (sum(frame[f"w_{name}"] * at[i] for name, at in CORNERS.items()) for i in (0, 1))
    radius = frame.loc[frame["w_a"] > 0, "w_a"].min() / 3**0.5  # of hexagons that fill the plane
    matchings, triples = list(frame.groupby("matching", sort=False)), frame["triple"].nunique()
    with style():
        size = (COLUMN_WIDTH * (1 + triples) / 2, 0.4 + 2.5 * len(matchings))
        figure, axes = plt.subplots(len(matchings), triples, squeeze=False, figsize=size)
        for row, (matching, those) in zip(axes, matchings, strict=True):
            best = best_combinations(those, "triple")
            for ax, (triple, rows) in zip(row, those.groupby("triple", sort=False), strict=True):
                hexagons = [RegularPolygon(at, 6, radius=radius) for at in rows[["x", "y"]].to_numpy()]
                cells = PatchCollection(hexagons, edgecolor="face", lw=0.3)
                cells.set(array=rows["accuracy"], clim=(those["accuracy"].min(), those["accuracy"].max()))
                ax.add_collection(cells)
                star = {"color": "white", "markeredgecolor": "black", "label": r"$\Theta^*$, the best combination"}
                ax.plot(best.loc[triple, "x"], best.loc[triple, "y"], "*", ms=9, linestyle="", **star)
                for name, (x, y, label) in CORNERS.items():
                    label = label if matching == "WM" else name.upper()
                    text = f"{label}\n{rows.loc[rows[f'w_{name}'].idxmax(), 'accuracy']:.1f} %"
                    side, align = (-1, "top") if y == 0 else (1, "bottom")
                    ax.annotate(text, (x, y + 1.3 * side * radius), ha="center", va=align, fontsize=7)
                seeds = f"A, B, C: seeds {triple.replace('-', ', ')}\n" if matching == matchings[0][0] else ""
                ax.set_title(
                    f"{seeds}{MATCHING_LOOKS[matching]['label']}, the best {best.loc[triple, 'accuracy']:.1f} %"
                )
                ax.set(aspect="equal", xlim=(-0.12 - radius, 1.12 + radius), ylim=(-0.25 - radius, 1.1 + radius))
                ax.set_axis_off()
            figure.colorbar(cells, ax=row, label="test accuracy (%)", shrink=0.8)
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center")
        return figure
