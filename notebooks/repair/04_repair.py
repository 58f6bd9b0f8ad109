# %% [markdown]
# # REPAIR, Section 4: restoring the statistics of interpolated networks
#
# For every channel of chosen layers, REPAIR asks of the interpolated network (Jordan et al. 2022, Eqs. 3 and 4)
#
# $$\mathbb E[X_\alpha] = (1-\alpha)\,\mathbb E[X_1] + \alpha\,\mathbb E[X_2], \qquad
#   \operatorname{std}(X_\alpha) = (1-\alpha)\operatorname{std}(X_1) + \alpha\operatorname{std}(X_2),$$
#
# and gets it by an affine map per channel that folds into the weights. Three ways to find it:
#
# * **closed form** (Sec. 4.1): $\beta = \operatorname{std}_\text{goal} / \sqrt{\operatorname{Var}\text{ of Eq. 5}}$;
#   no pass through the interpolated network, exact in the first layer only;
# * **simultaneous** (Sec. 4.2): every layer normalises its batch while statistics are recorded; what the paper calls
#   forward exact;
# * **sequential**: layer by layer, each measured with all corrections before it in place, in one pass.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig3-right,repair/samples"; empty: all

# %% tags=["runs"]
from companion.experiments.scales import by_scale, wanted

SEEDS = by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2), paper=(1, 2))  # every two of them are a pair
depths = by_scale(
    scale,
    smoke=[2, 4],
    quick=[2, 4, 6, 8, 10, 15, 20, 27, 35],
    fast=[2, 4, 6, 8, 10, 15, 20, 27, 35],
    paper=[2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 21, 24, 27, 30, 35, 40, 45, 50],
)
mlp = by_scale(
    scale,
    smoke="digits/mlp{}-fused-w32/smoke",
    quick="digits/mlp{}-fused-w128/quick",
    fast="mnist/mlp{}-fused-w128/fast",
    paper="mnist/mlp{}-fused-w128/jordan-released",
)
resnet = by_scale(
    scale,
    smoke="digits/resnet18-bn-w0.0625/smoke",
    quick="digits/resnet18-bn-w0.25/quick",
    fast="cifar10/resnet18-bn-w1/fast",
    paper="cifar10/resnet18-bn-w1/jordan",
)
sample_depth = by_scale(scale, smoke=4, quick=20, fast=20, paper=20)
needs = {  # what is measured over all pairs, and what on the first one
    "repair/fig3-left": [f"{resnet}/s{seed}" for seed in SEEDS[:2]],
    "repair/fig3-middle": [f"{resnet}/s{seed}" for seed in SEEDS],
    "repair/fig3-right": [f"{mlp.format(depth)}/s{seed}" for depth in depths for seed in SEEDS],
    "repair/samples": [f"{mlp.format(sample_depth)}/s{seed}" for seed in SEEDS[:2]],
    "repair/equivalence": [f"{resnet}/s{seed}" for seed in SEEDS[:2]],
}
needs = {item: names for item, names in needs.items() if wanted(item, items)}
runs = list(dict.fromkeys(run for names in needs.values() for run in names))

# %%
import copy
import time

import pandas as pd
import torch

from companion.experiments.pairs import load_pair, pairs_of, path_rows
from companion.figures import plots
from companion.figures.report import save_item
from repairlib import Repair, diagnostics, reset
from repairlib.tracing import eval_mode

# %% [markdown]
# ## One layer, channel by channel (Fig. 3 left)
#
# The paper shows the 9th layer of a ResNet18, which has 256 channels: counting from 0, the convolution that opens the
# third stage.

# %%
if wanted("repair/fig3-left", items):
    start = time.perf_counter()
    pair = load_pair(needs["repair/fig3-left"])
    layer = "stages_2_0_conv1"
    networks = {
        "endpoint a": pair.a, "endpoint b": pair.aligned,
        "aligned": pair.midpoint(), "repaired": pair.repair()(0.5).model,
    }  # fmt: skip
    table = diagnostics.channel_statistics(networks, pair.calibration, layer)
    mean = {name: sum(row["variance"] for row in table if row["network"] == name) for name in networks}
    ends = (mean["endpoint a"] + mean["endpoint b"]) / 2
    fig3_left = {"ratio_aligned": mean["aligned"] / ends, "ratio_repaired": mean["repaired"] / ends}

# %%
if wanted(item := "repair/fig3-left", items):
    figure = plots.channels(table, title=f"{pair.title}, stage 3")
    save_item(item, scale, table, fig3_left, figure, runs=needs[item], seconds=time.perf_counter() - start)

# %% [markdown]
# ## Along the path (Fig. 3 middle)
#
# Lines are means over pairs of seeds; bands go from the lowest pair to the highest.

