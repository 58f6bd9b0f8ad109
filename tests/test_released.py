"""docs/released.py: the ways of the released code that the library itself does not offer."""

import copy
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from cases import batches, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repairlib import interpolate_models, match_activations, reset
from repairlib.matching import solve_assignment
from repairlib.renorm import Repair

_spec = importlib.util.spec_from_file_location("released", Path(__file__).parent.parent / "docs" / "released.py")
released = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(released)


def test_batch_mean_moments_are_the_released_formulas():
    """Each batch's moments with equal weight, unbiased stds averaged; as a reader of the released code writes them."""
    a, b = torch.randn(2, 50, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full, paired = released.BatchMeanMoments("full"), released.BatchMeanMoments("paired")
    parts = list(zip(a.split(20), b.split(20), strict=True))
    for xs in parts:
        full.update(*xs)
        paired.update(*xs)
    rows = [[x.transpose(0, 1).flatten(1) for x in xs] for xs in parts]
    mean, std = (
        [torch.stack([f(pair[k]) for pair in rows]).mean(0) for k in (0, 1)]
        for f in (lambda r: r.mean(1), lambda r: r.std(1))
    )
    outer = torch.stack([x @ y.T / x.shape[1] for x, y in rows]).mean(0)
    corr = (outer - torch.outer(*mean)) / (torch.outer(*std) + 1e-4)
    torch.testing.assert_close(full.corr(eps=1e-4), corr)
    torch.testing.assert_close(paired.corr(eps=1e-4), corr.diagonal())
    torch.testing.assert_close(full.inner(), outer)
    torch.testing.assert_close(full.var(1), torch.stack([y.var(1) for _, y in rows]).mean(0))
    with pytest.raises(ValueError, match="products with network 1 were not gathered"):
        released.BatchMeanMoments().corr()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 100))
def test_greedy_takes_the_largest_first_and_at_least_half_of_the_best(n, seed):
    similarity = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    greedy, exact = released.greedy_assignment(similarity), solve_assignment(similarity)
    at = torch.arange(n)
    assert sorted(greedy.tolist()) == at.tolist()
    assert similarity[at, greedy].max() == similarity.max()
    total = [float(similarity[at, p].sum()) for p in (greedy, exact)]
    assert total[1] / 2 - 1e-6 <= total[0] <= total[1] + 1e-6


def test_simultaneous_batch_mean_is_what_torch_batchnorm_records():
    """The released code: momentum=None BatchNorm in train mode, cumulative mean of unbiased batch variances."""
    name = "vgg11-bn-w0.125"
    a, b = make(name, 0, torch.float64), make(name, 1, torch.float64)
    data = batches(name, dtype=torch.float64)
    mid = interpolate_models(a, b, 0.5)
    with released.batch_means():
        ours = reset(mid, data, method="simultaneous").model
    theirs = copy.deepcopy(mid)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x in data:
            theirs(x)
    for k, v in theirs.state_dict().items():
        if "running" in k:
            torch.testing.assert_close(ours.state_dict()[k], v, rtol=1e-9, atol=1e-12)


def test_batch_means_miss_what_varies_between_batches():
    name = "mlp3-plain-w8"
    a, b, x = make(name, 0), make(name, 1), torch.cat(batches(name, 400))
    exact = match_activations(a, b, x.split(100))
    bias = []
    for size in (20, 200):  # the smaller the batches, the more do stds of batches miss
        with released.batch_means():
            pooled = match_activations(a, b, x.split(size), spec=exact.spec)
        bias.append([pooled.objective[g] - exact.objective[g] for g in exact.objective])
    assert all(abs(small) > abs(large) > 0 for small, large in zip(*bias, strict=True))


def test_batch_means_pool_the_endpoints_too():
    """With one batch, unbiased over unbiased is the ratio that exact pooling gives."""
    name = "mlp3-plain-w8"
    a, b, one = make(name, 0), make(name, 1), [torch.cat(batches(name))]
    exact = Repair(a, b, one, method="simultaneous")
    with released.batch_means():
        pooled = Repair(a, b, one, method="simultaneous")
        with pytest.raises(ValueError, match="two values a channel"):
            Repair(a, b, [*one, one[0][:1]], method="simultaneous")
    n = len(one[0])
    for node, moments in exact.ends.items():
        torch.testing.assert_close(pooled.ends[node].var(1), moments.var(1) * n / (n - 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("correct", ["rescale", "repair", "reshift"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_what_is_recorded_batch_by_batch_against_a_layer_that_wraps_convolutions(correct, unbiased):
    """Qu & Horvath's code: a convolution's output is normalised by its batch while pooled statistics are recorded."""
    name = "vgg11-plain-w0.125"
    a, b, data = make(name, 0, torch.float64), make(name, 1, torch.float64), batches(name, dtype=torch.float64)
    options = {"method": "simultaneous", "correct": correct, "targets": "conv"}
    found = Repair(a, b, data, unbiased=unbiased, **options)(0.5).model
    model = interpolate_models(a, b, 0.5)
    goals = Repair(a, b, data, **options).at(0.5)
    convs = {key: module for key, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    seen: dict = {key: [] for key in convs}

    def corrected(x, mean, var, key):
        goal_mean, goal_std = (each.view(1, -1, 1, 1) for each in goals[key])
        gain = (goal_std / var.sqrt()).where(var > 0, torch.zeros(())) if correct != "reshift" else torch.ones(())
        if correct == "rescale":
            return x * gain
        return (x - mean) * gain + goal_mean

    def record(module, inputs, x, key):
        seen[key].append(x)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=int(unbiased))
        return corrected(x, mean, var, key)

    def apply(module, inputs, x, key):
        whole = torch.cat(seen[key])
        return corrected(x, whole.mean((0, 2, 3), keepdim=True), whole.var((0, 2, 3), keepdim=True, correction=0), key)

    with torch.no_grad():
        hooks = [m.register_forward_hook(functools.partial(record, key=key)) for key, m in convs.items()]
        for x in data:
            model(x)
        for hook in hooks:
            hook.remove()
        for key, module in convs.items():
            module.register_forward_hook(functools.partial(apply, key=key))
        expected, ours = model(data[0]), found(data[0])
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
