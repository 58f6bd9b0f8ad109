"""Every claim judged on two tables made by hand: one that shows it, and one that does not."""

import pandas as pd
import pytest

from companion.figures.report import read_index
from companion.figures.scorecard import claims

PAIRS = ("1-2", "1-3")
END = {"end_loss": 0.1, "end_accuracy": 0.9}


def samples(aligned: float, not_aligned: float, schemes=("uniform",), hardest: float = 0.0, **columns) -> list[dict]:
    """Networks of several schemes with these accuracies; Bernoulli's loses `hardest` more."""
    return [
        {"scheme": scheme, "matching": matching, "pair": pair, "split": "test", "x": x, "loss": 1 - accuracy}
        | END
        | columns
        | {"accuracy": accuracy - (hardest if scheme == "bernoulli" else 0)}
        for scheme in schemes
        for matching, accuracy in {"WM": aligned, "none": not_aligned}.items()
        for pair in PAIRS
        for x in (0, 0.25, 0.5)
    ]


ALL = ("uniform", "subcube", "hyperplane", "bernoulli")


def widths(narrow: float, wide: float, bernoulli: float = 0.0) -> list[dict]:
    return [
        {"scheme": scheme, "matching": "WM", "width": width, "pair": pair, "loss_barrier": 0.1}
        | {"accuracy_barrier": (barrier + (bernoulli if scheme == "bernoulli" else 0)) / 100}
        for scheme in ("uniform", "bernoulli")
        for width, barrier in {1: narrow, 2: wide}.items()
        for pair in PAIRS
    ]


def ends(least: float) -> list[dict]:
    return [
        {"pair": p, "matching": matching, "alpha": a, "accuracy": v, **END}
        for p in PAIRS for matching, worst in {"WM": least, "none": 0.5}.items()
        for a, v in {0: 0.8, 0.5: 0.6, 1: worst}.items()
    ]  # fmt: skip


def beyond(aligned: float, not_aligned: float, box: float = 0.88) -> list[dict]:
    """Extrapolation and centred boxes."""
    lines = [
        {"scheme": "extrapolation", "matching": matching, "x": x, "accuracy": accuracy if x < 0 or x > 1 else 0.9}
        for matching, accuracy in {"WM": aligned, "none": not_aligned}.items()
        for x in (-1, 0, 1, 2)
    ]
    lines += [
        {"scheme": "centred", "matching": matching, "x": x, "accuracy": 0.9 if x == 0 else inside}
        for matching, inside in {"WM": box, "none": 0.3}.items()
        for x in (0, 0.25, 0.5)
    ]
    return [{**line, "pair": pair, "split": "test", "loss": 1.0, **END} for line in lines for pair in PAIRS]


def three(through_a: float, not_aligned: float) -> list[dict]:
    matchings = {"through A": through_a, "directly": 0.85, "none": not_aligned}
    return [
        {"triple": t, "matching": matching, "alpha": a, "loss": 1.0, "accuracy": middle if a == 0.5 else 0.9, **END}
        for t in ("123", "231") for matching, middle in matchings.items() for a in (0, 0.5, 1)
    ]  # fmt: skip


def corners(edge: float, middle: float) -> list[dict]:
    weights = [((1, 0, 0), 0.9), ((0, 1, 0), 0.9), ((0, 0, 1), 0.88), ((0.5, 0.5, 0), edge), ((1 / 3,) * 3, middle)]
    return [
        {"matching": matching, "triple": t, "loss": 1.0, "accuracy": accuracy - (matching == "none") / 2}
        | dict(zip(("w_a", "w_b", "w_c"), w, strict=True))
        for matching in ("WM", "none") for t in ("123", "231") for w, accuracy in weights
    ]  # fmt: skip


