# %% [markdown]
# # Mode Combinability, Sections 5.1 and 5.2: beyond the hypercube
#
# With B's units in A's order, $\pi(\Theta_B)$, the straight line through both networks is followed beyond its ends,
#
# $$\Theta_\alpha = (1-\alpha)\,\Theta_A + \alpha\,\pi(\Theta_B), \qquad \alpha \in [-1, 2]$$
#
# (Csiszárik et al. 2023, Sec. 5.1, Fig. 9), and networks are drawn from boxes about A (Sec. 5.2, Fig. 10), half of
# whose coefficients are negative:
#
# $$\Theta = \Theta_A + c \odot (\pi(\Theta_B) - \Theta_A), \qquad c_i \sim U[-s, s],\ i = 1, \dots, d.$$
#
# Such a box is A with uniform noise, as large for a weight as the distance to the weight it is matched with. Both are
# drawn with $\Theta_B$ in the place of $\pi(\Theta_B)$ too ("not aligned"); there the distances are larger, and so are
# the steps and the noise. Coefficient 0 is model A everywhere. So it is in the text of the paper's sections; its Eq. 1
# multiplies A by the coefficient ($v$ there, $\lambda$ in the introduction), by which the axis of Fig. 9 would be the
# other way round. How many networks the paper draws for a point is not printed.
#
# Units are matched by weights (App. C).

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig9"; empty: all
samples: int = 0  # networks drawn for each point of a box; 0: the scale's

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import by_scale, wanted

resnet, tiny, SEEDS, restarts = combined(scale)  # see the table below; every two seeds are a pair
ALPHAS, EDGES = [-1 + i / 8 for i in range(25)], [i / 48 for i in range(25)]
grids = {
    "extrapolation": by_scale(
        scale, smoke=[-1, 0, 1, 2], quick=[-1, -0.5, -0.25, 0, 0.5, 1, 1.25, 1.5, 2], fast=ALPHAS, paper=ALPHAS
    ),
    "centred": by_scale(scale, smoke=[0, 0.25, 0.5], quick=[i / 8 for i in range(5)], fast=EDGES, paper=EDGES),
}
samples = samples or by_scale(scale, smoke=1, quick=2, fast=5, paper=10)
train_images = by_scale(scale, smoke=200, quick=200, fast=10000, paper=50000)  # that extrapolation is evaluated on

needs = {"combine/fig9": resnet, "combine/fig10": resnet, "combine/figB23-B24": tiny}
needs = {item: run for item, run in needs.items() if wanted(item, items)}
runs_of = {item: [f"{run}/s{seed}" for seed in SEEDS] for item, run in needs.items()}
runs = [run for used in runs_of.values() for run in used]

# %%
import time

import pandas as pd
import torch

from companion.experiments.mixtures import SCHEMES, combination_rows, works_up_to
from companion.experiments.pairs import pairs_of, title_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item

overview()

# %% [markdown]
# What is sampled, for two of the weights, with A at (0, 0) and B at (1, 1): every point is a network.

# %%
uniform = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
boxes = {f"$s$ = {s:g}": SCHEMES["centred"].make(s)(uniform).tolist() for s in (0.125, 0.25, 0.5)}
plots_combine.plane(boxes)

# %% [markdown]
# ## Measure
#
# Every two seeds are matched; the test set is used for all networks, and training images (`train_images` of
# them, without augmentation) for those on the line.

# %%
SPLITS = {"extrapolation": ("test", "train"), "centred": ("test",)}
used = {"combine/fig9": ["extrapolation"], "combine/fig10": ["centred"], "combine/figB23-B24": list(SPLITS)}


def rows_beyond(pair, schemes: list[str]) -> list[dict]:
    """Rows of some schemes, each on its own grid and splits."""
    options = {"samples": samples, "train_images": train_images}
    return [row for scheme in schemes
            for row in combination_rows(pair, {scheme: grids[scheme]}, splits=SPLITS[scheme], **options)]  # fmt: skip


tables, seconds = {}, {}
for item, run in needs.items():
    start, pairs = time.perf_counter(), pairs_of(run, SEEDS, match="weights", restarts=restarts)
    tables[item] = [{"model": run, "pair": name} | row for name, pair in pairs for row in rows_beyond(pair, used[item])]
    seconds[item] = time.perf_counter() - start


# %% [markdown]
# The line is summed up by the distance beyond its nearer end, $-\alpha$ or $\alpha - 1$: means over both ends and all
# pairs. `works_up_to` is the largest distance of the grid, or the largest half edge $s$ of it, up to which the mean of
# accuracy stays within 5 points of that of the ends, or of model A. (The paper says that aligned networks "work well"
# up to s = 0.25, and not what that means.)


# %%
SUFFIXES = {"permuted": "", "naive": "_naive"}  # of names in summaries


def beyond(item: str) -> dict[str, pd.DataFrame]:
    """Mean loss and accuracy by kind, of the line by split and distance beyond the ends, of boxes by half edge."""
    frame = pd.DataFrame(tables[item])
    line, boxes = (frame[frame["scheme"] == scheme] for scheme in ("extrapolation", "centred"))
    line = line[(line["x"] <= 0) | (line["x"] >= 1)]
    line = line.assign(x=(line["x"] - 0.5).abs() - 0.5)
    return {"line": line.groupby(["split", "kind", "x"])[["loss", "accuracy"]].mean(),
            "box": boxes.groupby(["kind", "x"])[["loss", "accuracy"]].mean()}  # fmt: skip


