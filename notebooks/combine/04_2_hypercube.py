# %% [markdown]
# # Mode Combinability, Section 4.2: samples from the unit hypercube
#
# Linear interpolation mixes all weights of two networks in the same proportion. Does every weight need the same one?
# (Csiszárik et al. 2023, Figs. 1 to 5 and B.15 to B.18.)
#
# The paper gives every weight a coefficient of its own (Def. 3.2):
#
# $$\theta_i = (1-c_i)\,a_i + c_i\,b_i, \qquad c \in [0, 1]^d .$$
#
# $a$ are the weights of model A. $b$ are those of model B, with B's units in A's order ("aligned") or as trained
# ("not aligned"). The coefficients are drawn at random, from four families of distributions. The paper finds:
#
# * Between wide aligned networks, whatever is drawn works.
# * Between networks that are not aligned, combinations fail.
# * The vertices of the hypercube, where every weight is A's or B's, are the hardest.
#
# Coefficient 0 is model A everywhere here, as in the paper's text. Its Eq. 1, $v \odot A + (1-v) \odot B$, has A and B
# the other way round.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig2,combine/tableA1"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import hypercube
from companion.figures.section import Section

section = Section(hypercube, scale, items)
section.overview()

# %% [markdown]
# `samples` networks are drawn at each of `points` values of a distribution's parameter. The paper does not print how
# many it draws. Its networks are 32 times as wide as a ResNet-20 or a Tiny-10 whose first layer has 16 channels, "if
# not noted otherwise". For Tiny-10 it notes one width, 16 (Fig. 13), which is taken for all of its figures here.
#
# At `quick`, networks are narrower and shallower, and the data are scikit-learn's digits made harder. More weight decay
# than the paper's makes the initial weights fade (recipe `quick-csiszarik`): small networks can be combined only then.

# %%
import pandas as pd
import torch
from IPython.display import display
from scipy.optimize import linear_sum_assignment
from torch import nn

import repairlib
from companion.experiments.architectures import layer_rows, recipe_rows
from companion.experiments.mixtures import RANDOM, SCHEMES, coefficient_samples, combination_rows, weight_rows
from companion.experiments.pairs import load_pair, title_of
from companion.experiments.rows import match_rows
from companion.experiments.tables import name_barriers
from companion.figures.plots import combine as plots_combine
from companion.runs import models, recipes
from repairlib import combine
from repairlib.interpolate import with_state

# %% [markdown]
# ## Kinds of combinations (Fig. 1)
#
# Two made-up networks of three small layers have weights that are uniform in $[0, 1]$. They are combined by the same
# functions as trained ones below. A cell is a weight. Its hue is the coefficient, its brightness is the weight's size.

# %%
grid = section.grid
torch.manual_seed(0)
a, b = ({f"layer {i}": torch.rand(4, 5, dtype=torch.float64) for i in (1, 2, 3)} for _ in "ab")
toys = {"model A": a, "model B": b}
for scheme, x in {"linear": 0.5, "uniform": 0.5, "subcube": 0.2, "hyperplane": 0.2, "bernoulli": 0.5}.items():
    toys[f"{scheme} {x}"] = combine.elementwise(a, b, SCHEMES[scheme].make(x), seed=1)
toys["stitching 1 layer"] = combine.stitch(a, b, 1, {name: (name,) for name in a})
toys |= {f"{which.title()} model": combine.extreme([a, b], which) for which in ("max", "min")}
cells = pd.DataFrame(weight_rows(toys, a, b))

# %%
if fig := section.item("combine/fig1"):
    mean = cells.groupby("network", sort=False)["coefficient"].mean()
    summary = {f"mean_coefficient_{name.replace(' ', '_')}": value for name, value in mean.items()}
    fig.save(cells, plots_combine.schematic(cells), summary)

