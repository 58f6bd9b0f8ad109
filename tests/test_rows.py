"""Long tables: every network in them is the one that its columns name."""

import pandas as pd
import pytest
import torch

from companion.experiments.methods import RENORMS
from companion.experiments.pairs import load_pair
from companion.experiments.rows import (
    baseline_rows,
    equal_steps,
    filter_rows,
    match_rows,
    path_rows,
    reduction_rows,
    rows,
)
from companion.experiments.tables import barriers
from companion.runs.data import iterate
from companion.runs.train import evaluate
from repairlib import Repair, interpolate_models, match_activations, reset
from repairlib.interpolate import barrier_of

RUN = "digits/mlp2-plain-w16/smoke"
RUNS = [f"{RUN}/s1", f"{RUN}/s2"]
RESNETS = ["digits/resnet8-bn-w0.25/smoke/s1", "digits/resnet8-bn-w0.25/smoke/s2"]
ALPHAS = [0, 0.25, 0.5, 0.75, 1]


def test_one_row_for_each_run_pair_network_point_and_split():
    table = rows([{"run": RUN, "series": "mlp", "width": 16}], (1, 2, 3), alphas=ALPHAS, splits=("test", "train"))
    assert list(table) == ["run", "series", "width", "pair", "matching", "renorm", "alpha", "split", "loss", "accuracy"]
    assert len(table) == len(table.drop(columns=["loss", "accuracy"]).drop_duplicates()) == 3 * 2 * 5 * 2
    assert list(table["pair"].unique()) == ["1-2", "1-3", "2-3"] and list(table["split"].unique()) == ["test", "train"]
    assert (table[["run", "series", "width"]] == [RUN, "mlp", 16]).all(axis=None)
    assert list(table["renorm"].unique()) == ["none", "REPAIR"] and set(table["matching"]) == {"AM"}


def test_barriers_of_a_table_are_those_of_its_networks_one_by_one():
    table = rows([{"run": RUN}], (1, 2), alphas=ALPHAS, splits=("test", "train"), calibration=300)
    found = barriers(table).set_index(["renorm", "split"])
    pair = load_pair(RUNS, 300)
    aligned_b = match_activations(pair.a, pair.b, pair.calibration).apply(pair.b)
    repair = Repair(pair.a, aligned_b, pair.calibration)
    makers = {"none": lambda alpha: interpolate_models(pair.a, aligned_b, alpha), "REPAIR": lambda a: repair(a).model}
    for split in ("test", "train"):
        data = iterate(pair.dataset, split, batch_size=500)
        for renorm, make in makers.items():
            points = [evaluate(make(alpha), data) for alpha in ALPHAS]
            loss, error = (barrier_of(ALPHAS, costs) for costs in ([p[0] for p in points], [1 - p[1] for p in points]))
            assert found.loc[(renorm, split), "loss_barrier"] == pytest.approx(loss, abs=1e-6)
            assert found.loc[(renorm, split), "accuracy_barrier"] == pytest.approx(error, abs=1e-9)
            assert found.loc[(renorm, split), "midpoint_accuracy"] == dict(zip(ALPHAS, points, strict=True))[0.5][1]
        ends = [evaluate(model, data) for model in (pair.a, pair.b)]
        for place, metric in enumerate(("loss", "accuracy")):
            mean = sum(end[place] for end in ends) / 2
            assert found.loc[("none", split), f"end_{metric}"] == pytest.approx(mean, abs=1e-6)


def test_options_go_to_the_renormalisation():
    pair = load_pair(RUNS)
    table = path_rows(pair, [0, 0.5, 1], correct="reshift")
    assert [(row["renorm"], row["alpha"]) for row in table] == [(r, a) for r in ("none", "REPAIR") for a in (0, 0.5, 1)]
    reshifted = Repair(pair.a, pair.aligned, pair.calibration, correct="reshift", limit=None)(0.5).model
    assert table[4]["loss"] == pytest.approx(pair.evaluate(reshifted)[0], abs=1e-6)
    assert table[4]["loss"] == path_rows(pair, [0.5], renorms=["RESHIFT"])[0]["loss"]


