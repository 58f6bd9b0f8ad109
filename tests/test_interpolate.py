import math

import pytest
import torch
from cases import CASES, inputs, make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import repairlib
from repairlib import interpolate as ip


@pytest.mark.parametrize("name", CASES)
def test_alpha_0_and_1_return_the_endpoints_bit_for_bit(name):
    a, b = make(name, 0).state_dict(), make(name, 1).state_dict()
    first = next(iter(a))
    a[first].view(-1)[0] = -0.0  # a sum would lose the sign of zero
    for alpha, end in ((0, a), (1, b), (0.0, a), (1.0, b)):
        out = ip.interpolate_states(a, b, alpha)
        assert all(out[k].equal(end[k]) for k in end)
        assert torch.equal(torch.signbit(out[first]), torch.signbit(end[first]))


def test_midpoint_and_buffers():
    a, b = make("resnet8-bn-w0.5", 0).state_dict(), make("resnet8-bn-w0.5", 1).state_dict()
    a["bn.num_batches_tracked" if "bn.num_batches_tracked" in a else next(k for k in a if "num_batches" in k)] += 7
    out = ip.interpolate_states(a, b, 0.25)
    for k, v in out.items():
        expected = 0.75 * a[k] + 0.25 * b[k] if v.is_floating_point() else a[k]
        assert torch.equal(v, expected) and v.dtype == a[k].dtype


def test_modules_are_untouched_and_share_nothing():
    a, b = make("mlp1-plain-w6", 0), make("mlp1-plain-w6", 1)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    out = ip.interpolate_models(a, b, 0.5)
    with torch.no_grad():
        for p in out.parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in a.state_dict().items())


def test_different_architectures_name_the_first_difference():
    a = make("mlp1-plain-w6").state_dict()
    for other in (make("mlp3-plain-w8").state_dict(), make("mlp2-bn-w8").state_dict()):
        with pytest.raises(ValueError, match="different architectures: '"):
            ip.interpolate_states(a, other, 0.5)
    missing = dict(a)
    gone = list(a)[1]
    del missing[gone]
    with pytest.raises(ValueError, match=f"'{gone}' is in model A only"):
        ip.check_compatible(a, missing)
    with pytest.raises(ValueError, match=f"'{gone}' is in model B only"):
        ip.check_compatible(missing, a)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad):
    a, b = make("mlp1-plain-w6", 0).state_dict(), make("mlp1-plain-w6", 1).state_dict()
    key = list(b)[-1]
    b[key] = b[key].clone().fill_(bad)
    with pytest.raises(ValueError, match=f"model B: '{key}' holds NaN or infinity"):
        ip.interpolate_states(a, b, 0.5)


@given(st.lists(st.floats(0, 10), min_size=11, max_size=11))
def test_barrier_is_the_largest_difference(cost):
    alpha = [i / 10 for i in range(11)]
    linear, mean = (ip.barrier_of(alpha, cost, baseline) for baseline in ("linear", "mean"))
    assert linear == pytest.approx(max(c - (1 - a) * cost[0] - a * cost[-1] for a, c in zip(alpha, cost, strict=True)))
    assert mean == pytest.approx(max(cost) - (cost[0] + cost[-1]) / 2)
    assert linear >= 0  # the ends themselves lie on the line
    straight = [(1 - a) * cost[0] + a * cost[-1] for a in alpha]
    assert ip.barrier_of(alpha, straight) == pytest.approx(0, abs=1e-9)


def test_barrier_needs_both_ends():
    with pytest.raises(ValueError, match="both endpoints"):
        ip.barrier_of([0, 0.5], [1, 2])
    with pytest.raises(ValueError, match="unknown baseline 'median'"):
        ip.barrier_of([0, 1], [1, 2], "median")


@pytest.mark.parametrize("name", CASES)
def test_vertices_and_edges_of_several_models_are_those_of_fewer_bit_for_bit(name):
    states = [make(name, seed).state_dict() for seed in range(3)]
    for i in range(3):
        out = ip.mix_states(states, [float(i == j) for j in range(3)])
        assert all(out[k].equal(v) and out[k].data_ptr() != v.data_ptr() for k, v in states[i].items())
    edge, straight = ip.mix_states(states, [0.75, 0, 0.25]), ip.interpolate_states(states[0], states[2], 0.25)
    assert all(edge[k].equal(v) for k, v in straight.items())
    doubles = [{k: v.double() for k, v in state.items()} for state in states]
    out = ip.mix_states(doubles, [0.5, -0.2, 0.7])
    for k, v in out.items():
        expected = 0.5 * doubles[0][k] - 0.2 * doubles[1][k] + 0.7 * doubles[2][k]
        torch.testing.assert_close(v, expected.clamp_min(0) if k.endswith("running_var") else expected)


