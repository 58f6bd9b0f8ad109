"""The claims of Rethink Model Re-Basin (Qu and Horvath 2024), judged from saved tables."""

import pandas as pd

from companion.experiments.tables import barriers, pruned_means
from companion.figures.claims import Claim, Finding

NOISE = 2.0  # points: differences of midpoints that are within it are none
BARRIER = 10.0  # points: what is more is no linear mode connectivity
SAME = 5.0  # points that the average of networks of one basin may lose
LITTLE = 0.5  # points: Table 2's smallest difference between float64 and float32 is 0.8
NEAR = 3.0  # points between a renormalisation with data and without
HIGH = 0.8  # sparsity from which renormalisation should gain
FEW = 1.0  # points between few images and all


def _points(frame: pd.DataFrame, by: list[str]) -> pd.Series:
    """Mean accuracy barrier of paths, in points, by some columns."""
    return 100 * barriers(frame).groupby(by, sort=False)["accuracy_barrier"].mean()


def _percent(frame: pd.DataFrame, by: list[str]) -> pd.Series:
    """Mean accuracy in percent, by some columns."""
    return 100 * frame.groupby(by, sort=False)["accuracy"].mean()


def plain_has_a_barrier(frame: pd.DataFrame, item: str) -> list[Finding]:
    found = []
    for series, lost in _points(frame, ["series", "width"]).groupby(level="series", sort=False):
        values = lost.droplevel("series").sort_index()
        words = f"{series} {' → '.join(f'{v:.1f}' for v in values)} points at {len(values)} widths"
        found.append(Finding(words, values.min() > BARRIER))
        if len(values) > 1:
            change = values.iloc[-1] - values.iloc[0]
            found.append(Finding(f"from the thinnest to the widest {change:+.1f}", change < 0))
    return found


def same_basin_differs(frame: pd.DataFrame, item: str) -> list[Finding]:
    paths = frame[frame["basin"].notna()].drop(columns=["recovered"], errors="ignore")
    found = []
    for series, rows in paths.groupby("series", sort=False):
        lost = _points(rows, ["basin", "renorm"])
        plain, after = (lost.xs(renorm, level="renorm") for renorm in ("none", "RESET"))
        found += [
            Finding(f"{series}, {basin}: {plain[basin]:.1f} points without RESET", plain[basin] < limit)
            for basin, limit in (("spawned", plain["independent"] / 2), ("retrained", SAME))
        ]
        words = f"{series}, independent: {plain['independent']:.1f} without, {after['independent']:.1f} with it"
        found.append(Finding(words, after["independent"] < plain["independent"] / 2))
    return found


def shuffle_recovered(frame: pd.DataFrame, item: str) -> list[Finding]:
    frame = frame[frame["recovered"].notna() & (frame["matching"] != "none")]
    least = 100 * frame.groupby(["series", "matching"], sort=False)["recovered"].min()
    return [Finding(f"{s}, {m}: {share:.4g} % of the units", share == 100) for (s, m), share in least.items()]


def many_models_fail(frame: pd.DataFrame, item: str) -> list[Finding]:
    frame = frame.assign(lost=100 * (frame["ends"] - frame["accuracy"]))
    few, many = frame["n"].min(), frame["n"].max()
    mean = frame.groupby(["architecture", "series", "regime", "matching", "n"], sort=False)["lost"].mean().unstack("n")
    found = []
    for (architecture, series), rows in mean.groupby(level=[0, 1], sort=False):
        same = rows.index.get_level_values("regime") == "same basin"
        matched, own = rows[~same], rows[same]
        grows = matched[many] > matched[few] + NOISE
        span = f"{matched[few].mean():.1f} points are lost with {few} networks, {matched[many].mean():.1f} with {many}"
        found.append(Finding(f"{architecture}, {series}: {span} ({grows.sum()} of {len(grows)} ways)", grows.all()))
        if len(own):
            change = f"{own[few].mean():.1f} and {own[many].mean():.1f}"
            found.append(Finding(f"in one basin {change}", own[many].mean() < own[few].mean() + NOISE))
    return found


