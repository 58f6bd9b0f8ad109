# %% [markdown]
# # Mode Combinability, Section 4.3: identity stitching
#
# The first $l$ layers of model A under the rest of model B, and nothing but the identity between them: a vertex of the
# hypercube of element-wise combinations
#
# $$\theta_i = (1-c_i)\,a_i + c_i\,b_i,\qquad c_i = 0 \text{ in layers } 1,\dots,l,\quad c_i = 1 \text{ in the others}$$
#
# (Csiszarik et al. 2023, Sec. 4.3, Figs. 6 and B.19). Once B's units have been put in A's order by weight matching, the
# paper finds that every such network works: a permutation does what stitching otherwise leaves to a trained layer.
#
# As everywhere here, coefficient 0 is A, as in the paper's text; its Eq. 1 has A and B the other way round. Nothing is
# sampled: the number of A's layers goes from 0, which is B, to all, which is A.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig6"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import wanted

resnet, tiny, SEEDS, restarts = combined(scale)  # see the table below; every two seeds are a pair
networks = {"combine/fig6": resnet, "combine/figB19": tiny}
networks = {item: run for item, run in networks.items() if wanted(item, items)}
runs_of = {item: [f"{run}/s{seed}" for seed in SEEDS] for item, run in networks.items()}
runs = [run for used in runs_of.values() for run in used]

# %%
import time

import pandas as pd
import torch

from companion.experiments.mixtures import mean_barriers, stitching_rows, weight_rows
from companion.experiments.pairs import pairs_of, title_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item
from repairlib.combine import stitch

overview()

# %% [markdown]
# What is evaluated, for two made-up networks of three layers whose weights are uniform in $[0, 1]$: a cell is a weight,
# its hue the coefficient.

# %%
torch.manual_seed(0)
a, b = ({f"layer {i}": torch.rand(4, 5) for i in (1, 2, 3)} for _ in "ab")
cuts = {f"{n} layers of A": stitch(a, b, n, {name: (name,) for name in a}) for n in range(4)}
figure = plots_combine.schematic(weight_rows(cuts, a, b), columns=4)

# %% [markdown]
# ## Stitch
#
# Layers are convolutions and linear layers in the order in which they are executed, each with the normalisation that
# reads its output; the convolution on a shortcut is a layer of its own. In a residual network A's and B's parts also
# meet in the additions: a block that is cut adds what B's layers make of it to the stream that A's layers have left.

# %%
tables, seconds = {}, {}
for item, run in networks.items():
    start, pairs = time.perf_counter(), pairs_of(run, SEEDS, match="weights", restarts=restarts)
    tables[item] = [{"pair": name} | row for name, pair in pairs for row in stitching_rows(pair)]
    seconds[item] = time.perf_counter() - start


# %% [markdown]
# Barriers are the worst of a pair's networks against the mean of the endpoints (Def. 3.3), in nats and as fractions of
# the test set (0.01 is a point); the numbers below are means over pairs.
#
# At `quick` (seeds 1 to 3) every cut between aligned networks works, after a fashion: on average over pairs no cut but
# the last one costs a ResNet more than 11 points or a Tiny-10 more than 5. The last, between A's layers and B's
# classifier, is the worst: 21 points and 9. Without alignment all cuts are near chance.


# %%
def save_stitching(item: str) -> None:
    """Draw and save one figure, and print the means over pairs layer by layer."""
    table, means = tables[item], mean_barriers(tables[item])
    summary = {**means.loc["permuted"], **means.loc["naive"].add_suffix("_naive")}
    marks = {0: "model B", max(row["layer"] for row in table): "model A"}
    title = title_of(networks[item])
    figure = plots_combine.performance(table, "layer", xlabel="layers of model A", title=title, marks=marks)
    save_item(item, scale, table, summary, figure, runs=runs_of[item], seconds=seconds[item])
    layers = pd.DataFrame(table).groupby(["layer", "name", "kind"], sort=False)[["loss", "accuracy"]].mean()
    print(pd.Series(summary).round(3).to_string(), layers.unstack("kind").round(3).to_string(), sep="\n\n")


# %% [markdown]
# ## ResNet (Fig. 6)

# %%
if wanted("combine/fig6", items):
    save_stitching("combine/fig6")

# %% [markdown]
# ## Tiny-10 (Fig. B.19)

# %%
if wanted("combine/figB19", items):
    save_stitching("combine/figB19")

# %% [markdown]
# ## Check
#
# With none of A's layers the network is B, with all of them it is A, in whichever order B's units are: asserted at
# every scale. Of trained digits networks is asserted that cuts between aligned networks leave at least 50 points more
# accuracy than cuts between others, as means over all cuts and pairs.

# %%
for table in tables.values():
    frame = pd.DataFrame(table)
    is_end = frame["layer"].isin([0, frame["layer"].max()])
    ends = frame[is_end].groupby(["pair", "kind"])[["loss", "end_loss"]].mean()
    assert (ends["loss"] - ends["end_loss"]).abs().max() < 1e-4, ends
    if scale == "quick":
        cut = frame[~is_end].groupby("kind")["accuracy"].mean()
        assert cut["permuted"] > cut["naive"] + 0.5, cut