def line_summary(means: pd.DataFrame) -> dict[str, float]:
    """Of both kinds: how far the line works, and accuracy (in [0, 1]) at some distances."""
    found = {f"works_up_to{SUFFIXES[kind]}": works_up_to(means.accuracy["test", kind]) for kind in SUFFIXES}
    return found | {f"{split}_accuracy_{x:g}{SUFFIXES[kind]}": accuracy
                    for (split, kind, x), accuracy in means.accuracy.items() if x in (0, 0.25, 0.5, 1)}  # fmt: skip


def box_summary(means: pd.DataFrame) -> dict[str, float]:
    """How far boxes work, and loss (nats) and accuracy (in [0, 1]) of the aligned at some half edges."""
    found = {"works_up_to": works_up_to(means.accuracy["permuted"])}
    found["works_up_to_naive"] = works_up_to(means.accuracy["naive"])
    return found | {f"{metric}_{s:g}": means[metric]["permuted", s] for metric in means for s in (0, 0.25, 0.5)}


def save(item: str, summary: dict[str, float]) -> None:
    """Draw, print and save an item."""
    frame = pd.DataFrame(tables[item])
    by_label = {SCHEMES[scheme].xlabel: rows for scheme, rows in frame.groupby("scheme", sort=False)}
    figure = plots_combine.beyond(by_label, title=title_of(needs[item]))
    save_item(item, scale, frame, summary, figure, runs=runs_of[item], seconds=seconds[item])
    print(pd.Series(summary).round(3).to_string())


# %% [markdown]
# ## Linear extrapolation (Fig. 9)
#
# At `quick` (seeds 1 to 3) a quarter of the way beyond the ends costs aligned networks 1 or 2 points on average, on
# test images as on training images; in the paper next to nothing. Its other finding, that aligned networks degrade far
# slower than others, does not show: half of the way out both lose a few points, and all of the way out aligned ResNets
# lose more than others, aligned Tiny-10s (below) about as much.
#
# What A and B share cancels beyond the ends. Of unit vectors with cosine $c$, $(1+t)A - tB$ has the part $1 + t - tc$
# along A and $t\sqrt{1-c^2}$ across it. Alignment takes the cosine of these networks' weights from 0.2 to 0.5
# (Algorithm 1 in `04_2`), and at $t = 1$ what lies across from 0.54 to 0.58 of what lies along: in networks whose
# layers are normalised, which see the ratio only, the farthest aligned extrapolation is no smaller a disturbance than
# the other. It would be from a cosine of 0.72 on.

# %%
if wanted("combine/fig9", items):
    fig9 = line_summary(beyond("combine/fig9")["line"])
    save("combine/fig9", fig9)

# %% [markdown]
# ## Boxes about model A (Fig. 10)
#
# The paper shows the loss only. At `quick` aligned networks work up to s = 0.25 and beyond. So do others, whose loss
# rises faster nonetheless: by s = 0.5 more than twice as far.

# %%
if wanted("combine/fig10", items):
    fig10 = box_summary(beyond("combine/fig10")["box"])
    save("combine/fig10", fig10)

# %% [markdown]
# ## Both for Tiny-10 (Figs. B.23 and B.24)

# %%
if wanted("combine/figB23-B24", items):
    means = beyond("combine/figB23-B24")
    line, box = line_summary(means["line"]), box_summary(means["box"])
    figB23_B24 = {f"line_{name}": value for name, value in line.items()}
    figB23_B24 |= {f"box_{name}": value for name, value in box.items()}
    save("combine/figB23-B24", figB23_B24)

# %% [markdown]
# ## Check
#
# Coefficient 0 is model A, aligned or not; coefficient 1 is model B, whose units' order does not change its loss. Of
# trained networks of digits is asserted, as means over pairs: a quarter of the way beyond the ends costs less than 3
# points, a box with s = 0.25 too, and aligned boxes are better than others at s = 0.5.

# %%
for frame in map(pd.DataFrame, tables.values()):
    at = frame[frame["x"] == 0].groupby(["scheme", "pair", "split"])["loss"].agg(["min", "max"])
    assert len(at) and (at["max"] - at["min"] < 1e-5).all(), at
    at = frame[(frame["scheme"] == "extrapolation") & (frame["x"] == 1)]
    at = at.pivot_table("loss", ["pair", "split"], "kind")
    assert at.empty or (at.permuted - at.naive).abs().max() < 1e-4, at
if scale == "quick":
    for item in needs:
        means = beyond(item)
        if "extrapolation" in used[item]:
            lost = means["line"].accuracy.unstack("x")
            assert (lost[0] - lost[0.25] < 0.03).all(), lost
        if "centred" in used[item]:
            box = means["box"].unstack("kind")
            assert box.accuracy.permuted[0] - box.accuracy.permuted[0.25] < 0.03, box
            assert box.loss.permuted[0.5] < 0.8 * box.loss.naive[0.5], box
