# %% [markdown]
# # REPAIR, Section 5.4: merging networks that were trained on different data
#
# The training set is split into two disjoint halves: one has 80 % of the images of the first half of the classes and
# 20 % of those of the second, the other has the rest. Two networks $\theta_1$ and $\theta_2$, one trained on each, are
# aligned, and every interpolation
#
# $$\theta_\alpha = (1-\alpha)\,\theta_1 + \alpha\,\theta_2$$
#
# is REPAIRed and tested on the whole test set, which has all classes in equal parts (Jordan et al. 2022, Sec. 5.4,
# Figs. 7 and 13). The paper finds that some of them have a lower test loss than both endpoints: the two networks have
# been merged constructively. Matching and REPAIR use training images of both halves.
#
# The paper prints no more of its networks than that they are "standard ResNets"; here they are ResNet18s at `fast` and
# `paper`. At `quick` they are narrow ResNet20s, between which a barrier is left after REPAIR, and beside them wide MLPs
# of few layers, between which there is next to none.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig7"; empty: all

# %% tags=["runs"]
from companion.experiments.scales import by_scale, wanted

# Seeds of the pairs: A is trained on the first half and B on the other. The network trained on all data has A's seed.
SEEDS = by_scale(scale, smoke=[(1, 2)], quick=[(1, 2), (2, 3), (3, 1)], fast=[(1, 2)], paper=[(1, 2)])
data = by_scale(scale, smoke="digits", quick="digits-hard", fast="cifar100", paper="cifar100")
networks = by_scale(
    scale,
    smoke=["resnet8-bn-w0.25/smoke"],
    quick=["mlp3-fused-w256/quick", "resnet20-bn-w1/quick"],
    fast=["resnet18-bn-w1/fast"],
    paper=["resnet18-bn-w1/jordan"],
)
points = by_scale(scale, smoke=3, quick=11, fast=21, paper=21)  # of a path, ends included

pairs = [(network, a, b) for network in networks for a, b in SEEDS]
halves = [(f"{data}-first80/{network}/s{a}", f"{data}-last80/{network}/s{b}") for network, a, b in pairs]
wholes = [f"{data}/{network}/s{a}" for network, a, _ in pairs]
needs = {
    "repair/fig7": [run for ends in halves for run in ends],
    "repair/fig13": [run for ends in halves for run in ends] + wholes,
}
runs = list(dict.fromkeys(run for item in needs if wanted(item, items) for run in needs[item]))

# %%
import time

import pandas as pd

from companion.experiments.pairs import baseline_rows, load_pair, path_rows
from companion.figures import plots
from companion.figures.report import save_item
from companion.runs import store

# %% [markdown]
# ## Measure
#
# The REPAIRed path of every pair, and what it is measured against:
#
# * the endpoints' *ensemble*, whose logits are $(1-\alpha)\,z_1(x) + \alpha\,z_2(x)$;
# * each endpoint *corrected* for the shift between its training set and the test set. The paper: "scale down the first
#   50 logits of network A such that its predictions on the test set become balanced over the 100 classes". It does not
#   say whether to scale is to multiply or to shift. Logits can be negative, so here one constant is taken off the
#   logits of the half of the classes that the network has seen more of, which scales their odds, until the mean
#   probability of that half is its share of the classes (`companion.experiments.ensembles.balance`). This looks at the
#   images of the test set, not at their labels;
# * one network trained on all of the data.

# %%
start = time.perf_counter()
alphas = [i / (points - 1) for i in range(points)]
merged, baselines = [], []
for (_, a, b), ends, whole in zip(pairs, halves, wholes, strict=True):
    pair = load_pair(ends, data=data)
    of = {"series": pair.title, "pair": f"{a}-{b}"}
    merged += [of | row for row in path_rows(pair, alphas)]
    if wanted("repair/fig13", items):
        rows = baseline_rows(pair, store.get(whole, pair.dataset.device), alphas)
        baselines += [of | row for row in rows]


