"""Matchings and renormalisations by name: each entry is what its name says."""

import pytest
import torch

from companion.experiments.methods import MATCHINGS, RENORMS
from companion.experiments.pairs import load_pair
from repairlib import Repair, interpolate_models, permute, reset

RUNS = {norm: [f"digits/{model}/smoke/s{seed}" for seed in (1, 2)]
        for norm, model in {"plain": "mlp2-plain-w16", "bn": "resnet8-bn-w0.25"}.items()}  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    return {norm: load_pair(runs, calibration=200) for norm, runs in RUNS.items()}


def logits(model, pair):
    with torch.no_grad():
        return model.eval()(next(iter(pair.test))[0])


def close(a, b):
    return bool((a - b).abs().max() < 1e-4 * b.abs().max())


@pytest.mark.parametrize("name", [name for name, how in MATCHINGS.items() if how.match])
def test_a_matching_gives_a_network_of_the_same_architecture(name, pairs):
    pair = pairs["plain"]
    found = MATCHINGS[name].match(pair.a, pair.b, pair.calibration)
    aligned = found.apply(pair.b)
    assert type(aligned) is type(pair.b) and found.spec.groups
    assert close(logits(aligned, pair), logits(pair.b, pair))
    if name != "OT":  # whose plans are permutations here, but are called otherwise
        for group, order in found.permutation.items():
            assert sorted(order.tolist()) == list(range(len(order))), group
        weights = permute(pair.b, found.spec, found.permutation).parameters()
        assert all(map(torch.equal, aligned.parameters(), weights))


@pytest.mark.parametrize("name", RENORMS)
def test_a_renormalisation_says_whether_it_moves_the_ends(name, pairs):
    how = RENORMS[name]
    pair = pairs["bn"]
    path = how.path(pair.a, pair.aligned, pair.calibration)
    for alpha, end in enumerate((pair.a, pair.aligned)):
        assert close(logits(path(alpha), pair), logits(end, pair)) != how.moves_ends
    middle = interpolate_models(pair.a, pair.aligned, 0.5)
    assert close(logits(path(0.5), pair), logits(middle, pair)) == (name == "none")
    assert how.label and how.needs in ("", "BatchNorm", "Conv")


def test_names_stand_for_options(pairs):
    pair = pairs["bn"]
    middle = interpolate_models(pair.a, pair.aligned, 0.5)
    options = {
        "REPAIR": {},
        "REPAIR closed form": {"method": "closed-form"},
        "REPAIR simultaneous": {"method": "simultaneous"},
        "RESCALE": {"correct": "rescale"},
        "RESHIFT": {"correct": "reshift"},
    }
    for name, fixed in options.items():
        expected = Repair(pair.a, pair.aligned, pair.calibration, **fixed)(0.5).model
        found = RENORMS[name].path(pair.a, pair.aligned, pair.calibration)(0.5)
        assert close(logits(found, pair), logits(expected, pair)), name
    expected = reset(middle, pair.calibration).model
    found = RENORMS["RESET"].path(pair.a, pair.aligned, pair.calibration)(0.5)
    assert close(logits(found, pair), logits(expected, pair))


def test_all_of_the_data_counts_unless_a_limit_is_given(pairs):
    pair = pairs["plain"]
    networks = pair.a, pair.aligned, pair.calibration
    path = RENORMS["REPAIR"].path
    expected = Repair(*networks, limit=None)(0.5).model
    assert torch.equal(logits(path(*networks)(0.5), pair), logits(expected, pair))
    assert not torch.equal(logits(path(*networks, limit=50)(0.5), pair), logits(expected, pair))


@pytest.mark.parametrize("name", [name for name, how in RENORMS.items() if how.needs == "BatchNorm"])
def test_what_needs_batchnorms_says_so_without_them(name, pairs):
    pair = pairs["plain"]
    with pytest.raises(ValueError, match="BatchNorm"):
        RENORMS[name].path(pair.a, pair.aligned, pair.calibration)(0.5)
