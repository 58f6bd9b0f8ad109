"""Names, barriers and means from long tables."""

import pandas as pd
import pytest

from companion.experiments.tables import barriers, name_networks, restore_ends


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
