# %% [markdown]
# # Mode Combinability, Section 4.2: samples from the unit hypercube
#
# Every weight of a combined network lies between those of two models, each with a coefficient of its own
# (Csiszarik et al. 2023, Def. 3.2):
#
# $$\theta_i = (1-c_i)\,a_i + c_i\,b_i, \qquad c \in [0, 1]^d .$$
#
# Linear interpolation has all $c_i = \alpha$. Section 4.2 draws them at random, from four families of distributions
# with one parameter each. $b$ are the weights of model B after its units have been put in A's order by weight matching
# (Appendix C, *aligned*), or as they were trained (*not aligned*).
#
# The paper's networks are 32 times as wide as a ResNet-20 or Tiny-10 whose first layer has 16 channels, "if not noted
# otherwise"; of Tiny-10 it notes one width, 16 (Fig. 13), which is taken for all of Tiny-10's figures here.
#
# As everywhere here, coefficient 0 is A, as in the paper's text; its Eq. 1, $v \odot A + (1-v) \odot B$, has A and B
# the other way round, and figures drawn from it have their axes flipped. The paper does not say how many networks it
# drew at each value of the parameter: here it is `samples` networks for each pair, aligned and not.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig2,combine/tableA1"; empty: all
samples: int = 0  # networks drawn at each point; 0: as many as the scale has

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import by_scale, wanted

resnet, tiny, SEEDS, restarts = combined(scale)  # see the table below; every two seeds are a pair
points = by_scale(scale, smoke=3, quick=5, fast=25, paper=25)  # of the parameter, ends included
samples = samples or by_scale(scale, smoke=1, quick=2, fast=5, paper=10)
FIGURES = {
    "combine/fig2": "uniform",
    "combine/fig3": "subcube",
    "combine/fig4": "hyperplane",
    "combine/fig5": "bernoulli",
}
schemes = {  # by network
    resnet: [scheme for item, scheme in FIGURES.items() if wanted(item, items)],
    tiny: list(FIGURES.values()) if wanted("combine/figB15-B18", items) else [],
}
networks = [run for run in schemes if schemes[run] or wanted("combine/algorithm1", items)]
runs_of = {run: [f"{run}/s{seed}" for seed in SEEDS] for run in networks}
runs = [run for used in runs_of.values() for run in used]

# %%
import time

import pandas as pd
import torch
from torch import nn

from companion.experiments.mixtures import SCHEMES, coefficient_samples, combination_rows, mean_barriers, weight_rows
from companion.experiments.pairs import match_rows, pairs_of, title_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item
from companion.runs import models
from companion.runs.train import find_recipe, parse_run
from repairlib.combine import elementwise, extreme, stitch

overview()

# %% [markdown]
# ## Kinds of combinations (Fig. 1)
#
# Two made-up networks of three small layers, their weights uniform in $[0, 1]$, combined by the functions that combine
# trained ones below. A cell is a weight: its hue is the coefficient, its brightness how large it is. The distributions
# of the coefficients are those of the next section; *stitching* takes whole layers, *Max* and *Min* take of every two
# weights the one of larger or smaller magnitude.

# %%
torch.manual_seed(0)
a, b = ({f"layer {i}": torch.rand(4, 5, dtype=torch.float64) for i in (1, 2, 3)} for _ in "ab")
drawn = {"linear": 0.5, "uniform": 0.5, "subcube": 0.2, "hyperplane": 0.2, "bernoulli": 0.5}
toys = {"model A": a, "model B": b}
toys |= {f"{scheme} {x}": elementwise(a, b, SCHEMES[scheme].make(x), seed=1) for scheme, x in drawn.items()}
toys |= {"stitching 1 layer": stitch(a, b, 1, {name: (name,) for name in a})}
toys |= {f"{which.title()} model": extreme([a, b], which) for which in ("max", "min")}
cells = weight_rows(toys, a, b)

# %%
coefficient = pd.DataFrame(cells).groupby("network", sort=False)["coefficient"]
if wanted("combine/fig1", items):
    fig1 = {f"mean_coefficient_{name.replace(' ', '_')}": mean for name, mean in coefficient.mean().items()}
    figure = plots_combine.schematic(cells)
    save_item("combine/fig1", scale, cells, fig1, figure)
    print(pd.Series(fig1).round(3).to_string())

