# %% [markdown]
# # Rethink Model Re-Basin, Section 4.2: matching retains knowledge
#
# REPAIR and RESCALE restore the scale of activations. Then why are networks aligned at all? (Qu and Horváth 2024, Figs.
# 4C, 4D, 35 to 43.)
#
# The paper's answer: an average of networks that are not aligned has lost what both had learned, and no scale brings it
# back. Matching keeps some of it. The paper shows this in four ways:
#
# * Trained on, an aligned midpoint is good again after some 60 mini-batches, one that is not aligned much later.
# * Its weights are larger.
# * Fewer of its activations in early layers are zero.
# * Its parameters carry more Fisher information.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig4c,rethink/fig42"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import matching_retains
from companion.figures.section import Section

section = Section(matching_retains, scale, items)
section.overview()

# %%
import functools

import pandas as pd
import torch
from IPython.display import display

from companion.experiments.pairs import load_pair
from companion.experiments.statistics import (
    fisher_rows,
    magnitude_rows,
    midpoints,
    new_network,
    renormalised_rows,
    zero_rows,
)
from companion.experiments.trajectories import recovery_rows
from companion.figures.plots import rethink as plots
from repairlib.diagnostics import layer_means, weight_magnitudes
from repairlib.fisher import diagonal_fisher

grid = section.grid
VALUES = {"accuracy": "test accuracy (%)"}

# %% [markdown]
# ## One pair, step by step
#
# Where two weights have nothing to do with each other, their mean is smaller than they are. Matching puts like to like,
# and the mean keeps its size: $\lvert \frac12(\theta_A + \theta_B) \rvert$ against $\lvert\theta_A\rvert$, mean over
# each layer.

# %%
pair = load_pair(section.example(grid.VGG, grid.ResNet))
networks = {"A": pair.a} | midpoints(pair)
pd.DataFrame({name: weight_magnitudes(network) for name, network in networks.items()}).round(4)

# %% [markdown]
# The diagonal of the Fisher information says how much the network's own prediction depends on each parameter:
#
# $$F_i = \mathbb{E}_x\, \mathbb{E}_{y \sim p(y|x)}
#   \Big[ \Big(\frac{\partial \log p(y|x)}{\partial \theta_i}\Big)^2 \Big].$$
#
# For the biases $b$ of the last layer the gradient is $\mathbb{1}[k = y] - p_k$, so that $F_{b_k} = \mathbb{E}\,
# p_k(1-p_k)$.

# %%
images = next(iter(pair.calibration))[0][:200]
information = diagonal_fisher(pair.a, images)
with torch.no_grad():
    p = pair.a(images).double().softmax(1)
print(f"last bias: {float(information['head.bias'].mean()):.5f}, expected {float((p * (1 - p)).mean()):.5f}")
pd.Series(layer_means(information), name="mean Fisher information").to_frame()

# %% [markdown]
# ## Without matching, renormalisation does not help
#
# Test accuracy (%) of midpoints, and the share of their units that are zero on all images (%): nothing that is
# multiplied brings these back.

# %%
if fig := section.item("rethink/no-matching"):
    table = fig.measure(renormalised_rows)
    mean = 100 * table.groupby(["matching", "renorm"], sort=False)[["accuracy", "dead"]].mean()
    display(mean.round(1))
    summary = {f"{m}, {r}: {what} (%)": row[what] for (m, r), row in mean.iterrows() for what in row.index}
    theirs = {name.lower(): mean["accuracy"]["none", name] for name in ("REPAIR", "RESCALE")}
    fig.save(table, None, theirs | summary)

# %% [markdown]
# ## Midpoints trained on (Fig. 4C)
#
# SGD at a learning rate of 0.01, until 90 % of the training images are right or the budget is used up. A line ends
# where that is so.


# %%
@functools.cache
def recover(runs, beginning):
    """Midpoints of a pair, or a new network like them, trained on once for all figures."""
    pair = load_pair(runs)
    starts = midpoints(pair) if beginning == "midpoints" else {"new network": new_network(pair)}
    images = grid.settings["training images"]
    return recovery_rows(pair, starts, grid.settings["learning rate"], grid.epochs, grid.every, images=images)


