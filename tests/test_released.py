"""docs/released.py: the ways of the released code that the library itself does not offer."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from cases import batches, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn

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


@pytest.mark.parametrize("name", ["vgg11-bn-w0.125", "resnet8-bn-w0.5"])
def test_reset_with_batch_means_is_update_bn(name):
    """BatchNorm in train mode with momentum=None: the mean over batches of means and of unbiased variances."""
    a, b = make(name, 0, torch.float64), make(name, 1, torch.float64)
    data = batches(name, dtype=torch.float64)
    theirs = interpolate_models(a, b, 0.5)
    with released.batch_means():
        ours = reset(theirs, data, method="simultaneous").model
    update_bn(data, theirs)
    for key, value in theirs.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        ours, theirs = ours.eval()(data[0]), theirs.eval()(data[0])
    assert (ours - theirs).abs().max() < 1e-8 * theirs.abs().max()


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


class Stage(nn.Module):
    """A convolution that corrects its output, or a BatchNorm, each written from its equation.

    It is "off", or it keeps what it measures: as it is ("record"), normalised by its own batch ("batch"), or no longer,
    normalised by all that was kept ("fixed").
    """

    def __init__(self, layer, correct="repair", eps=0.0, unbiased=False):
        super().__init__()
        self.layer, self.correct, self.eps, self.correction = layer, correct, eps, int(unbiased)
        self.mode, self.seen, self.goal = "off", [], None

    def forward(self, x):
        if self.mode == "off":
            return self.layer(x)
        x = x if self.goal is None else self.layer(x)
        if self.mode != "fixed":
            self.seen.append(x)
        return x if self.mode == "record" else self.normalized(x)

    def statistics(self, x, correction=0):
        return x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=correction)

    def normalized(self, x):
        mean, var = self.statistics(*((torch.cat(self.seen),) if self.mode == "fixed" else (x, self.correction)))
        if self.goal is None:
            weight, bias = (each.view(1, -1, 1, 1) for each in (self.layer.weight, self.layer.bias))
            return (x - mean) / (var + self.layer.eps).sqrt() * weight + bias
        goal_mean, goal_std = self.goal
        gain = goal_std / (var + self.eps).sqrt()
        if not self.eps:
            gain = gain.where(var.sqrt() > 1e-6 * mean.abs(), 1.0)  # a constant channel is shifted only
        return {"repair": (x - mean) * gain + goal_mean, "rescale": x * gain, "reshift": x - mean + goal_mean}[
            self.correct
        ]


def run(model, data, stages, method):
    """Measure all stages at once, or one after the other with a pass through the whole network for each."""
    for group in [[stage] for stage in stages] if method == "sequential" else [stages]:
        for stage in group:
            stage.mode = "record" if method == "sequential" else "batch"
        for x in data:
            model(x)
        for stage in group:
            stage.mode = "fixed"


@torch.no_grad()
def repaired(a, b, data, alpha, convs, method, bn="frozen", average=False, **options):
    """Network between a and b, its convolutions corrected: Jordan et al. 2022, Eqs. 3 and 4; Qu & Horvath, Table 1."""
    networks = []
    for model in (a, b, interpolate_models(a, b, alpha)):
        model, stages = copy.deepcopy(model), {}
        for name, module in [*model.named_modules()]:
            if name in convs or (bn == "reset" and isinstance(module, nn.BatchNorm2d)):
                stages[name] = Stage(module, **(options if name in convs else {}))
                model.set_submodule(name, stages[name])
        networks.append((model, stages))
    *ends, (middle, stages) = networks
    for model, theirs in ends:
        run(model, data, [stage for name, stage in theirs.items() if name not in convs], method)
        hooks = [theirs[name].register_forward_hook(lambda stage, _, x: stage.seen.append(x)) for name in convs]
        for x in data:
            model(x)
        for hook in hooks:
            hook.remove()
    for name in convs:
        (mean_a, var_a), (mean_b, var_b) = (theirs[name].statistics(torch.cat(theirs[name].seen)) for _, theirs in ends)
        std = (1 - alpha) * var_a.sqrt() + alpha * var_b.sqrt()
        stages[name].goal = (1 - alpha) * mean_a + alpha * mean_b, std.mean() if average else std
    run(middle, data, list(stages.values()), method)
    return middle


WAYS = {
    "REPAIR": {"correct": "repair"},
    "RESCALE": {"correct": "rescale"},
    "RESCALE (average)": {"correct": "rescale", "average": True},
    "RESHIFT": {"correct": "reshift"},
    "REPAIR, eps": {"correct": "repair", "eps": 1e-5},
    "RESCALE, eps": {"correct": "rescale", "eps": 1e-5},
}


@pytest.mark.parametrize("method", ["sequential", "simultaneous", "unbiased"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "bn"), [("vgg11-bn-w0.125", "frozen"), ("resnet8-bn-w0.5", "reset")])
def test_every_way_against_a_layer_that_wraps_convolutions(name, way, method, bn):
    """In float64, so close that an eps of 1e-5 shows: logits to 1e-4 would not tell it from none."""
    a, b, data = make(name, 0, torch.float64), make(name, 1, torch.float64), batches(name, 30, 12, torch.float64)
    convs = [key for key, module in a.named_modules() if isinstance(module, nn.Conv2d)]
    if "resnet" in name:  # the released code wraps the two convolutions of each block only
        convs = [key for key in convs if key.endswith((".conv1", ".conv2"))]
    options = WAYS[way] | ({"unbiased": True} if method == "unbiased" else {})
    options |= {"method": method.replace("unbiased", "simultaneous"), "bn": bn}
    targets = "inner" if "resnet" in name else "conv"
    expected = repaired(a, b, data, 0.3, convs, **options)
    found = Repair(a, b, data, targets=targets, **options)(0.3)
    assert len(found.corrections) == len(convs)
    with torch.no_grad():
        ours, theirs = found.model(data[0]), expected(data[0])
    assert (ours - theirs).abs().max() < 1e-8 * theirs.abs().max()


@pytest.mark.parametrize("method", ["sequential", "simultaneous"])
def test_reset_is_every_batchnorm_measured(method):
    """One after the other from pooled statistics, or all at once while each normalises by its batch."""
    name = "resnet8-bn-w0.5"
    model, data = make(name, 0, torch.float64), batches(name, dtype=torch.float64)
    with torch.no_grad():
        theirs = repaired(model, model, data, 0.0, [], method, bn="reset")(data[0])
        ours = reset(model, data, method=method).model(data[0])
    assert (ours - theirs).abs().max() < 1e-8 * theirs.abs().max()
