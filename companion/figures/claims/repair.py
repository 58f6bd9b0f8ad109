"""The claims of REPAIR (Jordan et al. 2022), judged from saved tables."""

from collections.abc import Iterable

import pandas as pd

from companion.experiments.tables import barrier_means, barriers, name_networks
from companion.figures.claims import Claim, Finding

FLAT = 5.0  # points of accuracy: what is less is no change of a barrier with depth


NORMS = {"bn": "BatchNorm", "ln": "LayerNorm", "fixup": "Fixup"}


def _over(rows: pd.DataFrame, holds: pd.Series) -> str:
    """In how many of the pairs of seeds something holds, if there are several."""
    return f" ({int(holds.sum())} of {len(holds)} pairs)" if "pair" in rows and len(holds) > 1 else ""


def _middle(frame: pd.DataFrame, by: str = "network", metric: str = "accuracy") -> pd.DataFrame:
    """Accuracy (%) or loss at alpha 0.5: a row for each pair, a column for each network."""
    frame = name_networks(frame)
    frame = frame if "pair" in frame else frame.assign(pair="")
    middle = frame[frame["alpha"] == 0.5].pivot_table(index="pair", columns=by, values=metric, sort=False)
    return middle * (100 if metric == "accuracy" else 1)


def _sizes(sizes: Iterable[float], what: str) -> str:
    """Sizes in words.

    >>> _sizes([1, 2], "width"), _sizes([1], "width")
    ('widths 1, 2', 'width 1')
    """
    words = [f"{size:g}" for size in sizes]
    return f"{what}{'s' if len(words) > 1 else ''} {', '.join(words)}"


def _arrow(values: Iterable[float], digits: int = 3) -> str:
    return " → ".join(f"{value:.{digits}g}" for value in values)


def collapse_deepens(frame: pd.DataFrame, item: str) -> list[Finding]:
    mean = frame.groupby(["network", "layer"])["ratio"].mean()
    first, last = mean.index.get_level_values("layer").min(), mean.index.get_level_values("layer").max()
    ends = {network: (mean[network, first], mean[network, last]) for network in ("not aligned", "aligned")}
    lower = (mean["not aligned"] < mean["aligned"]).mean()
    layers = f"from layer {first} to {last}"
    return [Finding(f"{name} {_arrow(values)} {layers}", values[1] < values[0]) for name, values in ends.items()] + [
        Finding(f"lower without alignment in {lower:.0%} of the layers", lower > 0.5)
    ]


def repair_restores(frame: pd.DataFrame, item: str) -> list[Finding]:
    if "channel" in frame:  # one layer, channel by channel
        total = frame.groupby("network")["variance"].sum()
        frame = pd.DataFrame({"series": [""], "network": ["aligned + REPAIR"]}).assign(
            ratio=2 * total["aligned + REPAIR"] / (total["endpoint A"] + total["endpoint B"])
        )
    found = []
    for series, rows in frame[frame["network"] == "aligned + REPAIR"].groupby("series", sort=False):
        mean = rows.groupby("layer")[["ratio", "goal"]].mean() if "layer" in rows else rows[["ratio"]]
        text = f"{series} {mean.ratio.min():.3f} to {mean.ratio.max():.3f}".strip()
        if "goal" in mean:
            text += f" (Eq. 4 itself asks for {mean.goal.min():.3f} to {mean.goal.max():.3f})"
        found.append(Finding(text, ((mean.ratio - 1).abs() < 0.05).all()))
    return found


def first_layer_exact(frame: pd.DataFrame, item: str) -> list[Finding]:
    error = (frame["eq5"] / frame["measured"] - 1).abs().max()
    return [Finding(f"largest relative error of Eq. 5 {error:.1e}, over {len(frame)} units", error < 1e-5)]


