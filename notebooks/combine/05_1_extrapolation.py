# %% [markdown]
# # Mode Combinability, Sections 5.1 and 5.2: beyond the hypercube
#
# Networks between two aligned networks A and B work. What about networks beyond them, where coefficients are negative
# or larger than 1? (Csiszárik et al. 2023, Figs. 9, 10, B.23 and B.24.)
#
# The paper walks on along the straight line through A and the aligned B, past both of them (Sec. 5.1):
#
# $$\Theta_\alpha = (1-\alpha)\,\Theta_A + \alpha\,\pi(\Theta_B), \qquad \alpha \in [-1, 2].$$
#
# Then it draws networks from boxes about A (Sec. 5.2). Half of their coefficients are negative:
#
# $$\Theta = \Theta_A + c \odot (\pi(\Theta_B) - \Theta_A), \qquad c_i \sim U[-s, s],\ i = 1, \dots, d.$$
#
# Such a box is A with uniform noise. A weight gets the more noise, the farther it is from the weight that it is matched
# with. The paper finds:
#
# * A quarter of the way beyond the ends, networks are as good as the ends on training images, and nearly so on test
#   images.
# * Aligned networks get worse far more slowly than networks that are not aligned.
# * Boxes about A work well up to $s = 0.25$.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig9,combine/fig10"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import extrapolation
from companion.figures.section import Section

section = Section(extrapolation, scale, items)
section.overview()

# %% [markdown]
# `restarts` is how often weight matching starts anew; the best matching counts. `samples` networks are drawn from each
# box; the paper does not print how many it draws.

# %%
import pandas as pd
import torch

import repairlib
from companion.experiments.mixtures import SCHEMES, combination_rows
from companion.experiments.pairs import load_pair, title_of
from companion.experiments.tables import works_up_to
from companion.figures.plots import combine as plots_combine
from repairlib.combine import box, elementwise
from repairlib.interpolate import with_state

grid = section.grid

# %% [markdown]
# ## What is sampled
#
# Two of the weights, with A at (0, 0) and B at (1, 1). The line runs through both corners. Every dot is a network of a
# box.

# %%
uniform = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
plots_combine.plane({f"$s$ = {s:g}": box(s, center=0)(uniform).tolist() for s in (0.125, 0.25, 0.5)})

# %% [markdown]
# A lies in the middle of every box. Even the largest reaches only half of the way to B.
#
# ## One pair, step by step
#
# B's units are put into A's order. They are matched by their weights, as in the paper's App. C. Then one network is
# made half of the way beyond B, and one is drawn from a box about A.

# %%
pair = load_pair(section.example(grid.resnet, grid.tiny))
matching = repairlib.match_weights(pair.a, pair.b, pair.calibration, start="identity", restarts=grid.restarts)
aligned_b = matching.apply(pair.b)
halfway_beyond = repairlib.interpolate_models(pair.a, aligned_b, 1.5)
drawn = elementwise(pair.a.state_dict(), aligned_b.state_dict(), box(0.25, center=0), seed=0)
pair.compare(A=pair.a, B=pair.b, halfway_beyond_B=halfway_beyond, box_about_A=with_state(pair.a, drawn))

# %% [markdown]
# ## Every pair of seeds
#
# The same is done for every two seeds, with the aligned B and with B as trained ("not aligned"). Without alignment the
# distances between weights are larger. So are the steps beyond the ends, and the noise. All networks are evaluated on
# the test set, those on the line on training images too.
#
# Coefficient 0 is model A everywhere, as in the text of the paper's sections. Its Eq. 1 multiplies A by the
# coefficient. There the axis of Fig. 9 would run the other way.

# %%
POINTS = {"extrapolation": grid.alphas, "centred": grid.half_edges}
SPLITS = {"extrapolation": ("test", "train"), "centred": ("test",)}
WM = {"matching": "WM", "restarts": grid.restarts}


def beyond_rows(pair, *schemes: str) -> list[dict]:
    """Networks of some schemes, each on its own points and splits."""
    how = {"samples": grid.samples, "train_images": grid.train_images}
    return [row for scheme in schemes
            for row in combination_rows(pair, {scheme: POINTS[scheme]}, splits=SPLITS[scheme], **how)]  # fmt: skip


def draw(table: pd.DataFrame):
    """Loss and accuracy against the parameter of each scheme."""
    by_label = {SCHEMES[scheme].xlabel: rows for scheme, rows in table.groupby("scheme", sort=False)}
    return plots_combine.beyond(by_label, title=title_of(table["run"].iloc[0]))