def mlp_many_models_ok(frame: pd.DataFrame, item: str) -> list[Finding]:
    rows = frame[(frame["n"] == frame["n"].max()) & frame["regime"].isin(["reference", "sequential"])]
    lost = 100 * (rows["ends"] - rows["accuracy"])
    mean = lost.groupby([rows["regime"], rows["matching"]], sort=False).mean()
    n = frame["n"].max()
    return [Finding(f"{r} ({m}): {v:.1f} points lost with {n} networks", v < SAME) for (r, m), v in mean.items()]


def bias_removal(frame: pd.DataFrame, item: str) -> list[Finding]:
    measured = barriers(frame).groupby(["series", "matching", "biases"], sort=False)
    mean = measured[["accuracy_barrier", "loss_barrier"]].mean() * [100, 1]
    found = []
    for (series, matching), rows in mean.groupby(level=["series", "matching"], sort=False):
        points, nats = (rows[column].droplevel([0, 1]) for column in ("accuracy_barrier", "loss_barrier"))
        kept, removed, never = (points[f"biases {name}"] for name in ("kept", "removed", "never"))
        words = f"{series}, {matching}: {kept:.1f} points with biases, {removed:.1f} removed, {never:.1f} never there"
        found.append(Finding(words, removed < kept / 2 and never < kept / 2))
        loss = [nats[f"biases {name}"] for name in ("kept", "removed")]
        found.append(Finding(f"loss barrier {loss[0]:.2f} and {loss[1]:.2f} nats", loss[1] > loss[0] / 2))
    return found


def rescale_is_the_key(frame: pd.DataFrame, item: str) -> list[Finding]:
    found = []
    for matching, rows in frame.groupby("matching", sort=False):
        mean = _percent(rows, ["renorm"])
        chance = 100 / (100 if "cifar100" in rows["run"].iloc[0] else 10)
        repair, rescale, average, reshift = (mean[name] for name in ("REPAIR", "RESCALE", "RESCALE average", "RESHIFT"))
        found += [
            Finding(f"{matching}: REPAIR {repair:.1f}, RESCALE {rescale:.1f} %", rescale > repair - NEAR),
            Finding(f"RESHIFT {reshift:.1f} %", reshift < chance + SAME),
        ]
        if item in ("rethink/table1", "rethink/table4"):  # the paper says so of VGG16
            found.append(Finding(f"RESCALE with one scale a layer {average:.1f} %", average > repair - NEAR))
    return found


def independent_stats(frame: pd.DataFrame, item: str) -> list[Finding]:
    mean = _percent(frame, ["matching", "renorm"])
    return [
        Finding(f"{matching}: {mean[matching, 'none']:.1f} %, {renorm} {mean[matching, renorm]:.1f} %",
                mean[matching, renorm] > mean[matching, "none"] + NOISE)
        for matching in ("WM", "AM") for renorm in ("RESCALE", "RESCALE average")
    ]  # fmt: skip


def sequential_better(frame: pd.DataFrame, item: str) -> list[Finding]:
    mean = _percent(frame[frame["split"] == "test"], ["renorm"])
    at_once, one_by_one = ([mean[f"{name}{end}"] for name in ("REPAIR", "RESCALE")] for end in (" simultaneous", ""))
    return [
        Finding(f"REPAIR {at_once[0]:.1f} %, sequential {one_by_one[0]:.1f} %", one_by_one[0] > at_once[0] + NOISE),
        Finding(f"RESCALE {at_once[1]:.1f} %, sequential {one_by_one[1]:.1f} %",
                abs(one_by_one[1] - at_once[1]) < NOISE),
    ]  # fmt: skip


