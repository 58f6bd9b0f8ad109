import builtins
import copy

import pytest
import torch
from cases import CASES, batches, inputs, make
from torch import nn

from repairlib import groups, permutations
from repairlib.fusion import SoftMatching, match_transport
from repairlib.interpolate import interpolate_models


@pytest.mark.parametrize("cost", ["activations", "weights"])
@pytest.mark.parametrize("name", ["mlp3-plain-w8", "vgg11-bn-w0.125", "resnet8-bn-w0.5"])
def test_without_regularisation_a_planted_permutation_is_found(name, cost):
    a = make(name)
    spec = groups.permutation_spec(a, inputs(name, 2))
    planted = permutations.random_permutation(spec, 3)
    b = permutations.permute(a, spec, planted)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(1e-3 * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    found = match_transport(a, b, batches(name, 120), spec=spec, cost=cost, tap="pre")
    for group, back in permutations.invert(planted).items():
        assert torch.equal(found.plan[group], torch.eye(len(back), dtype=torch.float64)[back]), group


@pytest.mark.parametrize("name", CASES)
def test_a_permutation_as_a_plan_permutes(name):
    a = make(name)
    spec = groups.permutation_spec(a, inputs(name, 2))
    permutation = permutations.random_permutation(spec, 3)
    plan = {g: torch.eye(len(p), dtype=torch.float64)[p] for g, p in permutation.items()}
    moved = SoftMatching(spec, plan).apply(a).state_dict()
    expected = permutations.permute_state(a.state_dict(), spec, permutation)
    assert all(torch.equal(value, expected[k]) for k, value in moved.items())


@pytest.mark.parametrize("cost", ["activations", "weights"])
def test_regularised_plans_are_doubly_stochastic_and_soft(cost):
    name = "mlp3-plain-w8"
    a, b = make(name, 0), make(name, 1)
    found = match_transport(a, b, batches(name, 120), cost=cost, regularization=0.3)
    for plan in found.plan.values():
        for axis in (0, 1):
            torch.testing.assert_close(plan.sum(axis), torch.ones(8, dtype=torch.float64), rtol=1e-3, atol=1e-3)
        assert (plan > 1e-4).sum() > 8 + 4  # more than a permutation
    middle = interpolate_models(a, found.apply(b), 0.5)
    assert middle(inputs(name)).isfinite().all()


def test_bad_arguments(monkeypatch):
    name = "mlp1-plain-w6"
    a, b = make(name, 0), make(name, 1)
    with pytest.raises(ValueError, match="unknown cost 'gradients'"):
        match_transport(a, b, batches(name), cost="gradients")
    with pytest.raises(ValueError, match="different architectures"):
        match_transport(a, make("mlp3-plain-w8"), batches(name))
    plain_import = builtins.__import__

    def without_pot(module, *args):
        if module == "ot":
            raise ImportError(module)
        return plain_import(module, *args)

    monkeypatch.setattr(builtins, "__import__", without_pot)
    with pytest.raises(ImportError, match="needs the POT library"):
        match_transport(a, b, batches(name), regularization=0.1)
    assert match_transport(a, b, batches(name)).plan  # permutations need none
    with pytest.raises(ValueError, match="regularization is 0 or more"):
        match_transport(a, b, batches(name), regularization=-1.0)
    with pytest.raises(ValueError, match="unknown tap 'middle'"):
        match_transport(a, b, batches(name), tap="middle")


def test_what_has_no_distance_is_refused():
    name = "mlp1-plain-w6"
    a, b = make(name, 0).half(), make(name, 1).half()
    with pytest.raises(ValueError, match="not finite"):
        match_transport(a, b, [x.half() * 6e4 for x in batches(name)])
    up = [nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.ReLU(), nn.Conv2d(5, 2, 1))]
    up.append(copy.deepcopy(up[0]))
    with pytest.raises(groups.UnsupportedNode, match="no incoming weights along a first axis"):
        match_transport(*up, [torch.randn(3, 1, 4, 4)], cost="weights")


def test_regularisation_is_relative_to_the_cost():
    name = "mlp3-plain-w8"
    a, b = make(name, 0), make(name, 1)
    plan = match_transport(a, b, batches(name, 120), regularization=0.3, tap="pre").plan["fc1"]
    with torch.no_grad():
        for model in (a, b):
            model.get_submodule("fc1").weight.mul_(10)
            model.get_submodule("fc1").bias.mul_(10)
    scaled = match_transport(a, b, batches(name, 120), regularization=0.3, tap="pre").plan["fc1"]
    torch.testing.assert_close(scaled, plan, rtol=1e-3, atol=1e-5)