# %% [markdown]
# The line is summed up by the distance beyond its nearer end, $-\alpha$ or $\alpha - 1$, and boxes by their half edge
# $s$. Numbers are means over both ends and all pairs. `works_up_to` is the largest distance, or half edge, up to which
# mean accuracy stays within 5 points of its value at 0. (The paper does not say what "work well" means.) Of the train
# accuracy, which the paper calls virtually identical up to 0.25, one point counts.

# %%
SUFFIXES = {"WM": "", "none": "_not_aligned"}  # of names in summaries


def line_summary(table: pd.DataFrame) -> dict[str, float]:
    """How far beyond the ends networks work, and their accuracy (%) at some distances."""
    line = table[table["scheme"] == "extrapolation"].assign(beyond=(table["x"] - 0.5).abs() - 0.5)
    mean = line[line["beyond"] >= 0].groupby(["split", "matching", "beyond"])["accuracy"].mean()
    found = {f"works_up_to{SUFFIXES[matching]}": works_up_to(mean["test", matching]) for matching in SUFFIXES}
    found["train_unchanged_up_to"] = works_up_to(mean["train", "WM"], lost=0.01)
    return found | {f"{split}_accuracy_{x:g}{SUFFIXES[matching]}": 100 * accuracy
                    for (split, matching, x), accuracy in mean.items() if x in (0, 0.25, 0.5, 1)}  # fmt: skip


def box_summary(table: pd.DataFrame) -> dict[str, float]:
    """How large boxes may be, and loss (nats) and accuracy (%) of the aligned at some half edges."""
    boxes = table[table["scheme"] == "centred"]
    mean = boxes.groupby(["matching", "x"])[["loss", "accuracy"]].mean()
    found = {f"works_up_to{SUFFIXES[matching]}": works_up_to(mean["accuracy"][matching]) for matching in SUFFIXES}
    aligned = mean.loc["WM"] * [1, 100]
    return found | {f"{metric}_{s:g}": aligned[metric][s] for metric in aligned for s in (0, 0.25, 0.5)}


# %% [markdown]
# ## Beyond both ends (Fig. 9)

# %%
if fig := section.item("combine/fig9"):
    table = fig.measure(beyond_rows, "extrapolation", **WM)
    fig.save(table, draw(table), line_summary(table))

# %% [markdown]
# A quarter of the way beyond the ends costs aligned networks 1 or 2 points at `quick`, on test images as on training
# images. In the paper it costs next to nothing. The paper's other finding does not show at `quick`: half of the way out
# aligned networks lose 7 points and others 4, and all of the way out aligned ResNets lose more than others, too.
#
# Why? What A and B share cancels beyond the ends. Take unit vectors A and B with cosine $c$. Then $(1+t)A - tB$ has the
# length $1 + t - tc$ along A and $t\sqrt{1-c^2}$ across it. Alignment raises the cosine of these networks' weights from
# 0.2 to 0.5 (see Algorithm 1 in `04_2_hypercube`). At $t = 1$ the part across grows from 0.54 to 0.58 of the part along
# A. Layers are normalised, so only this ratio counts. The farthest aligned network is thus no less disturbed than the
# other one. It would be less disturbed from a cosine of 0.72 on.
#
# ## Boxes about model A (Fig. 10)

# %%
if fig := section.item("combine/fig10"):
    table = fig.measure(beyond_rows, "centred", **WM)
    fig.save(table, draw(table), box_summary(table))

# %% [markdown]
# The paper shows the loss only. At `quick` aligned networks work up to $s = 0.25$ and beyond. So do networks that are
# not aligned, but their loss rises faster: by $s = 0.5$ it has risen more than twice as far.
#
# ## Both for Tiny-10 (Figs. B.23 and B.24)

# %%
if fig := section.item("combine/figB23-B24"):
    table = fig.measure(beyond_rows, "extrapolation", "centred", **WM)
    summaries = {"line": line_summary(table), "box": box_summary(table)}
    named = {f"{part}_{name}": value for part, found in summaries.items() for name, value in found.items()}
    fig.save(table, draw(table), named)

# %% [markdown]
# Tiny-10s bear a little more. Half of the way beyond the ends they lose 3 points, aligned or not. All of the way out,
# aligned ones lose more than others again. The boxes look like those of the ResNets.
#
# ## Check
#
# Coefficient 0 is model A, aligned or not. Coefficient 1 is model B: the order of its units does not change its loss.
# Then come the paper's claims, and whether these figures show them.

# %%
for table in section.tables.values():
    at_a = table[table["x"] == 0].groupby(["scheme", "pair", "split"])["loss"].agg(["min", "max"])
    assert (at_a["max"] - at_a["min"] < 1e-5).all(), at_a
    at_b = table[(table["scheme"] == "extrapolation") & (table["x"] == 1)].groupby(["pair", "split"])["loss"]
    assert (at_b.max() - at_b.min() < 1e-4).all(), at_b.describe()
section.check()
