import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import CASES, inputs, make
from torch import nn
from torchvision.models import convnext, swin_transformer

import repairlib
from companion.runs import models
from repairlib import groups, matching, permutations, tracing


@pytest.mark.parametrize("name", CASES)
def test_permuted_network_equals_the_original(name):
    model = make(name)
    spec = groups.permutation_spec(model, inputs(name, 2), verify=False)
    for seed in range(2):
        assert groups.invariance_error(model, spec, inputs(name, 2), seed) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_every_hidden_unit_is_in_exactly_one_group(name):
    """Counted from the model: outgoing axes of all hidden layers, residual layers sharing their stream's group."""
    model = make(name)
    spec = groups.permutation_spec(model, inputs(name, 2))
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
    for name, count in {
        "resnet20-bn-w0.25": 3 + 9,
        "vgg16-plain-w0.125": 13,
        "mlp3-plain-w8": 3,
        "resnet18-bn-w0.125": 4 + 8,
    }.items():
        assert len(groups.permutation_spec(make(name), inputs(name, 2)).groups) == count


def test_residual_stream_is_read_at_the_end_of_its_last_block():
    name = "resnet20-bn-w0.25"
    model = make(name)
    spec, net = groups.permutation_spec(model, inputs(name, 2)), tracing.trace(model, inputs(name, 2))
    order = [node.name for node in net.nodes]
    last_add = [n for n in order if net.kinds[n] == "add"][-1]
    stream = max(spec.groups, key=lambda g: order.index(g.taps["post"]))
    assert stream.taps["pre"] == last_add
    assert stream.taps["post"] == order[order.index(last_add) + 1]


class NoRule(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.cumsum(self.first(x), 1).mean((2, 3)))


def test_operation_without_a_rule_names_the_node():
    with pytest.raises(groups.UnsupportedNode, match="'cumsum'.*no permutation rule"):
        groups.permutation_spec(NoRule(), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("operation", [torch.cumsum, torch.cumprod, torch.logcumsumexp, torch.sort])
def test_operations_that_see_the_order_of_units_are_refused(operation):
    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            found = operation(self.first(x), 1)
            return self.last(found[0] if operation is torch.sort else found)

    with pytest.raises((groups.UnsupportedNode, tracing.UntraceableModel), match="node '"):
        groups.permutation_spec(Ordered(), torch.zeros(2, 3))


def test_wrong_groups_do_not_pass_the_check():
    """The check must see a forgotten axis even where fresh BatchNorm layers hold only ones and zeros."""
    name = "mlp2-bn-w8"
    torch.manual_seed(0)
    model = models.build(name, shape=CASES[name], classes=3)
    spec = groups.permutation_spec(model, inputs(name, 2))
    group = spec.groups[0]
    for axis in group.axes:
        kept = tuple(a for a in group.axes if a is not axis)
        damaged = groups.PermutationSpec((groups.Group(group.name, group.size, kept, group.taps), *spec.groups[1:]))
        assert groups.invariance_error(model, damaged, inputs(name, 2)) > 1e-4, axis.tensor


@pytest.mark.parametrize(
    "end",
    [
        lambda y: 0 * y,
        lambda y: torch.sigmoid(1e6 * y.square() + 1e6),  # saturated: 1 whatever y is
        lambda y: y / 0,
        lambda y: torch.sqrt(-1 - y.square()),
    ],
)
def test_an_output_that_tells_nothing_verifies_nothing(end):
    class Mute(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return end(self.last(F.relu(self.first(x))))

    spec = groups.permutation_spec(Mute(), torch.zeros(2, 3), verify=False)
    assert groups.invariance_error(Mute(), spec, torch.zeros(2, 3)) == torch.inf
    with pytest.raises(groups.SpecError, match="cannot be verified"):
        groups.permutation_spec(Mute(), torch.zeros(2, 3))


def test_the_check_runs_on_two_inputs():
    model, shapes = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), []
    spec = groups.permutation_spec(model, torch.zeros(1, 3), verify=False)
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    assert groups.invariance_error(model, spec, torch.zeros(1, 3)) < 1e-10
    assert shapes == [(2, 3), (2, 3)]  # before and after


def test_statistics_of_normalisation_are_checked():
    """Also where a deep network without the right statistics would forget its input."""
    model = torchvision.models.efficientnet_b0(num_classes=3)
    spec = groups.permutation_spec(model, torch.zeros(1, 3, 32, 32))
    for tensor in ("features.1.0.block.0.1.running_mean", "features.7.0.block.3.1.running_var"):
        forgetful = tuple(
            groups.Group(g.name, g.size, tuple(a for a in g.axes if a.tensor != tensor)) for g in spec.groups
        )
        assert groups.invariance_error(model, groups.PermutationSpec(forgetful), torch.zeros(1, 3, 32, 32)) > 1e-4


def test_flatten_of_maps_repeats_units():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2))
    (group,) = groups.permutation_spec(model, torch.zeros(2, 1, 8, 8)).groups
    assert group.axes[-1].tensor == "3.weight" and group.axes[-1].positions.shape == (3, 36)


