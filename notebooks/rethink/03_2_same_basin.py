# %% [markdown]
# # Rethink Model Re-Basin, Section 3.2: comparison to the same basin
#
# Networks from different seeds are aligned, and their average needs renormalisation. Would it, if the two lay in one
# basin of the loss? (Qu and Horváth 2024, Figs. 2C, 2D, 9 to 13, and Table 3.)
#
# The paper makes pairs of networks with BatchNorm in three ways:
#
# * **independent**: from different seeds, then aligned ("re-basin");
# * **spawned**: children of one parent. They share its first epochs, and the rest of the training differs;
# * **retrained**: a network and a copy of it, which is trained on: 20 epochs at a large learning rate out of the basin,
#   5 epochs at a small one back to another place of it.
#
# It finds that averages within a basin need no RESET, and that those of aligned networks do. Both matchings undo a
# random shuffle of a network's units exactly. And aligned networks are still far from each other.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig2c,rethink/table3"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import child, copy, same_basin
from companion.figures.section import Section

section = Section(same_basin, scale, items)
section.overview()

# %%
import functools

import pandas as pd
from IPython.display import display

import repairlib
from companion.experiments.basins import distance_rows, shuffle_rows
from companion.experiments.pairs import load_pair
from companion.experiments.rows import equal_steps, path_rows
from companion.experiments.tables import barriers, restore_ends
from companion.experiments.trajectories import retraining_rows
from companion.figures.plots import rethink as plots
from companion.runs.names import parse_run, recipe_of, seeded
from repairlib.diagnostics import distance
from repairlib.permutations import permute, random_permutation

grid = section.grid
ALPHAS = equal_steps(grid.points)
SHOWN = {"accuracy": "test accuracy (%)"}

# %% [markdown]
# ## One network and its copy, step by step
#
# A copy of a network is trained on. The two are averaged: nothing is aligned, nothing renormalised.

# %%
if "rethink/fig2d" in section.items:  # the copy is there, or may be trained
    pair = load_pair([seeded(name, grid.seeds[0]) for name in (grid.VGG, copy(scale, grid.VGG))])
    halfway = repairlib.interpolate_models(pair.a, pair.b)
    print(f"distance of the copy: {distance(pair.a, pair.b):.2f}")
    display(pair.compare(network=pair.a, copy=pair.b, halfway=halfway))

# %% [markdown]
# Now the network's units are shuffled, $\theta_1 \to \pi(\theta_1)$. It computes the same, and the average with the
# copy does not. Matching with the copy looks for the shuffle, and undoes what it finds.

# %%
if "rethink/fig2d" in section.items:
    spec = pair.matching.spec
    shuffled = permute(pair.a, spec, random_permutation(spec, seed=1))
    recovered = repairlib.match_weights(pair.b, shuffled, pair.calibration, start="identity").apply(shuffled)
    print(f"distance of the recovered network from the original: {distance(pair.a, recovered):.2f}")
    halfway = {f"halfway_from_the_{name}": repairlib.interpolate_models(start, pair.b)
               for name, start in {"shuffled": shuffled, "recovered": recovered}.items()}  # fmt: skip
    display(pair.compare(shuffled=shuffled, **halfway))

# %% [markdown]
# ## Three ways to make a pair (Fig. 2C, Figs. 9 and 11)
#
# Independent networks are aligned by weights. Each path is shown as interpolated and after RESET.


# %%
def copies(run):
    """Each network with its copy, a pair for each seed."""
    return [(f"{s}-copy", load_pair([seeded(run, s), seeded(copy(scale, run), s)])) for s in grid.seeds]


@functools.cache
def three_ways(run, series):
    """Paths between networks of the three kinds, as interpolated and RESET."""
    pairs = [("independent", each) for each in section.pairs(run)]
    pairs += [("spawned", each) for each in section.pairs(child(scale, run))]
    pairs += [("retrained", each) for each in copies(run)]
    rows = [
        {"series": series, "basin": basin, "pair": name, **row}
        for basin, (name, pair) in pairs
        for row in path_rows(
            pair, ALPHAS, matchings=["WM" if basin == "independent" else "none"], renorms=["none", "RESET"]
        )
    ]
    return restore_ends(pd.DataFrame(rows))