def deeper_with_repair(frame: pd.DataFrame, item: str) -> list[Finding]:
    mean = frame.groupby(["network", "depth"])["accuracy"].mean()
    deepest = {name: max(mean[name].index[mean[name] > 0.9], default=0) for name in mean.index.levels[0]}
    closed = deepest["aligned + REPAIR closed form"]
    if deepest["aligned"] == frame["depth"].max():
        return [Finding(f"the deepest network has {deepest['aligned']} layers and needs no REPAIR", None)]
    return [
        Finding(f"closed form {closed} layers, without {deepest['aligned']}", closed > deepest["aligned"]),
        *(
            Finding(f"forward exact, {name}: {deepest[name]}", deepest[name] >= closed)
            for name in ("aligned + REPAIR simultaneous", "aligned + REPAIR")
        ),
    ]


def barrier_reduction(frame: pd.DataFrame, item: str) -> list[Finding]:
    found = []
    for (row, norm), rows in frame.groupby(["row", "norm"], sort=False):
        mean = rows.groupby("width")["reduction"].mean()
        widths = f" at {_sizes(mean.index, 'width')}" if len(mean) > 1 else ""
        name = f"{row}, {NORMS.get(norm, norm)}" if norm != "none" else row
        found.append(Finding(f"{name}: {_arrow(mean, 2)} %{widths}", mean.between(60, 100).all()))
    return found


def width_helps(frame: pd.DataFrame, item: str) -> list[Finding]:
    metric, unit = ("loss", "nats") if item == "repair/fig4-left" else ("accuracy", "points")
    after = barrier_means(frame.to_dict("records"), ("series", "width"), metric)["REPAIR"]
    found = []
    for series in after.index.unique(0):
        values, rows = after[series].sort_index(), frame[(frame["series"] == series) & (frame["renorm"] == "REPAIR")]
        text = f"{NORMS.get(series, series)} {_arrow(values)} {unit} at {_sizes(values.index, 'width')}"
        if len(values) == 1:
            found.append(Finding(f"{text}, the only one", None))
            continue
        by_pair = barriers(rows).pivot_table(index="pair", columns="width", values=f"{metric}_barrier")
        falls = by_pair[values.index[-1]] < by_pair[values.index[0]]
        found.append(Finding(text + _over(rows, falls), values.iloc[-1] < values.iloc[0]))
    return found


def layernorm_special(frame: pd.DataFrame, item: str) -> list[Finding]:
    if missing := [NORMS[norm] for norm in ("bn", "ln") if norm not in set(frame["series"])]:
        return [Finding(f"no networks with {' or '.join(missing)}", None)]
    if item == "repair/fig4-right":  # along the path of one width: how far the midpoint lies below the ends
        networks = {"none": "aligned", "REPAIR": "aligned + REPAIR"}
        named = name_networks(frame)
        middle = _middle(named.assign(network=named["series"] + " " + named["network"])).mean()
        ends = 100 * frame[frame["alpha"].isin([0, 1])].groupby("series")["accuracy"].mean()
        gaps = {"": {w: [ends[s] - middle[f"{s} {n}"] for s in ("bn", "ln")] for w, n in networks.items()}}
        unit = "points"
    else:
        means, unit = barrier_means(frame.to_dict("records"), ("series", "width"), "loss"), "nats"
        widths = [w for w in means.loc["bn"].index if w in means.loc["ln"].index]
        gaps = {
            f"{width:g}x: ": {w: [means.loc[(s, width), w] for s in ("bn", "ln")] for w in means} for width in widths
        }
    found = [] if gaps else [Finding("no width has both BatchNorm and LayerNorm", None)]
    for where, gap in gaps.items():
        bn, ln = gap["none"]
        found.append(Finding(f"{where}before, BatchNorm {bn:.3g}, LayerNorm {ln:.3g} {unit}", ln < bn / 2))
        closed = abs(gap["REPAIR"][0] - gap["REPAIR"][1]) < abs(bn - ln) / 2
        found.append(Finding(f"{where}after, {gap['REPAIR'][0]:.3g} and {gap['REPAIR'][1]:.3g}", closed))
    return found


