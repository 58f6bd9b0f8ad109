# %% [markdown]
# # Mode Combinability, Sections 6.1 and 6.2: are the combined networks all the same?
#
# Combinations of aligned networks work. This would mean little if the two networks were nearly one and the same. Are
# they? (Csiszárik et al. 2023, Figs. 12, 13, B.25 and B.26.)
#
# A network between A and the aligned B takes each of its weights from the edge between two of theirs:
#
# $$\theta_i = (1-c_i)\,a_i + c_i\,\pi(b)_i, \qquad \text{length of the edge} = |a_i - \pi(b)_i|.$$
#
# The paper asks two questions:
#
# * On how many test images does it predict A's label only, B's only, both's or neither's (Sec. 6.1)?
# * How long are the edges (Sec. 6.2)?
#
# It finds that A and B give different labels to many images. Between A and B the labels change gradually. Many edges
# are near zero, but a significant part is not. The coefficients $c_i$ are independent, from one of five distributions:
#
# | scheme | coefficients | goes |
# |---|---|---|
# | linear | $c_i=\alpha$ | from A to B |
# | uniform | $c_i\sim U[\tfrac12-s,\tfrac12+s]$ | from the midpoint to the whole hypercube |
# | subcube | $c_i\sim U[0,2\alpha]$ if $\alpha\le\tfrac12$, else $U[2\alpha-1,1]$ | from A to B |
# | hyperplane | density $\propto e^{-rc}$ on $[0,1]$, with $r$ such that $\mathrm{E}\,c_i=\alpha$ | from A to B |
# | bernoulli | $c_i=1$ with probability $p$, else 0 | from A to B |
#
# Coefficient 0 is A, as everywhere here and as in the paper's text. Its Eq. 1 has A and B the other way round.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig12,combine/fig13"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import functional_difference
from companion.figures.section import Section

section = Section(functional_difference, scale, items)
section.overview()

# %% [markdown]
# `points` is the number of values of each scheme's parameter. `samples` networks are drawn at each of them; the paper
# does not print how many it draws.

# %%
import numpy as np
import pandas as pd

import repairlib
from companion.experiments.comparisons import edge_rows, label_agreement, label_rows
from companion.experiments.mixtures import COMPARED, RANDOM, SCHEMES, coefficient_samples
from companion.experiments.pairs import load_pair, title_of
from companion.figures.plots import combine as plots_combine
from repairlib.combine import bernoulli, elementwise
from repairlib.interpolate import interpolate_states

grid = section.grid

# %% [markdown]
# ## What is sampled
#
# The coefficients of the four random schemes, at three values of their parameters.

# %%
plots_combine.coefficients(coefficient_samples(RANDOM))

# %% [markdown]
# At 0.5 *subcube* and *hyperplane* draw from the whole hypercube, and so does *uniform*. *bernoulli* draws 0 and 1
# only.
#
# ## One pair, step by step
#
# B's units are put into A's order. They are matched by their weights, as in the paper's App. C. Then the labels of four
# networks are compared with those of A and B. Each line of the table counts the test images.

# %%
pair = load_pair(section.example(grid.resnet, grid.tiny))
matching = repairlib.match_weights(pair.a, pair.b, pair.calibration, start="identity", restarts=grid.restarts)
a, b, trained_b = (model.state_dict() for model in (pair.a, matching.apply(pair.b), pair.b))
networks = {
    "A": a,
    "halfway": interpolate_states(a, b, 0.5),
    "bernoulli, p = 0.5": elementwise(a, b, bernoulli(0.5), seed=0),
    "halfway, not aligned": interpolate_states(a, trained_b, 0.5),
}
counts = label_agreement(pair.a, networks.values(), (a, b), pair.test)
pd.DataFrame(counts, networks.keys())

# %% [markdown]
# A itself gives A's labels, of course. Halfway, most labels are still those of both A and B. A Bernoulli combination
# has more labels of its own. Without alignment, halfway, most labels are neither's.
#
# Now the edges of one layer, in units of the root mean square of its weights. Between networks that have nothing to do
# with each other the square of an edge is 2 on average.

# %%
layer = max((name for name in a if a[name].ndim > 1), key=lambda name: a[name].numel())  # the one with most weights
size = ((a[layer] ** 2 + b[layer] ** 2).mean() / 2).sqrt()
others = {"aligned": b, "not aligned": trained_b}
edges = {name: ((a[layer] - other[layer]).abs() / size).flatten().tolist() for name, other in others.items()}
edges = pd.DataFrame(edges)
short = 100 * (edges < 0.1).mean()
pd.DataFrame({"mean square": (edges**2).mean(), "median": edges.median(), "shorter than 0.1 (%)": short}).round(2)

# %% [markdown]
# ## Whose labels? (Figs. 12, B.25 and B.26)
#
# The same is done for every two seeds and all five schemes. The paper shows aligned networks only. Here the linear
# interpolation of networks that are not aligned stands beside that of aligned ones. The other schemes have no such
# panel: without alignment they leave nothing but "neither, wrong" (see `04_2_hypercube`).

