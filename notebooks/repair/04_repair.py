# %% [markdown]
# # REPAIR, Section 4: restoring the statistics of interpolated networks
#
# The average of two networks has too little variance in its hidden layers (`03_variance_collapse`). REPAIR
# (REnormalizing Permuted Activations for Interpolation Repair) gives it back. How does it work, how deep may networks
# be, and how many images does it need? (Jordan et al. 2022, Sec. 4, Fig. 3.)
#
# There are two steps. First the units of B are put into A's order. Unit $i$ of A is matched with unit $P(i)$ of B, so
# that the activations of matched units correlate as much as possible (Eq. 2):
#
# $$\max_P \sum_i \operatorname{corr}\big(X_{1,i},\; X_{2,P(i)}\big).$$
#
# Then the networks are averaged, and each channel of the average receives the mean and the standard deviation that lie
# between those of its endpoints (Eqs. 3 and 4):
#
# $$\mathbb E[X_\alpha] = (1-\alpha)\,\mathbb E[X_1] + \alpha\,\mathbb E[X_2], \qquad
#   \operatorname{std}(X_\alpha) = (1-\alpha)\operatorname{std}(X_1) + \alpha\operatorname{std}(X_2).$$

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig3-right,repair/samples"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.repair import repair
from companion.figures.section import Section

section = Section(repair, scale, items)
section.overview()

# %%
import copy

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import repairlib
from companion.experiments.pairs import load_pair, title_of
from companion.experiments.rows import equal_steps
from companion.experiments.theory import std_over_root_variance
from companion.figures.plots import repair as plots
from repairlib import diagnostics
from repairlib.recording import eval_mode

grid = section.grid

# %% [markdown]
# ## Matching by hand
#
# Both networks are run on the same images, layer by layer. After each activation function, we compute the correlation
# of every unit of A with every unit of B. The Hungarian algorithm finds the best one-to-one assignment.

# %%
sampled = grid.settings["MLP of the samples"]
pair = load_pair(section.example(sampled, "digits/mlp8-fused-w128/quick"))
images = torch.cat([batch for batch, _ in pair.calibration])


@torch.no_grad()
def match_by_hand(a, b):
    x_a, x_b, orders, total = images, images, [], 0.0
    for layer_a, layer_b in zip(a, b, strict=True):
        x_a, x_b = layer_a(x_a), layer_b(x_b)
        if isinstance(layer_a, nn.ReLU):
            units = x_a.shape[1]
            corr = torch.corrcoef(torch.cat([x_a, x_b], dim=1).T)[:units, units:].nan_to_num().cpu()  # NaN: dead units
            rows, order = linear_sum_assignment(corr, maximize=True)  # Eq. 2
            orders.append(torch.from_numpy(order))
            total += float(corr[rows, order].sum())
    return orders, total


# %% [markdown]
# The library does the same for any network that it can trace. A residual stream has one order for all of its layers.
# `matching` prints, for each group of units, how many of them move and how well the matched ones correlate.

# %%
orders, total = match_by_hand(pair.a, pair.b)
matching = repairlib.match_activations(pair.a, pair.b, pair.calibration)
same = [float((order == p).float().mean()) for order, p in zip(orders, matching.permutation.values(), strict=True)]
print(matching)
print(f"sum of correlations: {total:.3f} by hand, {sum(matching.objective.values()):.3f} by the library")
print(f"matched alike: {min(same):.0%} of the units of each layer, or more")

# %% [markdown]
# ## REPAIR by hand
#
# All three networks are run, layer by layer. For each hidden linear layer of the average, Eqs. 3 and 4 say which mean
# and standard deviation its outputs shall have. An affine map per unit takes them there, and it folds into the layer's
# weight and bias. The next layer is measured with this correction in place.


