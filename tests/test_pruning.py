"""Scores, masks and pruned networks; zeros that stay through renormalisation; channels that are constant."""

import copy

import pytest
import torch
from cases import CASES, batches, make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from repairlib import corrections, pruning, renorm
from repairlib.fisher import diagonal_fisher
from repairlib.moments import gather
from repairlib.recording import eval_mode
from repairlib.tracing import trace

SOME = ("mlp3-plain-w8", "vgg11-bn-w0.125", "resnet8-ln-w0.5", "resnet8-fixup-w0.5", "tiny10-ln-w0.5")
PLAIN = ("vgg11-plain-w0.125", "resnet8-plain-w0.5", "vgg11-ln-w0.125")


def pruned_pair(name, sparsity=0.7):
    """A dense network, its pruned copy and data, in float64."""
    dense = make(name, 0, torch.float64)
    pruned = pruning.prune(dense, pruning.mask_smallest(pruning.magnitude_scores(dense), sparsity))
    return dense, pruned, batches(name, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- scores


def test_weights_of_layers_are_pruned_and_nothing_else():
    model = make("resnet8-bn-w0.5")
    found = pruning.prunable(model)
    assert set(found) == {name for name, p in model.named_parameters() if p.ndim > 1}
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert len(pruning.prunable(tied)) == 1
    assert list(pruning.prunable(nn.Linear(2, 2))) == ["weight"]


def test_fisher_scores_are_half_of_the_information_times_the_square():
    model, x, y = make("mlp3-plain-w8").double(), torch.randn(9, 1, 8, 8), torch.arange(9) % 5
    information = diagonal_fisher(model, [(x, y)], "data")
    for name, scores in pruning.fisher_scores(model, [(x, y)]).items():
        expected = information[name] * model.get_parameter(name).detach() ** 2 / 2
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


def test_random_scores_are_the_same_for_a_seed():
    model = make("mlp3-plain-w8")
    first, again, other = (pruning.random_scores(model, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


# --------------------------------------------------------------------------------------------------------------- masks


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), sparsity=st.floats(0, 1), values=st.integers(1, 30))
def test_exactly_the_share_is_masked_and_no_masked_score_is_larger(sizes, sparsity, values):
    torch.manual_seed(values)
    scores = {str(i): torch.randint(values, (size,)).double() for i, size in enumerate(sizes)}  # with many ties
    everything = torch.cat(list(scores.values()))
    masks = torch.cat(list(pruning.mask_smallest(scores, sparsity).values()))
    assert int((~masks).sum()) == round(sparsity * len(everything))
    if masks.any() and not masks.all():
        assert everything[~masks].max() <= everything[masks].min()
    for name, mask in pruning.mask_smallest(scores, sparsity, "layer").items():
        assert int((~mask).sum()) == round(sparsity * len(scores[name]))


def test_of_equal_scores_the_first_are_kept():
    masks = pruning.mask_smallest({"a": torch.ones(4), "b": torch.ones(4)}, 0.5)
    assert masks["a"].all() and not masks["b"].any()


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (4, 4), (1, 3)])
def test_n_of_m_along_the_inputs(n, m):
    scores = {"conv": torch.rand(5, 12, 3, 3), "linear": torch.rand(7, 24), "stem": torch.rand(8, 5, 3, 3)}
    masks = pruning.mask_n_of_m(scores, n, m)
    for name in ("conv", "linear"):
        groups = masks[name].movedim(1, -1).flatten(0, -2).unflatten(1, (-1, m))
        values = scores[name].movedim(1, -1).flatten(0, -2).unflatten(1, (-1, m))
        assert (groups.sum(-1) == n).all()
        kept = values.masked_fill(~groups, torch.inf).amin(-1)
        assert (kept >= values.masked_fill(groups, -torch.inf).amax(-1)).all()
    assert masks["stem"].all()  # its 5 inputs make no groups


