import copy
import itertools
from collections import Counter

import pytest
import torch
from cases import batches, inputs, make
from scipy import stats

from repairlib import groups, permutations
from repairlib.matching import match_activations
from repairlib.weight_matching import match_weights

NAME = "vgg11-bn-w0.125"


@pytest.fixture(scope="module")
def spec():
    return groups.permutation_spec(make(NAME), inputs(NAME, 2))


def test_the_way_through_a_third_network_ends_at_the_planted_units(spec):
    """A, and B and C that are shuffles of it: C's units in B's order, found without comparing B with C."""
    b_from_a, c_from_a = permutations.random_permutation(spec, 1), permutations.random_permutation(spec, 2)
    a = make(NAME)
    b, c = permutations.permute(a, spec, b_from_a), permutations.permute(a, spec, c_from_a)
    way = permutations.chain(permutations.invert(b_from_a), permutations.invert(c_from_a))
    for name, value in permutations.permute(c, spec, way).state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
    assert set(permutations.agreement(way, way).values()) == {1.0}
    assert min(permutations.agreement(way, b_from_a).values()) < 1


def test_shuffle_and_recover(spec):
    a = make(NAME)
    near = copy.deepcopy(a)
    with torch.no_grad():
        for p in near.parameters():
            p.mul_(1 + 0.01 * torch.randn_like(p))
    for match in (
        lambda a, b: match_weights(a, b, spec=spec, restarts=3),
        lambda a, b: match_activations(a, b, batches(NAME, 200), spec=spec, tap="pre"),
    ):
        recovered = permutations.shuffle_and_recover(a, near, spec, match, seed=4)
        assert set(recovered) == {g.name for g in spec.groups} and min(recovered.values()) == 1
    far = permutations.shuffle_and_recover(a, make(NAME, 7), spec, match, seed=4)
    assert min(far.values()) < 1


@pytest.mark.parametrize("k", [0, 2, 3, 8])
def test_derangement_moves_the_k_least_correlated_pairs_and_no_other(k, spec):
    group = spec.groups[0]
    assert group.size == 8
    old = permutations.random_permutation(spec, 3)
    correlation = {group.name: torch.tensor([0.9, 0.1, 0.5, 0.3, 0.8, 0.2, 0.7, 0.6])}
    seen = set()
    for seed in range(30):
        new = permutations.derange(old, correlation, group.name, k, seed)
        assert all(torch.equal(new[name], old[name]) for name in old if name != group.name)
        changed = new[group.name] != old[group.name]
        assert sorted(torch.nonzero(changed).flatten().tolist()) == sorted([1, 5, 3, 2, 7, 6, 4, 0][:k])
        assert sorted(new[group.name].tolist()) == list(range(8))
        seen.add(tuple(new[group.name].tolist()))
    assert len(seen) == {0: 1, 2: 1, 3: 2}.get(k, len(seen)) and (k < 8 or len(seen) > 25)


def test_every_derangement_is_as_likely_as_any_other():
    """Of four pairs 6 are one cycle, which is all that some generators give (Sattolo's), and 3 are two swaps."""
    old = {"fc": torch.tensor([4, 2, 0, 5, 1, 3])}
    correlation = {"fc": torch.tensor([0.1, 0.9, 0.3, 0.2, 0.8, 0.0])}
    worst = [5, 0, 3, 2]
    before = old["fc"][worst].tolist()
    possible = [p for p in itertools.permutations(before) if all(x != y for x, y in zip(p, before, strict=True))]
    assert len(possible) == 9
    drawn = Counter(
        tuple(permutations.derange(old, correlation, "fc", 4, seed)["fc"][worst].tolist()) for seed in range(900)
    )
    assert set(drawn) == set(possible)
    assert sum((n - 100) ** 2 / 100 for n in drawn.values()) < stats.chi2(8).ppf(0.999)


def test_impossible_derangements(spec):
    old = permutations.random_permutation(spec, 3)
    correlation = {g.name: torch.zeros(g.size) for g in spec.groups}
    for k in (1, -1, 9):
        with pytest.raises(ValueError, match=f"{k} of 8 pairs cannot be deranged"):
            permutations.derange(old, correlation, spec.groups[0].name, k)
    with pytest.raises(KeyError, match="no correlations of group"):
        permutations.derange(old, {}, spec.groups[0].name, 2)
    with pytest.raises(KeyError, match="no group 'fc'"):
        permutations.derange(old, correlation, "fc", 2)


def test_permutations_of_different_architectures_do_not_compare():
    with pytest.raises(ValueError, match="different groups"):
        permutations.agreement({"a": torch.arange(3)}, {"a": torch.arange(4)})


@pytest.mark.parametrize("name", ["mlp2-bn-w8", "resnet8-bn-w0.5"])
def test_compose_with_the_inverse_is_the_identity(name):
    model = make(name)
    spec = groups.permutation_spec(model, inputs(name, 2))
    p, q = permutations.random_permutation(spec, 1), permutations.random_permutation(spec, 2)
    for group, perm in permutations.compose(p, permutations.invert(p)).items():
        assert perm.tolist() == list(range(spec[group].size))
    state = model.state_dict()
    two_steps = permutations.permute_state(permutations.permute_state(state, spec, p), spec, q)
    one_step = permutations.permute_state(state, spec, permutations.compose(p, q))
    assert all(torch.equal(two_steps[k], one_step[k]) for k in state)
    back = permutations.permute_state(two_steps, spec, permutations.invert(permutations.compose(p, q)))
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_permuting_leaves_the_model_untouched():
    name = "resnet8-bn-w0.5"
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = groups.permutation_spec(model, inputs(name, 2))
    permutations.permute(model, spec, permutations.random_permutation(spec))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_permutation_is_refused():
    model = make("mlp1-plain-w6")
    spec = groups.permutation_spec(model, inputs("mlp1-plain-w6", 2))
    with pytest.raises(ValueError, match="not a permutation of its 6 units"):
        permutations.permute_state(model.state_dict(), spec, {spec.groups[0].name: torch.zeros(6, dtype=torch.int64)})