# %% [markdown]
# ## What is drawn
#
# All $c_i$ are independent, with the same distribution:
#
# * **uniform** on the cube about the midpoint (Sec. 4.2.1): $c_i \sim U[\frac12-s, \frac12+s]$, $s \in [0, \frac12]$.
#   At $s = 0$ it is the midpoint, at $s = \frac12$ the whole hypercube;
# * **sub-cube** (Sec. 4.2.2): $c_i \sim U[0, 2\alpha]$ if $\alpha \le \frac12$, else $U[2\alpha-1, 1]$;
# * **hyperplane** (Sec. 4.2.3): nearly uniform on $\{c \in [0, 1]^d : \frac1d \sum_i c_i = \alpha\}$, by the density
#   $$f(c) = \frac{r\,e^{-rc}}{1-e^{-r}} \text{ on } [0, 1], \quad\text{with $r$ such that}\quad
#   \frac1r - \frac1{e^r-1} = \alpha,$$
#   which is the same for all $c$ of one mean. The mean misses $\alpha$ by $O(1/\sqrt d)$;
# * **Bernoulli** (Sec. 4.2.4): $c_i = 1$ with probability $p$, else 0: every weight is A's or B's.
#
# The last three begin at A and end at B. Histograms of 100,000 coefficients, as the functions above draw them between
# $a = 0$ and $b = 1$; beyond a half, the last three are mirror images.

# %%
figure = plots_combine.coefficients(coefficient_samples(FIGURES.values()))

# %% [markdown]
# ## Measure
#
# All networks of a pair are evaluated together, on the test set.


# %%
def hypercube_rows(pair, schemes: list[str]) -> list[dict]:
    """Rows of networks drawn from some schemes, at every point of their grids, aligned and not."""
    seeds = {scheme: seed for seed, scheme in enumerate(FIGURES.values())}  # at a half, three are one distribution
    drawn = [combination_rows(pair, {scheme: SCHEMES[scheme].grid(points)}, samples, seed=seeds[scheme])
             for scheme in schemes]  # fmt: skip
    return [row for table in drawn for row in table]


rows, sweeps, seconds = {run: [] for run in networks}, [], {}
for run in networks:
    start = time.perf_counter()
    for name, pair in pairs_of(run, SEEDS, match="weights", restarts=restarts):
        of = {"model": str(parse_run(pair.runs[0]).model), "pair": name}
        rows[run] += [of | row for row in hypercube_rows(pair, schemes[run])]
        sweeps += [of | row for row in match_rows(pair)]
    seconds[run] = time.perf_counter() - start


# %% [markdown]
# The empirical barrier of a pair is the worst of all networks drawn from a scheme, at any value of its parameter,
# against the mean of the endpoints (Def. 3.3); what is saved are means over pairs, in nats and, as the paper prints
# them, as fractions of the test set (0.01 is a point). Bands go from the best to the worst network of all pairs.
#
# At `quick` (seeds 1 to 3) networks are narrower and shallower than the paper's and tell digits in disorder apart; they
# are trained with more weight decay (recipe `quick-csiszarik`). Aligned ones lose 4 to 6 points at worst
# in the first three kinds of combinations, which are hardest at a half, where all three are the whole hypercube;
# Bernoulli coefficients cost ResNets 19 points and Tiny-10s 9. Networks that are not aligned lose 70 points and more.


# %%
def save_scheme(item: str) -> None:
    """Draw and save the figure of one scheme between ResNets."""
    scheme = FIGURES[item]
    table = [row for row in rows[resnet] if row["scheme"] == scheme]
    mean = mean_barriers(table, ["scheme", "kind"]).loc[scheme]
    summary = {**mean.loc["permuted"], **mean.loc["naive"].add_suffix("_naive")}
    marks = {} if scheme == "uniform" else {0: "model A", 1: "model B"}
    figure = plots_combine.performance(table, xlabel=SCHEMES[scheme].xlabel, title=title_of(resnet), marks=marks)
    save_item(item, scale, table, summary, figure, runs=runs_of[resnet], seconds=seconds[resnet])
    print(mean.round(3).to_string())


# %% [markdown]
# ## Uniform about the midpoint (Fig. 2)
#
# The paper: loss barrier 0.044, accuracy barrier 0.012.

# %%
if wanted("combine/fig2", items):
    save_scheme("combine/fig2")

