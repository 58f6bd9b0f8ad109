import copy
import functools
import weakref

import pytest
import torch
from cases import batches, inputs, make

from repairlib import groups, permutations, several
from repairlib.matching import match_activations
from repairlib.weight_matching import match_weights

NAME = "mlp3-plain-w8"


def setup():
    """A network and four shuffled, slightly disturbed copies, the match, and the shuffles."""
    first = make(NAME)
    spec = groups.permutation_spec(first, inputs(NAME, 2))
    models, planted = [first], []
    for seed in range(1, 5):
        other = copy.deepcopy(first)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.01 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        planted.append(permutations.random_permutation(spec, seed))
        models.append(permutations.permute(other, spec, planted[-1]))
    return models, spec, planted, lambda a, b: match_weights(a, b, spec=spec, restarts=4)


@pytest.mark.parametrize("regime", several.REGIMES)
def test_shuffled_copies_come_into_one_order(regime):
    models, spec, planted, match = setup()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    found = several.match_several(models, match, regime)
    assert found.converged
    # Whatever order is agreed on, it is one: relative to the first network, every copy is where it came from.
    own = permutations.invert(found.permutation[0])
    for perm, shuffle in zip(found.permutation[1:], planted, strict=True):
        for group, back in permutations.invert(shuffle).items():
            assert torch.equal(perm[group][own[group]], back)
    for model, perm, state in zip(found.models, found.permutation, before, strict=True):
        expected = permutations.permute_state(state, spec, perm)
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    mean = found.mean().state_dict()
    for name, value in mean.items():
        torch.testing.assert_close(value, sum(m.state_dict()[name] for m in found.models) / 5)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_sequential_matches_to_the_one_before_as_permuted():
    models, _, _, match = setup()
    asked = []

    def spy(a, b):
        asked.append((a, b))
        return match(a, b)

    found = several.match_several(models[:3], spy, "sequential")
    assert asked[0] == (found.models[0], models[1]) and asked[1] == (found.models[1], models[2])
    assert found.models[0] is not models[0]  # nothing of the result is an input
    asked.clear()
    found = several.match_several(models[:3], spy, "reference")
    assert [a for a, _ in asked] == [found.models[0], found.models[0]]
    asked.clear()
    several.match_several(models[:3], spy, "iterative", rounds=1, seed=3)
    first = next(i for i in range(3) if asked[0][1] is models[i])
    others = [m.state_dict() for i, m in enumerate(models[:3]) if i != first]
    for name, value in asked[0][0].state_dict().items():  # the centre of the others, not of all
        torch.testing.assert_close(value, (others[0][name] + others[1][name]) / 2)


def test_iterative_matching_stops_at_its_cap_and_raises_the_similarity():
    models = [make(NAME, seed) for seed in range(4)]
    spec = groups.permutation_spec(models[0], inputs(NAME, 2))

    def match(a, b):
        return match_weights(a, b, spec=spec)

    def similarity(nets):
        flat = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
        return sum(float(flat[i] @ flat[j]) for i in range(4) for j in range(i))

    once = several.match_several(models, match, "iterative", rounds=1)
    assert once.rounds == 1 and not once.converged
    found = several.match_several(models, match, "iterative")
    assert found.converged and 1 < found.rounds <= 30
    assert similarity(models) < similarity(once.models) <= similarity(found.models)
    for group, perm in found.permutation[2].items():
        assert sorted(perm.tolist()) == list(range(spec[group].size))


@pytest.mark.parametrize("regime", ["reference", "sequential"])
def test_running_means_are_those_of_the_first_networks(regime):
    models, _, _, match = setup()
    asked, alive = [], []

    def loaded():
        for model in models:
            alive.append(weakref.ref(network := copy.deepcopy(model)))
            yield network
            del network

    def spy(a, b):
        asked.append(b)
        asked[:-1] = [None] * (len(asked) - 1)  # so that this list keeps no network alive
        return match(a, b)

    for n, mean in enumerate(several.running_means(loaded(), spy, regime), start=1):
        assert sum(ref() is not None for ref in alive) <= 3  # the first, the one before, this one
        expected = several.match_several(models[:n], match, regime).mean() if n > 1 else models[0]
        for name, value in mean.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)
            value.zero_()  # no later mean changes
    assert n == len(models) and len(asked) == n - 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown regime 'iterative'"):
        next(several.running_means([make(NAME)], match_weights, "iterative"))
    with pytest.raises(ValueError, match="there is no network"):
        next(several.running_means([], match_weights))
    with pytest.raises(ValueError, match="unknown regime 'star'"):
        several.match_several([make(NAME)] * 2, match_weights, "star")
    with pytest.raises(ValueError, match="two networks or more and a round, not 1 and 30"):
        several.match_several([make(NAME)], match_weights)
    with pytest.raises(ValueError, match="two networks or more and a round, not 2 and 0"):
        several.match_several([make(NAME)] * 2, match_weights, rounds=0)


def test_activations_of_all_are_matched_to_the_first_in_one_pass_of_each():
    models, data = [make("resnet8-bn-w0.5", seed) for seed in range(4)], batches("resnet8-bn-w0.5")
    calls = [0] * len(models)

    def count(k):
        def hook(*_):
            calls[k] += 1

        return hook

    expected = several.match_several(models, lambda a, b: match_activations(a, b, data))
    layers = [next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)) for model in models]
    for k, layer in enumerate(layers):
        layer.register_forward_hook(count(k))
    spec = groups.permutation_spec(models[0], data[0][:2], verify=False)
    calls[:] = [0] * len(models)
    found = several.match_several(models, functools.partial(match_activations, data=data, spec=spec))
    assert calls[0] <= len(data) + 1 and len(set(calls)) == 1  # one more to trace
    for one, other in zip(found.permutation, expected.permutation, strict=True):
        assert all(torch.equal(one[group], perm) for group, perm in other.items())
