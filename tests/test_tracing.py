import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import inputs, make
from torch import fx, nn

from repairlib import recording, tracing
from repairlib.recording import copy_model


@pytest.fixture(autouse=True)
def shapes_alone_for_all(monkeypatch):
    """Record the small networks of these tests as large ones are recorded."""
    monkeypatch.setattr(recording, "_LARGE", -1)


def test_only_large_networks_are_recorded_by_shapes_alone(monkeypatch):
    made, model, x = [], nn.Linear(4, 2), torch.zeros(2, 4)
    tracer = recording.Tracer
    monkeypatch.setattr(
        recording, "Tracer", lambda x, *how, **named: made.append((how, named)) or tracer(x, *how, **named)
    )
    tracing.trace(model, x)
    monkeypatch.setattr(recording, "_LARGE", 10 * 8)  # numbers of the layer times those of the example
    tracing.trace(model, x)
    assert made == [((), {"shapes_only": True}), ((), {})]


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


def recorded(model, x):
    """What is recorded by shapes alone, and with values."""
    return [recording._record(model.eval(), recording.Tracer(x, shapes_only)) for shapes_only in (True, False)]


@pytest.mark.parametrize("name", ["vgg11-bn-w0.125", "resnet20-ln-w0.25-sc1", "resnet8-fixup-w0.5", "mlp2-ln-w8"])
def test_shapes_alone_record_what_values_do(name):
    found, expected = recorded(make(name), inputs(name, 2))
    assert str(found.graph) == str(expected.graph) and found.asked == expected.asked
    assert found.shapes == expected.shapes and found.plain == expected.plain


@pytest.mark.parametrize("build, size", [
    (lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 24, num_classes=5), 32),
    (lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 2], [2, 4], [4, 4], num_classes=5), 40),
    (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 64),
    (lambda: torchvision.models.googlenet(num_classes=5, aux_logits=False, init_weights=False), 64),
])  # fmt: skip
def test_shapes_alone_record_torchvision(build, size):
    found, expected = recorded(build(), torch.randn(2, 3, size, size))
    assert str(found.graph) == str(expected.graph) and found.asked == expected.asked
    assert found.shapes == expected.shapes and found.plain == expected.plain


class Ends(nn.Module):
    """A layer, and what code does with its outputs."""

    def __init__(self, end):
        super().__init__()
        self.first, self.end = nn.Linear(4, 6), end

    def forward(self, x):
        return self.end(F.relu(self.first(x)))


def with_or_without(h):
    try:
        return h + h.detach().cpu()
    except NotImplementedError:
        return h


@pytest.mark.parametrize("end", [
    lambda h: h + torch.arange(6.0),  # a constant that forward makes keeps its values
    lambda h: h + torch.arange(6, device=h.device),
    lambda h: h * 2 if h.device.type == "cpu" else h,
    lambda h: h if h.is_cuda else h * 2,
    lambda h: h if h.is_meta else h * 2,
    lambda h: h.to("cpu") * 2,
    lambda h: with_or_without(h) * 2,
    lambda h: h @ torch.tril(torch.ones(6, 6)),
    lambda h: h[:, torch.tensor([5, 3, 1])],
    lambda h: h[h.sum(1) < torch.inf],
    lambda h: F.one_hot(h.argmax(1)).sum() + h,
], ids=range(11))  # fmt: skip
def test_where_values_count_they_are_computed(end):
    model, x = Ends(end), torch.randn(3, 4)
    net = tracing.trace(model, x)
    assert not [value for value in net.constants.values() if value.is_meta]
    assert "'meta'" not in str(net.plain)
    with recording.eval_mode(model):
        assert torch.equal(net.run(x), model(x))


def test_parameters_keep_their_values_while_a_network_is_recorded():
    class Signed(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.first, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(scale))

        def forward(self, x):
            return self.first(x) if self.scale > 0 else self.first(-x)

    for scale, number in ((1.0, 0), (-1.0, 1)):
        net = tracing.trace(Signed(scale), torch.randn(2, 4))
        assert len([node for node in net.nodes if node.name == "neg"]) == number


def test_hooks_see_values():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    hook = model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    tracing.trace(model, torch.randn(2, 4))
    hook.remove()
    assert seen and not seen[0].is_meta
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = tracing.trace(model, torch.randn(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.model.state_dict().items())


class Sees(nn.Module):
    """Two layers, and code between them that sees more of an activation than its shape."""

    def __init__(self, code):
        super().__init__()
        self.code, self.first, self.last = code, nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.last(self.code(self, self.first(x)).mean((2, 3)))


KEPT: dict = {}


@fx.wrap
def keeping(x):
    n = x.shape[1]
    if n not in KEPT:
        KEPT[n] = torch.arange(n, device=x.device, dtype=x.dtype)
    return x + KEPT[n].view(-1, 1, 1)


def laid_out(self, x):
    return x.relu() if x.is_contiguous() else x.contiguous().sigmoid()


def caught(self, x):
    try:
        where = str(x.device)
    except Exception:
        return x.sigmoid()
    return x.relu() if where == "cpu" else x


def written(self, x):
    self.seen.copy_(x.abs().max())
    return x / (1 + self.seen) if self.seen > 0 else x


@pytest.mark.parametrize("code", [lambda self, x: keeping(x), laid_out, caught, written])
def test_code_that_sees_more_than_shapes_is_recorded_with_values(code):
    model, x = Sees(code).to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8)
    found, expected = recording.record(model, x), recording._record(model, recording.Tracer(x))
    assert str(found.graph) == str(expected.graph) and found.asked == expected.asked
    assert not any(value.is_meta for value in KEPT.values())
    with recording.eval_mode(model):
        assert model(x).isfinite().all()


