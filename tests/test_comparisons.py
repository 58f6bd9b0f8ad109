import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from companion.experiments.comparisons import (
    derangement_rows,
    derangements,
    edge_rows,
    group_correlations,
    label_agreement,
    label_rows,
)
from companion.experiments.pairs import load_pair
from companion.experiments.tables import derangement_costs
from companion.runs.data import iterate
from repairlib.interpolate import interpolate_states, with_state
from repairlib.permutations import permute

RUNS = ["digits/mlp2-ln-w16/smoke/s1", "digits/mlp2-ln-w16/smoke/s2"]


@pytest.fixture
def pair():
    return load_pair(RUNS, calibration=200, matching="WM")


def test_labels_of_the_ends_agree_with_themselves(pair):
    states = pair.a.state_dict(), pair.b.state_dict()
    of_a, of_b, between = label_agreement(pair.a, [*states, interpolate_states(*states, 0.5)], states, pair.test)
    n = len(pair.dataset.test)
    for row in (of_a, of_b, between):
        assert sum(row.values()) == n
    assert of_a["b_correct"] == of_a["b_wrong"] == of_a["neither_correct"] == of_a["neither_wrong"] == 0
    assert of_b["a_correct"] == of_b["a_wrong"] == 0
    accuracy = [pair.evaluate(model)[1] for model in (pair.a, pair.b)]
    assert (of_a["a_correct"] + of_a["both_correct"]) / n == accuracy[0]
    assert (of_b["b_correct"] + of_b["both_correct"]) / n == accuracy[1]
    assert of_a["both_correct"] == of_b["both_correct"]


def test_labels_that_are_known_are_counted_as_what_they_are(pair):
    """Networks that give every image one label: the head's bias alone."""
    state = {name: torch.zeros_like(value) for name, value in pair.a.state_dict().items()}
    last = list(state)[-1]

    def saying(label):
        return state | {last: torch.nn.functional.one_hot(torch.tensor(label), 10).float()}

    y = pair.dataset.test.labels
    ends = saying(3), saying(5)
    counted = label_agreement(pair.a, [saying(3), saying(5), saying(7)], ends, pair.test)
    for row, whose, label in zip(counted, ("a", "b", "neither"), (3, 5, 7), strict=True):
        right = int((y == label).sum())
        assert {k: n for k, n in row.items() if n} == {f"{whose}_correct": right, f"{whose}_wrong": len(y) - right}
    (row,) = label_agreement(pair.a, [saying(3)], (saying(3), saying(3)), pair.test)
    assert row["both_correct"] + row["both_wrong"] == len(y)


def test_rows_of_labels_name_the_networks_that_they_count(pair):
    rows = label_rows(pair, "bernoulli", [0, 0.5, 1], samples=2, matching="none")
    assert [(r["matching"], r["x"], r["sample"]) for r in rows] == [
        ("none", x, i) for x, i in ((0, 0), (0.5, 0), (0.5, 1), (1, 0))
    ]
    counts = [{k: v for k, v in r.items() if k.endswith(("_correct", "_wrong"))} for r in rows]
    assert all(sum(count.values()) == len(pair.dataset.test) for count in counts)
    ends = pair.a.state_dict(), pair.b.state_dict()
    assert [counts[0], counts[3]] == label_agreement(pair.a, ends, ends, pair.test)


def test_edges_are_lengths_in_units_of_the_weights(pair):
    same = edge_rows(load_pair([RUNS[0]] * 2, calibration=200, matching="WM"))
    assert all(row["share"] == (row["bin_low"] == 0) and row["median"] == 0 for row in same)
    rows = edge_rows(pair, "none", bins=[0, 1, 2])
    assert [row["layer"] for row in rows[::2]] == [
        name.removesuffix(".weight") for name, w in pair.a.state_dict().items() if w.ndim > 1
    ]
    a, b = (model.state_dict()[rows[0]["layer"] + ".weight"].double() for model in (pair.a, pair.b))
    size = float(((a**2).mean() + (b**2).mean()).div(2).sqrt())
    lengths = (a - b).abs().flatten() / size
    assert rows[0]["rms"] == pytest.approx(size)
    assert rows[0]["median"] == pytest.approx(float(lengths.quantile(0.5)))
    assert rows[0]["share"] == pytest.approx(float((lengths < 1).double().mean()))
    assert rows[0]["share"] + rows[1]["share"] == pytest.approx(1)


