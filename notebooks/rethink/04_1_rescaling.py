# %% [markdown]
# # Rethink Model Re-Basin, Section 4.1: the effect of REPAIR is rescaling
#
# REPAIR gives every channel of an average the mean and the standard deviation that it has in the endpoints. Which of
# the two matters? (Qu and Horváth 2024, Figs. 4A, 4B, 29 to 34, Tables 1 and 4 to 9.)
#
# With the statistics $\mu, \sigma$ that a channel has in the average, and $\mu^*, \sigma^*$ that it should have:
#
# $$\text{REPAIR: } \frac{x - \mu}{\sigma}\sigma^* + \mu^*, \qquad \text{RESCALE: } \frac{x}{\sigma}\sigma^*, \qquad
#   \text{RESHIFT: } x - \mu + \mu^*.$$
#
# RESCALE (average) takes one $\sigma^*$ for a whole layer: the mean over its channels. (The paper defines the two goals
# the wrong way round.) The paper finds:
#
# * RESCALE is no worse than REPAIR. With one scale for a whole layer it is comparable for VGG16 (Tables 1 and 4).
#   RESHIFT ruins the network.
# * The statistics of an independent network will do.
# * Measuring layer by layer ("sequential") makes REPAIR better, and RESCALE no different.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "rethink/table1,rethink/fig4ab"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import rescaling
from companion.figures.section import Section

section = Section(rescaling, scale, items)
section.overview()

# %%
import torch
from IPython.display import display

import repairlib
from companion.experiments.pairs import load_pair
from companion.experiments.statistics import independent_rows, scale_rows
from companion.figures.plots import rethink as plots

grid = section.grid
VARIANTS = ["none", "REPAIR", "RESCALE", "RESCALE average", "RESHIFT"]
# The paper's numbers have these names in figures/index.yml.
PUBLISHED = dict(zip(VARIANTS, ("none", "repair", "rescale", "rescale_average", "reshift"), strict=True))

# %% [markdown]
# ## One layer by hand
#
# The first convolution of the midpoint, corrected in the three ways. The library measures the same.

# %%
pair = load_pair(section.example(grid.VGG, grid.ResNet))
middle = repairlib.interpolate_models(pair.a, pair.aligned)
images = torch.cat([x for x, _ in pair.calibration])[:500]
first = next(name for name, m in middle.named_modules() if isinstance(m, torch.nn.Conv2d))
with torch.no_grad():
    a, b, x = (m.get_submodule(first)(images).transpose(0, 1).flatten(1) for m in (pair.a, pair.aligned, middle))
goal_mean, goal_std = (a.mean(1) + b.mean(1)) / 2, (a.std(1) + b.std(1)) / 2
rescaled = x / x.std(1, keepdim=True) * goal_std[:, None]
repaired = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) * goal_std[:, None] + goal_mean[:, None]

# %%
for how, by_hand in {"rescale": rescaled, "repair": repaired}.items():
    made = repairlib.renormalize(middle, [pair.a, pair.aligned], images, correct=how, targets="stem").model
    with torch.no_grad():
        x_made = made.get_submodule(first)(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(x_made, by_hand, rtol=1e-3, atol=1e-3)

# %% [markdown]
# Now all layers, in every way.

# %%
ways = {"REPAIR": {}, "RESCALE": {"correct": "rescale"}, "RESCALE_average": {"correct": "rescale", "average": True},
        "RESHIFT": {"correct": "reshift"}}  # fmt: skip
networks = {name: repairlib.repair(pair.a, pair.aligned, pair.calibration, **how).model for name, how in ways.items()}
pair.compare(A=pair.a, B=pair.b, halfway=middle, **networks)

# %% [markdown]
# ## The ablation (Tables 1 and 4 to 7)
#
# Test accuracy of the midpoint (%), mean and range over the pairs of seeds. Statistics are measured as in the paper: in
# one pass, in which every layer normalises each batch ("simultaneous").


# %%
def ablation(fig, *matchings):
    """Midpoints of every variant; means over pairs by the paper's names, shown with their range."""
    table = fig.rows(matchings=list(matchings), renorms=VARIANTS, alphas=[0.5], method="simultaneous")
    table = table.assign(method="simultaneous")
    found = (100 * table.set_index(["renorm", "matching"])["accuracy"]).groupby(level=[0, 1], sort=False)
    words = found.agg(lambda values: f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})")
    display(words.unstack("matching", sort=False))
    mean = found.mean()
    ending = {m: f"_{m.lower()}" if len(matchings) > 1 else "" for m in matchings}
    fig.save(table, None, {f"{PUBLISHED[renorm]}{ending[m]}": value for (renorm, m), value in mean.items()})


