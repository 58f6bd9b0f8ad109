# %% [markdown]
# # Rethink Model Re-Basin, Section 4.3: large weight decay
#
# Networks are trained with several weight decays, then aligned and averaged (Qu and Horváth 2024, Figs. 6A to 6C, 63 to
# 71).
#
# Weight decay makes weights and activations small, and all of them alike. So a unit that is matched with a wrong one
# does less harm. What the paper finds:
#
# * The barrier falls as weight decay grows, up to a threshold.
# * REPAIR depends on weight decay. Doubling it from 1e-4 is enough to make REPAIR good.
# * RESCALE depends on it far less.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig6a,rethink/fig71"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import weight_decay
from companion.figures.section import Section

section = Section(weight_decay, scale, items)
section.overview()

# %%
import pandas as pd
from IPython.display import display

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.rows import equal_steps
from companion.experiments.statistics import density_rows
from companion.experiments.tables import barriers
from companion.figures.plots import rethink as plots
from repairlib.diagnostics import weight_magnitudes

grid = section.grid
ALPHAS = equal_steps(grid.points)
SHOWN = {"accuracy": "test accuracy (%)"}

# %% [markdown]
# ## One pair, step by step
#
# The midpoint of two plain networks, renormalised by REPAIR and by RESCALE, and the mean size of a network's weights.

# %%
names = section.example(grid.VGG, grid.settings["ResNet-BN"])
pair = load_pair(names, matching="WM")
ends = pair.a, pair.aligned
pair.compare(
    A=pair.a, halfway=repairlib.interpolate_models(*ends),
    with_REPAIR=repairlib.repair(*ends, pair.calibration).model,
    with_RESCALE=repairlib.repair(*ends, pair.calibration, correct="rescale").model,
)  # fmt: skip

# %%
display(pd.Series(weight_magnitudes(pair.a), name="mean size of the weights").to_frame().round(4))

# %% [markdown]
# ## Every pair of seeds
#
# Units are matched by weights. Networks with BatchNorm are RESET, plain ones get REPAIR, as usual.


# %%
def measure(fig):
    """Paths of an item's networks, matched by weights."""
    return section.usual_rows(fig.networks, matchings=["WM"], alphas=ALPHAS)


# %% [markdown]
# ## Barriers over weight decays (Fig. 6A)

# %%
if fig := section.item("rethink/fig6a"):
    table = measure(fig)
    found = barriers(table)
    labels = {"accuracy_barrier": "accuracy barrier (points)"}
    figure = plots.lines(found, "wd", labels, "series", xlabel="weight decay", log_x=10)
    mean = 100 * found.groupby(["series", "wd"], sort=False)["accuracy_barrier"].mean()
    fig.save(table, figure, {f"{s}, {decay:g} (points)": value for (s, decay), value in mean.items()})

# %% [markdown]
# ## Paths, and the control (Figs. 63 to 68)
#
# The control are the networks of the smallest weight decay after one more epoch with the largest.

# %%
if fig := section.item("rethink/fig63-68"):
    table = measure(fig)
    lines = table["wd"].map("weight decay {:g}".format)
    named = table.assign(line=lines.mask(table["degraded"], f"{lines.iloc[0]}, degraded"))
    figure = plots.lines(named, "alpha", SHOWN, "line", "series", xlabel=r"$\alpha$")
    middle = 100 * named[named["alpha"] == 0.5].groupby(["series", "line"], sort=False)["accuracy"].mean()
    fig.save(table, figure, {f"{s}, {line} (%)": value for (s, line), value in middle.items()})

# %% [markdown]
# ## What weight decay does to weights and activations (Figs. 6B, 69 and 70)
#
# How often a size occurs: that of the weights, and that of the outputs of convolutions, averaged in each channel.


# %%
def draw_densities(fig):
    """Densities of an item's networks, a panel for weights and one for activations; medians by name."""
    table = fig.measure_each(density_rows)
    named = table.assign(line=table["wd"].map("weight decay {:g}".format), panel=table["series"] + ", " + table["what"])
    figure = plots.lines(named, "size", {"density": "density"}, "line", "panel", xlabel="size (log10)")
    median = table.groupby(["series", "what", "wd"], sort=False)["median"].mean()
    return table, figure, {f"{s}, {what}, {decay:g}: median": value for (s, what, decay), value in median.items()}


if fig := section.item("rethink/fig6b"):
    fig.save(*draw_densities(fig))

# %%
if fig := section.item("rethink/fig69-70"):
    fig.save(*draw_densities(fig))

# %% [markdown]
# ## REPAIR against RESCALE (Figs. 6C and 71)


# %%
def renormalise(fig):
    """Midpoints with REPAIR and with RESCALE."""
    return fig.rows(matchings=["WM", "AM"], renorms=["REPAIR", "RESCALE"], alphas=[0, 0.5, 1])


if fig := section.item("rethink/fig6c"):
    table = renormalise(fig)
    middle = table[table["alpha"] == 0.5]
    figure = plots.lines(middle, "wd", SHOWN, "renorm", "matching", xlabel="weight decay", log_x=10)
    mean = 100 * middle.groupby(["matching", "renorm", "wd"], sort=False)["accuracy"].mean()
    fig.save(table, figure, {f"{m}, {r}, {decay:g} (%)": value for (m, r, decay), value in mean.items()})

# %%
if fig := section.item("rethink/fig71"):
    table = renormalise(fig)
    found = barriers(table)
    labels = {"accuracy_barrier": "accuracy barrier (points)", "loss_barrier": "loss barrier (nats)"}
    figure = plots.lines(found, "wd", labels, "renorm", "matching", xlabel="weight decay", log_x=10)
    mean = 100 * found.groupby(["matching", "renorm", "wd"], sort=False)["accuracy_barrier"].mean()
    fig.save(table, figure, {f"{m}, {r}, {decay:g} (points)": value for (m, r, decay), value in mean.items()})

# %% [markdown]
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
