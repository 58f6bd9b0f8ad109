"""Every claim judged on two tables made by hand: one that shows it, and one that does not."""

import pandas as pd
import pytest

from companion.figures.report import read_index
from companion.figures.scorecard import claims


def profile(not_aligned: float, aligned: float, repaired: float = 1.0, goal: float = 1.0) -> list[dict]:
    """Geometric decay over three layers to what the last one has."""
    last = {"not aligned": not_aligned, "aligned": aligned, "aligned + REPAIR": repaired}
    return [
        {"series": "MLP", "pair": pair, "network": network, "layer": layer, "ratio": ratio ** (layer / 3), "goal": goal}
        for pair in ("1-2", "1-3")
        for network, ratio in last.items()
        for layer in (1, 2, 3)
    ]


Network = tuple[str, str]  # matching and renormalisation
NONE, ALIGNED, REPAIR, RESET = ("none", "none"), ("AM", "none"), ("AM", "REPAIR"), ("AM", "RESET")


def paths(midpoints: dict[Network, float], near: dict[Network, float] | None = None, **columns) -> list[dict]:
    """A long table of paths: accuracy 0.9 at the ends, `near` at 0.1 and 0.9."""
    return [
        {**columns, "pair": pair, "matching": network[0], "renorm": network[1], "alpha": alpha, "split": "test",
         "accuracy": value, "loss": 1 - value}
        for pair in ("1-2", "1-3")
        for network, middle in midpoints.items()
        for alpha, value in {0: 0.9, 0.1: (near or midpoints)[network], 0.5: middle, 1: 0.9}.items()
    ]  # fmt: skip


def barriers(
    after: dict[str, list[float]], before: dict[str, list[float]] | None = None, x="width", **columns
) -> list[dict]:
    """A long table of series over growing sizes with these barriers, in nats and as fractions."""
    barrier = {"none": before or after, "REPAIR": after}
    return [
        {"series": series, **columns, x: 2**i, "pair": pair, "matching": "AM", "renorm": renorm, "alpha": alpha,
         "split": "test", "loss": 0.1 + (alpha == 0.5) * barrier[renorm][series][i],
         "accuracy": 0.9 - (alpha == 0.5) * barrier[renorm][series][i]}
        for series, values in after.items() for i in range(len(values)) for pair in ("1-2", "1-3")
        for renorm in barrier for alpha in (0, 0.5, 1)
    ]  # fmt: skip


def channels(repaired: float) -> list[dict]:
    variance = {"endpoint A": 1.0, "endpoint B": 1.0, "aligned": 0.3, "aligned + REPAIR": repaired}
    return [{"network": n, "channel": c, "variance": v} for n, v in variance.items() for c in (0, 1)]


def depths(aligned: int, closed: int, forward: int) -> list[dict]:
    """Accuracies of 2 and 4 layers from how deep each may be."""
    deepest = {"aligned": aligned, "aligned + REPAIR closed form": closed}
    deepest |= dict.fromkeys(("aligned + REPAIR simultaneous", "aligned + REPAIR"), forward)
    return [{"network": n, "depth": d, "accuracy": 0.95 if d <= m else 0.5} for n, m in deepest.items() for d in (2, 4)]


def split(merged: float, full: float, ensemble: float) -> list[dict]:
    rows = [
        {"matching": "AM", "renorm": "REPAIR", "alpha": alpha, "loss": loss}
        for alpha, loss in ((0, 0.9), (0.5, merged), (1, 0.8))
    ]
    rows += [{"network": "ensemble", "alpha": alpha, "loss": ensemble} for alpha in (0, 0.5, 1)]
    rows += [{"network": "full data", "alpha": None, "loss": full}]
    return [row | {"series": "mlp", "pair": pair, "accuracy": 0.5} for row in rows for pair in ("1-2", "2-3")]


def samples(at_5000: float) -> list[dict]:
    barrier = {100: 0.3, 5000: at_5000, 50000: 0.1}
    return [
        {"network": m, "examples": n, "draw": 0, "barrier": b}
        for m in ("aligned + REPAIR closed form", "aligned + REPAIR")
        for n, b in barrier.items()
    ]


