# %% [markdown]
# # Mode Combinability, Section 4.5: a vertex that does not work
#
# Of every two weights the one of larger magnitude, which makes the 'Max' model, and the one of smaller magnitude, which
# makes the 'Min' model:
#
# $$\theta^{\max}_i = \begin{cases} a_i & |a_i| \ge |b_i| \\ b_i & \text{else,}\end{cases}\qquad
#   \theta^{\min}_i = \begin{cases} a_i & |a_i| < |b_i| \\ b_i & \text{else,}\end{cases}\qquad
#   \theta_\alpha = (1-\alpha)\,\theta^{\max} + \alpha\,\theta^{\min}$$
#
# (Csiszarik et al. 2023, Sec. 4.5.1, Figs. 8 and B.22), with B's units in A's order. Both are vertices of the hypercube
# that A and B span, and opposite ones (where magnitudes tie, the one takes A's and the other B's weight); their
# midpoint is that of A and B. The paper finds the Min model far worse than the Max model: not every point of the
# hypercube works. Beside it stands the same for B's units as trained.
#
# Here alpha = 0 is the Max and alpha = 1 the Min model; the paper does not print its orientation. Nothing is sampled.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig8"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import by_scale, wanted

resnet, tiny, SEEDS, restarts = combined(scale)  # see the table below; every two seeds are a pair
points = by_scale(scale, smoke=3, quick=9, fast=25, paper=25)  # of the path, ends included
networks = {"combine/fig8": resnet, "combine/figB22": tiny}
networks = {item: run for item, run in networks.items() if wanted(item, items)}
runs_of = {item: [f"{run}/s{seed}" for seed in SEEDS] for item, run in networks.items()}
runs = [run for used in runs_of.values() for run in used]

# %%
import time
from functools import partial

import pandas as pd
import torch

from companion.experiments.mixtures import KINDS, SCHEMES, evaluate_rows, states_of
from companion.experiments.pairs import pairs_of, title_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item
from repairlib.combine import extreme
from repairlib.interpolate import interpolate_states

overview()

# %% [markdown]
# ## From the Max to the Min model
#
# All parameters are chosen from, those of LayerNorm too.


# %%
def extreme_rows(pair) -> list[dict]:
    """Rows of the paths from the Max to the Min model, aligned and not."""
    rows = []
    for kind in KINDS:
        trained = states_of(pair, kind)
        ends = extreme(trained, "max"), extreme(trained, "min")
        for entry, value in trained[0].items():
            assert torch.equal(ends[0][entry] + ends[1][entry], value + trained[1][entry]), entry  # opposite vertices
        named = [({"kind": kind, "alpha": alpha}, partial(interpolate_states, *ends, alpha))
                 for alpha in SCHEMES["linear"].grid(points)]  # fmt: skip
        rows += evaluate_rows(pair, named)
    return rows


tables, seconds = {}, {}
for item, run in networks.items():
    start, pairs = time.perf_counter(), pairs_of(run, SEEDS, match="weights", restarts=restarts)
    tables[item] = [{"pair": name} | row for name, pair in pairs for row in extreme_rows(pair)]
    seconds[item] = time.perf_counter() - start


# %%
SUFFIXES = {"permuted": "", "naive": "_naive"}


def save_path(item: str) -> None:
    """Draw and save one figure, and print the means over pairs."""
    frame = pd.DataFrame(tables[item])
    means = frame.groupby(["kind", "alpha"], sort=False)[["loss", "accuracy"]].mean()
    summary = {f"{which}_{metric}{suffix}": means[metric][kind, alpha] for kind, suffix in SUFFIXES.items()
               for which, alpha in (("max", 0), ("min", 1)) for metric in means}  # fmt: skip
    summary |= {"endpoint_loss": frame["end_loss"].mean(), "endpoint_accuracy": frame["end_accuracy"].mean()}
    title, marks = title_of(networks[item]), {0: "Max", 1: "Min"}
    figure = plots_combine.performance(tables[item], "alpha", xlabel=r"$\alpha$", title=title, marks=marks)
    save_item(item, scale, tables[item], summary, figure, runs=runs_of[item], seconds=seconds[item])
    print(pd.Series(summary).round(3).to_string(), means.round(3).to_string(), sep="\n\n")


# %% [markdown]
# ## ResNet (Fig. 8)
#
# The dashed line is the mean of A and B themselves. At `quick` (seeds 1 to 3) the Max model is 2 points below it, the
# Min model 44; the best of the path lie in between.

# %%
if wanted("combine/fig8", items):
    save_path("combine/fig8")

# %% [markdown]
# ## Tiny-10 (Fig. B.22)
#
# The caption of Fig. B.22 names ResNet-20 once more, though the figure stands among those of Tiny-10: here it is of
# Tiny-10.

# %%
if wanted("combine/figB22", items):
    save_path("combine/figB22")

# %% [markdown]
# ## Check
#
# At every scale the Max and the Min model have been seen above to be opposite vertices, weight by weight. Of trained
# digits networks is asserted the paper's finding, that the Min model is far worse than the Max model: by more than 10
# points, as means over pairs.

# %%
if scale == "quick":
    for table in tables.values():
        accuracy = pd.DataFrame(table).query("kind == 'permuted'").groupby("alpha")["accuracy"].mean()
        assert accuracy[0] > accuracy[1] + 0.1, accuracy