# %% [markdown]
# ## Sub-cubes (Fig. 3)
#
# The paper: 0.041 and 0.011.

# %%
if wanted("combine/fig3", items):
    save_scheme("combine/fig3")

# %% [markdown]
# ## The hyperplane (Fig. 4)
#
# The paper: 0.037 and 0.012.

# %%
if wanted("combine/fig4", items):
    save_scheme("combine/fig4")

# %% [markdown]
# ## Vertices (Fig. 5)
#
# The paper: 0.168 and 0.042.

# %%
if wanted("combine/fig5", items):
    save_scheme("combine/fig5")

# %% [markdown]
# ## Tiny-10 (Figs. B.15 to B.18)
#
# The same four families. The paper's barriers are 0.332, 0.32, 0.332 and, of Bernoulli coefficients, 0.767 nats; 0.07,
# 0.07, 0.071 and 0.194 in accuracy.

# %%
if wanted("combine/figB15-B18", items):
    mean = mean_barriers(rows[tiny], ["scheme", "kind"])
    figB15 = {
        f"{scheme}_{column.removesuffix('_barrier')}{'' if kind == 'permuted' else '_naive'}": value
        for (scheme, kind), row in mean.iterrows()
        for column, value in row.items()
    }
    xlabels = {scheme: SCHEMES[scheme].xlabel for scheme in FIGURES.values()}
    figure = plots_combine.performances(rows[tiny], xlabels, title=title_of(tiny))
    save_item("combine/figB15-B18", scale, rows[tiny], figB15, figure, runs=runs_of[tiny], seconds=seconds[tiny])
    print(mean.round(3).to_string())

# %% [markdown]
# ## Architecture and training (Table A.1, App. A)
#
# Tiny-10's layers, read off the network; the paper prints its channels at width 1, and neither strides nor padding:
# here the first convolution of each new width halves the map, and padding keeps its size. Both recipes are `csiszarik`,
# as in `cifar10/tiny10-ln-w16/csiszarik/s1`: a resize by 0.8 to 1.2 with a random crop of the original size, flips,
# rotations by up to 30 degrees. The warm-up of the ResNet begins at its first step and not at $10^{-6}$.


# %%
def layer_rows(net: nn.Sequential, here: nn.Sequential) -> list[dict]:
    """A row for each layer, its channels at width 1 and here, and what follows it."""
    rows = []
    for (name, layer), other in zip(net.named_children(), here.children(), strict=True):
        if isinstance(layer, nn.Conv2d):
            what = {"kernel": layer.kernel_size[0], "stride": layer.stride[0], "channels": layer.out_channels}
            rows.append({"part": "layer", "name": name, **what, "channels_here": other.out_channels, "then": ""})
        elif isinstance(layer, nn.AdaptiveAvgPool2d | nn.Linear):
            rows.append({"part": "layer", "name": "average pooling" if name == "pool" else "linear"})
        elif not isinstance(layer, nn.Flatten):
            rows[-1]["then"] += "LN-" if name.startswith("ln") else type(layer).__name__
    return rows


if wanted("combine/tableA1", items):
    nets = [models.build(name, (3, 32, 32), 10) for name in ("tiny10-ln", parse_run(f"{tiny}/s1").model)]
    tableA1_rows = layer_rows(*nets)
    columns = ("epochs", "batch_size", "lr", "schedule", "warmup_epochs", "momentum", "weight_decay")
    recipes = {name: find_recipe("csiszarik", f"{name}-ln", "cifar10") for name in ("tiny", "resnet")}
    tableA1_rows += [
        {"part": "recipe", "name": name, **{column: getattr(recipe, column) for column in columns}}
        | {"lr_divided_at": ", ".join(f"{at:.2f}" for at in recipe.milestones), "augment": "+".join(recipe.augment)}
        for name, recipe in recipes.items()
    ]
    tableA1 = {f"{column}_{name}": getattr(recipe, column) for name, recipe in recipes.items()
               for column in ("epochs", "lr", "batch_size", "weight_decay")}  # fmt: skip
    tableA1 |= {"convolutions": sum("kernel" in row for row in tableA1_rows)}
    save_item("combine/tableA1", scale, tableA1_rows, tableA1)
    print(pd.DataFrame(tableA1_rows).fillna("").to_string(index=False))

