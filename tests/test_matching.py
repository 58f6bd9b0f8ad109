import copy
import itertools

import pytest
import torch
from cases import CASES, batches, inputs, make, noisy
from torch import nn

import repairlib
from companion.runs.data import iterate, load
from companion.runs.train import Recipe, train
from repairlib import groups, matching, permutations, tracing
from repairlib.other_matchings import match_transport
from repairlib.weight_matching import match_weights


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("name", CASES)
def test_recovers_a_planted_permutation(name, tap):
    """B is a permuted A plus a little noise: the matching must return the inverse of the permutation."""
    model_a = make(name)
    spec = groups.permutation_spec(model_a, inputs(name, 2))
    planted = permutations.random_permutation(spec, 3)
    model_b = noisy(permutations.permute(model_a, spec, planted), 1e-3)
    found = matching.match_activations(model_a, model_b, batches(name, 120), tap=tap)
    for group, perm in permutations.invert(planted).items():
        dead = found.correlation[group] == 0  # random nets have dead units, whose order is arbitrary
        assert torch.equal(found.permutation[group][~dead], perm[~dead]), group
        assert int(dead.sum()) <= max(found.dead[group])


def test_objective_is_the_sum_of_correlations_and_the_best_one():
    name = "mlp1-plain-w6"
    a, b = make(name, 0), make(name, 1)
    data = batches(name, 200)
    found = matching.match_activations(a, b, data)
    net_a, net_b = tracing.trace(a, data[0]), tracing.trace(b, data[0])
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


@pytest.fixture(scope="module")
def trained_pairs():
    """Pairs of small networks trained on digits, with calibration images, by model name."""
    dataset = load("digits")
    pairs = {}
    for name, epochs in (
        ("mlp4-plain-w64", 6),
        ("vgg11-bn-w0.125", 5),
        ("resnet8-bn-w0.5", 4),
        ("resnet8-ln-w0.5", 12),
    ):
        recipe = Recipe("test", epochs, batch_size=100, lr=0.1, schedule="cosine", warmup_epochs=1)
        nets = [
            train(f"digits/{name}/quick/s{seed}", recipe=recipe, dataset=dataset, progress=False) for seed in (1, 2)
        ]
        assert min(metrics["test_accuracy"] for _, metrics in nets) > 0.5, name
        pairs[name] = (nets[0][0], nets[1][0], next(iter(iterate(dataset, "train", 600)))[0])
    return pairs


def test_float32_one_pass_gives_the_assignment_of_float64_two_passes(trained_pairs):
    """All layers of trained networks; the reference centres by the mean of a first pass, in float64 throughout."""
    for name, (a, b, x) in trained_pairs.items():
        found = matching.match_activations(a, b, x.split(200))
        doubles = [copy.deepcopy(model).double() for model in (a, b)]
        for group in found.spec.groups:
            rows = []
            for model in doubles:
                net = tracing.trace(model, x[:2].double())
                with torch.no_grad():
                    ((_, value),) = net.walk(x.double(), [group.taps["post"]])
                rows.append(value.transpose(0, 1).flatten(1))
            centred = [r - r.mean(1, keepdim=True) for r in rows]
            std = [c.square().mean(1).sqrt() for c in centred]
            corr = (centred[0] @ centred[1].T / centred[0].shape[1]) / torch.outer(*std)
            corr = corr.nan_to_num(0.0, 0.0, 0.0)
            best = matching.solve_assignment(corr)
            perm, at = found.permutation[group.name], torch.arange(len(best))
            assert (found.correlation[group.name] != 0).sum() > len(perm) / 2
            # Dead units have no preferred partner, and two units that only one and the same image excites are alike.
            assert corr[at, perm].sum() > corr[at, best].sum() - 1e-6, (name, group.name)
            torch.testing.assert_close(found.correlation[group.name], corr[at, perm], rtol=0, atol=1e-3)


def test_inner_products_are_what_similarity_inner_maximises():
    name = "mlp1-plain-w6"
    a, b = make(name, 0), make(name, 1)
    data = batches(name, 200)
    found = matching.match_activations(a, b, data, similarity="inner", tap="pre")
    (group,) = found.spec.groups
    with torch.no_grad():
        values = [dict(tracing.trace(m, data[0]).walk(torch.cat(data), [group.taps["pre"]])) for m in (a, b)]
    product = values[0][group.taps["pre"]].double().T @ values[1][group.taps["pre"]].double() / 200
    best = max(itertools.permutations(range(6)), key=lambda p: float(sum(product[i, p[i]] for i in range(6))))
    assert found.permutation[group.name].tolist() == list(best)
    assert found.objective[group.name] == pytest.approx(float(sum(product[i, j] for i, j in enumerate(best))), rel=1e-4)


