# %% [markdown]
# # REPAIR, Section 5.1: which normalisation layer
#
# Does it matter for averaging whether networks have BatchNorm, LayerNorm, or no normalisation at all? (Jordan et al.
# 2022, Figs. 4, 8 and 10.) The loss barrier is how far the loss rises along the straight path between two aligned
# networks (Eq. 1),
#
# $$\sup_\alpha\; L\big((1-\alpha)\theta_1+\alpha\theta_2\big) - \big[(1-\alpha)L(\theta_1)+\alpha L(\theta_2)\big].$$
#
# The paper finds:
#
# * Before REPAIR, networks with LayerNorm have a much lower barrier than those with BatchNorm.
# * After REPAIR, both are low, and the wider the networks, the lower.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig4-left,repair/fig8-left"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.repair import normalization
from companion.figures.section import Section

section = Section(normalization, scale, items)
section.overview()

# %% [markdown]
# The ResNets have BatchNorm (`bn`), LayerNorm over the channels at each position (`ln`), or no norm (`fixup`). At
# `paper` all are trained alike, as the paper's Table 1 has it. The released code trains those with LayerNorm at a lower
# rate and in smaller batches (`jordan-released`). So do `quick` and `fast`, and likewise those without a norm.

# %%
import pandas as pd

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.rows import equal_steps
from companion.experiments.tables import barrier_means, barriers, name_means
from companion.figures.plots import repair as plots
from repairlib import diagnostics

grid = section.grid
title = f"{grid.ResNet.split('/')[1].split('-')[0]} on {grid.ResNet.split('/')[0]}"

# %% [markdown]
# ## One pair of each norm, step by step
#
# B's units are put into A's order. The two networks are averaged. The average is repaired. REPAIR corrects the outputs
# of all convolutions and of all residual blocks, and keeps BatchNorms and LayerNorms as interpolated.


# %%
def step_by_step(run):
    """Test loss and accuracy of a pair and its averages; what is left of the variance, layer by layer."""
    pair = load_pair(section.example(run), section.calibration)
    aligned_b = repairlib.match_activations(pair.a, pair.b, pair.calibration).apply(pair.b)
    averaged = repairlib.interpolate_models(pair.a, aligned_b, 0.5)
    repaired = repairlib.Repair(pair.a, aligned_b, pair.calibration)(0.5).model
    networks = {"aligned": averaged, "aligned + REPAIR": repaired}
    ratios = diagnostics.variance_profile(pair.a, aligned_b, networks, pair.calibration)
    return pair.compare(A=pair.a, B=pair.b, **networks), pd.DataFrame(ratios).query("network == 'aligned'")


paths = grid.networks(["repair/fig4-right"]) or grid.networks(section.items)[:1]
steps = {network["series"]: step_by_step(network["run"]) for network in paths}
pd.concat({norm: accuracies for norm, (accuracies, _) in steps.items()})

# %% [markdown]
# Why is LayerNorm less hurt? It measures the variance of what it receives, so a layer whose variance has collapsed is
# scaled up again. BatchNorm in evaluation is one affine map. It lets the collapse through to the next layer. Below is
# the variance of each convolution's output before REPAIR, relative to the endpoints'.

# %%
pd.DataFrame({norm: ratios.set_index("layer")["ratio"] for norm, (_, ratios) in steps.items()})[::3].round(3).T

# %% [markdown]
# ## Three norms, every width (Fig. 4, left)
#
# Now every two seeds of every network. The barrier is the largest rise at one of the points of the path. The authors'
# released code looks at the middle only, and so do all scales but `paper`. It also re-estimates BatchNorms:
# `fig.rows(bn="reset")`. What is measured once serves all figures.

# %%
HOW = {"alphas": equal_steps(grid.settings["points of a barrier"])}

if fig := section.item("repair/fig4-left"):
    table = fig.rows(**HOW)
    loss = barrier_means(table, ("series", "width"), "loss")
    summary = name_means(loss)  # of the narrowest and of the widest
    if 16 in grid.widths:
        summary["bn_ln_loss_barrier_at_16x"] = max(loss["REPAIR"]["bn", 16], loss["REPAIR"]["ln", 16])
    fig.save(table, plots.barriers(table, "width", title=title), summary)

# %% [markdown]
# After REPAIR (filled markers) all three barriers fall with width. Before it (open markers) LayerNorm's falls too, but
# BatchNorm's rises at `quick`. After REPAIR, the paper's widest networks (16x, BatchNorm or LayerNorm) are below 0.05
# nats.
#
# ## The same in test accuracy (Fig. 10, left)

