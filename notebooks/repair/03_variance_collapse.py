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
from repairlib.report import by_scale, wanted

SEEDS = (1, 2)
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
needs = {"repair/fig2-left": mlp, "repair/sec3-theory": mlp, "repair/fig2-middle": vgg}
runs = [f"{run}/s{seed}" for item, run in needs.items() if wanted(item, items) for seed in SEEDS]

# %%
import time

from repairlib import diagnostics, plots
from repairlib.pairs import load_pair
from repairlib.report import save_item

# %% [markdown]
# ## Deep MLPs (Fig. 2 left)
#
# As in the authors' released code the MLP is trained with BatchNorm, which is then fused into the weights: a plain
# MLP of this depth does not train. The network that is averaged has no normalisation layer left.
#
# After REPAIR the ratio can stay a little below 1: it interpolates standard deviations (Eq. 4), and where two matched
# units differ in theirs, the square of the mean is less than the mean of the squares.


# %%
def collapse(run: str) -> tuple:
    """Variance profile of the direct, the aligned and the repaired midpoint of one pair."""
    start = time.perf_counter()
    pair = load_pair([f"{run}/s{seed}" for seed in SEEDS])
    midpoints = {"direct": pair.direct(), "aligned": pair.midpoint(), "repaired": pair.repair()(0.5).model}
    table = diagnostics.variance_profile(pair.a, pair.b, midpoints, pair.calibration)
    last = {row["network"]: row["ratio"] for row in table}  # of each network the last layer stays
    summary = {f"last_layer_{name}": ratio for name, ratio in last.items()}
    summary |= {f"accuracy_{name}": 100 * pair.evaluate(net)[1] for name, net in midpoints.items()}
    summary |= {"accuracy_endpoints": 100 * pair.accuracy, "final_layer_decay": 1 / last["aligned"]}
    return table, summary, pair.origin(start), pair.title


# %%
if wanted("repair/fig2-left", items):
    table, summary, origin, title = collapse(mlp)
    figure = plots.variance_profile(table, title=title, xlabel="hidden layer")
    save_item("repair/fig2-left", scale, table, summary, figure, **origin)
    fig2_left = summary

# %% [markdown]
# ## VGG (Fig. 2 middle)
#
# Every convolution of a VGG11 without normalisation (trained with BatchNorm, then fused).

# %%
if wanted("repair/fig2-middle", items):
    table, summary, origin, title = collapse(vgg)
    figure = plots.variance_profile(table, title=title, xlabel="convolution")
    save_item("repair/fig2-middle", scale, table, summary, figure, **origin)
    fig2_middle = summary

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
    start = time.perf_counter()
    pair = load_pair([f"{mlp}/s{seed}" for seed in SEEDS])
    table = diagnostics.first_layer_theory(pair.a, pair.aligned, pair.midpoint(), pair.calibration)
    by_layer = diagnostics.unit_agreement(pair.a, pair.aligned, pair.calibration)
    corr = [float(c[c != 0].mean()) for c in by_layer.values()]  # without dead units
    total = {name: sum(row[name] for row in table) for name in ("measured", "variance_a", "variance_b")}
    theory = {
        "corr": corr[0],
        "corr_all_layers": sum(corr) / len(corr),
        "variance": 2 * total["measured"] / (total["variance_a"] + total["variance_b"]),
        "largest_error_eq5": max(abs(row["eq5"] / row["measured"] - 1) for row in table),
    }

# %%
if wanted("repair/sec3-theory", items):
    figure = plots.prediction(table, title=f"first layer, {pair.title}")
    save_item("repair/sec3-theory", scale, table, theory, figure, **pair.origin(start))
    print({name: round(value, 6) for name, value in theory.items()})

# %% [markdown]
# ## Check
#
# What must hold at every scale: Eq. 5 is exact to rounding, the midpoint never varies more than the endpoints, and
# REPAIR restores the last layer. Above `smoke`, where networks are trained, the collapse itself is there too.

# %%
if wanted("repair/sec3-theory", items):
    assert theory["largest_error_eq5"] < 1e-5  # float32 activations; Eq. 5 has no other error
    assert theory["variance"] < 1
for name in ("repair/fig2-left", "repair/fig2-middle"):
    if wanted(name, items):
        result = fig2_left if name.endswith("left") else fig2_middle
        assert abs(result["last_layer_repaired"] - 1) < by_scale(scale, smoke=0.3, quick=0.05, fast=0.05, paper=0.05), (
            result
        )
        assert result["last_layer_direct"] < 1 and result["last_layer_aligned"] < 1, result
        if scale != "smoke":
            assert result["last_layer_direct"] < result["last_layer_aligned"], result
            assert result["last_layer_aligned"] < (0.01 if name.endswith("left") else 0.1), result
            assert result["accuracy_repaired"] > result["accuracy_aligned"] > result["accuracy_direct"] - 5, result
