# %% [markdown]
# # Rethink Model Re-Basin, Appendix F.2: renormalisation without data
#
# RESET and REPAIR measure statistics on training images. Can they do without? (Qu and Horváth 2024, Tables 10 and 11.)
#
# The paper replaces both uses of data:
#
# * The goals are statistics that are recorded while the endpoints are trained. BatchNorm has them anyway.
# * The average is evaluated in training mode: each batch of test images is normalised by its own statistics.
#
# It finds accuracies within 3 points of those with data.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/table10"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import data_independent
from companion.figures.section import Section

section = Section(data_independent, scale, items)
section.overview()

# %%
import torch
from IPython.display import display

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.statistics import data_independent_rows
from companion.runs.data import iterate

grid = section.grid

# %% [markdown]
# ## RESET, step by step
#
# `reset` measures every BatchNorm's mean and variance anew. `batch_statistics` lets every BatchNorm use those of the
# batch that it sees, so that nothing is measured beforehand.

# %%
if "rethink/table10" in section.items:  # its networks are there
    pair = load_pair(section.example(grid.BatchNorm))
    middle = repairlib.interpolate_models(pair.a, pair.aligned)
    without_data = repairlib.batch_statistics(middle)
    with_data = repairlib.reset(middle, pair.calibration).model
    display(pair.compare(A=pair.a, halfway=middle, RESET=with_data, without_data=without_data))

# %% [markdown]
# In training mode PyTorch's own BatchNorm does the same.

# %%
if "rethink/table10" in section.items:
    images, _ = next(iter(iterate(pair.dataset, "test", batch_size=256)))
    in_training_mode = repairlib.interpolate_models(middle, middle).train()
    with torch.no_grad():
        torch.testing.assert_close(without_data(images), in_training_mode(images), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## Every pair of seeds
#
# Test images are evaluated in batches of 256, as in the paper's code. The networks here are stored without recorded
# statistics. So their training batches, augmented as in training, go through them once more, and `Recorder` keeps the
# running statistics. The last steps of training would have left the same.


# %%
def compare(fig, name):
    """With and without data; means over pairs by the paper's names."""
    table = fig.measure(data_independent_rows)
    mean = 100 * table.groupby(["renorm", "data", "matching"], sort=False)["accuracy"].mean()
    names = {"used": "original", "not used": "data_independent"}
    summary = {name(names[data], m.lower(), r.lower()): v for (r, data, m), v in mean.items() if r != "none"}
    as_it_is = {f"midpoint_as_it_is_{m.lower()}": v for (r, _, m), v in mean.items() if r == "none"}
    fig.save(table, None, summary | as_it_is)


# %% [markdown]
# ## BatchNorm (Table 10): matched by weights, by activations

# %%
if fig := section.item("rethink/table10"):
    compare(fig, lambda data, matching, renorm: f"{data}_{matching}")

# %% [markdown]
# ## LayerNorm (Table 11): REPAIR and RESCALE by weights, then by activations

# %%
if fig := section.item("rethink/table11"):
    compare(fig, lambda data, matching, renorm: f"{data}_{matching}_{renorm}")

# %% [markdown]
# ## Check
#
# What the paper claims of these tables, and what ours show. A claim that does not hold here says so.

# %%
section.check()