LOW = {NONE: 0.1, ("none", "REPAIR"): 0.2, ALIGNED: 0.3}
CASES = {  # item: (a table that shows it, one that does not)
    "repair/fig2-left": (profile(0.001, 0.01), profile(1.2, 1.1)),
    "repair/fig2-middle": (profile(0.001, 0.01), profile(1.2, 1.1)),
    "repair/fig2-right": (profile(0.001, 0.01), profile(1.2, 1.1)),
    "repair/fig1-left": (profile(0.1, 0.2, 0.98), profile(0.1, 0.2, 0.9, goal=0.9)),
    "repair/fig3-left": (channels(0.97), channels(0.9)),
    "repair/sec3-theory": ([{"eq5": 1.0, "measured": 1.000001}], [{"eq5": 1.0, "measured": 1.001}]),
    "repair/fig3-right": (depths(2, 4, 4), depths(2, 2, 0)),
    "repair/fig1-right": (
        [{"row": "a", "norm": "bn", "width": 1, "reduction": r} for r in (70, 90)],
        [{"row": "a", "norm": "bn", "width": 1, "reduction": r} for r in (20, 30)],
    ),
    "repair/fig4-left": (barriers({"bn": [0.5, 0.2], "ln": [0.4, 0.1]}), barriers({"bn": [0.2, 0.3]})),
    "repair/fig6-left": (barriers({"digits": [0.5, 0.2]}), barriers({"digits": [0.2, 0.3]})),
    "repair/fig6-middle": (barriers({"digits": [0.5, 0.2]}), barriers({"digits": [0.2, 0.3]})),
    "repair/fig4-middle": (
        barriers({"bn": [0.2], "ln": [0.2]}, {"bn": [2.0], "ln": [0.5]}),
        barriers({"bn": [0.1], "ln": [1.2]}, {"bn": [2.0], "ln": [1.5]}),
    ),
    "repair/fig4-right": (
        paths({ALIGNED: 0.1, REPAIR: 0.8}, series="bn") + paths({ALIGNED: 0.6, REPAIR: 0.8}, series="ln"),
        paths({ALIGNED: 0.1, REPAIR: 0.8}, series="bn") + paths({ALIGNED: 0.1, REPAIR: 0.5}, series="ln"),
    ),
    "repair/fig6-right": (
        barriers({"": [0.1, 0.12]}, {"": [0.3, 0.6]}, "depth"),
        barriers({"": [0.1, 0.4]}, {"": [0.3, 0.3]}, "depth"),
    ),
    "repair/fig5-left": (
        paths({RESET: 0.5, REPAIR: 0.6, ("AM", "REPAIR conv"): 0.5, ("AM", "REPAIR bn reset"): 0.6}),
        paths({RESET: 0.6, REPAIR: 0.6, ("AM", "REPAIR conv"): 0.6, ("AM", "REPAIR bn reset"): 0.6}),
    ),
    "repair/equivalence": (
        [{"network": "conv REPAIR, reset", "eps": 1e-12, "difference": 1e-8}],
        [{"network": "conv REPAIR, reset", "eps": 1e-12, "difference": 1e-2}],
    ),
    "repair/samples": (samples(0.102), samples(0.2)),
    "repair/fig7": (split(0.5, 0.1, 0.1), split(0.85, 0.1, 0.1)),
    "repair/fig13": (split(0.5, 0.1, 0.2), split(0.5, 0.6, 0.6)),
    "repair/fig14": (
        paths(LOW | {REPAIR: 0.8}, LOW | {("none", "REPAIR"): 0.5, REPAIR: 0.85}, series="vgg"),
        paths(LOW | {REPAIR: 0.35}, LOW | {("none", "REPAIR"): 0.05, REPAIR: 0.4}, series="vgg"),
    ),
}  # fmt: skip
JUDGED = [(claim, item) for claim in claims("repair").values() for item in claim.items]