def data_independent(frame: pd.DataFrame, item: str) -> list[Finding]:
    mean = _percent(frame, ["matching", "renorm", "data"])
    found = []
    for matching, renorm in dict.fromkeys((m, r) for m, r, _ in mean.index if r != "none"):
        used, not_used = (mean[matching, renorm, data] for data in ("used", "not used"))
        holds = not_used > used - NEAR and not_used > mean[matching, "none", "not used"]
        found.append(Finding(f"{renorm} ({matching}): {used:.1f} % with data, {not_used:.1f} % without", holds))
    return found


def matching_retains(frame: pd.DataFrame, item: str) -> list[Finding]:
    if item == "rethink/no-matching":
        mean = _percent(frame, ["matching", "renorm"])
        return [
            Finding(f"{name}: {mean['none', name]:.1f} % not aligned, {mean['WM', name]:.1f} % aligned",
                    mean["none", name] < mean["WM", name] / 2)
            for name in ("REPAIR", "RESCALE")
        ]  # fmt: skip
    found = []
    for series, rows in frame.groupby("series", sort=False):
        if "step" in rows:
            steps = rows.groupby(["pair", "network"], sort=False)["step"].max().groupby("network", sort=False).mean()
            others = {m: steps[f"aligned ({m})"] for m in ("WM", "AM")}
            words = " and ".join(f"{value:.0f} ({m})" for m, value in others.items())
            found.append(
                Finding(f"{series}: {steps['not aligned']:.0f} steps not aligned, {words} aligned",
                        max(others.values()) < steps["not aligned"] / 2)
            )  # fmt: skip
            continue
        for measure, more in (("information", True), ("magnitude", True), ("zeros", False)):
            if measure not in rows or rows[measure].isna().all():
                continue
            part = rows[rows[measure].notna()]
            if measure == "zeros":  # the paper: in early layers
                part = part[part["layer"] <= part["layer"].max() / 2]
            mean = part.groupby("network", sort=False)[measure].mean()
            aligned = [mean[f"aligned ({m})"] for m in ("WM", "AM")]
            holds = min(aligned) > mean["not aligned"] if more else max(aligned) < mean["not aligned"]
            words = f"{mean['not aligned']:.3g} not aligned, {aligned[0]:.3g} (WM), {aligned[1]:.3g} (AM)"
            found.append(Finding(f"{series}, {measure}: {words}", holds))
    return found


def precision(frame: pd.DataFrame, item: str) -> list[Finding]:
    measured = barriers(frame).assign(moved=lambda rows: 100 * rows["moved"] / rows["units"])
    mean = measured.groupby(["series", "implementation"], sort=False)[["accuracy_barrier", "moved"]].mean()
    names = {name.partition(" (")[0]: name for name in frame["implementation"].unique()}
    found = []
    for series in mean.index.unique(0):
        rows = mean.loc[series]
        lost = {short: 100 * rows["accuracy_barrier"][name] for short, name in names.items()}
        moved = {short: rows["moved"][name] for short, name in names.items()}
        one, each = lost["this library"], lost["float64, layer by layer"]
        right, faulty = (f"float32, {mean_}" for mean_ in ("mean right", "faulty mean"))
        found += [
            Finding(f"{series}: one pass {one:.1f} points, layer by layer {each:.1f}", abs(one - each) < NOISE),
            Finding(f"float32 {lost[right]:.1f} points ({moved[right]:.1f} % of the units moved); with the faulty mean "
                    f"{lost[faulty]:.1f} ({moved[faulty]:.1f} %)", lost[right] > one + LITTLE),
        ]  # fmt: skip
    return found