def labels(differ: int) -> list[dict]:
    row = {f"{who}_{word}": 0 for who in ("a", "b", "both", "neither") for word in ("correct", "wrong")}
    row |= {"a_correct": differ // 2, "a_wrong": differ - differ // 2, "both_wrong": 10, "both_correct": 90 - differ}
    return [{"model": "tiny", "scheme": "linear", "matching": "WM", "pair": pair, "x": 0, **row} for pair in PAIRS]


def edges(aligned: float) -> list[dict]:
    return [
        {"pair": p, "matching": matching, "layer": "conv1", "bin_low": mean - 0.1, "bin_high": mean + 0.1, "share": 1.0}
        for p in PAIRS for matching, mean in {"WM": aligned, "none": 1.0}.items()
    ]  # fmt: skip


def deranged(half: float) -> list[dict]:
    return [
        {"pair": p, "layer": layer, "k": k, "units": 8, "draw": 0, "loss_barrier": 0.1, "accuracy_barrier": barrier}
        for p in PAIRS for layer in ("conv1", "conv2") for k, barrier in {2: 0.03, 4: 0.03 + half / 100, 8: 0.6}.items()
    ]  # fmt: skip


CASES = {  # item: (a table that shows it, one that does not)
    **{f"combine/fig{i}": (samples(0.85, 0.2), samples(0.7, 0.65)) for i in (2, 3, 4, 5)},
    "combine/figB15-B18": (samples(0.85, 0.2, ALL, 0.04), samples(0.7, 0.65, ALL)),
    "combine/fig7": (widths(30, 2, 5), widths(2, 30)),
    "combine/figB21": (widths(30, 2), widths(2, 30)),
    "combine/fig6": (samples(0.85, 0.2), samples(0.7, 0.65)),
    "combine/figB19": (samples(0.85, 0.2), samples(0.7, 0.65)),
    "combine/fig8": (ends(0.1), ends(0.78)),
    "combine/figB22": (ends(0.1), ends(0.78)),
    "combine/fig9": (beyond(0.8, 0.3), beyond(0.3, 0.3)),
    "combine/fig10": (beyond(0.8, 0.3), beyond(0.3, 0.3, box=0.5)),
    "combine/figB23-B24": (beyond(0.8, 0.3), beyond(0.3, 0.3, box=0.5)),
    "combine/fig11a": (three(0.85, 0.2), three(0.5, 0.45)),
    "combine/figB20": (three(0.85, 0.2), three(0.5, 0.45)),
    "combine/fig11b": (corners(0.95, 0.87), corners(0.5, 0.4)),
    "combine/fig12": (labels(12), labels(6)),
    "combine/figB25-B26": (labels(12), labels(6)),
    "combine/fig13": (edges(0.8), edges(0.3)),
    "combine/fig14": (deranged(2), deranged(20)),
}
JUDGED = [(claim, item) for claim in claims("combine").values() for item in claim.items]


@pytest.mark.parametrize("claim, item", JUDGED, ids=lambda value: getattr(value, "name", value))
def test_a_claim_can_be_confirmed_and_refuted(claim, item):
    shown, refuted = (claim.judge(pd.DataFrame(table), item) for table in CASES[item])
    assert shown and all(finding.holds for finding in shown), shown
    assert refuted and not any(finding.holds for finding in refuted), refuted


def test_every_item_of_a_claim_is_made():
    assert {item for claim in claims("combine").values() for item in claim.items} <= set(read_index())


@pytest.mark.parametrize("claim, item", JUDGED, ids=lambda value: getattr(value, "name", value))
def test_one_pair_is_enough(claim, item):
    each = "triple" if "triple" in CASES[item][0][0] else "pair"
    one = [row for row in CASES[item][0] if row[each] == CASES[item][0][0][each]]
    if item in ("combine/fig12", "combine/figB25-B26"):
        one = [row | {name: 2 * row[name] for name in row if name.endswith(("wrong", "correct"))} for row in one]
    assert all(finding.holds for finding in claim.judge(pd.DataFrame(one), item))


@pytest.mark.parametrize("item", ["combine/fig7", "combine/figB21"])
def test_one_width_says_nothing_about_width(item):
    claim, one = claims()["combine/width-necessary"], [row for row in CASES[item][0] if row["width"] == 1]
    (finding,) = claim.judge(pd.DataFrame(one), item)
    assert finding.holds is None and finding.text.startswith("width 1 is the only one: uniform 30 points; bernoulli 3")


def test_networks_of_one_model_are_judged():
    (finding,) = claims()["combine/not-vacuous"].judge(pd.DataFrame(labels(12)), "combine/figB25-B26")
    assert finding.holds and finding.text.startswith("tiny: ")
