# %% [markdown]
# # REPAIR, Section 5.2: ResNets on ImageNet, and why block outputs are corrected too
#
# In a residual block, $y = \operatorname{relu}(F(x) + s(x))$, every convolution may have its statistics restored and
# still their sum be off, since how the two branches go together has changed. So REPAIR is applied to outputs of blocks
# as well as of convolutions (Jordan et al. 2022, Sec. 5.2). Compared are, between aligned networks,
#
# * **convolutions only**. Where a BatchNorm follows every convolution that is to re-estimate the BatchNorms (RESET),
#   as Git Re-Basin did on ImageNet, and here it is done so (`repairlib.reset`);
# * **full REPAIR**: convolutions and block outputs, BatchNorms kept as interpolated (`repairlib.Repair`'s defaults).
#
# As printed, the two also differ in what happens to BatchNorms; "Which of the two counts" below takes that apart. The
# final linear layer is left alone, as in the paper's text. The released ImageNet code corrects it as well, which is
# `targets=("conv", "linear", "block", "classifier")`.
#
# Both are measured in one pass of the calibration images, each batch normalised by its own statistics meanwhile
# (`method="simultaneous"`, the paper's procedure), at all scales: the sequential method holds the activations of all
# images, 16 GB at a node for 5,000 images of 224 x 224 pixels.
#
# `fast` and `paper` need ImageNet in `data/imagenet/{train,val}/<class>/` and days on a GPU. With networks that you
# have, `recipe="imported"` trains nothing: store two of each first, for instance
# `python -m companion.runs.store import imagenet@224/torchvision-resnet50/imported/s1 FILE.safetensors`.
# `quick` has the digits of `digits-hard` and narrow ResNets with a stem for small images: ResNet26 has ResNet50's
# bottleneck blocks, two in each stage.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig5-left,repair/fig9"; empty: all
data: str = ""  # another image folder, for instance "photos@224", whose networks are torchvision's; empty: the scale's
recipe: str = ""  # another recipe, for instance "imported"; empty: the scale's

# %% tags=["runs"]
from companion.experiments.scales import by_scale, wanted

SEEDS = by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2), paper=(1, 2))  # every two of them are a pair
points = by_scale(scale, smoke=3, quick=5, fast=11, paper=51)  # of a path, ends included
calibration = by_scale(scale, smoke=500, quick=500, fast=5000, paper=5000)  # images; `samples` of 04_repair shows why
# ResNet50 and its double are the networks of these names at `fast` and `paper`, and what stands for them elsewhere.
# torchvision's double has wide 3x3 convolutions only; `quick`'s is twice as wide everywhere.
TORCHVISION = {
    "resnet18": "torchvision-resnet18",
    "resnet50": "torchvision-resnet50",
    "resnet50x2": "torchvision-wide_resnet50_2",
}
models = by_scale(
    scale,
    smoke={"resnet18": "resnet18-bn-w0.0625", "resnet50": "resnet26-bn-w0.0625"},
    quick={"resnet18": "resnet18-bn-w0.125", "resnet50": "resnet26-bn-w0.125", "resnet50x2": "resnet26-bn-w0.25"},
    fast=TORCHVISION,
    paper=TORCHVISION,
)
models = {name: TORCHVISION[name] for name in models} if data else models
source = data or by_scale(scale, smoke="digits", quick="digits-hard", fast="imagenet@224", paper="imagenet@224")
how = recipe or by_scale(scale, smoke="smoke", quick="quick", fast="fast", paper="jordan")

NETWORKS = {  # the paths of each item
    "repair/fig5-left": ("direct", "aligned", "reset", "repaired"),
    "repair/fig5-right": ("aligned", "repaired"),
    "repair/fig8-right": ("direct", "aligned", "reset", "repaired"),
    "repair/fig9": (),
}
needs = {item: list(models) if item == "repair/fig5-right" else ["resnet50"] for item in NETWORKS}
needs = {item: names for item, names in needs.items() if wanted(item, items)}
names = [name for name in models if any(name in used for used in needs.values())]
runs_of = {name: [f"{source}/{models[name]}/{how}/s{seed}" for seed in SEEDS] for name in names}
runs = [run for used in runs_of.values() for run in used]

# %%
import time

import pandas as pd

from companion.experiments.pairs import pairs_of, path_rows
from companion.figures import plots
from companion.figures.report import save_item
from companion.runs.models import parse
from repairlib import diagnostics
from repairlib.interpolate import barrier_of

METHOD = "simultaneous"
labels = {name: f"ResNet{parse(models[name]).depth}" + " 2x" * name.endswith("x2") for name in names}

