# %% [markdown]
# # Explore: what becomes of the path between two networks
#
# Take two trained networks. Align the second with the first, or not. Renormalise the networks between them, or not.
# What accuracy and loss does
#
# $$\theta_\alpha = (1-\alpha)\,\theta_1 + \alpha\,P(\theta_2)$$
#
# have along $\alpha$? How much does each layer still vary, relative to the endpoints? (Jordan et al. 2022, Secs. 3 and
# 4; RESCALE and RESHIFT: Qu & Horvath 2024, Sec. 4.1.) You can choose from all stored runs that differ in the seed
# only. Every notebook adds its own.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # not used here

# %% tags=["runs"]
from companion.experiments.grids.explore import explore
from companion.figures.section import Section

section = Section(explore, scale)
section.overview()

# %% [markdown]
# ## Names
#
# Tables, figures and the panel below have one name for each way to match units, and for each way to renormalise.
# `needs` is what the networks must have.

# %%
import pandas as pd

from companion.experiments.methods import MATCHINGS, RENORMS
from companion.figures.explore import Choice, Explorer, panel

how = {("matching", name): (method.label, "") for name, method in MATCHINGS.items()}
how |= {("renorm", name): (method.label, method.needs) for name, method in RENORMS.items()}
pd.DataFrame(how, ["in words", "needs"]).T

# %% [markdown]
# ## One choice
#
# This cell trains the two runs if they are not there yet. Then it makes and tests 42 networks along the path.

# %%
explorer = Explorer(calibration=500)  # images; 5,000 as in the paper give the figures' numbers, and take longer
choice = Choice(tuple(section.runs), matching="AM", renorm="REPAIR")
view = explorer.view(choice, alpha=0.5, metric="accuracy")
view.figure

# %% [markdown]
# On the left, the accuracy along the path; the vertical line is the network whose layers are on the right. As
# interpolated, layers vary less and less. REPAIR gives each about the variance that it has in the endpoints.

# %%
print(view.source)
view.table

# %% [markdown]
# ## Any choice
#
# Type words into `filter` to find a pair. Another pair, matching or renormalisation takes some seconds, on a large
# network more. The line above the picture says what is being computed. Once a path is complete, alpha moves at once.
# RESET is offered for networks with BatchNorm. It changes the ends of the path a little: their statistics are measured
# again as well.

# %%
panel(explorer, choice)

# %% [markdown]
# ## Check
#
# Interpolation ends at the endpoints, whose variances average to a ratio of 1. REPAIR leaves them alone.

# %%
rows = explorer.rows(choice)
ends = rows[rows["alpha"].isin([0, 1])].groupby("alpha")[["loss", "accuracy"]]
assert (ends.max() == ends.min()).all(axis=None), ends.agg(["min", "max"])
profiles = [explorer.profile(choice, alpha) for alpha in (0.0, 1.0)]
assert all(abs(a["ratio"] + b["ratio"] - 2) < 1e-9 for a, b in zip(*profiles, strict=True))
