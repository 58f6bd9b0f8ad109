"""WoodFisher against the exact inverse, the Woodbury recursion of its paper, and the exact loss of a quadratic."""

import pytest
import torch
import torch.nn.functional as F
from cases import batches, make
from torch import nn

from repairlib import pruning
from repairlib.woodfisher import WoodFisher

LAMBDA = 1e-3


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return net, [(torch.randn(24, 5).double(), torch.randint(3, (24,)))]


def gradients(net, data, name, batch=1):
    """Gradients of the mean losses of small batches, (batches, weights)."""
    (x, y), weight = data[0], net.get_parameter(name)
    parts = zip(x.split(batch), y.split(batch), strict=True)
    return torch.stack([torch.autograd.grad(F.cross_entropy(net(a), b), weight)[0].flatten() for a, b in parts])


def exact(net, data, name, batch=1):
    g = gradients(net, data, name, batch)
    return torch.linalg.inv(LAMBDA * torch.eye(g.shape[1]).double() + g.T @ g / len(g))


def woodbury(net, data, name):
    """The recursion of Singh & Alistarh 2020, Eq. 9."""
    g = gradients(net, data, name)
    inverse = torch.eye(g.shape[1]).double() / LAMBDA
    for row in g:
        v = inverse @ row
        inverse = inverse - torch.outer(v, v) / (len(g) + row @ v)
    return inverse


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)  # the inverse is kept in float32


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_and_update_of_whole_layers_are_those_of_the_exact_inverse(small, batch):
    net, data = small
    fisher = WoodFisher(net, data, block=1000, batch=batch, damping=LAMBDA)
    masks = pruning.mask_smallest(fisher.scores(), 0.4)
    for name, scores in fisher.scores().items():
        inverse, w = exact(net, data, name, batch), net.get_parameter(name).detach().flatten()
        close(scores.flatten(), w**2 / (2 * inverse.diagonal()))
        gone = ~masks[name].flatten()
        independent = w - inverse[:, gone] @ (w[gone] / inverse.diagonal()[gone])
        joint = w - inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], w[gone])
        close(fisher.update(masks)[name].flatten(), independent.masked_fill(gone, 0))
        close(fisher.update(masks, "joint")[name].flatten(), joint.masked_fill(gone, 0))
        assert joint[gone].abs().max() < 1e-9  # the joint change makes the masked weights zero by itself


def test_the_inverse_is_that_of_the_papers_recursion(small):
    net, data = small
    fisher = WoodFisher(net, data, block=1000, damping=LAMBDA)
    for name in fisher.weights:
        w = net.get_parameter(name).detach().flatten()
        close(fisher.scores()[name].flatten(), w**2 / (2 * woodbury(net, data, name).diagonal()))


@pytest.mark.parametrize("block", [1, 4, 7])
def test_blocks_are_those_of_the_whole_matrix(small, block):
    net, data = small
    fisher = WoodFisher(net, data, block=block, damping=LAMBDA)
    for name, scores in fisher.scores().items():
        g, w = gradients(net, data, name), net.get_parameter(name).detach().flatten()
        expected = []
        for part, weights in zip(g.split(block, 1), w.split(block), strict=True):
            matrix = LAMBDA * torch.eye(len(weights)).double() + part.T @ part / len(g)
            expected.append(weights**2 / (2 * torch.linalg.inv(matrix).diagonal()))
        close(scores.flatten(), torch.cat(expected))


def test_results_do_not_depend_on_batches_and_the_number_of_gradients_is_kept(small):
    net, [(x, y)] = small
    whole = WoodFisher(net, [(x, y)], block=8)
    parts = WoodFisher(net, zip(x.split(5), y.split(5), strict=True), block=8)
    for name, scores in whole.scores().items():
        torch.testing.assert_close(parts.scores()[name], scores)
    assert whole.samples == 24 and WoodFisher(net, [(x, y)], samples=10).samples == 10
    first = WoodFisher(net, [(x[:10], y[:10])])
    torch.testing.assert_close(WoodFisher(net, [(x, y)], samples=10).scores(), first.scores())


def test_the_joint_update_loses_least_of_a_quadratic(small):
    """Among all changes that make the masked weights zero, the joint one has the least ``d^T F d / 2``."""
    net, data = small
    fisher = WoodFisher(net, data, block=1000, damping=LAMBDA)
    masks = pruning.mask_smallest(fisher.scores(), 0.5)
    for name, mask in masks.items():
        matrix, w = torch.linalg.inv(exact(net, data, name)), net.get_parameter(name).detach().flatten()
        gone = ~mask.flatten()
        losses = {}
        for how in ("joint", "independent", "none"):
            new = w.masked_fill(gone, 0) if how == "none" else fisher.update(masks, how)[name].flatten()
            losses[how] = float((new - w) @ matrix @ (new - w) / 2)
        assert losses["joint"] <= min(losses.values()) * (1 + 1e-3)


def test_a_network_is_pruned_and_left_as_it_was():
    model = make("vgg11-bn-w0.125").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.cat(batches("vgg11-bn-w0.125"))[:20]
    fisher = WoodFisher(model, [(x, torch.arange(20) % 5)], block=50)
    masks = pruning.mask_smallest(fisher.scores(), 0.9)
    pruned = pruning.prune(model, masks, fisher.update(masks))
    assert pruning.sparsity_of(pruned) == pytest.approx(0.9, abs=1e-3)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options,message", [
    ({"block": 0}, "at least 1"), ({"samples": 0}, "at least 1"), ({"damping": 0.0}, "damping must be positive"),
])  # fmt: skip
def test_bad_options_are_refused(small, options, message):
    with pytest.raises(ValueError, match=message):
        WoodFisher(*small, **options)


def test_bad_data_is_refused(small):
    net, [(x, y)] = small
    with pytest.raises(ValueError, match="no examples"):
        WoodFisher(net, [])
    with pytest.raises(ValueError, match=r"needs batches \(x, y\)"):
        WoodFisher(net, [x])
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        WoodFisher(nn.ReLU(), [(x, y)])
    fisher = WoodFisher(net, [(x, y)])
    with pytest.raises(ValueError, match="the nearest is 'joint'"):
        fisher.update({}, "jont")
    with pytest.raises(ValueError, match="unknown weight '0.bias'"):
        fisher.update({"0.bias": torch.ones(6)})
