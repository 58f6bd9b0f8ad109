"""Structured pruning through permutation groups: what is masked, what is removed, and that both compute the same."""

import pytest
import torch
from cases import CASES, CLASSES, batches, make
from torch import nn
from torchvision.models import mobilenet_v2

from repairlib import channels, pruning, renorm
from repairlib.groups import permutation_spec
from repairlib.recording import eval_mode

ACROSS = ("-ln-",)  # normalise across channels: these can be masked, not removed
REMOVABLE = [name for name in CASES if not any(part in name for part in ACROSS)]


def halves(name, sparsity=0.5, **options):
    model, x = make(name, 0, torch.float64), batches(name, dtype=torch.float64)[0]
    spec = permutation_spec(model, x[:2])
    return model, spec, channels.keep_channels(channels.channel_scores(model, spec), sparsity, **options), x


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", REMOVABLE)
def test_without_its_channels_a_network_computes_what_it_does_with_zeros(name):
    model, spec, kept, x = halves(name)
    masked = pruning.prune(model, channels.channel_masks(model, spec, kept))
    small = channels.remove_channels(model, spec, kept, x)
    assert type(small) is type(model) and count(small) < 0.75 * count(model)
    with eval_mode(model, masked, small):
        torch.testing.assert_close(small(x), masked(x), rtol=1e-9, atol=1e-9)
        assert (small(x) - model(x)).abs().max() > 1e-3
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs = module.weight.shape[:2]
            assert (module.out_channels, module.in_channels) == (outputs, inputs * module.groups)
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)


def test_a_removed_network_is_renormalised_as_the_masked_one():
    model, spec, kept, x = halves("resnet8-bn-w0.5")
    masked = pruning.prune(model, channels.channel_masks(model, spec, kept))
    small = channels.remove_channels(model, spec, kept, x)
    a, b = (renorm.reset(m, x).model for m in (masked, small))
    with eval_mode(a, b):
        torch.testing.assert_close(a(x), b(x), rtol=1e-6, atol=1e-6)


def test_residual_streams_and_depthwise_convolutions_of_torchvision():
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=CLASSES).eval()
    x = torch.randn(2, 3, 32, 32)
    spec = permutation_spec(model, x, verify=False)
    kept = channels.keep_channels(channels.channel_scores(model, spec), 0.5)
    small = channels.remove_channels(model, spec, kept, x)
    assert count(small) < 0.35 * count(model)
    depthwise = [m for m in small.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 17 and all(m.groups == m.in_channels == m.out_channels for m in depthwise)


def test_what_normalises_across_channels_can_be_masked_and_not_removed():
    model, spec, kept, x = halves("resnet8-ln-w0.5")
    with pytest.raises(ValueError, match="normalises across channels"):
        channels.remove_channels(model, spec, kept, x)
    masked = pruning.prune(model, channels.channel_masks(model, spec, kept))
    assert pruning.sparsity_of(masked) > 0.5


def test_a_forward_with_sizes_of_its_own_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).view(-1, 8))

    model, x = Fixed(), torch.randn(2, 4)
    spec = permutation_spec(model, x)
    kept = channels.keep_channels(channels.channel_scores(model, spec), 0.5)
    with pytest.raises(ValueError, match="sizes of its own|something else"):
        channels.remove_channels(model, spec, kept, x)


def test_units_of_the_largest_weights_are_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0])[:, None].expand(4, 3))
    spec = permutation_spec(model, torch.randn(2, 3))
    scores = channels.channel_scores(model, spec)["0"]
    torch.testing.assert_close(scores / scores[0], torch.tensor([1.0, 4.0, 2.0, 3.0]).double())
    assert channels.keep_channels({"0": scores}, 0.5)["0"].tolist() == [1, 3]


def test_every_group_keeps_a_unit_and_global_compares_all():
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 6.0, 7.0, 0.5])}
    assert channels.keep_channels(scores, 0.5, "global") == {"a": torch.tensor([1]), "b": pytest.approx([0, 1, 2])}
    assert {name: len(units) for name, units in channels.keep_channels(scores, 0.9).items()} == {"a": 1, "b": 1}


def test_bad_input_is_refused():
    model, spec, kept, x = halves("mlp3-plain-w8")
    with pytest.raises(ValueError, match="share of the units"):
        channels.keep_channels({}, 1.0)
    with pytest.raises(KeyError, match="no group 'conv9'"):
        channels.channel_masks(model, spec, {"conv9": torch.tensor([0])})
    with pytest.raises(ValueError, match="must keep one unit"):
        channels.remove_channels(model, spec, {next(iter(kept)): torch.tensor([], dtype=torch.int64)}, x)
