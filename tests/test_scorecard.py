import pandas as pd
import pytest

from companion.figures import report, scorecard
from companion.figures.claims import Claim, Finding
from companion.runs.devices import default_device

ITEM, OTHER = "repair/equivalence", "repair/table1"  # tables, which need no figure


def first_and_last(frame: pd.DataFrame, item: str) -> list[Finding]:
    return [Finding(f"{item}: {value}", bool(value)) for value in frame["x"]]


CLAIM = Claim("repair/made-up", "x is not 0", "1 | 2", (ITEM, OTHER), first_and_last)


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(scorecard, "claims", lambda paper="": {CLAIM.name: CLAIM})


@pytest.mark.parametrize("values, verdict", [([1, 1], "holds"), ([1, 0], "holds in part"), ([0, 0], "does not hold")])
def test_verdicts_come_from_saved_tables(values, verdict):
    report.save_item(ITEM, "quick", [{"x": x} for x in values], {}, runs=["digits/mlp2-bn-w8/quick/s2"])
    (row,) = scorecard.judge(CLAIM, "quick")
    assert (row["verdict"], row["item"], row["scale"], row["seeds"]) == (verdict, ITEM, "quick", "2")
    assert row["ours"].count("**not**") == values.count(0)
    assert row["device"] == report.device_name(default_device())


def test_what_has_not_been_made_is_not_judged(made_up):
    assert scorecard.judge(CLAIM, "quick") == [] and scorecard.scorecard() == []
    for scale in ("smoke", "quick", "fast"):
        report.save_item(OTHER, scale, [{"x": 1}], {})
    assert [(row["item"], row["scale"]) for row in scorecard.scorecard()] == [(OTHER, "quick"), (OTHER, "fast")]
    assert [row["scale"] for row in scorecard.scorecard(scales=["smoke"])] == ["smoke"]


def test_a_table_of_an_earlier_version_is_not_judged():
    report.save_item(ITEM, "quick", [{"y": 1}], {})
    (row,) = scorecard.judge(CLAIM, "quick")
    assert row["verdict"] == "not judged" and row["ours"] == "not judged: the saved table has no 'x'; make it again"


def test_the_verdict_is_on_what_could_be_judged(monkeypatch):
    def judge(frame: pd.DataFrame, item: str) -> list[Finding]:
        return [Finding(f"x is {x}", {1: True, 0: False}.get(x)) for x in frame["x"] if x < 3]

    claim = Claim("repair/made-up", "x is not 0", "1", (ITEM,), judge)
    for values, verdict in {(1, 2): "holds", (0, 2): "does not hold", (0, 1, 2): "holds in part"}.items():
        report.save_item(ITEM, "quick", [{"x": x} for x in values], {})
        (row,) = scorecard.judge(claim, "quick")
        assert row["verdict"] == verdict and row["ours"].endswith("; not judged: x is 2")
    for values, text in {(2,): "not judged: x is 2", (3,): "not judged: the table is empty"}.items():
        report.save_item(ITEM, "quick", [{"x": x} for x in values], {})
        (row,) = scorecard.judge(claim, "quick")
        assert (row["verdict"], row["ours"]) == ("not judged", text)


def test_scales_of_an_item_stand_side_by_side(made_up):
    runs = [f"digits/mlp{depth}-bn-w8/quick/s1" for depth in range(1, 6)]
    for item, scale in ((ITEM, "quick"), (OTHER, "quick"), (ITEM, "fast")):
        report.save_item(item, scale, [{"x": 1}], {}, runs=runs[: 5 if scale == "quick" else 1])
    rows = scorecard.scorecard()
    assert [(row["item"], row["scale"]) for row in rows] == [(ITEM, "quick"), (ITEM, "fast"), (OTHER, "quick")]
    assert [row["networks"] for row in rows[:2]] == ["5: digits/mlp1-bn-w8 to digits/mlp5-bn-w8", "digits/mlp1-bn-w8"]
    assert f"Not made at `fast`, and so not judged there: {OTHER}." in scorecard.markdown(rows)


def test_markdown_has_a_table_for_each_claim(made_up):
    report.save_item(ITEM, "quick", [{"x": 0}], {})
    text = scorecard.markdown(scorecard.scorecard())
    assert "## repair/made-up" in text and "X is not 0. Published: 1 | 2." in text
    assert text.count("\n| repair/equivalence | **not**: repair/equivalence: 0 | does not hold | quick |") == 1
    assert scorecard.markdown([]).startswith("# Scorecard")


def test_unknown_names_have_a_nearest():
    with pytest.raises(ValueError, match="repair/width-helps"):
        scorecard.judge("repair/width-help", "quick")
    with pytest.raises(ValueError, match="repair"):
        scorecard.claims("repiar")
    with pytest.raises(ValueError, match="quick"):
        scorecard.judge("repair/width-helps", "quik")
