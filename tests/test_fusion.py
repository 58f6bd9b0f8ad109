import builtins

import pytest
import torch
from cases import CASES, batches, inputs, make

from repairlib import graph
from repairlib.fusion import SoftMatching, match_transport
from repairlib.interpolate import interpolate_models


@pytest.mark.parametrize("cost", ["activations", "weights"])
@pytest.mark.parametrize("name", ["mlp3-plain-w8", "vgg11-bn-w0.125", "resnet8-bn-w0.5"])
def test_without_regularisation_a_planted_permutation_is_found(name, cost):
    a = make(name)
    spec = graph.permutation_spec(a, inputs(name, 2))
    b = graph.permute(a, spec, graph.random_permutation(spec, 3))
    found = match_transport(a, b, batches(name, 120), spec=spec, cost=cost, tap="pre")
    x = inputs(name)
    with graph.eval_mode(a):
        torch.testing.assert_close(found.apply(b)(x), a(x), rtol=1e-4, atol=1e-5)  # dead units may be in any order
    for group, plan in found.plan.items():
        assert plan.shape == (spec[group].size,) * 2
        assert torch.allclose(plan, plan.round()) and torch.allclose(plan.sum(0), plan.new_ones(len(plan)))


@pytest.mark.parametrize("name", CASES)
def test_a_permutation_as_a_plan_permutes(name):
    a = make(name)
    spec = graph.permutation_spec(a, inputs(name, 2))
    permutation = graph.random_permutation(spec, 3)
    plan = {g: torch.eye(len(p), dtype=torch.float64)[p] for g, p in permutation.items()}
    moved = SoftMatching(spec, plan).apply(a).state_dict()
    expected = graph.permute_state(a.state_dict(), spec, permutation)
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
    with pytest.raises(ValueError, match="cost must be 'activations' or 'weights'"):
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
        match_transport(a, b, batches(name))
