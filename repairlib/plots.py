"""One style, one function per kind of figure. Colours are Okabe and Ito's, safe for colour-blind readers."""

import contextlib
from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.hashsalt": "repairlib",
}
# The same thing has the same colour, line and marker in every figure.
LOOKS = {
    "direct": {"color": "#999999", "linestyle": ":", "marker": "v", "label": "direct interpolation"},
    "aligned": {
        "color": "#D55E00",
        "linestyle": "--",
        "marker": "o",
        "markerfacecolor": "white",
        "label": "aligned, before REPAIR",
    },
    "closed-form": {"color": "#56B4E9", "linestyle": "-.", "marker": "s", "label": "REPAIR, closed form"},
    "simultaneous": {  # large and empty, to be seen around the sequential variant's marker, which often lies on it
        "color": "#CC79A7",
        "linestyle": "-",
        "marker": "^",
        "markersize": 8,
        "markerfacecolor": "none",
        "label": "REPAIR, simultaneous",
    },  # fmt: skip
    "repaired": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "after REPAIR"},
    "sequential": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "REPAIR, sequential"},
    "reset": {"color": "#009E73", "linestyle": "-", "marker": "D", "label": "RESET"},
    "endpoint a": {"color": "#000000", "linestyle": "-", "marker": "", "label": "endpoint A"},
    "endpoint b": {"color": "#777777", "linestyle": "-", "marker": "", "label": "endpoint B"},
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style."""
    with plt.rc_context(STYLE):
        yield


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
) -> Figure:
    """Mean of `y` against `x`, one line per value of `by`, with a band from least to greatest over repetitions (seeds).

    Args:
        table: tidy rows.
        x, y, by: columns; values of `by` found in `LOOKS` are drawn the same everywhere.
        percent: show `y` times 100.
        log_x: base of a logarithmic x axis; 0 for a linear one.
        legend: "below" the axes (never over data) or "none".
        labels: other names for the legend.
    """
    frame = pd.DataFrame(table)
    with style():
        ax = ax or plt.subplots()[1]
        for name, rows in frame.groupby(by, sort=False):
            spread = rows.groupby(x)[y].agg(["mean", "min", "max"]) * (100 if percent else 1)
            look = {"label": str(name), **LOOKS.get(name, {"marker": "o"})}
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


def path(table: Sequence[dict] | pd.DataFrame, *, metric: str = "accuracy", title: str = "") -> Figure:
    """Test accuracy (%) or loss (nats) against alpha, the ends labelled with the networks they are."""
    percent = metric == "accuracy"
    ylabel = "test accuracy (%)" if percent else "test loss (nats)"
    figure = curves(table, "alpha", metric, "network", xlabel=r"$\alpha$", ylabel=ylabel, title=title, percent=percent)
    (ax,) = figure.axes
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nmodel A", "0.25", "0.5", "0.75", "1\nmodel B"])
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
    figure = curves(
        frame[~is_end],
        "depth",
        "accuracy",
        "network",
        xlabel="depth (hidden layers)",
        ylabel="test accuracy (%)",
        title=title,
        percent=True,
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
