"""Barriers, means and names from long tables, against the library's barrier and numbers done by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest

from companion.experiments.tables import (
    barrier_means,
    barriers,
    name_means,
    name_networks,
    network_name,
    restore_ends,
)
from repairlib.interpolate import barrier_of

ALPHAS = [0, 0.1, 0.5, 0.9, 1]


def random_paths(alphas=ALPHAS, seed=0) -> pd.DataFrame:
    """Two networks, three pairs, two renormalisations, two splits."""
    draw = np.random.default_rng(seed)
    names = itertools.product(("bn", "ln"), ("1-2", "1-3", "2-3"), ("none", "REPAIR"), ("test", "train"), alphas)
    return pd.DataFrame(
        [{"series": s, "width": 16, "pair": p, "matching": "AM", "renorm": r, "split": split, "alpha": a,
          "loss": draw.uniform(0, 3), "accuracy": draw.uniform()} for s, p, r, split, a in names]
    )  # fmt: skip


@pytest.mark.parametrize("baseline", ["linear", "mean"])
def test_barriers_are_the_librarys(baseline):
    table = random_paths()
    found = barriers(table.sample(frac=1, random_state=0), baseline)  # in whatever order
    names = ["series", "width", "pair", "matching", "renorm", "split"]
    assert len(found) == 2 * 3 * 2 * 2
    found = found.set_index(names)
    for key, path in table.groupby(names):
        row = found.loc[key]
        alphas, loss, accuracy = (path[column].tolist() for column in ("alpha", "loss", "accuracy"))
        error = [1 - value for value in accuracy]
        assert row["loss_barrier"] == pytest.approx(barrier_of(alphas, loss, baseline))
        assert row["accuracy_barrier"] == pytest.approx(barrier_of(alphas, error, baseline))
        at = path.set_index("alpha")
        assert row["midpoint_loss"] == at.loc[0.5, "loss"] and row["midpoint_accuracy"] == at.loc[0.5, "accuracy"]
        assert row["end_loss"] == pytest.approx(at.loc[[0, 1], "loss"].mean())
        assert row["end_accuracy"] == pytest.approx(at.loc[[0, 1], "accuracy"].mean())


def test_a_barrier_is_never_negative_and_needs_both_ends():
    downhill = pd.DataFrame({"alpha": [0, 0.5, 1], "loss": [1.0, 0.1, 1.0], "accuracy": [0.5, 0.9, 0.5]})
    row = barriers(downhill.assign(pair="1-2")).iloc[0]
    assert row["loss_barrier"] == row["accuracy_barrier"] == 0
    table = random_paths()
    for end in (0, 1):
        with pytest.raises(ValueError, match="both endpoints"):
            barriers(table[table["alpha"] != end])
        with pytest.raises(ValueError, match="both endpoints"):  # also where only one path lacks it
            barriers(table[(table["alpha"] != end) | (table["series"] != "ln")])
    with pytest.raises(ValueError, match="'linear' or 'mean'"):
        barriers(table, "median")
    assert barriers([]).empty
    assert "midpoint_loss" not in barriers(table[table["alpha"] != 0.5])


def test_paths_of_one_table_may_have_other_points():
    fine, coarse = random_paths(), random_paths([0, 1], seed=1).assign(series="fixup")
    found = barriers(pd.concat([fine, coarse]))
    assert found["loss_barrier"].tolist()[: len(barriers(fine))] == barriers(fine)["loss_barrier"].tolist()
    assert (found[found["series"] == "fixup"]["loss_barrier"] == 0).all()


def test_means_of_barriers_by_name():
    rows = [
        {"series": "mlp", "width": width, "pair": pair, "renorm": renorm, "alpha": alpha, "loss": loss,
         "accuracy": 1.0 - (alpha == 0.5) * barrier / (2 if renorm == "REPAIR" else 1)}
        for width, pair, barrier in ((8, "1-2", 0.5), (8, "1-3", 0.7), (16, "1-2", 0.2), (32, "1-2", 0.1))
        for renorm in ("none", "REPAIR") for alpha, loss in {0: 1.0, 0.5: 3.0, 1: 2.0}.items()
    ]  # fmt: skip
    means = barrier_means(rows, ("series", "width"), "accuracy")
    assert list(means) == ["none", "REPAIR"] and means.loc["mlp", 8].tolist() == pytest.approx([60, 30])
    assert barrier_means(rows, ("series", "width"), "midpoint").loc["mlp", 8].tolist() == pytest.approx([40, 70])
    assert barrier_means(rows, ("series", "width")).loc["mlp", 32].tolist() == pytest.approx([1.5, 1.5])
    named = name_means(means)
    assert list(named) == ["mlp_before_8x", "mlp_after_8x", "mlp_before_32x", "mlp_after_32x"]
    assert named["mlp_after_8x"] == pytest.approx(30)
    assert list(name_means(means, [16], "{when} {0} {1:g}")) == ["before mlp 16", "after mlp 16"]


def test_networks_in_words():
    table = pd.DataFrame({"matching": ["none", "WM", "WM"], "renorm": ["none", "none", "REPAIR closed form"]})
    words = ["not aligned", "aligned", "aligned + REPAIR closed form"]
    assert name_networks(table)["network"].tolist() == words
    assert name_networks(table.drop(columns="renorm"))["network"].tolist() == ["not aligned", "aligned", "aligned"]
    assert network_name("OT", "RESET") == "aligned + RESET"
    # Several matchings beside each other are told apart; rows that have a name keep it.
    both = pd.concat([table, pd.DataFrame({"matching": ["AM"], "renorm": ["none"]})])
    assert name_networks(both)["network"].tolist()[-1] == "aligned (AM)"
    mixed = pd.concat([table, pd.DataFrame({"network": ["ensemble"]})])
    assert name_networks(mixed)["network"].tolist() == [*words, "ensemble"]
    plain = pd.DataFrame({"network": ["endpoint A"]})
    assert name_networks(plain).equals(plain)


def long(matching: str, renorm: str, losses: list[float]) -> list[dict]:
    """A path of three points."""
    points = zip((0, 0.5, 1), losses, strict=True)
    names = {"pair": "1-2", "matching": matching, "renorm": renorm, "split": "test"}
    return [names | {"alpha": alpha, "loss": loss, "accuracy": 1 - loss / 10} for alpha, loss in points]


def test_rows_that_have_no_name_get_one():
    table = [
        {"network": "full data", "loss": 1.0},
        *long("AM", "REPAIR", [1, 2, 3])[:1],
        *long("none", "none", [0] * 3),
    ]
    assert list(name_networks(table)["network"]) == ["full data", "aligned + REPAIR", *["not aligned"] * 3]
    assert list(name_networks(pd.DataFrame(long("WM", "none", [0] * 3)))["network"]) == ["aligned"] * 3
    assert "network" not in name_networks([{"loss": 1.0}])


def test_barriers_of_changed_ends_are_measured_from_the_trained_ones():
    paths = [long("none", "none", [1, 9, 3]), long("AM", "none", [1, 5, 3]), long("AM", "RESET", [0.5, 2.5, 0.5])]
    table = pd.DataFrame([row for path in paths for row in path])
    measured = barriers(restore_ends(table)).set_index(["matching", "renorm"])
    assert measured["loss_barrier"].tolist() == pytest.approx([7, 3, 0.5])
    assert measured["end_loss"].tolist() == [2, 2, 2] and measured["midpoint_loss"].tolist() == [9, 5, 2.5]
    assert measured.loc[("AM", "RESET"), "accuracy_barrier"] == pytest.approx(0.05)
    assert table["loss"].tolist()[-3:] == [0.5, 2.5, 0.5]  # untouched
