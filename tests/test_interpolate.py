import pytest
import torch
from cases import CASES, make
from hypothesis import given
from hypothesis import strategies as st

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


def test_path_reports_points_barriers_and_midpoint():
    path = ip.walk_path(
        lambda alpha: alpha, (0, 0.5, 1), lambda alpha: (1 + alpha * (1 - alpha), 0.9 - 0.2 * alpha * (1 - alpha))
    )
    assert path.midpoint() == pytest.approx(0.85) and path.midpoint("loss") == pytest.approx(1.25)
    assert path.barrier() == pytest.approx(0.25) and path.barrier("accuracy", "mean") == pytest.approx(0.05)
    assert path.table(network="x")[1] == {"network": "x", "alpha": 0.5, "loss": 1.25, "accuracy": 0.85}
    with pytest.raises(ValueError, match="metric must be"):
        path.barrier("error")


def test_barrier_needs_both_ends():
    with pytest.raises(ValueError, match="both endpoints"):
        ip.barrier_of([0, 0.5], [1, 2])
    with pytest.raises(ValueError, match="baseline must be"):
        ip.barrier_of([0, 1], [1, 2], "median")
