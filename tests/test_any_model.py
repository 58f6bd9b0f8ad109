"""What people's own models do: kinds of inputs, outputs, layers and code that no network of the papers has."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import repairlib
from repairlib import groups, permutations, recording, tracing


class Hidden(nn.Module):
    """Linear, ReLU, linear; subclasses say what happens to the hidden activation."""

    def __init__(self, inputs=8, width=16, hidden=16, outputs=3):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, width), nn.Linear(hidden, outputs)

    def middle(self, h):
        return h

    def forward(self, x):
        return self.b(self.middle(F.relu(self.a(x))))


def two(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).eval(), kind(*args, **options).eval()


def sizes(model, x):
    return sorted(group.size for group in groups.permutation_spec(model.eval(), x).groups)


def assert_same_function(model, other, *x):
    with torch.no_grad():
        assert torch.allclose(model(*x), other(*x), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- outputs


@dataclasses.dataclass
class Out:
    logits: torch.Tensor


class Opaque:
    def __init__(self, logits):
        self.logits = logits


def test_outputs_in_a_dataclass_are_outputs():
    class Net(Hidden):
        def forward(self, x):
            return Out(super().forward(x))

    a, b = two(Net)
    x = torch.randn(64, 8)
    assert [g.name for g in groups.permutation_spec(a, x).groups] == ["a"]
    assert isinstance(repairlib.merge(a, b, [x]).model(x), Out)
    assert isinstance(repairlib.merge(a, b, [x], visible=True).model(x), Out)


def test_an_output_that_nobody_can_read_is_refused():
    class Net(Hidden):
        def forward(self, x):
            return Opaque(super().forward(x))

    class Nothing(Hidden):
        def forward(self, x):
            super().forward(x)
            return 3

    with pytest.raises(tracing.UntraceableModel, match="Opaque"):
        groups.permutation_spec(Net(), torch.randn(2, 8))
    with pytest.raises(groups.SpecError, match="or there is none"):
        groups.permutation_spec(Nothing(), torch.randn(2, 8))


# -------------------------------------------------------------------------------------------------------------- inputs


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Embedding(5, 16), nn.Linear(16, 3)

    def forward(self, x, z):
        return self.c(F.relu(self.a(x) + self.b(z)))


@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs(by_name):
    a, b = two(TwoInputs)
    x, z, y = torch.randn(600, 8), torch.randint(0, 5, (600,)), torch.randint(0, 3, (600,))
    pieces = zip(x.split(200), z.split(200), y.split(200), strict=True)
    data = [({"z": z, "x": x} if by_name else (x, z), y) for x, z, y in pieces]
    aligned = repairlib.align(a, b, data)
    assert_same_function(aligned, b, x, z)
    merged = repairlib.merge(a, b, data, visible=True)
    assert merged.model(x, z).shape == (600, 3)
    assert repairlib.barrier(a, aligned, data, points=3) < repairlib.barrier(a, b, data, points=3) + 1
    assert set(repairlib.fisher.diagonal_fisher(a, data, limit=5)) == set(dict(a.named_parameters()))


def test_optional_arguments_have_their_defaults():
    class Net(Hidden):
        def forward(self, x, mask=None, double=True, **more):
            x = x if mask is None else x * mask
            h = F.relu(self.a(x))
            return self.b(2 * h if double else h)

    a, b = two(Net)
    x = torch.randn(64, 8)
    assert_same_function(repairlib.align(a, b, [x]), b, x)
    assert sizes(a, (x, torch.ones(8))) == [16]


def test_missing_and_unknown_inputs_are_named():
    with pytest.raises(tracing.UntraceableModel, match=r"missing a required argument: 'z'. Batches \(\(x, z\), y\)"):
        tracing.trace(TwoInputs(), torch.zeros(2, 8))
    with pytest.raises(tracing.UntraceableModel, match="unexpected keyword argument 'w'"):
        tracing.trace(TwoInputs(), {"x": torch.zeros(2, 8), "z": torch.zeros(2), "w": torch.zeros(2)})


def test_integer_inputs_keep_their_type():
    a, b = two(lambda: nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3)))
    data = [(torch.randint(0, 20, (64, 5)), torch.randint(0, 3, (64,)))]
    assert math.isfinite(repairlib.barrier(a, b, data, points=3))
    assert repairlib.merge(a, b, data).model(data[0][0]).shape == (64, 3)


class Examples(TensorDataset):
    def __iter__(self):
        return (self[i] for i in range(len(self)))


@pytest.mark.parametrize("data, words", [
    (Examples(torch.zeros(4, 8), torch.zeros(4)), "pass a DataLoader"),
    ((torch.zeros(4, 8), torch.zeros(4)), r"pass \[\(x, y\)\]"),
    ([{"image": torch.zeros(4, 8)}], r"batch\['image'\]"),
    (torch.zeros(4, 8).numpy(), "torch.as_tensor"),
    ([torch.zeros(4, 8).numpy()], "torch.as_tensor"),
])  # fmt: skip
def test_what_are_no_batches_is_refused_with_the_way_out(data, words):
    a, b = two(Hidden)
    with pytest.raises(TypeError, match=words):
        repairlib.align(a, b, data)


def test_an_endless_loader_stops_at_the_limit():
    a, b = two(Hidden)
    endless = (torch.randn(50, 8) for _ in itertools.count())
    assert repairlib.merge(a, b, endless, limit=200).matching.correlation["a"].shape == (16,)


def test_a_shuffling_loader_gives_the_same_examples_to_all_networks():
    a, b = two(Hidden)
    loader = DataLoader(TensorDataset(torch.randn(500, 8), torch.randint(0, 3, (500,))), batch_size=50, shuffle=True)
    first = repairlib.merge(a, b, loader, limit=100)
    assert repairlib.barrier(a, a, loader, points=3) == 0
    assert first.model(torch.zeros(1, 8)).isfinite().all()


# --------------------------------------------------------------------------------------------------------- code traced


class Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.m, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(24, 3)

    def forward(self, x):
        y = list(self.a(x).chunk(2, 1))
        y.append(F.relu(self.m(y[-1])))
        return self.o(torch.cat(y, 1))


class Zeros(Chunks):
    def forward(self, x):
        return self.o(torch.cat([F.relu(self.a(x)), torch.zeros(x.size(0), 8)], 1))


class Checks(Chunks):
    def forward(self, x):
        assert x.shape[1] == 8 and x.dim() == 2 and isinstance(x, torch.Tensor) and torch.is_floating_point(x)
        h = self.a(x)
        if h.shape[0] != x.shape[0]:
            h = h[: x.shape[0]]
        for _ in range(x.shape[1] // 4):
            h = F.relu(h)
        n, c = h.shape
        return self.o(torch.cat([h, x], len([n, c]) - 1)) / math.sqrt(h.size(-1))


@pytest.mark.parametrize("kind", [Chunks, Zeros, Checks])
def test_code_may_look_at_sizes(kind):
    a, b = two(kind)
    x = torch.randn(100, 8)
    aligned = repairlib.align(a, b, x.split(50))
    assert_same_function(aligned, b, x)
    assert sizes(a, x[:2])


def test_attention_scaled_by_a_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.q, self.o, self.h = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)

        def scale(self, k):
            return 1.0 / math.sqrt(k.size(-1))

        def forward(self, x):
            x = self.e(x)
            n, t, c = x.size()
            q, k, v = (z.view(n, t, 4, 4).transpose(1, 2) for z in self.q(x).chunk(3, 2))
            w = F.softmax(q @ k.transpose(-2, -1) * self.scale(k), -1)
            return self.h((x + self.o((w @ v).transpose(1, 2).reshape(n, t, c))).mean(1))

    class Literal(Net):
        def scale(self, k):
            return 0.5

    x = torch.randn(2, 5, 8)
    assert sizes(Net(), x) == sizes(Literal(), x) != []


def test_data_cannot_be_asked_for():
    class Branch(Hidden):
        def middle(self, h):
            return h if h.sum() > 0 else -h

    class Item(Hidden):
        def middle(self, h):
            return h * int(h.sum().item())

    class Loop(Hidden):
        def middle(self, h):
            return torch.stack([h[i] for i in range(len(h))])

    for kind, words in (
        (Branch, "depends on the data"),
        (Item, "depends on the data"),
        (Loop, "number of examples"),
    ):
        with pytest.raises(tracing.UntraceableModel, match=words):
            tracing.trace(kind(), torch.randn(2, 8))
    with pytest.raises(tracing.UntraceableModel, match=r"test_any_model.py:\d+ `return h if"):
        tracing.trace(Branch(), torch.randn(2, 8))


class Experts(Hidden):
    def middle(self, h):
        out = torch.zeros_like(h)
        for expert in range(2):
            idx = (h[:, 0] * 0 + torch.arange(h.shape[0]) % 2 == expert).nonzero().flatten()
            if idx.numel() == 0:
                continue
            out = out + h.index_select(0, idx).mean() * (expert + 1)
        return out


class Chosen(Hidden):
    def middle(self, h):
        return h + (h[h > 0].mean() if len(h[h > 0]) > 3 else 0)


class Typed(Hidden):
    def middle(self, h):
        h = h.type(torch.float32)
        return h if h.mean() > 0 else -h


class Parts(Hidden):
    size = 64

    def middle(self, h):
        return torch.cat([F.relu(part) for part in h.split(self.size)])


class Rows(Hidden):
    def middle(self, h):
        return torch.stack([F.relu(part) for part in h.unbind(0)])


@pytest.mark.parametrize("kind, words", [
    (Experts, "depends on the data"), (Chosen, "depends on the data"), (Typed, "depends on the data"),
    (Parts, "number of examples"), (Rows, "number of examples"),
])  # fmt: skip
def test_what_depends_on_data_or_on_the_number_of_examples_is_not_baked_in(kind, words):
    with pytest.raises(tracing.UntraceableModel, match=words):
        tracing.trace(kind(), torch.randn(2, 8))


def test_flags_and_nothing_are_inputs_too():
    class Net(Hidden):
        def forward(self, x, mask, twice):
            x = x if mask is None else x * mask
            return super().forward(2 * x if twice else x)

    a, b = two(Net)
    x = torch.randn(64, 8)
    aligned = repairlib.align(a, b, [({"x": x, "mask": None, "twice": True}, 0)])
    assert_same_function(aligned, b, x, None, True)


def test_inputs_that_belong_to_all_examples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x, mask):
            h = F.relu(self.a(x))
            return self.b(mask @ h / float(math.sqrt(h.size(-1)))).mean(1)

    a, b = two(Net)
    x, mask = torch.randn(64, 5, 8), torch.eye(5)
    assert_same_function(repairlib.align(a, b, [((x, mask), 0)]), b, x, mask)


def test_code_that_tries_and_code_that_only_looks():
    class Tries(Hidden):
        def middle(self, h):
            self.guess = h.argmax(1)  # for a log
            try:
                return h.view(-1, 7)
            except RuntimeError:
                return h

    class Predicts(Hidden):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits.argmax(1)

    for kind in (Tries, Predicts):
        assert sizes(kind(), torch.randn(2, 8)) == [16]


def test_modules_that_change_weights_for_evaluation_stay_whole():
    class Lora(nn.Linear):
        """Adds an update to its weight in evaluation mode, as loralib does."""

        merged = False

        def train(self, mode=True):
            if self.merged == mode:
                self.weight.data += -0.1 if mode else 0.1
                self.merged = not mode
            return super().train(mode)

    net = nn.Sequential(Lora(8, 16), nn.ReLU(), nn.Linear(16, 3)).train()
    x = torch.randn(4, 8)
    net.eval()
    before = net(x)
    tracing.trace(net, x)
    assert torch.allclose(net(x), before, atol=1e-5)


def test_reading_a_weights_precision_does_not_keep_it_from_folding():
    class Net(Hidden):
        def forward(self, x):
            return self.b(F.relu(self.a(x.to(self.a.weight.dtype))))

    a, b = two(Net)
    assert list(repairlib.merge(a, b, [torch.randn(64, 8)]).corrections) == ["a", "b"]


def test_normalisation_over_several_axes_folds_along_its_channels():
    def net():
        layers = nn.Conv2d(1, 4, 3), nn.LayerNorm([4, 4, 4]), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        return nn.Sequential(*layers).double()

    a, b = two(net)
    x = torch.randn(50, 1, 6, 6, dtype=torch.float64)
    goals = repairlib.Repair(a, b, [x], targets="norm")
    repaired = goals(0.5)
    mean, std = goals.at(0.5)["_1"]
    found = repaired.model[:2](x).transpose(0, 1).flatten(1)
    assert not repaired.visible and torch.allclose(found.mean(1), mean) and torch.allclose(found.std(1, False), std)


def test_only_some_groups_are_matched():
    net = lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))  # noqa: E731
    a, b = two(net)
    x = torch.randn(2, 8)
    found = repairlib.match_weights(a, b, x, only="2", restarts=5)
    assert found.permutation["0"].tolist() == list(range(6))
    with pytest.raises(KeyError, match="no group '3'; there are: 0, 2"):
        repairlib.match_weights(a, b, x, only=["3"])


def test_what_cannot_fold_is_said():
    a, b = two(Hidden)
    with pytest.raises(ValueError, match="needs visible=True"):
        repairlib.merge(a, b, [torch.randn(64, 8)], method="batch")
    recurrent = two(Recurrent, nn.LSTM)
    with pytest.raises(ValueError, match="'r' is no single tensor"):
        repairlib.repair(*recurrent, [torch.randn(64, 5, 8)], targets=["r"])


def test_batches_without_labels_are_named():
    with pytest.raises(ValueError, match="have no labels"):
        repairlib.evaluate(Hidden(), [torch.randn(4, 8)])
    with pytest.raises(TypeError, match=r"pass \[\(x, y\)\]"):
        repairlib.align(*two(Hidden), [torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)])


def test_a_wrong_example_fails_as_the_network_does():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tracing.trace(Hidden(), torch.randn(2, 9))


def test_the_model_stays_as_it_was():
    class Keeps(Hidden):
        def middle(self, h):
            self.last = h
            return h + torch.full((16,), 0.5)

    model = Keeps()
    before = [dict(vars(module)) for module in model.modules()]
    merged = repairlib.merge(model, Keeps(), torch.randn(50, 8), visible=True)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert merged.model(torch.randn(3, 8)).shape == (3, 3)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_wrappers_are_looked_through(wrap):
    plain = two(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    x = torch.randn(64, 8)
    wrapped = repairlib.align(*(wrap(copy.deepcopy(net)) for net in plain), [x])
    aligned = repairlib.align(*plain, [x])
    values = [tensor for tensor in wrapped.state_dict().values() if tensor.is_floating_point()]
    assert all(torch.equal(a, b) for a, b in zip(values, aligned.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_network_is_said():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(64, 8)
    lazy = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 3))
    for given, words in (
        (copy.deepcopy(net).to("meta"), "meta device"),
        (torch.export.export(net, (x,)).module(), "exported program"),
        (torch.jit.trace(net, x), "TorchScript"),
        (lazy, "lazy layer"),
    ):
        for function in (repairlib.align, repairlib.merge, repairlib.interpolate_models):
            with pytest.raises((TypeError, ValueError), match=words):
                function(given, given, *([[x]] if function is not repairlib.interpolate_models else []))
    for given, words in ((net.state_dict(), "state dict"), (net.forward, "torch.nn.Module")):
        with pytest.raises(TypeError, match=words):  # the checker of annotations is first in the tests
            recording.check_model(given)


# --------------------------------------------------------------------------------------------------- layers and graphs


def test_two_networks_of_one_state_dict_and_two_forwards_are_refused():
    class Residual(Hidden):
        def middle(self, h):
            return h + h.roll(1, 0)

    class Strided(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3, stride=stride), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x)).mean((2, 3)))

    x = torch.randn(64, 8)
    for method in ("activations", "weights"):
        with pytest.raises(ValueError, match="forward differs at node"):
            repairlib.align(Hidden(), Residual(), [x], method=method)
        with pytest.raises(ValueError, match="forward differs at node 'a'"):
            repairlib.align(Strided(1), Strided(2), [torch.randn(8, 1, 9, 9)], method=method)
    with pytest.raises(ValueError, match="forward differs"):
        repairlib.Repair(Hidden(), Residual(), [x])


def test_a_third_network_is_merged_at_once():
    class Block(Hidden):
        def middle(self, h):
            return F.relu(h + h.square())

    a, b, x = *two(Block), torch.randn(64, 8)
    merged = repairlib.merge(a, b, [x], visible=True).model
    with pytest.raises(ValueError, match="visible correction of a merged network.*others"):
        repairlib.merge(merged, b, [x])
    with pytest.raises(ValueError, match="pass its .model.*others"):
        recording.check_model(repairlib.repair(a, b, [x]))


def test_units_lie_on_the_last_axis_of_tokens():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.f, self.g, self.h = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = self.e(x)
            return self.h(F.relu(x + self.g(F.relu(self.f(x)))).mean(1))

    a, _ = two(Net)
    x = torch.randn(64, 5, 8)
    spec = groups.permutation_spec(a, x[:2])
    b = permutations.permute(a, spec, permutations.random_permutation(spec, 1))
    assert torch.allclose(repairlib.align(a, b, [x]).e.weight, a.e.weight)
    c = Net().eval()
    c = repairlib.align(a, c, [x])
    for visible in (False, True):
        targets = ("conv", "linear", "block")
        repaired = repairlib.repair(a, c, [x], targets=targets, visible=visible)
        nets = [tracing.trace(net, x[:2]) for net in (a, c, repaired.model)]
        with torch.no_grad():
            values = [dict(net.walk(x, ["e", "f", "g"])) for net in nets]
        for node in ("e", "f", "g"):
            goal, found = (
                sum(v[node].flatten(0, 1).std(0) for v in some) / len(some) for some in (values[:2], values[2:])
            )
            assert torch.allclose(goal, found, rtol=1e-3)
        assert bool(repaired.visible) == visible


def test_a_matrix_over_tokens_leaves_features_alone():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.t, self.h = nn.Linear(8, 16), nn.Linear(5, 5), nn.Linear(16, 3)

        def forward(self, x):
            x = self.e(x)
            return self.h((x + self.t(x.transpose(1, 2)).transpose(1, 2)).mean(1))

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("adjacency", torch.softmax(torch.randn(5, 5), -1))
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.b(F.relu(self.adjacency @ self.a(x))).mean(1)

    for kind in (Mixer, Graph):
        assert sizes(kind(), torch.randn(2, 5, 8)) == [16]


def test_blocks_that_meet_their_own_constant_stay_apart():
    class Gated(Hidden):
        def forward(self, x):
            return self.b((F.relu(self.a(x)).view(-1, 2, 8) * x[:, :2, None]).flatten(1))

    assert sizes(Gated(), torch.randn(2, 8)) == [8, 8]


def test_an_embedding_of_positions_moves_with_the_stream():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.p, self.h = nn.Embedding(20, 16), nn.Embedding(10, 16), nn.Linear(16, 3)

        def forward(self, t):
            return self.h(self.e(t) + self.p(torch.arange(t.shape[1])))

    (group,) = groups.permutation_spec(Net(), torch.randint(0, 20, (2, 5))).groups
    assert (group.size, len(group.axes)) == (16, 3)


class Softmax32(Hidden):
    def middle(self, h):
        return h * torch.softmax(h, -1, dtype=torch.float32).to(h.dtype)


class LayerNorm32(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)


def test_float32_inside_is_accepted_and_mistakes_are_still_found():
    x = torch.randn(2, 8)
    assert sizes(Softmax32(), x) == [16]
    assert sizes(nn.Sequential(nn.Linear(8, 16), LayerNorm32(16), nn.ReLU(), nn.Linear(16, 4)), x) == [16]
    spec = groups.permutation_spec(Softmax32(), x)
    group = spec.groups[0]
    damaged = groups.PermutationSpec((dataclasses.replace(group, axes=group.axes[:-1]),))
    assert groups.invariance_error(Softmax32(), damaged, x) > 1e-2


class WithWeight(Hidden):
    """The second layer's weight is used by a function of (network, hidden activation)."""

    def __init__(self, use, hidden=16):
        super().__init__(hidden=hidden)
        self.use = use

    def forward(self, x):
        return self.use(self, F.relu(self.a(x)))