# %% [markdown]
# ## Measure the paths
#
# Once for all figures: every two seeds are aligned by activations on training images (`calibration`), and the networks
# between them evaluated on all test images.

# %%
alphas = [i / (points - 1) for i in range(points)]
rows, seconds, pairs = [], {}, {}
for name in names:
    start = time.perf_counter()
    kinds = {kind: None for item in needs if name in needs[item] for kind in NETWORKS[item]}
    for which, pair in pairs_of(f"{source}/{models[name]}/{how}", SEEDS, calibration):
        here = {"name": name, "run": f"{source}/{models[name]}/{how}", "series": labels[name], "pair": which}
        rows += [here | row for row in path_rows(pair, alphas, networks=list(kinds), method=METHOD)]
        if name == "resnet50":
            pairs[which] = pair
    seconds[name] = time.perf_counter() - start  # recorded with every item that shows these paths

# %% [markdown]
# Means over pairs: accuracy in the middle (percent), and barriers (points, Eq. 1), which are measured from the
# endpoints as they were trained, also where RESET has changed them.

# %%
if rows:
    accuracy = 100 * pd.DataFrame(rows).pivot_table("accuracy", ["name", "pair", "alpha"], "network", sort=False)
    trained = accuracy["aligned"][accuracy.index.isin([0, 1], level="alpha")]
    if "reset" in accuracy:
        accuracy.loc[trained.index, "reset"] = trained.where(accuracy["reset"].notna())  # not all networks have it
    midpoints = accuracy.xs(0.5, level="alpha")
    barriers = accuracy.groupby(["name", "pair"], sort=False).agg(
        lambda path: barrier_of(path.index.get_level_values("alpha"), -path)
    )
    middle, barrier = (frame.groupby("name", sort=False).mean() for frame in (midpoints, barriers))
    ends = trained.groupby("name", sort=False).mean()
    print(pd.concat({"midpoint": middle, "barrier": barrier, "endpoints": ends.to_frame("")}, axis=1).T.round(1))


# %%
def table_of(item: str, *columns: str) -> list[dict]:
    """Rows of the paths that an item shows."""
    columns = [*columns, "pair", "network", "alpha", "loss", "accuracy"]
    return [{column: row[column] for column in columns} for row in rows
            if row["name"] in needs[item] and row["network"] in NETWORKS[item]]  # fmt: skip


# %% [markdown]
# ## Convolutions only, and block outputs too (Fig. 5 left)
#
# %%
if wanted("repair/fig5-left", items):
    table = table_of("repair/fig5-left")
    fig5_left = {"aligned": middle.aligned["resnet50"], "conv_only": middle.reset["resnet50"]}
    fig5_left |= {"full": middle.repaired["resnet50"], "endpoints": ends["resnet50"]}
    fig5_left |= {"barrier_aligned": barrier.aligned["resnet50"], "barrier_conv": barrier.reset["resnet50"]}
    fig5_left["barrier_full"] = barrier.repaired["resnet50"]
    table = [row | {"network": "conv"} if row["network"] == "reset" else row for row in table]
    figure = plots.path(table, title=next(iter(pairs.values())).title)

# %% [markdown]
# ### Which of the two counts
#
# RESET gives each channel exactly the variance that its BatchNorm was trained to; REPAIR of a network whose BatchNorms
# are kept aims at an interpolated standard deviation and has the BatchNorm divide by the root of an interpolated
# variance (`04_repair`). So at the midpoint also: REPAIR of convolutions alone with BatchNorms kept, and of block
# outputs with BatchNorms reset, those of the endpoints included, as the released code does it. At `quick` (seeds 1 to
# 3, 400 test images) all four are within three points of each other on average, which is less than pairs of seeds
# differ: full REPAIR is ahead of RESET, half of that because of block outputs and half because BatchNorms are kept.

# %%
if wanted("repair/fig5-left", items):
    others = {"conv_bn_kept": {"targets": "conv"}, "full_bn_reset": {"bn": "reset"}}
    table += [
        {"pair": which, "network": name, "alpha": 0.5, "loss": loss, "accuracy": accuracy}
        for which, pair in pairs.items()
        for name, options in others.items()
        for loss, accuracy in [pair.evaluate(pair.repair(method=METHOD, **options)(0.5).model)]
    ]
    frame = pd.DataFrame(table).query("alpha == 0.5")
    found = 100 * frame.pivot(index="pair", columns="network", values="accuracy")
    print(found.round(1).to_string())
    fig5_left |= {name: found[name].mean() for name in others}
    save_item(
        "repair/fig5-left", scale, table, fig5_left, figure, runs=runs_of["resnet50"], seconds=seconds["resnet50"]
    )

