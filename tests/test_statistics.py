"""Activations of midpoints, goals from elsewhere, and what is left of the endpoints, on networks of a few units."""

import pytest
import torch

from companion.experiments.pairs import load_pair
from companion.experiments.statistics import (
    data_independent_rows,
    fisher_rows,
    independent_rows,
    magnitude_rows,
    midpoints,
    new_network,
    record,
    scale_rows,
    zero_rows,
)
from companion.runs import store
from repairlib import Repair, interpolate_models, renormalize
from repairlib.diagnostics import weight_magnitudes
from repairlib.renorm import reset

RUN = "digits/vgg11-{}-w0.0625/smoke/s{}"


@pytest.fixture(scope="module", params=["plain", "bn"])
def pair(request):
    return load_pair([RUN.format(request.param, seed) for seed in (1, 2)], calibration=200)


@pytest.fixture(scope="module")
def plain():
    return load_pair([RUN.format("plain", seed) for seed in (1, 2)], calibration=200)


def test_midpoints_are_what_their_names_say(plain):
    found = midpoints(plain, ["none", "REPAIR"])
    assert list(found) == [
        "not aligned", "not aligned + REPAIR", "aligned (WM)", "aligned (WM) + REPAIR", "aligned (AM)",
        "aligned (AM) + REPAIR",
    ]  # fmt: skip
    for name, b in {"not aligned": plain.b, "aligned (WM)": plain.aligned_by("WM")}.items():
        expected = {
            name: interpolate_models(plain.a, b),
            f"{name} + REPAIR": Repair(plain.a, b, plain.calibration)(0.5).model,
        }
        for key, model in expected.items():
            assert plain.evaluate(found[key]) == pytest.approx(plain.evaluate(model), abs=1e-6)


def test_rows_of_layers_name_network_and_layer(plain):
    scales, zeros, sizes = scale_rows(plain, True), zero_rows(plain), magnitude_rows(plain)
    assert {row["network"] for row in scales} >= {"endpoint A", "aligned (WM)", "new network"}
    assert {row["network"] for row in zeros} == {"endpoint A", "not aligned", "aligned (WM)", "aligned (AM)"}
    assert [row["layer"] for row in zeros if row["network"] == "endpoint A"] == list(range(1, 9))
    own = {row["node"]: row["magnitude"] for row in sizes if row["network"] == "endpoint A"}
    assert own == weight_magnitudes(plain.a) and len(own) == 9
    of_a = {row["layer"]: row["zeros"] for row in scales if (row["network"], row["place"]) == ("endpoint A", "after")}
    assert of_a == {row["layer"]: row["zeros"] for row in zeros if row["network"] == "endpoint A"}
    assert len(fisher_rows(plain, 5)) == 4 * 9 and all(row["information"] >= 0 for row in fisher_rows(plain, 5))


def test_a_new_network_is_always_the_same_and_leaves_the_generator_alone(plain):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = new_network(plain), new_network(plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_goals_of_another_network(plain):
    rows = independent_rows(plain, (1, 2, 3))
    other = RUN.format("plain", 3)
    assert {row["other"] for row in rows} == {other}
    expected = renormalize(plain.path("AM")(0.5), store.get(other), plain.calibration, correct="rescale",
                           method="simultaneous", limit=None).model  # fmt: skip
    found = {(row["matching"], row["renorm"]): row["loss"] for row in rows}
    assert found["AM", "RESCALE"] == pytest.approx(plain.evaluate(expected)[0], abs=1e-6)
    assert found["AM", "none"] == pytest.approx(plain.evaluate(plain.path("AM")(0.5))[0], abs=1e-6)


def test_with_data_and_without(pair):
    rows = {(row["matching"], row["renorm"], row["data"]): row["loss"] for row in data_independent_rows(pair, 100)}
    norm = "bn" in pair.runs[0]
    renorms = {"RESET"} if norm else {"REPAIR", "RESCALE"}
    assert {key[1] for key in rows} == {"none", *renorms} and len(rows) == 2 * (1 + 2 * len(renorms))
    if norm:
        middle = reset(interpolate_models(pair.a, pair.aligned), pair.calibration, method="simultaneous").model
        assert rows["AM", "RESET", "used"] == pytest.approx(pair.evaluate(middle)[0], abs=1e-5)


def test_recorded_statistics_are_those_of_the_training_images(plain):
    training = plain.a.training
    recorded = record(plain.a, plain)
    exact = Repair(plain.a, plain.a, plain.calibration, targets="conv").statistics[0]
    assert plain.a.training is training and recorded.keys() == exact.keys()
    for name, (_, std) in recorded.items():
        assert float(std.mean()) == pytest.approx(float(exact[name][1].mean()), rel=0.5)
