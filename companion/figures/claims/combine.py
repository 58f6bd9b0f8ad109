"""The claims of Mode Combinability (Csiszarik et al. 2023), judged from saved tables."""

import pandas as pd

from companion.experiments.tables import derangement_costs, mean_barriers
from companion.figures.claims import Claim, Finding

NEAR = 10.0  # points of accuracy: combined networks that lose less than that stay near the endpoints
LITTLE = 5.0  # points: what costs less costs little
FEW = 20  # labels; fewer that differ say nothing


def _barriers(frame: pd.DataFrame, by: tuple[str, ...] = ("matching",), each: str = "pair") -> pd.Series:
    """Empirical accuracy barriers (points), means over pairs."""
    return 100 * mean_barriers(frame, by, each)["accuracy_barrier"]


def _near_and_not(aligned: float, not_aligned: float, what: str) -> list[Finding]:
    return [
        Finding(f"{what}aligned {aligned:.1f} points below the ends", aligned < NEAR),
        Finding(f"not aligned {not_aligned:.1f}", not_aligned > 2 * max(aligned, NEAR)),
    ]


def combinations_work(frame: pd.DataFrame, item: str) -> list[Finding]:
    if item == "combine/fig7":  # which of the schemes is the hardest for aligned networks, at the greatest width
        element_wise = frame["scheme"].isin(["uniform", "subcube", "hyperplane", "bernoulli"])
        rows = frame[element_wise & (frame["matching"] == "WM") & (frame["width"] == frame["width"].max())]
        barrier = 100 * rows.groupby("scheme")["accuracy_barrier"].mean()
    else:
        barriers = _barriers(frame, ("scheme", "matching"))
        found = [
            finding
            for scheme in frame["scheme"].unique()
            for finding in _near_and_not(barriers[scheme, "WM"], barriers[scheme, "none"], f"{scheme}: ")
        ]
        if item != "combine/figB15-B18":
            return found
        barrier = barriers.xs("WM", level="matching")
    others = barrier.drop("bernoulli")
    text = (
        f"Bernoulli {barrier['bernoulli']:.1f} points, the hardest of the others ({others.idxmax()}) {others.max():.1f}"
    )
    hardest = Finding(text, barrier["bernoulli"] > others.max())
    return [hardest] if item == "combine/fig7" else [*found, hardest]


def stitchable(frame: pd.DataFrame, item: str) -> list[Finding]:
    barrier = _barriers(frame)
    return _near_and_not(barrier["WM"], barrier["none"], "the worst layer, ")


def width_necessary(frame: pd.DataFrame, item: str) -> list[Finding]:
    rows = frame[frame["matching"] == "WM"]
    found = []
    for scheme, of in rows.groupby("scheme", sort=False):
        mean = 100 * of.groupby("width")["accuracy_barrier"].mean()
        text = f"{scheme} {' → '.join(f'{value:.3g}' for value in mean)} points"
        found.append(Finding(text, mean.iloc[-1] < mean.iloc[0]))
    if len(mean) == 1:
        return [Finding(f"width {mean.index[0]:g} is the only one: {'; '.join(each.text for each in found)}", None)]
    found[0] = Finding(f"widths {', '.join(f'{w:g}' for w in mean.index)}: {found[0].text}", found[0].holds)
    return found


def min_model_fails(frame: pd.DataFrame, item: str) -> list[Finding]:
    aligned = frame[frame["alpha"].isin([0, 1]) & (frame["matching"] == "WM")]
    ends = 100 * aligned.pivot_table(index="pair", columns="alpha", values="accuracy")
    below = ends[0] - ends[1] > NEAR
    text = f"Max {ends[0].mean():.1f} %, Min {ends[1].mean():.1f} % ({int(below.sum())} of {len(below)} pairs)"
    return [Finding(text, ends[0].mean() - ends[1].mean() > NEAR)]


def extrapolates(frame: pd.DataFrame, item: str) -> list[Finding]:
    rows = frame[(frame["split"] == "test") & (frame["scheme"] == "extrapolation")]
    outside = rows[(rows["x"] < 0) | (rows["x"] > 1)]
    lost = 100 * (outside["end_accuracy"] - outside["accuracy"]).groupby(outside["matching"]).mean()
    text = f"beyond the ends {lost['WM']:.1f} points lost on average when aligned, {lost['none']:.1f} when not"
    return [Finding(text, lost["WM"] < lost["none"] / 2)]


def centred_boxes(frame: pd.DataFrame, item: str) -> list[Finding]:
    rows = frame[(frame["scheme"] == "centred") & (frame["split"] == "test")]
    at = max(x for x in rows["x"].unique() if x <= 0.25)
    a = 100 * rows[rows["x"] == 0].groupby("matching")["accuracy"].mean()
    lost = a - 100 * rows[rows["x"] == at].groupby("matching")["accuracy"].mean()
    text = f"at s = {at:g} {lost['WM']:.1f} points below model A when aligned, {lost['none']:.1f} when not"
    return [Finding(text, lost["WM"] < LITTLE)]


def transitive(frame: pd.DataFrame, item: str) -> list[Finding]:
    worst = _barriers(frame, each="triple")
    return [
        Finding(f"through A {worst['through A']:.1f} points below the ends", worst["through A"] < NEAR),
        Finding(f"not aligned {worst['none']:.1f}", worst["none"] > 2 * max(worst["through A"], NEAR)),
    ]