def large_rates_help(frame: pd.DataFrame, item: str) -> list[Finding]:
    found = []
    if item == "rethink/fig44":
        for series, rows in frame.groupby("series", sort=False):
            mean = 100 * rows.groupby(["lr", "sparsity"])["accuracy"].mean().unstack("sparsity")
            lost = (mean[0.0] - mean.drop(columns=0.0).mean(axis=1)).sort_index()
            words = f"{series}: pruned, {lost.iloc[0]:.1f} points less at rate {lost.index[0]:g}, {lost.iloc[-1]:.1f}"
            found.append(Finding(f"{words} at {lost.index[-1]:g}", lost.iloc[-1] < lost.iloc[0]))
        return found
    worse = frame["degraded"].eq(True) if "degraded" in frame else pd.Series(False, frame.index)
    lost = _points(frame.drop(columns="degraded", errors="ignore")[~worse], ["series", "matching", "lr"])
    control = _points(frame.drop(columns="degraded")[worse], ["series", "matching"]) if worse.any() else {}
    for (series, matching), values in lost.groupby(level=["series", "matching"], sort=False):
        values = values.droplevel(["series", "matching"]).sort_index()
        words = f"{series}, {matching}: {values.iloc[0]:.1f} points at rate {values.index[0]:g}, "
        if len(control):
            after = control[series, matching]
            words += f"{after:.1f} at {values.index[-1]:g} and degraded"
        else:
            after = values.iloc[-1]
            words += f"{after:.1f} at {values.index[-1]:g}"
        found.append(Finding(words, after < values.iloc[0] - NOISE))
    return found


def init_sensitivity(frame: pd.DataFrame, item: str) -> list[Finding]:
    frame = frame[frame["alpha"].notna()]
    lost = _points(frame.drop(columns=["epoch", "distance"], errors="ignore"), ["series", "matching", "lr", "init"])
    found = []
    for (series, matching), values in lost.groupby(level=["series", "matching"], sort=False):
        values = values.droplevel(["series", "matching"]).unstack("init").sort_index()
        more = values["Kaiming normal"] - values["Kaiming uniform"]
        small, large = more.iloc[0], more.iloc[-1]
        words = f"{series}, {matching}: from normal weights {small:+.1f} points at rate {more.index[0]:g}, {large:+.1f}"
        found.append(Finding(f"{words} at {more.index[-1]:g}", small > NOISE and large < small / 2))
    return found


def large_decay_helps(frame: pd.DataFrame, item: str) -> list[Finding]:
    if "degraded" in frame:
        middle = frame[frame["alpha"] == 0.5]
        found = []
        for series, rows in middle.groupby("series", sort=False):
            worse = rows["degraded"].eq(True)
            control = 100 * rows[worse]["accuracy"].mean()
            best = _percent(rows[~worse], ["wd"]).drop(rows["wd"].min()).max()
            words = f"{series}: halfway {best:.1f} % with more weight decay, control {control:.1f} %"
            found.append(Finding(words, best > control))
        return found
    lost = _points(frame, ["series", "wd"])
    found = []
    for series, values in lost.groupby(level="series", sort=False):
        values = values.droplevel("series").sort_index()
        words = f"{series}: {' → '.join(f'{v:.1f}' for v in values)} points"
        found.append(Finding(f"{words} with {', '.join(f'{d:g}' for d in values.index)}",
                             values.iloc[1:].min() < values.iloc[0] - NOISE))  # fmt: skip
    return found


def rescale_robust(frame: pd.DataFrame, item: str) -> list[Finding]:
    mean = _percent(frame[frame["alpha"] == 0.5], ["matching", "renorm", "wd"]).unstack("wd")
    span = mean.max(axis=1) - mean.min(axis=1)
    return [
        Finding(f"{matching}: over weight decays REPAIR moves by {span[matching, 'REPAIR']:.1f} points, RESCALE by "
                f"{span[matching, 'RESCALE']:.1f}", span[matching, "RESCALE"] < span[matching, "REPAIR"])
        for matching in mean.index.unique(0)
    ]  # fmt: skip


