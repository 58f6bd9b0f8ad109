import copy
import itertools

import pytest
import torch
from cases import CASES, inputs, make, noisy
from torch import nn

from repairlib import groups, permutations
from repairlib.weight_matching import WeightCost, match_weights


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def by_hand(state_a, state_b, spec, permutation, name):
    """C of one group as Algorithm 1 writes it: permute all of B but this group, then one full product an axis."""
    others = {g: p for g, p in permutation.items() if g != name}
    b = permutations.permute_state(state_b, spec, others)
    group = spec[name]
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for axis in group.axes:
        rows = [s[axis.tensor].double().movedim(axis.axis, 0)[axis.positions] for s in (state_a, b)]
        total += rows[0].reshape(group.size, -1) @ rows[1].reshape(group.size, -1).T
    return total


@pytest.mark.parametrize("name", CASES)
def test_recovers_a_planted_permutation(name):
    model_a = make(name)
    spec = groups.permutation_spec(model_a, inputs(name, 2))
    planted = permutations.random_permutation(spec, 3)
    model_b = noisy(permutations.permute(model_a, spec, planted), 1e-3)
    found = match_weights(model_a, model_b, spec=spec, restarts=6)
    for group, perm in permutations.invert(planted).items():
        assert torch.equal(found.permutation[group], perm), group