# %% [markdown]
# As in the paper, the best $\alpha$ is chosen on the test set. `best_loss` and `best_accuracy` are the best of the
# means over pairs, at alphas between the ends. All of them are of the first network.


# %%
def means(rows: list[dict]) -> pd.DataFrame:
    """Loss (nats) and accuracy (%) by series, network and alpha, means over pairs."""
    frame = pd.DataFrame(rows).assign(accuracy=lambda rows: 100 * rows.accuracy)
    return frame.groupby(["series", "network", "alpha"], dropna=False, sort=False)[["loss", "accuracy"]].mean()


paths = means(merged)
first = merged[0]["series"]
path = paths.loc[first, "repaired"]
between = path.iloc[1:-1]
print(paths.round(3).unstack("network").to_string())

# %% [markdown]
# ## Between two halves (Fig. 7)
#
# The paper's best network has a loss of 1.30 at $\alpha = 0.3$; that of Ainsworth et al. (2022), with LayerNorm and
# without REPAIR, 1.73. Bands go from the lowest to the highest pair of seeds. The paper draws the REPAIRed path only;
# the one before REPAIR shows where it is REPAIR that matters: shallow MLPs hardly need it.

# %%
if wanted(item := "repair/fig7", items):
    fig7 = {"best_loss": between.loss.min(), "best_alpha": between.loss.idxmin()}
    fig7["best_accuracy"] = between.accuracy.max()
    fig7 |= {f"endpoint_{end}_{metric}": path[metric].iloc[i]
             for metric in ("loss", "accuracy") for end, i in {"a": 0, "b": -1}.items()}  # fmt: skip
    names = {0: "endpoint a", 1: "endpoint b"}
    ends = [row | {"network": names[row["alpha"]], "alpha": None} for row in merged
            if row["alpha"] in names and row["network"] == "repaired"]  # fmt: skip
    figure = plots.merging(merged + ends)
    save_item(item, scale, merged, fig7, figure, runs=needs[item], seconds=time.perf_counter() - start)
    print(pd.Series(fig7).round(3).to_string())

# %% [markdown]
# ## Against baselines (Fig. 13)

# %%
if wanted(item := "repair/fig13", items):
    levels = means(baselines)
    ensemble = levels.loc[first, "ensemble"]
    fig13 = {"best_ensemble_loss": ensemble.loss.min(), "best_ensemble_accuracy": ensemble.accuracy.max()}
    for name in ("corrected a", "corrected b", "full data"):
        level = levels.loc[first, name].iloc[0]
        fig13 |= {f"{name.replace(' ', '_')}_{metric}": level[metric] for metric in ("loss", "accuracy")}
    table = [row for row in merged if row["network"] == "repaired"] + baselines
    figure = plots.merging(table)
    save_item(item, scale, table, fig13, figure, runs=needs[item], seconds=time.perf_counter() - start)
    print(levels.round(3).unstack("network").to_string())

# %% [markdown]
# ## Check
#
# Of trained networks of digits is asserted, as means over pairs: a merged MLP has a lower loss than both of its
# endpoints; no merged network of either kind has as low a loss as the best ensemble and as the network that was trained
# on all data. Between the narrow ResNet20s, each trained on about 700 images, what is left of the barrier is higher
# than what there is to gain by merging; the scorecard says in how many pairs. At alpha 0 and 1 the REPAIRed path and
# the ensemble are the same two networks.

# %%
if scale == "quick":
    assert between.loss.min() < path.loss.iloc[[0, -1]].min(), path
if wanted("repair/fig13", items):
    ends = ensemble.loc[[0, 1]] - path.loc[[0, 1]]  # B's units are in another order, and sums round differently
    assert (ends.loss.abs() < 1e-4).all() and (ends.accuracy.abs() < 0.5).all(), ends
    if scale == "quick":
        least = {n: levels.xs(n, level="network").groupby(level="series").loss.min() for n in ("ensemble", "full data")}
        best = paths.xs("repaired", level="network").groupby(level="series").loss.min()
        assert all((loss < best).all() for loss in least.values()), (least, best)