# %% [markdown]
# ## Weight matching (Algorithm 1, App. C)
#
# Every sweep solves one linear assignment for each layer, in random order, with all others held fixed:
#
# $$P_\ell \leftarrow \arg\max_P \Big\langle P,\; W^{(A)}_\ell P_{\ell-1} \big(W^{(B)}_\ell\big)^\top
#   + \big(W^{(A)}_{\ell+1}\big)^\top P_{\ell+1} W^{(B)}_{\ell+1} \Big\rangle ,$$
#
# until a sweep changes nothing. The algorithm is run once, from the order as trained; at `quick` and `fast` it is also
# run from random permutations, and what ends with the highest objective counts, as narrow networks may end in a poor
# optimum (`docs/combining.md` measures what it changes). A line for each pair: the objective relative to what it is
# between equal networks, $\langle\theta_A, P(\theta_B)\rangle / (|\theta_A|\,|\theta_B|)$, over all weights that a
# permutation moves; the short line at its left is without any permutation.

# %%
if wanted("combine/algorithm1", items):
    groups = pd.DataFrame(sweeps).groupby(["model", "pair"], sort=False)
    ends = groups.agg(as_trained=("as_trained", "first"), matched=("similarity", "last"), sweeps=("sweep", "last"))
    mean = ends.groupby(level="model", sort=False).mean()
    names = {"as_trained": "similarity_before", "matched": "similarity_after", "sweeps": "sweeps"}
    algorithm1 = {f"{names[column]}_{name}": value
                  for name, (_, row) in zip(("resnet", "tiny"), mean.iterrows(), strict=True)
                  for column, value in row.items()}  # fmt: skip
    figure, of = plots_combine.descents(sweeps), {"runs": runs, "seconds": sum(seconds.values())}
    save_item("combine/algorithm1", scale, sweeps, algorithm1, figure, **of)
    print(ends.round(3).to_string())

# %% [markdown]
# ## Check
#
# Of arithmetic: the made-up networks are what they are called; whatever the scheme, the network at 0 is A and at 1 it
# is B; matching never lowers its objective, and ends with a sweep that changes nothing; the table is the paper's.
#
# Of trained networks of digits, as means over pairs: aligned networks have less than half of the loss barrier of
# others, and Bernoulli coefficients the highest of the aligned.

# %%
hues = coefficient.unique()
for name in ("model A", "model B", "bernoulli 0.5", "stitching 1 layer", "Max model", "Min model"):
    assert set(hues[name]) <= {0, 1}, (name, hues[name])
assert abs(hues["linear 0.5"] - 0.5).max() < 1e-12, hues["linear 0.5"]
for table in filter(None, rows.values()):
    ends = pd.DataFrame(table).query("scheme != 'uniform' and x in (0, 1)").groupby(["pair", "x"])["loss"]
    assert (ends.max() - ends.min() < 1e-4).all(), ends.describe()
for _, path in pd.DataFrame(sweeps, columns=["model", "pair", "similarity"]).groupby(["model", "pair"])["similarity"]:
    converged = path.iloc[-1] == path.iloc[-2] or len(path) > 100
    assert path.is_monotonic_increasing and converged, path
if wanted("combine/tableA1", items):
    PRINTED = [(3, 16), (3, 16), (3, 32), (3, 32), (3, 32), (3, 64), (3, 64), (1, 64)]
    assert [(row["kernel"], row["channels"]) for row in tableA1_rows if "kernel" in row] == PRINTED
    keys = ("epochs", "batch_size", "lr", "schedule", "warmup_epochs", "momentum", "weight_decay", "lr_divided_at")
    assert [tuple(row[key] for key in keys) for row in tableA1_rows if row["part"] == "recipe"] == [
        (300, 100, 0.01, "step", 0.0, 0.9, 1e-4, "0.33, 0.67"), (250, 100, 0.1, "cosine", 1, 0.9, 1e-4, ""),
    ]  # fmt: skip

# %%
if scale == "quick":
    for run in filter(rows.get, networks):
        barrier = mean_barriers(rows[run], ["scheme", "kind"])["loss_barrier"].unstack("kind")
        assert (barrier["permuted"] < barrier["naive"] / 2).all(), (run, barrier)
        assert barrier["permuted"].idxmax() == "bernoulli" or set(schemes[run]) < set(FIGURES.values()), (run, barrier)
