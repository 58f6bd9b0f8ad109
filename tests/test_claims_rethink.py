"""Every claim of Rethink Model Re-Basin judged on two tables made by hand: one that shows it, and one that does not."""

import pandas as pd
import pytest

from companion.figures.report import read_index
from companion.figures.scorecard import claims

PAIRS = ("1-2", "1-3", "2-3")


def path(middle: float, nats: float = 1.0, **columns) -> list[dict]:
    """Paths of three pairs with ends of 90 % and 0.1 nats."""
    points = {0: (0.1, 0.9), 0.5: (0.1 + nats, middle), 1: (0.1, 0.9)}
    return [
        {**columns, "pair": pair, "alpha": alpha, "loss": loss, "accuracy": accuracy}
        for pair in PAIRS for alpha, (loss, accuracy) in points.items()
    ]  # fmt: skip


def joined(*parts: list[dict]) -> list[dict]:
    return [row for part in parts for row in part]


def basins(spawned: float, retrained: float, reset: float, recovered: float) -> list[dict]:
    middles = {
        ("independent", "none"): 0.3, ("independent", "RESET"): reset, ("spawned", "none"): spawned,
        ("spawned", "RESET"): 0.9, ("retrained", "none"): retrained, ("retrained", "RESET"): 0.9,
    }  # fmt: skip
    paths = [path(middle, series="VGG", basin=basin, renorm=renorm) for (basin, renorm), middle in middles.items()]
    return joined(*paths, shuffles(recovered))


def shuffles(recovered: float) -> list[dict]:
    return [
        {"series": "ResNet", "pair": pair, "matching": matching, "recovered": share, "alpha": alpha, "accuracy": 0.9}
        for pair in PAIRS for matching, share in {"none": 0.0, "WM": recovered, "AM": recovered}.items()
        for alpha in (0, 0.5, 1)
    ]  # fmt: skip


def averages(lost: float, same: float, regimes=("reference", "sequential", "iterative")) -> list[dict]:
    """What is lost with the most networks; with two it is 5 points, in one basin none."""
    ways = [(regime, matching, lost) for regime in regimes for matching in ("WM", "AM")]
    ways += [("same basin", "none", same)] * (same is not None)
    return [
        {"architecture": "resnet8", "series": "BatchNorm", "first": first, "regime": regime, "matching": matching,
         "n": n, "ends": 0.9, "accuracy": 0.9 - (end if n == 5 else 0.05 * (regime != "same basin"))}
        for first in ("s1", "s2") for regime, matching, end in ways for n in (2, 5)
    ]  # fmt: skip


def without(removed: float, nats: float) -> list[dict]:
    kinds = {"kept": (0.3, 2.0), "removed": (removed, nats), "never": (removed, nats)}
    return joined(*(
        path(middle, loss, series="VGG", matching=matching, biases=f"biases {kind}")
        for matching in ("WM", "AM") for kind, (middle, loss) in kinds.items()
    ))  # fmt: skip


def variants(rescale: float, average: float, reshift: float) -> list[dict]:
    accuracy = {"none": 0.2, "REPAIR": 0.7, "RESCALE": rescale, "RESCALE average": average, "RESHIFT": reshift}
    return [
        {"run": "cifar10/vgg16-plain-w1/qu", "pair": pair, "matching": m, "renorm": renorm, "accuracy": a}
        for pair in PAIRS for m in ("WM", "AM") for renorm, a in accuracy.items()
    ]  # fmt: skip


def measured(values: dict, **columns) -> list[dict]:
    """Accuracies by the values of two columns or three."""
    names = list(columns.pop("by"))
    return [
        {"pair": pair, "accuracy": accuracy, "loss": 1.0, **columns, **dict(zip(names, key, strict=True))}
        for pair in PAIRS for key, accuracy in values.items()
    ]  # fmt: skip


def independent(after: float) -> list[dict]:
    kinds = {"none": 0.3, "RESCALE": after, "RESCALE average": after}
    return measured({(m, r): a for m in ("WM", "AM") for r, a in kinds.items()}, by=("matching", "renorm"))


def one_by_one(repair: float, rescale: float) -> list[dict]:
    values = {"REPAIR simultaneous": 0.6, "REPAIR": repair, "RESCALE simultaneous": 0.8, "RESCALE": rescale}
    return measured({(renorm,): accuracy for renorm, accuracy in values.items()}, by=("renorm",), split="test")


def data(without: float) -> list[dict]:
    kinds = {("none", "not used"): 0.2, ("RESET", "used"): 0.8, ("RESET", "not used"): without}
    return measured({(m, *key): a for m in ("WM", "AM") for key, a in kinds.items()}, by=("matching", "renorm", "data"))


