import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from cases import CASES, inputs, make
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from repairlib import combine, interpolate

D = 200_000
DISTRIBUTIONS = {
    "box": (combine.box(0.3), stats.uniform(0.2, 0.6)),
    "hypercube": (combine.box(0.5), stats.uniform(0, 1)),
    "box beyond": (combine.box(0.8), stats.uniform(-0.3, 1.6)),
    "box about A": (combine.box(0.25, center=0), stats.uniform(-0.25, 0.5)),
    "subcube low": (combine.subcube(0.2), stats.uniform(0, 0.4)),
    "subcube high": (combine.subcube(0.9), stats.uniform(0.8, 0.2)),
    "bernoulli": (combine.bernoulli(0.3), stats.bernoulli(0.3)),
    **{
        f"hyperplane {alpha}": (combine.hyperplane(alpha), stats.truncexpon(b := combine._rate(alpha), 0, 1 / b))
        for alpha in (0.001, 0.1, 0.3, 0.49)
    },
}


def drawn(quantile, d=D, seed=0):
    """The coefficients themselves: of A = 0 and B = 1."""
    return combine.elementwise({"w": torch.zeros(d)}, {"w": torch.ones(d)}, quantile, seed)["w"].double()


def same_bits(state, other):
    return all(
        v.equal(other[k]) and v.dtype == other[k].dtype and torch.equal(v.signbit(), other[k].signbit())
        for k, v in state.items()
    )


# ------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_have_the_moments_and_the_support_of_their_distribution(name):
    quantile, theory = DISTRIBUTIONS[name]
    c = drawn(quantile)
    low, high = theory.support()
    assert c.min() >= low - 1e-6 and c.max() <= high + 1e-6
    mean, variance, kurtosis = (float(m) for m in theory.stats("mvk"))
    assert abs(float(c.mean()) - mean) < 4 * math.sqrt(variance / D)
    assert abs(float(c.var()) - variance) < 4 * variance * math.sqrt((kurtosis + 2) / D)
    if name != "bernoulli":
        u = torch.linspace(0, 1, 1001)[:-1]
        np.testing.assert_allclose(quantile(u), theory.ppf(u.double()), rtol=1e-5, atol=1e-6)


def test_hyperplane_is_mirrored_above_one_half_and_uniform_there():
    u = torch.rand(1000)
    torch.testing.assert_close(combine.hyperplane(0.5)(u), u)
    torch.testing.assert_close(combine.hyperplane(0.5 + 1e-9)(u), u)
    torch.testing.assert_close(combine.hyperplane(0.8)(u), 1 - combine.hyperplane(0.2)(1 - u))
    assert abs(float(drawn(combine.hyperplane(0.97)).mean()) - 0.97) < 4 / math.sqrt(D)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.8])