# %% [markdown]
# *Uniform*, *subcube* and *hyperplane* mix every weight in another proportion. *Bernoulli* takes each weight from A or
# from B, *stitching* whole layers (Section 4.3). Of every two weights, *Max* takes the larger and *Min* the smaller
# (Section 4.5).
#
# ## Weight matching by hand (Algorithm 1, App. C)
#
# B's units are put into A's order by their weights. Layer by layer, in random order, the best permutation of one layer
# is found while all others stay as they are. It is a linear assignment problem:
#
# $$P_\ell \leftarrow \arg\max_P \Big\langle P,\; W^{(A)}_\ell P_{\ell-1}^\top \big(W^{(B)}_\ell\big)^\top
#   + b^{(A)}_\ell \big(b^{(B)}_\ell\big)^\top
#   + \big(W^{(A)}_{\ell+1}\big)^\top P_{\ell+1} W^{(B)}_{\ell+1} \Big\rangle .$$
#
# The algorithm ends when no layer changes any more. Here it is for an MLP.


# %%
def match_by_hand(a: list[nn.Linear], b: list[nn.Linear], seed: int = 0) -> list[torch.Tensor]:
    """Orders of B's inputs, hidden units and outputs: unit i of A's layer l goes with unit order[l][i] of B's."""
    order = [torch.arange(a[0].in_features), *(torch.arange(layer.out_features) for layer in b)]
    generator, changed = torch.Generator().manual_seed(seed), True
    while changed:
        changed = False
        for hidden in (1 + torch.randperm(len(a) - 1, generator=generator)).tolist():
            into, out_of = (a[hidden - 1], b[hidden - 1]), (a[hidden], b[hidden])
            gain = into[0].weight @ into[1].weight[:, order[hidden - 1]].T + torch.outer(into[0].bias, into[1].bias)
            gain += out_of[0].weight.T @ out_of[1].weight[order[hidden + 1]]
            best = torch.as_tensor(linear_sum_assignment(gain.numpy(), maximize=True)[1])
            changed |= not torch.equal(best, order[hidden])
            order[hidden] = best
    return order


# %% [markdown]
# `repairlib.match_weights` does the same for any network whose units it can trace, if it starts at the identity, the
# order of B's units as trained. (By default it starts higher, and ends higher in wide networks. The papers do not.) In
# double precision, rounding does not decide between two orders, so both find the same one.

# %%
mlp = load_pair([f"{grid.mlp}/s1", f"{grid.mlp}/s2"], device="cpu")
a, b = ([layer for layer in model.double().modules() if isinstance(layer, nn.Linear)] for model in (mlp.a, mlp.b))
with torch.no_grad():
    order = match_by_hand(a, b)
matching = repairlib.match_weights(mlp.a, mlp.b, mlp.calibration, start="identity")
assert all(map(torch.equal, order[1:-1], matching.permutation.values()))
print(matching)

# %% [markdown]
# ## How alike the weights become
#
# The same for all pairs of ResNets and Tiny-10s. The paper runs the algorithm once, from the order as trained. Narrow
# networks may end in a poor optimum. So at `quick` and `fast` it is also run from random orders, `restarts` times in
# all, and the best matching counts. (`docs/combining.md` measures what this changes.)

# %%
WM = {"matching": "WM", "restarts": grid.restarts}
if fig := section.item("combine/algorithm1"):
    table = fig.measure(match_rows, **WM)
    found = {"similarity_before": ("as_trained", "first"), "similarity_after": ("similarity", "last")}
    ends = table.groupby(["model", "pair"], sort=False).agg(**found, sweeps=("sweep", "last"))
    mean = ends.groupby(level="model", sort=False).mean()
    mean.index = ["resnet" if model.startswith("resnet") else "tiny" for model in mean.index]
    summary = {f"{column}_{name}": row[column] for name, row in mean.iterrows() for column in mean}
    fig.save(table, plots_combine.descents(table), summary)

# %% [markdown]
# A line is a pair. The similarity is $\langle\theta_A, P(\theta_B)\rangle / (|\theta_A|\,|\theta_B|)$, over all weights
# that a permutation moves. The short line at the left is that of the order as trained. Within a few sweeps matching
# more than doubles it at `quick`, from 0.2 to 0.5. It never falls.
#
# ## One combination by hand
#
# Now one pair of ResNets. Every weight gets a coefficient that is uniform in $[0, 2\alpha]$, the *sub-cube* of
# Section 4.2.2. At $\alpha = \frac12$ that is the whole hypercube. All three combinations have the same coefficients.

