"""One style and one way to draw curves, for the figures of all papers.

Colours are Okabe and Ito's, safe for colour-blind readers.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.experiments.tables import name_networks

COLUMN_WIDTH = 3.4  # inches, one column of a two-column paper
STYLE = {
    "figure.figsize": (COLUMN_WIDTH, 2.5),
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.columnspacing": 1,
    "legend.handletextpad": 0.4,
    "legend.handlelength": 1.9,
    "legend.borderpad": 0.1,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.hashsalt": "repairlib",
}
# The same network has the same colour, line and marker in every figure; its name is what the legend says.
LOOKS = {
    "not aligned": {"color": "#999999", "linestyle": ":", "marker": "v"},
    "aligned": {"color": "#D55E00", "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "aligned + REPAIR closed form": {"color": "#56B4E9", "linestyle": "-.", "marker": "s"},
    # Large and empty, to be seen around the marker of plain REPAIR, which often lies on it.
    "aligned + REPAIR simultaneous": {
        "color": "#CC79A7", "linestyle": "-", "marker": "^", "markersize": 8, "markerfacecolor": "none",
    },
    "aligned + REPAIR": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "aligned + REPAIR conv": {"color": "#56B4E9", "linestyle": "-", "marker": "P"},
    "aligned + REPAIR bn reset": {"color": "#000000", "linestyle": "-", "marker": "X"},
    "aligned + RESCALE": {"color": "#E69F00", "linestyle": "-", "marker": "s"},
    "aligned + RESHIFT": {"color": "#CC79A7", "linestyle": "-", "marker": "^"},
    "aligned + RESET": {"color": "#009E73", "linestyle": "-", "marker": "D"},
    "not aligned + REPAIR": {"color": "#E69F00", "linestyle": ":", "marker": "s"},
    "endpoint A": {"color": "#000000", "linestyle": "-", "marker": ""},
    "endpoint B": {"color": "#777777", "linestyle": "-", "marker": ""},
}  # fmt: skip
OTHERS = ("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"), ("#D55E00", "P")


# The first figure of a process chooses the backend. Inside `style` that would be undone with the rest of the settings.
plt.switch_backend(plt.get_backend())


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style.

    Figures made inside are closed in the end: they can be shown and saved, and a notebook shows them where a cell says
    so, and not a second time when the cell ends.
    """
    earlier = set(plt.get_fignums())
    with plt.rc_context(STYLE):
        yield
    for number in set(plt.get_fignums()) - earlier:
        plt.close(number)


def curves(
    table: Sequence[dict] | pd.DataFrame,
    x: str,
    y: str,
    by: str,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    percent: bool = False,
    log_x: int = 0,
    log_y: bool = False,
    ylim: tuple[float, float] | None = None,
    legend: str = "below",
    ax: Axes | None = None,
    labels: dict[str, str] | None = None,
    looks: Mapping[str, dict] = LOOKS,
) -> Figure:
    """Mean of `y` against `x`, one line per value of `by`, with a band from least to greatest over repetitions (seeds).

    Args:
        table: tidy rows; a column `network` is made of `matching` and `renorm` where it is missing.
        x, y, by: columns; values of `by` found in `looks` are drawn so.
        percent: show `y` times 100.
        log_x: base of a logarithmic x axis; 0 for a linear one.
        legend: "below" the axes (never over data) or "none".
        labels: other names for the legend.
        looks: colour, line, marker and label by value of `by`; those of `LOOKS` are the same in every figure.
    """
    frame = name_networks(table)
    with style():
        ax = ax or plt.subplots()[1]
        for name, rows in frame.groupby(by, sort=False):
            spread = rows.groupby(x)[y].agg(["mean", "min", "max"]) * (100 if percent else 1)
            look = {"label": str(name), **looks.get(name, {"marker": "o"})}
            look["label"] = (labels or {}).get(name, look["label"])
            many = len(spread) > 24  # markers would merge into a thick line
            (line,) = ax.plot(spread.index, spread["mean"], **(look | {"marker": ""} if many else look))
            if (spread["max"] > spread["min"]).any():
                ax.fill_between(spread.index, spread["min"], spread["max"], color=line.get_color(), alpha=0.15, lw=0)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if log_x:
            ax.set_xscale("log", base=log_x)
        if log_y:
            ax.set_yscale("log")
        if ylim:
            ax.set_ylim(*ylim)
        if legend == "below":
            columns = 2 if frame[by].nunique() > 1 else 1
            ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
        return ax.figure