def triangle(frame: pd.DataFrame, item: str) -> list[Finding]:
    frame = frame[frame["matching"] == "WM"]
    weights = frame[["w_a", "w_b", "w_c"]].max(axis=1)
    corners = 100 * frame[weights == 1].groupby("triple")["accuracy"].agg(["mean", "max"])
    inside = 100 * frame[weights < 1].groupby("triple")["accuracy"].agg(["min", "max"])
    worst, best = corners["mean"] - inside["min"], inside["max"] > corners["max"]
    text = f"the best {inside['max'].mean():.1f} %, the best corner {corners['max'].mean():.1f} %"
    return [
        Finding(f"the worst {worst.mean():.1f} points below the corners", worst.mean() < NEAR),
        Finding(f"{text} ({int(best.sum())} of {len(best)} triples)", inside["max"].mean() > corners["max"].mean()),
    ]


def not_vacuous(frame: pd.DataFrame, item: str) -> list[Finding]:
    if "share" in frame:  # edge lengths
        middle = (frame["bin_low"] + frame["bin_high"]) / 2
        shares = frame["share"].groupby([frame["matching"], frame["pair"]]).sum()
        mean = (middle * frame["share"]).groupby([frame["matching"], frame["pair"]]).sum() / shares
        mean = mean.groupby(level=0).mean()
        text = f"mean edge {mean['WM']:.3g} when aligned, {mean['none']:.3g} when not"
        return [Finding(text, mean["WM"] > mean["none"] / 2)]
    found = []
    is_a = (frame["scheme"] == "linear") & (frame["matching"] == "WM") & (frame["x"] == 0)
    for model, rows in frame[is_a].groupby("model", sort=False):
        counts = rows.filter(regex="_(correct|wrong)$")
        total, differ = counts.sum(), counts[["a_correct", "a_wrong"]].sum().sum()  # the network is A
        wrong = total.filter(like="wrong").sum()
        text = f"{model}: A and B differ on {differ} of {total.sum()} labels, A errs on {wrong}"
        found.append(Finding(text, differ >= FEW and differ > wrong / 2))
    return found


def robust_matching(frame: pd.DataFrame, item: str) -> list[Finding]:
    added = 100 * derangement_costs(frame, share=0.5)
    held = added < LITTLE
    text = f"in {held.sum()} of {len(held)} layers less than {LITTLE:g} points more for half of the pairs"
    return [Finding(f"{text}; most in {added.idxmax()}, {added.max():.1f}", bool(held.all()))]


HYPERCUBE = ("combine/fig2", "combine/fig3", "combine/fig4", "combine/fig5", "combine/figB15-B18", "combine/fig7")
CLAIMS = [
    Claim(
        "combine/combinations-work",
        f"element-wise combinations of wide aligned models stay within {NEAR:g} points of the ends; of models that "
        "are not, they lose more than twice as much; Bernoulli coefficients are the hardest",
        "ResNet-20 32x: 1.1 to 4.2 points; Tiny-10: 7 to 19.4 points, Bernoulli the most",
        HYPERCUBE,
        combinations_work,
    ),
    Claim(
        "combine/stitchable",
        f"every stitching point works with the identity map, within {NEAR:g} points",
        "a plot",
        ("combine/fig6", "combine/figB19"),
        stitchable,
    ),
    Claim(
        "combine/width-necessary",
        "every scheme's barrier falls with width",
        "a plot",
        ("combine/fig7", "combine/figB21"),
        width_necessary,
    ),
    Claim(
        "combine/min-model-fails",
        f"the Min model is more than {NEAR:g} points worse than the Max model",
        "a plot",
        ("combine/fig8", "combine/figB22"),
        min_model_fails,
    ),
    Claim(
        "combine/extrapolates",
        "beyond the ends, aligned networks lose less than half of what others lose",
        "significantly slower",
        ("combine/fig9", "combine/figB23-B24"),
        extrapolates,
    ),
    Claim(
        "combine/centred-boxes",
        f"boxes about model A work to s = 0.25 when aligned, within {LITTLE:g} points",
        "s up to 0.25",
        ("combine/fig10", "combine/figB23-B24"),
        centred_boxes,
    ),
    Claim(
        "combine/transitive",
        f"models re-based to a third are connected, within {NEAR:g} points",
        "a plot",
        ("combine/fig11a", "combine/figB20"),
        transitive,
    ),
    Claim(
        "combine/triangle",
        f"the worst of the triangle stays within {NEAR:g} points, and some combination beats all three models",
        "the worst above 91 %",
        ("combine/fig11b",),
        triangle,
    ),
    Claim(
        "combine/not-vacuous",
        f"the aligned models differ: on more labels (at least {FEW}) than half of what one errs on, and by edges that "
        "are on average longer than half of those of models that are not aligned",
        "plots",
        ("combine/fig12", "combine/fig13", "combine/figB25-B26"),
        not_vacuous,
    ),
    Claim(
        "combine/robust-matching",
        f"deranging half of a layer's least correlated pairs costs less than {LITTLE:g} points",
        "a plot",
        ("combine/fig14",),
        robust_matching,
    ),
]