def test_weights_must_sum_to_1_and_fit():
    states = [make("mlp1-plain-w6", seed).state_dict() for seed in range(2)]
    for bad in ([0.5, 0.6], [math.nan, 1], [0, 0]):
        with pytest.raises(ValueError, match="weights must sum to 1"):
            ip.mix_states(states, bad)
    with pytest.raises(ValueError, match="2 models have 1 weights"):
        ip.mix_states(states, [1])
    with pytest.raises(ValueError, match="alpha must be a number, not nan"):
        ip.interpolate_states(*states, math.nan)
    with pytest.raises(ValueError, match="different architectures: .* in model C only"):
        ip.mix_states([*states, make("mlp3-plain-w8").state_dict()], [0.5, 0.5, 0])


def test_extrapolated_variances_are_clamped():
    name = "resnet8-bn-w0.5"
    a, b = make(name, 0), make(name, 1)
    for alpha in (-1.0, 2.0):
        net = ip.interpolate_models(a, b, alpha)
        variances = torch.cat([v for k, v in net.state_dict().items() if k.endswith("running_var")])
        assert variances.min() == 0 and net(inputs(name)).isfinite().all()


# ------------------------------------------------------------------------------------------ homogeneous


PLAIN = [name for name in CASES if "-plain-" in name]


@pytest.mark.parametrize("name", [name for name in PLAIN if not name.startswith("resnet")])
def test_homogeneous_path_to_zero_scales_the_function(name):
    a = make(name, 0, torch.float64)
    x = inputs(name, dtype=torch.float64)
    depths = ip.bias_depths(a, x)
    zero = {k: torch.zeros_like(v) for k, v in a.state_dict().items()}
    layers = sum(v.ndim > 1 for v in zero.values())
    assert sorted(depths.values()) == list(range(1, layers + 1)) or "nobias" in name
    for alpha in (0.0, 0.3, 0.9, 1.0):
        path = ip.with_state(a, ip.interpolate_homogeneous(a.state_dict(), zero, alpha, depths))
        back = ip.with_state(a, ip.interpolate_homogeneous(zero, a.state_dict(), 1 - alpha, depths))
        for net in (path, back):
            torch.testing.assert_close(net(x), (1 - alpha) ** layers * a(x), rtol=1e-10, atol=0)
        if depths and 0 < alpha < 1:
            straight = ip.with_state(a, ip.interpolate_states(a.state_dict(), zero, alpha))
            assert not torch.allclose(straight(x), path(x), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_homogeneous_path_ends_at_the_models_and_weights_go_straight(name):
    a, b = make(name, 0), make(name, 1)
    depths = ip.bias_depths(a, inputs(name, 2))
    assert set(depths) == {k for k, v in a.state_dict().items() if v.ndim == 1}
    a, b = a.state_dict(), b.state_dict()
    for alpha, end in ((0, a), (1, b)):
        assert all(v.equal(end[k]) for k, v in ip.interpolate_homogeneous(a, b, alpha, depths).items())
    out, straight = ip.interpolate_homogeneous(a, b, 0.5, depths), ip.interpolate_states(a, b, 0.5)
    for k, v in straight.items():
        torch.testing.assert_close(out[k], v * 0.5 ** (depths.get(k, 1) - 1))
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], not 1.5"):
        ip.interpolate_homogeneous(a, b, 1.5, depths)


def test_depth_is_the_longest_path():
    name = "resnet8-plain-w0.5"
    depths = ip.bias_depths(make(name), inputs(name, 2))
    assert depths["conv1.bias"] == 1 and depths["head.bias"] == 8
    shortcut = next(k for k in depths if k.startswith("stages.1.0.shortcut"))
    assert depths[shortcut] == depths["stages.1.0.conv1.bias"] == 4 and depths["stages.1.0.conv2.bias"] == 5


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.shift = nn.Linear(3, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) + self.shift)