# %%
if wanted("repair/fig3-middle", items):
    start = time.perf_counter()
    points = by_scale(scale, smoke=3, quick=11, fast=21, paper=101)
    alphas = [i / (points - 1) for i in range(points)]
    table = []
    for name, pair in pairs_of(resnet, SEEDS):
        rows = path_rows(pair, alphas, networks=("direct", "aligned", "repaired"))
        table += [{"run": resnet, "pair": name, **row} for row in rows]

# %%
if wanted(item := "repair/fig3-middle", items):
    mean = pd.DataFrame(table).groupby(["network", "alpha"], sort=False)[["loss", "accuracy"]].mean()
    middle, ends = mean.xs(0.5, level="alpha"), mean.loc["aligned"].loc[[0, 1]].mean()
    fig3_middle = {
        f"midpoint_{name}": 100 * middle.accuracy[network]
        for name, network in {"direct": "direct", "before": "aligned", "after": "repaired"}.items()
    }
    fig3_middle["endpoints"] = 100 * ends.accuracy
    fig3_middle |= {f"loss_rise_{network}": loss - ends.loss for network, loss in middle.loss.items()}
    figure = plots.path(table, title=pair.title)
    save_item(item, scale, table, fig3_middle, figure, runs=needs[item], seconds=time.perf_counter() - start)
    print(pd.Series(fig3_middle).round(2).to_string())

# %% [markdown]
# ## How deep (Fig. 3 right)
#
# Midpoints of MLPs of growing depth. The paper reports the deepest one above 90 %: 6 hidden layers without
# correction, 27 with the closed form. Here it is the deepest whose mean over pairs of seeds is above 90 %.

# %%
if wanted("repair/fig3-right", items):
    start = time.perf_counter()
    methods = ("closed-form", "simultaneous", "sequential")
    table = []
    for depth, run in zip(depths, map(mlp.format, depths), strict=True):
        for name, pair in pairs_of(run, SEEDS):
            networks = {"endpoint a": pair.a, "endpoint b": pair.b, "aligned": pair.midpoint()}
            networks |= {method: pair.repair(method=method)(0.5).model for method in methods}
            row = {"depth": depth, "pair": name}
            table += [{"network": n, **row, "accuracy": pair.evaluate(model)[1]} for n, model in networks.items()]

# %%
if wanted(item := "repair/fig3-right", items):
    mean = pd.DataFrame(table).groupby(["network", "depth"])["accuracy"].mean()
    fig3_right = {
        f"deepest_over_90_{network.replace('-', '_').replace('aligned', 'before')}": max(
            mean[network].index[mean[network] > 0.9], default=0
        )
        for network in ("aligned", *methods)
    }
    fig3_right["worst_endpoint"] = 100 * min(row["accuracy"] for row in table if row["network"].startswith("endpoint"))
    figure = plots.depth(table, title=f"midpoints of fused MLPs on {pair.dataset.name}", threshold=0.9)
    save_item(item, scale, table, fig3_right, figure, runs=needs[item], seconds=time.perf_counter() - start)
    print(fig3_right)

# %% [markdown]
# ## How many examples (Sec. 4.2)
#
# The paper: about 5,000 examples suffice. The alignment is kept; only the images that REPAIR measures its statistics
# on change, in three random draws of each size.

# %%
if wanted("repair/samples", items):
    start = time.perf_counter()
    pair = load_pair(needs["repair/samples"])
    size = len(pair.dataset.train)
    counts = [n for n in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000) if n < size] + [size]
    table = []
    for method in ("closed-form", "sequential"):
        for n in counts[::4] if scale == "smoke" else counts:
            for draw in range(3):
                accuracy = pair.evaluate(pair.repair(pair.sample(n, draw), method=method)(0.5).model)[1]
                table.append({"network": method, "examples": n, "draw": draw, "barrier": pair.accuracy - accuracy})

# %% [markdown]
# "Enough" is the smallest number from which on the mean barrier stays within half a point of accuracy of the one with
# all training images.

# %%
if wanted(item := "repair/samples", items):
    before = pair.accuracy - pair.evaluate(pair.midpoint())[1]
    mean = pd.DataFrame(table).groupby(["examples", "network"])["barrier"].mean().unstack()
    settled = ((mean - mean.iloc[-1]).abs() < 0.005)[::-1].cummin()[::-1]  # from here on, all are close to the last
    enough = {method: int(settled.index[settled[method]][0]) for method in mean}
    samples = {"enough": enough["sequential"], "enough_closed_form": enough["closed-form"]}
    samples |= {f"barrier_{m.replace('-', '_')}": 100 * mean[m].iloc[-1] for m in mean}
    samples["barrier_before"] = 100 * before
    figure = plots.samples(table, before=before, title=pair.title)
    save_item(item, scale, table, samples, figure, runs=needs[item], seconds=time.perf_counter() - start)
    print(pd.Series(samples).round(2).to_string())

