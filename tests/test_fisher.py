"""Fisher information against gradients that are computed one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from cases import batches, make
from torch import nn

from repairlib import fisher

NETWORKS = ("mlp3-plain-w8", "vgg11-bn-w0.125", "resnet8-ln-w0.5")


def direct(model, x, weigh):
    """``E_x sum_k w_k(x) (d f_k / d theta)^2`` for the pairs (w_k, f_k) that `weigh` makes of an example's logits."""
    model = model.double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        for weight, value in weigh(i, model(x[i : i + 1].double())[0]):
            for name, g in zip(total, torch.autograd.grad(value, model.parameters(), retain_graph=True), strict=True):
                total[name] += weight * g**2 / len(x)
    return total


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[name], **(tolerance or {"rtol": 1e-9, "atol": 1e-15}))


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_of_the_data_and_logits(name):
    model, x = make(name).double(), torch.cat(batches(name))[:12].double()
    y = torch.arange(12) % 5
    found = fisher.diagonal_fisher(model, [(x, y)], "data")
    assert_same(found, direct(model, x, lambda i, z: [(1, F.log_softmax(z, 0)[y[i]])]))
    found = fisher.diagonal_fisher(model, x, "logits")
    assert_same(found, direct(model, x, lambda i, z: [(1, value) for value in z]))


def test_sampled_labels_estimate_the_expectation_over_the_networks_own_labels():
    model, x = make("mlp3-plain-w8").double(), torch.cat(batches("mlp3-plain-w8"))[:8].double()
    expected = direct(
        model, x, lambda i, z: [(z.softmax(0)[k].detach(), F.log_softmax(z, 0)[k]) for k in range(len(z))]
    )
    often = x.repeat(250, *[1] * (x.ndim - 1))
    found = fisher.diagonal_fisher(model, often)
    sums = [sum(float(values.sum()) for values in each.values()) for each in (found, expected)]
    assert sums[0] == pytest.approx(sums[1], rel=0.1)  # 2,000 draws
    other = fisher.diagonal_fisher(model, x, seed=1)
    assert any((other[key] != value).any() for key, value in fisher.diagonal_fisher(model, x).items())


@pytest.mark.parametrize("labels", fisher.LABELS)
def test_no_split_into_batches_changes_it(labels):
    model, x = make("vgg11-bn-w0.125").double().train(), torch.cat(batches("vgg11-bn-w0.125"))[:20].double()
    y = torch.arange(20) % 5
    whole = fisher.diagonal_fisher(model, [(x, y)], labels)
    for sizes in ([1, 19], [8, 9, 3]):
        assert_same(
            fisher.diagonal_fisher(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), labels), whole
        )
    assert_same(fisher.diagonal_fisher(model, [(torch.cat([x, x]), torch.cat([y, y]))], labels, limit=20), whole)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_float32_differs_by_rounding():
    model, x = make("mlp3-plain-w8"), torch.cat(batches("mlp3-plain-w8"))
    low = fisher.diagonal_fisher(model, x, "logits")
    assert_same(low, fisher.diagonal_fisher(model.double(), x, "logits"), rtol=1e-3, atol=1e-7)


def test_of_a_linear_softmax_by_hand():
    """``(p_k - [y = k])^2 x_j^2``."""
    net, x, y = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    found = fisher.diagonal_fisher(net, [(x, y)], "data")
    error = net(x).softmax(1) - F.one_hot(y, 2)
    assert_same(found, {"weight": (error**2).T @ x**2 / 5, "bias": (error**2).mean(0)})


def test_refuses_what_it_cannot_measure():
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="nearest is 'sampled'"):
        fisher.diagonal_fisher(net, torch.randn(4, 3), "sample")
    with pytest.raises(ValueError, match="have no y: use labels='sampled'"):
        fisher.diagonal_fisher(net, torch.randn(4, 3), "data")
    with pytest.raises(ValueError, match="no examples"):
        fisher.diagonal_fisher(net, [], "logits")
    with pytest.raises(ValueError, match=r"\(n, classes\), not of shape \(1, 5, 2\)"):
        fisher.diagonal_fisher(net, torch.randn(4, 5, 3))