def test_shared_module_is_tied_to_itself():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = F.relu(self.first(x))
            return self.last(F.relu(self.again(F.relu(self.again(h)))))

    (group,) = groups.permutation_spec(Twice(), torch.zeros(2, 3)).groups
    assert {(a.tensor, a.axis) for a in group.axes} >= {("again.weight", 0), ("again.weight", 1), ("first.weight", 0)}


def test_spec_prints_as_a_table():
    text = str(groups.permutation_spec(make("mlp3-plain-w8"), inputs("mlp3-plain-w8", 2)))
    assert text.splitlines()[0].split()[:3] == ["group", "size", "tap"]
    assert len(text.splitlines()) == 4


OTHER_SIZES = (
    "resnet44-plain-w0.125", "resnet56-bn-w0.125", "resnet110-bn-w0.125", "vgg13-plain-w0.125", "vgg19-plain-w0.125",
    "vgg16-bn-w0.125", "mlp20-bn-w16", "resnet32-plain-w0.125-sc1",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_the_other_sizes_of_every_family(name):
    model = models.build(name, shape=(1, 16, 16), classes=3)
    spec = groups.permutation_spec(model, torch.zeros(2, 1, 16, 16), verify=False)
    assert groups.invariance_error(model, spec, torch.zeros(2, 1, 16, 16)) < 1e-10


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

    (group,) = groups.permutation_spec(Tied(), torch.zeros(2, 3)).groups
    named = {(axis.tensor, axis.axis) for axis in group.axes}
    assert named >= {(f"{layer}.weight", axis) for layer in ("first", "second") for axis in (0, 1)}


def test_computed_weights_are_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(groups.UnsupportedNode, match="'0.weight' is no parameter but computed"):
        groups.permutation_spec(net, torch.zeros(2, 3))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.first(x))
        return {"logits": F.log_softmax(self.second(h), 1), "both": (self.second(h), x)}


def test_outputs_in_containers_and_softmax():
    (group,) = groups.permutation_spec(Several(), torch.zeros(2, 3)).groups
    assert group.size == 4


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


class Functional(nn.Module):
    """Layers as functions of parameters. LayerNorm and the linear layer share a bias, which ties their units."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, channels, 3, 3))
        self.scale, self.shift = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.matrix, self.bias = nn.Parameter(torch.randn(outputs, outputs)), nn.Parameter(torch.rand(outputs))
        self.shape = (outputs,)

    def forward(self, x):
        x = F.batch_norm(x, self.mean, self.var, self.scale, bias=self.shift)
        x = F.conv2d(F.group_norm(x, 1), self.kernel, padding=1)
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.shape, bias=self.bias)
        return F.linear(F.mish(x), self.matrix, self.bias).permute(0, 3, 1, 2)


class Mask(nn.Module):
    """Attention to positions: one value for all channels, from their mean and maximum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class ZeroChannels(nn.Module):
    """A shortcut without weights: new channels are zero."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = conv(inputs, outputs)

    def forward(self, x):
        extra = self.conv.out_channels - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, extra // 2, extra - extra // 2)) + self.conv(x)


class Scalars(nn.Module):
    """Fixup's biases and multipliers, one number each, and what else may act on every element alike."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)
        self.shift, self.scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.scale * self.conv(F.relu(x + self.shift)) - self.shift
        return torch.clamp(torch.maximum(y, -x) / 2 + (x - 1) ** 2, max=50)


