# %% [markdown]
# # Quickstart: two networks into one
#
# Train two small networks on handwritten digits from different seeds, average their weights, watch the average fail
# because its activations collapse, and repair it (Jordan et al. 2022). Runs on a laptop in about a minute.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke: a few steps, to test; quick: the real thing on digits; also fast, paper
items: str = ""  # not used here

# %% tags=["runs"]
from companion.experiments.scales import by_scale

runs = by_scale(
    scale,
    smoke=[f"digits/resnet8-bn-w0.5/smoke/s{seed}" for seed in (1, 2)],
    quick=[f"digits/resnet20-bn-w1/quick/s{seed}" for seed in (1, 2)],
    fast=[f"cifar10/resnet20-bn-w4/fast/s{seed}" for seed in (1, 2)],
    paper=[f"cifar10/resnet20-bn-w4/jordan/s{seed}" for seed in (1, 2)],
)

# %%
import repairlib
from companion.experiments.pairs import load_pair
from companion.figures import plots
from repairlib import diagnostics

pair = load_pair(runs)  # trains what is not there yet
print(f"endpoints: {pair.accuracy:.1%} on the test set")

# %% [markdown]
# **Align.** Reorder the units of B so that each sits where A has the most similar one. B's function stays the same.

# %%
model_b = repairlib.align(pair.a, pair.b, pair.calibration)
print(pair.matching)

# %% [markdown]
# **Merge**, with and without REPAIR. `merge` aligns, averages and repairs in one call.

# %%
averaged = repairlib.interpolate_models(pair.a, model_b, 0.5)
repaired = repairlib.merge(pair.a, pair.b, pair.calibration).model
for name, model in {"averaged": averaged, "repaired": repaired}.items():
    print(f"{name}: {pair.evaluate(model)[1]:.1%}")

# %% [markdown]
# **Why it failed:** the variance of the averaged network's activations shrinks from layer to layer.

# %%
table = diagnostics.variance_profile(pair.a, model_b, {"aligned": averaged, "repaired": repaired}, pair.calibration)
plots.variance_profile(table, title="variance collapse and REPAIR")

# %% [markdown]
# **From here:** `explore.ipynb`, beside this notebook, has widgets for a pair of stored networks, how they are matched
# and renormalised, and where between them to look. `repair/` has one notebook for each section of the paper.
