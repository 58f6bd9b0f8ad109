# %% [markdown]
# # REPAIR, Section 3: variance collapse in interpolated networks
#
# Average the weights of two trained networks, $\theta_\alpha = (1-\alpha)\theta_1 + \alpha\theta_2$, and the hidden
# units of the result vary less than those of either endpoint, the less the deeper the layer. Per layer we report
#
# $$\frac{v_\alpha}{(v_1 + v_2)/2}, \qquad v = \sum_{\text{units}} \operatorname{Var}(X_{\text{unit}}),$$
#
# measured on training data at the preactivations (Jordan et al. 2022, Sec. 3.1, Fig. 2), for networks as trained
# (*direct*), after matching their units (*aligned*), and after REPAIR.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig2-left,repair/sec3-theory"; empty: all

# %% tags=["runs"]
from companion.experiments.scales import by_scale, wanted

SEEDS = by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2), paper=(1, 2))  # every two of them are a pair
mlp = by_scale(
    scale,
    smoke="digits/mlp4-fused-w32/smoke",
    quick="digits/mlp35-fused-w128/quick",
    fast="mnist/mlp35-fused-w128/fast",
    paper="mnist/mlp35-fused-w128/jordan-released",
)
vgg = by_scale(
    scale,
    smoke="digits/vgg11-fused-w0.0625/smoke",
    quick="digits/vgg11-fused-w0.25/quick",
    fast="cifar10/vgg11-fused-w1/fast",
    paper="cifar10/vgg11-fused-w1/jordan",
)
resnet = by_scale(
    scale,
    smoke="digits/resnet26-bn-w0.0625/smoke",
    quick="digits-hard/resnet26-bn-w0.125/quick",
    fast="cifar10/resnet50-bn-w1/fast",  # as the rest of this notebook, without ImageNet
    paper="imagenet@224/torchvision-resnet50/jordan",
)
needs = {"repair/fig2-left": mlp, "repair/sec3-theory": mlp, "repair/fig2-middle": vgg, "repair/fig2-right": resnet}
needs = {item: run for item, run in needs.items() if wanted(item, items)}
runs_of = {item: [f"{run}/s{seed}" for seed in SEEDS] for item, run in needs.items()}
runs = list(dict.fromkeys(run for names in runs_of.values() for run in names))

# %%
import time

import pandas as pd

from companion.experiments.pairs import pairs_of
from companion.figures import plots
from companion.figures.report import save_item
from repairlib import diagnostics

# %% [markdown]
# ## Deep MLPs (Fig. 2 left)
#
# As in the authors' released code the MLP is trained with BatchNorm, which is then fused into the weights: a plain
# MLP of this depth does not train. The network that is averaged has no normalisation layer left.
#
# After REPAIR the ratio can stay a little below 1: it interpolates standard deviations (Eq. 4), and where two matched
# units differ in theirs, the square of the mean is less than the mean of the squares.


# %%
def collapse(item: str, xlabel: str, **options) -> dict:
    """Save the variance profiles of the direct, the aligned and the repaired midpoint of every pair; their summary.

    options: of REPAIR.
    """
    start, table, accuracies = time.perf_counter(), [], []
    for which, pair in pairs_of(needs[item], SEEDS):
        midpoints = {name: pair.network(name)(0.5) for name in ("direct", "aligned")}
        midpoints["repaired"] = pair.network("repaired", **options)(0.5)
        profile = diagnostics.variance_profile(pair.a, pair.aligned, midpoints, pair.calibration)
        table += [{"pair": which, **row} for row in profile]
        accuracies.append({n: pair.evaluate(net)[1] for n, net in midpoints.items()} | {"endpoints": pair.accuracy})
    ratios = pd.DataFrame(table).groupby(["layer", "network"], sort=False)["ratio"].mean().unstack()
    summary = {f"last_layer_{name}": ratio for name, ratio in ratios.iloc[-1].items()}
    summary |= {f"accuracy_{name}": 100 * value for name, value in pd.DataFrame(accuracies).mean().items()}
    summary["final_layer_decay"] = 1 / summary["last_layer_aligned"]
    figure = plots.variance_profile(table, title=pair.title, xlabel=xlabel)
    save_item(item, scale, table, summary, figure, runs=runs_of[item], seconds=time.perf_counter() - start)
    print(ratios.round(4).to_string(), {name: round(value, 3) for name, value in summary.items()}, sep="\n")
    return summary