def steps(aligned: int) -> list[dict]:
    last = {"not aligned": 100, "aligned (WM)": aligned, "aligned (AM)": aligned, "new network": 120}
    return [
        {"series": "VGG", "pair": pair, "network": network, "step": step, "accuracy": 0.9, "train_accuracy": 0.9}
        for pair in PAIRS for network, end in last.items() for step in (0, end)
    ]  # fmt: skip


def layers(measure: str, aligned: float) -> list[dict]:
    values = {"endpoint A": 1.0, "not aligned": 0.5, "aligned (WM)": aligned, "aligned (AM)": aligned}
    return [
        {"series": "VGG", "pair": pair, "network": network, "layer": layer, measure: value}
        for pair in PAIRS for network, value in values.items() for layer in (1, 2, 3, 4)
    ]  # fmt: skip


def unmatched(after: float) -> list[dict]:
    values = {("none", "none"): 0.1, ("WM", "none"): 0.2}
    values |= {("none", r): after for r in ("REPAIR", "RESCALE")} | {("WM", r): 0.8 for r in ("REPAIR", "RESCALE")}
    return measured(values, by=("matching", "renorm"))


def codes(each: float, float32: float) -> list[dict]:
    middles = {
        "this library": 0.6, "float64, one pass (paper: ours)": 0.6, "float64, layer by layer (paper: B)": each,
        "float32, mean right": float32, "float32, faulty mean (paper: A)": 0.4,
    }  # fmt: skip
    return joined(*(
        path(middle, series="vgg", implementation=name, moved=int(name.endswith("A)")), units=100, seconds=1.0)
        for name, middle in middles.items()
    ))  # fmt: skip


def widths(narrow: float, wide: float) -> list[dict]:
    return joined(*(path(0.9 - lost, series="VGG", width=w) for w, lost in {1: narrow, 2: wide}.items()))


BASINS = basins(0.8, 0.89, 0.85, 1.0), basins(0.3, 0.5, 0.4, 0.99)
CASES = {  # item: (a table that shows it, one that does not)
    **{f"rethink/fig{i}": (widths(0.5, 0.4), widths(0.05, 0.06)) for i in ("2b", "7")},
    "rethink/fig2c": tuple([row for row in table if "basin" in row] for table in BASINS),
    "rethink/fig2d": (shuffles(1.0), shuffles(0.99)),
    "rethink/fig9-12": BASINS,
    **dict.fromkeys(("rethink/fig3ab", "rethink/fig14-15"), (averages(0.5, 0.0), averages(0.02, 0.5))),
    "rethink/fig16": (averages(0.01, None), averages(0.5, None)),
    **dict.fromkeys(("rethink/fig3cd", "rethink/fig17-24"), (without(0.85, 1.9), without(0.4, 0.1))),
    **{f"rethink/table{i}": (variants(0.75, 0.69, 0.1), variants(0.4, 0.15, 0.5)) for i in (1, 4, 5, 6, 7)},
    "rethink/table8": (independent(0.7), independent(0.3)),
    "rethink/table9": (one_by_one(0.7, 0.8), one_by_one(0.61, 0.6)),
    **{f"rethink/table{i}": (data(0.79), data(0.5)) for i in (10, 11)},
    "rethink/fig4c": (steps(20), steps(90)),
    "rethink/fig36-41": (steps(20), steps(90)),
    "rethink/fig42": (layers("information", 0.8), layers("information", 0.4)),
    "rethink/fig43": (joined(layers("magnitude", 0.8), layers("zeros", 0.3)),
                      joined(layers("magnitude", 0.4), layers("zeros", 0.6))),
    "rethink/no-matching": (unmatched(0.12), unmatched(0.7)),
    "rethink/table2": (codes(0.6, 0.58), codes(0.5, 0.6)),
}  # fmt: skip
JUDGED = [(claim, item) for claim in claims("rethink").values() for item in claim.items]


@pytest.mark.parametrize("claim, item", JUDGED, ids=lambda value: getattr(value, "name", value))
def test_a_claim_can_be_confirmed_and_refuted(claim, item):
    shown, refuted = (claim.judge(pd.DataFrame(table), item) for table in CASES[item])
    assert shown and all(finding.holds for finding in shown), shown
    assert refuted and not any(finding.holds for finding in refuted), refuted


@pytest.mark.parametrize("claim, item", JUDGED, ids=lambda value: getattr(value, "name", value))
def test_one_pair_is_enough(claim, item):
    each = "pair" if "pair" in CASES[item][0][0] else "first"
    one = [row for row in CASES[item][0] if row[each] == CASES[item][0][0][each]]
    assert all(finding.holds for finding in claim.judge(pd.DataFrame(one), item))


def test_every_item_of_a_claim_is_made():
    assert {item for claim in claims("rethink").values() for item in claim.items} <= set(read_index())