@pytest.mark.parametrize("claim, item", JUDGED, ids=lambda value: getattr(value, "name", value))
def test_a_claim_can_be_confirmed_and_refuted(claim, item):
    shown, refuted = (claim.judge(pd.DataFrame(table), item) for table in CASES[item])
    assert shown and all(finding.holds for finding in shown), shown
    assert refuted and not any(finding.holds for finding in refuted), refuted
    assert all(isinstance(finding.holds, bool) and finding.text for finding in shown + refuted)


def test_every_item_of_a_claim_is_made():
    assert {item for claim in claims().values() for item in claim.items} <= set(read_index())


def test_findings_say_in_how_many_pairs():
    claim = claims()["repair/block-outputs-help"]
    finding = claim.judge(pd.DataFrame(CASES["repair/fig5-left"][0]), "repair/fig5-left")[0]
    assert finding.text == "midpoint 50.0 % with convolutions, 60.0 % with blocks too (2 of 2 pairs)"
    (finding,) = claims()["repair/repair-restores"].judge(
        pd.DataFrame(CASES["repair/fig1-left"][1]), "repair/fig1-left"
    )
    assert "0.900 to 0.965 (Eq. 4 itself asks for 0.900 to 0.900)" in finding.text


def test_layernorm_is_judged_at_every_width_in_nats_and_on_a_path_in_points():
    claim = claims("repair")["repair/layernorm-special"]
    widths, path = (pd.DataFrame(CASES[item][0]) for item in ("repair/fig4-middle", "repair/fig4-right"))
    assert claim.judge(widths, "repair/fig4-middle")[0].text == "1x: before, BatchNorm 2, LayerNorm 0.5 nats"
    assert claim.judge(path, "repair/fig4-right")[0].text == "before, BatchNorm 80, LayerNorm 30 points"


def part(item: str, **kept) -> list[dict]:
    """The table that shows a claim, without the rows that have other values in some column."""
    return [row for row in CASES[item][0] if all(row[column] == value for column, value in kept.items())]


@pytest.mark.parametrize(
    "claim, item, table, text",
    [
        ("width-helps", "fig4-left", part("repair/fig4-left", width=1), "BatchNorm 0.5 nats at width 1, the only one"),
        (
            "width-helps",
            "fig6-middle",
            part("repair/fig6-middle", width=2),
            "digits 20 points at width 2, the only one",
        ),
        ("layernorm-special", "fig4-middle", part("repair/fig4-middle", series="bn"), "no networks with LayerNorm"),
        ("layernorm-special", "fig4-right", part("repair/fig4-right", series="ln"), "no networks with BatchNorm"),
        (
            "layernorm-special",
            "fig4-middle",
            barriers({"bn": [0.2]}) + barriers({"ln": [0.2, 0.1]})[12:],
            "no width has",
        ),
        ("depth-flat", "fig6-right", part("repair/fig6-right", depth=1), "before 30 points at depth 1, the only one"),
        ("deeper-with-repair", "fig3-right", depths(4, 4, 4), "the deepest network has 4 layers and needs no REPAIR"),
    ],
)
def test_a_claim_about_what_is_missing_is_not_judged(claim, item, table, text):
    findings = claims("repair")[f"repair/{claim}"].judge(pd.DataFrame(table), f"repair/{item}")
    assert findings[0].text.startswith(text) and str(findings[0]) == f"not judged: {findings[0].text}"
    assert all(finding.holds is None for finding in findings)


def test_the_rest_of_a_claim_is_judged():
    table = barriers({"bn": [0.5, 0.2], "ln": [0.4]})  # LayerNorm at one width
    bn, ln = claims("repair")["repair/width-helps"].judge(pd.DataFrame(table), "repair/fig4-left")
    assert bn.holds and ln.holds is None
    table = part("repair/fig4-middle", pair="1-2")  # one pair, one width
    findings = claims("repair")["repair/layernorm-special"].judge(pd.DataFrame(table), "repair/fig4-middle")
    assert [finding.holds for finding in findings] == [True, True]
