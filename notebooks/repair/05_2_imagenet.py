# %% [markdown]
# # REPAIR, Section 5.2: ResNets on ImageNet, and why block outputs are corrected too
#
# A residual block computes $y = \operatorname{relu}(F(x) + s(x))$. Correct the statistics of every convolution, and the
# sum may still be off: how its two branches go together has changed. So REPAIR corrects the outputs of blocks as well
# as those of convolutions. How much is that worth? (Jordan et al. 2022, Sec. 5.2, Figs. 5, 8 and 9.)
#
# Two corrections of aligned networks are compared:
#
# * **Convolutions only.** In these networks a BatchNorm follows every convolution. Correcting convolutions then means
#   re-estimating the BatchNorms (RESET), as Git Re-Basin did on ImageNet.
# * **Full REPAIR.** Convolutions and block outputs are corrected, and BatchNorms stay as interpolated.
#
# The two also differ in what happens to BatchNorms. "Which of the two counts" below takes that apart.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig5-left,repair/fig9"; empty: all
data: str = ""  # another image folder, for instance "photos@224", whose networks are torchvision's; empty: the scale's
recipe: str = ""  # another recipe, for instance "imported"; empty: the scale's

# %% tags=["runs"]
from functools import partial

from companion.experiments.grids.repair import imagenet
from companion.figures.section import Section

section = Section(partial(imagenet, data=data, recipe=recipe), scale, items)
section.overview()

# %% [markdown]
# `quick` has the digits of `digits-hard` and narrow ResNets with a stem for small images. Its ResNet26 has ResNet50's
# bottleneck blocks, two in each stage.
#
# `fast` has CIFAR-10 and such networks of full depth. `paper` needs ImageNet in
# `data/imagenet/{train,val}/<class>/` and days on a GPU. If you have trained networks, nothing is trained with
# `recipe = "imported"`. Store two of each model first, for instance with
# `python -m companion.runs.store import imagenet@224/torchvision-resnet50/imported/s1 FILE.safetensors`.

# %%
import pandas as pd
from IPython.display import display

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.rows import equal_steps, filter_rows
from companion.experiments.tables import barriers, name_networks, restore_ends
from companion.figures.plots import repair as plots
from companion.figures.section import stack

grid = section.grid
resnet50 = {"run": f"{grid.data}/{grid.models[1]}/{grid.recipe}"}  # a ResNet26 at `quick`

# %% [markdown]
# ## One pair, step by step
#
# B's units are put into A's order. The two networks are averaged. The average is corrected in both ways.
#
# All of it is measured in one pass over the calibration images, in which each batch is normalised by its own statistics
# (`method="simultaneous"`, the paper's procedure). The library's default, `"sequential"`, is more exact. But it holds
# the activations of all images: 16 GB at a node for 5,000 images of 224 x 224 pixels.

# %%
pair = load_pair(section.example(resnet50["run"]), section.calibration)
matching = repairlib.match_activations(pair.a, pair.b, pair.calibration)
aligned_b = matching.apply(pair.b)
averaged = repairlib.interpolate_models(pair.a, aligned_b, 0.5)
reset = repairlib.reset(averaged, pair.calibration, method="simultaneous")
repaired = repairlib.Repair(pair.a, aligned_b, pair.calibration, method="simultaneous")(0.5)
pair.compare(A=pair.a, B=pair.b, averaged=averaged, RESET=reset.model, REPAIR=repaired.model)

# %% [markdown]
# These are the places that full REPAIR corrected, in the order of execution: the stem, three convolutions in each
# block, those on shortcuts, and the output of each block (`relu`). Corrections of convolutions are folded into weights.
# Those of blocks stay visible as a layer of their own, since nothing there could take them up.

# %%
repaired

# %% [markdown]
# The final linear layer is left alone, as in the paper's text. The released ImageNet code corrects it as well:
# `Repair(..., targets=("conv", "linear", "block", "classifier"))`.
#
# ## Every pair of seeds
#
# Now the same for every two seeds, along the whole path, on all test images. The ResNet50's paths are in three figures
# and are measured once.

# %%
how = {"alphas": equal_steps(grid.points), "method": "simultaneous"}
ALL = {"none": ["none"], "AM": ["none", "RESET", "REPAIR"]}


def paths(network: dict) -> pd.DataFrame:
    """All paths of the ResNet50; the aligned ones of another network."""
    matchings = ALL if network["run"] == resnet50["run"] else {"AM": ["none", "REPAIR"]}
    return section.rows([network], matchings=matchings, **how)


# %% [markdown]
# Numbers are means over pairs: accuracy in the middle (%), that of the endpoints, and barriers (points, Eq. 1). RESET
# changes the endpoints too, a little. Its barrier is measured from the endpoints as they were trained, like the others.


# %%
def means(table: pd.DataFrame, by: str = "network") -> pd.DataFrame:
    """Midpoint and endpoints (%) and barrier (points) of each path, means over pairs."""
    names = {"midpoint_accuracy": "midpoint", "accuracy_barrier": "barrier", "end_accuracy": "endpoints"}
    measured = barriers(restore_ends(name_networks(table))).rename(columns=names)
    return 100 * measured.groupby(by, sort=False)[list(names.values())].mean()


# %% [markdown]
# ## Convolutions only, and block outputs too (Fig. 5 left)