# %%
results = {}
if wanted("repair/fig2-left", items):
    results["left"] = collapse("repair/fig2-left", "hidden layer")

# %% [markdown]
# ## VGG (Fig. 2 middle)
#
# Every convolution of a VGG11 without normalisation (trained with BatchNorm, then fused).

# %%
if wanted("repair/fig2-middle", items):
    results["middle"] = collapse("repair/fig2-middle", "convolution")

# %% [markdown]
# ## ResNet of bottlenecks (Fig. 2 right)
#
# The outputs of all convolutions in order of execution, those on shortcuts included, and not those of blocks: the paper
# does not say which of a ResNet's activations it shows. A convolution's output is what REPAIR corrects, before the
# BatchNorm, which in evaluation is one affine map and lets the collapse through. REPAIR is full, with block outputs,
# and in one pass as in `05_2_imagenet`, whose networks these are at `quick` and `paper`.

# %%
if wanted("repair/fig2-right", items):
    results["right"] = collapse("repair/fig2-right", "convolution", method="simultaneous")

# %% [markdown]
# ## Why (Sec. 3.2)
#
# A unit of the first layer is linear in the weights, so $X_\alpha = (1-\alpha)X_1 + \alpha X_2$ exactly, and (Eq. 5)
#
# $$\operatorname{Var}(X_\alpha) = (1-\alpha)^2\operatorname{Var}(X_1) + \alpha^2\operatorname{Var}(X_2)
#   + 2\alpha(1-\alpha)\operatorname{Cov}(X_1, X_2).$$
#
# With equal standard deviations the midpoint has $(0.5 + 0.5\,\mathrm{corr})\operatorname{Var}(X_1)$: 0.7 for the
# correlation of 0.4 that the paper calls typical of aligned units. Below, both against the measured variance, unit by
# unit, and how the correlation of aligned units goes with depth.

# %%
if wanted("repair/sec3-theory", items):
    start, table, theories = time.perf_counter(), [], []
    for which, pair in pairs_of(mlp, SEEDS):
        units = diagnostics.first_layer_theory(pair.a, pair.aligned, pair.midpoint(), pair.calibration)
        table += [{"pair": which, **row} for row in units]
        by_layer = diagnostics.unit_agreement(pair.a, pair.aligned, pair.calibration)
        corr = [float(c[c != 0].mean()) for c in by_layer.values()]  # without dead units
        total = pd.DataFrame(units).sum()
        theories.append({"pair": which, "corr": corr[0], "corr_all_layers": sum(corr) / len(corr),
                         "variance": 2 * total.measured / (total.variance_a + total.variance_b)})  # fmt: skip
    theory = pd.DataFrame(theories).mean(numeric_only=True).to_dict()
    theory["largest_error_eq5"] = max(abs(row["eq5"] / row["measured"] - 1) for row in table)

# %%
if wanted(item := "repair/sec3-theory", items):
    figure = plots.prediction(table, title=f"first layer, {pair.title}")
    save_item(item, scale, table, theory, figure, runs=runs_of[item], seconds=time.perf_counter() - start)
    print(pd.DataFrame(theories).round(4), {name: round(value, 6) for name, value in theory.items()}, sep="\n")

# %% [markdown]
# ## Check
#
# What must hold at every scale: Eq. 5 is exact to rounding, the midpoint never varies more than the endpoints, and
# REPAIR restores the last layer. Above `smoke`, where networks are trained, the collapse itself is there too.

# %%
if wanted("repair/sec3-theory", items):
    assert theory["largest_error_eq5"] < 1e-5  # float32 activations; Eq. 5 has no other error
    assert theory["variance"] < 1
for name, result in results.items():
    if name == "right" and scale in ("fast", "paper"):
        continue  # nothing is asserted before it has been run
    assert abs(result["last_layer_repaired"] - 1) < (0.3 if scale == "smoke" else 0.05), (name, result)
    assert result["last_layer_direct"] < 1 and result["last_layer_aligned"] < 1, (name, result)
    if scale != "smoke":
        assert result["last_layer_direct"] < result["last_layer_aligned"], (name, result)
        assert result["last_layer_aligned"] < {"left": 0.01, "middle": 0.1, "right": 0.2}[name], (name, result)
        assert result["accuracy_repaired"] > result["accuracy_aligned"] > result["accuracy_direct"] - 5, (name, result)
