# %% [markdown]
# # Mode Combinability, Section 6.3: how much of the alignment matters
#
# Of one layer's matched pairs of units, the $k$ least correlated ones are matched anew at random, none with its old
# partner: by a derangement $\pi_r$, uniform over all permutations of $k$ units that leave none in its place. The other
# layers' matching stays. Then model A is interpolated with the disturbed B,
#
# $$\theta_\alpha = (1-\alpha)\,\theta_A + \alpha\,\pi_r(\pi(\theta_B)),$$
#
# which as a network by itself still is B (Csiszarik et al. 2023, Sec. 6.3, Fig. 14). The paper finds that up to half of
# a layer's pairs cost little, and that in some layers all of them do.
#
# Pairs are matched by weights, as in the paper's App. C, and ordered by the correlation of their activations, which is
# measured behind each layer's non-linearity on training images. As everywhere here, $\alpha=0$ is A, as in the paper's
# text; its Eq. 1 has A and B the other way round.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig14"; empty: all
samples: int = 0  # derangements for each k, which the paper does not print; 0: the scale's

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import by_scale, wanted

_, tiny, SEEDS, restarts = combined(scale)  # see the table below; every two seeds are a pair
steps = by_scale(scale, smoke=2, quick=4, fast=8, paper=16)  # values of k, besides 2: N / steps, 2 N / steps, ..., N
samples = samples or by_scale(scale, smoke=1, quick=2, fast=3, paper=5)
alphas = by_scale(scale, smoke=[0.5], quick=[0.5], fast=[0.5], paper=[0.25, 0.5, 0.75])  # the worst is the barrier

runs = [f"{tiny}/s{seed}" for seed in SEEDS] if wanted("combine/fig14", items) else []

# %%
import time

import numpy as np
import pandas as pd
import torch

from companion.experiments.comparisons import derangement_rows, derangements
from companion.experiments.pairs import pairs_of, title_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item
from repairlib.permutations import derange, permute

overview()

# %% [markdown]
# What is done to one layer's matching, here of 12 units: the least correlated pairs (orange) get new partners.

# %%
drawn = torch.Generator().manual_seed(0)
found, correlation = {"layer": torch.randperm(12, generator=drawn)}, {"layer": torch.rand(12, generator=drawn)}
disturbed = {f"$k$ = {k}": derange(found, correlation, "layer", k)["layer"].tolist() for k in (0, 4, 12)}
figure = plots_combine.matchings(disturbed)

# %% [markdown]
# ## Derange and interpolate
#
# $k=0$ is the matching as found. Beside it stands the barrier of the networks as trained, of which no unit is matched.
# Barriers are of the worst network among the values of $\alpha$, which `smoke`, `quick` and `fast` have one of, the
# midpoint: against the mean of A and B, in nats and as a fraction of the test set (Def. 3.3).

# %%
if wanted("combine/fig14", items):
    start = time.perf_counter()
    pairs = dict(pairs_of(tiny, SEEDS, match="weights", restarts=restarts))
    table = [{"pair": name} | row for name, pair in pairs.items()
             for row in derangement_rows(pair, steps, samples, alphas)]  # fmt: skip
    frame = pd.DataFrame(table)
    print(frame.groupby(["layer", "k"])[["loss_barrier", "accuracy_barrier"]].mean().round(3).to_string())

# %% [markdown]
# ## Barriers against k (Fig. 14)
#
# Against the share of a layer's pairs; the paper's axis has their number. The summary's `half` and `all`: by how much
# the accuracy barrier grows (a fraction, mean over draws and pairs) when half of a layer's pairs, or all of them, are
# deranged; in the layer where it grows most, and the mean over layers. At `quick`
# (seeds 1 to 3) half of a layer's pairs cost 0.5 points at most, and all of them 1.6.

# %%
if wanted("combine/fig14", items):
    barrier = frame.groupby(["layer", "k"], sort=False)["accuracy_barrier"].mean()
    fig14 = {"accuracy_barrier": barrier.xs(0, level="k").iloc[0]}
    fig14["accuracy_barrier_naive"] = frame["naive_accuracy_barrier"].mean()
    for name, part in {"half": 0.5, "all": 1}.items():
        reached = frame[frame["k"] <= part * frame["units"]].groupby("layer")["k"].max()
        added = pd.Series({layer: barrier[layer, k] - barrier[layer, 0] for layer, k in reached.items()})
        fig14 |= {f"{name}_worst": added.max(), f"{name}_mean": added.mean()}
        print(name, added.round(4).to_dict())
    figure = plots_combine.robustness(table, title=title_of(tiny))
    save_item("combine/fig14", scale, table, fig14, figure, runs=runs, seconds=time.perf_counter() - start)

# %% [markdown]
# ## Check
#
# Undisturbed, all layers have one barrier. A disturbed B is still B: shown for the last pair, all of whose layers are
# deranged in turn. Asserted of trained digits networks: as found, the matching leaves less than a third of the barrier
# of networks that are not matched, and to derange half of a layer's pairs adds less than 5 points on average over
# layers, and less than 10 in any of them.

# %%
if wanted("combine/fig14", items):
    assert (frame[frame["k"] == 0].groupby("pair")["loss_barrier"].agg(np.ptp) < 1e-5).all(), frame
    *_, pair = pairs.values()
    loss = pair.evaluate(pair.b)[0]
    for columns, matching in derangements(pair, steps, draws=1):
        if columns["k"] == columns["units"]:
            assert abs(pair.evaluate(permute(pair.b, pair.matching.spec, matching))[0] - loss) < 1e-4, columns
    if scale == "quick":
        assert fig14["accuracy_barrier"] < fig14["accuracy_barrier_naive"] / 3, fig14
        assert fig14["half_mean"] < 0.05 and fig14["half_worst"] < 0.1, fig14
