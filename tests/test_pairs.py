import pytest
import torch

from repairlib import train
from repairlib.pairs import barrier_rows, load_pair, path_rows

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


def test_barriers_of_every_pair_of_seeds():
    run = RUNS[0].rpartition("/")[0]
    alphas = (0, 0.25, 0.5, 0.75, 1)
    rows = barrier_rows([{"run": run, "series": "mlp", "width": 16}], (1, 2, 3), alphas, splits=("test", "train"))
    assert [(row["pair"], row["split"]) for row in rows] == [
        (pair, split) for pair in ("1-2", "1-3", "2-3") for split in ("test", "train")
    ]
    assert all((row["run"], row["series"], row["width"]) == (run, "mlp", 16) for row in rows)
    # The same, step by step.
    pair = load_pair(RUNS)
    repair = pair.repair()
    for when, make in {"before": pair.midpoint, "after": lambda alpha: repair(alpha).model}.items():
        path = pair.path(make, alphas)
        assert rows[0][f"loss_{when}"] == pytest.approx(path.barrier("loss"), abs=1e-6)
        assert rows[0][f"accuracy_{when}"] == path.barrier("accuracy")
        assert rows[0][f"midpoint_{when}"] == path.midpoint()
    assert rows[0]["endpoint_accuracy"] == pytest.approx(pair.accuracy)
    assert rows[1]["endpoint_loss"] == pytest.approx(
        sum(train.evaluate(model, pair.calibration)[0] for model in (pair.a, pair.b)) / 2
    )


def test_path_rows_pass_options_on():
    pair = load_pair(RUNS)
    rows = path_rows(pair, [0, 0.5, 1], correct="reshift")
    assert [(row["network"], row["alpha"]) for row in rows] == [
        (network, alpha) for network in ("aligned", "repaired") for alpha in (0, 0.5, 1)
    ]
    assert rows[4]["loss"] == pair.evaluate(pair.repair(correct="reshift")(0.5).model)[0]
