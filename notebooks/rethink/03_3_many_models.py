# %% [markdown]
# # Rethink Model Re-Basin, Section 3.3: instability in multiple network merging
#
# If aligned networks lay in one basin, then the average of many would be as good as that of two, or better. Is it? (Qu
# and Horváth 2024, Figs. 3A, 3B and 14 to 16.)
#
# The paper brings n networks into one order of units in three ways (Algorithms 1 to 3):
#
# * **reference**: each is matched with the first;
# * **sequential**: each is matched with the one before it, as permuted;
# * **iterative**: in random order, each is matched with the mean of all others, again and again.
#
# It finds that accuracy falls quickly with n, whatever the way. The average of copies from one basin does not fall. And
# eight MLPs on MNIST can be averaged in the first two ways.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig3ab,rethink/fig16"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import many_models
from companion.figures.section import Section

section = Section(many_models, scale, items)
section.overview()

# %%
import functools

import pandas as pd

import repairlib
from companion.experiments.basins import average_rows
from companion.experiments.pairs import load_pair
from companion.figures.plots import rethink as plots
from companion.runs import store
from companion.runs.names import parse_run, seeded

grid = section.grid
SHOWN = {"accuracy": "test accuracy of\nthe average (%)"}
NAMES = {"bn": "BatchNorm", "ln": "LayerNorm"}

# %% [markdown]
# ## Three networks, step by step
#
# Each is matched with the first. The average has the mean of every weight, $\bar\theta = \frac1n \sum_i
# \pi_i(\theta_i)$.

# %%
runs = section.example(grid.MLP, networks=3)
pair = load_pair(runs[:2])
models = [store.get(run, pair.dataset.device) for run in runs]
match = functools.partial(repairlib.match_activations, data=pair.calibration)
aligned = repairlib.match_several(models, match, "reference")
as_trained = repairlib.interpolate_models(repairlib.interpolate_models(*models[:2], 0.5), models[2], 1 / 3)
pair.compare(first=models[0], average_of_three_aligned=aligned.mean(), average_of_three_as_trained=as_trained)

# %% [markdown]
# ## More and more networks
#
# Averages of networks with BatchNorm are reset, as in the paper. The iterative way stops when a round moves no unit, or
# after the number of rounds in the table above. Everything is repeated with other networks in front (`orders`): lines
# are means, bands go from the lowest to the highest.


# %%
@functools.cache
def averages(run, seeds, basin, numbers):
    """Averages of the first n networks of a run in every way; then of n others, beginning with the second, ..."""
    regimes = ("reference", "sequential", "iterative") if basin == "independent" else ("same basin",)
    runs = [seeded(run, seed) for seed in seeds]
    return [
        {"first": runs[start], **row}
        for start in range(grid.orders)
        for row in average_rows(
            [*runs[start:], *runs[:start]], numbers, regimes, rounds=grid.rounds, calibration=section.calibration
        )
    ]


def measure(fig, numbers):
    """The table of an item: averages of its networks, and the endpoints' mean accuracy as another line."""
    rows = [
        {
            "series": NAMES.get(n["series"], n["series"]),
            "architecture": parse_run(seeded(n["run"], 1)).model.title,
            **row,
        }
        for n in fig.networks
        for row in averages(n["run"], n["seeds"], n["basin"], tuple(numbers))
    ]
    return pd.DataFrame(rows)


def draw(table):
    """Accuracy against n; accuracies of the fewest and of the most networks by name."""
    way = table["regime"] + table["matching"].map({"WM": " (WM)", "AM": " (AM)", "none": ""})
    ends = table[table["regime"] == "reference"].assign(way="endpoints", accuracy=lambda rows: rows["ends"])
    lines = pd.concat([table.assign(way=way), ends])
    lines = lines.assign(panel=lines["architecture"] + ", " + lines["series"])
    figure = plots.lines(lines, "n", SHOWN, "way", "panel", xlabel="networks averaged")
    mean = lines.groupby(["panel", "way", "n"], sort=False)["accuracy"].mean()
    few, many = lines["n"].min(), lines["n"].max()
    return figure, {f"{p}, {w}, n = {n}": 100 * mean[p, w, n] for p, w, n in mean.index if n in (few, many)}


# %% [markdown]
# ## ResNets (Fig. 3A and 3B)

# %%
if fig := section.item("rethink/fig3ab"):
    table = measure(fig, grid.numbers)
    fig.save(table, *draw(table))

# %% [markdown]
# ## VGGs and ResNets (Figs. 14 and 15)

# %%
if fig := section.item("rethink/fig14-15"):
    table = measure(fig, grid.numbers)
    fig.save(table, *draw(table))

# %% [markdown]
# ## MLPs, where it works (Fig. 16)

# %%
if fig := section.item("rethink/fig16"):
    table = measure(fig, grid.settings["numbers of MLPs"])
    fig.save(table, *draw(table))

# %% [markdown]
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