class Frozen(nn.Module):
    """torchvision's FrozenBatchNorm2d: its buffers are reshaped and combined before they meet the activation."""

    def __init__(self, channels):
        super().__init__()
        self.norm = torchvision.ops.FrozenBatchNorm2d(channels)

    def forward(self, x):
        return self.norm(x)


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
    "prelu": (lambda: [conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU()], [8, 6]),
    "functional": (lambda: [conv(3, 8), Functional(8, 7), conv(7, 6)], [8, 7, 6]),
    "mask over positions": (lambda: [conv(3, 8), Mask(), conv(8, 6)], [8, 6]),
    "zero channels": (lambda: [conv(3, 4), ZeroChannels(4, 8), conv(8, 6)], [4, 4, 6]),
    "scalars": (lambda: [conv(3, 8), Scalars(8), conv(8, 6)], [8, 6]),
    "frozen norm": (lambda: [conv(3, 8), Frozen(8), nn.ReLU(), conv(8, 6)], [8, 6]),
    "instance norm": (lambda: [conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 6)], [8, 6]),
    "transposed": (lambda: [conv(3, 8), nn.ConvTranspose2d(8, 7, 2, stride=2), nn.ReLU(), conv(7, 6)], [8, 7, 6]),
    "upsampling": (lambda: [conv(3, 8), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), conv(8, 6)], [8, 6]),
    "pixel shuffle: blocks": (lambda: [conv(3, 16), nn.PixelShuffle(2), conv(4, 6)], [4, 6]),
    "from vectors to maps": (
        lambda: [nn.Flatten(), nn.Linear(108, 36), nn.Unflatten(1, (4, 3, 3)), conv(4, 6)],
        [4, 6],
    ),
    "softmax over channels": (lambda: [conv(3, 8), nn.Softmax(1), conv(8, 6)], [8, 6]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rules_of_operations(name):
    body, sizes = OPERATIONS[name]
    torch.manual_seed(0)
    model = nn.Sequential(*body(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    spec = groups.permutation_spec(model, torch.zeros(2, 3, 6, 6))
    assert [group.size for group in spec.groups] == sizes
    assert groups.invariance_error(model, spec, torch.zeros(2, 3, 6, 6), seed=3) < 1e-10


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_recover_a_planted_permutation(name):
    torch.manual_seed(0)
    body, _ = OPERATIONS[name]
    model = nn.Sequential(*body(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    data = [torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))]
    spec = groups.permutation_spec(model, data[0][:2])
    planted = permutations.random_permutation(spec, 3)
    found = matching.match_activations(model, permutations.permute(model, spec, planted), data)
    for group, perm in permutations.invert(planted).items():
        dead = found.correlation[group].abs() < 0.5
        assert torch.equal(found.permutation[group][~dead], perm[~dead]) and not dead.all()


class Heads(nn.Module):
    """Attention written out, in one of several ways."""

    def __init__(self, way, width, heads):
        super().__init__()
        self.way, self.heads = way, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == "function":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "einsum":
            y = torch.einsum("nhij, nhjd -> nhid", torch.einsum("nhid,nhjd->nhij", q, k).softmax(-1), v)
        else:
            y = ((q / 2) @ k.transpose(-2, -1)).softmax(-1).matmul(v)
        return self.out(y.transpose(1, 2).reshape(n, tokens, width))


class Module(nn.Module):
    """nn.MultiheadAttention, also with keys and values of another size."""

    def __init__(self, width, heads, weights=False, **options):
        super().__init__()
        self.key = nn.Linear(width, options.get("kdim", width))
        self.attention, self.weights = nn.MultiheadAttention(width, heads, batch_first=True, **options), weights

    def forward(self, x):
        key = self.key(x)
        y, weights = self.attention(x, key, x, need_weights=self.weights)
        return y * weights.sum(2, keepdim=True) if self.weights else y


class Tokens(nn.Module):
    """A class token, a position embedding, attention with its shortcut, and the class token's features."""

    def __init__(self, attention, width):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 5, width))
        self.norm, self.attention = nn.LayerNorm(width), attention

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.stem(x)], dim=1) + self.position
        return self.head((x + self.attention(self.norm(x)))[:, 0])


