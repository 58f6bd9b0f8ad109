# %% [markdown]
# # Mode Combinability, Sections 6.1 and 6.2: are the combined networks all the same?
#
# Combinations that work would be nothing to speak of if the aligned networks $A$ and $\pi(B)$ were one network. Two
# things are measured here: on how many test images a combined network predicts A's label only, B's only, both's or
# neither's, and how far apart A's and B's weights are,
#
# $$\theta_i = (1-c_i)\,a_i + c_i\,\pi(b)_i, \qquad \text{edge } i = |a_i - \pi(b)_i|$$
#
# (Csiszarik et al. 2023, Secs. 6.1, 6.2 and B.7). Units are matched by weights, as in the paper's App. C. The
# coefficients $c_i$ are independent, from one of five distributions:
#
# | scheme | coefficients | goes |
# |---|---|---|
# | linear | $c_i=\alpha$ | from A to B |
# | uniform | $c_i\sim U[\tfrac12-s,\tfrac12+s]$ | from the midpoint to the whole hypercube |
# | subcube | $c_i\sim U[0,2\alpha]$ if $\alpha\le\tfrac12$, else $U[2\alpha-1,1]$ | from A to B |
# | hyperplane | density $\propto e^{-rc}$ on $[0,1]$, with $r$ such that $\mathrm{E}\,c_i=\alpha$ | from A to B |
# | bernoulli | $c_i=1$ with probability $p$, else 0 | from A to B |
#
# As everywhere here, coefficient 0 is A, as in the paper's text; its Eq. 1 has A and B the other way round.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig12"; empty: all
samples: int = 0  # networks at each point of a random scheme, which the paper does not print; 0: the scale's

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import by_scale, wanted

resnet, tiny, SEEDS, restarts = combined(scale)  # see the table below; every two seeds are a pair
points = by_scale(scale, smoke=3, quick=5, fast=25, paper=25)  # of each scheme's parameter, ends included
samples = samples or by_scale(scale, smoke=1, quick=1, fast=5, paper=10)

networks = {"combine/fig12": [resnet], "combine/fig13": [tiny], "combine/figB25-B26": [tiny, resnet]}
networks = {item: used for item, used in networks.items() if wanted(item, items)}
runs_of = {item: [f"{run}/s{seed}" for run in used for seed in SEEDS] for item, used in networks.items()}
runs = [run for used in runs_of.values() for run in used]

# %%
import functools
import time

import numpy as np
import pandas as pd

from companion.experiments.comparisons import edge_rows, label_rows
from companion.experiments.mixtures import KINDS, SCHEMES, coefficient_samples
from companion.experiments.pairs import pairs_of, title_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item

overview()

# %%
every = dict.fromkeys(run for used in networks.values() for run in used)
pairs = {run: dict(pairs_of(run, SEEDS, match="weights", restarts=restarts)) for run in every}

# %% [markdown]
# What is sampled: the coefficients of the four random schemes, at three values of their parameters.

# %%
SAMPLED = ("uniform", "subcube", "hyperplane", "bernoulli")
figure = plots_combine.coefficients(coefficient_samples(SAMPLED))

# %% [markdown]
# ## Whose labels? (Fig. 12, B.25 and B.26)
#
# Counted on all test images. The paper shows aligned networks only; here their linear interpolation stands beside that
# of networks which are not aligned. (The other schemes have no such panel: of networks that are not aligned they leave
# nothing but "neither, wrong", see `04_2`.) At $\alpha=0$ the network is A, and what agrees with A only are the images
# on which A and B differ. Panels of aligned networks begin where something happens, dotted lines are the best and the
# worst of all networks there.
#
# At `quick` (seeds 1 to 3) aligned networks are not the same: ResNets differ on 2.7 % of the test images and Tiny-10s
# on 2.6 % (1.5 % in the least of all pairs), where A errs on 3.8 % and 2.9 %. Halfway between A and B 3 to 4 % of the
# images get neither's label; without alignment 66 % and 82 % do.

# %%
LINEAR = (("permuted", "linear"), ("naive", "linear"))
SUFFIXES = {"permuted": "", "naive": "_naive"}  # of names in summaries
ALL = (*LINEAR, *(("permuted", scheme) for scheme in SAMPLED))


@functools.cache  # an item of several networks shares what another has counted
def agreement_rows(run: str, kind: str, scheme: str) -> list[dict]:
    """Counts of labels: a row for each network of a kind and scheme."""
    model, grid = run.split("/")[1].split("-")[0], SCHEMES[scheme].grid(points)
    return [{"model": model, "pair": name} | row for name, pair in pairs[run].items()
            for row in label_rows(pair, scheme, grid, samples, kind)]  # fmt: skip


