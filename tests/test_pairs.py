import pytest
import torch

from companion.experiments.pairs import (
    NETWORKS,
    barrier_means,
    barrier_rows,
    load_pair,
    match_rows,
    name_means,
    path_rows,
    reduction_rows,
)
from companion.runs import train
from repairlib import Repair, reset

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


@pytest.mark.parametrize("model", ["mlp2-ln-w16", "mlp2-bn-w16"])
def test_similarity_of_weights_is_their_cosine(model):
    runs = [f"digits/{model}/smoke/s{seed}" for seed in (1, 2)]
    pair = load_pair(runs, calibration=100, match="weights", restarts=3)
    rows = match_rows(pair)

    def cosine(a, b):  # of all that a permutation moves: everything but the classifier's bias, and no statistics
        a, b = (torch.cat([p.detach().flatten() for n, p in m.named_parameters() if n != last]) for m in (a, b))
        return float(torch.cosine_similarity(a, b, dim=0))

    last = list(dict(pair.a.named_parameters()))[-1]
    assert all(row["as_trained"] == pytest.approx(cosine(pair.a, pair.b), abs=1e-6) for row in rows)
    assert rows[-1]["similarity"] == pytest.approx(cosine(pair.a, pair.aligned), abs=1e-6)
    assert [row["sweep"] for row in rows] == list(range(len(rows)))
    once = match_rows(load_pair(runs, calibration=100, match="weights"))
    assert once[0]["similarity"] == pytest.approx(once[0]["as_trained"], abs=1e-6)  # starts at the order as trained
    assert once[-1]["similarity"] <= rows[-1]["similarity"] + 1e-9  # one of its three descents


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


def test_a_pair_trained_on_two_data_sets_needs_one_to_be_compared_on():
    runs = [RUNS[0], "digits-hard/mlp2-plain-w16/smoke/s2"]
    with pytest.raises(ValueError, match="say with data="):
        load_pair(runs)
    pair = load_pair(runs, data="digits-hard")
    assert pair.dataset.name == "digits-hard"
    hard = load_pair(runs[1:] * 2)
    assert pair.evaluate(pair.b) == hard.evaluate(hard.a)


def test_each_kind_of_network():
    pair = load_pair(["digits/resnet8-bn-w0.25/smoke/s1", "digits/resnet8-bn-w0.25/smoke/s2"], calibration=200)
    rows = path_rows(pair, [0, 0.5, 1], networks=NETWORKS)
    found = {(row["network"], row["alpha"]): row["loss"] for row in rows}
    expected = {
        "direct": pair.direct(),
        "direct repaired": Repair(pair.a, pair.b, pair.calibration, limit=None)(0.5).model,
        "aligned": pair.midpoint(),
        "repaired": pair.repair()(0.5).model,
        "reset": reset(pair.midpoint(), pair.calibration).model,
    }
    assert {name: found[name, 0.5] for name in NETWORKS} == {n: pair.evaluate(m)[0] for n, m in expected.items()}
    assert len({*(found[name, 0.5] for name in NETWORKS)}) == len(NETWORKS)
    for alpha, end in enumerate((pair.a, pair.b)):  # RESET forgets the statistics of the endpoints too
        assert {found[name, alpha] for name in NETWORKS[:-1]} == {found["direct", alpha]}
        assert found["direct", alpha] == pytest.approx(pair.evaluate(end)[0])
        assert found["reset", alpha] == pair.evaluate(reset(pair.network("aligned")(alpha), pair.calibration).model)[0]
    with pytest.raises(ValueError, match="aligned"):
        path_rows(pair, [0.5], networks=["alined"])


def test_means_of_barriers_by_name():
    rows = [
        {"series": "mlp", "width": width, "pair": pair, "accuracy_before": before, "accuracy_after": before / 2}
        for width, pair, before in ((8, "1-2", 0.5), (8, "1-3", 0.7), (16, "1-2", 0.2), (32, "1-2", 0.1))
    ]
    means = barrier_means(rows, ("series", "width"), "accuracy")
    assert means.loc["mlp", 8].tolist() == pytest.approx([60, 30])
    named = name_means(means)
    assert list(named) == ["mlp_before_8x", "mlp_after_8x", "mlp_before_32x", "mlp_after_32x"]
    assert named["mlp_after_8x"] == pytest.approx(30)
    assert list(name_means(means, [16], "{when} {0} {1:g}")) == ["before mlp 16", "after mlp 16"]


def test_reductions_of_barriers_and_of_paths():
    run = "digits/resnet20-ln-w0.5/quick"
    row = {"run": run, "pair": "1-2", "split": "test", "accuracy_before": 0.4, "accuracy_after": 0.1}
    flat = row | {"run": "digits/mlp10-fused-w256/quick", "accuracy_before": 0.009}
    path = [
        {"run": "digits/mlp2-fused-w8/quick", "pair": pair, "network": network, "alpha": alpha, "accuracy": value}
        for pair in ("1-2", "1-3")
        for network, middle in {"aligned": 0.5, "repaired": 0.8}.items()
        for alpha, value in {0: 0.9, 0.5: middle, 1: 0.7}.items()
    ]
    rows = reduction_rows([[row, row | {"split": "train"}, flat], [row], path])
    assert rows[0] == {
        "run": run, "row": "ResNet20, digits", "norm": "ln", "width": 0.5, "pair": "1-2",
        "before": pytest.approx(40), "after": pytest.approx(10), "reduction": pytest.approx(75),
    }  # fmt: skip
    assert [(r["row"], r["norm"], r["pair"]) for r in rows[1:]] == [("MLP2, digits", "none", p) for p in ("1-2", "1-3")]
    assert rows[1]["reduction"] == pytest.approx(100)
