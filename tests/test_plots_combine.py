import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from companion.experiments import mixtures
from companion.figures import plots
from companion.figures.plots import combine as plots_combine
from repairlib import combine


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def width_table(matchings):
    """Two pairs, whose barriers are 1 above and 1 below a mean of 10 / width, ten times that if not aligned."""
    columns = "scheme", "matching", "width", "pair"
    return [
        dict(zip(columns, values, strict=True)) | {"loss_barrier": size, "accuracy_barrier": size / 50}
        for values in itertools.product(plots_combine.SCHEME_LOOKS, matchings, (0.5, 1, 2), (-1, 1))
        for _, matching, width, pair in [values]
        for size in [(10 if matching == "WM" else 100) / width + pair]
    ]


def test_widths_draw_every_scheme_at_every_width_with_bars_from_least_to_greatest():
    figure = plots_combine.widths(width_table(["WM", "none"]), title="resnet8")
    names = [name for scheme in plots_combine.SCHEME_LOOKS for name in (scheme, f"{scheme}, not aligned")]
    assert [text.get_text() for text in figure.legends[0].texts] == names
    for ax, factor in zip(figure.axes, (1, 2), strict=True):
        assert len(ax.containers) == 2 * len(plots_combine.SCHEME_LOOKS)
        for i, container in enumerate(ax.containers):
            line, _, (bars,) = container.lines
            size = 10 if i % 2 == 0 else 100
            drawn = np.asarray(line.get_ydata(), float)
            np.testing.assert_allclose(drawn, [2 * factor * size, factor * size, factor * size / 2])
            spread = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
            np.testing.assert_allclose(spread, 2 * factor)
            assert line.get_linestyle() == ("-" if i % 2 == 0 else ":")
        assert "nats" in figure.axes[0].get_ylabel() and "points" in figure.axes[1].get_ylabel()
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["0.5", "1", "2"]
    at = np.log([container.lines[0].get_xdata()[0] for container in figure.axes[0].containers[::2]])
    assert (np.diff(at) > 0).all() and at.mean() == pytest.approx(np.log(0.5))  # side by side about their width