# groups: (size, occurrences of a unit on its first weight axis), the stream last
ATTENTION = {
    "function": (lambda: Heads("function", 12, 4), [(4, 9)]),
    "einsum": (lambda: Heads("einsum", 12, 4), [(4, 9)]),
    "matmul": (lambda: Heads("matmul", 12, 4), [(4, 9)]),
    # of a single head, the dimensions of q and k may move together, those of v on their own
    "one head": (lambda: Heads("matmul", 12, 1), [(12, 2), (12, 1)]),
    # keys and queries meet one weight matrix: the layer that makes the keys belongs to the stream
    "module": (lambda: Module(12, 4), [(4, 9)]),
    "module, weights": (lambda: Module(12, 4, weights=True), [(4, 9)]),
    "module, sizes": (lambda: Module(12, 4, kdim=6, add_bias_kv=True), [(4, 3), (6, 1)]),
    "module, plain": (lambda: Module(12, 4, bias=False, add_zero_attn=True), [(4, 9)]),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_move_as_blocks(name):
    attention, expected = ATTENTION[name]
    torch.manual_seed(0)
    model, example = Tokens(attention(), 12), torch.zeros(2, 4, 5)
    spec = groups.permutation_spec(model, example)
    assert sorted((g.size, g.axes[0].positions.shape[1]) for g in spec.groups) == sorted([*expected, (12, 1)])
    for group in spec.groups:
        for axis in group.axes:
            kept = tuple(a for a in group.axes if a is not axis)
            others = tuple(g for g in spec.groups if g is not group)
            damaged = groups.PermutationSpec((groups.Group(group.name, group.size, kept), *others))
            cancels = name in ("module", "module, weights") and axis.tensor == "attention.key.bias"  # in the softmax
            assert cancels or groups.invariance_error(model, damaged, example) > 1e-6, axis.tensor


def test_embedded_tokens():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.last = nn.Embedding(10, 6), nn.Linear(6, 2)
            self.matrix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return self.last(F.gelu(self.words(x) @ self.matrix).mean(1))

    spec = groups.permutation_spec(Words(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert [(g.size, g.axes[0].tensor) for g in spec.groups] == [(6, "words.weight"), (6, "matrix")]


class Positions(nn.Module):
    """Position embeddings, of which the input is too short to use all."""

    def __init__(self, mixed):
        super().__init__()
        self.first, self.last, self.mixed = nn.Linear(3, 8), nn.Linear(8, 2), mixed
        self.register_buffer("positions", torch.randn(1, 9, 8))

    def forward(self, x):
        y = self.first(x) + self.positions[:, : x.size(1)]
        return self.last(F.rms_norm(y, (8,))) + self.last(self.positions[:, 8:] if self.mixed else y)


def test_positions_beyond_the_input_move_along():
    (group,) = groups.permutation_spec(Positions(mixed=False), torch.zeros(2, 4, 3)).groups
    assert ("positions", 2) in {(axis.tensor, axis.axis) for axis in group.axes}
    groups.permutation_spec(Positions(mixed=True), torch.zeros(2, 4, 3))  # what is read elsewhere is no such position


def test_a_use_without_a_rule_says_which():
    class PerHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2)

        def forward(self, x):
            x = self.first(x)
            return self.attention(x, x, x, average_attn_weights=False)

    with pytest.raises(groups.UnsupportedNode, match="'attention'.*MultiheadAttention in this use: the weights of"):
        groups.permutation_spec(PerHead(), torch.zeros(2, 4, 3))


TRANSFORMERS = {
    "vit": (lambda: torchvision.models.VisionTransformer(32, 16, 2, 4, 16, 24, num_classes=5), 32),
    "swin": (lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 2], [2, 4], [4, 4], num_classes=5), 40),
    "swin v2": (
        lambda: torchvision.models.SwinTransformer(
            [4, 4], 8, [1, 2], [2, 4], [4, 4], num_classes=5,
            block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2,
        ),
        40,
    ),
    "maxvit": (lambda: torchvision.models.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.1, num_classes=5), 64),
    "convnext": (
        lambda: torchvision.models.ConvNeXt(
            [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 2)], num_classes=5
        ),
        32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_torchvision_transformers(name):
    """Maps of odd size make Swin pad them."""
    torch.manual_seed(0)
    build, size = TRANSFORMERS[name]
    model, example = build(), torch.zeros(1, 3, size, size)
    spec = groups.permutation_spec(model, example)
    # Every hidden layer's outputs belong to some group; rows of q, k and v to that of the heads.
    moved = {axis.tensor for group in spec.groups for axis in group.axes if axis.axis == 0}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.shape[0] != 5}
    assert {f"{layer}.weight" for layer in layers} <= moved
    heads = [m for m in model.modules() if "Attention" in type(m).__name__]
    heads = sum(isinstance(m, nn.MultiheadAttention) or hasattr(m, "relative_position_index") for m in heads)
    assert sum(g.size in (2, 4) for g in spec.groups) >= heads


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_torchvision_transformers_merge(name):
    torch.manual_seed(0)
    build, size = TRANSFORMERS[name]
    a, b, x = build().eval(), build().eval(), torch.randn(4, 3, size, size)
    for model in (a, b):
        nn.init.normal_([m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight)  # ViT's begins at zero
    merged = repairlib.merge(a, b, [x])
    with torch.no_grad():
        assert torch.allclose(merged.matching.apply(b)(x), b(x), atol=1e-4)
        assert type(merged.model) is type(a) and merged.model(x).isfinite().all()
    assert merged.corrections and not merged.visible


def test_a_table_of_coordinates_stays():
    build, size = TRANSFORMERS["swin v2"]
    spec = groups.permutation_spec(build(), torch.zeros(1, 3, size, size), verify=False)
    assert not [a for g in spec.groups for a in g.axes if "coords_table" in a.tensor]
    assert not [g for g in spec.groups if "cpb_mlp" in g.name and g.taps]  # computed from it, without the input


def test_long_rows_of_the_table_wrap():
    for name in ("resnet110-bn-w0.125", "resnet20-bn-w0.25"):
        model = models.build(name, shape=(1, 16, 16), classes=3)
        spec = groups.permutation_spec(model, torch.zeros(2, 1, 16, 16), verify=False)
        assert max(map(len, str(spec).splitlines())) <= 120
        assert str(spec).count("[") - 1 == sum(len(group.axes) for group in spec.groups)  # "[axis]" of the header


TORCHVISION = (
    "resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "densenet121",
    "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0",
)  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name):
    model = torchvision.models.get_model(name, weights=None)
    example = torch.zeros(2, 3, 64, 64)
    spec = groups.permutation_spec(model, example, verify=False)
    assert groups.invariance_error(model, spec, example) < 1e-8
    assert all(set(group.taps) == {"pre", "post"} for group in spec.groups)