def test_hyperplane_misses_its_mean_by_one_over_the_root_of_the_number_of_weights(alpha):
    """Over all entries of a network, which is so seen to have independent coefficients in all of its tensors."""
    rate, draws = combine._rate(min(alpha, 1 - alpha)), 400
    theory = stats.truncexpon(rate, 0, 1 / rate).std() if rate else math.sqrt(1 / 12)
    for d in (40, 4000):
        a, b = ({name: torch.full((d // 4,), end) for name in "stuv"} for end in (0.0, 1.0))
        states = (combine.elementwise(a, b, combine.hyperplane(alpha), seed) for seed in range(draws))
        missed = torch.stack([torch.cat(list(c.values())).mean() for c in states]).double() - alpha
        assert abs(float(missed.mean())) < 4 * theory / math.sqrt(d * draws)
        assert abs(math.sqrt(d) * float(missed.std()) / theory - 1) < 4 / math.sqrt(2 * draws)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.floats(1e-9, 0.5))
@example(0.5 - 1e-13)
@example(0.02)
@example(0.4992)  # where the series takes over
def test_rate_gives_the_mean(mean):
    rate = combine._rate(mean)
    if rate:
        with localcontext() as context:
            context.prec, context.Emin = 60, -(10**12)  # the second term of a large rate underflows
            r = Decimal(rate)
            assert float(1 / r - 1 / (r.exp() - 1) if rate < 1e4 else 1 / r) == pytest.approx(mean, rel=1e-11)
    else:
        assert mean == pytest.approx(0.5, abs=1e-14)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.floats(0, 1))
@example(5e-324)
@example(1 - 2**-53)
def test_hyperplane_stays_in_the_cube_and_rises_with_u(alpha):
    u = torch.tensor([0, 2**-24, 0.1, 0.5, 0.9, 1 - 2**-24])
    c = combine.hyperplane(alpha)(u)
    assert (c >= 0).all() and (c <= 1).all() and (c.diff() >= 0).all()


@pytest.mark.parametrize("make_quantile", [combine.subcube, combine.hyperplane, combine.bernoulli])
@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_parameters_outside_the_unit_interval_are_refused(make_quantile, bad):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], not"):
        make_quantile(bad)


@pytest.mark.parametrize("bad", [-0.1, math.inf, math.nan])
def test_boxes_have_a_size(bad):
    with pytest.raises(ValueError, match="half the edge"):
        combine.box(bad)


# ------------------------------------------------------------------------------------------ element-wise


@pytest.mark.parametrize("name", CASES)
def test_ends_of_every_interpolating_distribution_are_the_models_bit_for_bit(name):
    a, b = make(name, 0).state_dict(), make(name, 1).state_dict()
    first = next(k for k, v in a.items() if v.is_floating_point())
    a[first].view(-1)[0] = -0.0
    b[first].view(-1)[-1] = -0.0
    for distribution in (combine.subcube, combine.hyperplane, combine.bernoulli):
        for end, state in ((0.0, a), (1.0, b)):
            assert same_bits(combine.elementwise(a, b, distribution(end), 0), state)
    picked = combine.elementwise(a, b, combine.bernoulli(0.5), 0)
    assert all(((v == a[k]) | (v == b[k])).all() for k, v in picked.items())
    assert all((picked[first] == end[first]).any() for end in (a, b))


def test_combination_against_a_float64_reference():
    a, b = (make("resnet8-bn-w0.5", s, torch.float64).state_dict() for s in (0, 1))
    counts = next(k for k in a if k.endswith("num_batches_tracked"))
    a[counts] += 7
    out = combine.elementwise(a, b, combine.box(0.5), seed=3)
    generator = torch.Generator().manual_seed(3)
    assert list(out) == list(a)
    for name in sorted(a):
        if a[name].is_floating_point():
            c = torch.rand(a[name].shape, generator=generator).double().numpy()
            np.testing.assert_allclose(out[name], (1 - c) * a[name].numpy() + c * b[name].numpy(), rtol=1e-14)
        else:
            assert torch.equal(out[name], a[name])


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_of_any_size_give_the_same_combination(piece, monkeypatch):
    a, b = (make("resnet8-bn-w0.5", s).state_dict() for s in (0, 1))
    whole = combine.elementwise(a, b, combine.hyperplane(0.3), 5)
    monkeypatch.setattr(combine, "PIECE", piece)
    assert same_bits(combine.elementwise(a, b, combine.hyperplane(0.3), 5), whole)


def test_infinities_that_both_have_stay():
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    a, b = {"mask": mask, "w": torch.zeros(9)}, {"mask": mask.clone(), "w": torch.ones(9)}
    out = combine.elementwise(a, b, combine.box(0.5), 0)
    assert torch.equal(out["mask"], mask) and out["w"].isfinite().all()


def test_a_seed_is_a_sample_whatever_the_order_the_precision_and_the_global_generator():
    a, b = (make("mlp3-plain-w8", s).state_dict() for s in (0, 1))
    before = {k: v.clone() for k, v in a.items()}, torch.random.get_rng_state()
    out = combine.elementwise(a, b, combine.hyperplane(0.3), 5)
    assert same_bits(a, before[0]) and torch.equal(torch.random.get_rng_state(), before[1])
    backwards = combine.elementwise(dict(reversed(a.items())), b, combine.hyperplane(0.3), 5)
    assert list(backwards) == list(reversed(a)) and same_bits(out, backwards)
    doubles = ({k: v.double() for k, v in state.items()} for state in (a, b))
    for name, value in combine.elementwise(*doubles, combine.hyperplane(0.3), 5).items():
        torch.testing.assert_close(value.float(), out[name], rtol=1e-5, atol=1e-6)
    assert not same_bits(out, combine.elementwise(a, b, combine.hyperplane(0.3), 6))


@pytest.mark.parametrize("name", ["mlp2-bn-w8", "resnet8-bn-w0.5"])
def test_extrapolated_variances_stay_valid(name):
    a, b = make(name, 0), make(name, 1)
    out = combine.elementwise(a.state_dict(), b.state_dict(), combine.box(20.0, center=0), 0)
    variances = torch.cat([v for k, v in out.items() if k.endswith("running_var")])
    assert (variances == 0).any() and (variances >= 0).all()
    assert min(v.min() for v in out.values()) < 0
    assert interpolate.with_state(a, out)(inputs(name)).isfinite().all()


# ------------------------------------------------------------------------------------------ extremes and grids


@pytest.mark.parametrize("which", ["min", "max"])
def test_extremes_against_numpy(which):
    states = [make("resnet8-bn-w0.5", s).state_dict() for s in range(3)]
    for value in (v for state in states for v in state.values() if v.is_floating_point()):
        value.mul_(8).round_().div_(8)  # to steps so coarse that many tie
    out = combine.extreme(states, which)
    for name, value in out.items():
        rows = np.stack([s[name].numpy() for s in states])
        keys = np.abs(rows)
        index = (len(rows) - 1 - keys[::-1].argmin(0) if which == "min" else keys.argmax(0))[None]
        np.testing.assert_array_equal(value, np.take_along_axis(rows, index, 0)[0])
        assert value.data_ptr() != states[0][name].data_ptr()
    with pytest.raises((ValueError, TypeError), match="which"):  # the checker of annotations is first in the tests
        combine.extreme(states, "median")


def test_of_values_that_tie_max_takes_the_first_and_min_the_last():
    a, b, c = ({"w": torch.tensor(w)} for w in ([2.0, -2.0, 1.0, -5.0], [-2.0, 2.0, -4.0, 5.0], [2.0, -2.0, 4.0, -1.0]))
    assert combine.extreme([a, b], "max")["w"].tolist() == [2, -2, -4, -5]
    assert combine.extreme([a, b], "min")["w"].tolist() == [-2, 2, 1, 5]
    assert combine.extreme([a, b, c], "max")["w"].tolist() == [2, -2, -4, -5]
    assert combine.extreme([a, b, c], "min")["w"].tolist() == [2, -2, 1, -1]
    assert combine.extreme([b, c, a], "max")["w"].tolist() == [-2, 2, -4, 5]
    assert combine.extreme([c, a, b], "min")["w"].tolist() == [-2, 2, 1, -1]
    assert combine.extreme([c, b], "min")["w"].tolist() == [-2, 2, -4, -1]


# Values of few sizes in both signs, so that most lists have ties; -0.0 is equal to 0.0, and yet another entry.
FEW = st.sampled_from([-0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(FEW, FEW), min_size=1, max_size=40))
@example([(1.0, -1.0), (-1.0, 1.0), (0.0, -0.0), (-0.0, 0.0), (2.0, 2.0)])
@example([(0.0, -0.0), (-0.0, 0.0), (-0.0, -0.0)])
def test_min_and_max_of_two_models_are_opposite_vertices(entries):
    a, b = torch.tensor(entries, dtype=torch.float32).T.contiguous()
    most, least = (combine.extreme([{"w": a}, {"w": b}], which) for which in ("max", "min"))
    assert same_bits({"w": most["w"] + least["w"]}, {"w": a + b})
    of_a = (most["w"] == a) & (most["w"].signbit() == a.signbit())
    assert same_bits({"w": torch.where(of_a, a, b)}, most) and same_bits({"w": torch.where(of_a, b, a)}, least)


def test_simplex_grid_has_every_point_once():
    grid = combine.simplex_grid(3, 4)
    assert len(grid) == len(set(grid)) == math.comb(6, 2)
    assert all(sum(w) == pytest.approx(1) and min(w) >= 0 for w in grid)
    assert {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.25, 0.25)} <= set(grid)
    assert grid == sorted(grid, reverse=True)
    assert len(combine.simplex_grid(8, 10)) == math.comb(17, 7)  # nothing is enumerated in vain
    with pytest.raises(ValueError, match="at least one model"):
        combine.simplex_grid(0, 4)


