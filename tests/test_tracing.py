import pytest
import torch
import torch.nn.functional as F
from cases import inputs, make
from torch import nn

from repairlib import recording, tracing


def test_walk_reads_what_the_network_computes():
    name = "vgg11-bn-w0.125"
    model, x = make(name), inputs(name)
    seen = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, n=n: seen.update({n: o.clone()})) for n, m in model.named_modules()
    ]
    with torch.no_grad():
        expected = model(x)
    for hook in hooks:
        hook.remove()
    net = tracing.trace(model, x)
    with recording.eval_mode(model):
        assert torch.equal(net.run(x), expected)
        convs = [n for n, kind in net.kinds.items() if kind == "conv"]
        values = {n: v.clone() for n, v in net.walk(x, convs)}
    assert list(values) == convs
    for node in convs:
        assert torch.equal(values[node], seen[net.node(node).target])


def test_edits_replace_what_later_nodes_read():
    model = make("mlp1-plain-w6")
    x = inputs("mlp1-plain-w6")
    net = tracing.trace(model, x)
    hidden = next(n for n, kind in net.kinds.items() if kind == "activation")
    with recording.eval_mode(model):
        edited = net.run(x, {hidden: torch.zeros_like})
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    assert torch.equal(edited, last.bias.detach().expand_as(edited))


def test_training_flags_come_back():
    model = make("resnet8-bn-w0.5").train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    tracing.trace(model, inputs("resnet8-bn-w0.5", 2))
    assert model.training and not frozen.training
    assert sum(not m.training for m in model.modules()) == 1


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.first(x))
        return self.second(h) if h.sum() > 0 else self.second(-h)


def test_untraceable_model_names_the_node_it_reached():
    with pytest.raises(tracing.UntraceableModel, match=r"DataDependent.*'(sum_1|gt)'"):
        tracing.trace(DataDependent(), torch.zeros(1, 4))


def test_unknown_node_is_an_error_with_the_nearest():
    net = tracing.trace(make("mlp1-plain-w6"), inputs("mlp1-plain-w6", 2))
    name = next(n for n, k in net.kinds.items() if k == "linear")
    with pytest.raises(KeyError, match=name):
        net.check_names([name + "x"])


def test_a_second_input_is_named():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(tracing.UntraceableModel, match="missing a required argument: 'y'"):
        tracing.trace(Two(), torch.zeros(1, 2))