def train_on(fig):
    """Trajectories of midpoints and of a new network; after how many mini-batches they are good again."""
    rows = fig.measure(lambda pair: recover(pair.runs, "midpoints")).to_dict("records")
    for network in fig.networks:
        _, pair = section.pairs(network["run"])[0]
        rows += [{**network, "pair": "new", **row} for row in recover(pair.runs, "new network")]
    last = pd.DataFrame(rows).groupby(["series", "pair", "network"], sort=False)["step"].max()
    mean = last.groupby(level=["series", "network"], sort=False).mean()
    figure = plots.lines(rows, "step", VALUES, columns="series", xlabel="mini-batch")
    return rows, figure, {f"{series}, {network}": steps for (series, network), steps in mean.items()}


if fig := section.item("rethink/fig4c"):
    rows, figure, summary = train_on(fig)
    fig.save(rows, figure, {"minibatches_after_wm": summary["VGG, aligned (WM)"]} | summary)

# %% [markdown]
# ## Six networks (Figs. 36 to 41)

# %%
if fig := section.item("rethink/fig36-41"):
    fig.save(*train_on(fig))

# %% [markdown]
# ## Magnitudes of weights (Fig. 4D)


# %%
def against_layers(table, measure, label, **how):
    """Lines over layers; the mean over layers of each network by name, relative to endpoint A."""
    figure = plots.lines(table, "layer", {measure: label}, columns="series", xlabel="layer", **how)
    mean = table.groupby(["series", "network"], sort=False)[measure].mean()
    return table, figure, {f"{s}, {n}": value / mean[s, "endpoint A"] for (s, n), value in mean.items()}


if fig := section.item("rethink/fig4d"):
    fig.save(*against_layers(fig.measure(magnitude_rows), "magnitude", "mean |weight|", log_y=["magnitude"]))

# %% [markdown]
# ## Zero activations and magnitudes (Fig. 43)
#
# Zeros are shares of the values behind each ReLU.

# %%
if fig := section.item("rethink/fig43"):
    rows = [row for rows in (zero_rows, magnitude_rows) for row in fig.measure(rows).to_dict("records")]
    table = pd.DataFrame(rows)
    labels = {"zeros": "zero activations (%)", "magnitude": "mean |weight|"}
    figure = plots.lines(table, "layer", labels, columns="series", xlabel="layer", log_y=["magnitude"])
    early = table[table["layer"] <= table["layer"].max() / 2].groupby(["series", "network"], sort=False)["zeros"].mean()
    fig.save(rows, figure, {f"{s}, {n}: zeros in early layers (%)": 100 * share for (s, n), share in early.items()})

# %% [markdown]
# ## Fisher information (Fig. 42)

# %%
if fig := section.item("rethink/fig42"):
    table = fig.measure(fisher_rows, grid.settings["images for Fisher information"])
    fig.save(*against_layers(table, "information", "mean Fisher information", log_y=["information"]))

# %% [markdown]
# The numbers are means over layers relative to endpoint A's.
#
# ## Pruning is an interpolation, too (Fig. 35)
#
# A pruned network $M(\theta)$ is a mixture of the network $\theta$ and of $M(\theta)$, weight by weight: halves of both
# where a weight is kept, $M(\theta)$ alone where it is pruned. What is large is matched perfectly. What is lost was
# small.

# %%
if fig := section.item("rethink/fig35"):
    weights = next(p for p in pair.a.parameters() if p.ndim > 1 and p.flatten(1).shape[1] >= 64)
    part = weights.detach().cpu().flatten(1)[:24, :48].numpy()
    fig.save([{"row": i, "column": j, "weight": float(w)} for i, row in enumerate(part) for j, w in enumerate(row)],
             plots.pruning_as_interpolation(part, kept=0.3))  # fmt: skip

# %% [markdown]
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