# ------------------------------------------------------------------------------------------ stitching


@pytest.mark.parametrize("name", CASES)
def test_every_entry_is_in_one_layer_and_the_ends_of_stitching_are_the_models(name):
    a, b = make(name, 0), make(name, 1)
    parts = combine.layers(a, inputs(name, 2))
    assert sorted(k for part in parts.values() for k in part) == sorted(a.state_dict())
    weights = [k.removesuffix(".weight") for k, v in a.state_dict().items() if k.endswith(".weight") and v.ndim > 1]
    assert sorted(parts) == sorted(weights)
    states = a.state_dict(), b.state_dict()
    for which, end in zip((len(parts), 0), states, strict=True):
        assert same_bits(combine.stitch(*states, which, parts), end)
    cut = combine.stitch(*states, 1, parts)
    first = next(iter(parts))
    assert all(cut[k].equal(states[0 if k in parts[first] else 1][k]) for k in cut)
    assert not any(k.startswith("head") for k in parts[first])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("mlp", "vgg", "tiny"))])
def test_a_stitched_chain_is_the_lower_part_of_a_and_the_upper_part_of_b(name):
    a, b = make(name, 0), make(name, 1)
    x = inputs(name)
    parts = combine.layers(a, x)
    for layer, title in enumerate(parts):
        net = interpolate.with_state(a, combine.stitch(a.state_dict(), b.state_dict(), layer, parts))
        y, side = x, a
        for child, _ in a.named_children():
            side = b if child == title else side
            y = getattr(side, child)(y)
        torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)


