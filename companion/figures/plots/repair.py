"""Figures of REPAIR (Jordan et al. 2022), in the style of `plots`."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from companion.experiments.tables import WHEN, name_networks, network_name
from companion.experiments.tables import barriers as path_barriers
from companion.figures.plots import COLUMN_WIDTH, LOOKS, OTHERS, STYLE, curves, style

# Lines that are told apart by something else than the network (norms, data sets), each before and after REPAIR.
SERIES = {
    "bn": {"color": "#E69F00", "marker": "o", "label": "BatchNorm"},
    "ln": {"color": "#0072B2", "marker": "s", "label": "LayerNorm"},
    "fixup": {"color": "#009E73", "marker": "^", "label": "Fixup"},
    "digits": {"color": "#000000", "marker": "v", "label": "digits"},
    "digits-hard": {"color": "#D55E00", "marker": "P", "label": "digits-hard"},
    "mnist": {"color": "#009E73", "marker": "^", "label": "MNIST"},
    "fashionmnist": {"color": "#CC79A7", "marker": "D", "label": "FashionMNIST"},
    "svhn": {"color": "#E69F00", "marker": "o", "label": "SVHN"},
    "cifar10": {"color": "#0072B2", "marker": "s", "label": "CIFAR-10"},
}
# Merged networks and what they are measured against.
BASELINES = {
    "aligned": LOOKS["aligned"],
    "aligned + REPAIR": LOOKS["aligned + REPAIR"],
    "ensemble": {"color": "#E69F00", "linestyle": "-", "marker": "s", "label": "ensemble (mixed logits)"},
    "endpoint A": LOOKS["endpoint A"] | {"linestyle": "--"},
    "endpoint B": LOOKS["endpoint B"] | {"linestyle": ":"},
    "corrected A": {"color": "#009E73", "linestyle": "--", "label": "A, shift corrected"},
    "corrected B": {"color": "#009E73", "linestyle": ":", "label": "B, shift corrected"},
    "full data": {"color": "#CC79A7", "linestyle": "-.", "label": "trained on all data"},
}


def variance_profile(
    table: Sequence[dict] | pd.DataFrame, *, title: str = "", log_y: bool = False, xlabel: str = "layer"
) -> Figure:
    """Variance relative to the endpoints against depth (Jordan et al. 2022, Fig. 2)."""
    figure = curves(
        table,
        "layer",
        "ratio",
        "network",
        xlabel=xlabel,
        ylabel="variance relative\nto endpoints (ratio)",
        title=title,
        log_y=log_y,
    )
    (ax,) = figure.axes
    ax.axhline(1, color="black", lw=0.6, zorder=0)
    if not log_y:
        ax.set_ylim(bottom=0)
    return figure


def path(
    table: Sequence[dict] | pd.DataFrame,
    *,
    metric: str = "accuracy",
    title: str = "",
    lines: tuple[str, str] = ("-", "-."),
    legend: str = "below",
    ax: Axes | None = None,
) -> FigureBase:
    """Test accuracy (%) or loss (nats) against alpha, the ends labelled with the networks they are.

    Args:
        table: long, see `experiments.rows`. With a column `series`, each series has the colour and marker that it has
            in `barriers`, and its networks before and after REPAIR are told apart as there.
        lines: with a column `series`, line styles before REPAIR and after.
        legend: "below" the axes or "none".
        ax: where to draw; a new figure by default.
    """
    percent = metric == "accuracy"
    ylabel = "test accuracy (%)" if percent else "test loss (nats)"
    frame, looks = name_networks(table), LOOKS
    if "series" in frame:
        series = list(frame["series"].unique())
        frame = frame.assign(network=frame["series"] + " " + frame["network"])
        looks = {f"{name} {network_name('AM', renorm)}": _series_look(name, series, renorm, lines)
                 for renorm in WHEN for name in series}  # fmt: skip
        frame = frame.sort_values("network", key=lambda c: c.map(list(looks).index), kind="stable")
    figure = curves(frame, "alpha", metric, "network", xlabel=r"$\alpha$", ylabel=ylabel, title=title, percent=percent,
                    looks=looks, legend=legend, ax=ax)  # fmt: skip
    ax = ax or figure.axes[0]
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nmodel A", "0.25", "0.5", "0.75", "1\nmodel B"])
    return figure


def merging(table: Sequence[dict] | pd.DataFrame) -> Figure:
    """Test loss (nats) over accuracy (%), both against alpha (Jordan et al. 2022, Figs. 7 and 13).

    Args:
        table: rows {series, network, alpha, loss, accuracy}. Each series gets a column of panels with its name; a
            network is one of `BASELINES`. One without alpha (None) is a horizontal line. Lines are means over
            repetitions, bands go from the least to the greatest.
    """
    frame = name_networks(table).astype({"alpha": float})
    names = list(frame["series"].unique())
    labels = {"loss": "test loss (nats)", "accuracy": "test accuracy (%)"}
    with style():
        figure, axes = plt.subplots(2, len(names), sharex=True, squeeze=False,
                                    figsize=(COLUMN_WIDTH * (1 + len(names)) / 2, 4.4))  # fmt: skip
        for (row, metric), (column, name) in itertools.product(enumerate(labels), enumerate(names)):
            ax, rows = axes[row, column], frame[frame["series"] == name]
            curves(rows.dropna(subset="alpha"), "alpha", metric, "network", xlabel=r"$\alpha$" if row else "",
                   ylabel=labels[metric], title="" if row else name, percent=metric == "accuracy", legend="none",
                   ax=ax, looks=BASELINES)  # fmt: skip
            for network, level in rows[rows["alpha"].isna()].groupby("network", sort=False):
                values, look = level[metric] * (100 if metric == "accuracy" else 1), BASELINES[network]
                ax.axhline(values.mean(), **{"label": network} | look | {"marker": ""}, lw=1)
                ax.axhspan(values.min(), values.max(), color=look["color"], alpha=0.1, lw=0)
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nmodel A", "0.25", "0.5", "0.75", "1\nmodel B"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(names))
        return figure


def mark_reduction(ax: Axes, before: float, after: float, ends: float) -> None:
    """Mark on a `path` in percent how much of the midpoint's barrier REPAIR takes away (Jordan et al. 2022, Fig. 1)."""
    with style():
        bracket = {"arrowstyle": "|-|", "mutation_scale": 3, "color": "black", "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (0.5, before), (0.5, after), arrowprops=bracket, zorder=5)
        less = (after - before) / (ends - before)
        text = f"barrier\n{ends - before:.0f} → {ends - after:.0f}\npoints\n({less:.0%} less)"
        ax.annotate(text, (0.5, (before + after) / 2), (5, 0), textcoords="offset points", va="center", fontsize=7)


def variance_scatter(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Variance relative to the endpoints of several networks (Jordan et al. 2022, Fig. 1 left): open before REPAIR.

    Args:
        table: rows {series, network ("aligned" or "aligned + REPAIR"), layer, ratio}, also of several pairs, whose
            means are drawn.
    """
    frame = pd.DataFrame(table)
    names = list(frame["series"].unique())
    with style():
        figure, ax = plt.subplots()
        for renorm in WHEN:
            for name in names:
                rows = frame[(frame["series"] == name) & (frame["network"] == network_name("AM", renorm))]
                mean = rows.groupby("layer")["ratio"].mean()
                look = _series_look(name, names, renorm, ("", "")) | {"linestyle": "", "markersize": 3.5}
                ax.plot(mean.index, mean, **look)
        ax.axhline(1, color="black", lw=0.6, zorder=0)
        ax.set(xlabel="layer", yscale="log", title=title)
        ax.set_ylabel("variance relative\nto endpoints (ratio)")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def reductions(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """By how much REPAIR reduces barriers, a row for each kind of network and data (Jordan et al. 2022, Fig. 1 right).

    Means over pairs, with a line from the least to the greatest; the shape tells the norm, the size the width.

    Args:
        table: rows {row (its label), norm: "bn", "ln" or "none", width, reduction (%)}, one for each pair.
    """
    frame = pd.DataFrame(table)
    names, norms = list(frame["row"].unique()), {"bn": "BatchNorm", "ln": "LayerNorm", "none": "no normalisation"}
    looks = {norm: SERIES[norm if norm != "none" else "fixup"] for norm in norms}
    with style():
        figure, ax = plt.subplots(figsize=(COLUMN_WIDTH, 1.4 + 0.28 * len(names)))
        for (name, norm), rows in frame.groupby(["row", "norm"], sort=False):
            here = [key for key in norms if key in set(frame.loc[frame["row"] == name, "norm"])]
            y = names.index(name) + 0.22 * (here.index(norm) - (len(here) - 1) / 2)  # norms of a row side by side
            spread = rows.groupby("width")["reduction"].agg(["mean", "min", "max"])
            color, marker = looks[norm]["color"], looks[norm]["marker"]
            ax.hlines([y] * len(spread), spread["min"], spread["max"], color=color, lw=0.6, alpha=0.5)
            sizes = 12 + 45 * np.linspace(0, 1, len(spread)) if len(spread) > 1 else 30
            ax.scatter(
                spread["mean"], [y] * len(spread), s=sizes, marker=marker, alpha=0.7, lw=0, color=color, zorder=3
            )
        handles = [ax.plot([], [], linestyle="", label=label, **{k: looks[norm][k] for k in ("color", "marker")})[0]
                   for norm, label in norms.items() if norm in set(frame["norm"])]  # fmt: skip
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="barrier reduction (%)", ylabel="network and data", title=title)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlim(min(0, frame["reduction"].min()) - 3, 103)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, title="larger: wider networks", title_fontsize=7
        )
        return figure


def prediction(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Predicted against measured variance of first-layer units (Jordan et al. 2022, Sec. 3.2)."""
    frame = pd.DataFrame(table)
    with style():
        figure, ax = plt.subplots()
        low, high = frame["measured"].min(), frame["measured"].max()
        ax.plot([low, high], [low, high], color="black", lw=0.6, label="prediction = measurement")
        ax.plot(frame["measured"], frame["rule_of_thumb"], "v", color="#E69F00", ms=3, label="(0.5 + 0.5 corr) Var$_1$")
        ax.plot(frame["measured"], frame["eq5"], "o", color="#0072B2", ms=3, mfc="white", label="Eq. 5")
        scale = "log" if high > 20 * low else "linear"
        ax.set(xscale=scale, yscale=scale, xlabel="measured variance (squared units)", title=title)
        ax.set_ylabel("predicted variance\n(squared units)")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def channels(table: Sequence[dict] | pd.DataFrame, *, title: str = "") -> Figure:
    """Activation variance of every channel of one layer as overlaid lines (Jordan et al. 2022, Fig. 3 left)."""
    figure = curves(
        table,
        "channel",
        "variance",
        "network",
        xlabel="channel",
        ylabel="activation variance\n(squared units)",
        title=title,
    )
    figure.axes[0].set_ylim(bottom=0)
    return figure


def depth(table: Sequence[dict] | pd.DataFrame, *, threshold: float, title: str = "") -> Figure:
    """Test accuracy of midpoints against depth, the endpoints as a band (Jordan et al. 2022, Fig. 3 right)."""
    frame = pd.DataFrame(table)
    is_end = frame["network"].str.startswith("endpoint")
    # All midpoints are aligned, and four full names are too long for the legend.
    names = {name: name.removeprefix("aligned + ") for name in frame["network"].unique()}
    figure = curves(
        frame[~is_end],
        "depth",
        "accuracy",
        "network",
        xlabel="depth (hidden layers)",
        ylabel="test accuracy (%)",
        title=title,
        percent=True,
        labels=names,
    )
    (ax,) = figure.axes
    ends = frame[is_end].groupby("depth")["accuracy"].agg(["min", "max"]) * 100
    ax.fill_between(ends.index, ends["min"], ends["max"], color="black", alpha=0.35, lw=0.8, zorder=0)
    ax.annotate(
        "endpoints", (ends.index[-1], ends["max"].iloc[-1]), (0, 3), textcoords="offset points", ha="right", fontsize=7
    )
    ax.axhline(100 * threshold, color="black", lw=0.6, ls=":", zorder=0)
    ax.set_ylim(0, 106)
    return figure


def samples(table: Sequence[dict] | pd.DataFrame, *, before: float, title: str = "") -> Figure:
    """Accuracy barrier at the midpoint against the number of calibration examples, with the spread over draws."""
    figure = curves(
        table,
        "examples",
        "barrier",
        "network",
        xlabel="calibration examples",
        ylabel="accuracy barrier\n(points)",
        title=title,
        percent=True,
        log_x=10,
    )
    (ax,) = figure.axes
    ax.axhline(100 * before, **{k: v for k, v in LOOKS["aligned"].items() if k in ("color", "linestyle")}, lw=1)
    ax.annotate(
        "before REPAIR",
        (1, 100 * before),
        (-2, -9),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=7,
    )
    ax.set_ylim(bottom=0)
    return figure


def _series_look(name: str, series: Sequence[str], renorm: str, lines: tuple[str, str]) -> dict:
    """Colour and marker of one of several series; before REPAIR open markers, after it filled ones."""
    when = WHEN[renorm]
    color, marker = OTHERS[series.index(name) % len(OTHERS)]
    look = {"color": color, "marker": marker, "label": name} | SERIES.get(name, {})
    face = look["color"] if when == "after" else "white"
    label = f"{look['label']}, {when} REPAIR".removeprefix(", ")
    return look | {"linestyle": lines[when == "after"], "markerfacecolor": face, "label": label}


def _shifted(x: pd.Index | pd.Series, by: float, log: int) -> np.ndarray:
    """Positions moved to the right, on an axis that is logarithmic to this base, or linear (0)."""
    x = np.asarray(x, dtype=float)
    return x * log**by if log else x + by


def barriers(
    table: Sequence[dict] | pd.DataFrame,
    x: str,
    *,
    metric: str = "loss",
    show: Mapping[str, Sequence[str]] | None = None,
    lines: tuple[str, str] = ("-", "-."),
    published: Mapping[float, float] | None = None,
    published_label: str = "published",
    log_x: int = 2,
    xlabel: str = "width multiplier",
    title: str = "",
    ax: Axes | None = None,
) -> FigureBase:
    """Barrier against `x` before and after REPAIR: means over pairs, bars from least to greatest, a dot for each pair.

    Before REPAIR markers are open, after it filled (Jordan et al. 2022, Figs. 4, 6, 8, 10, 12).

    Args:
        table: long, see `experiments.rows`, of one split. Its column `series`, if there is one, tells lines apart:
            those that `SERIES` knows look as there, others are called what they are.
        x: column of the horizontal axis, such as "width". Each of its values gets a tick.
        metric: "loss" (nats) or "accuracy" (points).
        show: by series, which renormalisations are drawn; "none" and "REPAIR" if a series is not in it.
        lines: line styles before and after.
        published: other numbers to draw as crosses, by x, called `published_label` in the legend.
        log_x: base of the logarithmic x axis; 0 for a linear one.
        ax: where to draw; a new figure by default.
    """
    if metric not in ("loss", "accuracy"):
        raise ValueError(f"metric must be 'loss' or 'accuracy', not {metric!r}")
    frame = path_barriers(table)
    frame = frame if "series" in frame else frame.assign(series="")
    series = list(frame["series"].unique())
    drawn = [(renorm, name) for renorm in WHEN for name in series if renorm in (show or {}).get(name, WHEN)]
    places = np.log(frame[x]) / np.log(log_x) if log_x else frame[x]
    reach = places.max() - places.min()
    with style():
        ax = ax or plt.subplots()[1]
        for place, (renorm, name) in enumerate(drawn):
            rows = frame[(frame["series"] == name) & (frame["renorm"] == renorm)]
            values = rows[f"{metric}_barrier"] * (100 if metric == "accuracy" else 1)
            spread = values.groupby(rows[x]).agg(["mean", "min", "max"])
            repeated = len(rows) > len(spread)
            # Bars at one x stand side by side; and a mean of equal numbers may round away from them.
            shift = 0.015 * reach * (place - (len(drawn) - 1) / 2) if repeated else 0.0
            ends = [(spread["mean"] - spread["min"]).clip(0), (spread["max"] - spread["mean"]).clip(0)]
            look = _series_look(name, series, renorm, lines)
            at = _shifted(spread.index, shift, log_x)
            ax.errorbar(at, spread["mean"], ends if repeated else None, elinewidth=0.8, zorder=3, **look)
            if repeated:
                at = _shifted(rows[x], shift, log_x)
                ax.plot(at, values, ".", color=look["color"], ms=4, alpha=0.6, zorder=2)
        handles = [*ax.containers]
        if published:
            handles += ax.plot(*zip(*published.items(), strict=True), "kx", ms=5, label=published_label, zorder=4)
        if log_x:
            ax.set_xscale("log", base=log_x)
        ticks = np.array(sorted({*frame[x], *(published or {})}), dtype=float)
        steps = np.diff(np.log(ticks) if log_x else ticks, prepend=-np.inf)
        labels = np.where(steps < 0.07 * steps[1:].sum(), "", [f"{tick:g}" for tick in ticks])  # where there is room
        ax.set_xticks(ticks, labels)
        ax.minorticks_off()
        ax.axhline(0, color="black", lw=0.6, zorder=0)
        ylabel = "test loss barrier (nats)" if metric == "loss" else "test accuracy barrier\n(points)"
        if "split" in frame and frame["split"].nunique() == 1:
            ylabel = ylabel.replace("test", frame["split"].iloc[0])
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        ax.figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return ax.figure


def filters(panels: Mapping[str, np.ndarray], *, note: str = "", title: str = "") -> Figure:
    """Filters of a first layer as grids of small images, panel beside panel (Jordan et al. 2022, Fig. 9).

    Each filter is scaled to its own largest weight. Of three input channels its weights are colours, grey being 0; of
    any other number their mean is drawn from blue, through white, to red.

    Args:
        panels: title -> weights (units, channels, height, width), all of one shape, row by row in order of the units.
        note: a line below them.
    """
    units, channels, height, width = next(iter(panels.values())).shape
    columns = int(np.ceil(np.sqrt(units)))
    with style():
        figure, axes = plt.subplots(1, len(panels), figsize=(COLUMN_WIDTH, 1.9), squeeze=False)
        for ax, (name, weights) in zip(axes[0], panels.items(), strict=True):
            weights = weights if channels == 3 else weights.mean(1, keepdims=True)
            weights = weights / np.abs(weights).max(axis=(1, 2, 3), keepdims=True).clip(1e-12)
            # A border of one pixel around each; beyond the last unit there is nothing but border.
            cells = np.full((columns * -(-units // columns), weights.shape[1], height + 1, width + 1), np.nan)
            cells[:units, :, :-1, :-1] = weights
            grid = cells.reshape(-1, columns, *cells.shape[1:]).transpose(0, 3, 1, 4, 2)
            grid = grid.reshape(-1, columns * (width + 1), weights.shape[1])[:-1, :-1]
            colours = np.nan_to_num(0.5 + 0.5 * grid, nan=1.0) if channels == 3 else grid[..., 0]
            ax.imshow(colours, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            ax.set(title=name, xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.grid(False)
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
        figure.supxlabel(note, fontsize=STYLE["legend.fontsize"])
        figure.get_layout_engine().set(wspace=0.15)  # more than between filters
        return figure
