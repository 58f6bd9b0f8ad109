import pytest
import torch

from companion.experiments import mixtures
from companion.experiments.mixtures import (
    SCHEMES,
    combination_rows,
    evaluate_rows,
    extreme_rows,
    scheme_barriers,
    stitching_rows,
)
from companion.experiments.pairs import load_pair
from companion.experiments.tables import best_combinations, mean_barriers, name_barriers, sample_barriers
from companion.runs.data import iterate
from repairlib import combine, evaluation
from repairlib.interpolate import interpolate_states, with_state

RUNS = ["digits/mlp2-ln-w16/smoke/s1", "digits/mlp2-ln-w16/smoke/s2"]


@pytest.fixture
def pair():
    return load_pair(RUNS, calibration=200, matching="WM")


@pytest.mark.parametrize("name", SCHEMES)
def test_grids_reach_their_ends_and_every_point_is_allowed(name):
    scheme = SCHEMES[name]
    grid = scheme.grid(25)
    assert (grid[0], grid[-1], len(grid)) == (scheme.low, scheme.high, 25)
    assert grid[12] == (scheme.low + scheme.high) / 2
    u = torch.rand(1000)
    drawn = [scheme.make(x)(u) for x in grid]
    low, high = (-1, 2) if name == "extrapolation" else (-0.5, 0.5) if name == "centred" else (0, 1)
    assert all(c.shape == u.shape and c.min() >= low and c.max() <= high for c in drawn)
    assert [scheme.random(x) for x in grid] == [c.unique().numel() > 1 for c in drawn]


def test_rows_are_evaluations_of_the_networks_they_name(pair):
    rows = combination_rows(pair, {"subcube": [0, 0.3, 1]}, samples=2, seed=4)
    assert [(r["matching"], r["x"], r["sample"]) for r in rows] == [
        (matching, x, i) for matching in ("WM", "none") for x, i in ((0, 0), (0.3, 0), (0.3, 1), (1, 0))
    ]
    ends = [pair.evaluate(model) for model in (pair.a, pair.b)]
    assert rows[0]["end_loss"] == pytest.approx(sum(loss for loss, _ in ends) / 2)
    assert rows[0]["end_accuracy"] == pytest.approx(sum(accuracy for _, accuracy in ends) / 2)
    # At the ends of the range lie A and B, where nothing is drawn; between, each sample is another network.
    assert [rows[0]["loss"], rows[4]["loss"]] == [pytest.approx(ends[0][0])] * 2
    assert [rows[3]["loss"], rows[7]["loss"]] == [pytest.approx(ends[1][0])] * 2
    assert rows[1]["loss"] != rows[2]["loss"]
    states = pair.a.state_dict(), pair.aligned.state_dict()
    again = combine.elementwise(*states, combine.subcube(0.3), 4 * 1_000_003 + 1)
    assert rows[2]["loss"] == pytest.approx(pair.evaluate(with_state(pair.a, again))[0])
    assert combination_rows(pair, {"subcube": [0.3]}, samples=1, seed=4)[0]["loss"] == pytest.approx(rows[1]["loss"])


def test_a_pair_that_is_evaluated_on_some_test_images_is_so_here(pair):
    few = load_pair(pair.runs, 200, test_images=50)
    make = pair.a.state_dict
    (whole,), (part,) = (evaluate_rows(each, [({}, make)]) for each in (pair, few))
    assert (part["loss"], part["accuracy"]) == pytest.approx(few.evaluate(pair.a), abs=1e-6)
    assert part["end_loss"] != whole["end_loss"] and part["loss"] != whole["loss"]


def test_every_scheme_has_its_own_grid_and_samples_where_it_is_random(pair):
    rows = combination_rows(pair, {"bernoulli": [0.5], "linear": [0.25, 0.5]}, 2)
    assert [(r["scheme"], r["matching"], r["x"], r["sample"]) for r in rows] == [
        *(("bernoulli", matching, 0.5, i) for matching in ("WM", "none") for i in range(2)),
        *(("linear", matching, x, 0) for matching in ("WM", "none") for x in (0.25, 0.5)),
    ]


def test_a_scheme_that_is_not_random_gives_one_network(pair):
    rows = combination_rows(pair, {"extrapolation": [1.5]}, samples=9, matchings=["none"], splits=("test", "train"))
    assert [row["split"] for row in rows] == ["test", "train"]
    model = with_state(pair.a, interpolate_states(pair.a.state_dict(), pair.b.state_dict(), 1.5))
    for row in rows:
        expected = evaluation.evaluate(model, iterate(pair.dataset, row["split"], 500))
        assert (row["loss"], row["accuracy"]) == pytest.approx(expected)
    (row,) = combination_rows(pair, {"extrapolation": [1.5]}, matchings=["none"], splits=["train"], train_images=50)
    expected = evaluation.evaluate(model, iterate(pair.dataset, "train", 500, limit=50))
    assert (row["loss"], row["accuracy"]) == pytest.approx(expected)


def test_one_network_is_made_at_a_time_and_none_kept_while_it_is_evaluated(pair, monkeypatch):
    alive, most, during = set(), [], []

    class State(dict):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: during.append(len(alive)) or evaluate(*args))
    evaluate_rows(pair, [({"i": i}, lambda: State(pair.a.state_dict())) for i in range(6)])
    assert most == [1] * 6 and during == [0] * 8  # and the two ends


def test_a_network_that_cannot_be_made_is_no_end_of_the_list(pair):
    def fail():
        raise IndexError("no such layer")

    with pytest.raises(IndexError, match="no such layer"):
        evaluate_rows(pair, [({}, pair.a.state_dict), ({}, fail), ({}, pair.a.state_dict)])