# %% [markdown]
# ## REPAIR of convolutions is RESET, if BatchNorms are re-estimated too (Sec. 5.2)
#
# Where a BatchNorm follows every convolution, an affine map between the two is taken back by re-estimating the
# BatchNorm. That is what the released code does. The paper's text keeps existing BatchNorms *frozen*: they divide by
# the root of the interpolated **variance**, $\sqrt{(1-\alpha)\sigma_1^2+\alpha\sigma_2^2}$, while REPAIR aims at the
# interpolated **std**, $(1-\alpha)\sigma_1+\alpha\sigma_2$, which is smaller whenever $\sigma_1 \ne \sigma_2$. RESET
# gives every channel exactly unit variance. BatchNorm's `eps` is the only other difference, so it is varied.


# %%
def in_float64(model: torch.nn.Module, eps: float) -> torch.nn.Module:
    """Copy in float64, so that rounding hides nothing, with another BatchNorm eps."""
    out = copy.deepcopy(model).double()
    for module in out.modules():
        if hasattr(module, "running_var"):
            module.eps = eps
    return out


def compare_with_reset(eps: float) -> list[dict]:
    """Test logits and accuracy of conv-only REPAIR with existing BatchNorms re-estimated or frozen, against RESET's."""
    a, b, mid = (in_float64(model, eps) for model in (pair.a, pair.aligned, pair.midpoint()))
    networks = {"RESET": reset(mid, data).model}
    for bn in ("reset", "frozen"):
        networks[f"conv REPAIR, {bn}"] = Repair(a, b, data, targets=("conv",), bn=bn)(0.5).model
    with eval_mode(*networks.values()):
        logits = {name: torch.cat([net(x) for x in images.split(500)]) for name, net in networks.items()}
    scale = logits["RESET"].abs().max()
    return [
        {
            "network": name,
            "eps": eps,
            "accuracy": float((out.argmax(1) == labels).double().mean()),
            "difference": float((out - logits["RESET"]).abs().max() / scale),
        }
        for name, out in logits.items()
    ]


# %%
if wanted("repair/equivalence", items):
    start = time.perf_counter()
    pair = load_pair(needs["repair/equivalence"])
    images, labels = (torch.cat(parts) for parts in zip(*pair.test, strict=True))
    images, data = images.double(), [x.double() for x, _ in pair.calibration]
    table = [row for eps in (1e-5, 1e-12) for row in compare_with_reset(eps)]
    found = {(row["network"], row["eps"]): row for row in table}

# %% [markdown]
# How far std and root variance are apart, layer by layer, for the aligned pair: 1 would make the frozen variant equal
# to RESET there.

# %%
if wanted(item := "repair/equivalence", items):
    ratio = diagnostics.std_over_root_variance(pair.a, pair.aligned, pair.calibration)
    equivalence = {
        "difference_reset": found["conv REPAIR, reset", 1e-12]["difference"],
        "difference_reset_eps": found["conv REPAIR, reset", 1e-5]["difference"],
        "difference_frozen": found["conv REPAIR, frozen", 1e-5]["difference"],
        "accuracy_reset": 100 * found["RESET", 1e-5]["accuracy"],
        "accuracy_frozen": 100 * found["conv REPAIR, frozen", 1e-5]["accuracy"],
        "mean_std_over_root_variance": sum(ratio.values()) / len(ratio),
    }
    table += [{"network": "std over root variance", "node": node, "ratio": r} for node, r in ratio.items()]
    save_item(item, scale, table, equivalence, runs=needs[item], seconds=time.perf_counter() - start)
    print({name: float(f"{value:.3g}") for name, value in equivalence.items()})

# %% [markdown]
# ## Check
#
# What must hold at every scale, what must hold of trained networks, and, at `quick`, how clearly.

# %%
if wanted("repair/equivalence", items):
    assert equivalence["difference_reset"] < 1e-5, equivalence
    assert equivalence["difference_reset_eps"] < by_scale(scale, smoke=1e-3, quick=1e-5, fast=1e-4, paper=1e-4)
    assert equivalence["difference_frozen"] > equivalence["difference_reset_eps"], equivalence
    assert equivalence["mean_std_over_root_variance"] < 1, equivalence
if wanted("repair/fig3-left", items):
    assert fig3_left["ratio_aligned"] < fig3_left["ratio_repaired"] <= 1 + 1e-3, fig3_left
    assert scale == "smoke" or abs(fig3_left["ratio_repaired"] - 1) < 0.05, fig3_left
if wanted("repair/fig3-middle", items) and scale != "smoke":
    direct, before, after = (fig3_middle[f"midpoint_{name}"] for name in ("direct", "before", "after"))
    assert direct - 5 < before < after, fig3_middle  # direct and before may both be at chance
    assert scale != "quick" or (before < 50 and after > 85 and fig3_middle["endpoints"] > 97), fig3_middle
if wanted("repair/fig3-right", items) and scale != "smoke":
    deepest = {key.removeprefix("deepest_over_90_"): value for key, value in fig3_right.items()}
    assert deepest["before"] < deepest["closed_form"], deepest
    assert deepest["closed_form"] <= min(deepest["sequential"], deepest["simultaneous"]), deepest