@pytest.mark.parametrize("name", CASES)
def test_cost_is_that_of_algorithm_1_wherever_the_descent_has_gone(name):
    """Products that are kept between moves must be those of a fresh computation, and gains those of the objective."""
    a, b = make(name, 0, torch.float64), make(name, 1, torch.float64)
    spec = groups.permutation_spec(a, inputs(name, 2, dtype=torch.float64))
    states = a.state_dict(), b.state_dict()
    cost = WeightCost(*states, spec)
    indexed = {axis.tensor for g in spec.groups for axis in g.axes}
    generator = torch.Generator().manual_seed(0)
    for group in spec.groups:
        cost.similarity(group.name)  # fills what may go stale
    for group in spec.groups:
        before = cost.objective()
        perm = torch.randperm(group.size, generator=generator)
        gain = cost.gain(group.name, perm)
        cost.permutation[group.name] = perm
        assert cost.objective() - before == pytest.approx(gain, abs=1e-8)
        permuted = permutations.permute_state(states[1], spec, cost.permutation)
        direct = sum(float((states[0][t] * permuted[t]).sum()) for t in indexed)
        assert cost.objective() == pytest.approx(direct, abs=1e-8)
        for other in spec.groups:
            expected = by_hand(*states, spec, cost.permutation, other.name)
            torch.testing.assert_close(cost.similarity(other.name), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp3-plain-w8", "vgg11-bn-w0.125", "resnet20-bn-w0.25"])
def test_objective_never_decreases_and_is_the_inner_product(name):
    a, b = make(name, 0), make(name, 1)
    found = match_weights(a, b, inputs(name, 2), seed=4)
    assert len(found.history) > 2 and all(x <= y for x, y in itertools.pairwise(found.history))
    sweeps = range(1, len(found.history))
    partly = [match_weights(a, b, spec=found.spec, seed=4, sweeps=n).permutation for n in sweeps]
    states = parameters(a), parameters(b)
    assert [WeightCost(*states, found.spec, p).objective() for p in partly] == pytest.approx(
        found.history[1:], rel=1e-6
    )
    aligned = parameters(found.apply(b))
    indexed = {axis.tensor for g in found.spec.groups for axis in g.axes}
    direct = sum(float((p.double() * aligned[n].double()).sum()) for n, p in parameters(a).items() if n in indexed)
    assert found.history[-1] == pytest.approx(direct, rel=1e-6)
    # a local optimum: no group can gain by moving alone
    cost = WeightCost(parameters(a), parameters(b), found.spec, found.permutation)
    assert len(cost.descend(1, torch.Generator().manual_seed(9))) == 2
    assert cost.objective() == pytest.approx(found.history[-1], rel=1e-6)


def test_one_hidden_layer_is_solved_exactly():
    name = "mlp1-plain-w6"
    a, b = make(name, 0, torch.float64), make(name, 1, torch.float64)
    found = match_weights(a, b, inputs(name, 2, dtype=torch.float64))
    (group,) = found.spec.groups
    c = by_hand(a.state_dict(), b.state_dict(), found.spec, {}, group.name)
    best = max(sum(c[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert found.history[-1] == found.objective[group.name] == pytest.approx(float(best))


def test_seeds_fix_the_result_and_restarts_do_not_lose():
    name = "resnet8-plain-w0.5"
    a, b = make(name, 0), make(name, 1)
    spec = groups.permutation_spec(a, inputs(name, 2))
    once = match_weights(a, b, spec=spec, seed=1)
    again = match_weights(a, b, spec=spec, seed=1)
    assert all(torch.equal(p, again.permutation[g]) for g, p in once.permutation.items())
    assert once.history == again.history
    many = match_weights(a, b, spec=spec, seed=1, restarts=6)
    assert many.history[-1] >= once.history[-1]
    once = {"spec": spec, "seed": 1, "sweeps": 1, "start": "identity"}
    starts = {match_weights(a, b, restarts=r, **once).history[0] for r in range(1, 8)}
    assert len(starts) > 1  # the best of 7 single sweeps is not always the one from the identity
    started = match_weights(a, b, spec=spec, seed=7, start=many.permutation)
    assert started.history[0] == pytest.approx(many.history[-1])


def test_running_statistics_count_if_asked_for():
    name = "vgg11-bn-w0.125"
    a = make(name)
    spec = groups.permutation_spec(a, inputs(name, 2))
    b = copy.deepcopy(a)
    planted = permutations.random_permutation(spec, 3)
    b.load_state_dict(permutations.permute_state(a.state_dict(), spec, planted))
    for model in (a, b):  # nothing but the running means tells units apart
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
    found = match_weights(a, b, spec=spec, buffers=True)
    assert all(torch.equal(found.permutation[g], p) for g, p in permutations.invert(planted).items())
    blind = match_weights(a, b, spec=spec)
    assert all(torch.equal(p, torch.arange(len(p))) for p in blind.permutation.values())


class Tied(nn.Module):
    """One weight matrix between a layer and itself: a group on both axes of one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        for _ in range(2):
            x = x + torch.relu(self.again(x))
        return self.last(x)


def test_a_group_on_two_axes_of_one_tensor_never_loses():
    torch.manual_seed(0)
    for seed in range(20):
        a, b = Tied(), Tied()
        found = match_weights(a, b, torch.randn(2, 5), seed=seed)
        assert len({(x.tensor, x.axis) for x in found.spec["first"].axes if x.tensor == "again.weight"}) == 2
        assert all(x <= y for x, y in itertools.pairwise(found.history))
        aligned = found.apply(b)
        names = ("first.weight", "first.bias", "again.weight", "again.bias", "last.weight")
        direct = sum(float((a.state_dict()[n].double() * aligned.state_dict()[n].double()).sum()) for n in names)
        assert found.history[-1] == pytest.approx(direct, abs=1e-6)


def test_grouped_convolutions_and_half_precision():
    torch.manual_seed(0)
    a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 3))
    spec = groups.permutation_spec(a, torch.randn(2, 3, 9, 9))
    planted = permutations.random_permutation(spec, 3)
    b = permutations.permute(a, spec, planted).bfloat16()
    found = match_weights(copy.deepcopy(a).bfloat16(), b, spec=spec)
    assert all(torch.equal(found.permutation[g], p) for g, p in permutations.invert(planted).items())


def test_bad_arguments():
    a, b = make("mlp1-plain-w6"), make("mlp1-plain-w6", 1)
    with pytest.raises(ValueError, match="give `spec`, or data"):
        match_weights(a, b)
    with pytest.raises(ValueError, match="data is empty"):
        match_weights(a, b, iter([]))
    with pytest.raises(ValueError, match="restarts and sweeps are at least 1"):
        match_weights(a, b, inputs("mlp1-plain-w6", 2), restarts=0)
    with pytest.raises(ValueError, match="different architectures"):
        match_weights(a, make("mlp3-plain-w8"), inputs("mlp1-plain-w6", 2))
    with pytest.raises(KeyError, match="no group 'zz'; there are: fc1"):
        match_weights(a, b, inputs("mlp1-plain-w6", 2), start={"zz": torch.arange(6)})
    with pytest.raises(ValueError, match="group 'fc1': not a permutation"):
        match_weights(a, b, inputs("mlp1-plain-w6", 2), start={"fc1": torch.zeros(6, dtype=torch.int64)})


def test_a_forward_start_finds_more_between_wide_random_networks():
    sizes, name = (20, 96, 96, 96, 5), "mlp2-plain-w8-nobias"
    torch.manual_seed(0)
    layers = [[(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise(sizes)] for _ in "ab"]
    a, b = (nn.Sequential(*itertools.chain(*each)) for each in layers)
    x = torch.zeros(2, 20)
    usual, forward = (match_weights(a, b, x, start=start).history for start in ("identity", "forward"))
    assert forward[0] > 0.9 * usual[-1] and forward[-1] > 1.02 * usual[-1]
    assert len(forward) < len(usual) and list(forward) == sorted(forward)
    only = match_weights(a, b, x, only=["2"]).permutation
    assert only["0"].tolist() == only["4"].tolist() == list(range(96)) != only["2"].tolist()
    with pytest.raises(ValueError, match="unknown start 'backward'"):
        match_weights(make(name, 0), make(name, 1), inputs(name, 2), start="backward")


@pytest.mark.parametrize("name", CASES)
def test_matching_an_aligned_network_moves_nothing(name):
    """A descent begins in place where a forward start is no higher: so matching to means converges."""
    a, b = make(name, 0), make(name, 1)
    found = match_weights(a, b, inputs(name, 2))
    again = match_weights(a, found.apply(b), spec=found.spec, seed=5)
    assert all(torch.equal(perm, torch.arange(len(perm))) for perm in again.permutation.values())
    assert again.history[0] == pytest.approx(found.history[-1], rel=1e-6)