def test_edges_of_unrelated_weights_have_mean_square_two(pair):
    pair.a.load_state_dict({k: torch.randn_like(v) for k, v in pair.a.state_dict().items()})
    pair.b.load_state_dict({k: 3 * torch.randn_like(v) for k, v in pair.b.state_dict().items()})
    bins = [i / 50 for i in range(401)]
    rows = [row for row in edge_rows(pair, "none", bins) if row["layer"] == edge_rows(pair, "none")[0]["layer"]]
    square = sum(row["share"] * ((row["bin_low"] + row["bin_high"]) / 2) ** 2 for row in rows)
    assert square == pytest.approx(2, rel=0.1)  # 4,096 weights: a standard error of 0.03


def test_correlations_are_of_matched_units_behind_the_nonlinearity(pair):
    """By hand, over all images at once: unit i of A goes with unit ``permutation[i]`` of B as trained."""
    pair = replace(pair, calibration=iterate(pair.dataset, "train", batch_size=64, limit=200))  # the last batch has 8
    x = torch.cat([x for x, _ in pair.calibration]).flatten(1)
    a, b, found = x, x, group_correlations(pair)
    assert len(x) == 200 and list(found) == ["fc1", "fc2"]
    for i, name in enumerate(found, 1):
        with torch.no_grad():
            a, b = (torch.relu(net.get_submodule(f"ln{i}")(net.get_submodule(name)(y)))
                    for net, y in ((pair.a, a), (pair.b, b)))  # fmt: skip
        columns = a.double().cpu().numpy().T, b[:, pair.matching.permutation[name]].double().cpu().numpy().T
        alive = np.logical_and(*(column.std(1) > 0 for column in columns))
        expected = [np.corrcoef(u, v)[0, 1] if ok else 0 for u, v, ok in zip(*columns, alive, strict=True)]
        assert alive.sum() > 8 and np.ptp(expected) > 0.5
        np.testing.assert_allclose(found[name].cpu(), expected, atol=1e-5)


def test_the_least_correlated_pairs_are_deranged_and_others_stay(pair):
    correlation, whole = group_correlations(pair), pair.matching.permutation
    found = derangements(pair, steps=2, draws=3)
    assert [c["k"] for c, _ in found if c["layer"] == next(iter(whole))] == [0, 2, 8, 8, 8, 16, 16, 16]
    loss = pair.evaluate(pair.b)[0]
    for columns, matching in found:
        moved = matching[columns["layer"]] != whole[columns["layer"]]
        assert int(moved.sum()) == columns["k"]
        assert all(torch.equal(matching[name], whole[name]) for name in whole if name != columns["layer"])
        if 0 < columns["k"] < columns["units"]:
            of = correlation[columns["layer"]]
            assert of[moved].max() <= of[~moved].min()
        assert pair.evaluate(permute(pair.b, pair.matching.spec, matching))[0] == pytest.approx(loss, abs=1e-5)


def test_barriers_of_disturbed_matchings_start_at_that_of_the_matching(pair):
    rows = derangement_rows(pair, steps=2, draws=1, alphas=[0.25, 0.5])
    ends = pair.a.state_dict(), pair.aligned.state_dict()
    loss = [pair.evaluate(with_state(pair.a, interpolate_states(*ends, alpha)))[0] for alpha in (0.25, 0.5)]
    mean = sum(pair.evaluate(model)[0] for model in (pair.a, pair.b)) / 2
    for row in rows:
        if row["k"] == 0:
            assert row["loss_barrier"] == pytest.approx(max(loss) - mean, abs=1e-5)
        assert math.isfinite(row["loss_barrier"]) and row["networks"] == 2
    not_aligned = [pair.evaluate(pair.path("none")(alpha))[0] for alpha in (0.25, 0.5)]
    assert rows[0]["not_aligned_loss_barrier"] == pytest.approx(max(not_aligned) - mean, abs=1e-5)


def test_derangements_cost_what_the_barrier_grows_from_none_to_the_largest_share():
    barriers = {0: (0.1, 0.2), 2: (0.2, 0.2), 4: (0.3, 0.5), 5: (0.6, 0.4), 8: (0.9, 0.8)}
    rows = [
        {"layer": layer, "units": 8, "k": k, "pair": pair, "accuracy_barrier": barrier * scale}
        for layer, scale in (("conv2", 1), ("conv1", 0.1))
        for k, both in barriers.items()
        for pair, barrier in enumerate(both)
    ]
    half, every = (derangement_costs(rows, share) for share in (0.5, 1))
    assert list(half.index) == ["conv2", "conv1"]
    assert half.to_list() == pytest.approx([0.25, 0.025]) and every.to_list() == pytest.approx([0.7, 0.07])