def test_options_change_what_they_say(trained_pairs):
    a, b, x = trained_pairs["mlp4-plain-w64"]
    data = x.split(300)
    exact = matching.match_activations(a, b, data)
    with_eps = matching.match_activations(a, b, data, eps=1e-4, spec=exact.spec)
    assert all(0 < with_eps.objective[g] < exact.objective[g] for g in exact.objective)
    for option in ("tap", "similarity"):
        with pytest.raises(ValueError, match=f"unknown {option} 'other'"):
            matching.match_activations(a, b, data, **{option: "other"})


def test_matching_an_aligned_network_moves_nothing_dead_units_included():
    a, b = (nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(2))
    with torch.no_grad():
        for model, first in ((a, 0), (b, 1)):
            model[0].bias[first::3] = -100.0
    data = [torch.randn(100, 4)]
    found = matching.match_activations(a, b, data)
    assert found.dead["0"] == (6, 5)
    again = matching.match_activations(a, found.apply(b), data)
    assert again.permutation["0"].tolist() == list(range(16))


class Joined(nn.Module):
    """Two groups of units at one node, and in one of them units of several channels."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 6, 1)
        self.grouped, self.last = nn.Conv2d(10, 10, 1, groups=5), nn.Conv2d(10, 3, 1)

    def forward(self, x):
        x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.last(torch.relu(self.grouped(x)))


def test_dead_units_are_counted_in_their_own_group():
    a = Joined()
    with torch.no_grad():
        a.left.bias[:2] = -100.0
    found = matching.match_activations(a, a, [torch.randn(50, 2, 3, 3)], tap="pre")
    for group in found.spec.groups:
        assert 0 <= found.dead[group.name][0] <= group.size
    plain = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        plain[0].bias[:2] = -100.0  # one of the two blocks
        plain[2].bias[:4] = -100.0
    found = matching.match_activations(plain, plain, [torch.randn(50, 2, 3, 3)])
    (group,) = (g for g in found.spec.groups if g.size == 2)
    assert found.dead[group.name] == (1, 1) and found.correlation[group.name].tolist() == pytest.approx(
        [0, 1], abs=1e-5
    )


def test_a_flattened_map_is_read_where_it_was_a_map():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(4 * 36, 5), nn.ReLU(), nn.Linear(5, 2))
    group = groups.permutation_spec(net, torch.randn(2, 1, 8, 8)).groups[0]
    assert group.taps["pre"] == "_0" and group.channels["pre"].shape == (4, 1)


def test_activations_that_are_not_finite_are_named():
    a = make("mlp1-plain-w6")
    with pytest.raises(ValueError, match="group 'fc1': the activations at node 'relu1' are not finite"):
        matching.match_activations(a, a, [x * 1e30 for x in batches("mlp1-plain-w6")])
    with pytest.raises(ValueError, match="is torch.float32 in A, torch.float64 in B; convert"):
        matching.match_activations(a, copy.deepcopy(a).double(), batches("mlp1-plain-w6"))


def test_a_tensor_is_a_batch_and_inputs_survive_operations_in_place():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(50, 4)
    before = x.clone()
    found = matching.match_activations(net, copy.deepcopy(net), x)
    assert torch.equal(x, before)
    same = matching.match_activations(net, copy.deepcopy(net), [x, x[:0]], spec=found.spec)  # an empty batch, too
    assert torch.equal(found.correlation["1"], same.correlation["1"])


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
    with pytest.raises(TypeError, match="batch must be a tensor"):
        matching.match_activations(a, a, ["text"])


def test_networks_without_groups():
    x = torch.randn(50, 4)
    line, other = nn.Linear(4, 3), nn.Linear(4, 3)
    thin = [nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 3)) for _ in range(2)]
    for a, b, units in ((line, other, []), (*thin, [])):
        for match in (matching.match_activations, match_weights, match_transport):
            found = match(a, b, [x])
            assert [g.size for g in found.spec.groups] == units
            torch.testing.assert_close(found.apply(b)(x), b(x))
        assert [p.tolist() for p in matching.match_activations(a, b, [x]).permutation.values()] == [[0]] * len(units)
        merged = repairlib.merge(*thin, [x]).model
        assert merged(x).isfinite().all()
    with pytest.raises(ValueError, match="nothing to correct"):
        repairlib.merge(line, other, [x])
