# %% [markdown]
# # Rethink Model Re-Basin, Section 5: pruned networks, renormalised
#
# A trained network loses most of its weights at once, and is renormalised (Qu and Horváth 2024, Figs. 2A, 6D and 72 to
# 74).
#
# Pruning shrinks activations as interpolation does. So what repairs midpoints should repair pruned networks: BatchNorms
# are RESET, networks without BatchNorm get REPAIR towards the dense network. What the paper finds:
#
# * At high sparsity accuracy rises a lot, whatever chose the weights: by about 50 points for a ResNet50 at 80 %.
# * Renormalised, the simplest pruner (by magnitude) is as good as WoodFisher, which needs second derivatives.
# * One batch of 64 images is enough.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig2a,rethink/fig74"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import pruning as section_5
from companion.figures.section import Section

section = Section(section_5, scale, items)
section.overview()

# %%
import functools

import pandas as pd

import repairlib
from companion.experiments.pruning import Settings, load_trained, pruning_rows, sample_rows
from companion.experiments.tables import pruned_means
from companion.figures.plots import rethink as plots
from repairlib import pruning
from repairlib.evaluation import evaluate

grid = section.grid
HOW = Settings(
    grid.settings["images for Fisher information"], grid.gradients, grid.settings["images of a gradient"], grid.block
)

# %% [markdown]
# ## One network, step by step
#
# The weights of convolutions and linear layers are compared with each other, and the smallest are set to zero.

# %%
(name,) = section.example(grid.settings["ResNet-LN"], grid.settings["ResNet-BN"], networks=1)
network = load_trained(name, grid.calibration)
masks = pruning.mask_smallest(pruning.magnitude_scores(network.model), 0.8)
pruned = pruning.prune(network.model, masks)
print(f"{pruning.sparsity_of(pruned):.1%} of the weights are zero")

# %% [markdown]
# REPAIR gives every channel the mean and the standard deviation that it has in the dense network. It scales and shifts
# whole channels, and its numbers go into weights and biases. A weight that is zero stays zero, and nothing is added to
# the network.

# %%
images = next(iter(network.calibration))[0]  # one batch
repaired = repairlib.renormalize(pruned, network.model, images, targets=("conv", "linear"))
assert pruning.sparsity_of(repaired.model) >= pruning.sparsity_of(pruned) and not repaired.visible
print(repaired)

# %%
models = {"dense": network.model, "pruned": pruned, "pruned, renormalised": repaired.model}
accuracy = {what: 100 * evaluate(model, network.test)[1] for what, model in models.items()}
pd.Series(accuracy, name="test accuracy (%)").to_frame().round(1)

# %% [markdown]
# WoodFisher asks how much the loss rises without a weight $w_q$ if all other weights of its block make up for it. With
# the Fisher information $F$ in place of second derivatives, it rises by
#
# $$\rho_q = \frac{w_q^2}{2\,[F^{-1}]_{qq}}, \qquad\text{and the others change by}\qquad
#   \delta w = -\frac{w_q}{[F^{-1}]_{qq}}\,F^{-1} e_q .$$
#
# ## Every network of every seed
#
# Lines are means over seeds. Networks with BatchNorm are RESET, others get REPAIR.


# %%
@functools.cache
def measure(run):
    """A network pruned in four ways, before and after renormalisation; measured once for all figures."""
    network = load_trained(run, grid.calibration, test_images=grid.settings["test images"])
    return pruning_rows(network, grid.sparsities, how=HOW)


def draw(table, columns="panel"):
    """Accuracies over sparsities, a panel for each network and pruner; means by name, in percent."""
    names = {"none": "pruned", "renormalised": "pruned, renormalised"}
    dense = table[table["sparsity"] == 0]
    both = pd.concat([table, dense.assign(renorm="renormalised")], ignore_index=True)  # both lines begin there
    named = both.assign(line=both["renorm"].replace(names), panel=both["series"] + ", " + both["pruner"])
    shown = {"accuracy": "test accuracy (%)"}
    figure = plots.lines(named, "sparsity", shown, "line", columns, xlabel="share of weights that are zero")
    means = pruned_means(table)
    return figure, {
        f"{s}, {p}, {z:g}: {names[renorm]} (%)": value
        for (s, p, z), row in means.iterrows()
        for renorm, value in row.items()
        if z >= 0.8 or z == means.index.get_level_values("sparsity").max()
    }


# %% [markdown]
# ## A ResNet with LayerNorm (Fig. 2A)

# %%
if fig := section.item("rethink/fig2a"):
    table = fig.measure_each(measure)
    fig.save(table, *draw(table))

# %% [markdown]
# ## A ResNet of bottlenecks (Fig. 6D)
#
# The paper's is torchvision's ResNet50 on ImageNet.

# %%
if fig := section.item("rethink/fig6d"):
    table = fig.measure_each(measure)
    figure, summary = draw(table)
    means = pruned_means(table, ["pruner", "sparsity"])
    most = means.xs(0.8 if 0.8 in grid.sparsities else max(grid.sparsities), level="sparsity")
    fig.save(
        table, figure, {"gain_at_80_sparsity": (most["renormalised"] - most["none"])["global magnitude"]} | summary
    )

# %% [markdown]
# ## Five networks (Fig. 72)

# %%
if fig := section.item("rethink/fig72"):
    table = fig.measure_each(measure)
    fig.save(table, *draw(table))

# %% [markdown]
# ## A plain ResNet, and networks on other data (Fig. 73)

# %%
if fig := section.item("rethink/fig73"):
    table = fig.measure_each(measure)
    fig.save(table, *draw(table))

# %% [markdown]
# ## How many images are needed (Fig. 74)
#
# The same images measure the statistics of the pruned network and of the dense one. A RESET needs the pruned one only.

# %%
if fig := section.item("rethink/fig74"):
    pruners = ("global magnitude", "layer magnitude")
    table = fig.measure_each(sample_rows, grid.sparsities, grid.samples, pruners, grid.settings["test images"])
    figure = plots.lines(
        table, "sparsity", {"accuracy": "test accuracy (%)"}, "samples", "pruner",
        xlabel="share of weights that are zero",
    )  # fmt: skip
    mean = 100 * table[table["sparsity"] > 0].groupby(["pruner", "samples"], sort=False)["accuracy"].mean()
    fig.save(table, figure, {f"{p}, {n} (%)": value for (p, n), value in mean.items()})

# %% [markdown]
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
