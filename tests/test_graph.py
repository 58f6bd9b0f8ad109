import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import CASES, inputs, make
from torch import nn

from repairlib import graph, matching, models


@pytest.mark.parametrize("name", CASES)
def test_permuted_network_equals_the_original(name):
    model = make(name)
    spec = graph.permutation_spec(model, inputs(name, 2), verify=False)
    for seed in range(2):
        assert graph.invariance_error(model, spec, inputs(name, 2), seed) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_every_hidden_unit_is_in_exactly_one_group(name):
    """Counted from the model: outgoing axes of all hidden layers, residual layers sharing their stream's group."""
    model = make(name)
    spec = graph.permutation_spec(model, inputs(name, 2))
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    owners = {
        layer: [g.name for g in spec.groups if any(a.tensor == f"{layer}.weight" and a.axis == 0 for a in g.axes)]
        for layer in layers
    }
    last = next(n for n, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear))
    assert owners.pop(last) == []
    assert all(len(groups) == 1 for groups in owners.values())
    for group in spec.groups:
        assert set(group.taps) == {"pre", "post"}


def test_number_of_groups_of_known_networks():
    # ResNet20: one stream a stage, one inner group a block. VGG16: one a convolution. MLP: one a hidden layer.
    for name, groups in {
        "resnet20-bn-w0.25": 3 + 9,
        "vgg16-plain-w0.125": 13,
        "mlp3-plain-w8": 3,
        "resnet18-bn-w0.125": 4 + 8,
    }.items():
        assert len(graph.permutation_spec(make(name), inputs(name, 2)).groups) == groups


def test_residual_stream_is_read_at_the_end_of_its_last_block():
    name = "resnet20-bn-w0.25"
    model = make(name)
    spec, net = graph.permutation_spec(model, inputs(name, 2)), graph.trace(model, inputs(name, 2))
    order = [node.name for node in net.nodes]
    last_add = [n for n in order if net.kinds[n] == "add"][-1]
    stream = max(spec.groups, key=lambda g: order.index(g.taps["post"]))
    assert stream.taps["pre"] == last_add
    assert stream.taps["post"] == order[order.index(last_add) + 1]


@pytest.mark.parametrize("name", ["mlp2-bn-w8", "resnet8-bn-w0.5"])
def test_compose_with_the_inverse_is_the_identity(name):
    model = make(name)
    spec = graph.permutation_spec(model, inputs(name, 2))
    p, q = graph.random_permutation(spec, 1), graph.random_permutation(spec, 2)
    for group, perm in graph.compose(p, graph.invert(p)).items():
        assert perm.tolist() == list(range(spec[group].size))
    state = model.state_dict()
    two_steps = graph.permute_state(graph.permute_state(state, spec, p), spec, q)
    one_step = graph.permute_state(state, spec, graph.compose(p, q))
    assert all(torch.equal(two_steps[k], one_step[k]) for k in state)
    back = graph.permute_state(two_steps, spec, graph.invert(graph.compose(p, q)))
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_permuting_leaves_the_model_untouched():
    name = "resnet8-bn-w0.5"
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = graph.permutation_spec(model, inputs(name, 2))
    graph.permute(model, spec, graph.random_permutation(spec))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_permutation_is_refused():
    model = make("mlp1-plain-w6")
    spec = graph.permutation_spec(model, inputs("mlp1-plain-w6", 2))
    with pytest.raises(ValueError, match="not a permutation of its 6 units"):
        graph.permute_state(model.state_dict(), spec, {spec.groups[0].name: torch.zeros(6, dtype=torch.int64)})


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
    net = graph.trace(model, x)
    with graph.eval_mode(model):
        assert torch.equal(net.run(x), expected)
        convs = [n for n, kind in net.kinds.items() if kind == "conv"]
        values = {n: v.clone() for n, v in net.walk(x, convs)}
    assert list(values) == convs
    for node in convs:
        assert torch.equal(values[node], seen[net.node(node).target])


def test_edits_replace_what_later_nodes_read():
    model = make("mlp1-plain-w6")
    x = inputs("mlp1-plain-w6")
    net = graph.trace(model, x)
    hidden = next(n for n, kind in net.kinds.items() if kind == "activation")
    with graph.eval_mode(model):
        edited = net.run(x, {hidden: torch.zeros_like})
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    assert torch.equal(edited, last.bias.detach().expand_as(edited))


