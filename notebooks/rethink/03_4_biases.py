# %% [markdown]
# # Rethink Model Re-Basin, Section 3.4: an intriguing property of biases
#
# Plain networks are aligned and averaged. What if they had no biases? (Qu and Horváth 2024, Figs. 3C, 3D and 17 to 28.)
#
# The paper makes plain networks in three ways:
#
# * biases are **kept**;
# * biases are **removed** from the trained network, which is then trained for 10 more epochs;
# * the network **never** had any.
#
# It finds that without biases the accuracy barrier shrinks about as much as by renormalisation: for VGG16 from 79 to
# 9 points if units are matched by weights, from 46 to 9 by activations. The barrier of the loss remains.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig3cd,rethink/fig27-28"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import biases
from companion.figures.section import Section

section = Section(biases, scale, items)
section.overview()

# %%
import pandas as pd
import torch

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.rows import equal_steps
from companion.experiments.tables import barriers
from companion.figures.plots import rethink as plots
from repairlib.interpolate import bias_depths, interpolate_homogeneous, with_state

grid = section.grid
ALPHAS = equal_steps(grid.points)
SHOWN = {"accuracy": "test accuracy (%)", "loss": "test loss (nats)"}

# %% [markdown]
# ## One pair, step by step
#
# The same two networks with their biases, without them, and trained on without them.

# %%
kept = section.example(grid.VGG, grid.ResNet)
pair = load_pair(kept)
without = [repairlib.interpolate_models(model, model) for model in (pair.a, pair.aligned)]  # copies
with torch.no_grad():
    for model in without:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
pair.compare(
    A=pair.a, halfway=repairlib.interpolate_models(pair.a, pair.aligned),
    A_without_biases=without[0], halfway_without_biases=repairlib.interpolate_models(*without),
)  # fmt: skip

# %% [markdown]
# ## Homogeneous interpolation
#
# A network of ReLUs without biases is homogeneous: if all weights of all $L$ layers are halved, its output is divided
# by $2^L$. A bias is not: that of layer $h$ passes $L - h$ more layers, and so it counts too much at the middle of the
# path. Wang et al. (2022) interpolate the bias of layer $h$ as
#
# $$b_\alpha = (1-\alpha)^h\, b_A + \alpha^h\, b_B .$$

# %%
example = next(iter(pair.test))[0][:2]
depths = bias_depths(pair.a, example)
middle = interpolate_homogeneous(pair.a.state_dict(), pair.aligned.state_dict(), 0.5, depths)
weights = {name: (value, pair.aligned.state_dict()[name]) for name, value in pair.a.state_dict().items()}
by_hand = {name: 0.5 ** depths.get(name, 1) * (a + b) for name, (a, b) in weights.items()}
assert all(torch.allclose(by_hand[name], value, atol=1e-6) for name, value in middle.items())
middle = with_state(pair.a, middle)
pair.compare(straight=repairlib.interpolate_models(pair.a, pair.aligned), homogeneous=middle)

# %% [markdown]
# ## Every pair of seeds
#
# `VGG again` and `ResNet again` are the repetition on another data set; the paper's is CIFAR-100.


# %%
def measure(fig, renorms=("none",)):
    """Paths of an item's networks, matched by weights and by activations."""
    table = fig.rows(matchings=["WM", "AM"], renorms=list(renorms), alphas=ALPHAS)
    return table.assign(biases="biases " + table["biases"].astype(str))


def draw(table, shown=SHOWN):
    """Paths, a panel for each network and matching; mean barriers by name, in points and nats."""
    words = {"biases kept": "with biases", "biases never": "never any biases"}
    panels = table.assign(panel=table["series"] + ", " + table["matching"], biases=table["biases"].replace(words))
    figure = plots.lines(panels, "alpha", shown, "biases", "panel", xlabel=r"$\alpha$")
    found = barriers(table).groupby(["series", "matching", "biases"], sort=False)
    summary = {}
    for (series, matching, kind), rows in found:
        summary[f"{series} {matching}, {kind} (points)"] = 100 * rows["accuracy_barrier"].mean()
        summary[f"{series} {matching}, {kind} (nats)"] = rows["loss_barrier"].mean()
    return figure, summary


# %% [markdown]
# ## VGG (Fig. 3C and 3D)

# %%
if fig := section.item("rethink/fig3cd"):
    table = measure(fig)
    figure, summary = draw(table)
    names = [(m, kind) for m in ("WM", "AM") for kind in ("kept", "removed")]
    theirs = {f"{m.lower()}_barrier_{kind}": summary[f"VGG {m}, biases {kind} (points)"] for m, kind in names}
    fig.save(table, figure, theirs | summary)

# %% [markdown]
# ## Two networks on two data sets (Figs. 17 to 24)

# %%
if fig := section.item("rethink/fig17-24"):
    table = measure(fig)
    fig.save(table, *draw(table))

# %% [markdown]
# ## Against renormalisation (Figs. 25 and 26)
#
# RESCALE for the VGG, REPAIR for the ResNet, as in the paper.

# %%
RENORM = {"VGG": "RESCALE", "ResNet": "REPAIR"}
HOW = {"matchings": ["WM", "AM"], "alphas": ALPHAS}
if fig := section.item("rethink/fig25-26"):
    tables = [measure(fig)]
    for network in fig.networks:
        if network["biases"] == "kept":
            renorm = RENORM[network["series"]]
            made = section.rows([network], renorms=[renorm], method="simultaneous", **HOW)
            tables.append(made.assign(biases=f"with {renorm}"))
    table = pd.concat(tables, ignore_index=True).drop(columns=["kind", "renorm"])
    fig.save(table, *draw(table, {"accuracy": SHOWN["accuracy"]}))

# %% [markdown]
# ## Homogeneous interpolation (Figs. 27 and 28)
#
# "Bias Norm" in the paper. Weights are interpolated as always, biases by the power of their depth.


# %%
def homogeneous_rows(pair):
    """Straight and homogeneous paths of an aligned pair."""
    depths = bias_depths(pair.a, next(iter(pair.test))[0][:2])
    rows = []
    for matching in ("WM", "AM"):
        ends = [model.state_dict() for model in (pair.a, pair.aligned_by(matching))]
        for way, powers in {"straight": {}, "homogeneous": depths}.items():
            for alpha in ALPHAS:
                loss, accuracy = pair.evaluate(with_state(pair.a, interpolate_homogeneous(*ends, alpha, powers)))
                rows.append({"matching": matching, "way": way, "alpha": alpha, "loss": loss, "accuracy": accuracy})
    return rows


if fig := section.item("rethink/fig27-28"):
    table = fig.measure(homogeneous_rows)
    table = table.assign(biases="biases " + table["biases"])
    straight = table["way"] == "straight"
    table = table[straight | (table["biases"] == "biases kept")]
    table = table.assign(biases=table["biases"] + table["way"].map({"straight": "", "homogeneous": ", homogeneous"}))
    fig.save(table, *draw(table.drop(columns="way")))

# %% [markdown]
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