@pytest.mark.parametrize("make_masks,message", [
    (lambda s: pruning.mask_smallest(s, 1.5), "share of the weights"),
    (lambda s: pruning.mask_smallest(s, float("nan")), "share of the weights"),
    (lambda s: pruning.mask_smallest({}, 0.5), "no convolution|there are no scores"),
    (lambda s: pruning.mask_smallest(s, 0.5, "globl"), "the nearest is 'global'"),
    (lambda s: pruning.mask_smallest({"a": torch.tensor([1.0, torch.nan])}, 0.5), "'a' are NaN"),
    (lambda s: pruning.mask_n_of_m(s, 5, 4), "n is 1 to m"),
])  # fmt: skip
def test_bad_masks_are_refused(make_masks, message):
    with pytest.raises(ValueError, match=message):
        make_masks({"a": torch.rand(4, 4)})


# ------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("name", SOME)
def test_a_pruned_network_is_the_same_class_with_zeros(name):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    masks = pruning.mask_smallest(pruning.magnitude_scores(model), 0.6)
    pruned = pruning.prune(model, masks)
    assert type(pruned) is type(model) and pruned.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for key, value in pruned.state_dict().items():
        assert torch.equal(value, before[key] * masks[key] if key in masks else before[key])
    assert pruning.sparsity_of(pruned) == pytest.approx(0.6, abs=1e-3)


def test_masks_of_torch_are_taken_over_and_become_permanent():
    model = make("vgg11-bn-w0.125")
    layers = [(module, "weight") for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    plain = copy.deepcopy(model)
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.8)
    x = batches("vgg11-bn-w0.125")[0]
    model(x)  # the weights are now computed, with a gradient
    pruned = pruning.prune(model, {})
    assert pruned.state_dict().keys() == plain.state_dict().keys()
    assert torch_prune.is_pruned(model) and not torch_prune.is_pruned(pruned)
    ours = pruning.prune(plain, pruning.masks_of(model))
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in pruned.state_dict().items())
    with eval_mode(model, pruned):
        assert torch.equal(model(x), pruned(x))
    renorm.renormalize(pruned, plain, batches("vgg11-bn-w0.125"))