if fig := section.item("rethink/table1"):
    ablation(fig, "WM")

# %%
if fig := section.item("rethink/table4"):
    ablation(fig, "AM")

# %%
if fig := section.item("rethink/table5"):
    ablation(fig, "WM", "AM")

# %%
if fig := section.item("rethink/table6"):
    ablation(fig, "WM", "AM")

# %%
if fig := section.item("rethink/table7"):
    ablation(fig, "WM", "AM")

# %% [markdown]
# ## Statistics of an independent solution (Table 8)
#
# The goal of each channel is taken from a third network of another seed. Its channels are in their own order: only the
# scale of a layer as a whole can be right.

# %%
if fig := section.item("rethink/table8"):
    table = fig.measure(independent_rows, (1, 2, 3))
    mean = 100 * table.groupby(["matching", "renorm"], sort=False)["accuracy"].mean()
    names = {"none": "", "RESCALE": "_rescale", "RESCALE average": "_rescale_average"}
    fig.save(table, None, {f"{m.lower()}{names[r]}": mean[m, r] for m, r in mean.index})

# %% [markdown]
# ## Sequential and simultaneous (Table 9)

# %%
if fig := section.item("rethink/table9"):
    kinds = {"REPAIR simultaneous": "repair", "REPAIR": "seq_repair", "RESCALE simultaneous": "rescale",
             "RESCALE": "seq_rescale"}  # fmt: skip
    table = fig.rows(matchings=["WM"], renorms=list(kinds), alphas=[0.5], splits=("test", "train"))
    mean = table[table["split"] == "test"].groupby("renorm", sort=False)[["accuracy", "loss"]].mean()
    accuracy = {f"{name}_accuracy": 100 * mean["accuracy"][renorm] for renorm, name in kinds.items()}
    fig.save(table, None, accuracy | {f"{name}_loss": mean["loss"][renorm] for renorm, name in kinds.items()})

# %% [markdown]
# ## Scales layer by layer (Fig. 4A and 4B)
#
# Mean size of the activations before and after each ReLU. In the paper, RESCALE and REPAIR give the scale back before
# the ReLU; behind it, only in aligned networks, because in others some units are always zero.

# %%
if fig := section.item("rethink/fig4ab"):
    table = fig.measure(scale_rows)
    shown = table[~table["network"].str.contains("AM") & (table["network"] != "not aligned + REPAIR")]
    shown = shown.assign(panel=shown["place"] + " the ReLU")
    figure = plots.lines(shown, "layer", {"scale": "scale (mean $|x|$)"}, columns="panel", xlabel="layer")
    last = table[table["layer"] == table["layer"].max()]
    mean = last[last["place"] == "after"].groupby("network", sort=False)["scale"].mean()
    fig.save(table, figure, {f"{name}, last ReLU": value / mean["endpoint A"] for name, value in mean.items()})

# %% [markdown]
# The figure has networks that are not aligned, and those that are matched by weights. The numbers are scales behind the
# last ReLU, relative to endpoint A's.
#
# ## Activations of a VGG and a ResNet, beside those of an untrained network (Figs. 29 to 34)

# %%
if fig := section.item("rethink/fig29-34"):
    table = fig.measure(scale_rows, True)
    panels = table.assign(panel=table["series"] + ", " + table["place"] + " ReLU")
    shown = {"scale": "scale (mean $|x|$)", "mean": "mean", "std": "standard deviation"}
    figure = plots.lines(panels, "layer", shown, columns="panel", xlabel="layer", log_y=["scale", "std"])
    before = table[table["place"] == "before"].groupby(["series", "network"], sort=False)["std"].mean()
    fig.save(table, figure, {f"{series}, {network}: std": value for (series, network), value in before.items()})

# %% [markdown]
# ## Check
#
# What the paper claims of these figures, and what ours show. A claim that does not hold here says so.

# %%
section.check()
