import matplotlib.pyplot as plt
import pandas as pd
import pytest

from repairlib import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def rows(**columns) -> list[dict]:
    return pd.DataFrame(columns).to_dict("records")


FIGURES = {
    "variance_profile": lambda: plots.variance_profile(
        rows(network=["direct", "direct"], layer=[1, 2], ratio=[0.5, 0.1])
    ),
    "path": lambda: plots.path(
        rows(network=["aligned"] * 3, alpha=[0, 0.5, 1], accuracy=[0.9, 0.5, 0.9], loss=[1, 2, 1])
    ),
    "prediction": lambda: plots.prediction(rows(measured=[0.1, 1.0], rule_of_thumb=[0.2, 1.1], eq5=[0.1, 1.0])),
    "channels": lambda: plots.channels(rows(network=["aligned"] * 2, channel=[0, 1], variance=[0.3, 0.4])),
    "depth": lambda: plots.depth(
        rows(
            network=["endpoint a", "endpoint b", "aligned"] * 2, depth=[2] * 3 + [4] * 3, accuracy=[0.9, 0.8, 0.7] * 2
        ),
        threshold=0.9,
    ),
    "samples": lambda: plots.samples(
        rows(network=["sequential"] * 4, examples=[10, 10, 100, 100], draw=[0, 1] * 2, barrier=[0.2, 0.3, 0.1, 0.1]),
        before=0.5,
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_labelled_axes_and_a_legend_beside_the_data(name):
    figure = FIGURES[name]()
    (ax,) = figure.axes
    assert ax.get_xlabel() and ax.get_ylabel()
    (legend,) = figure.legends
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert box.height > 0 and not box.overlaps(ax.get_window_extent())
    assert figure.get_figwidth() == pytest.approx(plots.COLUMN_WIDTH)


def test_curves_draw_mean_and_spread_of_repetitions():
    figure = plots.curves(
        rows(k=["x"] * 4, t=[1, 1, 2, 2], v=[0.0, 1.0, 2.0, 4.0]), "t", "v", "k", xlabel="t", ylabel="v"
    )
    (ax,) = figure.axes
    assert ax.lines[0].get_ydata().tolist() == [0.5, 3.0]
    low_high = ax.collections[0].get_datalim(ax.transData)
    assert (low_high.y0, low_high.y1) == (0.0, 4.0)


def test_the_style_does_not_leak():
    before = plt.rcParams["font.size"]
    FIGURES["path"]()
    assert plt.rcParams["font.size"] == before


def test_same_network_same_look_everywhere():
    colours = [
        look["color"] for name, look in plots.LOOKS.items() if name not in ("sequential", "endpoint a", "endpoint b")
    ]
    assert len(set(colours)) == len(colours)  # told apart by colour; line and marker tell apart again without it
    assert plots.LOOKS["repaired"]["color"] == plots.LOOKS["sequential"]["color"]
