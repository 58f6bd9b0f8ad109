# %% [markdown]
# # Mode Combinability, Section 6.3: are all pairs of units important?
#
# Alignment pairs each unit of A with one of B. What if some of these pairs are wrong? (Csiszárik et al. 2023, Fig. 14.)
#
# The paper disturbs the matching of one layer on purpose. It orders the layer's $N$ pairs by the correlation of their
# activations. The $k$ least correlated pairs are matched anew at random, and none keeps its old partner: this is a
# derangement $\pi_r$ of $k$ units. The matching of all other layers stays. Then A is interpolated with the disturbed B:
#
# $$\theta_\alpha = (1-\alpha)\,\theta_A + \alpha\,\pi_r(\pi(\theta_B)).$$
#
# By itself the disturbed B still computes what B computes. The paper finds:
#
# * Up to half of a layer's pairs can be wrong at little cost.
# * In some layers all of them can be wrong.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig14"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import robustness
from companion.figures.section import Section

section = Section(robustness, scale, items)
section.overview()

# %% [markdown]
# For each layer, $k$ is 0, 2, and then grows to $N$ in `steps` equal steps. Each $k$ is drawn anew `derangements`
# times; the paper does not print how often.

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import display

import repairlib
from companion.experiments.comparisons import derangement_rows, group_correlations
from companion.experiments.pairs import load_pair, title_of
from companion.experiments.tables import derangement_costs
from companion.figures.plots import combine as plots_combine
from repairlib.interpolate import interpolate_models
from repairlib.permutations import derange

grid = section.grid

# %% [markdown]
# ## What is done to one layer
#
# Here the layer has 12 units. The least correlated pairs get new partners (orange).

# %%
drawn = torch.Generator().manual_seed(0)
found, correlation = {"layer": torch.randperm(12, generator=drawn)}, {"layer": torch.rand(12, generator=drawn)}
disturbed = {f"$k$ = {k}": derange(found, correlation, "layer", k)["layer"].tolist() for k in (0, 4, 12)}
plots_combine.matchings(disturbed)

# %% [markdown]
# Blue pairs are those of the matching. At $k=12$ none of them is left.
#
# ## One pair, step by step
#
# Units are matched by weights, as in the paper's App. C. Correlations are measured behind each layer's non-linearity,
# on training images. Then half of the pairs of one layer are deranged.

# %%
pair = load_pair(section.example(grid.tiny), matching="WM", restarts=grid.restarts)
correlation = group_correlations(pair)
layer = pair.matching.spec.groups[2]
half_wrong = derange(pair.matching.permutation, correlation, layer.name, layer.size // 2)
deranged_b = repairlib.permute(pair.b, pair.matching.spec, half_wrong)
halfway = {
    "halfway_aligned": interpolate_models(pair.a, pair.aligned),
    f"halfway_half_of_{layer.name}_deranged": interpolate_models(pair.a, deranged_b),
    "halfway_not_aligned": interpolate_models(pair.a, pair.b),
}
pair.compare(A=pair.a, B=pair.b, deranged_B=deranged_b, **halfway)

# %% [markdown]
# The deranged B is exactly as good as B. Halfway between A and the deranged B, each of these units of A is averaged
# with another unit of B than the one it fits. At `quick` the loss rises a little, and accuracy does not fall.
#
# ## Every layer of every pair of seeds (Fig. 14)
#
# Barriers are those of the worst network among the values of $\alpha$, against the mean of A and B (Def. 3.3). Only
# `paper` has several values; elsewhere the midpoint stands alone. Coefficient 0 is model A, as everywhere here and as
# in the paper's text. Its Eq. 1 has A and B the other way round.


# %%
def summarize(table: pd.DataFrame) -> dict[str, float]:
    """Barriers of the undisturbed matching and of none, and what derangements add to the first, in points."""
    found = {"accuracy_barrier": table[table["k"] == 0]["accuracy_barrier"].mean()}
    found["accuracy_barrier_not_aligned"] = table["not_aligned_accuracy_barrier"].mean()
    for name, share in {"half": 0.5, "all": 1}.items():
        added = derangement_costs(table, share)
        found |= {f"{name}_worst": added.max(), f"{name}_mean": added.mean()}
    bear_all = int((derangement_costs(table, share=1) < 0.05).sum())
    return {name: 100 * value for name, value in found.items()} | {"layers_that_bear_all": bear_all}


# %%
if fig := section.item("combine/fig14"):
    how = {"matching": "WM", "restarts": grid.restarts}
    table = fig.measure(derangement_rows, grid.steps, grid.derangements, grid.alphas, **how)
    fig.save(table, plots_combine.robustness(table, title=title_of(grid.tiny)), summarize(table))
    costs = {f"{name} of the pairs": derangement_costs(table, share) for name, share in {"half": 0.5, "all": 1}.items()}
    display((100 * pd.DataFrame(costs)).round(2))

# %% [markdown]
# The table says how many points the barrier grows in each layer, mean over draws and pairs of seeds. In the summary,
# `half_worst` and `all_worst` are its greatest numbers, `half_mean` and `all_mean` its means. `layers_that_bear_all`
# counts the layers in which deranging all pairs costs less than 5 points.
#
# At `quick` the lines are nearly flat. To derange half of a layer's pairs costs 0.5 points at most, to derange all of
# them 1.6 points. In loss, only the last layer's line rises when all of its pairs are deranged. The dashed line is the
# barrier without any alignment: 79 points, 2 nats. One wrong layer is thus no reason for a merged network to fail. The
# horizontal axis is the share of a layer's pairs; the paper's has their number.
#
# ## Check
#
# Half of the pairs of the layer above have changed, and the deranged B is still B. When nothing is deranged, all layers
# have the same barrier. Then come the paper's claims, and whether this figure shows them.

# %%
assert int((half_wrong[layer.name] != pair.matching.permutation[layer.name]).sum()) == layer.size // 2
assert abs(pair.evaluate(deranged_b)[0] - pair.evaluate(pair.b)[0]) < 1e-4
for table in section.tables.values():
    undisturbed = table[table["k"] == 0].groupby("pair")["loss_barrier"]
    assert (undisturbed.agg(np.ptp) < 1e-5).all(), undisturbed.describe()
section.check()
