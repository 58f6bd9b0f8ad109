# %% [markdown]
# # REPAIR, Section 5.3: network width and depth
#
# Average two aligned networks and accuracy falls. How much of that does REPAIR give back? Does it depend on how wide
# and how deep the networks are? (Jordan et al. 2022, Figs. 6 and 12.)
#
# The paper trains MLPs, ResNets and VGGs on MNIST, FashionMNIST, SVHN and CIFAR-10. It finds:
#
# * REPAIR lowers the barrier everywhere. The wider the networks, the lower the barrier after REPAIR.
# * Before REPAIR the barrier rises with depth. After REPAIR it is small and nearly flat.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig6-left,repair/fig6-right"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.repair import width_depth
from companion.figures.section import Section

section = Section(width_depth, scale, items)
section.overview()

# %% [markdown]
# At `quick`, the data are scikit-learn's digits, and the same digits made harder: moved, turned, beside a neighbour,
# greyer, noisy. MLPs and VGGs are trained with BatchNorm, which is then folded into the weights. The networks that are
# averaged are plain.

# %%
import matplotlib.pyplot as plt

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.tables import barrier_means, name_means
from companion.figures.plots import repair as plots

grid = section.grid
PANELS = {  # how each panel of Figs. 6 and 12 is measured and drawn
    "left": ({}, {"x": "width", "xlabel": "units per layer", "title": "MLPs"}),
    "middle": ({}, {"x": "width", "xlabel": "width multiplier", "title": "ResNets"}),
    "right": ({"splits": ("test", "train")}, {"x": "depth", "xlabel": "depth (VGG11 to VGG19)", "title": "VGGs"}),
}

# %% [markdown]
# ## One pair, step by step
#
# B's units are put into A's order. The two networks are averaged. The average is repaired.

# %%
pair = load_pair(section.example(grid.MLP.format(grid.data[0], grid.units[0])))
matching = repairlib.match_activations(pair.a, pair.b, pair.calibration)
aligned_b = matching.apply(pair.b)
averaged = repairlib.interpolate_models(pair.a, aligned_b, 0.5)
repaired = repairlib.Repair(pair.a, aligned_b, pair.calibration)(0.5).model
pair.compare(A=pair.a, B=pair.b, averaged=averaged, repaired=repaired)

# %% [markdown]
# ## Every pair of seeds
#
# Now the same for every network and every two seeds. As in the paper, the barrier is that of the midpoint,
#
# $$B = \tfrac12\big(\operatorname{acc}(\theta_1) + \operatorname{acc}(\theta_2)\big)
#   - \operatorname{acc}\big(\tfrac12\theta_1 + \tfrac12\theta_2\big),$$
#
# on test images, for VGGs on training images too. BatchNorms of ResNets are kept as interpolated. The authors' released
# code re-estimates them: `fig.rows(bn="reset")`. Lines are means over pairs of seeds, dots are pairs.


# %%
def panel(name: str, metric: str, ax=None):
    """Measure and draw one panel of Fig. 6 or Fig. 12: its table, its picture, its means over pairs."""
    how, axis = PANELS[name]
    table = section.rows(grid.networks([f"repair/fig6-{name}"]), **how)
    lines = table.assign(series=table["split"]) if name == "right" else table  # a line for each split
    figure = plots.barriers(lines, metric=metric, lines=("--", "-"), ax=ax, **axis)
    return table, figure, barrier_means(lines, ("series", axis["x"]), metric)


# %% [markdown]
# ## MLPs of growing width (Fig. 6 left)

# %%
if fig := section.item("repair/fig6-left"):
    table, figure, means = panel("left", "accuracy")
    fig.save(table, figure, name_means(means, form="{0}_mlp_w{1:g}_{when}"))

# %% [markdown]
# After REPAIR (filled markers) the barrier falls with width on every data set. Before REPAIR (open markers) it does not
# fall as far. The paper finds the same up to 2,048 units.
#
# ## ResNets of growing width (Fig. 6 middle)

# %%
if fig := section.item("repair/fig6-middle"):
    table, figure, means = panel("middle", "accuracy")
    fig.save(table, figure, name_means(means, form="{0}_resnet_w{1:g}_{when}"))

# %% [markdown]
# Before REPAIR the midpoint of narrow ResNets is near chance. What REPAIR leaves of the barrier shrinks with width.
#
# ## VGGs of growing depth (Fig. 6 right)

# %%
if fig := section.item("repair/fig6-right"):
    table, figure, means = panel("right", "accuracy")
    fig.save(table, figure, name_means(means, form="{0}_vgg{1:g}_{when}"))

# %% [markdown]
# The paper's line after REPAIR is nearly flat. At `quick` it is not: VGGs have 8 to 64 channels. Before REPAIR their
# midpoint is at chance with 11 layers already, and after REPAIR the barrier rises with depth.
#
# ## In test loss (Fig. 12)

# %%
if fig := section.item("repair/fig12"):
    with plots.style():
        names = [name for name in PANELS if grid.networks([f"repair/fig6-{name}"])]
        figure = plt.figure(figsize=(plots.COLUMN_WIDTH, 2.3 * len(names)))
        places = zip(names, figure.subfigures(len(names), squeeze=False)[:, 0], strict=True)
        made = {name: panel(name, "loss", place.subplots()) for name, place in places}
    table = [{"panel": name, **row} for name, (rows, _, _) in made.items() for row in rows.to_dict("records")]
    forms = {"left": "{0}_mlp_w{1:g}_{when}", "middle": "{0}_resnet_w{1:g}_{when}", "right": "{0}_vgg{1:g}_{when}"}
    means = [name_means(means, form=forms[name]) for name, (_, _, means) in made.items()]
    fig.save(table, figure, {name: value for named in means for name, value in named.items()})

# %% [markdown]
# In loss, REPAIR takes away most of the barrier between wide networks. Between the narrowest MLPs on `digits-hard` it
# takes away next to nothing: their accuracy rises, and their loss stays.
#
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