def shared():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize("name", [name for name in CASES if "-plain-" not in name])
def test_networks_that_are_not_homogeneous_are_refused(name):
    with pytest.raises(ValueError, match="no homogeneous interpolation: node '(bn|ln|bias)1"):
        ip.bias_depths(make(name), inputs(name, 2))


@pytest.mark.parametrize(
    "layers, message",
    [
        ((nn.GELU(),), r"node '_1' \(activation\) does not scale"),
        ((nn.ReLU6(),), r"node '_1' \(activation\)"),
        ((nn.Softmax(1), nn.Linear(3, 3)), r"node '_1' \(softmax\)"),
        ((nn.GroupNorm(1, 3),), r"node '_1' \(groupnorm\)"),
        ((nn.PReLU(),), r"node '_1' \("),
        ((Shifted(),), "node '_1_shift'"),
        ((shared(),), "1.0.weight is used twice"),
        ((nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),), "1.weight is used twice or computed"),
    ],
)
def test_what_makes_a_network_inhomogeneous_is_named(layers, message):
    with pytest.raises(ValueError, match=message):
        ip.bias_depths(nn.Sequential(nn.Linear(3, 3), *layers), torch.zeros(2, 3))


def test_softmax_of_the_logits_is_part_of_the_loss_and_idle_parameters_are_named():
    net = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(), nn.LogSoftmax(1))
    assert ip.bias_depths(net, torch.zeros(2, 3)) == {"0.bias": 1}
    net[0].register_parameter("idle", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="'0.idle' is no weight or bias"):
        ip.bias_depths(net, torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------- what state dicts may hold


def test_infinities_that_are_the_same_are_kept():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    a, b = ({"w": torch.tensor([v]), "mask": mask.clone()} for v in (0.0, 4.0))
    for alpha in (0.25, 1.5):
        mixed = ip.interpolate_states(a, b, alpha)
        assert torch.equal(mixed["mask"], mask) and mixed["w"] == 4 * alpha
    with pytest.raises(ValueError, match="'mask' holds NaN or infinity"):
        ip.interpolate_states(a, b | {"mask": mask.T.clone()}, 0.5)
    with pytest.raises(ValueError, match="'w' holds NaN"):
        ip.interpolate_states(*[{"w": torch.tensor([torch.nan])}] * 2, 0.5)


def test_half_precision_is_averaged_in_float32():
    torch.manual_seed(0)
    states = [{"w": torch.randn(1000).to(torch.bfloat16)} for _ in range(5)]
    mean = ip.mix_states(states, [0.2] * 5)["w"]
    expected = torch.stack([s["w"].double() for s in states]).mean(0)
    assert mean.dtype == torch.bfloat16
    torch.testing.assert_close(mean.double(), expected, rtol=2**-8, atol=1e-6)  # rounded once


def test_complex_weights_are_averaged():
    a, b = {"w": torch.tensor([1 + 2j])}, {"w": torch.tensor([3 - 2j])}
    assert ip.interpolate_states(a, b, 0.5)["w"] == 2
    with pytest.raises(ValueError, match="holds NaN"):
        ip.interpolate_states(a, {"w": torch.tensor([complex(0, torch.nan)])}, 0.5)


class Extra(nn.Sequential):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        self.seen = state


def test_extra_state_is_carried_over_and_a_checkpoint_is_refused():
    a, b = (Extra(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval() for _ in range(2))
    assert ip.interpolate_models(a, b).seen == {"steps": 3}
    repairlib.align(a, b, [torch.randn(64, 8)])
    checkpoints = [{"state_dict": net.state_dict(), "epoch": 3} for net in (a, b)]
    with pytest.raises(ValueError, match="'state_dict' in model A is no tensor but OrderedDict; of a checkpoint, pass"):
        ip.interpolate_states(*checkpoints, 0.5)


def test_versions_of_a_state_dict_survive():
    from torchvision.models import mnasnet0_5

    net = mnasnet0_5(num_classes=5)  # refuses a state dict that does not say its version
    assert type(ip.interpolate_models(net, net)) is type(net)


def same(found, expected):
    """Whether all tensors are the same bit for bit."""
    return list(found) == list(expected) and all(
        torch.equal(found[k], v) and torch.equal(found[k].signbit(), v.signbit()) for k, v in expected.items()
    )


def in_turn(path, a, b, alphas=(0.3, 1, 1.2, 0, 0.5)):
    """Points of one path beside those that are made one by one."""
    for alpha in alphas:
        found, expected = path.at(alpha).state_dict(), ip.interpolate_states(a.state_dict(), b.state_dict(), alpha)
        assert same(found, expected)
        assert alpha not in (0, 1) or same(found, (b if alpha else a).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet26-bn-w0.0625", "mlp2-plain-w8-nobias"])
def test_points_of_a_path_are_those_that_are_made_one_by_one(name, dtype):
    a, b = make(name, 0, dtype), make(name, 1, dtype)
    for net in (a, b):
        next(net.parameters()).data.view(-1)[:2] = -0.0  # the path keeps the sign of zeros
        net.register_buffer("mask", torch.full((3,), -torch.inf))
        net.register_buffer("steps", torch.tensor(3))
    path = ip.LinearPath(a, b)
    assert path.in_place
    in_turn(path, a, b)
    for alpha in (math.nan, 1e17):
        with pytest.raises(ValueError, match="alpha must be a number|sum to 1"):
            path.at(alpha)


@given(st.floats(-2, 3), st.integers(0, 99))
def test_weighted_means_agree_with_float64(alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(17, generator=generator) for _ in "ab")
    found = ip.interpolate_states({"w": a}, {"w": b}, alpha)["w"]
    exact = (1 - alpha) * a.double() + alpha * b.double()
    scale = abs(1 - alpha) * a.abs() + abs(alpha) * b.abs()  # of what is added, which may cancel
    assert (found - exact).abs().le(3 * 2**-24 * scale).all()


def test_a_path_keeps_weights_tied_and_writes_into_what_became_of_its_network():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in "ab")
    a[2].weight = a[0].weight
    path, other = ip.LinearPath(a, b), ip.LinearPath(b, a)
    at, back = path.at(0.25), other.at(0.75)
    assert at[2].weight is at[0].weight  # A's network: the last name counts, as in load_state_dict
    assert torch.equal(at[2].weight, ip.interpolate_states(a.state_dict(), b.state_dict(), 0.25)["2.weight"])
    assert torch.equal(back[0].weight, ip.interpolate_states(b.state_dict(), a.state_dict(), 0.75)["0.weight"])
    back.double()
    expected = ip.interpolate_states(b.state_dict(), a.state_dict(), 0.3)
    assert same(other.at(0.3).state_dict(), {name: value.double() for name, value in expected.items()})


class Loads(nn.Linear):
    """Keeps twice its weight in the state dict."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "double"] = 2 * self.weight.detach()

    def _load_from_state_dict(self, state, prefix, *rest):
        self.weight.data.copy_(state[prefix + "double"] / 2)


def hooked():
    layer = nn.Linear(4, 3)
    layer.register_state_dict_post_hook(lambda module, state, *rest: state.update(weight=2 * module.weight.detach()))
    layer.register_load_state_dict_pre_hook(lambda module, state, *rest: state.update(weight=state["weight"] / 2))
    return layer


@pytest.mark.parametrize("build", [lambda: Loads(4, 3, bias=False), hooked, lambda: Extra(nn.Linear(4, 3))])
def test_a_path_loads_as_its_modules_ask_for(build):
    torch.manual_seed(0)
    a, b = build(), build()
    path = ip.LinearPath(a, b)
    assert not path.in_place
    for alpha in (0.25, 1, 0):
        net = path.at(alpha)
        for p, q, r in zip(net.parameters(), a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, torch.lerp(q, r, alpha))


def test_a_path_tells_modules_that_keep_what_they_computed():
    class Keeps(nn.Linear):
        kept = None

        def train(self, mode=True):
            self.kept = None if mode else self.weight.detach() * 2
            return super().train(mode)

        def forward(self, x):
            return x @ (self.weight * 2 if self.kept is None else self.kept).T

    a, b = Keeps(4, 3).eval(), Keeps(4, 3).eval()
    test = [(torch.randn(20, 4), torch.arange(20) % 3)]
    path = ip.LinearPath(a, b)
    for alpha in (0.5, 0, 1):
        expected = Keeps(4, 3)
        expected.load_state_dict(ip.interpolate_states(a.state_dict(), b.state_dict(), alpha))
        assert repairlib.evaluate(path.at(alpha), test) == repairlib.evaluate(expected, test)
