# %% [markdown]
# # Mode Combinability, Section 4.4: how wide networks have to be
#
# Wide aligned networks can be combined in many ways. How wide do they have to be? (Csiszárik et al. 2023, Figs. 7 and
# B.21.)
#
# Element-wise combinations $\theta_i = (1-c_i)\,a_i + c_i\,b_i$ have coefficients of one of these schemes:
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
# The barrier of a scheme is that of the worst network that it draws, at any $x$ (Def. 3.3):
#
# $$\max_j L(\theta^{(j)}) - \tfrac12\big[L(a) + L(b)\big],$$
#
# and likewise in accuracy. The paper finds that aligned networks can be combined by every scheme if they are wide
# enough. Narrow networks cannot. (Coefficient 0 is A, as in the paper's text; its Eq. 1 has A and B the other way
# round.)

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig7"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import width
from companion.figures.section import Section

section = Section(width, scale, items)
section.overview()

# %% [markdown]
# `resnet` and `tiny` are the networks of the other notebooks. Here they come in all `widths`. At width 1 the first
# layer has 16 channels. `samples` networks are drawn at each of `points` values of $x$. The paper does not print how
# many it draws.

# %%
import pandas as pd
from IPython.display import display

import repairlib
from companion.experiments.mixtures import RANDOM, coefficient_samples, scheme_barriers
from companion.experiments.pairs import load_pair
from companion.figures.plots import combine as plots_combine
from repairlib import combine
from repairlib.interpolate import with_state

grid = section.grid

# %% [markdown]
# ## What is drawn
#
# Coefficients of the four random schemes, at three values of $x$.

# %%
plots_combine.coefficients(coefficient_samples(RANDOM))

# %% [markdown]
# At $x = \frac12$ *uniform*, *subcube* and *hyperplane* are the whole hypercube. *bernoulli* draws 0 and 1 only.
#
# ## One pair of each width, step by step
#
# B's units are put into A's order. Weight matching starts `restarts` times, and the best matching counts. One network
# is drawn from the whole hypercube, and one from its vertices.

# %%
DRAWN = {"hypercube": combine.subcube(0.5), "vertex": combine.bernoulli(0.5)}
found = {}
for network in grid.networks(["combine/figB21"]):
    pair = load_pair(section.example(network["run"]))
    matching = repairlib.match_weights(pair.a, pair.b, pair.calibration, start="identity", restarts=grid.restarts)
    ends = pair.a.state_dict(), matching.apply(pair.b).state_dict()
    networks = {name: with_state(pair.a, combine.elementwise(*ends, how, seed=0)) for name, how in DRAWN.items()}
    found[network["width"]] = pair.compare(A=pair.a, B=pair.b, **networks)["accuracy (%)"]
pd.DataFrame(found).rename_axis(columns="accuracy (%) at width")

# %% [markdown]
# The wider the networks, the less both lose. A vertex is harder at every width.
#
# ## Every pair of seeds, every scheme
#
# Now all schemes between aligned networks. The straight line between networks as trained stands beside them. (`04_2`
# and `04_3` have all schemes without alignment.) All schemes are given the same uniform numbers. So the networks of the
# uniform scheme, the sub-cube and the hyperplane are the same at $x = \frac12$.


# %%
def make(fig) -> None:
    """Measure, draw and save the barriers of every scheme against width, and show their means over pairs."""
    table = fig.measure(scheme_barriers, grid.points, grid.samples, matching="WM", restarts=grid.restarts)
    measures, narrow, wide = ["loss_barrier", "accuracy_barrier"], table["width"].min(), table["width"].max()
    in_words = table.replace({"matching": {"WM": "aligned", "none": "not aligned"}})
    mean = in_words.groupby(["matching", "scheme", "width"], sort=False)[measures].mean() * [1, 100]
    summary = {f"{scheme}_{measure}_{size:g}x": mean.loc[("aligned", scheme, size), measure] for measure in measures
               for scheme in mean.loc["aligned"].index.unique("scheme") for size in (narrow, wide)}  # fmt: skip
    title = f"{table['model'][0]} on {table['run'][0].split('/')[0]}"
    fig.save(table, plots_combine.widths(table, title=title), summary)
    display(mean.rename(columns={measures[0]: "loss barrier (nats)", measures[1]: "accuracy barrier (points)"})
            .unstack("width").round(2))  # fmt: skip


# %% [markdown]
# ## ResNet (Fig. 7)

# %%
if fig := section.item("combine/fig7"):
    make(fig)

# %% [markdown]
# Every barrier falls with width. At `quick`, from half the width to twice the width, the straight line falls from 30
# points to 1, the hypercube (*uniform*, *subcube*, *hyperplane*) from 62 to 2. Vertices need more width: *bernoulli*
# falls from 68 to 17 points, *stitching* from 69 to 21.
#
# ## Tiny-10 (Fig. B.21)

# %%
if fig := section.item("combine/figB21"):
    make(fig)

# %% [markdown]
# Tiny-10s show the same. At twice the width the worst scheme costs 9 points at `quick`.
#
# ## Check
#
# There is one barrier for each scheme, width and pair. Then what the paper claims of these figures, and what ours show.

# %%
for table in section.tables.values():
    pairs = table[["width", "pair"]].drop_duplicates()
    assert len(table) == 7 * len(pairs), table  # six schemes, and the straight line once more
section.check()