class Odd(nn.Module):
    """A normalisation before all layers, two branches whose normalisations run last, a lone and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.before, self.left, self.right = nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(3, 4)
        self.norm_right, self.norm_left = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.scale, self.unused = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(2))

    def forward(self, x):
        x = self.before(x)
        y, z = self.left(x), self.right(x)
        return self.norm_left(y) * self.scale + self.norm_right(z)


def test_normalisations_follow_the_data_and_not_the_order():
    parts = combine.layers(Odd(), torch.zeros(2, 3))
    owner = {name.split(".")[0]: title for title, part in parts.items() for name in part}
    assert list(parts) == ["left", "right"]
    assert owner == {
        "before": "left", "left": "left", "norm_left": "left", "scale": "left", "unused": "left",
        "right": "right", "norm_right": "right",
    }  # fmt: skip


class Functional(nn.Module):
    """Layers without a module of their own, and a matrix that is no weight of a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Embedding(7, 3), nn.LayerNorm((2, 3))
        self.position, self.weight, self.bias = (nn.Parameter(torch.rand(*s)) for s in ((2, 3), (4, 3), (4,)))

    def forward(self, x):
        return nn.functional.linear(self.norm(self.first(x) + self.position), self.weight, self.bias)


def test_layers_without_a_module_are_named_after_their_node():
    parts = combine.layers(Functional(), torch.zeros(1, 2, dtype=torch.int64))
    assert {title: set(part) for title, part in parts.items()} == {
        "first": {"first.weight", "position", "norm.weight", "norm.bias"}, "linear": {"weight", "bias"},
    }  # fmt: skip


def test_stitching_refuses_what_does_not_fit():
    a = make("mlp3-plain-w8").state_dict()
    parts = combine.layers(make("mlp3-plain-w8"), inputs("mlp3-plain-w8", 2))
    with pytest.raises(ValueError, match="layer must be a whole number from 0 to 4"):
        combine.stitch(a, a, 5, parts)
    with pytest.raises(ValueError, match="no layer has 'head.weight'"):
        combine.stitch(a, a, 1, {k: v for k, v in parts.items() if k != "head"})
    with pytest.raises(ValueError, match="no weight layer"):
        combine.layers(nn.ReLU(), torch.zeros(1, 2))


def test_draws_depend_neither_on_the_default_precision_nor_on_infinities():
    a = {"a": torch.randn(5), "b": torch.tensor([-math.inf, 0.0]), "c": torch.randn(9, requires_grad=True)}
    b = {"a": torch.randn(5), "b": a["b"].clone(), "c": torch.randn(9)}
    found = combine.elementwise(a, b, combine.box(0.5), 0)
    assert torch.equal(found["b"], a["b"]) and not found["c"].requires_grad
    finite = {"a": a["a"], "b": torch.zeros(2), "c": a["c"]}, {"a": b["a"], "b": torch.ones(2), "c": b["c"]}
    assert torch.equal(combine.elementwise(*finite, combine.box(0.5), 0)["c"], found["c"])
    torch.set_default_dtype(torch.float64)
    try:
        again = combine.elementwise(a, b, combine.box(0.5), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again["c"], found["c"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "how", [combine.bernoulli(0.0), combine.bernoulli(0.5), combine.bernoulli(1.0), combine.box(0.5)]
)
def test_what_is_not_finite_is_refused_whatever_is_drawn(bad, how):
    for which in (0, 1):
        states = [{"w": torch.zeros(4)}, {"w": torch.ones(4)}]
        states[which]["w"][1] = bad
        with pytest.raises(ValueError, match=f"model {'AB'[which]}: 'w' holds NaN or infinity"):
            combine.elementwise(*states, how, seed=0)