def depth_flat(frame: pd.DataFrame, item: str) -> list[Finding]:
    rows = frame[frame["split"] == "test"]
    mean = barrier_means(
        rows.to_dict("records"), ("series", "depth") if "series" in rows else ("split", "depth"), "accuracy"
    )
    mean = mean.droplevel(0).sort_index()
    rise = mean.iloc[-1] - mean.iloc[0]
    before = f"before {_arrow(mean['none'])} points at {_sizes(mean.index, 'depth')}"
    if len(mean) == 1:
        return [Finding(f"{before}, the only one; after {_arrow(mean['REPAIR'])}", None)]
    return [
        Finding(before, rise["none"] > FLAT),
        Finding(f"after {_arrow(mean['REPAIR'])} points", abs(rise["REPAIR"]) < FLAT),
    ]


def block_outputs_help(frame: pd.DataFrame, item: str) -> list[Finding]:
    middle, found = _middle(frame), []
    # As the paper compares them; and, since these two differ in BatchNorms as well, with BatchNorms alike.
    kinds = {
        "": ("aligned + RESET", "aligned + REPAIR"),
        "BatchNorms kept in both: ": ("aligned + REPAIR conv", "aligned + REPAIR"),
        "BatchNorms reset in both: ": ("aligned + RESET", "aligned + REPAIR bn reset"),
    }
    for name, (conv, full) in kinds.items():
        text = (
            f"{name}midpoint {middle[conv].mean():.1f} % with convolutions, {middle[full].mean():.1f} % with blocks too"
        )
        found.append(
            Finding(text + _over(frame, middle[full] > middle[conv]), middle[full].mean() > middle[conv].mean())
        )
    return found


def bn_equals_reset(frame: pd.DataFrame, item: str) -> list[Finding]:
    rows = frame[(frame["network"] == "conv REPAIR, reset") & (frame["eps"] < 1e-6)]
    difference = rows["difference"].max()
    return [Finding(f"largest difference of logits {difference:.1e}, relative to the largest logit", difference < 1e-5)]


def few_examples_suffice(frame: pd.DataFrame, item: str) -> list[Finding]:
    found = []
    for method, rows in frame.groupby("network", sort=False):
        barrier = 100 * rows.groupby("examples")["barrier"].mean()
        off = (barrier - barrier.iloc[-1]).abs()
        enough = off.index[::-1][(off[::-1] < 0.5).cummin()][-1]  # from here on, all are close to the last
        text = f"{method}: within half a point of all {barrier.index[-1]} images from {enough} on"
        found.append(Finding(text, enough <= 5000))
    return found


def split_merge(frame: pd.DataFrame, item: str) -> list[Finding]:
    found = []
    for series, rows in frame.groupby("series", sort=False):
        paths = name_networks(rows).dropna(subset="alpha").groupby(["network", "pair", "alpha"])["loss"].mean()
        merged = paths["aligned + REPAIR"].unstack("alpha")
        best, ends = merged.drop(columns=[0, 1]).min(axis=1), merged[[0, 1]].min(axis=1)
        if item == "repair/fig7":
            text = f"{series}: best merge {best.mean():.3f} nats, better endpoint {ends.mean():.3f}"
            found.append(Finding(text + _over(rows, best < ends), best.mean() < ends.mean()))
            continue
        for name in ("ensemble", "full data"):
            loss = rows[rows["network"] == name].groupby("pair")["loss"].min()
            text = f"{series}: {name} {loss.mean():.3f} nats, best merge {best.mean():.3f}"
            found.append(Finding(text + _over(rows, loss < best), loss.mean() < best.mean()))
    return found