def differences(table: list[dict]) -> dict[str, float]:
    """Percent of the test images, means over pairs: where A and B differ, where A errs, and the midpoint's labels."""
    shares = plots_combine.agreement_shares(table).query("scheme == 'linear'")
    at_a, middle = shares.query("x == 0 and kind == 'permuted'"), shares.query("x == 0.5").groupby("kind").mean(True)
    out = {"differ": at_a["a"].mean(), "least_differ": at_a["a"].min(), "a_wrong": at_a["wrong"].mean()}
    return out | {f"midpoint_neither{suffix}": middle["neither"][kind] for kind, suffix in SUFFIXES.items()}


# %%
tables, summaries = {}, {}
if wanted("combine/fig12", items):
    start = time.perf_counter()
    tables["combine/fig12"] = table = [row for panel in ALL for row in agreement_rows(resnet, *panel)]
    summaries["combine/fig12"] = fig12 = differences(table)
    figure = plots_combine.agreement(table, title=title_of(resnet))
    of = {"runs": runs_of["combine/fig12"], "seconds": time.perf_counter() - start}
    save_item("combine/fig12", scale, table, fig12, figure, **of)
    print({name: round(value, 1) for name, value in fig12.items()})

# %% [markdown]
# The summary of Figs. B.25 and B.26 is Tiny-10's; that of the ResNet is Fig. 12's.

# %%
if wanted("combine/figB25-B26", items):
    start = time.perf_counter()
    of_tiny = [row for panel in ALL for row in agreement_rows(tiny, *panel)]
    of_resnet = [row for panel in LINEAR for row in agreement_rows(resnet, *panel)]
    tables["combine/figB25-B26"] = table = of_tiny + of_resnet
    summaries["combine/figB25-B26"] = b25 = differences(of_tiny)
    figure = plots_combine.agreement(table, title=f"{title_of(tiny)}, {title_of(resnet)}")
    of = {"runs": runs_of["combine/figB25-B26"], "seconds": time.perf_counter() - start}
    save_item("combine/figB25-B26", scale, table, b25, figure, **of)
    print({name: round(value, 1) for name, value in b25.items()})

# %% [markdown]
# ## How far apart are the weights? (Fig. 13)
#
# Edges of the hyperrectangle of Tiny-10: lengths $|a_i-\pi(b)_i|$ of all weights of its convolutions and of its linear
# layer, in units of the root mean square of that layer's weights, so that layers can be compared; their biases and
# normalisations are left out. (The paper's axis has absolute lengths.) What is longer than 4 counts in the last bin.
# The grey line is the same without alignment. At `quick` the median of aligned edges is four fifths of that of others:
# in most layers, few weights have found an equal one; the classifier's and the first layer's have.

# %%
if wanted("combine/fig13", items):
    start = time.perf_counter()
    edges = [{"pair": which} | row for which, pair in pairs[tiny].items() for kind in KINDS
             for row in edge_rows(pair, kind)]  # fmt: skip
    shortest = pd.DataFrame(edges).query("bin_low == 0")  # one row for each layer of each pair
    mean = shortest.groupby("kind")[["median", "share"]].mean()
    fig13 = {f"median{suffix}": mean["median"][kind] for kind, suffix in SUFFIXES.items()}
    fig13 |= {f"shorter_than_a_tenth{suffix}": mean["share"][kind] for kind, suffix in SUFFIXES.items()}
    figure = plots_combine.edges(edges, title=title_of(tiny))
    of = {"runs": runs_of["combine/fig13"], "seconds": time.perf_counter() - start}
    save_item("combine/fig13", scale, edges, fig13, figure, **of)
    print({name: round(value, 2) for name, value in fig13.items()})

# %% [markdown]
# ## Check
#
# At $\alpha=0$ every label is A's, at $\alpha=1$ B's. Asserted of trained digits networks: A and B differ on a third as
# many labels as A errs on at least; of the labels that become neither's halfway, alignment keeps more than half from
# it; aligned edges are shorter than others, but more than half as long.

# %%
for table in tables.values():
    shares = plots_combine.agreement_shares(table).query("scheme != 'uniform'")
    assert not shares.query("x == 0")[["b", "neither"]].any(axis=None), shares
    assert not shares.query("x == 1")[["a", "neither"]].any(axis=None), shares
if wanted("combine/fig13", items):
    total = pd.DataFrame(edges).groupby(["pair", "kind", "layer"])["share"].sum()
    assert np.allclose(total, 1), total
if scale == "quick":
    for found in summaries.values():
        assert found["midpoint_neither"] < found["midpoint_neither_naive"] / 2, found
        assert found["differ"] > found["a_wrong"] / 3, found
    if wanted("combine/fig13", items):
        assert fig13["median_naive"] / 2 < fig13["median"] < fig13["median_naive"], fig13