def test_training_flags_come_back():
    model = make("resnet8-bn-w0.5").train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    graph.trace(model, inputs("resnet8-bn-w0.5", 2))
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
    with pytest.raises(graph.UntraceableModel, match=r"DataDependent.*'(sum_1|gt)'"):
        graph.trace(DataDependent(), torch.zeros(1, 4))


class NoRule(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.cumsum(self.first(x), 1).mean((2, 3)))


def test_operation_without_a_rule_names_the_node():
    with pytest.raises(graph.UnsupportedNode, match="'cumsum'.*no permutation rule"):
        graph.permutation_spec(NoRule(), torch.zeros(1, 1, 8, 8))
    recurrent = nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 4))
    with pytest.raises(graph.UnsupportedNode, match="'_1'.*no permutation rule for GRU"):
        graph.permutation_spec(recurrent, torch.zeros(1, 5, 3))
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(graph.UnsupportedNode, match="'_1'.*ConvTranspose2d.*in groups"):
        graph.permutation_spec(grouped, torch.zeros(1, 1, 8, 8))


def test_wrong_groups_do_not_pass_the_check():
    """The check must see a forgotten axis even where fresh BatchNorm layers hold only ones and zeros."""
    name = "mlp2-bn-w8"
    torch.manual_seed(0)
    model = models.build(name, shape=CASES[name], classes=3)
    spec = graph.permutation_spec(model, inputs(name, 2))
    group = spec.groups[0]
    for axis in group.axes:
        kept = tuple(a for a in group.axes if a is not axis)
        damaged = graph.PermutationSpec((graph.Group(group.name, group.size, kept, group.taps), *spec.groups[1:]))
        assert graph.invariance_error(model, damaged, inputs(name, 2)) > 1e-4, axis.tensor


def test_flatten_of_maps_repeats_units():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2))
    (group,) = graph.permutation_spec(model, torch.zeros(2, 1, 8, 8)).groups
    assert group.axes[-1].tensor == "3.weight" and group.axes[-1].positions.shape == (3, 36)


def test_shared_module_is_tied_to_itself():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = F.relu(self.first(x))
            return self.last(F.relu(self.again(F.relu(self.again(h)))))

    (group,) = graph.permutation_spec(Twice(), torch.zeros(2, 3)).groups
    assert {(a.tensor, a.axis) for a in group.axes} >= {("again.weight", 0), ("again.weight", 1), ("first.weight", 0)}


def test_spec_prints_as_a_table():
    text = str(graph.permutation_spec(make("mlp3-plain-w8"), inputs("mlp3-plain-w8", 2)))
    assert text.splitlines()[0].split()[:3] == ["group", "size", "tap"]
    assert len(text.splitlines()) == 4


def test_unknown_node_is_an_error_with_the_nearest():
    net = graph.trace(make("mlp1-plain-w6"), inputs("mlp1-plain-w6", 2))
    name = next(n for n, k in net.kinds.items() if k == "linear")
    with pytest.raises(KeyError, match=name):
        net.check_names([name + "x"])


OTHER_SIZES = (
    "resnet44-plain-w0.125", "resnet56-bn-w0.125", "resnet110-bn-w0.125", "vgg13-plain-w0.125", "vgg19-plain-w0.125",
    "vgg16-bn-w0.125", "mlp20-bn-w16", "resnet32-plain-w0.125-sc1",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_the_other_sizes_of_every_family(name):
    model = models.build(name, shape=(1, 16, 16), classes=3)
    spec = graph.permutation_spec(model, torch.zeros(2, 1, 16, 16), verify=False)
    assert graph.invariance_error(model, spec, torch.zeros(2, 1, 16, 16)) < 1e-10


def test_tied_weights_are_permuted_under_all_their_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first, self.second, self.last = (
                nn.Linear(*size) for size in ((3, 4), (4, 4), (4, 4), (4, 2))
            )
            self.second.weight = self.first.weight

        def forward(self, x):
            for layer in (self.stem, self.first, self.second):
                x = F.relu(layer(x))
            return self.last(x)

    (group,) = graph.permutation_spec(Tied(), torch.zeros(2, 3)).groups
    named = {(axis.tensor, axis.axis) for axis in group.axes}
    assert named >= {(f"{layer}.weight", axis) for layer in ("first", "second") for axis in (0, 1)}


def test_computed_weights_are_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(graph.UnsupportedNode, match="'0.weight' is no parameter but computed"):
        graph.permutation_spec(net, torch.zeros(2, 3))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.first(x))
        return {"logits": F.log_softmax(self.second(h), 1), "both": (self.second(h), x)}