OPERATIONS = {
    "glu": (lambda s, h: s.b(F.glu(h, -1)), 8, [8]),
    "max": (lambda s, h: s.b(h.view(-1, 2, 8).max(1)[0]), 8, None),
    "maximum of all": (lambda s, h: s.b(h) + h.max(-1, keepdim=True).values, 16, [16]),
    "norm": (lambda s, h: s.b(h / (1 + h.norm(dim=-1, keepdim=True))), 16, [16]),
    "var": (lambda s, h: s.b(h / torch.sqrt(h.var(-1, keepdim=True) + 1)), 16, [16]),
    "weight.T": (lambda s, h: h @ s.b.weight.T, 16, [16]),
    "mm": (lambda s, h: torch.mm(h, s.b.weight.t()), 16, [16]),
    "addmm": (lambda s, h: torch.addmm(s.b.bias, h, s.b.weight.t()), 16, [16]),
    "einsum": (lambda s, h: torch.einsum("...i,oi->...o", h, s.b.weight), 16, [16]),
    "tied": (lambda s, h: F.linear(s.b(h), s.b.weight.t()), 16, [3]),
    "layer norm of a size": (lambda s, h: s.b(F.layer_norm(h, h.shape[-1:])), 16, [16]),
    "functional embedding": (
        lambda s, h: s.b(h + F.embedding(torch.tensor([0, 1]), s.a.weight.T)), 16, [16],
    ),
    "ones_like": (lambda s, h: s.b(h * torch.ones_like(h)), 16, [16]),
    "new_zeros": (lambda s, h: s.b(torch.cat([h[:, :12], h.new_zeros(h.shape[0], 4)], 1)), 16, None),
    "scaled weight": (lambda s, h: F.linear(h, s.b.weight * 0.5, s.b.bias), 16, [16]),
    "standardised weight": (
        lambda s, h: F.linear(h, s.b.weight - s.b.weight.mean(1, keepdim=True)), 16, [16],
    ),
    "normalised weight": (lambda s, h: F.linear(h, F.normalize(s.b.weight, dim=1)), 16, [16]),
    "low rank": (lambda s, h: F.linear(h, s.b.weight + s.b.weight @ s.a.weight @ s.a.weight.T), 16, [16]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    use, hidden, expected = OPERATIONS[name]
    torch.manual_seed(0)
    found = sizes(WithWeight(use, hidden), torch.randn(2, 8))
    assert found == expected if expected else found


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.r = kind(8, 16, batch_first=True, **options)
        self.h = nn.Linear((options.get("proj_size") or 16) * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.h(self.r(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.r, self.h = kind(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.r(x[:, t], state)
        return self.h(state[0] if isinstance(state, tuple) else state)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind, options, expected", [
    (nn.LSTM, {}, [16]), (nn.GRU, {}, [16]), (nn.RNN, {}, [16]), (nn.LSTM, {"num_layers": 2}, [16, 16]),
    (nn.GRU, {"bidirectional": True, "num_layers": 2}, [16] * 4), (nn.LSTM, {"proj_size": 5}, [5, 16]),
])  # fmt: skip
def test_recurrent_layers(kind, options, expected):
    a, b = two(Recurrent, kind, **options)
    x = torch.randn(64, 5, 8)
    assert sizes(a, x[:2]) == expected
    assert_same_function(repairlib.align(a, b, [x]), b, x)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind):
    assert sizes(Cells(kind), torch.randn(2, 5, 8)) == [16]


def test_transformer_encoders_merge():
    def encoder():
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        return nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))

    a, b = two(encoder)
    x = torch.randn(64, 5, 8)
    assert sizes(a, x[:2]) == [4, 4, 16, 32, 32]
    matching = repairlib.match_activations(a, b, [x])
    assert_same_function(matching.apply(b), b, x)
    assert matching.permutation.keys() > matching.correlation.keys()  # heads by their weights
    merged = repairlib.merge(a, b, [x], match=matching)
    assert type(merged.model) is nn.Sequential and merged.model(x).shape == (64, 5, 3)


def test_bilinear_and_bags():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.EmbeddingBag(20, 6), nn.Linear(6, 5)
            self.b, self.c, self.h = nn.Bilinear(6, 5, 7), nn.Bilinear(7, 7, 4), nn.Linear(4, 3)

        def forward(self, x):
            e = self.e(x)
            b = F.relu(self.b(e, F.relu(self.a(e))))
            return self.h(F.relu(self.c(b, b)))

    assert sizes(Net(), torch.randint(0, 20, (2, 4))) == [4, 5, 6, 7]


class Caches(nn.Module):
    """Attention with a bias for each head, which evaluation computes once, as timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o, self.h = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
        self.biases, self.cache = nn.Parameter(torch.randn(2, 3)), {}

    def train(self, mode=True):
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.biases[:, torch.arange(9).view(3, 3) % 3]
        q, k, v = self.qkv(x).view(-1, 3, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        w = torch.softmax(q @ k.transpose(-2, -1) + self.cache["bias"], -1)
        return self.h(self.o((w @ v).transpose(1, 2).flatten(2))).mean(1)


def test_what_evaluation_keeps_of_old_weights_is_forgotten():
    a, b = two(Caches)
    x = torch.randn(64, 3, 8)
    assert sizes(a, x[:2]) == [2, 8] and a.cache == {}  # heads, outputs of o
    with torch.no_grad():
        b(x)  # fills its cache
    assert_same_function(repairlib.align(a, b, [x], method="weights"), b, x)


def test_patches_are_unfolded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.u, self.b = nn.Conv2d(1, 6, 3), nn.Unfold(2, stride=2), nn.Linear(24, 3)

        def forward(self, x):
            return self.b(self.u(F.relu(self.a(x))).transpose(1, 2)).mean(1)

    assert sizes(Net(), torch.randn(2, 1, 8, 8)) == [6]


# ------------------------------------------------------------------------------------------------------- what is said


def test_layers_that_stay_are_listed_and_warned_of():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)
            self.scale = torch.linspace(1, 2, 16)  # neither a parameter nor a buffer: nobody can permute it

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)) * self.scale)))

    a, b = two(Scaled)
    spec = groups.permutation_spec(a, torch.randn(2, 8))
    assert [g.name for g in spec.groups] == ["b"] and spec.stay == ("a",)
    assert str(spec).endswith("units stay as they are in: a")
    with pytest.warns(UserWarning, match="no rule can free the hidden units of a"):
        repairlib.align(a, b, [torch.randn(64, 8)])
    b.scale = b.scale + 1
    with pytest.raises(ValueError, match="constant 'scale' differs"):
        repairlib.match_activations(a, b, [torch.randn(64, 8)])


def test_groups_have_two_units_at_least():
    net = nn.Sequential(nn.Linear(8, 1), nn.Tanh(), nn.Linear(1, 3))
    assert groups.permutation_spec(net, torch.randn(2, 8)).groups == ()


def test_merging_keeps_the_class_or_follows_the_paper():
    class Block(Hidden):
        def middle(self, h):
            return F.relu(h + h.square())

    a, b = two(Block)
    x = torch.randn(300, 8)
    merged = repairlib.merge(a, b, [x])
    assert type(merged.model) is Block and not merged.visible and list(merged.corrections) == ["a", "b"]
    paper = repairlib.merge(a, b, [x], match=merged.matching, visible=True)
    assert paper.visible and "b" not in paper.corrections
    assert repairlib.merge(a, b, [x], match="weights").matching.correlation == {}


def test_a_report_says_how_it_went():
    a, b = two(Hidden)
    x = torch.randn(300, 8)
    y = a(x).argmax(1)
    merged = repairlib.merge(a, b, [x])
    found = repairlib.report(a, b, merged, [x], [(x, y)])
    assert found.scores["A"] == 1 and set(found.scores) == {"A", "B", "midpoint", "merged"}
    assert all(abs(after - 1) < 0.2 for _, after in found.variance.values())
    assert "mean correlation" in str(found) and "variance of the midpoint" in str(found)
    again = repairlib.merge(a, a, [x])
    assert repairlib.report(a, a, again, [x], [(x, y)]).advice == ()
    with pytest.raises(ValueError, match="what repairlib.merge returns"):
        repairlib.report(a, b, repairlib.repair(a, b, [x]), [x])


def test_the_recorder_needs_no_data_dependence_for_sizes_of_parameters():
    class Net(Hidden):
        def middle(self, h):
            return h[:, : self.b.weight.shape[1]]

    assert sizes(Net(), torch.randn(2, 8)) == [16]
    assert recording.inside(Net()) is not None