# %%
@torch.no_grad()
def repair_by_hand(a, b, alpha):
    average = repairlib.interpolate_models(a, b, alpha)
    x_a = x_b = x = images
    for layer_a, layer_b, layer in zip(a, b, average, strict=True):
        x_a, x_b = layer_a(x_a), layer_b(x_b)
        if isinstance(layer, nn.Linear) and layer is not average[-1]:
            now = layer(x)
            mean = (1 - alpha) * x_a.mean(0) + alpha * x_b.mean(0)  # Eq. 3
            std = (1 - alpha) * x_a.std(0, correction=0) + alpha * x_b.std(0, correction=0)  # Eq. 4
            gain = std / now.std(0, correction=0)
            layer.bias.mul_(gain).add_(mean - gain * now.mean(0))
            layer.weight.mul_(gain[:, None])
        x = layer(x)
    return average


# %%
aligned_b = matching.apply(pair.b)
by_hand = repair_by_hand(pair.a, aligned_b, 0.5)
by_library = repairlib.Repair(pair.a, aligned_b, pair.calibration)(0.5).model
averages = {
    "not aligned": repairlib.interpolate_models(pair.a, pair.b, 0.5),
    "aligned": repairlib.interpolate_models(pair.a, aligned_b, 0.5),
    "aligned + REPAIR, by hand": by_hand,
    "aligned + REPAIR, by the library": by_library,
}
pair.compare(A=pair.a, B=pair.b, **averages)

# %% [markdown]
# Alignment alone does not save the average. REPAIR does. Ours and the library's are the same network.
#
# ## One layer, channel by channel (Fig. 3, left)
#
# The paper shows the 9th layer of a ResNet18, which has 256 channels. Counted from 0, this is the convolution that
# opens the third stage.

# %%
if fig := section.item("repair/fig3-left"):
    pair = load_pair(fig.runs)
    networks = {
        "endpoint A": pair.a,
        "endpoint B": pair.aligned,
        "aligned": pair.path()(0.5),
        "aligned + REPAIR": pair.path(renorm="REPAIR")(0.5),
    }
    table = pd.DataFrame(diagnostics.channel_statistics(networks, pair.calibration, "stages_2_0_conv1"))
    variance = table.groupby("network")["variance"].sum()
    ends = (variance["endpoint A"] + variance["endpoint B"]) / 2
    ratios = {"ratio_aligned": variance["aligned"] / ends, "ratio_repaired": variance["aligned + REPAIR"] / ends}
    fig.save(table, plots.channels(table, title=f"{pair.title}, stage 3"), ratios)

# %% [markdown]
# Before REPAIR, every channel varies much less than in the endpoints. After it, every channel lies between them.
#
# ## Along the path (Fig. 3, middle)
#
# Lines are means over pairs of seeds. Bands go from the lowest pair to the highest.

# %%
if fig := section.item("repair/fig3-middle"):
    alphas = equal_steps(grid.settings["points of a path"])
    table = fig.rows(matchings={"none": ["none"], "AM": ["none", "REPAIR"]}, alphas=alphas)
    mean = table.groupby(["matching", "renorm", "alpha"])[["loss", "accuracy"]].mean()
    ends = mean.loc["AM", "none"].loc[[0, 1]].mean()
    summary = {"endpoints": 100 * ends["accuracy"]}
    for name, network in {"not_aligned": ("none", "none"), "before": ("AM", "none"), "after": ("AM", "REPAIR")}.items():
        summary[f"midpoint_{name}"] = 100 * mean.loc[(*network, 0.5), "accuracy"]
        summary[f"loss_rise_{name}"] = mean.loc[(*network, 0.5), "loss"] - ends["loss"]
    before, after = (summary["endpoints"] - summary[f"midpoint_{when}"] for when in ("before", "after"))
    summary |= {"barrier_after": after, "reduction": 100 * (1 - after / before)}
    fig.save(table, plots.path(table, title=title_of(grid.ResNet)), summary)

# %% [markdown]
# After alignment and REPAIR the accuracy stays high along the whole path. Before REPAIR the midpoint is near chance at
# `quick`, since these ResNets are narrow. The paper's are four times as wide, and keep 66 %. Its 77 % by optimal
# transport are another method's, which is not made here.
#
# ## How deep (Fig. 3, right)
#
# There are three ways to find the correction:
#
# * **closed form** (Sec. 4.1): the variance before the correction is predicted by Eq. 5. This needs no pass through the
#   average, and is exact in the first layer only.
# * **simultaneous** (Sec. 4.2): each layer normalises its batch while the statistics are recorded.
# * **sequential**: layer by layer, as by hand above. This is `Repair`'s default.