def test_widths_of_aligned_networks_alone_are_drawn_alone_and_their_legend_lies_below():
    figure = plots_combine.widths(width_table(["WM"]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [*plots_combine.SCHEME_LOOKS]
    figure.draw_without_rendering()
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def line_rows(scheme="extrapolation", splits=("test", "train")):
    """Two pairs, with losses of 1 and 3, ten times that if not aligned."""
    return [
        {"matching": matching, "split": split, "x": x, "pair": pair, "loss": loss * size, "accuracy": 0.5 / size}
        for matching, size in (("WM", 1), ("none", 10))
        for split in splits
        for x in mixtures.SCHEMES[scheme].grid(4)
        for pair, loss in (("1-2", 1), ("1-3", 3))
    ]


def test_networks_beyond_the_ends_on_both_splits_and_boxes_beside_them():
    figure = plots_combine.beyond({"line": line_rows(), "box": line_rows("centred", ["test"])}, title="resnet8")
    figure.draw_without_rendering()
    loss, other_loss, accuracy, other_accuracy = figure.axes
    lines = {line.get_label(): line for line in loss.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["aligned, test", "aligned, train", "not aligned, test", "not aligned, train"]
    assert lines["aligned, test"].get_ydata().tolist() == [2] * 4
    assert lines["not aligned, train"].get_ydata().tolist() == [20] * 4
    assert lines["aligned, train"].get_markerfacecolor() == "white" != lines["aligned, test"].get_markerfacecolor()
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([50] * 4)
    assert "model A" in accuracy.get_xticklabels()[1].get_text() and accuracy.get_xlabel() == "line"
    assert [line.get_label() for line in other_loss.lines] == ["aligned, test", "not aligned, test"]
    assert other_accuracy.get_xlabel() == "box" and "model A" not in str(other_accuracy.get_xticklabels())
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_the_triangle_has_a_cell_for_each_combination_and_marks_the_best():
    def rows(triple, best):  # two combinations are the most accurate, one of them with the lower loss
        return [
            {"matching": matching, "triple": triple, "w_a": a, "w_b": b, "w_c": c}
            | {"loss": 1 - ((a, b, c) == best), "accuracy": (0.9 if matching == "WM" else 0.2) + 0.05 * c}
            for matching in ("WM", "none")
            for a, b, c in combine.simplex_grid(3, 4)
        ]

    table = [row | {"accuracy": 0.99} if row["w_b"] == 0.5 and row["matching"] == "WM" else row
             for row in rows("1-2-3", (0.25, 0.5, 0.25)) + rows("2-3-1", (0.5, 0.5, 0))]  # fmt: skip
    figure = plots_combine.triangle(table, title="resnet8")
    first, second, not_aligned, _, bar, below = figure.axes
    assert not_aligned.get_title() == "not aligned, the best 25.0 %"
    assert not_aligned.collections[0].get_clim() == (20, 25)
    assert [text.get_text().split("\n")[0] for text in not_aligned.texts] == ["A", "B", "C"]
    assert below.get_ylabel() == bar.get_ylabel()
    assert bar.get_ylabel() == "test accuracy (%)" and "2, 3, 1" in second.get_title()
    for ax, x in ((first, 0.625), (second, 0.5)):
        (cells,), (star,) = ax.collections, ax.lines
        assert len(cells.get_paths()) == 15
        assert cells.get_clim() == pytest.approx((90, 99))
        np.testing.assert_allclose(star.get_xydata(), [[x, 0.75**0.5 * (0.25 if ax is first else 0)]])
        assert "the best 99.0 %" in ax.get_title()
        assert [text.get_text().split("\n")[1] for text in ax.texts] == ["90.0 %", "90.0 %", "95.0 %"]
    sides = {len(np.unique(path.vertices.round(6), axis=0)) for path in first.collections[0].get_paths()}
    assert sides == {6}
    middle = first.collections[0].get_paths()[0].vertices[:6].mean(0)  # of weights (1, 0, 0): corner A
    np.testing.assert_allclose(middle, [0, 0], atol=1e-9)


def test_the_plane_shows_the_points_and_both_models():
    figure = plots_combine.plane({"small": [(0.1, -0.1)], "large": [(0.5, 0.2), (-0.4, 0.3)]})
    assert [ax.get_title() for ax in figure.axes] == ["small", "large"]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[0.5, 0.2], [-0.4, 0.3]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["A", "B"]


def test_paths_through_a_third_model_have_looks_of_their_own():
    table = [
        {"matching": matching, "alpha": alpha, "loss": 1.0, "accuracy": 0.5, "end_loss": 1.0, "end_accuracy": 0.5}
        for matching in ("through A", "directly", "none")
        for alpha in (0, 1)
    ]
    figure = plots_combine.performance(table, "alpha", xlabel="alpha")
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert list(drawn) == ["through A", "directly", "not aligned", "mean of the endpoints"]
    assert len(set(drawn.values())) == 4


COUNTS = [f"{whose}_{word}" for whose in plots_combine.AGREEMENT for word in ("correct", "wrong")]


def label_rows(scheme, matching, model, x, *counts, pair="1-2"):
    return {"scheme": scheme, "matching": matching, "model": model, "x": x, "pair": pair} | dict(
        zip(COUNTS, counts, strict=True)
    )


def test_counts_of_labels_become_percent_of_the_images():
    row = label_rows("linear", "WM", "tiny10", 0.5, 4, 2, 6, 0, 1, 3, 0, 4)
    (share,) = plots_combine.agreement_shares([row]).to_dict("records")
    assert [share[name] for name in COUNTS] == [20, 10, 30, 0, 5, 15, 0, 20]
    assert [share[name] for name in ("both", "a", "b", "neither", "wrong")] == [30, 30, 20, 20, 45]
    assert share["pair"] == "1-2"


def test_labels_are_stacked_to_all_images_a_panel_for_each_matching_and_scheme():
    table = [
        label_rows("linear", matching, "tiny10", x, 8, 0, int(10 * (1 - x)), 0, int(10 * x), 0, 0, 2, pair=pair)
        for matching in ("WM", "none")
        for pair in ("1-2", "1-3")
        for x in (0, 0.5, 1)
    ]
    table += [label_rows("uniform", "WM", "tiny10", s, 10, 4, 0, 2, 0, 2, 2, 0) for s in (0, 0.5)]
    figure = plots_combine.agreement(table, title="tiny10 on digits")
    figure.draw_without_rendering()
    linear, not_aligned, uniform, empty = figure.axes
    assert [ax.get_title() for ax in figure.axes[:3]] == ["linear", "linear, not aligned", "uniform"]
    assert not empty.axison and uniform.get_xlim() == (0, 0.5)
    areas = {area.get_label(): area.get_paths()[0].vertices for area in linear.collections}
    top = areas["neither, wrong"]
    np.testing.assert_allclose([top[:, 1].min(), top[:, 1].max()], [90, 100])  # two of twenty images, upon all others
    only_a = areas["A only, correct"]
    reached = [np.ptp(only_a[only_a[:, 0] == x][:, 1]) for x in (0, 0.5, 1)]
    np.testing.assert_allclose(reached, [50, 25, 0])
    assert [tick.get_text() for tick in linear.get_xticklabels()] == ["0 (A)", "0.5", "1 (B)"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [*areas, "neither begins, best and worst"] and len(areas) == 8
    assert linear.get_ylim() == uniform.get_ylim() == (40, 100) and not_aligned.get_ylim() == (0, 100)
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)
    assert figure.get_figwidth() == pytest.approx(plots.COLUMN_WIDTH)
    several = plots_combine.agreement(table + [row | {"model": "resnet8"} for row in table[:3]])
    assert several.axes[-1].get_title() == "resnet8\nlinear" and several.axes[0].get_title() == "tiny10\nlinear"


def test_edges_of_every_layer_with_a_band_over_pairs():
    bins = [(0, 1, 0.25), (1, 2, 0.75)]
    table = [
        {"pair": pair, "matching": matching, "layer": layer, "bin_low": low, "bin_high": high, "share": share + less}
        for pair, by in (("1-2", 0.125), ("1-3", -0.125))
        for matching in ("WM", "none")
        for layer in ("conv1", "conv2", "head", "more")
        for low, high, share in bins
        for less in [by if matching == "none" else 0]
    ]
    figure = plots_combine.edges(table, title="tiny10")
    figure.draw_without_rendering()
    assert [ax.get_title() for ax in figure.axes[:4]] == ["conv1", "conv2", "head", "more"]
    assert [ax.axison for ax in figure.axes] == [True] * 4 + [False] * 2
    aligned, _, not_aligned, band = figure.axes[0].patches
    assert (aligned.get_label(), not_aligned.get_label()) == ("aligned", "not aligned")
    for stairs in (aligned, not_aligned):
        values, bounds, _ = stairs.get_data()
        assert list(values) == [25, 75] and list(bounds) == [0, 1, 2]
    assert list(band.get_data().values) == [37.5, 87.5] and list(band.get_data().baseline) == [12.5, 62.5]
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_robustness_draws_barriers_against_the_share_of_deranged_pairs():
    table = [
        {"pair": pair, "layer": layer, "k": k, "units": units, "draw": draw}
        | {"loss_barrier": k + add, "accuracy_barrier": k / 10, "not_aligned_loss_barrier": 30 + 2 * add}
        | {"not_aligned_accuracy_barrier": 0.5}
        for pair, add in (("1-2", 0.5), ("1-3", -0.5))
        for layer, units in (("conv1", 4), ("conv2", 8))
        for k in (0, 2, units)
        for draw in (0, 1)
    ]
    figure = plots_combine.robustness(table, title="tiny10")
    figure.draw_without_rendering()
    axes = np.reshape(figure.axes, (2, 2))
    for line, (layer, units) in zip(axes, (("conv1", 4), ("conv2", 8)), strict=True):
        assert line[0].get_ylabel() == f"{layer}\n{units} units"
        for ax, factor, level in zip(line, (1, 10), (30, 50), strict=True):
            barrier, not_aligned = ax.lines
            np.testing.assert_allclose(barrier.get_xydata(), [(0, 0), (200 / units, 2 * factor), (100, units * factor)])
            assert list(not_aligned.get_ydata()) == [level, level]
            (band,) = ax.collections
            height = band.get_paths()[0].vertices[:, 1]
            assert height.max() - height.min() == units * factor + (1 if factor == 1 else 0)
    assert [ax.get_title() for ax in axes[0]] == ["loss barrier\n(nats)", "accuracy barrier\n(points)"]
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_a_schematic_has_a_rectangle_for_each_layer_and_hue_and_brightness_for_each_weight():
    def cell(network, layer, row, coefficient, weight):
        return {"network": network, "layer": layer, "row": row, "column": 0} | {
            "coefficient": coefficient, "weight": weight,
        }  # fmt: skip

    names = [f"matching {i}" for i in range(3)]
    table = [cell(name, layer, row, c, row) for name in names for layer, c in enumerate((0, 0.5, 1)) for row in (0, 1)]
    figure = plots_combine.schematic(table, columns=2)
    *panels, key = figure.axes
    assert [ax.get_title() for ax in panels] == ["matching\n0", "matching\n1", "matching\n2", ""]
    assert [len(ax.images) for ax in panels] == [3, 3, 3, 0]
    blue, orange = (np.array(plots_combine.to_rgb(color)) for color in plots_combine.ENDS.values())
    for image, hue in zip(panels[0].images, (blue, (blue + orange) / 2, orange), strict=True):
        dark, bright = image.get_array()[:, 0]
        np.testing.assert_allclose(bright, hue)
        np.testing.assert_allclose(dark, 0.3 * hue)
    tops = [image.get_extent()[3] for image in panels[0].images]
    assert tops == [0, 3, 6]  # two rows and a gap
    assert key.get_xlabel() == "coefficient" and key.get_ylabel() == "weight"


def test_histograms_of_coefficients_are_in_percent():
    drawn = {name: {0.1: np.array([0.01, 0.02, 0.03, 0.99]), 0.5: np.array([0.5])} for name in "abcd"}
    figure = plots_combine.coefficients(drawn, bins=4)
    for ax, name in zip(figure.axes, "abcd", strict=True):
        assert ax.get_title() == name
        assert [step.get_data().values.tolist() for step in ax.patches] == [[75, 0, 0, 25], [0, 0, 100, 0]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["parameter 0.1", "parameter 0.5"]


def test_performances_have_a_row_of_loss_and_accuracy_for_each_scheme():
    schemes, ends = {"uniform": "half edge", "bernoulli": "probability"}, {"end_loss": 0.5, "end_accuracy": 0.9}
    table = [
        {"scheme": scheme, "matching": matching, "x": x, "loss": loss * at, "accuracy": 0.4} | ends
        for at, scheme in enumerate(schemes, 1)
        for matching, loss in (("WM", 1), ("none", 10))
        for x in mixtures.SCHEMES[scheme].grid(3)
    ]
    figure = plots_combine.performances(table, schemes, title="tiny10")
    figure.draw_without_rendering()
    panels = zip(figure.axes[::2], figure.axes[1::2], strict=True)
    for at, (scheme, (loss, accuracy)) in enumerate(zip(schemes, panels, strict=True), 1):
        assert loss.get_xlabel() == accuracy.get_xlabel() == schemes[scheme]
        assert [line.get_ydata()[0] for line in loss.lines] == [at, 10 * at, 0.5]
        assert [line.get_ydata()[0] for line in accuracy.lines] == pytest.approx([40, 40, 90])
        assert loss.get_ylim()[0] < 0.5 < 10 * at < loss.get_ylim()[1] and accuracy.get_ylim()[1] > 90
        assert loss.get_xticks().tolist() == mixtures.SCHEMES[scheme].grid(3)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["aligned", "not aligned", "mean of the endpoints"]
    assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_descents_have_a_line_for_each_pair_and_a_label_for_each_model():
    table = [
        {"model": model, "pair": pair, "sweep": sweep, "similarity": sweep / 10, "as_trained": 0.05}
        for model, pair, sweeps in (("resnet8", "1-2", 4), ("resnet8", "1-3", 6), ("tiny10", "1-2", 3))
        for sweep in range(sweeps)
    ]
    (ax,) = plots_combine.descents(table).axes
    assert [len(line.get_xdata()) for line in ax.lines] == [4, 2, 6, 2, 3, 2]
    assert list(ax.lines[1].get_ydata()) == [0.05] * 2 and max(ax.lines[1].get_xdata()) < 0
    assert [text.get_text() for text in ax.figure.legends[0].texts] == ["resnet8", "tiny10"]
    assert ax.lines[0].get_color() == ax.lines[2].get_color() != ax.lines[4].get_color()


def test_places_on_the_axis_can_be_named():
    table = [
        {"matching": "none", "x": x, "loss": 1.0, "accuracy": 0.5, "end_loss": 1.0, "end_accuracy": 0.5}
        for x in (0, 0.5, 1)
    ]
    figure = plots_combine.performance(table, xlabel="x", marks={0: "model A", 1: "model B"})
    ticks = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert {"0\nmodel A", "1\nmodel B"} < set(ticks) and "0.4" in ticks and "0" not in ticks


def test_matchings_show_what_has_changed():
    figure = plots_combine.matchings({"found": [2, 0, 1, 3], "deranged": [2, 1, 0, 3]})
    assert [ax.get_title() for ax in figure.axes] == ["found", "deranged"]
    same, changed = figure.axes[1].lines
    assert same.get_xydata().tolist() == [[0, 2], [3, 3]] and changed.get_xydata().tolist() == [[1, 1], [2, 0]]
    assert len(figure.axes[0].lines[1].get_xydata()) == 0