def both_needed(frame: pd.DataFrame, item: str) -> list[Finding]:
    found = []
    for series, rows in frame.groupby("series", sort=False):
        ends = 100 * rows[rows["alpha"].isin([0, 1])]["accuracy"].mean()
        barrier = ends - _middle(rows).mean()
        others = barrier.drop("aligned + REPAIR")
        text = f"{series}: midpoint {barrier['aligned + REPAIR']:.1f} points below the ends with both, "
        text += f"{others.min():.1f} with one or none"
        found.append(Finding(text, barrier["aligned + REPAIR"] < others.min() / 2))
        near = min(alpha for alpha in rows["alpha"] if alpha > 0)
        beside = name_networks(rows[rows["alpha"].isin([near, 1 - near])])
        mean = 100 * beside.groupby("network")["accuracy"].mean()[["not aligned", "not aligned + REPAIR"]]
        text = f"{series}, {near:g} from the ends, not aligned: {_arrow(mean)} % by REPAIR"
        found.append(Finding(text, mean.iloc[1] > mean.iloc[0]))
    return found


CLAIMS = [
    Claim(
        "repair/collapse-deepens",
        "the variance ratio falls with depth, and faster without alignment",
        "last layers of VGG and ResNet50 by more than 10x",
        ("repair/fig2-left", "repair/fig2-middle", "repair/fig2-right"),
        collapse_deepens,
    ),
    Claim(
        "repair/repair-restores",
        "after REPAIR every layer's variance ratio is 1 within 5 %",
        "1",
        ("repair/fig1-left", "repair/fig3-left"),
        repair_restores,
    ),
    Claim(
        "repair/first-layer-exact",
        "Eq. 5 predicts the variance of the first layer to rounding",
        "exact",
        ("repair/sec3-theory",),
        first_layer_exact,
    ),
    Claim(
        "repair/deeper-with-repair",
        "the deepest MLP above 90 % is deeper with the closed form than without, "
        "and with forward passes at least as deep",
        "27 layers with the closed form, 6 without",
        ("repair/fig3-right",),
        deeper_with_repair,
    ),
    Claim(
        "repair/barrier-reduction",
        "REPAIR reduces barriers by 60 to 100 %",
        "60-100 %, though its figure has 23-40 % for the narrowest; ResNet50 74 %, ResNet18 90 %",
        ("repair/fig1-right",),
        barrier_reduction,
    ),
    Claim(
        "repair/width-helps",
        "the barrier after REPAIR falls as width grows",
        "below 0.05 nats at 16x",
        ("repair/fig4-left", "repair/fig6-left", "repair/fig6-middle"),
        width_helps,
    ),
    Claim(
        "repair/layernorm-special",
        "before REPAIR LayerNorm's barrier is less than half of BatchNorm's; "
        "after it, that gap has closed by more than half",
        "8x: 90.3 against 32.3 % before, 93.2 against 94.4 % after",
        ("repair/fig4-middle", "repair/fig4-right"),
        layernorm_special,
    ),
    Claim(
        "repair/depth-flat",
        f"before REPAIR the barrier rises with depth by more than {FLAT:g} points; after it, it changes by less",
        "a plot",
        ("repair/fig6-right",),
        depth_flat,
    ),
    Claim(
        "repair/block-outputs-help",
        "repairing block outputs too beats repairing convolutions alone",
        "56.5 against 53.2 %",
        ("repair/fig5-left",),
        block_outputs_help,
    ),
    Claim(
        "repair/bn-equals-reset",
        "REPAIR of the convolutions of a BatchNorm network is RESET, to rounding",
        "identical",
        ("repair/equivalence",),
        bn_equals_reset,
    ),
    Claim(
        "repair/few-examples-suffice",
        "the barrier no longer changes from 5,000 calibration examples on",
        "5,000",
        ("repair/samples",),
        few_examples_suffice,
    ),
    Claim(
        "repair/split-merge",
        "some merged model has a lower test loss than both endpoints; the ensemble and a model "
        "trained on all data stay ahead",
        "best merge 1.30 nats at alpha 0.3",
        ("repair/fig7", "repair/fig13"),
        split_merge,
    ),
    Claim(
        "repair/both-needed",
        "at the midpoint only alignment with REPAIR performs (here: less than half "
        "of the others' barrier); near the ends REPAIR alone helps",
        "a plot",
        ("repair/fig14",),
        both_needed,
    ),
]
