# %% [markdown]
# # REPAIR, Section 5.4: merging networks that were trained on different data
#
# Can two networks that saw different data be merged into one that is better than both? (Jordan et al. 2022, Sec. 5.4,
# Figs. 7 and 13.)
#
# The training set is split into two disjoint halves. One has 80 % of the images of the first half of the classes and
# 20 % of those of the second. The other half has the rest. One network $\theta_1$ is trained on the first half, another
# one, $\theta_2$, on the second. They are aligned, and every interpolation
#
# $$\theta_\alpha = (1-\alpha)\,\theta_1 + \alpha\,\theta_2$$
#
# is REPAIRed and tested on the whole test set, which has all classes in equal parts. The paper finds some that have a
# lower test loss than both endpoints. Matching and REPAIR use training images of both halves.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig7"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.repair import split_data, split_pairs
from companion.figures.section import Section

section = Section(split_data, scale, items)
section.overview()

# %% [markdown]
# The paper says of its networks that they are "standard ResNets", and its data are CIFAR-100. Here they are ResNet18s
# at `fast` and `paper`; the data of `fast` are CIFAR-10. At `quick` there are two kinds: wide MLPs of few layers,
# between which there is next to no barrier, and narrow ResNet20s, between which a barrier is left after REPAIR.

# %%
import pandas as pd

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.rows import baseline_rows, equal_steps, path_rows
from companion.experiments.tables import name_networks
from companion.figures.plots import repair as plots
from companion.runs import store

grid = section.grid
pairs = [pair for pair in split_pairs(scale) if {*pair["halves"]} <= {*grid.runs(grid.needs)}]
assert pairs, "networks of both halves of the data are needed, see above"

# %% [markdown]
# ## One pair, step by step
#
# Each network alone is biased towards the classes that it saw more of. Their REPAIRed average is compared with them
# on all of the test images.

# %%
pair = load_pair(pairs[0]["halves"], data=grid.data)
matching = repairlib.match_activations(pair.a, pair.b, pair.calibration)
aligned_b = matching.apply(pair.b)
averaged = repairlib.interpolate_models(pair.a, aligned_b, 0.5)
repaired = repairlib.Repair(pair.a, aligned_b, pair.calibration)(0.5).model
pair.compare(A=pair.a, B=pair.b, averaged=averaged, repaired=repaired)

# %% [markdown]
# ## Every pair
#
# Now the whole path of every pair, and what it is measured against:
#
# * the *ensemble* of the endpoints, whose logits are $(1-\alpha)\,z_1(x) + \alpha\,z_2(x)$;
# * each endpoint *corrected* for the shift between its training set and the test set;
# * one network that was trained on all of the data.

# %%
fig7, fig13 = section.item("repair/fig7"), section.item("repair/fig13")  # their clocks start here
merged, baselines, alphas = [], [], equal_steps(grid.points)
for names in pairs:
    pair = load_pair(names["halves"], section.calibration, data=grid.data)
    columns = {"series": pair.title, "pair": names["pair"]}
    merged += [columns | row for row in path_rows(pair, alphas)]
    if fig13:
        whole = store.get(names["whole"], pair.dataset.device)
        baselines += [columns | row for row in baseline_rows(pair, whole, alphas)]

# %% [markdown]
# How an endpoint is corrected: the paper scales down "the first 50 logits of network A such that its predictions on the
# test set become balanced over the 100 classes". It does not say whether to scale is to multiply or to shift. Logits
# can be negative, so we shift. One constant is taken off the logits of the classes that the network has seen more of.
# This scales their odds. The constant is chosen so that the mean probability of these classes becomes their share of
# all classes (`companion.experiments.ensembles.balance`). The images of the test set are used for it, their labels are
# not.


# %%
def means(rows: list[dict]) -> pd.DataFrame:
    """Loss (nats) and accuracy (%) by series, network and alpha, means over pairs."""
    frame = name_networks(rows).assign(accuracy=lambda frame: 100 * frame["accuracy"])
    return frame.groupby(["series", "network", "alpha"], dropna=False, sort=False)[["loss", "accuracy"]].mean()


paths = means(merged)
first = merged[0]["series"]  # summaries are of the first kind of network
path = paths.loc[first, "aligned + REPAIR"]
paths.unstack("network").round({"loss": 3, "accuracy": 1})

# %% [markdown]
# ## Between two halves (Fig. 7)
#
# As in the paper, the best $\alpha$ is chosen on the test set, between the ends. The paper's best network has a loss of
# 1.30 at $\alpha = 0.3$. That of Ainsworth et al. (2022), with LayerNorm and without REPAIR, has 1.73. The paper draws
# the REPAIRed path only. Here the path before REPAIR is drawn too. Lines are means over pairs of seeds, bands go from
# the lowest pair to the highest.

# %%
if fig7:
    between = path.iloc[1:-1]
    summary = {"best_loss": between.loss.min(), "best_alpha": between.loss.idxmin()}
    summary["best_accuracy"] = between.accuracy.max()
    for end, name in ((0, "a"), (1, "b")):
        summary |= {f"endpoint_{name}_{metric}": path[metric][end] for metric in path}
    names = {0: "endpoint A", 1: "endpoint B"}
    ends = [row | {"network": names[row["alpha"]], "alpha": None} for row in merged
            if row["alpha"] in names and row["renorm"] == "REPAIR"]  # fmt: skip
    fig7.save(merged, plots.merging(merged + ends), summary)

# %% [markdown]
# At `quick`, merged MLPs have a lower loss than both of their endpoints, for each pair of seeds. They do not even need
# REPAIR. ResNet20s do: without it, the middle of their path is near chance. With it, most of the barrier is gone, but
# not all: these networks are narrow, and each was trained on about 700 images. What is left of the barrier is more than
# what there is to gain by merging, so that only close to the ends a merged network is about as good as its endpoints.
#
# ## Against baselines (Fig. 13)

# %%
if fig13:
    levels = means(baselines)
    ensemble = levels.loc[first, "ensemble"]
    summary = {"best_ensemble_loss": ensemble.loss.min(), "best_ensemble_accuracy": ensemble.accuracy.max()}
    for name in ("corrected A", "corrected B", "full data"):
        level = levels.loc[first, name].iloc[0]
        summary |= {f"{name.replace(' ', '_').lower()}_{metric}": level[metric] for metric in level.index}
    table = [row for row in merged if row["renorm"] == "REPAIR"] + baselines
    fig13.save(table, plots.merging(table), summary)

# %% [markdown]
# No merged network has as low a loss as the best ensemble, or as the network that was trained on all of the data. The
# paper finds the same. An ensemble needs two networks at test time, a merged network is one.
#
# ## Check
#
# At alpha 0 and 1 the REPAIRed path and the ensemble are the same two networks. B's units are in another order, and
# sums round differently.

# %%
if fig13:
    ends = ensemble.loc[[0, 1]] - path.loc[[0, 1]]
    assert (ends.loss.abs() < 1e-4).all() and (ends.accuracy.abs() < 0.5).all(), ends
section.check()