def test_stitching_begins_with_b_and_ends_with_a(pair):
    rows = stitching_rows(pair, matchings=["WM"])
    names = list(combine.layers(pair.a, next(iter(pair.calibration))[0]))
    assert [row["name"] for row in rows] == ["", *names] and [row["layer"] for row in rows] == list(range(len(rows)))
    assert rows[0]["loss"] == pytest.approx(pair.evaluate(pair.b)[0])
    assert rows[-1]["loss"] == pytest.approx(pair.evaluate(pair.a)[0])


def test_the_path_of_extremes_begins_with_the_max_model_and_has_the_midpoint_in_its_middle(pair):
    rows = extreme_rows(pair, 3)
    assert [(row["matching"], row["alpha"]) for row in rows] == [(m, x) for m in ("WM", "none") for x in (0, 0.5, 1)]
    states = pair.a.state_dict(), pair.aligned.state_dict()
    made = combine.extreme(states, "max"), interpolate_states(*states, 0.5), combine.extreme(states, "min")
    expected = [pair.evaluate(with_state(pair.a, state))[0] for state in made]
    assert [row["loss"] for row in rows[:3]] == pytest.approx(expected, abs=1e-5)


def test_every_scheme_has_a_barrier_the_straight_line_without_alignment_too(pair):
    found = {(row["scheme"], row["matching"]): row for row in scheme_barriers(pair, points=3, samples=2)}
    schemes = ["linear", *mixtures.RANDOM]
    assert list(found) == [*((scheme, "WM") for scheme in schemes), ("linear", "none"), ("stitching", "WM")]
    assert [found[scheme, "WM"]["networks"] for scheme in schemes] == [3, 5, 4, 4, 4]
    rows = [row for row in stitching_rows(pair) if row["matching"] == "WM"]
    worst = max(row["loss"] for row in rows) - rows[0]["end_loss"]
    assert found["stitching", "WM"]["loss_barrier"] == pytest.approx(worst)


def test_barriers_of_samples_are_of_the_worst():
    rows = [
        {"scheme": "uniform", "matching": matching, "loss": loss, "accuracy": accuracy}
        | {"end_loss": 0.1, "end_accuracy": 0.9}
        for matching, loss, accuracy in (("WM", 0.3, 0.8), ("WM", 0.2, 0.7), ("none", 2.0, 0.1))
    ]
    aligned, not_aligned = sample_barriers(rows)
    assert (aligned["scheme"], aligned["matching"], aligned["networks"]) == ("uniform", "WM", 2)
    assert aligned["loss_barrier"] == pytest.approx(0.2) and aligned["accuracy_barrier"] == pytest.approx(0.2)
    assert not_aligned["loss_barrier"] == pytest.approx(1.9) and not_aligned["accuracy_barrier"] == pytest.approx(0.8)


def test_unknown_names_have_a_nearest(pair):
    with pytest.raises(ValueError, match="the nearest is 'subcube'"):
        combination_rows(pair, {"subcubes": [0.5]})
    with pytest.raises(ValueError, match="the nearest is 'WM'"):
        mixtures.states_of(pair, "WMM")
    with pytest.raises(ValueError, match="the nearest is 'WM'"):
        load_pair(RUNS, matching="weights")


def test_mean_barriers_are_means_of_each_pairs_worst():
    rows = [
        {"matching": "WM", "pair": pair, "loss": loss, "accuracy": 0.9 - loss, "end_loss": 0.1, "end_accuracy": 0.9}
        for pair, losses in {"1-2": (0.2, 0.5), "1-3": (0.3, 0.1)}.items()
        for loss in losses
    ]
    mean = mean_barriers(rows).loc["WM"]
    assert mean["loss_barrier"] == pytest.approx(0.3) and mean["accuracy_barrier"] == pytest.approx(0.4)
    named = name_barriers([*rows, *({**row, "matching": "none", "loss": 1.1} for row in rows)])
    assert named == pytest.approx(
        {"loss_barrier": 0.3, "accuracy_barrier": 40, "loss_barrier_not_aligned": 1, "accuracy_barrier_not_aligned": 40}
    )


def test_the_best_combination_is_the_most_accurate_and_the_lowest_loss_breaks_ties():
    rows = [{"triple": t, "accuracy": a, "loss": x} for t in "ab" for a, x in ((0.9, 0.1), (0.95, 0.3), (0.95, 0.2))]
    best = best_combinations(rows[:3] + rows[3:5], "triple")
    assert best["loss"].to_dict() == {"a": 0.2, "b": 0.3}


def test_rows_of_weights_tell_whose_they_are():
    a, b = {"layer": torch.tensor([[0.0, 1.0]])}, {"layer": torch.tensor([[1.0, 0.5]])}
    rows = mixtures.weight_rows({"A": a, "middle": interpolate_states(a, b, 0.5)}, a, b)
    assert [(r["network"], r["column"], r["weight"], r["coefficient"]) for r in rows] == [
        ("A", 0, 0, 0), ("A", 1, 1, 0), ("middle", 0, 0.5, 0.5), ("middle", 1, 0.75, 0.5),
    ]  # fmt: skip


def test_sampled_coefficients_are_those_of_the_schemes():
    drawn = mixtures.coefficient_samples(["bernoulli", "subcube"], (0.25,), number=10_000)
    assert set(drawn["bernoulli"][0.25]) == {0, 1} and drawn["bernoulli"][0.25].mean() == pytest.approx(0.25, abs=0.02)
    assert drawn["subcube"][0.25].max() <= 0.5 and drawn["subcube"][0.25].mean() == pytest.approx(0.25, abs=0.01)