# %%
pair = load_pair(section.example(grid.resnet, grid.tiny, "digits-hard/tiny10-ln-w0.5/quick-csiszarik"))
matching = repairlib.match_weights(pair.a, pair.b, pair.calibration, start="identity", restarts=grid.restarts)
theta_a, theta_b = pair.a.state_dict(), matching.apply(pair.b).state_dict()
alpha, theta, generator = 0.5, {}, torch.Generator().manual_seed(0)
for name in sorted(theta_a):  # the library draws in this order, too
    c = 2 * alpha * torch.rand(theta_a[name].shape, generator=generator).to(theta_a[name])
    theta[name] = (1 - c) * theta_a[name] + c * theta_b[name]
drawn = combine.elementwise(theta_a, theta_b, combine.subcube(alpha), seed=0)
not_aligned = combine.elementwise(theta_a, pair.b.state_dict(), combine.subcube(alpha), seed=0)
torch.testing.assert_close(theta, drawn)
states = {"by_hand": theta, "by_the_library": drawn, "not_aligned": not_aligned}
pair.compare(A=pair.a, B=pair.b, **{name: with_state(pair.a, state) for name, state in states.items()})

# %% [markdown]
# ## What is drawn
#
# All $c_i$ are independent, with the same distribution:
#
# * **uniform** on the cube about the midpoint (Sec. 4.2.1): $c_i \sim U[\frac12-s, \frac12+s]$, $s \in [0, \frac12]$.
#   At $s = 0$ it is the midpoint, at $s = \frac12$ the whole hypercube.
# * **sub-cube** (Sec. 4.2.2): $c_i \sim U[0, 2\alpha]$ if $\alpha \le \frac12$, else $U[2\alpha-1, 1]$.
# * **hyperplane** (Sec. 4.2.3): nearly uniform on $\{c \in [0, 1]^d : \frac1d \sum_i c_i = \alpha\}$. Each coefficient
#   has the density $f(c) = r\,e^{-rc} / (1-e^{-r})$ on $[0, 1]$. The rate $r$ solves
#   $\frac1r - \frac1{e^r-1} = \alpha$, which makes $\alpha$ the mean of $f$. All vectors $c$ of one sum are equally
#   likely. The mean of a vector misses $\alpha$ by $O(1/\sqrt d)$.
# * **Bernoulli** (Sec. 4.2.4): $c_i = 1$ with probability $p$, else 0. Every weight is A's or B's.
#
# The last three begin at A and end at B. These are 100,000 coefficients of each. Beyond a half, the last three are
# mirror images.

# %%
plots_combine.coefficients(coefficient_samples(RANDOM))

# %% [markdown]
# At a half, *subcube* and *hyperplane* are the whole hypercube, and so is *uniform*. *bernoulli* draws 0 and 1 only.
#
# ## Every pair of seeds
#
# The empirical barrier of a pair is that of the worst of all networks drawn, at any value of the parameter, against the
# mean of the two endpoints (Def. 3.3). Numbers below are means over pairs, in nats and in points of test accuracy.
# Bands go from the best to the worst network of all pairs.


# %%
def draw(pair, *schemes: str) -> list[dict]:
    """Networks at every point of some schemes, aligned and not. Each scheme has uniform numbers of its own."""
    points = {scheme: SCHEMES[scheme].grid(grid.points) for scheme in schemes}
    return [row for scheme in schemes for row in
            combination_rows(pair, {scheme: points[scheme]}, grid.samples, seed=RANDOM.index(scheme))]  # fmt: skip


def make(fig, scheme: str) -> None:
    """Measure, draw and save the figure of one scheme."""
    table = fig.measure(draw, scheme, **WM)
    marks = {} if scheme == "uniform" else {0: "model A", 1: "model B"}
    names = {"xlabel": SCHEMES[scheme].xlabel, "title": title_of(grid.resnet), "marks": marks}
    fig.save(table, plots_combine.performance(table, **names), name_barriers(table))


# %% [markdown]
# ## Uniform about the midpoint (Fig. 2)

# %%
if fig := section.item("combine/fig2"):
    make(fig, "uniform")

# %% [markdown]
# Aligned networks lose 6 points at worst at `quick`, others 86. The larger the cube, the worse the aligned ones become.
# Those that are not aligned have lost most of their accuracy in the midpoint already.
#
# ## Sub-cubes (Fig. 3)