@pytest.mark.parametrize("masks,weights,message", [
    ({"0.wait": torch.ones(2, 4)}, None, "unknown parameter '0.wait'; the nearest is '0.weight'"),
    ({"0.weight": torch.ones(4, 2)}, None, r"'0.weight' is \(2, 4\), its mask \(4, 2\)"),
    ({"0.weight": torch.full((2, 4), 0.5)}, None, "other numbers than 0 and 1"),
    ({}, {"0.weight": torch.ones(4)}, r"its new values \(4,\)"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(masks, weights, message):
    with pytest.raises(ValueError, match=message):
        pruning.prune(nn.Sequential(nn.Linear(4, 2)), masks, weights)


# ------------------------------------------------------------------------------------------------------ renormalising


@pytest.mark.parametrize("name", [name for name in CASES if "mlp1" not in name])
@pytest.mark.parametrize("correct", ["repair", "rescale"])
def test_zeros_stay_through_renormalising_and_folding(name, correct):
    dense, pruned, data = pruned_pair(name)
    options = {"targets": ("conv", "linear")} if "mlp" not in name else {}
    repaired = renorm.renormalize(pruned, dense, data, correct=correct, **options)
    assert type(repaired.model) is type(dense)
    for key, weight in pruning.prunable(pruned).items():
        assert (pruning.prunable(repaired.model)[key][weight == 0] == 0).all()
    assert all(value.isfinite().all() for value in repaired.model.state_dict().values())


def test_one_batch_restores_the_statistics_of_the_dense_network():
    dense, pruned, data = pruned_pair("vgg11-plain-w0.125")
    repaired = renorm.renormalize(pruned, dense, data[0]).model
    nets = [trace(m, data[0][:2]) for m in (dense, repaired)]
    for node, m in gather(nets, data[:1], [n for n, kind in nets[0].kinds.items() if kind == "conv"]).items():
        alive = ~m.dead(0) & ~m.dead(1)
        torch.testing.assert_close(m.mean(1), m.mean(0), msg=node)
        torch.testing.assert_close(m.std(1)[alive], m.std(0)[alive], msg=node)


def test_channels_that_pruning_killed_are_reported_and_not_scaled():
    dense, _, data = pruned_pair("vgg11-plain-w0.125")
    first = next(name for name, w in pruning.prunable(dense).items() if w.ndim == 4)
    mask = torch.ones_like(dense.get_parameter(first), dtype=torch.bool)
    mask[[1, 3]] = False
    pruned = pruning.prune(dense, {first: mask})
    repaired = renorm.renormalize(pruned, dense, data)
    node, channels = next(iter(repaired.dead.items()))
    assert channels.tolist() == [1, 3] and f"2 of {node}" in repr(repaired)
    gain = repaired.corrections[node].gain
    assert torch.equal(gain[channels], torch.ones(2, dtype=torch.float64)) and gain.max() < 10


def test_reset_reports_constant_channels():
    dense, _, data = pruned_pair("vgg11-bn-w0.125")
    first = next(name for name, w in pruning.prunable(dense).items() if w.ndim == 4)
    mask = torch.ones_like(dense.get_parameter(first), dtype=torch.bool)
    mask[2] = False
    dead = renorm.reset(pruning.prune(dense, {first: mask}), data).dead
    assert next(iter(dead.values())).tolist() == [2]
    assert not renorm.reset(dense, data).dead.get(next(iter(dead)), torch.empty(0)).numel()


# -------------------------------------------------------------------------------------------------------------- shrink


def gains(name, images, **options):
    """Gains of the first convolution of a pruned network, and its moments beside the dense one."""
    dense, pruned, data = pruned_pair(name, 0.8)
    data = torch.cat(data)[:images]
    nets = [trace(m, data[:2]) for m in (pruned, dense)]
    node = next(n for n, kind in nets[0].kinds.items() if kind == "conv")
    fix = renorm.renormalize(pruned, dense, data, targets=[node], **options).corrections[node]
    return fix, gather(nets, [data], [node], "paired")[node]


@pytest.mark.parametrize("name", PLAIN)
def test_shrink_is_empirical_bayes_of_the_logarithms(name):
    (plain, moments), (fix, _) = gains(name, 8), gains(name, 8, shrink=True)
    which = ~moments.dead() & (plain.gain > 0)
    logs, noise = plain.gain[which].log(), (1 - moments.corr()[which] ** 2) / 8
    spread = max(float(((logs - logs.mean()) ** 2).mean() - noise.mean()), 0)
    expected = (logs.mean() + spread / (spread + noise) * (logs - logs.mean())).exp()
    torch.testing.assert_close(fix.gain[which], expected)
    assert torch.equal(fix.gain[~which], plain.gain[~which])
    torch.testing.assert_close(fix.shift, moments.mean(1) - fix.gain * moments.mean())  # means are right all the same


def test_the_noisier_the_more_a_gain_is_drawn_to_the_mean():
    goal = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.0], dtype=torch.float64)  # the last channel is constant in the goal
    ones, dead = torch.ones_like(goal), torch.zeros(5, dtype=torch.bool)
    middle, before = goal[:4].log().mean(), torch.inf
    for noise in (0.0, 0.1, 0.3, 10.0):
        gain = corrections.correction(0 * ones, ones, dead, ones, goal, noise=noise * ones).gain
        assert gain[4] == 0
        distance = (gain[:4].log() - middle).abs().max()
        assert distance < before and (gain[:4].diff() >= 0).all()
        before = distance
    assert distance < 1e-9
    gain = corrections.correction(0 * ones, ones, dead, ones, goal, noise=torch.tensor([0, 0, 0, 0.5, 0]).double()).gain
    torch.testing.assert_close(gain[:3], goal[:3])
    assert gain[3] < goal[3]  # only the noisy one moves


def test_shrink_of_an_unpruned_network_changes_nothing():
    dense, _, data = pruned_pair("resnet8-bn-w0.5")
    fix = renorm.renormalize(dense, dense, data, shrink=True, targets="conv")
    assert all((c.gain - 1).abs().max() < 1e-9 for c in fix.corrections.values())


def test_shrink_is_for_one_network_and_exact_statistics():
    dense, pruned, data = pruned_pair("vgg11-plain-w0.125")
    for options in ({"method": "simultaneous"}, {"correct": "reshift"}):
        with pytest.raises(ValueError, match="it needs method='sequential'"):
            renorm.renormalize(pruned, dense, data, shrink=True, **options)
    with pytest.raises(ValueError, match="those of one network"):
        renorm.renormalize(pruned, [dense, dense], data, shrink=True)