def test_each_network_is_what_its_columns_say():
    pair = load_pair(RESNETS, calibration=200)
    renorms = ("none", "REPAIR", "REPAIR conv", "REPAIR bn reset", "RESET")
    table = path_rows(pair, [0, 0.5, 1], matchings={"none": ("none", "REPAIR"), "AM": renorms})
    found = {(row["matching"], row["renorm"], row["alpha"]): row["loss"] for row in table}
    assert len(found) == len(table) == 7 * 3

    def repaired(b, **options):
        return Repair(pair.a, b, pair.calibration, limit=None, **options)(0.5).model

    middle = interpolate_models(pair.a, pair.aligned, 0.5)
    expected = {
        ("none", "none"): interpolate_models(pair.a, pair.b, 0.5),
        ("none", "REPAIR"): repaired(pair.b),
        ("AM", "none"): middle,
        ("AM", "REPAIR"): repaired(pair.aligned),
        ("AM", "REPAIR conv"): repaired(pair.aligned, targets=("conv",)),
        ("AM", "REPAIR bn reset"): repaired(pair.aligned, bn="reset"),
        ("AM", "RESET"): reset(middle, pair.calibration).model,
    }
    for names, model in expected.items():
        assert found[(*names, 0.5)] == pytest.approx(pair.evaluate(model)[0], abs=1e-5), names
    assert len({found[(*names, 0.5)] for names in expected}) == len(expected)
    # What forgets the statistics of the endpoints changes them too; nothing else does.
    for alpha, end in enumerate((pair.a, pair.b)):
        kept = {loss for (_, renorm, a), loss in found.items() if a == alpha and not RENORMS[renorm].moves_ends}
        assert kept == {found["AM", "none", alpha]} and kept.pop() == pytest.approx(pair.evaluate(end)[0], abs=1e-6)
        model = reset(interpolate_models(pair.a, pair.aligned, alpha), pair.calibration).model
        assert found["AM", "RESET", alpha] == pytest.approx(pair.evaluate(model)[0], abs=1e-5)


def test_a_reset_endpoint_is_the_same_however_units_are_matched():
    pair = load_pair(RESNETS, calibration=200)
    table = path_rows(pair, [0, 1], matchings=("none", "WM"), renorms=["RESET"])
    assert table[:2] == [row | {"matching": "none"} for row in table[2:]]
    for row in table:
        model = pair.path(row["matching"], "RESET")(row["alpha"])
        assert row["loss"] == pytest.approx(pair.evaluate(model)[0], rel=1e-5)


def test_splits_follow_each_other_and_a_network_is_made_once():
    pair = load_pair(RUNS, calibration=100)
    table = path_rows(pair, [0, 1], renorms=["none"], splits=("train", "test"))
    assert [(row["split"], row["alpha"]) for row in table] == [(s, a) for s in ("train", "test") for a in (0, 1)]
    assert table[2]["loss"] == pytest.approx(pair.evaluate(pair.a)[0], abs=1e-6)


@pytest.mark.parametrize("how", [{"matchings": ["AN"]}, {"renorms": ["REPAIRED"]}])
def test_unknown_names_have_a_nearest_one(how):
    with pytest.raises(ValueError, match="the nearest is '(AM|REPAIR)'"):
        path_rows(load_pair(RUNS, calibration=100), [0.5], **how)


def test_points_of_a_path():
    assert equal_steps(5) == [0, 0.25, 0.5, 0.75, 1]
    assert equal_steps(11)[3] == 3 / 10


@pytest.mark.parametrize("model", ["mlp2-ln-w16", "mlp2-bn-w16"])
def test_similarity_of_weights_is_their_cosine(model):
    runs = [f"digits/{model}/smoke/s{seed}" for seed in (1, 2)]
    pair = load_pair(runs, calibration=100, matching="WM", restarts=3)
    table = match_rows(pair)

    def cosine(a, b):  # of all that a permutation moves: everything but the classifier's bias, and no statistics
        a, b = (torch.cat([p.detach().flatten() for n, p in m.named_parameters() if n != last]) for m in (a, b))
        return float(torch.cosine_similarity(a, b, dim=0))

    last = list(dict(pair.a.named_parameters()))[-1]
    assert all(row["as_trained"] == pytest.approx(cosine(pair.a, pair.b), abs=1e-6) for row in table)
    assert table[-1]["similarity"] == pytest.approx(cosine(pair.a, pair.aligned), abs=1e-6)
    assert [row["sweep"] for row in table] == list(range(len(table)))
    once = match_rows(load_pair(runs, calibration=100, matching="WM"))
    assert once[0]["similarity"] == pytest.approx(once[0]["as_trained"], abs=1e-6)  # starts at the order as trained
    assert once[-1]["similarity"] <= table[-1]["similarity"] + 1e-9  # one of its three descents


