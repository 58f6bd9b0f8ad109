# %% [markdown]
# # Mode Combinability, Section 4.3: identity stitching
#
# Take the first layers of model A and put the rest of model B on top, with nothing between them. Does the network work?
# (Csiszárik et al. 2023, Figs. 6 and B.19.)
#
# Such a network is a vertex of the hypercube of element-wise combinations:
#
# $$\theta_i = (1-c_i)\,a_i + c_i\,b_i,\qquad c_i = 0 \text{ in layers } 1,\dots,l,\quad c_i = 1 \text{ in others}.$$
#
# Others train a layer between the two parts, to translate one into the other. The paper needs none: once weight
# matching has put B's units into A's order, it finds that every such network works. Nothing is drawn at random. The
# number of A's layers goes from 0, which is B, to all, which is A. (The paper's Eq. 1 has A and B the other way round.)

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig6"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import stitching
from companion.figures.section import Section

section = Section(stitching, scale, items)
section.overview()

# %%
import torch
from IPython.display import display

import repairlib
from companion.experiments.mixtures import stitching_rows, weight_rows
from companion.experiments.pairs import load_pair, title_of
from companion.experiments.tables import name_barriers
from companion.figures.plots import combine as plots_combine
from repairlib import combine
from repairlib.interpolate import with_state

grid = section.grid

# %% [markdown]
# ## What is stitched
#
# Two made-up networks of three layers, with weights that are uniform in $[0, 1]$. A cell is a weight. Its hue is the
# coefficient: blue is A's, orange is B's.

# %%
torch.manual_seed(0)
a, b = ({f"layer {i}": torch.rand(4, 5) for i in (1, 2, 3)} for _ in "ab")
cuts = {f"{n} layers of A": combine.stitch(a, b, n, {name: (name,) for name in a}) for n in range(4)}
plots_combine.schematic(weight_rows(cuts, a, b), columns=4)

# %% [markdown]
# From left to right, one layer after the other is A's, beginning with the first.
#
# ## One pair, step by step
#
# B's units are put into A's order. Weight matching starts `restarts` times, and the best matching counts. `layers`
# lists convolutions and linear layers in the order in which they are executed, each with the normalisation that reads
# its output. The convolution on a shortcut is a layer of its own. A residual block that is cut adds the output of B's
# layers to the stream that comes from A's layers.

# %%
pair = load_pair(section.example(grid.resnet, grid.tiny))
matching = repairlib.match_weights(pair.a, pair.b, pair.calibration, start="identity", restarts=grid.restarts)
parts = combine.layers(pair.a, next(iter(pair.calibration))[0])
theta_a, theta_b, aligned_b = (model.state_dict() for model in (pair.a, pair.b, matching.apply(pair.b)))
half = len(parts) // 2
stitched = with_state(pair.a, combine.stitch(theta_a, aligned_b, half, parts))
not_aligned = with_state(pair.a, combine.stitch(theta_a, theta_b, half, parts))
print(f"A's layers: {', '.join(list(parts)[:half])}\nB's layers: {', '.join(list(parts)[half:])}")
pair.compare(A=pair.a, B=pair.b, stitched=stitched, stitched_not_aligned=not_aligned)

# %% [markdown]
# ## Every pair of seeds
#
# The barrier is that of a pair's worst network, against the mean of the endpoints (Def. 3.3). Numbers below are means
# over pairs, in nats and in points of test accuracy.


# %%
def make(fig, run: str) -> None:
    """Measure, draw and save one figure."""
    table = fig.measure(stitching_rows, matching="WM", restarts=grid.restarts)
    marks = {0: "model B", table["layer"].max(): "model A"}
    names = {"xlabel": "layers of model A", "title": title_of(run), "marks": marks}
    fig.save(table, plots_combine.performance(table, "layer", **names), name_barriers(table))


def means(item: str):
    """Test accuracy (%) by number of A's layers, mean over pairs."""
    table = section.tables[item].replace({"matching": {"WM": "aligned", "none": "not aligned"}})
    table["accuracy"] *= 100
    return table.pivot_table("accuracy", ["layer", "name"], "matching", sort=False).round(1)


# %% [markdown]
# ## ResNet (Fig. 6)

# %%
if fig := section.item("combine/fig6"):
    make(fig, grid.resnet)
    display(means("combine/fig6"))

# %% [markdown]
# At `quick` all cuts but the last cost aligned networks at most 11 points on average. The last one, between A's layers
# and B's classifier, costs 21 points. Without alignment all cuts are near chance.
#
# ## Tiny-10 (Fig. B.19)

# %%
if fig := section.item("combine/figB19"):
    make(fig, grid.tiny)
    display(means("combine/figB19"))

# %% [markdown]
# Cuts of Tiny-10s cost less: at most 5 points, and 9 before the classifier. Without alignment each costs 71 or more.
#
# ## Check
#
# With none of A's layers the network is B, with all of them it is A, in whichever order B's units are. Then what the
# paper claims of these figures, and what ours show.

# %%
for table in section.tables.values():
    is_end = table["layer"].isin([0, table["layer"].max()])
    ends = table[is_end].groupby(["pair", "matching"])[["loss", "end_loss"]].mean()
    assert (ends["loss"] - ends["end_loss"]).abs().max() < 1e-4, ends
section.check()
