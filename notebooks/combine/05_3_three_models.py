# %% [markdown]
# # Mode Combinability, Sections 5.3 and 5.4: three models
#
# Two networks B and C are aligned with a third one, A. Are B and C then aligned with each other? And is a combination
# of all three better than each of them? (Csiszárik et al. 2023, Figs. 11 and B.20.)
#
# The paper interpolates between B and C, each in A's order of units (Sec. 5.3):
#
# $$\Theta_\alpha = (1-\alpha)\,\pi_B(\Theta_B) + \alpha\,\pi_C(\Theta_C), \qquad \alpha \in [0, 1].$$
#
# Then it combines all three (Sec. 5.4):
#
# $$\Theta = w_A \Theta_A + w_B\,\pi_B(\Theta_B) + w_C\,\pi_C(\Theta_C), \qquad w_A + w_B + w_C = 1,\ w \ge 0.$$
#
# The paper writes this as $\Theta_A + \lambda_B(\pi_B(\Theta_B) - \Theta_A) + \lambda_C(\pi_C(\Theta_C) - \Theta_A)$.
# It is the same with $\lambda_B = w_B$ and $\lambda_C = w_C$. The paper finds:
#
# * B and C are connected: accuracy stays high on the path between them.
# * Every combination of the three works: the worst has a test accuracy above 91 %.
# * Some combinations are better than all three networks. The best one often lies on an edge of the triangle, sometimes
#   inside.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig11a,combine/fig11b"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import three_models
from companion.figures.section import Section

section = Section(three_models, scale, items)
section.overview()

# %% [markdown]
# A triple names the seeds of A, B and C, in this order. `points` is the number of networks on a path, `steps` that of
# steps along each edge of the triangle. `wide` is the network of Fig. 11b: the paper takes a wider one there.

# %%
import functools

import pandas as pd

import repairlib
from companion.experiments.pairs import load_pair, title_of
from companion.experiments.rows import equal_steps
from companion.experiments.tables import best_combinations, mean_barriers
from companion.experiments.triples import agreement_rows, load_triple, transitivity_rows, triangle_rows
from companion.figures.plots import combine as plots_combine
from companion.runs import store
from repairlib.interpolate import interpolate_models
from repairlib.permutations import agreement, chain

grid = section.grid

# %% [markdown]
# ## One triple, step by step
#
# B and C are matched to A by their weights, as in the paper's App. C. Beside the path through A stand two others: C is
# matched with B directly, and B and C stay as trained.

# %%
first, *others = section.example(grid.resnet, grid.tiny, networks=3)
pair = load_pair(others)
a, b, c = store.get(first, pair.dataset.device), pair.a, pair.b
match = functools.partial(repairlib.match_weights, data=pair.calibration, start="identity", restarts=grid.restarts)
through_a = repairlib.match_several([a, b, c], match)
directly = match(b, c)
_, b_in_order_of_a, c_in_order_of_a = through_a.models
halfway = {
    "halfway_through_A": interpolate_models(b_in_order_of_a, c_in_order_of_a),
    "halfway_directly": interpolate_models(b, directly.apply(c)),
    "halfway_not_aligned": interpolate_models(b, c),
}
pair.compare(A=a, B=b, C=c, **halfway, mean_of_all_three=through_a.mean())

# %% [markdown]
# Through A, each unit of B gets a partner in C: the one that is matched with the same unit of A. The table says, layer
# by layer, for what share of the units this is the partner that B and C find directly. Two random orders of $n$ units
# agree on one of them on average.

# %%
found = agreement(chain(*through_a.permutation[1:]), directly.permutation)
units = {group: len(order) for group, order in directly.permutation.items()}
by_chance = {group: 100 / n for group, n in units.items()}
pd.DataFrame({"units": units, "same partner (%)": pd.Series(found) * 100, "by chance (%)": by_chance}).round(1)

# %% [markdown]
# ## Every triple


# %%
@functools.cache
def triple_of(run: str, triple: str):
    """Three networks, matched by weights."""
    return load_triple(run, triple.split("-"), grid.restarts, grid.test_images)


def measure(fig, rows, *options) -> pd.DataFrame:
    """The rows of all triples of an item's network."""
    (network,) = fig.networks
    columns = {name: network[name] for name in ("run", "model")}
    return pd.DataFrame([{**columns, "triple": triple} | row for triple in grid.triples
                         for row in rows(triple_of(network["run"], triple), *options)])  # fmt: skip


def path_summary(table: pd.DataFrame, groups: pd.DataFrame) -> dict[str, float]:
    """Barriers (nats and points), means over triples, and the share of the units with the same partner (%)."""
    means = mean_barriers(table, each="triple").rename({"none": "not aligned"}) * [1, 100]
    found = {f"{path.replace(' ', '_')}_{metric}": row[metric] for path, row in means.iterrows() for metric in means}
    agree = 100 * (groups["agreement"] * groups["units"]).sum() / groups["units"].sum()
    return found | {"agreement": agree, "agreement_by_chance": 100 * len(groups) / groups["units"].sum()}


