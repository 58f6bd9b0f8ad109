"""Figures of Rethink Model Re-Basin (Qu and Horvath 2024), in the style of `plots`."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from companion.experiments.tables import name_networks
from companion.figures.plots import COLUMN_WIDTH, LOOKS, OTHERS, curves, style

_MATCHINGS = {"WM": {"marker": "o", "linestyle": "-"}, "AM": {"marker": "s", "linestyle": "--"}}
# What the lines of this paper's figures are, beside the networks of `plots.LOOKS`: colours tell networks and ways to
# match many of them apart, lines and markers whether it was by weights or by activations.
THEIRS = dict(LOOKS)
for _matching, _look in _MATCHINGS.items():
    for _renorm in ("", " + REPAIR", " + RESCALE", " + RESET"):
        THEIRS[f"aligned ({_matching}){_renorm}"] = LOOKS[f"aligned{_renorm}"] | _look
    for (_color, _), _regime in zip(OTHERS, ("reference", "sequential", "iterative"), strict=False):
        THEIRS[f"{_regime} ({_matching})"] = {"color": _color, **_look}
THEIRS["same basin"] = {"color": "#CC79A7", "linestyle": "-", "marker": "D"}
THEIRS["endpoints"] = {"color": "#000000", "linestyle": ":", "marker": ""}
THEIRS["as interpolated"], THEIRS["RESET"] = LOOKS["aligned"], LOOKS["aligned + RESET"]
THEIRS["new network"] = {"color": "#CC79A7", "linestyle": "-.", "marker": "x"}
THEIRS["usual rate, degraded"] = {"color": "#000000", "linestyle": "--", "marker": "x"}
PERCENT = ("accuracy", "accuracy_barrier", "zeros", "train_accuracy")


def lines(
    table: Sequence[dict] | pd.DataFrame,
    x: str,
    measures: Mapping[str, str],
    by: str = "network",
    columns: str = "",
    *,
    xlabel: str,
    title: str = "",
    log_x: int = 0,
    log_y: Sequence[str] = (),
) -> Figure:
    """Curves in a row of panels for each measure: means over repetitions, with bands from the least to the greatest.

    Args:
        table: tidy rows; a column `network` is made of `matching` and `renorm` where it is missing.
        x: column of the horizontal axis.
        measures: from each column that is drawn to the label of its axis, a row of panels each.
        by: column that tells the lines of a panel apart.
        columns: column that tells the panels of a row apart; its values are their titles. "" has one panel. Many are
            spread over several rows.
        log_x: base of a logarithmic x axis; 0 for a linear one.
        log_y: measures that are drawn on a logarithmic axis.
    """
    frame = name_networks(table)
    names = list(frame[columns].unique()) if columns else [""]
    looks = {name: THEIRS.get(name) or _other(place) for place, name in enumerate(frame[by].unique())}
    across = _across(len(names), len(measures))
    panels = list(itertools.product(measures, names))
    down = -(-len(panels) // across)
    size = (COLUMN_WIDTH * (1 + 0.75 * (across - 1)), 0.6 + 1.8 * down)
    with style():
        figure, axes = plt.subplots(down, across, sharex=True, sharey="row", squeeze=False, figsize=size)
        for place, ((measure, name), ax) in enumerate(zip(panels, axes.flat, strict=False)):
            rows = frame[frame[columns] == name] if columns else frame
            curves(
                rows[rows[measure].notna()], x, measure, by, xlabel=xlabel if place + across >= len(panels) else "",
                ylabel="" if place % across else measures[measure], percent=measure in PERCENT, log_x=log_x,
                title=(str(name) if columns else title) if place < len(names) else "", log_y=measure in log_y,
                legend="none", ax=ax, looks=looks,
            )  # fmt: skip
            if place + across >= len(panels):  # the panel below it, if any, is empty
                ax.tick_params(labelbottom=True)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        if x == "alpha":
            axes[0, 0].set_xticks([0, 0.5, 1], ["0\nmodel A", "0.5", "1\nmodel B"])
        elif not log_x and pd.api.types.is_integer_dtype(frame[x]):
            axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        found = {
            label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if columns and title:
            figure.suptitle(title, fontsize=8)
        letters = 6 + max(map(len, found))  # of the longest entry, with its line; an inch has about 18
        columns = max(1, min(1 + across, int(18 * size[0] / letters)))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)
        return figure


def _across(names: int, measures: int) -> int:
    """How many panels stand side by side: up to four, so that rows are full if they can be."""
    if names < 4 or (names == 4 and measures > 1):
        return names
    return next((n for n in (4, 3, 2) if names % n == 0 and n < names), 3)


def _other(place: int) -> dict:
    """The look of a line that has none of its own."""
    color, marker = OTHERS[place % len(OTHERS)]
    return {"color": color, "marker": marker, "linestyle": ("-", "--", ":")[place // len(OTHERS) % 3]}


def paths_and_distances(paths: pd.DataFrame, distances: pd.DataFrame) -> Figure:
    """Paths of networks matched in several ways, and the distance of two networks while they are trained (Figs. 60-62).

    Args:
        paths: tidy rows with columns series, matching, line, alpha and accuracy.
        distances: tidy rows with columns series, line, epoch and distance.
    """
    names, matchings = list(paths["series"].unique()), list(paths["matching"].unique())
    lines_ = list(dict.fromkeys([*paths["line"], *distances["line"]]))
    looks = {name: _other(place) for place, name in enumerate(lines_)}
    with style():
        size = (COLUMN_WIDTH * (1 + 0.75 * len(matchings)), 0.6 + 2 * len(names))
        figure, axes = plt.subplots(len(names), len(matchings) + 1, squeeze=False, figsize=size)
        for row, name in zip(axes, names, strict=True):
            of_name = paths[paths["series"] == name]
            for ax, matching in zip(row, matchings, strict=False):
                curves(of_name[of_name["matching"] == matching], "alpha", "accuracy", "line", xlabel=r"$\alpha$",
                       ylabel="test accuracy (%)", title=f"{name}, {matching}", percent=True, legend="none", ax=ax,
                       looks=looks)  # fmt: skip
            curves(distances[distances["series"] == name], "epoch", "distance", "line", xlabel="epoch",
                   ylabel="distance", title=f"{name}, in training", legend="none", ax=row[-1], looks=looks)  # fmt: skip
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure


def pruning_as_interpolation(weights: np.ndarray, kept: float) -> Figure:
    """Magnitude pruning as an interpolation with a coefficient for each weight (Qu and Horvath 2024, Fig. 35).

    A pruned network M is a mixture of the network and of M, weight by weight: halves of both where a weight is kept, M
    alone where it is pruned.

    Args:
        weights: a matrix of a trained network (rows, columns).
        kept: share of the weights that are kept, in (0, 1).
    """
    threshold = np.quantile(np.abs(weights), 1 - kept)
    mask = np.abs(weights) >= threshold
    panels = {
        r"$\theta$": weights,
        r"kept: $\frac{1}{2}\theta + \frac{1}{2}M(\theta)$": np.where(mask, weights, np.nan),
        r"pruned: $0\,\theta + 1\,M(\theta)$": np.where(mask, np.nan, 0 * weights),
        r"$M(\theta)$": weights * mask,
    }
    limit = np.abs(weights).max()
    with style():
        figure, axes = plt.subplots(1, 4, figsize=(2 * COLUMN_WIDTH, 2))
        for ax, (name, values), sign in zip(axes, panels.items(), ("", "→", "+", "="), strict=True):
            ax.set_facecolor("#DDDDDD")
            ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
            ax.set(title=name, xticks=[], yticks=[])
            ax.grid(False)
            ax.annotate(sign, (-0.09, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize=11)
        return figure