def test_filters_are_listed_with_those_they_are_matched_with():
    pair = load_pair(RESNETS, calibration=200)
    table = pd.DataFrame(filter_rows(pair))
    units = len(pair.a.conv1.weight)
    assert list(table["unit"]) == list(range(units)) and set(table["matched_unit"]) == set(range(units))
    assert torch.equal(pair.aligned.conv1.weight, pair.b.conv1.weight[table["matched_unit"].tolist()])
    unmoved = table[table["unit"] == table["matched_unit"]]
    assert (unmoved["correlation"] - unmoved["as_trained"]).abs().max() < 1e-6 or unmoved.empty
    assert table["correlation"].sum() > table["as_trained"].sum()


def test_merged_networks_have_baselines():
    pair = load_pair(RUNS, calibration=100)
    table = pd.DataFrame(baseline_rows(pair, pair.b, [0, 0.5, 1]))
    assert list(table["network"]) == ["ensemble"] * 3 + ["corrected A", "corrected B", "full data"]
    assert table["alpha"].isna().tolist() == [False] * 3 + [True] * 3
    ends = table[table["alpha"].isin([0, 1])]
    for end, model in zip(ends.to_dict("records"), (pair.a, pair.b), strict=True):
        assert (end["loss"], end["accuracy"]) == pytest.approx(pair.evaluate(model), abs=1e-6)
    assert table.iloc[-1]["accuracy"] == pair.evaluate(pair.b)[1]


def test_reductions_are_those_of_the_midpoint_and_count_once():
    def path(run, pair, before, after, middle=0.5, split="test"):
        return [
            {"run": run, "pair": pair, "matching": "AM", "renorm": renorm, "alpha": alpha, "split": split,
             "loss": 1.0, "accuracy": accuracy}
            for renorm, barrier in {"none": before, "REPAIR": after}.items()
            for alpha, accuracy in {0: 0.9, middle: 0.8 - barrier, 1: 0.7}.items()
        ]  # fmt: skip

    resnet, flat, mlp = (
        "digits/resnet20-ln-w0.5/quick", "digits/mlp10-fused-w256/quick", "digits/mlp2-fused-w8/quick",
    )  # fmt: skip
    other = [{"matching": "none", "renorm": "none", "alpha": a, "accuracy": 0.1} for a in (0, 0.5, 1)]
    first = path(resnet, "1-2", 0.4, 0.1) + path(resnet, "1-2", 0.4, 0.4, split="train") + path(flat, "1-2", 0.009, 0.1)
    first += [row | {"run": resnet, "pair": "1-2", "split": "test", "loss": 1.0} for row in other]
    worse_beside = [row for row in path(resnet, "1-2", 0.7, 0.7, middle=0.25) if row["alpha"] == 0.25]
    second = path(mlp, "1-2", 0.3, 0.0) + path(mlp, "1-3", 0.3, 0.0) + path(mlp, "2-3", 0.0, 0.0)
    table = reduction_rows([first + worse_beside, path(resnet, "1-2", 0.4, 0.1), pd.DataFrame(second)])
    assert table[0] == {
        "run": resnet, "row": "ResNet20, digits", "norm": "ln", "width": 0.5, "pair": "1-2",
        "before": pytest.approx(40), "after": pytest.approx(10), "reduction": pytest.approx(75),
    }  # fmt: skip
    # The network that has next to no barrier is left out, and so is the pair that has none.
    assert [(r["row"], r["norm"], r["pair"]) for r in table[1:]] == [
        ("MLP2, digits", "none", p) for p in ("1-2", "1-3")
    ]
    assert table[1]["reduction"] == pytest.approx(100)
