# %% [markdown]
# # Mode Combinability, Section 4.5: a vertex that does not work
#
# Networks from all over the hypercube between two aligned networks work. Are there any that do not? (Csiszárik et al.
# 2023, Figs. 8 and B.22.)
#
# Of every two weights, the *Max* model takes the one of larger magnitude, and the *Min* model the one of smaller
# magnitude:
#
# $$\theta^{\max}_i = \begin{cases} a_i & |a_i| \ge |b_i| \\ b_i & \text{else,}\end{cases}\qquad
#   \theta^{\min}_i = \begin{cases} a_i & |a_i| < |b_i| \\ b_i & \text{else,}\end{cases}\qquad
#   \theta_\alpha = (1-\alpha)\,\theta^{\max} + \alpha\,\theta^{\min}.$$
#
# Both are vertices of the hypercube that A and B span, and opposite ones: what one takes, the other leaves. Their
# midpoint is that of A and B. The paper finds the Min model far worse than the Max model, so not every point of the
# hypercube works.
#
# Here $\alpha = 0$ is the Max model and $\alpha = 1$ the Min model. The paper does not print its orientation.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig8"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import min_max
from companion.figures.section import Section

section = Section(min_max, scale, items)
section.overview()

# %%
import pandas as pd
import torch

import repairlib
from companion.experiments.mixtures import extreme_rows
from companion.experiments.pairs import load_pair, title_of
from companion.figures.plots import combine as plots_combine
from repairlib import combine
from repairlib.interpolate import interpolate_states, with_state

grid = section.grid

# %% [markdown]
# ## One pair, step by step
#
# B's units are put into A's order. Weight matching starts `restarts` times, and the best matching counts. Then every
# weight is chosen by its magnitude, those of LayerNorms too.

# %%
pair = load_pair(section.example(grid.resnet, grid.tiny))
matching = repairlib.match_weights(pair.a, pair.b, pair.calibration, start="identity", restarts=grid.restarts)
ends = pair.a.state_dict(), matching.apply(pair.b).state_dict()
largest, smallest = combine.extreme(ends, "max"), combine.extreme(ends, "min")
midpoint = interpolate_states(largest, smallest, 0.5)
networks = {"Max": largest, "midpoint": midpoint, "Min": smallest}
pair.compare(A=pair.a, B=pair.b, **{name: with_state(pair.a, state) for name, state in networks.items()})

# %% [markdown]
# Each of the two takes about half of its weights from A. The Max model's are larger than A's and B's, the Min model's
# are smaller.


# %%
def flat(state) -> torch.Tensor:
    """All weights of a network."""
    return torch.cat([weight.flatten() for weight in state.values()])


a, states = flat(ends[0]), dict(zip("AB", ends, strict=True)) | networks
rows = {name: (flat(state).norm().item(), 100 * (flat(state) == a).float().mean().item())
        for name, state in states.items()}  # fmt: skip
pd.DataFrame(rows, ["norm of all weights", "weights of A (%)"]).T.round(1)

# %% [markdown]
# ## Every pair of seeds
#
# The path from the Max to the Min model, for B in A's order and for B as trained. The dashed line is the mean of A and
# B themselves.


# %%
def make(fig, run: str) -> None:
    """Measure, draw and save one figure; accuracies are means over pairs, in percent."""
    table = fig.measure(extreme_rows, grid.points, matching="WM", restarts=grid.restarts)
    mean = table.groupby(["matching", "alpha"])[["loss", "accuracy"]].mean() * [1, 100]
    summary = {f"{name}_{metric}{suffix}": mean.loc[(matching, alpha), metric]
               for matching, suffix in {"WM": "", "none": "_not_aligned"}.items()
               for name, alpha in {"max": 0, "min": 1}.items() for metric in mean}  # fmt: skip
    summary |= {"endpoint_loss": table["end_loss"].mean(), "endpoint_accuracy": 100 * table["end_accuracy"].mean()}
    names = {"xlabel": r"$\alpha$", "title": title_of(run), "marks": {0: "Max", 1: "Min"}}
    fig.save(table, plots_combine.performance(table, "alpha", **names), summary)


# %% [markdown]
# ## ResNet (Fig. 8)

# %%
if fig := section.item("combine/fig8"):
    make(fig, grid.resnet)

# %% [markdown]
# At `quick` the Max model is 2 points worse than A and B, the Min model 44 points. The best networks lie between the
# two. Without alignment the Max model is at 45 %, the Min model at chance.
#
# ## Tiny-10 (Fig. B.22)
#
# The caption of Fig. B.22 names ResNet-20 once more. The figure stands among those of Tiny-10, so here it is of
# Tiny-10.

# %%
if fig := section.item("combine/figB22"):
    make(fig, grid.tiny)

# %% [markdown]
# At `quick` the Min model of Tiny-10s is 27 points worse than their Max model.
#
# ## Check
#
# The Max and the Min model of the pair above are opposite vertices, weight by weight, and their midpoint is that of A
# and B. Then what the paper claims of these figures, and what ours show.

# %%
for name, weight in ends[0].items():
    assert torch.equal(largest[name] + smallest[name], weight + ends[1][name]), name
torch.testing.assert_close(midpoint, interpolate_states(*ends, 0.5))
section.check()