def pruning_renorm(frame: pd.DataFrame, item: str) -> list[Finding]:
    means = pruned_means(frame)
    gain = (means["renormalised"] - means["none"]).rename("gain")
    found = []
    for series, rows in gain.groupby(level="series", sort=False):
        high = rows[rows.index.get_level_values("sparsity") >= HIGH].groupby(level="pruner", sort=False).max()
        high = high if len(high) else rows.groupby(level="pruner", sort=False).max()
        words = ", ".join(f"{pruner} {value:+.1f}" for pruner, value in high.items())
        found.append(Finding(f"{series}, the most that is gained: {words} points", high.min() > 0))
        after = means["renormalised"][series].unstack("pruner")
        if {"global magnitude", "WoodFisher"} <= {*after}:
            behind = (after["WoodFisher"] - after["global magnitude"]).max()
            words = f"{series}: renormalised, magnitude is at most {max(behind, 0):.1f} points behind WoodFisher"
            found.append(Finding(words, behind < SAME))
    return found


def one_batch_suffices(frame: pd.DataFrame, item: str) -> list[Finding]:
    mean = 100 * frame[frame["sparsity"] > 0].groupby(["pruner", "samples"], sort=False)["accuracy"].mean()
    few = next(name for name in frame["samples"].unique() if name.endswith("images"))
    return [
        Finding(f"{pruner}: {rows[pruner, few]:.1f} % with {few}, {rows[pruner, 'all images']:.1f} % with all",
                abs(rows[pruner, few] - rows[pruner, "all images"]) < FEW)
        for pruner, rows in mean.groupby(level="pruner", sort=False)
    ]  # fmt: skip


