"""What is wrong in a call of the library is said, with what would be right; nothing is silently wrong."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import repairlib
from repairlib import Repair, align, barrier, match_activations, match_weights, permutation_spec, permute, renormalize
from repairlib.combine import layers, stitch
from repairlib.inputs import Limited
from repairlib.interpolate import barrier_of
from repairlib.permutations import random_permutation
from repairlib.renorm import Options


def network(seed, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def pair():
    return network(1), network(2)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    return [(x[i : i + 20], torch.arange(20) % 3) for i in (0, 20, 40)]


def test_nan_on_a_path_is_no_flat_path(pair, data):
    with pytest.raises(ValueError, match=r"the cost is NaN at alpha = 0\.5, so the path has no barrier"):
        barrier_of([0, 0.5, 1], [1.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="the cost is NaN at alpha = 0,"):
        barrier_of([0, 1], [float("nan"), 1.0])
    assert barrier_of([0, 0.5, 1], [1.0, float("inf"), 1.0]) == float("inf")
    data[1][0][3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        barrier(*pair, data, points=3)
    with pytest.raises(ValueError, match="NaN"):
        Repair(*pair, data)


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_are_no_number_of_examples(pair, data, limit):
    for ask in (lambda: Limited(data, limit), lambda: Repair(*pair, data, limit=limit), lambda: Options(limit=limit)):
        with pytest.raises(ValueError, match="limit is a number of examples, 1 or more, or None for all, not"):
            ask()
    with pytest.raises(ValueError, match="limit is a number"):
        repairlib.merge(*pair, data, limit=limit)


@pytest.mark.parametrize("points", [1, 0, -3])
def test_a_path_of_one_point(pair, data, points):
    with pytest.raises(ValueError, match="two points or more"):
        barrier(*pair, data, points=points)


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_eps_that_no_variance_can_take(pair, data, eps):
    with pytest.raises(ValueError, match="eps is added to a variance: at least 0, not"):
        Repair(*pair, data, eps=eps)
    with pytest.raises(ValueError, match="eps is added to a product of standard deviations: at least 0, not"):
        match_activations(*pair, data, eps=eps)


def test_alphas_so_far_out_that_signs_would_flip(pair, data):
    repaired = Repair(*pair, data)
    repaired(-0.1), repaired(1.1)
    with pytest.raises(ValueError, match="the goal standard deviation of a channel at node '_0' is negative"):
        repaired(20.0)


def test_recorded_statistics_that_are_none(pair, data):
    good = {"_0": (torch.zeros(6), torch.ones(6))}
    renormalize(pair[0], good, data)
    with pytest.raises(ValueError, match="a negative standard deviation at node '_0'"):
        renormalize(pair[0], {"_0": (torch.zeros(6), -torch.ones(6))}, data)
    with pytest.raises(ValueError, match="node '_0' are NaN"):
        renormalize(pair[0], {"_0": (torch.full((6,), torch.nan), torch.ones(6))}, data)


def test_a_layer_that_is_no_whole_number(pair):
    states, parts = [model.state_dict() for model in pair], layers(pair[0], torch.zeros(1, 4))
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="layer must be a whole number from 0 to 3"):
            stitch(*states, layer, parts)


def test_numbers_that_are_no_whole_numbers():
    """In another process, where nothing checks types, as in everybody's."""
    script = """
from torch import nn
from repairlib.combine import layers, stitch
from repairlib.inputs import Limited
import torch
net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
for ask in (lambda: stitch(net.state_dict(), net.state_dict(), 1.5, layers(net, torch.zeros(1, 2))),
            lambda: Limited([], 2.5), lambda: Limited([], "all")):
    try:
        ask()
    except ValueError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    lines = result.stdout.splitlines()
    assert lines[0] == "layer must be a whole number from 0 to 2, the number of layers, not 1.5", result.stderr
    assert lines[1:] == [f"limit is a number of examples, 1 or more, or None for all, not {x!r}" for x in (2.5, "all")]


def test_repaired_of_other_endpoints(pair, data):
    a, b = pair
    repaired = Repair(a, b, data)
    barrier(a, b, data, points=3, repaired=repaired)
    barrier(copy.deepcopy(a), b, data, points=3, repaired=repaired)  # equal is enough
    with pytest.raises(ValueError, match=r"`repaired` is of other endpoints than these two: '0\.weight' differs"):
        barrier(a, align(a, b, data), data, points=3, repaired=repaired)
    with pytest.raises(ValueError, match="other endpoints"):
        barrier(b, a, data, points=3, repaired=repaired)


@pytest.mark.parametrize("width", [5, 8])
def test_groups_of_another_network(pair, data, width):
    spec = permutation_spec(network(0, width), torch.zeros(2, 4))
    asks = [
        lambda: permute(pair[0], spec, random_permutation(spec)),
        lambda: match_activations(*pair, data, spec=spec),
        lambda: match_weights(*pair, spec=spec),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=r"of another network, where axis 0 of '0\.weight' has \d entries"):
            ask()
    other = permutation_spec(nn.Sequential(nn.Flatten(), *network(0)), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"axis 0 of '1\.weight' has 6 entries, and here it is not there|here it is"):
        permute(pair[0], other, random_permutation(other))


def test_labels_that_are_one_hot(pair, data):
    hot = [(x, nn.functional.one_hot(y, 3)) for x, y in data]
    with pytest.raises(ValueError, match="are no class indices of outputs"):
        barrier(*pair, hot, points=3)
    with pytest.raises(ValueError, match=r"must be class indices \(integers\)"):
        barrier(*pair, [(x, y.float()) for x, y in hot], points=3)