# %%
if fig := section.item("repair/fig5-left"):
    table = paths(resnet50)
    found = means(table).loc[["aligned", "aligned + RESET", "aligned + REPAIR"]]
    names = dict(zip(("aligned", "conv_only", "full"), found.midpoint, strict=True))
    names |= dict(zip(("barrier_aligned", "barrier_conv", "barrier_full"), found.barrier, strict=True))
    others = {"AM": ["REPAIR conv", "REPAIR bn reset"]}  # at the midpoint only, see below
    others = section.rows([resnet50], matchings=others, **how | {"alphas": [0.5]})
    middle = 100 * name_networks(others).groupby("network")["accuracy"].mean()
    names |= {"endpoints": found.endpoints["aligned"], "conv_bn_kept": middle["aligned + REPAIR conv"]}
    names |= {"full_bn_reset": middle["aligned + REPAIR bn reset"]}
    fig.save(stack([table, others]), plots.path(table, title=pair.title), names)

# %% [markdown]
# Interpolation alone loses nearly all of the accuracy. Both corrections give back more than half of what is lost, and
# their lines lie close together. At `quick`, full REPAIR is two points ahead in the middle, in the paper three.
#
# ### Which of the two counts
#
# RESET gives each channel exactly the variance that its BatchNorm was trained to. REPAIR with BatchNorms kept aims at
# an interpolated standard deviation, and its BatchNorm divides by the root of an interpolated variance (`04_repair`).
# So two more networks were measured at the midpoint: REPAIR of convolutions alone with BatchNorms kept, and REPAIR of
# block outputs too with BatchNorms reset, as in the released code.

# %%
if section.item("repair/fig5-left"):
    middle = name_networks(stack([table, others])).query("alpha == 0.5")
    display((100 * middle.pivot(index="pair", columns="network", values="accuracy")).round(1))

# %% [markdown]
# At `quick`, all four corrections are within three points of each other on average. That is less than pairs of seeds
# differ. Full REPAIR is ahead of RESET: half of that because of block outputs, half because BatchNorms are kept.
#
# ## Larger and wider networks (Fig. 5 right)

# %%
if fig := section.item("repair/fig5-right"):
    table = stack(paths(network) for network in fig.networks)
    table = table[(table["matching"] == "AM") & (table["renorm"] != "RESET")]
    found = means(table, ["series", "renorm"]).unstack("renorm", sort=False)
    names = dict(zip(found.index, ["resnet18", "resnet50", "resnet50x2"], strict=False))
    columns = {"": ("midpoint", "REPAIR"), "_barrier": ("barrier", "REPAIR")}
    columns |= {"_barrier_before": ("barrier", "none"), "_endpoints": ("endpoints", "none")}
    summary = {names[s] + end: found.loc[s, column] for end, column in columns.items() for s in found.index}
    figure = plots.path(table, title=f"aligned ResNets on {grid.data}", lines=("--", "-"))
    fig.save(table, figure, summary)

# %% [markdown]
# Before REPAIR the middle of each path is near chance. After it, the network that is twice as wide keeps more of its
# accuracy there: 79 % against 62 % at `quick`, 64 % against 57 % in the paper.
#
# ## Against Git Re-Basin (Fig. 8 right)
#
# Ainsworth et al. (2022) reset the BatchNorms of interpolated ResNet50s and do no more. The paper draws the curve that
# they published, of networks matched by weights. Our RESET curve is computed: networks are matched by activations, as
# for the other curves.

# %%
if fig := section.item("repair/fig8-right"):
    table = paths(resnet50)
    found = means(table)
    summary = {f"midpoint, {network}": value for network, value in found.midpoint.items()}
    summary |= {f"barrier, {network}": found.barrier[network] for network in ("aligned + RESET", "aligned + REPAIR")}
    fig.save(table, plots.path(table, title=pair.title), summary)

# %% [markdown]
# Without a correction the middle is near chance, aligned or not. RESET recovers nearly as much as REPAIR.
#
# ## First-layer filters (Fig. 9)
#
# The filters of the first pair, row by row. In the middle, B's filters are in the order of those of A that they are
# matched with. `correlation` is that of the two units' outputs on training images.

# %%
if fig := section.item("repair/fig9"):
    table = pd.DataFrame(filter_rows(pair))
    correlation = table["correlation"]
    summary = {"correlation_matched": correlation.mean(), "correlation_as_trained": table["as_trained"].mean()}
    summary["share_above_0.9"] = (correlation > 0.9).mean()
    networks = {"model A": pair.a, "model B, matched": pair.aligned, "model B": pair.b}
    weights = {name: network.conv1.weight.detach().cpu().numpy() for name, network in networks.items()}
    note = "mean correlation with model A: {correlation_matched:.2f} matched, {correlation_as_trained:.2f} as trained"
    fig.save(table, plots.filters(weights, note=note.format(**summary), title=pair.title), summary)

# %% [markdown]
# Matched filters are much more alike than filters of the same number. Of ResNet50's 64 filters, the paper finds pairs
# that look nearly the same, and others that have no close match.
#
# ## Check
#
# Every path but RESET's begins at model A. Every filter of B is matched once.

# %%
if set(section.items) - {"repair/fig9"}:
    starts = name_networks(paths(resnet50)).query("alpha == 0 and renorm != 'RESET'").groupby("pair")["loss"]
    assert (starts.max() == starts.min()).all(), starts.agg(["min", "max"])
assert sorted(row["matched_unit"] for row in filter_rows(pair)) == list(range(len(pair.a.conv1.weight)))
section.check()
