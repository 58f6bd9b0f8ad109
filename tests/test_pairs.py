from dataclasses import replace

import pytest
import torch

from companion.experiments import methods
from companion.experiments.methods import MATCHINGS
from companion.experiments.pairs import load_pair, pairs_of, title_of
from companion.runs import train
from repairlib import Repair, match_transport, match_weights
from repairlib.evaluation import evaluate

RUNS = ["digits/mlp2-plain-w16/smoke/s1", "digits/mlp2-plain-w16/smoke/s2"]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_pair_of_stored_runs():
    pair = load_pair(RUNS, calibration=300)
    assert sum(len(y) for _, y in pair.calibration) == 300
    assert pair.endpoint_accuracy == pytest.approx(sum(pair.evaluate(m)[1] for m in (pair.a, pair.b)) / 2)
    # Aligning changes no function, so the path's ends stay where they are.
    for renorm in ("none", "REPAIR"):
        path = pair.path(renorm=renorm)
        assert [pair.evaluate(path(alpha))[1] for alpha in (0, 1)] == [pair.evaluate(m)[1] for m in (pair.a, pair.b)]
    table = pair.compare(A=pair.a, middle_of_both=pair.path()(0.5))
    assert list(table.index) == ["A", "middle of both"]
    assert table.loc["A", "accuracy (%)"] == pytest.approx(100 * pair.evaluate(pair.a)[1], abs=0.05)
    assert table.loc["A", "loss (nats)"] == pytest.approx(pair.evaluate(pair.a)[0], abs=5e-4)


def test_a_pair_is_matched_in_the_way_that_is_asked_for():
    pair = load_pair(RUNS, calibration=200, matching="WM", restarts=3)
    by_hand = match_weights(pair.a, pair.b, pair.calibration, restarts=3)
    assert pair.matching.permutation.keys() == by_hand.permutation.keys()
    assert all(torch.equal(pair.matching.permutation[group], order) for group, order in by_hand.permutation.items())
    assert same_weights(pair.aligned, by_hand.apply(pair.b))
    assert pair.aligned_by("none") is pair.b and pair.aligned_by("WM") is pair.aligned
    assert pair.matching_by("AM") is pair.matching_by("AM") is not pair.matching
    assert same_weights(pair.aligned_by("OT"), match_transport(pair.a, pair.b, pair.calibration).apply(pair.b))
    assert same_weights(pair.path("none")(1), pair.b)
    for how in (lambda: pair.matching_by("AN"), lambda: load_pair(RUNS, matching="AN")):
        with pytest.raises(ValueError, match="unknown matching 'AN'; the nearest is 'AM'"):
            how()
    with pytest.raises(ValueError, match="nearest is 'REPAIR'"):
        pair.path(renorm="REPAIRED")
    assert set(MATCHINGS) == {"none", "AM", "WM", "STE", "OT"}


def test_endpoints_are_measured_once_for_several_renormalisations(monkeypatch):
    made = []
    monkeypatch.setattr(methods, "Repair", lambda *ends, **how: made.append(how) or Repair(*ends, **how))
    runs = [f"digits/resnet8-bn-w0.25/smoke/s{seed}" for seed in (1, 2)]
    shared, renorms = load_pair(runs, calibration=200), ("REPAIR", "RESCALE", "REPAIR conv", "RESHIFT", "REPAIR")
    for renorm in renorms:
        expected = load_pair(runs, calibration=200).path("AM", renorm)(0.5)
        assert same_weights(shared.path("AM", renorm)(0.5), expected)
    shared.path("none", "REPAIR")
    assert len(made) - len(renorms) == 3  # of the usual targets, of convolutions, and of other endpoints
    fewer = replace(shared, calibration=shared.sample(50, 0))  # is another pair, which has measured nothing
    assert not same_weights(fewer.path("none", "REPAIR")(0.5), shared.path("none", "REPAIR")(0.5))


def test_further_endpoints_are_not_taken_for_the_pair():
    pair, measured = load_pair(RUNS, calibration=200), []
    path = methods.RENORMS["REPAIR"].path
    path(pair.a, pair.aligned, pair.calibration, measured=measured, others=[pair.a])
    assert not measured
    assert same_weights(path(pair.a, pair.aligned, pair.calibration, measured=measured)(0), pair.a)


def test_every_two_seeds_are_a_pair():
    run = RUNS[0].rpartition("/")[0]
    pairs = dict(pairs_of(run, (1, 2, 3), 100, matching="WM"))
    assert list(pairs) == ["1-2", "1-3", "2-3"]
    assert pairs["2-3"].runs == (f"{run}/s2", f"{run}/s3") and pairs["2-3"].method == "WM"
    assert pairs["1-3"].title == title_of(run) == "mlp2-plain-w16 on digits"


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


def test_a_pair_trained_on_two_data_sets_needs_one_to_be_compared_on():
    runs = [RUNS[0], "digits-hard/mlp2-plain-w16/smoke/s2"]
    with pytest.raises(ValueError, match="say with data="):
        load_pair(runs)
    pair = load_pair(runs, data="digits-hard")
    assert pair.dataset.name == "digits-hard" and pair.title == "mlp2-plain-w16 on digits-hard"
    hard = load_pair(runs[1:] * 2)
    assert pair.evaluate(pair.b) == hard.evaluate(hard.a) == evaluate(pair.b, hard.test)