def mistakes(spec, last=0):
    """Every single mistake in an axis, with what it is: a forgotten axis, and places of the units that are wrong.

    Of the `last` groups only, or of all.
    """
    for group in spec.groups[-last:]:
        others = tuple(g for g in spec.groups if g is not group)
        for place, axis in enumerate(group.axes):
            rest, found = (*group.axes[:place], *group.axes[place + 1 :]), {"forgotten": ()}
            if group.size > 3:  # cycles of two or three units are alike
                first_two = axis.positions[[1, 0, *range(2, group.size)]]
                found |= {"the next unit's": (axis.positions.roll(1, 0),), "two exchanged": (first_two,)}
                if axis.positions.shape[1] > 1:
                    turned = axis.positions.clone()
                    turned[::2] = turned[::2].roll(1, 1)
                    found["in another order within a unit"] = (turned,)
            for what, positions in found.items():
                axes = tuple(groups.Axis(axis.tensor, axis.axis, axis.length, each) for each in positions)
                wrong = groups.Group(group.name, group.size, (*rest, *axes), group.taps)
                yield f"{what}: {axis.tensor}[{axis.axis}]", groups.PermutationSpec((wrong, *others))


def cheap_errors(model, spec, example, any_size):
    found = list(groups._of_cheap_copies(model, spec, example, 0, any_size))
    return [error if precision == torch.float64 else math.inf for error, precision in found]