# %%
def save_path(fig) -> None:
    """Measure, draw and save the paths from B to C."""
    table, groups = measure(fig, transitivity_rows, equal_steps(grid.points)), measure(fig, agreement_rows)
    marks = {"xlabel": r"$\alpha$", "marks": {0: "model B", 1: "model C"}}
    figure = plots_combine.performance(table, "alpha", title=title_of(table["run"].iloc[0]), **marks)
    fig.save(table, figure, path_summary(table, groups))


# %% [markdown]
# ## From B to C through A (Fig. 11a)

# %%
if fig := section.item("combine/fig11a"):
    save_path(fig)

# %% [markdown]
# At `quick` the way through A connects ResNets. The worst network on it loses 5 points. When B and C are matched
# directly it loses 1 point, when they are not aligned 62. Yet the two ways agree on 16 % of the units only. That is ten
# times as many as by chance, but it makes two different matchings: an order of units that works is not unique.
#
# ## From B to C through A, Tiny-10 (Fig. B.20)

# %%
if fig := section.item("combine/figB20"):
    save_path(fig)

# %% [markdown]
# Tiny-10s show the same: 8 points lost through A, 3 directly, 79 without alignment.
#
# ## Combining three models (Fig. 11b)
#
# There is one triangle for each triple. $\Theta^*$, the star, is the network with the highest accuracy. If several
# share it, it is the one of them with the lowest loss. As in the paper it is chosen on the test set among many
# networks. This alone makes it look better than it is. The lowest loss is less prone to that.


# %%
def triangle_summary(table: pd.DataFrame) -> dict[str, float]:
    """The worst and the best combinations of aligned networks and their corners, in percent and nats."""
    table = table.assign(accuracy=100 * table["accuracy"], present=(table[["w_a", "w_b", "w_c"]] > 0).sum(axis=1))
    aligned, others = (table[table["matching"] == matching].groupby("triple") for matching in ("WM", "none"))
    corners = table[(table["matching"] == "WM") & (table["present"] == 1)].groupby("triple")
    best = best_combinations(table[table["matching"] == "WM"], "triple")
    found = {"worst_accuracy": aligned["accuracy"].min().mean(), "best_accuracy": best["accuracy"].mean()}
    found |= {"best_corner_accuracy": corners["accuracy"].max().mean()}
    found |= {"mean_corner_accuracy": corners["accuracy"].mean().mean()}
    found |= {"best_loss": aligned["loss"].min().mean(), "best_corner_loss": corners["loss"].min().mean()}
    places = {"interior": 3, "edge": 2, "corner": 1}
    found |= {f"best_in_{place}": int((best["present"] == n).sum()) for place, n in places.items()}
    found["beats_all_three"] = int((best["accuracy"] > corners["accuracy"].max()).sum())
    return found | {"worst_accuracy_not_aligned": others["accuracy"].min().mean()}


# %%
if fig := section.item("combine/fig11b"):
    table = measure(fig, triangle_rows, grid.steps)
    fig.save(table, plots_combine.triangle(table, title=title_of(grid.wide)), triangle_summary(table))

# %% [markdown]
# Above, aligned networks: at `quick` all combinations stay near the corners. The worst lie between B and C, which were
# not matched with each other. Below, networks as trained: in the middle they fall to chance.
#
# In two of three triples the best combination errs on fewer test images than all three networks. It lies on an edge,
# close to a corner. In the third triple it is as good as the best of the three. In loss no combination beats the best
# of the three.
#
# ## Check
#
# The order of units does not change the loss. So all three paths have the same ends, and these are corners of the
# triangle if it is made of the same networks. Then come the paper's claims, and whether these figures show them.

# %%
for item in {"combine/fig11a", "combine/figB20"} & set(section.tables):
    table = section.tables[item]
    ends = table[table["alpha"].isin([0, 1])].groupby(["triple", "alpha"])["loss"].agg(["min", "max"])
    assert (ends["max"] - ends["min"]).max() < 1e-4, ends
if {"combine/fig11a", "combine/fig11b"} <= set(section.tables) and grid.wide == grid.resnet:
    path, table = (section.tables[item] for item in ("combine/fig11a", "combine/fig11b"))
    for corner, alpha in {"w_b": 0, "w_c": 1}.items():
        found = table[(table[corner] == 1) & (table["matching"] == "WM")].set_index("triple")["loss"]
        assert (found - path[path["alpha"] == alpha].groupby("triple")["loss"].mean()).abs().max() < 1e-4, found
section.check()