ABLATIONS = tuple(f"rethink/table{number}" for number in (1, 4, 5, 6, 7))
CLAIMS = [
    Claim(
        "rethink/plain-has-a-barrier",
        f"matched by weights, averages of plain networks lose more than {BARRIER:g} points at every width; less, the "
        "wider they are",
        "a plot",
        ("rethink/fig2b", "rethink/fig7"),
        plain_has_a_barrier,
        "the thinnest networks of `quick` are worse by themselves and have less to lose; the paper's are four times as "
        "wide or more",
    ),
    Claim(
        "rethink/same-basin-differs",
        f"averages within one basin need no RESET (retrained: at most {SAME:g} points are lost; spawned: less than "
        "half of what independent networks lose); those of aligned independent networks do",
        "spawned 15 points, independent over 75",
        ("rethink/fig2c", "rethink/fig9-12"),
        same_basin_differs,
    ),
    Claim(
        "rethink/shuffle-recovered",
        "both matchings find every unit of a shuffled network again, against its copy of the same basin",
        "exactly",
        ("rethink/fig2d", "rethink/fig9-12"),
        shuffle_recovered,
        "by activations, a few units that the further training has changed much are taken for one another",
    ),
    Claim(
        "rethink/many-models-fail",
        "the more networks are averaged, the more accuracy is lost, however they are matched; not so within one basin",
        "plots",
        ("rethink/fig3ab", "rethink/fig14-15"),
        many_models_fail,
    ),
    Claim(
        "rethink/mlp-many-models-ok",
        f"eight MLPs can be averaged by reference and sequential matching, within {SAME:g} points",
        "a plot",
        ("rethink/fig16",),
        mlp_many_models_ok,
    ),
    Claim(
        "rethink/bias-removal",
        "without biases the accuracy barrier is less than half; the loss barrier stays above half",
        "WM 79 to 9 points, AM 46 to 9",
        ("rethink/fig3cd", "rethink/fig17-24"),
        bias_removal,
        "the paper's VGG16 is four times as wide as the VGG11 of `quick`, and trains for eight times as many epochs",
    ),
    Claim(
        "rethink/rescale-is-the-key",
        f"RESCALE is as good as REPAIR or better, within {NEAR:g} points, between VGGs with one scale a layer, too; "
        "RESHIFT is at chance",
        "WM 75.1, 84.3, 78.2, 10 %",
        ABLATIONS,
        rescale_is_the_key,
        "in thin networks that are matched by weights the means are wrong, too, and RESCALE leaves them; a Fixup "
        "ResNet8 has three blocks only, and keeps some accuracy with RESHIFT",
    ),
    Claim(
        "rethink/independent-stats",
        "RESCALE towards the statistics of an unrelated network still helps",
        "WM 10.5 to 68.9 %",
        ("rethink/table8",),
        independent_stats,
    ),
    Claim(
        "rethink/sequential-better",
        f"sequential REPAIR is better than simultaneous by more than {NOISE:g} points; RESCALE is the same within them",
        "65.8 and 75.4; 83.6 and 83.6 %",
        ("rethink/table9",),
        sequential_better,
        "in our simultaneous pass a layer normalises by the statistics of batches of 250 images, so that deeper layers "
        "see corrected inputs already",
    ),
    Claim(
        "rethink/data-independent",
        f"renormalisation without data is within {NEAR:g} points of that with data, and better than none",
        "88.7 and 86.6 %",
        ("rethink/table10", "rethink/table11"),
        data_independent,
    ),
    Claim(
        "rethink/matching-retains",
        "aligned midpoints are good again after less than half of the steps, have larger weights, fewer zeros in early "
        "layers and more Fisher information; those of networks that are not aligned cannot be renormalised",
        "60 mini-batches",
        ("rethink/fig4c", "rethink/fig36-41", "rethink/fig42", "rethink/fig43", "rethink/no-matching"),
        matching_retains,
        "with BatchNorm or shortcuts, midpoints that are not aligned recover quickly, too",
    ),
    Claim(
        "rethink/precision",
        f"this library's one pass is as good as a pass for every layer, within {NOISE:g} points; sums in float32 cost "
        f"more than {LITTLE:g} points",
        "VGG16 37.5, 37.5, 54.9 points",
        ("rethink/table2",),
        precision,
        "sums in float32 differ from those in float64 by rounding and move hardly any unit; the faulty mean of the "
        "released code moves many",
    ),
    Claim(
        "rethink/large-lr-helps",
        f"the barrier at the largest learning rate is more than {NOISE:g} points below that at the smallest, even "
        "between networks that were made worse; pruned, networks of the largest rate lose less",
        "VGG16 with LayerNorm 40 points lower",
        ("rethink/fig5a", "rethink/fig45-46", "rethink/fig47-58", "rethink/fig44"),
        large_rates_help,
        "at its smallest rate, a ResNet with LayerNorm is far from trained within `quick`, and has less to lose",
    ),
    Claim(
        "rethink/init-sensitivity",
        "at a small learning rate, networks from larger (normal) initial weights have the higher barrier; at a large "
        "rate less than half of that is left",
        "over 40 points",
        ("rethink/fig5b", "rethink/fig60-62"),
        init_sensitivity,
        "in the few epochs of `quick`, networks stay near their initial weights at both rates: their distance grows by "
        "a few percent from normal weights",
    ),
    Claim(
        "rethink/large-wd-helps",
        f"with some larger weight decay the barrier is more than {NOISE:g} points lower, and the midpoint better than "
        "that of the control",
        "plots",
        ("rethink/fig6a", "rethink/fig63-68"),
        large_decay_helps,
        "midpoints of a ResNet with LayerNorm are far from good with any of these weight decays",
    ),
    Claim(
        "rethink/rescale-robust",
        "over weight decays, the accuracy of midpoints moves less with RESCALE than with REPAIR",
        "plots",
        ("rethink/fig6c", "rethink/fig71"),
        rescale_robust,
        "matched by activations, neither depends on weight decay by more than a few points",
    ),
    Claim(
        "rethink/pruning-renorm",
        f"from {HIGH:.0%} of sparsity on, renormalising gains with every pruner; with it, magnitude is within {SAME:g} "
        "points of WoodFisher",
        "ResNet50 50 points at 80 %",
        ("rethink/fig2a", "rethink/fig6d", "rethink/fig72", "rethink/fig73"),
        pruning_renorm,
        "WoodFisher moves the weights that are left, too, which small networks without many weights to spare need at "
        "high sparsity",
    ),
    Claim(
        "rethink/one-batch-suffices",
        f"64 images are within {FEW:g} point of all, mean over sparsities",
        "a plot",
        ("rethink/fig74",),
        one_batch_suffices,
    ),
]