# %%
LINEAR = [("linear", "WM"), ("linear", "none")]
ALL = [*LINEAR, *((scheme, "WM") for scheme in RANDOM)]
WM = {"matching": "WM", "restarts": grid.restarts}


def count_labels(network: dict, panels: list[tuple[str, str]]) -> pd.DataFrame:
    """Counts of labels: a row for each combination of every pair of a network, panel by panel."""
    found = []
    for scheme, matching in panels:
        for name, pair in section.pairs(network["run"], **WM):
            rows = label_rows(pair, scheme, SCHEMES[scheme].grid(grid.points), grid.samples, matching)
            found += [{"run": network["run"], "model": network["model"], "pair": name, **row} for row in rows]
    return pd.DataFrame(found)


# %%
def differences(table: pd.DataFrame) -> dict[str, float]:
    """Percent of the test images, means over pairs: where A and B differ, where A errs, and the midpoint's labels."""
    shares = plots_combine.agreement_shares(table).query("scheme == 'linear'")
    at_a = shares.query("x == 0 and matching == 'WM'")
    neither = shares.query("x == 0.5").groupby("matching")["neither"].mean()
    found = {"differ": at_a["a"].mean(), "least_differ": at_a["a"].min(), "a_wrong": at_a["wrong"].mean()}
    return found | {"midpoint_neither": neither["WM"], "midpoint_neither_not_aligned": neither["none"]}


# %%
if fig := section.item("combine/fig12"):
    table = count_labels(*fig.networks, ALL)
    fig.save(table, plots_combine.agreement(table, title=title_of(grid.resnet)), differences(table))

# %% [markdown]
# Panels of aligned networks begin where something happens. The dotted lines are the best and the worst of all networks.
# At $\alpha=0$ the network is A: what agrees with A only are the images on which A and B differ.
#
# At `quick` aligned ResNets are not the same. They differ on 2.7 % of the test images, and A errs on 3.8 %. Between A
# and B the labels change gradually. Halfway, 3 % of the images get neither's label; without alignment it is 66 %.
# Bernoulli coefficients, which take every weight from A or from B, leave the most images to neither.
#
# ## Whose labels, Tiny-10 (Figs. B.25 and B.26)

# %%
if fig := section.item("combine/figB25-B26"):
    panels = {grid.tiny: ALL, grid.resnet: LINEAR}
    tables = {network["run"]: count_labels(network, panels[network["run"]]) for network in fig.networks}
    table = pd.concat(tables.values())
    figure = plots_combine.agreement(table, title=", ".join(map(title_of, tables)))
    fig.save(table, figure, differences(tables.get(grid.tiny, table)))

# %% [markdown]
# The numbers are those of Tiny-10; those of the ResNet stand above. Tiny-10s differ on 2.6 % of the images, and A errs
# on 2.9 %. Halfway, 4 % get neither's label; without alignment it is 82 %.
#
# ## How far apart are the weights? (Fig. 13)
#
# Edges of Tiny-10, of all weights of its convolutions and of its linear layer. The paper's axis has absolute lengths.
# Here they are in units of the root mean square of the layer's weights, so that layers can be compared. Edges longer
# than 4 count in the last bin.


# %%
def edge_summary(table: pd.DataFrame) -> dict[str, float]:
    """Means over layers and pairs: the median edge, and the share (%) of edges below a tenth."""
    first = table[table["bin_low"] == 0].groupby("matching")[["median", "share"]].mean()
    medians = {"median": first["median"]["WM"], "median_not_aligned": first["median"]["none"]}
    short = 100 * first["share"]
    return medians | {"shorter_than_a_tenth": short["WM"], "shorter_than_a_tenth_not_aligned": short["none"]}


# %%
if fig := section.item("combine/fig13"):
    table = fig.measure(lambda pair: [row for each in COMPARED for row in edge_rows(pair, each)], **WM)
    fig.save(table, plots_combine.edges(table, title=title_of(grid.tiny)), edge_summary(table))

# %% [markdown]
# At `quick` aligned edges (blue) are somewhat shorter than others (grey): their median is four fifths as long. In most
# layers few weights have found an equal one. In the classifier and in the first layer many have.
#
# ## Check
#
# At $\alpha=0$ every label is A's, at $\alpha=1$ every label is B's. Shares of edges sum to one. Then come the paper's
# claims, and whether these figures show them.

# %%
for item in {"combine/fig12", "combine/figB25-B26"} & set(section.tables):
    shares = plots_combine.agreement_shares(section.tables[item]).query("scheme != 'uniform'")
    assert not shares.query("x == 0")[["b", "neither"]].any(axis=None), shares
    assert not shares.query("x == 1")[["a", "neither"]].any(axis=None), shares
if "combine/fig13" in section.tables:
    total = section.tables["combine/fig13"].groupby(["pair", "matching", "layer"])["share"].sum()
    assert np.allclose(total, 1), total
section.check()
