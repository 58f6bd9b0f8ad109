# %% [markdown]
# # Rethink Model Re-Basin, Section 3.1: the importance of renormalisation
#
# Two networks from different seeds are aligned by their weights and averaged. How much accuracy is lost if the networks
# have no normalisation layers and the average is not renormalised? Does width help? (Qu and Horváth 2024, Figs. 2B, 7
# and 8.)
#
# The paper trains plain VGGs and plain ResNet20s on CIFAR-10 and finds:
#
# * The barrier is high without renormalisation, whether units are matched by weights or by activations.
# * It falls with width, but slowly: by less than 10 % from 2x to 8x for VGG16. The exception is activation matching of
#   VGG11 and VGG16.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/fig2b,rethink/fig7"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import renormalization
from companion.figures.section import Section

section = Section(renormalization, scale, items)
section.overview()

# %%
import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.tables import barriers
from companion.figures.plots import rethink as plots
from repairlib.diagnostics import distance

grid = section.grid
AXIS = {"xlabel": "width multiplier", "log_x": 2}

# %% [markdown]
# ## One pair, step by step
#
# Weight matching looks for the permutation of B's units that brings the two vectors of weights closest together:
#
# $$\pi^* = \arg\min_\pi \lVert \theta_A - \pi(\theta_B) \rVert.$$
#
# The search starts at the identity, B's units as trained, as the paper's does. Activation matching does the same for
# activations, layer by layer. The permuted network computes what B computes.

# %%
pair = load_pair(section.example(grid.VGG, grid.ResNet))
by_weights = repairlib.match_weights(pair.a, pair.b, pair.calibration, start="identity").apply(pair.b)
by_activations = repairlib.match_activations(pair.a, pair.b, pair.calibration).apply(pair.b)
for name, model in {"B": pair.b, "matched by weights": by_weights, "by activations": by_activations}.items():
    print(f"distance of A from {name}: {distance(pair.a, model):.2f}")

# %%
middle = {
    "halfway_not_aligned": repairlib.interpolate_models(pair.a, pair.b),
    "halfway_by_weights": repairlib.interpolate_models(pair.a, by_weights),
    "halfway_by_activations": repairlib.interpolate_models(pair.a, by_activations),
}
pair.compare(A=pair.a, B=pair.b, **middle)

# %% [markdown]
# ## Every pair of seeds, every width
#
# The barrier is the accuracy that the midpoint lacks against the mean of the endpoints (App. D.1), in points.


# %%
def by_width(fig, matching):
    """Barriers of all pairs, their picture, and their means at the smallest and the largest width."""
    table = fig.rows(matchings=[matching], renorms=["none"])
    found = barriers(table)
    label = {"accuracy_barrier": "test accuracy barrier\n(points)"}
    figure = plots.lines(found, "width", label, by="series", title=f"plain networks, {matching}", **AXIS)
    means = 100 * found.groupby(["series", "width"], sort=False)["accuracy_barrier"].mean()
    return table, figure, {f"{series} {width:g}x": value for (series, width), value in means.items()}


# %% [markdown]
# ## Weight matching (Fig. 2B)

# %%
if fig := section.item("rethink/fig2b"):
    fig.save(*by_width(fig, "WM"))

# %% [markdown]
# ## Weight matching, also without biases (Fig. 7)

# %%
if fig := section.item("rethink/fig7"):
    fig.save(*by_width(fig, "WM"))

# %% [markdown]
# ## Activation matching (Fig. 8)

# %%
if fig := section.item("rethink/fig8"):
    fig.save(*by_width(fig, "AM"))

# %% [markdown]
# What renormalisation does for these networks is in [Section 4.1](04_1_rescaling.ipynb).
#
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