def test_kinds_of_numbers_under_autocast_are_those_of_values():
    def code(self, x):
        return x.to(torch.float32) if x.dtype != torch.float32 else x

    with torch.autocast("cpu", torch.bfloat16):
        model, x = Sees(code), torch.randn(2, 3, 8, 8)
        found, expected = recording.record(model, x), recording._record(model, recording.Tracer(x))
    assert str(found.graph) == str(expected.graph) and ".to(" in found.graph.python_code("self").src


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_custom_function_of_autograd_is_a_node():
    model, x = Sees(lambda self, x: Clamp.apply(x)), torch.randn(3, 3, 8, 8)
    net = tracing.trace(model, x)
    assert [node.name for node in net.nodes if "apply" in node.name]
    with recording.eval_mode(model):
        assert torch.equal(net.run(x), model(x))


@pytest.mark.parametrize("code", [
    lambda self, x: torch.where(x > 0, x, 0.0),
    lambda self, x: torch.where(x > 0, 0.0, x),
    lambda self, x: torch.pow(2.0, x),
])  # fmt: skip
def test_functions_that_may_be_given_numbers_for_tensors_are_recorded(code):
    """Without care, `torch.where` takes what is recorded for a tensor of C++, and Python ends."""
    model, x = Sees(code), torch.randn(3, 3, 8, 8)
    net = tracing.trace(model, x)
    with recording.eval_mode(model):
        assert torch.equal(net.run(x), model(x))


class Sharing(nn.Module):
    """Weights and buffers that are one object, or one memory; a hook, and a table of its own."""

    def __init__(self, views):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("part", self.table[:3])
        self.register_buffer("same", self.norm.running_mean)
        self.plain = self.norm.running_var.detach()  # no buffer, in the memory of one
        self.halves = [self.table[:3], self.table[3:]] if views else []
        self.first.bias.requires_grad_(False)
        self.seen: dict = {}
        self.also = self.seen
        self.first.register_forward_hook(lambda module, inputs, output: output + 1)

    def forward(self, x):
        return self.second(self.norm(self.first(x)) + self.part)


@pytest.mark.parametrize("views", [False, True])
def test_a_copy_is_what_deepcopy_makes(views):
    model = Sharing(views).eval()
    ours, plain = copy_model(model), copy.deepcopy(model)
    x = torch.randn(4, 3)
    for out in (ours, plain):
        assert torch.equal(out(x), model(x)) and not out.training
        assert out.second.weight is out.first.weight is not model.first.weight
        assert out.same is out.norm.running_mean is not model.same
        assert out.part.untyped_storage().data_ptr() == out.table.untyped_storage().data_ptr()
        assert out.plain.untyped_storage().data_ptr() == out.norm.running_var.untyped_storage().data_ptr()
        assert out.also is out.seen is not model.seen
        assert not out.first.bias.requires_grad and out.first.weight.requires_grad
        assert out.norm._forward_hooks is not model.norm._forward_hooks
    assert list(ours.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.zero_()
    assert not any(half.any() for half in ours.halves) and len(ours.halves) == 2 * views
    assert model.table[1] == 1 and model.norm.running_var[0] == 1 and model.first.weight.abs().sum() > 0


def test_a_copy_keeps_tensors_of_any_kind_and_views_beside_them():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    model.adjacency = torch.eye(3).to_sparse()  # has no storage
    model.register_buffer("graph", torch.eye(3).to_sparse())
    model.register_buffer("empty", torch.zeros(3, device="meta"))
    model.tops = [model[0].running_mean[:1]]
    out = copy_model(model)
    assert torch.equal(out.adjacency.to_dense(), torch.eye(3)) and torch.equal(out.graph.to_dense(), torch.eye(3))
    out[0].running_mean.fill_(7)
    assert out.empty.is_meta and out.tops[0] == 7 and model.tops[0] == 0


def test_a_copy_uses_what_it_is_given_and_a_way_of_the_modules_own():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            return Own(5, 5)

    class Forgetful(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.cache = {}

        def __getstate__(self):
            del self.cache
            return vars(self) | {"options": {"a": 1}}

    model = nn.Sequential(nn.ReLU(), Forgetful(), nn.ReLU())
    assert copy_model(model)[1].options == {"a": 1}

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    given = nn.Parameter(torch.ones(2, 2))
    out = copy_model(model, {id(model[0].weight): given})
    assert out[0].weight is given and out[1].in_features == 5