# %%
WAYS = {"REPAIR closed form": "closed_form", "REPAIR simultaneous": "simultaneous", "REPAIR": "sequential"}


def accuracies(pair):
    """Test accuracy of the endpoints and of the midpoints before and after each kind of REPAIR."""
    models = {"endpoint A": pair.a, "endpoint B": pair.b, "aligned": pair.path()(0.5)}
    models |= {f"aligned + {renorm}": pair.path(renorm=renorm)(0.5) for renorm in WAYS}
    return [{"network": name, "accuracy": pair.evaluate(model)[1]} for name, model in models.items()]


# %% [markdown]
# The paper reports the deepest MLP whose midpoint is above 90 %: 6 hidden layers before REPAIR, 27 with the closed
# form. Ours is the deepest whose mean over pairs of seeds is.

# %%
if fig := section.item("repair/fig3-right"):
    table = fig.measure(accuracies)
    mean = table.groupby(["network", "depth"])["accuracy"].mean()
    names = {"aligned": "before"} | {f"aligned + {renorm}": name for renorm, name in WAYS.items()}
    summary = {
        f"deepest_over_90_{name}": max(mean[network].index[mean[network] > 0.9], default=0)
        for network, name in names.items()
    }
    ends = table[table["network"].str.startswith("endpoint")]
    summary["worst_endpoint"] = 100 * ends["accuracy"].min()
    title = f"midpoints of fused MLPs on {grid.MLP.partition('/')[0]}"
    fig.save(table, plots.depth(table, title=title, threshold=0.9), summary)

# %% [markdown]
# Before REPAIR (dashed) the midpoint falls below 90 % after a few layers. The closed form carries further, and measured
# statistics carry furthest. Simultaneous and sequential REPAIR agree.
#
# ## How many images (Sec. 4.2)
#
# About 5,000 suffice, says the paper. The alignment is kept here. Only the images that REPAIR measures its statistics
# on change: three random draws of each size.

# %%
if fig := section.item("repair/samples"):
    pair = load_pair(fig.runs)
    everything = len(pair.dataset.train)
    sizes = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000]
    sizes = [size for size in sizes if size < everything][:: 4 if scale == "smoke" else 1] + [everything]
    table = []
    for name, method in {"aligned + REPAIR closed form": "closed-form", "aligned + REPAIR": "sequential"}.items():
        for size in sizes:
            for draw in range(3):
                sample = pair.sample(size, draw)
                model = repairlib.Repair(pair.a, pair.aligned, sample, method=method, limit=None)(0.5).model
                barrier = pair.endpoint_accuracy - pair.evaluate(model)[1]
                table.append({"network": name, "examples": size, "draw": draw, "barrier": barrier})

# %% [markdown]
# "Enough" is the smallest number from which on the mean barrier stays within half a point of accuracy of the one with
# all training images.

# %%
if section.item("repair/samples"):
    before = pair.endpoint_accuracy - pair.evaluate(pair.path()(0.5))[1]
    mean = pd.DataFrame(table).groupby(["examples", "network"])["barrier"].mean().unstack()
    settled = ((mean - mean.iloc[-1]).abs() < 0.005)[::-1].cummin()[::-1]  # from here on, all are close to the last
    summary = {"barrier_before": 100 * before}
    for network, name in {"aligned + REPAIR": "", "aligned + REPAIR closed form": "_closed_form"}.items():
        summary[f"enough{name}"] = int(settled.index[settled[network]][0])
        summary[f"barrier{name or '_sequential'}"] = 100 * mean[network].iloc[-1]
    fig.save(table, plots.samples(table, before=before, title=pair.title), summary)

