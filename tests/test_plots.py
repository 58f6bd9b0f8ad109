import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from companion.figures.plots import repair as plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def rows(**columns) -> list[dict]:
    return pd.DataFrame(columns).to_dict("records")


def long(series: str, width: int, losses: dict[str, float], pair: str = "1-2") -> list[dict]:
    """Two paths of a pair, before and after REPAIR, with these loss barriers, and accuracy barriers of 0.5 and 0.1."""
    barriers = {"none": (losses["none"], 0.5), "REPAIR": (losses["REPAIR"], 0.1)}
    return [
        {"series": series, "width": width, "pair": pair, "matching": "AM", "renorm": renorm, "alpha": alpha,
         "split": "test", "loss": 0.25 + (alpha == 0.5) * loss, "accuracy": 0.75 - (alpha == 0.5) * accuracy}
        for renorm, (loss, accuracy) in barriers.items() for alpha in (0, 0.5, 1)
    ]  # fmt: skip


BEFORE = {"bn": {1: (2.0, 3.0), 2: (1.0, 1.0)}, "ln": {1: (0.5, 0.5), 2: (0.4, 0.2)}}
AFTER = {1: (0.4, 0.6), 2: (0.1, 0.1)}
BARRIERS = [
    row
    for series, widths in BEFORE.items()
    for width, before in widths.items()
    for i, pair in enumerate(("1-2", "1-3"))
    for row in long(series, width, {"none": before[i], "REPAIR": AFTER[width][i]}, pair)
]
FIGURES = {
    "variance_profile": lambda: plots.variance_profile(
        rows(network=["not aligned", "not aligned"], layer=[1, 2], ratio=[0.5, 0.1])
    ),
    "path": lambda: plots.path(
        rows(network=["aligned"] * 3, alpha=[0, 0.5, 1], accuracy=[0.9, 0.5, 0.9], loss=[1, 2, 1])
    ),
    "prediction": lambda: plots.prediction(rows(measured=[0.1, 1.0], rule_of_thumb=[0.2, 1.1], eq5=[0.1, 1.0])),
    "channels": lambda: plots.channels(rows(network=["aligned"] * 2, channel=[0, 1], variance=[0.3, 0.4])),
    "depth": lambda: plots.depth(
        rows(
            network=["endpoint A", "endpoint B", "aligned"] * 2, depth=[2] * 3 + [4] * 3, accuracy=[0.9, 0.8, 0.7] * 2
        ),
        threshold=0.9,
    ),
    "samples": lambda: plots.samples(
        rows(
            network=["aligned + REPAIR"] * 4, examples=[10, 10, 100, 100], draw=[0, 1] * 2, barrier=[0.2, 0.3, 0.1, 0.1]
        ),
        before=0.5,
    ),
    "variance_scatter": lambda: plots.variance_scatter(
        rows(
            series=["MLP", "MLP", "VGG"],
            network=["aligned", "aligned + REPAIR", "aligned"],
            layer=[1, 1, 2],
            ratio=[0.1, 1, 0.01],
        )
    ),
    "reductions": lambda: plots.reductions(
        rows(
            row=["ResNet20, digits"] * 3 + ["MLP"],
            norm=["bn", "bn", "ln", "none"],
            width=[1, 1, 2, 8],
            reduction=[90, 95, 80, -5],
        )
    ),
    "barriers": lambda: plots.barriers(BARRIERS, "width", title="two norms", published={1: 0.9, 2: 0.4}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_labelled_axes_and_a_legend_beside_the_data(name):
    figure = FIGURES[name]()
    (ax,) = figure.axes
    assert ax.get_xlabel() and ax.get_ylabel()
    (legend,) = figure.legends
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.height > 0 and not box.overlaps(ax.get_window_extent())
    assert figure.get_figwidth() == pytest.approx(plots.COLUMN_WIDTH)


def test_the_legend_of_depth_has_room_for_every_way_to_repair():
    ways = ["aligned", *(f"aligned + REPAIR{way}" for way in (" closed form", " simultaneous", ""))]
    names = [*ways, "endpoint A", "endpoint B"]
    figure = plots.depth(rows(network=names * 2, depth=[2] * 6 + [4] * 6, accuracy=[0.9] * 12), threshold=0.9)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["aligned", "REPAIR closed form", "REPAIR simultaneous", "REPAIR"]
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.x1


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


REPAIRS = ("aligned + REPAIR", "aligned + REPAIR closed form", "aligned + REPAIR simultaneous")
TOGETHER = [  # in one figure
    ("endpoint A", "endpoint B", "not aligned", "aligned", *REPAIRS),
    ("not aligned", "aligned", "aligned + RESET", "aligned + REPAIR", "aligned + REPAIR conv",
     "aligned + REPAIR bn reset"),
    ("aligned", "aligned + REPAIR", "aligned + RESCALE", "aligned + RESHIFT", "aligned + RESET"),
    ("not aligned", "not aligned + REPAIR", "aligned", "aligned + REPAIR"),
]  # fmt: skip


def test_same_network_same_look_everywhere():
    for names in TOGETHER:  # told apart by colour; line and marker tell apart again without it
        assert len({plots.LOOKS[name]["color"] for name in names}) == len(names)
    looks = [str(sorted(look.items())) for look in plots.LOOKS.values()]
    assert len(set(looks)) == len(looks) and {name for names in TOGETHER for name in names} == set(plots.LOOKS)
    lines = [(look["linestyle"], look["marker"]) for name, look in plots.LOOKS.items() if name in TOGETHER[0][2:]]
    assert len(set(lines)) == len(lines)
    for name in ("aligned", "aligned + REPAIR"):
        assert plots.BASELINES[name] == plots.LOOKS[name]
    for end in ("endpoint A", "endpoint B"):
        assert plots.BASELINES[end]["color"] == plots.LOOKS[end]["color"]


def test_a_network_is_called_what_its_columns_say():
    table = pd.DataFrame(long("", 1, {"none": 1.0, "REPAIR": 0.1})).drop(columns="series")
    table = pd.concat([table, table[table["renorm"] == "none"].assign(matching="none")])
    (ax,) = plots.path(table).axes
    assert [line.get_label() for line in ax.lines] == ["aligned", "aligned + REPAIR", "not aligned"]
    looks = [plots.LOOKS[line.get_label()] for line in ax.lines]
    assert [line.get_color() for line in ax.lines] == [look["color"] for look in looks]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([75, 25, 75])


def test_barriers_before_are_open_and_after_filled():
    (ax,) = plots.barriers(BARRIERS, "width", show={"ln": ("REPAIR",)}).axes
    lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
    assert list(lines) == ["BatchNorm, before REPAIR", "BatchNorm, after REPAIR", "LayerNorm, after REPAIR"]
    before, after, other = lines.values()
    assert before.get_ydata().tolist() == pytest.approx([2.5, 1.0])
    assert before.get_markerfacecolor() == "white" != after.get_markerfacecolor()
    assert before.get_color() == after.get_color() != other.get_color()
    (bar,) = ax.containers[0].lines[2]
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([2.0, 3.0])  # from the least to the greatest
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2"]


def test_barriers_in_points_of_accuracy():
    (ax,) = plots.barriers(BARRIERS, "width", metric="accuracy").axes
    assert ax.containers[0].lines[0].get_ydata().tolist() == pytest.approx([50, 50])
    with pytest.raises(ValueError, match="metric"):
        plots.barriers(BARRIERS, "width", metric="error")


def test_a_series_looks_the_same_in_barriers_and_paths_alone_or_not():
    (ax,) = plots.path(long("ln", 1, {"none": 1.0, "REPAIR": 0.1})).axes
    drawn = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in ax.lines}
    for some in (BARRIERS, [row for row in BARRIERS if row["series"] == "ln"]):
        (ax,) = plots.barriers(some, "width").axes
        lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
        assert drawn.items() <= {k: (line.get_color(), line.get_linestyle()) for k, line in lines.items()}.items()


def test_merging_draws_levels_across_both_panels():
    table = rows(network=["aligned + REPAIR"] * 4, alpha=[0, 1] * 2, loss=[1.0, 2.0, 3.0, 2.0], accuracy=[0.5, 0.6] * 2)
    levels = rows(network=["full data"] * 2, alpha=[None] * 2, loss=[0.5, 0.7], accuracy=[0.8, 1.0])
    figure = plots.merging([row | {"series": "a title"} for row in table + levels])
    loss, accuracy = figure.axes
    assert loss.get_title() == "a title"
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.0, 2.0], [pytest.approx(0.6)] * 2]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[50.0, 60.0], [pytest.approx(90)] * 2]
    (band,) = accuracy.patches  # of the level; those of curves are collections
    assert (band.get_y(), band.get_height()) == (pytest.approx(80), pytest.approx(20))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["aligned + REPAIR", "trained on all data"]
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)
    assert all(ax.get_ylabel() for ax in figure.axes) and accuracy.get_xlabel()
    assert figure.get_figwidth() == pytest.approx(plots.COLUMN_WIDTH)
    both = plots.merging([row | {"series": name} for row in table + levels for name in ("MLP", "ResNet")])
    assert [ax.get_title() for ax in both.axes] == ["MLP", "ResNet", "", ""] and len(both.legends) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_stand_row_by_row_each_on_its_own_scale(channels):
    weights = np.zeros((5, channels, 2, 2))
    weights[0, :, 0, 1], weights[1, :, 1, 0], weights[4, :, 1, 1] = 0.5, -8, 3  # unit 2 and 3 have no weight at all
    figure = plots.filters({"model A": weights, "model B": -weights}, note="each by itself", title="first layer")
    assert figure.get_figwidth() == pytest.approx(plots.COLUMN_WIDTH)
    assert [ax.get_title() for ax in figure.axes] == ["model A", "model B"]
    images = [np.asarray(ax.images[0].get_array()).reshape(5, 8, -1)[..., 0] for ax in figure.axes]
    if channels == 3:  # colours, grey being 0
        images = [2 * image - 1 for image in images]
    for image, sign in zip(images, (1, -1), strict=True):
        assert image.shape == (5, 8)  # two rows of three units and one border between them
        assert (image[0, 1], image[1, 3], image[4, 4]) == (sign, -sign, sign)  # each filter's largest weight
        assert not image[:2, 6:].any() and not image[3:, :2].any()
