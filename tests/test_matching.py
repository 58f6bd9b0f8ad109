import copy
import itertools

import pytest
import torch
from cases import CASES, batches, inputs, make
from torch import nn

from repairlib import graph, matching


def noisy_copy(model: nn.Module, noise: float, seed: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    out = copy.deepcopy(model)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(noise * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return out


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("name", CASES)
def test_recovers_a_planted_permutation(name, tap):
    """B is a permuted A plus a little noise: the matching must return the inverse of the permutation."""
    model_a = make(name)
    spec = graph.permutation_spec(model_a, inputs(name, 2))
    planted = graph.random_permutation(spec, 3)
    model_b = noisy_copy(graph.permute(model_a, spec, planted), 1e-3)
    found = matching.match_activations(model_a, model_b, batches(name, 120), tap=tap)
    for group, perm in graph.invert(planted).items():
        dead = found.correlation[group] == 0  # random nets have dead units, whose order is arbitrary
        assert torch.equal(found.permutation[group][~dead], perm[~dead]), group
        assert int(dead.sum()) <= max(found.dead[group])


def test_objective_is_the_sum_of_correlations_and_the_best_one():
    name = "mlp1-plain-w6"
    a, b = make(name, 0), make(name, 1)
    data = batches(name, 200)
    found = matching.match_activations(a, b, data)
    net_a, net_b = graph.trace(a, data[0]), graph.trace(b, data[0])
    (group,) = found.spec.groups
    with torch.no_grad():
        values = []
        for net in (net_a, net_b):
            ((_, value),) = net.walk(torch.cat(data), [group.taps["post"]])
            values.append(value.double())
    corr = torch.corrcoef(torch.cat(values, 1).T).nan_to_num()[:6, 6:]
    best = max(sum(corr[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert found.objective[group.name] == pytest.approx(float(best), abs=1e-5)
    assert float(found.correlation[group.name].sum()) == pytest.approx(found.objective[group.name])


def test_dead_and_duplicated_units_are_reported_and_still_permuted():
    name = "mlp1-plain-w6"
    a = make(name)
    first = next(m for m in a.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        first.weight[2] = 0
        first.bias[2] = -1.0  # dead
        first.weight[4], first.bias[4] = first.weight[3], first.bias[3]  # duplicated
    found = matching.match_activations(a, a, batches(name))
    (dead,) = found.dead.values()
    (perm,) = found.permutation.values()
    assert dead[0] == dead[1] >= 1
    assert sorted(perm.tolist()) == list(range(6))
    assert "dead A/B" in str(found)


def test_float32_one_pass_gives_the_float64_assignment():
    name = "vgg11-bn-w0.125"
    a, b, data = make(name, 0), make(name, 1), batches(name, 150)
    single = matching.match_activations(a, b, data)
    double = matching.match_activations(a.double(), b.double(), data)
    for group in single.permutation:
        alive = double.correlation[group] != 0  # dead units have no preferred partner
        assert torch.equal(single.permutation[group][alive], double.permutation[group][alive])
        assert alive.any()


def test_endpoints_must_fit():
    a = make("mlp1-plain-w6")
    data = batches("mlp1-plain-w6")
    wider = copy.deepcopy(a)
    name = next(n for n, m in wider.named_modules() if isinstance(m, nn.Linear))
    setattr(wider, name, nn.Linear(64, 9))
    with pytest.raises(
        ValueError, match=f"different architectures: '{name}.weight' is \\(6, 64\\) in A, \\(9, 64\\) in B"
    ):
        matching.match_activations(a, wider, data)
    broken = make("mlp1-plain-w6", 1)
    with torch.no_grad():
        next(broken.parameters())[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model B: '.*weight' holds NaN"):
        matching.match_activations(a, broken, data)
    with pytest.raises(ValueError, match="calibration data is empty"):
        matching.match_activations(a, a, [])
    with pytest.raises(ValueError, match="tap must be"):
        matching.match_activations(a, a, data, tap="middle")
    with pytest.raises(TypeError, match="batch must be a tensor"):
        matching.match_activations(a, a, ["text"])