# %% [markdown]
# A few hundred images are nearly as good as all of them.
#
# ## REPAIR of convolutions is RESET, if BatchNorms are re-estimated too (Sec. 5.2)
#
# RESET measures the statistics of the BatchNorms anew. Where a BatchNorm follows every convolution, re-estimating it
# takes back any affine map between the two, REPAIR's too. That is what the released code does. The paper's text keeps
# existing BatchNorms *frozen*. These divide by the root of the interpolated **variance**,
# $\sqrt{(1-\alpha)\sigma_1^2+\alpha\sigma_2^2}$. REPAIR aims at the interpolated **std**,
# $(1-\alpha)\sigma_1+\alpha\sigma_2$, which is smaller whenever $\sigma_1 \ne \sigma_2$. RESET gives every channel unit
# variance. BatchNorm's `eps` is the only other difference, so it is varied.


# %%
def in_float64(model, eps):
    """A copy in float64, so that rounding hides nothing, with another BatchNorm eps."""
    out = copy.deepcopy(model).double()
    for module in out.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return out


def renormalised(pair, eps):
    """RESET, and REPAIR of the convolutions with existing BatchNorms re-estimated or frozen."""
    data = [batch.double() for batch, _ in pair.calibration]
    a, b, average = (in_float64(model, eps) for model in (pair.a, pair.aligned, pair.path()(0.5)))
    repaired = {bn: repairlib.Repair(a, b, data, targets=("conv",), bn=bn)(0.5).model for bn in ("reset", "frozen")}
    return {"RESET": repairlib.reset(average, data).model} | {f"conv REPAIR, {bn}": repaired[bn] for bn in repaired}


# %% [markdown]
# Differences are the largest of the test logits, relative to the largest logit.

# %%
if fig := section.item("repair/equivalence"):
    pair = load_pair(fig.runs)
    test, labels = (torch.cat(parts) for parts in zip(*pair.test, strict=True))
    table = []
    for eps in (1e-5, 1e-12):
        networks = renormalised(pair, eps)
        with eval_mode(*networks.values()):
            logits = {name: torch.cat([net(x) for x in test.double().split(500)]) for name, net in networks.items()}
        for name, out in logits.items():
            accuracy = float((out.argmax(1) == labels).double().mean())
            difference = float((out - logits["RESET"]).abs().max() / logits["RESET"].abs().max())
            table.append({"network": name, "eps": eps, "accuracy": accuracy, "difference": difference})

# %% [markdown]
# How far apart are the std and the root of the variance, layer by layer? A ratio of 1 would make the frozen variant
# equal to RESET there.

# %%
if section.item("repair/equivalence"):
    found = pd.DataFrame(table).set_index(["network", "eps"])
    ratios = std_over_root_variance(pair.a, pair.aligned, pair.calibration)
    table += [{"network": "std over root variance", "node": node, "ratio": ratio} for node, ratio in ratios.items()]
    equivalence = {
        "difference_reset": found["difference"]["conv REPAIR, reset", 1e-12],
        "difference_reset_eps": found["difference"]["conv REPAIR, reset", 1e-5],
        "difference_frozen": found["difference"]["conv REPAIR, frozen", 1e-5],
        "accuracy_reset": 100 * found["accuracy"]["RESET", 1e-5],
        "accuracy_frozen": 100 * found["accuracy"]["conv REPAIR, frozen", 1e-5],
        "mean_std_over_root_variance": sum(ratios.values()) / len(ratios),
    }
    fig.save(table, summary=equivalence)

# %% [markdown]
# With BatchNorms re-estimated, REPAIR is RESET to rounding. With frozen BatchNorms it is another network, of about the
# same accuracy.
#
# ## Check
#
# First identities of arithmetic, which hold for any networks. Then what the paper claims of these figures, and what
# ours show. A claim that does not hold here says so.

# %%
assert abs(total / sum(matching.objective.values()) - 1) < 1e-3
with torch.no_grad():
    assert (by_hand(images) - by_library(images)).abs().max() < 1e-3 * by_library(images).abs().max()
if section.item("repair/equivalence"):
    assert equivalence["difference_reset"] < 1e-5
    assert equivalence["mean_std_over_root_variance"] <= 1
section.check()
