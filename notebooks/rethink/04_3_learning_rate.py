# %% [markdown]
# # Rethink Model Re-Basin, Section 4.3: large learning rates
#
# Networks are trained at several learning rates, then aligned and averaged (Qu and Horváth 2024, Figs. 5, 44 to 62).
#
# The paper says that SGD at a large rate puts what a network knows into few weights. Matching then has less to get
# right. What it finds:
#
# * The barrier falls as the rate grows, by about 40 points for VGG16 with LayerNorm.
# * It does so even if the networks of the large rate are made worse than the others.
# * Networks of a large rate can be pruned further.
# * At a small rate, networks stay near their initial weights. The larger these are, the further apart networks are,
#   and the worse they match. At a large rate the initial weights do not matter.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig5a,rethink/fig5c"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import learning_rate
from companion.figures.section import Section

section = Section(learning_rate, scale, items)
section.overview()

# %%
import functools

import pandas as pd

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.pruning import load_trained, pruning_rows
from companion.experiments.rows import equal_steps
from companion.experiments.tables import barriers
from companion.experiments.trajectories import distance_rows
from companion.figures.plots import rethink as plots
from companion.runs.names import seeded
from repairlib import pruning

grid = section.grid
ALPHAS = equal_steps(grid.points)
MATCHED = ["WM", "AM"]
SHOWN = {"accuracy": "test accuracy (%)"}

# %% [markdown]
# ## One pair, step by step
#
# If few weights hold what a network knows, the others can go. Half of the weights, and nine of ten, are set to zero,
# the smallest first.

# %%
names = section.example(grid.settings["VGG-LN"])
pair = load_pair(names)
scores = pruning.magnitude_scores(pair.a)
halved, tenth = (pruning.prune(pair.a, pruning.mask_smallest(scores, share)) for share in (0.5, 0.9))
assert abs(pruning.sparsity_of(halved) - 0.5) < 1e-3
pair.compare(A=pair.a, half_of_its_weights=halved, a_tenth_of_its_weights=tenth)

# %% [markdown]
# The same network and another of its kind, aligned by weights and averaged. There is no renormalisation: these have
# LayerNorm.

# %%
aligned = pair.aligned_by("WM")
pair.compare(A=pair.a, B=aligned, halfway=repairlib.interpolate_models(pair.a, aligned))

# %% [markdown]
# ## Every pair of seeds
#
# Networks with BatchNorm are RESET. The barrier is the accuracy that the worst point of a path loses.


# %%
def measure(fig):
    """Paths of an item's networks, matched by weights and by activations."""
    return section.usual_rows(fig.networks, matchings=MATCHED, alphas=ALPHAS)


def draw_barriers(table):
    """Barriers over learning rates, a panel for each network; by name, those of the smallest and the largest rate."""
    found = barriers(table)
    labels = {"accuracy_barrier": "accuracy barrier (points)"}
    figure = plots.lines(found, "share", labels, "matching", "series", xlabel="learning rate / usual one")
    mean = 100 * found.groupby(["series", "matching", "lr"], sort=False)["accuracy_barrier"].mean()
    summary = {f"{s}, {m}, rate {lr:g} (points)": value for (s, m, lr), value in mean.items()}
    return figure, summary, mean


# %% [markdown]
# ## VGG with LayerNorm (Fig. 5A)

# %%
if fig := section.item("rethink/fig5a"):
    table = measure(fig)
    figure, summary, mean = draw_barriers(table)
    by_weights = mean.loc["VGG-LN"].loc["WM"]
    fig.save(table, figure, {"vgg16_ln_barrier_drop": by_weights.iloc[0] - by_weights.iloc[-1]} | summary)

# %% [markdown]
# ## Four networks (Figs. 45 and 46)

# %%
if fig := section.item("rethink/fig45-46"):
    table = measure(fig)
    fig.save(table, *draw_barriers(table)[:2])

# %% [markdown]
# ## Paths, and the control (Figs. 47 to 58)
#
# The control are the networks of the largest rate after one more epoch at that rate. Their ends are worse now.


# %%
def name_rates(table):
    """The table with a column `line`: the learning rate in words, or that networks were made worse."""
    lines = table["share"].map("{:g} of the usual rate".format).replace("1 of the usual rate", "usual rate")
    if "degraded" in table:
        lines = lines.mask(table["degraded"], "usual rate, degraded")
    return table.assign(line=lines)