CHECKED_CHEAPLY = {  # network, size of images, number of cheap checks, of groups whose mistakes are tried
    "resnet": (lambda: torchvision.models.resnet18(num_classes=5), 96, 2, 1),
    "densenet": (lambda: torchvision.models.DenseNet(12, (2, 2), 24, num_classes=50), 96, 2, 2),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 96, 2, 1),
    "convnext": (
        lambda: torchvision.models.ConvNeXt([convnext.CNBlockConfig(96, 128, 2), convnext.CNBlockConfig(128, None, 1)]),
        96, 2, 1,
    ),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 1, 6, 192, 300, num_classes=5), 32, 1, 0),
    "swin": (lambda: torchvision.models.SwinTransformer([4, 4], 96, [1, 1], [6, 12], [4, 4], num_classes=5), 32, 1, 0),
    "flattened": (
        lambda: nn.Sequential(
            conv(3, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(),
            nn.Linear(3136, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 5),
        ),
        96, 1, 0,
    ),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.Tanh(), nn.Linear(256, 5)), 16, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKED_CHEAPLY)
def test_cheap_checks_see_every_mistake(name):
    """Also where weights are of low rank and maps are small: no cheap check may accept what the full one refuses."""
    build, size, number, last = CHECKED_CHEAPLY[name]
    torch.manual_seed(0)
    model, example = build().eval(), torch.zeros(2, 3, size, size)
    spec, any_size = groups.permutation_spec(model, example, verify=False), not tracing.trace(model, example).of_size
    right = cheap_errors(model, spec, example, any_size)
    assert len(right) == number and max(right) < 1e-10
    tried = 0
    for what, wrong in mistakes(spec, last=last):
        assert min(cheap_errors(model, wrong, example, any_size)) > 1e-6, what
        tried += 1
    assert tried > 5


def test_huge_layers_see_every_mistake_as_well():
    torch.manual_seed(0)
    model, example = torchvision.models.vgg11().eval(), torch.zeros(1, 3, 224, 224)
    spec = groups.permutation_spec(model, example)
    assert [g.size for g in spec.groups[-2:]] == [4096, 4096]
    for what, wrong in mistakes(spec, last=2):
        assert min(cheap_errors(model, wrong, example, any_size=True)) > 1e-6, what
    forgotten = next(wrong for what, wrong in mistakes(spec, last=1) if "forgotten" in what)
    assert groups.invariance_error(model, forgotten, example) > 1e-4


def sizes_checked(model, example):
    """Sizes of the images that the check runs on."""
    sizes = []
    net = tracing.trace(model, example)
    hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
    groups.spec_of(net, example)
    hook.remove()
    return sizes


def test_maps_are_small_only_where_their_size_does_not_matter():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = conv(3, 8), conv(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = F.relu(self.first(x))
            x = self.second(x) if x.shape[-1] > 80 else x
            return self.last(x.mean((2, 3)))

    pooled = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    coarse = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
    flat = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 1), nn.Flatten(), nn.Linear(96 * 96, 2))
    example = torch.zeros(2, 3, 96, 96)
    assert sizes_checked(pooled, example) == [64, 64]
    assert sizes_checked(Branch(), example) == [96, 96]  # it asks for the size
    assert sizes_checked(coarse, example) == [96, 96]  # the linear layer tells places apart
    assert sizes_checked(flat, example)[-2:] == [96, 96]  # a small map is refused
    assert sizes_checked(pooled, torch.zeros(2, 3, 60, 60)) == [60, 60]


