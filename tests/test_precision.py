"""The other implementations of activation matching, against correlations that NumPy computes."""

import numpy as np
import pytest
import torch

from companion.experiments.pairs import load_pair
from companion.experiments.precision import IMPLEMENTATIONS, Sums, implementation_rows, match_by
from repairlib import match_activations

RUNS = ["digits/vgg11-plain-w0.0625/smoke/s1", "digits/vgg11-plain-w0.0625/smoke/s2"]


def maps(n=60, units=5, size=4):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, units, size, size, generator=generator).relu() + 0.1
    return a, (a.flip(1) + torch.randn(a.shape, generator=generator)).relu()


@pytest.mark.parametrize("average", ["pooled", "batches"])
def test_with_the_means_right_it_is_pearsons_correlation(average):
    a, b = maps()
    sums = Sums(torch.float64, average)
    for part in zip(a.split(20), b.split(20), strict=True):  # of one size, so that both averages are the same
        sums.update(*part)
    rows = torch.cat([x.double().transpose(0, 1).flatten(1) for x in (a, b)])
    exact = np.corrcoef(rows)[:5, 5:]
    np.testing.assert_allclose(sums.correlation(), exact, atol=1e-3)  # the released 1e-4 in the denominator


def test_with_the_faulty_mean_everything_correlates():
    a, b = maps()
    right, faulty = Sums(torch.float32), Sums(torch.float32, "faulty")
    for sums in (right, faulty):
        sums.update(a, b)
    assert right.correlation().abs().min() < 0.1 and faulty.correlation().min() > 0.9


def test_one_pass_and_layer_by_layer_agree_and_float64_is_the_library():
    pair = load_pair(RUNS, calibration=300)
    one, each = (
        match_by(pair.a, pair.b, pair.calibration, lambda: Sums(torch.float64), one_pass=way) for way in (True, False)
    )
    ours = match_activations(pair.a, pair.b, pair.calibration, eps=1e-4)
    for name, perm in one.permutation.items():
        assert torch.equal(perm, each.permutation[name])
        alive = ours.correlation[name] != 0
        assert torch.equal(perm[alive], ours.permutation[name][alive])


def test_rows_are_of_every_implementation():
    pair = load_pair(RUNS, calibration=300)
    rows = implementation_rows(pair)
    assert list(dict.fromkeys(row["implementation"] for row in rows)) == list(IMPLEMENTATIONS)
    assert len(rows) == 3 * len(IMPLEMENTATIONS) and all(row["seconds"] > 0 for row in rows)
    first = [row for row in rows if row["implementation"] == "this library"]
    middle = next(row for row in first if row["alpha"] == 0.5)
    assert middle["accuracy"] == pair.evaluate(pair.path("AM")(0.5))[1] and middle["moved"] == 0
    assert all(0 <= row["moved"] <= row["units"] for row in rows)
