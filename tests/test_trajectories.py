"""Networks that are trained on: what is measured, when, and where it stops."""

import pytest
import torch

from companion.experiments.pairs import load_pair
from companion.experiments.statistics import midpoints, new_network
from companion.experiments.trajectories import distance_rows, recovery_rows, retraining_rows, trajectory
from companion.runs.recipes import Recipe
from companion.runs.train import fit
from repairlib.diagnostics import distance
from repairlib.interpolate import interpolate_models

RUNS = ["digits/mlp2-plain-w16/smoke/s1", "digits/mlp2-plain-w16/smoke/s2"]


@pytest.fixture
def pair():
    return load_pair(RUNS, calibration=300)


def test_the_network_in_the_end_is_that_of_fit(pair):
    recipes = [Recipe("fast", 2, 200, 0.1, "constant"), Recipe("slow", 1, 200, 0.01, "constant")]
    seen = []

    def measure(model):
        seen.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return {"loss": pair.evaluate(model)[0]}

    before = torch.nn.utils.parameters_to_vector(pair.a.parameters()).detach().clone()
    rows = trajectory(pair.a, pair.dataset, recipes, measure, every=4)
    per_epoch = len(pair.dataset.train) // 200
    first = [*range(4, 2 * per_epoch + 1, 4), *([2 * per_epoch] if 2 * per_epoch % 4 else [])]
    second = [2 * per_epoch + step for step in (*range(4, per_epoch + 1, 4), *([per_epoch] if per_epoch % 4 else []))]
    assert [row["step"] for row in rows] == [0, *first, *second]
    model = interpolate_models(pair.a, pair.a)
    for recipe in recipes:
        fit(model, pair.dataset, recipe)
    torch.testing.assert_close(seen[-1], torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(torch.nn.utils.parameters_to_vector(pair.a.parameters()).detach(), before)


def test_it_stops_where_it_is_told_to(pair):
    recipe = Recipe("fast", 2, 200, 0.1, "constant")
    rows = trajectory(
        pair.a, pair.dataset, [recipe, recipe], lambda model: {"x": 1.0}, 3, until=lambda row: row["step"] >= 6
    )
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert len(trajectory(pair.a, pair.dataset, [recipe], lambda model: {"x": 1.0}, 3, until=lambda row: True)) == 1


def test_distances_are_those_of_the_stored_networks_in_the_end(pair):
    rows = distance_rows(tuple(RUNS), [1, 2, 50])  # it has two epochs
    assert [row["epoch"] for row in rows] == [0, 1, 2] and rows[0]["distance"] != rows[1]["distance"]
    assert rows[-1]["distance"] == pytest.approx(distance(pair.a, pair.b), rel=1e-6)
    start = [new_network(load_pair([run, run], 100), seed) for seed, run in enumerate(RUNS, start=1)]
    assert rows[0]["distance"] == pytest.approx(distance(*start), rel=1e-6)


def test_midpoints_recover(pair):
    starts = midpoints(pair) | {"new network": new_network(pair)}
    rows = recovery_rows(pair, starts, lr=0.1, epochs=2, every=5, enough=0.5, images=200)
    assert list(dict.fromkeys(row["network"] for row in rows)) == [*starts]
    for name, model in starts.items():
        mine = [row for row in rows if row["network"] == name]
        assert mine[0]["accuracy"] == pair.evaluate(model)[1]  # the start is measured, and untouched
        assert all(row["train_accuracy"] < 0.5 for row in mine[:-1])


def test_distance_from_the_start_grows(pair):
    rows = retraining_rows(pair, [Recipe("fast", 1, 200, 0.1, "constant")], 5)
    assert rows[0]["distance"] == 0 and rows[0]["accuracy"] == pair.evaluate(pair.a)[1]
    assert rows[-1]["distance"] > rows[1]["distance"] > 0
