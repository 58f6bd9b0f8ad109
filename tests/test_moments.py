from unittest.mock import patch

import pytest
import torch
from cases import batches, make
from hypothesis import given, settings
from hypothesis import strategies as st

from repairlib.moments import Moments, gather
from repairlib.tracing import trace


def split(x: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    edges = [0, *sorted({c % len(x) for c in cuts} - {0}), len(x)]
    return [x[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 999), max_size=8),
    st.sampled_from([1, 100, 1000, 10**6]),
    st.sampled_from([0.0, 1.0, 1000.0]),
    st.sampled_from([(1, 1), (3, 2), (8, 8)]),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 5),
)
def test_streaming_equals_direct_for_any_split(cuts, cached, mean_in_stds, positions, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    std = torch.rand(2, 6, 1, 1, generator=generator) + 0.1
    shape = (200, 6, *positions)
    common = torch.randn(shape, generator=generator)
    a, b = (s * (common + torch.randn(shape, generator=generator)) + mean_in_stds * s for s in std)
    a = a.to(memory_format=layout)  # and b is as it is: networks may have layouts of their own
    full, paired = Moments("full"), Moments("paired")
    with patch("repairlib.moments.CACHED", cached):  # however many parts a batch is added in
        for xs in zip(split(a, cuts), split(b, cuts), strict=True):
            full.update(*xs)
            paired.update(*xs)
    rows = [x.transpose(0, 1).flatten(1).double() for x in (a, b)]
    expected = torch.cov(torch.cat(rows), correction=0)
    for m in (full, paired):
        assert m.count == 200 * positions[0] * positions[1]
        for k, r in enumerate(rows):
            torch.testing.assert_close(m.mean(k), r.mean(1), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(m.var(k), r.var(1, correction=0), rtol=1e-5, atol=0)
    # A covariance near zero has no relative accuracy of its own; its scale is the product of standard deviations.
    scale = torch.outer(full.std(0), full.std(1))
    torch.testing.assert_close(full.cov() / scale, expected[:6, 6:] / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        paired.cov() / scale.diagonal(), expected[:6, 6:].diagonal() / scale.diagonal(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cached", [1, 10**6])
def test_a_first_example_far_from_the_others_costs_no_precision(cached):
    x = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0))
    x[0] = 1e4
    m = Moments("paired")
    with patch("repairlib.moments.CACHED", cached):
        for xs in (x[:1], x[1:]):
            m.update(xs, -xs)
    torch.testing.assert_close(m.var(), x.double().var(0, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(m.cov(), -m.var(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("networks", [1, 2, 4])
@pytest.mark.parametrize("shape", [(40, 300, 7, 7), (40, 6, 7, 7), (3, 2000, 2, 2), (1, 5, 2)])
@pytest.mark.parametrize("cross", ["none", "paired", "full"])
def test_wide_and_narrow_maps_have_the_statistics_that_they_have(shape, cross, networks):
    values = torch.randn(networks, *shape, generator=torch.Generator().manual_seed(0)) + 3
    m = Moments(cross)
    m.update(*values)
    rows = [x.double().transpose(0, 1).flatten(1) for x in values]
    for k, r in enumerate(rows):
        torch.testing.assert_close(m.mean(k), r.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(m.var(k), r.var(1, correction=0), rtol=1e-5, atol=0)
    first, *others = (r - r.mean(1, keepdim=True) for r in rows)
    for k, r in enumerate(others if cross != "none" else [], start=1):
        expected = first @ r.T / r.shape[1]
        expected = expected if cross == "full" else expected.diagonal()
        torch.testing.assert_close(m.cov(k), expected, rtol=1e-5, atol=1e-5)


def test_float64_activations_keep_their_precision():
    a, b = torch.randn(2, 500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    m = Moments("full")
    for xs in zip(a.split(77), b.split(77), strict=True):
        m.update(*xs)
    torch.testing.assert_close(m.cov(), torch.cov(torch.cat([a, b], 1).T, correction=0)[:4, 4:], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_statistics(dtype):
    x = (torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    m = Moments()
    for chunk in x.split(100):
        m.update(chunk)
    torch.testing.assert_close(m.var(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_dead_units_have_no_correlation_and_are_reported(dtype, rtol):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[:, 1] = 7.0
    m = Moments("full")
    m.update(x, x)
    assert m.dead(0).tolist() == [False, True, False]
    corr = m.corr()
    assert corr.isfinite().all() and (corr[1] == 0).all() and (corr[:, 1] == 0).all()
    torch.testing.assert_close(corr.diagonal()[[0, 2]], torch.ones(2, dtype=torch.float64), rtol=rtol, atol=0)
    assert m.corr(eps=1e-4)[0, 0] < corr[0, 0]


def test_gather_reads_all_networks_in_step():
    name = "resnet8-bn-w0.5"
    models = [make(name, seed) for seed in range(3)]
    data = batches(name)
    nets = [trace(model, data[0]) for model in models]
    taps = [n for n, kind in nets[0].kinds.items() if kind in ("conv", "add")]
    together = gather(nets, data, taps, cross="full")
    for k, net in enumerate(nets):
        alone = gather([net], data, taps, cross="full")
        for tap in taps:
            assert torch.equal(together[tap].var(k), alone[tap].var())
            assert torch.equal(together[tap].mean(k), alone[tap].mean())
    assert together[taps[0]].cov(2).shape == (len(together[taps[0]].mean()),) * 2


def test_empty_data_and_missing_covariances_are_errors():
    name = "mlp1-plain-w6"
    net = trace(make(name), batches(name)[0])
    tap = next(n for n, kind in net.kinds.items() if kind == "linear")
    with pytest.raises(ValueError, match="calibration data is empty"):
        gather([net], [], [tap])
    with pytest.raises(ValueError, match="empty batch"):
        Moments().update(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="cross='full'"):
        gather([net, net], batches(name), [tap])[tap].cov()
    with pytest.raises(ValueError, match="unknown cross 'all'"):
        Moments("all")


def test_autocast_of_the_caller_does_not_halve_the_precision():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    m = Moments("full")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m.update(x, x)
    torch.testing.assert_close(m.corr().diagonal(), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    for k in (0, 2):
        with pytest.raises(ValueError, match=f"covariances with network {k} were not gathered"):
            m.cov(k)


def test_mean_products():
    a, b = torch.randn(2, 90, 4, generator=torch.Generator().manual_seed(0)) + 2
    m = Moments("full")
    for xs in zip(a.split(40), b.split(40), strict=True):
        m.update(*xs)
    torch.testing.assert_close(m.inner(), (a.double().T @ b.double()) / 90, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cross", ["none", "paired", "full"])
def test_activations_of_other_shapes_or_of_other_numbers_of_networks_are_refused(cross):
    x = torch.randn(4, 3, 2, 2)
    for other in (torch.randn(3, 3, 2, 2), torch.randn(4, 5, 2, 2), torch.randn(4, 3, 1, 4), torch.randn(4, 3)):
        with pytest.raises(ValueError, match="have different shapes: \\(4, 3, 2, 2\\), "):
            Moments(cross).update(x, other)
    m = Moments(cross)
    m.update(x, x + 1)
    with pytest.raises(ValueError, match="of 1 networks' activations, where the first was of 2"):
        m.update(x)


def test_complex_activations_are_refused():
    with pytest.raises(ValueError, match="activations are complex"):
        Moments().update(torch.zeros(2, 3, dtype=torch.complex64))