# %%
if fig := section.item("combine/fig3"):
    make(fig, "subcube")

# %% [markdown]
# The hardest sub-cube is the whole hypercube, at a half. It costs aligned networks 4 points at `quick`, others 77.
#
# ## The hyperplane (Fig. 4)

# %%
if fig := section.item("combine/fig4"):
    make(fig, "hyperplane")

# %% [markdown]
# At a half this is the whole hypercube once more. It costs aligned networks 6 points at `quick`, others 78.
#
# ## Vertices (Fig. 5)

# %%
if fig := section.item("combine/fig5"):
    make(fig, "bernoulli")

# %% [markdown]
# Vertices are the hardest, as in the paper. At `quick` they cost aligned networks 19 points, others 85. The paper's
# networks are wider: theirs lose 4 points.
#
# ## Tiny-10 (Figs. B.15 to B.18)

# %%
if fig := section.item("combine/figB15-B18"):
    table, summary = fig.measure(draw, *RANDOM, **WM), {}
    for scheme, rows in table.groupby("scheme", sort=False):
        barriers = name_barriers(rows).items()
        summary |= {f"{scheme}_{name.replace('_barrier', '')}": value for name, value in barriers}
    xlabels = {scheme: SCHEMES[scheme].xlabel for scheme in RANDOM}
    fig.save(table, plots_combine.performances(table, xlabels, title=title_of(grid.tiny)), summary)

# %% [markdown]
# Tiny-10s are drawn from the same four families. At `quick` aligned ones lose 5 or 6 points, and 9 at vertices. Others
# lose more than 80. The paper's Tiny-10s, too, lose the most at vertices.
#
# ## Architecture and training (Table A.1, App. A)
#
# Tiny-10's layers are read off the network. The paper prints its channels at width 1, and neither strides nor padding:
# here the first convolution of each new width halves the map, and padding keeps its size. Both recipes are `csiszarik`,
# as in `cifar10/tiny10-ln-w16/csiszarik/s1`. Images are resized by 0.8 to 1.2 and cropped to their size, flipped, and
# turned by up to 30 degrees. The warm-up of the ResNet begins at its first step and not at $10^{-6}$.

# %%
if fig := section.item("combine/tableA1"):
    layers = layer_rows(*(models.build(name, (3, 32, 32), 10) for name in ("tiny10-ln", grid.tiny.split("/")[1])))
    kinds = {"tiny": "tiny-ln", "resnet": "resnet-ln"}
    trained = recipe_rows({name: recipes.find_recipe("csiszarik", kind, "cifar10") for name, kind in kinds.items()})
    columns = ("epochs", "lr", "batch_size", "weight_decay")
    summary = {f"{column}_{row['name']}": row[column] for row in trained for column in columns}
    fig.save([*layers, *trained], summary=summary | {"convolutions": sum("kernel" in row for row in layers)})
    display(pd.DataFrame(layers).convert_dtypes().astype(object).fillna(""), pd.DataFrame(trained).T)

# %% [markdown]
# ## Check
#
# First arithmetic: whatever the scheme, the network at 0 is A and the one at 1 is B, in whichever order B's units are.
# Matching never lowers its objective, and its last sweep changes nothing. The coefficients of the made-up networks are
# those of their schemes. Then what the paper claims of these figures, and what ours show.

# %%
tables = {item: section.tables[item] for item in section.tables if "x" in section.tables[item]}
for table in tables.values():
    ends = table[(table["scheme"] != "uniform") & table["x"].isin([0, 1])].groupby(["pair", "x"])["loss"]
    assert (ends.max() - ends.min() < 1e-4).all(), ends.describe()
if "combine/algorithm1" in section.tables:
    for _, path in section.tables["combine/algorithm1"].groupby(["model", "pair"])["similarity"]:
        assert path.is_monotonic_increasing and (path.iloc[-1] == path.iloc[-2] or len(path) > 100), path
hues = cells.groupby("network")["coefficient"].agg(set)
for name in ("model A", "model B", "bernoulli 0.5", "stitching 1 layer", "Max model", "Min model"):
    assert hues[name] <= {0, 1}, (name, hues[name])
assert max(abs(hue - 0.5) for hue in hues["linear 0.5"]) < 1e-12

# %%
section.check()
