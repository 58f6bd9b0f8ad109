"""What the figures of Rethink Model Re-Basin draw: the lines, in the panels, of the table's numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from companion.figures.plots import rethink as plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


TABLE = [
    {
        "panel": panel,
        "network": network,
        "pair": pair,
        "layer": layer,
        "std": layer * size + pair,
        "accuracy": 0.1 * layer,
    }
    for panel, size in {"before": 1, "after": 2}.items()
    for network in ("aligned (WM)", "new network")
    for pair in (-0.5, 0.5)
    for layer in (1, 2, 3)
]


def test_a_row_of_panels_for_each_measure_and_one_legend():
    labels = {"std": "scale", "accuracy": "test accuracy (%)"}
    figure = plots.lines(TABLE, "layer", labels, columns="panel", xlabel="layer", title="VGG")
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["before", "after"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == list(labels.values()) and axes[1, 0].get_xlabel() == "layer"
    for column, size in enumerate((1, 2)):
        for line in axes[0, column].lines:
            np.testing.assert_allclose(line.get_ydata(), [size, 2 * size, 3 * size])
        np.testing.assert_allclose(axes[1, column].lines[0].get_ydata(), [10, 20, 30])  # percent
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["aligned (WM)", "new network"]
    figure.draw_without_rendering()
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_lines_without_a_look_of_their_own_differ():
    table = [row | {"way": f"way {i}"} for i in range(8) for row in TABLE]
    figure = plots.lines(table, "layer", {"std": "scale"}, "way", xlabel="layer")
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 8


def test_a_measure_that_some_rows_lack_is_drawn_of_the_others():
    table = [*TABLE, *({**row, "information": 1.0, "std": float("nan")} for row in TABLE)]
    figure = plots.lines(table, "layer", {"information": "F"}, columns="panel", xlabel="layer", log_y=["information"])
    assert all(ax.get_yscale() == "log" for ax in figure.axes)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [1, 1, 1])


def test_paths_stand_beside_distances_with_one_legend():
    lines = ("normal, rate 0.1", "uniform, rate 0.1")
    paths = [
        {"series": s, "matching": m, "line": line, "alpha": alpha, "accuracy": 0.5}
        for s in ("VGG", "ResNet") for m in ("WM", "AM") for line in lines for alpha in (0, 0.5, 1)
    ]  # fmt: skip
    apart = [{"series": s, "line": line, "epoch": e, "distance": 1.0 + e} for s in ("VGG", "ResNet") for line in lines
             for e in (0, 1)]  # fmt: skip
    figure = plots.paths_and_distances(pd.DataFrame(paths), pd.DataFrame(apart))
    assert len(figure.axes) == 6 and [t.get_text() for t in figure.legends[0].get_texts()] == [*lines]
    assert figure.axes[2].get_xlabel() == "epoch" and len(figure.axes[2].lines) == 2


def test_pruning_is_the_sum_of_its_parts():
    weights = np.linspace(-1, 1, 48).reshape(6, 8)
    figure = plots.pruning_as_interpolation(weights, kept=0.25)
    whole, kept, pruned, result = (np.ma.filled(ax.images[0].get_array(), np.nan) for ax in figure.axes)
    assert np.isfinite(kept).sum() == 12 and np.isfinite(pruned).sum() == 36
    np.testing.assert_allclose(np.nan_to_num(kept) + np.nan_to_num(pruned), result)
    np.testing.assert_allclose(result[np.isfinite(kept)], whole[np.isfinite(kept)])