def draw_paths(table):
    """Paths, a panel for each network and matching; accuracies halfway by name, in percent."""
    table = name_rates(table).assign(panel=table["series"] + ", " + table["matching"])
    figure = plots.lines(table, "alpha", SHOWN, "line", "panel", xlabel=r"$\alpha$")
    middle = 100 * table[table["alpha"] == 0.5].groupby(["panel", "line"], sort=False)["accuracy"].mean()
    return figure, {f"{panel}, {line} (%)": value for (panel, line), value in middle.items()}


if fig := section.item("rethink/fig47-58"):
    table = measure(fig)
    fig.save(table, *draw_paths(table))

# %% [markdown]
# ## Pruning networks of several rates (Fig. 44)
#
# The smallest weights of the whole network are set to zero. Nothing is renormalised.


# %%
def prune_without_more(run):
    """A network pruned by magnitude."""
    return pruning_rows(load_trained(run, 1), grid.sparsities, ["global magnitude"], ["none"])


if fig := section.item("rethink/fig44"):
    table = fig.measure_each(prune_without_more)
    figure = plots.lines(
        name_rates(table), "sparsity", SHOWN, "line", "series", xlabel="share of weights that are zero"
    )
    most = 100 * table.groupby(["series", "lr", "sparsity"], sort=False)["accuracy"].mean()
    fig.save(table, figure, {f"{s}, rate {lr:g}, sparsity {z:g} (%)": value for (s, lr, z), value in most.items() if z})

# %% [markdown]
# ## Easier data (Figs. 5D and 59)
#
# Ainsworth et al. (2022) report that VGG16 with LayerNorm cannot be matched on MNIST. The paper says that their rate of
# 0.001 was too small.

# %%
if fig := section.item("rethink/fig5d"):
    table = measure(fig)
    fig.save(table, *draw_barriers(table)[:2])

# %%
if fig := section.item("rethink/fig59"):
    table = measure(fig)
    fig.save(table, *draw_paths(table))

# %% [markdown]
# ## Initial weights (Figs. 5B and 60 to 62)
#
# Kaiming's normal distribution has six times the variance of PyTorch's uniform one.


# %%
def name_inits(table):
    """The table with a column `line`: initialisation and learning rate in words."""
    return table.assign(line=table["init"] + ", " + name_rates(table)["line"])


def halfway(table):
    """Accuracies halfway by name, in percent."""
    named = name_inits(table[table["alpha"] == 0.5])
    mean = 100 * named.groupby(["series", "matching", "line"], sort=False)["accuracy"].mean()
    return {f"{s}, {m}, {line} (%)": value for (s, m, line), value in mean.items()}


if fig := section.item("rethink/fig5b"):
    table = measure(fig)
    named = name_inits(table)
    figure = plots.lines(named, "alpha", SHOWN, "line", "matching", xlabel=r"$\alpha$")
    fig.save(table, figure, halfway(table))

# %% [markdown]
# The distance between two networks while they are trained, from their initial weights to the end:


# %%
@functools.cache
def distances(run):
    """Distances of the first two seeds of a run while they are trained; measured once for all figures."""
    return distance_rows(tuple(seeded(run, seed) for seed in grid.seeds[:2]), grid.settings["measured after epochs"])


def measure_distances(fig):
    """Distances of an item's networks, in rows that say which."""
    return pd.DataFrame([{**network, **row} for network in fig.networks for row in distances(network["run"])])


if fig := section.item("rethink/fig5c"):
    table = measure_distances(fig)
    labels = {"distance": "distance of two networks"}
    figure = plots.lines(name_inits(table), "epoch", labels, "line", xlabel="epoch", title="VGG with LayerNorm")
    last = name_inits(table).groupby("line", sort=False)["distance"].agg(["first", "last"])
    fig.save(table, figure, {f"{line}, {what}": value for line, row in last.iterrows() for what, value in row.items()})

# %% [markdown]
# Two networks, both ways to match, and the distances:

# %%
if fig := section.item("rethink/fig60-62"):
    paths = measure(fig)
    apart = measure_distances(fig)
    figure = plots.paths_and_distances(name_inits(paths), name_inits(apart))
    fig.save(paths.to_dict("records") + apart.to_dict("records"), figure, halfway(paths))

# %% [markdown]
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