# %%
if fig := section.item("repair/fig10-left"):
    table = fig.rows(**HOW)
    summary = name_means(barrier_means(table, ("series", "width"), "accuracy"), [table["width"].max()])
    fig.save(table, plots.barriers(table, "width", metric="accuracy", title=title), summary)

# %% [markdown]
# In points of accuracy the picture is the same.
#
# ## LayerNorm's low barrier before REPAIR (Fig. 4, middle)
#
# The numbers beside the figure are accuracies at the middle of the path, which the paper prints for 8x.

# %%
if fig := section.item("repair/fig4-middle"):
    table = fig.rows(**HOW)
    midpoint = name_means(barrier_means(table, ("series", "width"), "midpoint"), grid.settings["widths with LayerNorm"])
    figure = plots.barriers(table, "width", show={"bn": ["REPAIR"]}, title=title)
    fig.save(table, figure, {f"midpoint_{name}": accuracy for name, accuracy in midpoint.items()})

# %% [markdown]
# LayerNorm has a rather low barrier before REPAIR already, in wide networks. After it, BatchNorm's is at least as low.
#
# ## Against Git Re-Basin (Fig. 8, left)
#
# Ainsworth et al. (2022) report their barriers for LayerNorm ResNet20s on CIFAR-10. The crosses are read off the
# paper's plot. At `smoke` and `quick` ours are of other networks on other data.

# %%
if fig := section.item("repair/fig8-left"):
    table = fig.rows(**HOW)
    crosses = {int(name.split("_")[-1].removesuffix("x")): barrier for name, barrier in fig.published.items()}
    label = "Git Re-Basin, CIFAR-10\n(published)"
    figure = plots.barriers(table, "width", title=title, published=crosses, published_label=label)
    loss = barrier_means(table, ("series", "width"), "loss")
    fig.save(table, figure, name_means(loss, grid.settings["widths with LayerNorm"]))

# %% [markdown]
# Both fall with width.
#
# ## Along the path (Fig. 4, right)
#
# The paper's networks are 4x wide, those of `fast` 1x. Lines are means over pairs of seeds. Bands go from the lowest
# pair to the highest.
# `both_after` is the lower of the two norms' accuracies after REPAIR; in the paper they are equal.

# %%
PATHS = {"alphas": equal_steps(grid.settings["points of a path"])}


def midpoints(table, metric):
    """Means over pairs at the middle of the path, by name."""
    mean = table[table["alpha"] == 0.5].groupby(["series", "renorm"], sort=False)[metric].mean()
    when = {"none": "midpoint", "REPAIR": "after"}
    return {f"{norm}_{when[renorm]}": float(value) for (norm, renorm), value in mean.items()}


# %%
if fig := section.item("repair/fig4-right"):
    table = fig.rows(**PATHS)
    summary = {name: 100 * accuracy for name, accuracy in midpoints(table, "accuracy").items()}
    if {"bn_after", "ln_after"} <= summary.keys():
        summary["both_after"] = min(summary["bn_after"], summary["ln_after"])
    ends = table[table["alpha"].isin([0, 1])].groupby("series")["accuracy"].mean()
    summary |= {f"{norm}_endpoints": 100 * accuracy for norm, accuracy in ends.items()}
    figure = plots.path(table, title=f"{title}, {grid.settings['width of the paths']:g}x wide")
    fig.save(table, figure, summary)

# %% [markdown]
# Before REPAIR, BatchNorm's path falls to chance, and LayerNorm's much less far. After REPAIR both are close to the
# endpoints.
#
# ## The same in test loss (Fig. 10, right)

# %%
if fig := section.item("repair/fig10-right"):
    table = fig.rows(**PATHS)
    figure = plots.path(table, metric="loss", title=f"{title}, {grid.settings['width of the paths']:g}x wide")
    fig.save(table, figure, midpoints(table, "loss"))

# %% [markdown]
# In loss, BatchNorm's path rises several times as far as LayerNorm's. REPAIR takes most of both away.
#
# ## Check
#
# The ends are points of the path, so no barrier is negative. Then what the paper claims of these figures, and what ours
# show. A claim that does not hold here says so.

# %%
for name in ("repair/fig4-left", "repair/fig10-left", "repair/fig4-middle", "repair/fig8-left"):
    if fig := section.item(name):
        assert (barriers(fig.rows(**HOW))["loss_barrier"] >= 0).all()
section.check()
