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


def rates(small: float, large: float, worse: float | None = None) -> list[dict]:
    """What is lost halfway at a small learning rate, at a large one, and by networks made worse at the large one."""
    lost = {(0.01, False): small, (0.1, False): large} | ({} if worse is None else {(0.1, True): worse})
    return joined(*(
        path(0.9 - points, series="VGG", matching=m, lr=lr, **({} if worse is None else {"degraded": degraded}))
        for m in ("WM", "AM") for (lr, degraded), points in lost.items()
    ))  # fmt: skip


def sparser(small: float, large: float) -> list[dict]:
    values = {(lr, s): 0.9 - s * lost for lr, lost in {0.01: small, 0.1: large}.items() for s in (0.0, 0.5, 0.9)}
    return measured(values, by=("lr", "sparsity"), series="VGG")


def initial(small: float, large: float) -> list[dict]:
    """How much more is lost from normal initial weights than from uniform ones."""
    return joined(*(
        path(0.8 - more, series="VGG", matching="WM", lr=lr, init=init)
        for lr, extra in {0.01: small, 0.1: large}.items()
        for init, more in {"Kaiming normal": extra, "Kaiming uniform": 0.0}.items()
    ))  # fmt: skip


def decays(small: float, large: float, control: float | None = None) -> list[dict]:
    lost = {(1e-4, False): small, (5e-4, False): large} | ({} if control is None else {(1e-4, True): control})
    return joined(*(
        path(0.9 - points, series="VGG", wd=wd, **({} if control is None else {"degraded": degraded}))
        for (wd, degraded), points in lost.items()
    ))  # fmt: skip


def two_ways(repair: float, rescale: float) -> list[dict]:
    """How far the midpoint moves with weight decay."""
    return joined(*(
        path(0.8 - moved * (wd == 1e-4), matching="WM", renorm=renorm, wd=wd)
        for renorm, moved in {"REPAIR": repair, "RESCALE": rescale}.items() for wd in (1e-4, 5e-4)
    ))  # fmt: skip


def pruned(gain: float, magnitude: float) -> list[dict]:
    """Accuracies gained by renormalising, and that of magnitude less than WoodFisher's."""
    return [
        {"series": "VGG", "pair": pair, "pruner": pruner, "sparsity": sparsity, "renorm": renorm,
         "accuracy": 0.5 + (gain * (sparsity > 0.5) if renorm != "none" else 0) - magnitude * (pruner[0] == "g")}
        for pair in PAIRS for pruner in ("global magnitude", "WoodFisher") for sparsity in (0.0, 0.5, 0.9)
        for renorm in ("none", "renormalised")
    ]  # fmt: skip


def images(few: float) -> list[dict]:
    values = {("before", "none"): 0.2, ("64 images", "renormalised"): few, ("all images", "renormalised"): 0.8}
    return measured(values, by=("samples", "renorm"), pruner="global magnitude", sparsity=0.9)


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
    **dict.fromkeys(("rethink/fig5a", "rethink/fig45-46"), (rates(0.5, 0.1), rates(0.1, 0.1))),
    "rethink/fig47-58": (rates(0.5, 0.1, 0.2), rates(0.2, 0.1, 0.3)),
    "rethink/fig44": (sparser(0.5, 0.2), sparser(0.2, 0.5)),
    **dict.fromkeys(("rethink/fig5b", "rethink/fig60-62"), (initial(0.4, 0.0), initial(0.1, 0.1))),
    "rethink/fig6a": (decays(0.5, 0.1), decays(0.1, 0.3)),
    "rethink/fig63-68": (decays(0.5, 0.1, 0.4), decays(0.2, 0.3, 0.1)),
    **dict.fromkeys(("rethink/fig6c", "rethink/fig71"), (two_ways(0.4, 0.1), two_ways(0.1, 0.4))),
    **{f"rethink/fig{i}": (pruned(0.3, 0.01), pruned(-0.1, 0.2)) for i in ("2a", "6d", "72", "73")},
    "rethink/fig74": (images(0.795), images(0.7)),
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