# %% [markdown]
# ## Larger and wider networks (Fig. 5 right)

# %%
if wanted("repair/fig5-right", items):
    table = table_of("repair/fig5-right", "run", "series")
    fig5_right = {name: middle.repaired[name] for name in models}
    fig5_right |= {f"{name}_barrier": barrier.repaired[name] for name in models}
    fig5_right |= {f"{name}_barrier_before": barrier.aligned[name] for name in models}
    fig5_right |= {f"{name}_endpoints": ends[name] for name in models}
    figure = plots.path(table, title=f"aligned ResNets on {source}", lines=("--", "-"))
    save_item("repair/fig5-right", scale, table, fig5_right, figure, runs=runs, seconds=sum(seconds.values()))

# %% [markdown]
# ## Against Git Re-Basin (Fig. 8 right)
#
# Ainsworth et al. (2022) reset the BatchNorms of interpolated ResNet50s and do no more. The paper draws their published
# curve, of weight matching; the RESET curve here is computed, after matching by activations as for the others.

# %%
if wanted("repair/fig8-right", items):
    table = table_of("repair/fig8-right")
    fig8_right = {f"midpoint_{network}": middle[network]["resnet50"] for network in NETWORKS["repair/fig8-right"]}
    fig8_right |= {f"barrier_{network}": barrier[network]["resnet50"] for network in ("reset", "repaired")}
    figure = plots.path(table, title=next(iter(pairs.values())).title)
    save_item(
        "repair/fig8-right", scale, table, fig8_right, figure, runs=runs_of["resnet50"], seconds=seconds["resnet50"]
    )

# %% [markdown]
# ## First-layer filters (Fig. 9)
#
# Of the first pair. In the middle the filters of model B are in the order of those of model A that they are matched
# with; the paper finds that some pairs look nearly the same, and for others there was no close match. `correlation` is
# that of the two units' preactivations on training images.

# %%
if wanted("repair/fig9", items):
    start = time.perf_counter()
    which, pair = next(iter(pairs.items()))
    group = next(g for g in pair.matching.spec.groups if any((x.tensor, x.axis) == ("conv1.weight", 0) for x in g.axes))
    order = pair.matching.permutation[group.name].tolist()
    before, after = (
        next(iter(diagnostics.unit_agreement(pair.a, b, pair.calibration, ["stem"]).values())).tolist()
        for b in (pair.b, pair.aligned)
    )
    table = [
        {"unit": i, "matched_unit": j, "correlation": c} for i, (j, c) in enumerate(zip(order, after, strict=True))
    ]
    fig9 = {"correlation_matched": sum(after) / len(after), "correlation_as_trained": sum(before) / len(before)}
    fig9["share_above_0.9"] = sum(c > 0.9 for c in after) / len(after)

# %%
if wanted("repair/fig9", items):
    print(pd.Series(fig9).round(3).to_string())
    networks = {"model A": pair.a, "model B, matched": pair.aligned, "model B": pair.b}
    weights = {name: network.conv1.weight.detach().cpu().numpy() for name, network in networks.items()}
    note = "mean correlation with model A: {correlation_matched:.2f} matched, {correlation_as_trained:.2f} as trained"
    figure = plots.filters(weights, note=note.format(**fig9), title=pair.title)
    save_item("repair/fig9", scale, table, fig9, figure, runs=pair.runs, seconds=time.perf_counter() - start)

# %% [markdown]
# ## Check
#
# Asserted of trained digits networks: REPAIR takes away more than 40 % of each barrier, the network twice as wide has
# less than three quarters of the other's after it, and matching makes first-layer units alike. That block outputs help
# is not asserted: see above. At `fast` and `paper` nothing is asserted before it has been run.

# %%
if rows:  # every path but RESET's begins at model A
    starts = pd.DataFrame(rows).query("alpha == 0 and network != 'reset'").groupby(["name", "pair"])["loss"]
    assert (starts.max() == starts.min()).all(), starts.agg(["min", "max"])
if wanted("repair/fig9", items):
    assert sorted(order) == list(range(len(order))), order
if scale == "quick" and not (data or recipe):
    if rows:
        assert (barrier["repaired"] < 0.6 * barrier["aligned"]).all(), barrier
    if wanted("repair/fig5-right", items):
        assert barrier.repaired["resnet50x2"] < 0.75 * barrier.repaired["resnet50"], barrier
    if wanted("repair/fig9", items):
        assert fig9["correlation_matched"] > fig9["correlation_as_trained"] + 0.3, fig9
