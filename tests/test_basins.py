"""Shuffles, distances and averages of networks that are small enough to know what must come out."""

import pytest
import torch

from companion.experiments.basins import average_rows, distance_rows, shuffle_rows
from companion.experiments.pairs import load_pair
from companion.runs import store
from repairlib import interpolate_models, match_several, match_weights
from repairlib.evaluation import evaluate

MLP = "digits/mlp1-plain-w16/smoke"  # of one hidden layer, whose matching is an assignment: no local optimum
RESNET = "digits/resnet8-bn-w0.25/smoke"


def test_a_shuffled_network_is_found_again_against_itself():
    pair = load_pair([f"{MLP}/s1", f"{MLP}/s1"], calibration=300)
    rows = shuffle_rows(pair, [0, 0.5, 1])
    found = {(row["matching"], row["alpha"]): row for row in rows}
    assert len(found) == len(rows) == 9
    own = pair.evaluate(pair.a)
    for matching in ("WM", "AM"):
        assert found[matching, 0]["recovered"] == 1
        assert (found[matching, 0.5]["loss"], found[matching, 0.5]["accuracy"]) == pytest.approx(own, abs=1e-6)
    assert found["none", 0]["recovered"] == 0 and found["none", 0.5]["loss"] > own[0]
    assert found["none", 0]["loss"] == pytest.approx(own[0], abs=1e-6)  # the shuffled network computes the same


def test_of_independent_networks_units_are_not_found():
    pair = load_pair([f"{MLP}/s1", f"{MLP}/s2"], calibration=300)
    rows = shuffle_rows(pair, [0.5])
    assert all(row["recovered"] < 0.8 for row in rows)


def test_distances_as_trained_and_matched():
    pair = load_pair([f"{RESNET}/s1", f"{RESNET}/s2"], calibration=200)
    found = {(row["matching"], row["buffers"]): row["distance"] for row in distance_rows(pair)}
    assert len(found) == 6 and found["WM", False] < found["none", False] and found["none", False] < found["none", True]
    models = pair.a, pair.aligned_by("AM")
    a, b = (torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in models)
    assert found["AM", False] == pytest.approx(float((a - b).norm().detach()), rel=1e-6)
    plain = load_pair([f"{MLP}/s1", f"{MLP}/s2"], calibration=200)
    assert [row["buffers"] for row in distance_rows(plain)] == [False] * 3


def test_averages_are_those_of_the_library():
    runs = [f"{MLP}/s{seed}" for seed in (1, 2, 3)]
    rows = average_rows(runs, [2, 3], rounds=2, calibration=300)
    assert len(rows) == 2 * 3 * 2
    pair = load_pair(runs[:2], calibration=300)
    models = [store.get(run) for run in runs]
    mean = match_several(models, lambda a, b: match_weights(a, b, pair.calibration), "sequential").mean()
    (found,) = (r for r in rows if (r["regime"], r["matching"], r["n"]) == ("sequential", "WM", 3))
    assert (found["loss"], found["accuracy"]) == pytest.approx(evaluate(mean, pair.test), abs=1e-6)
    assert found["ends"] == pytest.approx(sum(pair.evaluate(model)[1] for model in models) / 3)
    assert all(row["rounds"] <= 2 for row in rows)


def test_networks_of_one_basin_are_averaged_as_they_are_and_batchnorms_reset():
    runs = [f"{RESNET}/s1", f"{RESNET}/s2"]
    (row,) = average_rows(runs, [2], ["same basin"], calibration=200)
    pair = load_pair(runs, calibration=200)
    middle = interpolate_models(pair.a, pair.b)
    assert row["matching"] == "none" and row["loss"] != pytest.approx(pair.evaluate(middle)[0], abs=1e-3)