def test_outputs_in_containers_and_softmax():
    (group,) = graph.permutation_spec(Several(), torch.zeros(2, 3)).groups
    assert group.size == 4


def test_a_second_input_is_named():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(graph.UntraceableModel, match="second input, 'y'"):
        graph.trace(Two(), torch.zeros(1, 2))


class Shuffle(nn.Module):
    """ShuffleNet's operation: channels of two branches interleaved."""

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Branches(nn.Module):
    """Half of the channels pass, the other half is convolved (ShuffleNet v2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)

    def forward(self, x):
        keep, change = x.chunk(2, dim=1)
        return torch.cat((keep, self.conv(change)), dim=1)


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


class Dense(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class Squeeze(nn.Module):
    """Squeeze and excitation, with a layer scale."""

    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.scale * x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class ChannelsLast(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x):
        return self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


# what the body is, and the groups that it must have: sizes in order of the first layer that makes them
OPERATIONS = {
    "depthwise": (lambda: [conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), conv(8, 6)], [8, 6]),
    "depthwise, two outputs a channel": (
        lambda: [conv(3, 8), nn.ReLU(), conv(8, 16, groups=8), nn.ReLU(), conv(16, 6)],
        [8, 6],
    ),
    "grouped: blocks": (lambda: [conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 6)], [4, 6]),
    "concatenation": (lambda: [conv(3, 4), Dense(4, 3), Dense(7, 3), conv(10, 6)], [4, 3, 3, 6]),
    "shuffle": (lambda: [conv(3, 8), Shuffle(), conv(8, 6)], [8, 6]),
    "split": (lambda: [conv(3, 8), Branches(8), Shuffle(), conv(8, 6)], [4, 4, 4, 6]),
    "squeeze and excitation": (lambda: [conv(3, 8), Squeeze(8), conv(8, 6)], [8, 2, 6]),
    "group norm": (lambda: [conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 6)], [4, 4, 6]),
    "group norm of one group": (lambda: [conv(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), conv(8, 6)], [8, 6]),
    "channels last": (lambda: [conv(3, 8), ChannelsLast(8), conv(8, 6)], [8, 8, 6]),
    "residual": (lambda: [conv(3, 6), Residual(conv(6, 8), nn.ReLU(), conv(8, 6))], [6, 8]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rules_of_operations(name):
    body, sizes = OPERATIONS[name]
    torch.manual_seed(0)
    model = nn.Sequential(*body(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    spec = graph.permutation_spec(model, torch.zeros(2, 3, 6, 6))
    assert [group.size for group in spec.groups] == sizes
    assert graph.invariance_error(model, spec, torch.zeros(2, 3, 6, 6), seed=3) < 1e-10


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_recover_a_planted_permutation(name):
    torch.manual_seed(0)
    body, _ = OPERATIONS[name]
    model = nn.Sequential(*body(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    data = [torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))]
    spec = graph.permutation_spec(model, data[0][:2])
    planted = graph.random_permutation(spec, 3)
    found = matching.match_activations(model, graph.permute(model, spec, planted), data)
    for group, perm in graph.invert(planted).items():
        dead = found.correlation[group].abs() < 0.5
        assert torch.equal(found.permutation[group][~dead], perm[~dead]) and not dead.all()


TORCHVISION = (
    "resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "densenet121",
    "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0",
)  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name):
    model = torchvision.models.get_model(name, weights=None)
    example = torch.zeros(2, 3, 64, 64)
    spec = graph.permutation_spec(model, example, verify=False)
    assert graph.invariance_error(model, spec, example) < 1e-8
    assert all(set(group.taps) == {"pre", "post"} for group in spec.groups)
