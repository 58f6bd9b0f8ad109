"""Figures of Rethink Model Re-Basin (Qu and Horvath 2024), in the style of `plots`."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from companion.experiments.tables import name_networks
from companion.figures.plots import COLUMN_WIDTH, LOOKS, OTHERS, curves, style

# What the lines of this paper's figures are, beside the networks of `plots.LOOKS`.
_WAYS = [
    ("reference", OTHERS[0]), ("sequential", OTHERS[1]), ("iterative", OTHERS[2]), ("same basin", OTHERS[3]),
    ("endpoints", OTHERS[4]),
]  # fmt: skip
THEIRS = LOOKS | {name: {"color": color, "marker": marker} for name, (color, marker) in _WAYS}
THEIRS |= {
    f"aligned ({matching}){renorm}": {**LOOKS[f"aligned{renorm}"], "marker": marker, "linestyle": line}
    for renorm in ("", " + REPAIR", " + RESCALE", " + RESET")
    for matching, marker, line in (("WM", "o", "-"), ("AM", "s", "--"))
}
THEIRS["as interpolated"], THEIRS["RESET"] = LOOKS["aligned"], LOOKS["aligned + RESET"]
THEIRS["new network"] = {"color": "#CC79A7", "linestyle": "-.", "marker": "x"}
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
    looks: Mapping[str, dict] = THEIRS,
) -> Figure:
    """Curves in a row of panels for each measure: means over repetitions, with bands from the least to the greatest.

    Args:
        table: tidy rows; a column `network` is made of `matching` and `renorm` where it is missing.
        x: column of the horizontal axis.
        measures: from each column that is drawn to the label of its axis, a row of panels each.
        by: column that tells the lines of a panel apart.
        columns: column that tells the panels of a row apart; its values are their titles. "" has one panel.
        log_x: base of a logarithmic x axis; 0 for a linear one.
        log_y: measures that are drawn on a logarithmic axis.
    """
    frame = name_networks(table)
    names = list(frame[columns].unique()) if columns else [""]
    order = list(frame[by].unique())
    looks = {name: looks.get(name) or _other(place) for place, name in enumerate(order)}
    size = (COLUMN_WIDTH * (1 + 0.75 * (len(names) - 1)), 0.6 + 1.8 * len(measures))
    with style():
        figure, axes = plt.subplots(len(measures), len(names), sharex="col", sharey="row", squeeze=False, figsize=size)
        for (row, measure), (column, name) in itertools.product(enumerate(measures), enumerate(names)):
            rows = frame[frame[columns] == name] if columns else frame
            curves(
                rows[rows[measure].notna()], x, measure, by, xlabel=xlabel if row == len(measures) - 1 else "",
                ylabel="" if column else measures[measure], title="" if row else str(name) if columns else title,
                percent=measure in PERCENT, log_x=log_x, log_y=measure in log_y, legend="none", ax=axes[row, column],
                looks=looks,
            )  # fmt: skip
        if x == "alpha":
            for ax in axes[-1]:
                ax.set_xticks([0, 0.5, 1], ["0\nmodel A", "0.5", "1\nmodel B"])
        found = {
            label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if columns and title:
            figure.suptitle(title, fontsize=8)
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=1 + len(names))
        return figure


def _other(place: int) -> dict:
    """The look of a line that has none of its own."""
    color, marker = OTHERS[place % len(OTHERS)]
    return {"color": color, "marker": marker, "linestyle": ("-", "--", ":")[place // len(OTHERS) % 3]}


def pruning_as_interpolation(weights: np.ndarray, kept: float) -> Figure:
    """Magnitude pruning as an interpolation with a coefficient for each weight (Qu and Horvath 2024, Fig. 35).

    A pruned network M keeps large weights and zeroes small ones. So it lies between the network and itself: halfway, or
    anywhere, where a weight is kept, and all the way at 0 where it is not.

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
