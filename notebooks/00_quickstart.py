# %% [markdown]
# # Quickstart: two networks into one
#
# Two small networks learn the same task from different seeds. Average their weights, and the average knows nothing.
# Reorder the units of one network, average again, and repair what is left: now it works nearly as well as the two
# (REPAIR, Jordan et al. 2022). All of this takes about a minute on a laptop, training included.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke (untrained, for tests), quick, fast or paper
items: str = ""  # not used here

# %% tags=["runs"]
from companion.experiments.grids.repair import quickstart
from companion.figures.section import Section

section = Section(quickstart, scale)
section.overview()

# %% [markdown]
# At `quick` the networks are VGGs with 11 layers, and the data are scikit-learn's handwritten digits.
#
# From the next cell on you need four things, and can put in your own: two trained networks `a` and `b` of one
# architecture, and two lists of batches (or data loaders that do not shuffle), `loader` with some training images and
# `test` with test images and labels.

# %%
import pandas as pd

import repairlib
from companion.experiments.pairs import load_pair
from companion.figures.plots import repair as plots
from repairlib import diagnostics

vgg = section.grid.settings["networks"]
pair = load_pair(section.example(vgg, "digits/vgg11-fused-w0.25/quick"))  # trains what is missing
a, b, loader, test = pair.a, pair.b, pair.calibration, pair.test

# %% [markdown]
# **Align.** Each unit of `b` moves to the place where `a` has the most similar unit. What `b` computes stays the same.

# %%
matching = repairlib.match_activations(a, b, loader)
aligned_b = matching.apply(b)
print(matching)

# %% [markdown]
# **Average, and repair.** REPAIR gives each channel of the average the mean and the standard deviation that lie between
# those of `a` and `aligned_b`.

# %%
networks = {
    "a": a,
    "b": b,
    "b, aligned": aligned_b,
    "average, not aligned": repairlib.interpolate_models(a, b, 0.5),
    "average, aligned": repairlib.interpolate_models(a, aligned_b, 0.5),
    "average, aligned + REPAIR": repairlib.Repair(a, aligned_b, loader)(0.5).model,
}
measured = {name: repairlib.evaluate(network, test) for name, network in networks.items()}
pd.DataFrame(measured, index=["test loss (nats)", "test accuracy"]).T.style.format("{:.3f}")

# %% [markdown]
# Both networks are right on 99 % of the test images. Their average is at chance, 10 %, aligned or not. Aligned and
# repaired, it is right on 98 %.
#
# **Why does the average fail?** Its activations collapse: their variance shrinks from layer to layer.

# %%
averages = {
    "not aligned": networks["average, not aligned"],
    "aligned": networks["average, aligned"],
    "aligned + REPAIR": networks["average, aligned + REPAIR"],
}
profile = diagnostics.variance_profile(a, aligned_b, averages, loader)
plots.variance_profile(profile, title="variance of each layer's output", xlabel="convolution")

# %% [markdown]
# The dashed line falls to 3 % of the endpoints' variance. After REPAIR the variance is that of the endpoints.
#
# **In one call:** `repairlib.merge` aligns, averages and repairs.

# %%
merged = repairlib.merge(a, b, loader)
print(f"merged: {repairlib.evaluate(merged.model, test)[1]:.1%}")

# %% [markdown]
# **Where to go on.** `explore.ipynb`, beside this notebook, has widgets: choose a pair of networks, how they are
# matched and renormalised, and where between them to look. The folder `repair/` has a notebook for each section of the
# paper, and `combine/` has those of another paper.
