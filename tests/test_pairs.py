import pytest
import torch

from repairlib import train
from repairlib.pairs import load_pair

RUNS = ["digits/mlp2-plain-w16/smoke/s1", "digits/mlp2-plain-w16/smoke/s2"]


def test_pair_of_stored_runs():
    pair = load_pair(RUNS, calibration=300)
    assert sum(len(y) for _, y in pair.calibration) == 300
    assert pair.accuracy == pytest.approx(sum(pair.evaluate(m)[1] for m in (pair.a, pair.b)) / 2)
    # Aligning changes no function, so the path's ends stay where they are.
    path = pair.path(pair.midpoint, [0, 0.5, 1])
    assert path.accuracy[0] == pair.evaluate(pair.a)[1] and path.accuracy[2] == pair.evaluate(pair.b)[1]
    repaired = pair.repair()
    assert pair.path(lambda alpha: repaired(alpha).model, [0, 1]).accuracy == (path.accuracy[0], path.accuracy[2])


def test_samples_are_drawn_by_seed():
    pair = load_pair(RUNS)
    draws = [torch.cat([x for x, _ in pair.sample(50, seed)]) for seed in (0, 0, 1)]
    assert draws[0].shape[0] == 50
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("runs", [[], RUNS[:1], [RUNS[0], "digits/mlp3-plain-w16/smoke/s2"]])
def test_a_pair_is_two_runs_of_one_model(runs):
    with pytest.raises(ValueError, match="a pair is two runs"):
        load_pair(runs)


def test_unknown_run_is_an_error_before_anything_is_trained():
    with pytest.raises(ValueError, match="smoke"):
        load_pair(["digits/mlp2-plain-w16/smok/s1"] * 2)
    assert train.default_device() in ("cpu", "cuda")