@pytest.mark.parametrize("kind", ["in place", "numpy", "half"])
def test_what_refuses_weights_of_low_rank_is_checked_in_full(kind):
    class Odd(nn.Linear):
        def forward(self, x):
            if kind == "in place":
                self.weight.data.clamp_(-1, 1)
            if kind == "numpy":
                return x @ torch.from_numpy(self.weight.detach().numpy().T.copy())
            dtype = torch.bfloat16 if kind == "half" else x.dtype
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).to(x.dtype)

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(200, 150), Odd(150, 100, bias=kind != "numpy")

        def forward(self, x):
            return self.last(F.relu(self.first(x)))

    model, example = Leaf(), torch.zeros(2, 200)
    spec = groups.permutation_spec(nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 100)), example)
    renamed = tuple(
        groups.Axis(a.tensor.replace("0.", "first.").replace("2.", "last."), a.axis, a.length, a.positions)
        for a in spec.groups[0].axes
    )
    own = groups.PermutationSpec((groups.Group("first", 150, renamed),))
    assert not [error for error in cheap_errors(model, own, example, True) if error < 1e-8]
    assert groups.invariance_error(model, own, example) < (0.1 if kind == "half" else 1e-10)
    for what, wrong in mistakes(own):
        if kind != "half" or "forgotten" in what:
            assert groups.invariance_error(model, wrong, example) > (0.1 if kind == "half" else 1e-3), what


def test_no_group_is_checked_with_the_identity():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert groups._not_identity(2, generator).tolist() == [1, 0]


class OnGraph(nn.Module):
    """Reads an input that belongs to all examples, and adds a little that no permutation leaves alone."""

    def __init__(self, wrong: float):
        super().__init__()
        self.first, self.last, self.wrong = nn.Linear(6, 16), nn.Linear(16, 3), wrong

    def forward(self, x, adjacency):
        x = torch.relu(adjacency @ self.first(x))
        return self.last(x + self.wrong * torch.arange(16, dtype=x.dtype))


def test_an_input_of_all_examples_leaves_the_check_as_strict():
    torch.manual_seed(0)
    example = torch.randn(2, 5, 6), torch.rand(5, 5)
    right = groups.permutation_spec(OnGraph(0.0), example)
    assert groups._invariance(OnGraph(0.0), right, example)[1] == torch.float64
    assert groups.invariance_error(OnGraph(1e-6), right, example) > 1e-8


class Shrinks(nn.Module):
    """At 64 pixels GroupNorm would see maps of one pixel, and forget what it reads."""

    def __init__(self):
        super().__init__()
        self.first, self.shrink, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 64, stride=64), nn.GroupNorm(16, 16)
        self.beside, self.last = nn.Conv2d(3, 4, 1), nn.Linear(20, 2)

    def forward(self, x):
        shrunk = self.norm(self.shrink(self.first(x).relu())).relu()
        return self.last(torch.cat([y.mean((2, 3)) for y in (shrunk, self.beside(x).relu())], 1))


def test_small_maps_are_not_taken_where_they_would_shrink_to_a_pixel():
    model, example = Shrinks(), torch.randn(2, 3, 128, 128)
    net = tracing.trace(model, example)
    spec = groups.spec_of(net, example)
    first = spec["first"]
    wrong = replace(spec, groups=(replace(first, axes=first.axes[1:]), *(g for g in spec.groups if g is not first)))
    assert not groups._is_of_any_size(net)
    assert groups._invariance(model, wrong, example, any_size=groups._is_of_any_size(net))[0] > 1e-3
    assert groups._is_of_any_size(tracing.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), example))


def test_a_group_of_one_unit_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2))
    axes = tuple(
        groups.Axis(t, i, 1, torch.zeros(1, 1, dtype=torch.int64)) for t, i in (("0.weight", 0), ("2.weight", 1))
    )
    assert groups.invariance_error(model, groups.PermutationSpec((groups.Group("0", 1, axes),)), torch.randn(2, 3)) == 0
