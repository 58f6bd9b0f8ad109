# %% [markdown]
# # Mode Combinability, Section 4.4: how wide networks have to be
#
# The worst network of every scheme against the width of the networks (Csiszarik et al. 2023, Sec. 4.4, Figs. 7 and
# B.21): with coefficients $c_i$ of element-wise combinations $\theta_i = (1-c_i)\,a_i + c_i\,b_i$ drawn from
#
# | scheme | coefficients | $x$ |
# |---|---|---|
# | linear | $c_i = x$ | $0 \dots 1$ |
# | uniform | uniform on $[\frac12-x, \frac12+x]$ | $0 \dots \frac12$ |
# | subcube | uniform on $[0, 2x]$ if $x \le \frac12$, else on $[2x-1, 1]$ | $0 \dots 1$ |
# | hyperplane | density $\propto e^{-rc}$ on $[0, 1]$, with the rate $r$ that gives it the mean $x$ | $0 \dots 1$ |
# | bernoulli | 1 with probability $x$, else 0 | $0 \dots 1$ |
# | stitching | 0 in the first $x$ layers, 1 in the others | $0 \dots$ all |
#
# the empirical barrier of a scheme is (Def. 3.3)
#
# $$\max_j L(\theta^{(j)}) - \tfrac12\big[L(a) + L(b)\big]$$
#
# over all $\theta^{(j)}$ drawn at all $x$, and likewise in accuracy. The paper finds that aligned networks can be
# combined by every scheme if they are wide enough, and that they have to be.
#
# As everywhere here, coefficient 0 is A, as in the paper's text; its Eq. 1 has A and B the other way round.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig7"; empty: all
samples: int = 0  # networks drawn at each x; 0: the scale's. The paper does not print its number

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import by_scale, wanted

SEEDS, restarts = combined(scale).seeds, combined(scale).restarts  # every two seeds are a pair
SEEDS = by_scale(scale, smoke=SEEDS, quick=SEEDS, fast=SEEDS, paper=SEEDS[:2])
multipliers = by_scale(scale, smoke=[0.125, 0.25], quick=[0.5, 1, 2], fast=[1, 2, 4], paper=[1, 2, 4, 8, 16, 32])
widths = {"combine/fig7": multipliers, "combine/figB21": [width for width in multipliers if width <= 16]}
points = by_scale(scale, smoke=3, quick=5, fast=25, paper=25)  # values of x
samples = samples or by_scale(scale, smoke=1, quick=1, fast=5, paper=10)

which = {"combine/fig7": "resnet", "combine/figB21": "tiny"}
networks = {item: {width: getattr(combined(scale, width), model) for width in widths[item]}
            for item, model in which.items() if wanted(item, items)}  # fmt: skip
runs_of = {item: [f"{run}/s{seed}" for run in found.values() for seed in SEEDS] for item, found in networks.items()}
runs = [run for found in runs_of.values() for run in found]

# %%
import time

import pandas as pd

from companion.experiments.mixtures import (
    SCHEMES,
    coefficient_samples,
    combination_rows,
    sample_barriers,
    stitching_rows,
)
from companion.experiments.pairs import pairs_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item

overview()

# %% [markdown]
# What is drawn: coefficients of the four random schemes, at three values of $x$.

# %%
RANDOM = ("uniform", "subcube", "hyperplane", "bernoulli")
figure = plots_combine.coefficients(coefficient_samples(RANDOM))

# %% [markdown]
# ## Barriers
#
# Every two seeds of every width, with B's units in A's order; and, to compare with, the straight line between A and B
# as trained (`04_2` and `04_3` have all schemes without alignment). At $x = \frac12$ the uniform scheme, the sub-cube
# and the hyperplane are one, and so are their networks, as all schemes are given the same uniform numbers.

# %%
grids = {scheme: SCHEMES[scheme].grid(points) for scheme in ("linear", *RANDOM)}


def width_rows(pair) -> list[dict]:
    """Barriers of every scheme."""
    rows = combination_rows(pair, grids, samples, kinds=("permuted",))
    rows += combination_rows(pair, {"linear": grids["linear"]}, kinds=("naive",))
    rows += [{"scheme": "stitching"} | row for row in stitching_rows(pair, kinds=("permuted",))]
    return sample_barriers(rows)


tables, seconds = {}, {}
for item, found in networks.items():
    start, tables[item] = time.perf_counter(), []
    for width, run in found.items():
        pairs = pairs_of(run, SEEDS, match="weights", restarts=restarts)
        of = {"model": run.split("/")[1].partition("-w")[0], "width": width}
        tables[item] += [of | {"pair": name} | row for name, pair in pairs for row in width_rows(pair)]
    seconds[item] = time.perf_counter() - start


# %%
def save_widths(item: str) -> None:
    """Draw and save one figure, and print the means over pairs."""
    frame = pd.DataFrame(tables[item])
    barriers = ["loss_barrier", "accuracy_barrier"]
    means = frame.groupby(["scheme", "kind", "width"], sort=False)[barriers].mean().unstack("width")
    aligned = means.xs("permuted", level="kind")
    narrow, wide = widths[item][0], widths[item][-1]
    summary = {f"{scheme}_{barrier}_{width:g}x": aligned.loc[scheme, (barrier, width)]
               for barrier in barriers for scheme in aligned.index for width in (narrow, wide)}  # fmt: skip
    title = f"{frame['model'][0]} on {networks[item][wide].split('/')[0]}"
    figure = plots_combine.widths(frame, title=title)
    save_item(item, scale, frame, summary, figure, runs=runs_of[item], seconds=seconds[item])
    print(means.round(3).to_string())


# %% [markdown]
# ## ResNet (Fig. 7)

# %%
if wanted("combine/fig7", items):
    save_widths("combine/fig7")

# %% [markdown]
# ## Tiny-10 (Fig. B.21)

# %%
if wanted("combine/figB21", items):
    save_widths("combine/figB21")

# %% [markdown]
# ## Check
#
# At every scale there is a barrier for each scheme, width and pair. Of trained digits networks is asserted that
# barriers in accuracy of aligned networks fall to less than 0.7 of themselves from the least to the greatest width, as
# means over pairs, those of every scheme.

# %%
for item, table in tables.items():
    frame = pd.DataFrame(table)
    pairs = len(SEEDS) * (len(SEEDS) - 1) // 2
    assert len(frame) == 7 * pairs * len(widths[item]), frame  # the straight line twice
    aligned = frame[frame["kind"] == "permuted"].groupby(["scheme", "width"])["accuracy_barrier"].mean().unstack()
    if scale == "quick":
        assert (aligned.iloc[:, -1] < 0.7 * aligned.iloc[:, 0]).all(), aligned