# %%
def draw_ways(table):
    """A panel for each kind of pair; barriers by name."""
    found = barriers(table).groupby(["series", "basin", "renorm"], sort=False)["accuracy_barrier"].mean()
    names = {"none": "", "RESET": " after RESET"}
    summary = {f"{series} {basin}{names[renorm]}": 100 * v for (series, basin, renorm), v in found.items()}
    shown = {"none": "as interpolated", "RESET": "RESET"}
    panels = table.assign(panel=table["series"] + ", " + table["basin"], network=table["renorm"].map(shown))
    figure = plots.lines(panels, "alpha", SHOWN, columns="panel", xlabel=r"$\alpha$")
    return figure, summary


if fig := section.item("rethink/fig2c"):
    table = three_ways(grid.VGG, "VGG")
    figure, summary = draw_ways(table)
    ours = {"spawn_barrier": "spawned", "spawn_after_reset": "spawned after RESET", "rebasin_barrier": "independent"}
    fig.save(table, figure, {name: summary[f"VGG {kind}"] for name, kind in ours.items()} | summary)

# %% [markdown]
# ## Shuffle and recover (Fig. 2D)
#
# The network is shuffled, matched with its copy, and put back. `recovered` is the share of the units that come back to
# their places.


# %%
@functools.cache
def shuffle_and_recover(run, series):
    """Every network of a run, shuffled, against its copy."""
    return [{"series": series, "pair": name, **row} for name, pair in copies(run) for row in shuffle_rows(pair, ALPHAS)]


def draw_recovered(rows):
    """Paths from the shuffled network to the copy; shares of units by name."""
    table = pd.DataFrame(rows)
    shares = 100 * table.groupby(["series", "matching"], sort=False)["recovered"].mean()
    summary = {f"{series} recovered by {m} (%)": shares[series, m] for series, m in shares.index if m != "none"}
    figure = plots.lines(table, "alpha", SHOWN, columns="series", xlabel=r"$\alpha$ (from the shuffled to the copy)")
    return table, figure, summary


if fig := section.item("rethink/fig2d"):
    fig.save(*draw_recovered(shuffle_and_recover(grid.VGG, "VGG")))

# %% [markdown]
# The paper finds that both matchings return exactly the inverse of the shuffle. By activations, units that the further
# training has changed much may go elsewhere.
#
# ## VGG and ResNet (Figs. 9 to 12)

# %%
if fig := section.item("rethink/fig9-12"):
    both = {"VGG": grid.VGG, "ResNet": grid.ResNet}
    ways = pd.concat([three_ways(run, series) for series, run in both.items()])
    figure, summary = draw_ways(ways)
    shuffles = [row for series, run in both.items() for row in shuffle_and_recover(run, series)]
    _, _, shares = draw_recovered(shuffles)
    fig.save([*ways.to_dict("records"), *shuffles], figure, summary | shares)

# %% [markdown]
# ## Out of the basin and back (Fig. 13)
#
# The copy's way: accuracy and distance from the network that it started from, BatchNorm statistics included.

# %%
if fig := section.item("rethink/fig13"):
    rows = []
    for series, run in {"VGG": grid.VGG, "ResNet": grid.ResNet}.items():
        seed = grid.seeds[0]
        slow = parse_run(seeded(copy(scale, run), seed))
        recipes = [recipe_of(slow.parent), recipe_of(slow)]  # first fast
        pair = load_pair([seeded(run, seed)] * 2)
        rows += [{"series": series, **row} for row in retraining_rows(pair, recipes, grid.every)]
    shown = SHOWN | {"distance": "distance from\nthe original"}
    figure = plots.lines(rows, "step", shown, "series", xlabel="step of training")
    last = pd.DataFrame(rows).groupby("series", sort=False)["distance"].last()
    fig.save(rows, figure, {f"{series} distance in the end": value for series, value in last.items()})

# %% [markdown]
# In the paper accuracy falls at the large learning rate and comes back at the small one, and the distance stays.
#
# ## Distances before and after matching (Table 3)

# %%
if fig := section.item("rethink/table3"):
    table = fig.measure(distance_rows)
    mean = table.groupby(["series", "buffers", "matching"], sort=False)["distance"].mean()
    display(mean.unstack("matching", sort=False).round(1))
    fig.save(table, None, {f"{s}{'_stats' * b}_{m.lower()}": value for (s, b, m), value in mean.items()})

# %% [markdown]
# In the paper matching brings independent networks closer by a tenth or two.
#
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
