# %% [markdown]
# # Rethink Model Re-Basin, Appendix D.2: the precision of activation matching
#
# Activation matching correlates the units of two networks over the training data. Does it matter in which precision the
# correlations are summed up? (Qu and Horváth 2024, Table 2.)
#
# The paper compares three codes. **A** is Git Re-Basin's: one pass, sums in float32. **B** is REPAIR's: float64, and
# the data again for every layer. **Ours** (the paper's) is one pass in float64. It finds larger barriers with A. It
# blames float32, and that A sums over all data where B averages the means of batches.
#
# Reading the released code of A shows something else. It sums each channel over images and positions, and divides by
# the number of images only. The mean of a map of 16x16 positions comes out 256 times too large, and every correlation
# near 1. So this notebook has two versions of A: with the mean right, and as released.

# %% tags=["parameters"]
import os

scale: str = os.environ.get("REPAIRLIB_SCALE", "quick")  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make; empty: all

# %% tags=["runs"]
from companion.experiments.grids.rethink import precision
from companion.figures.section import Section

section = Section(precision, scale, items)
section.overview()

# %%
import torch
from IPython.display import display

from companion.experiments.pairs import load_pair
from companion.experiments.precision import Sums, implementation_rows
from companion.experiments.tables import barriers
from repairlib.recording import eval_mode

grid = section.grid

# %% [markdown]
# ## One layer by hand
#
# Correlations of the first convolution's units, by PyTorch in float64, and by each of the sums.

# %%
pair = load_pair(section.example(grid.vgg, grid.resnet_ln))
images = next(iter(pair.calibration))[0]
with eval_mode(pair.a, pair.b):
    first = next(name for name, m in pair.a.named_modules() if isinstance(m, torch.nn.Conv2d))
    a, b = (model.get_submodule(first)(images).relu() for model in (pair.a, pair.b))
rows = torch.cat([x.double().transpose(0, 1).flatten(1) for x in (a, b)])
exact = torch.corrcoef(rows)[: a.shape[1], a.shape[1] :].nan_to_num()
for name, (dtype, average) in {
    "float64": (torch.float64, "batches"), "float32, mean right": (torch.float32, "pooled"),
    "float32, faulty mean": (torch.float32, "faulty"),
}.items():  # fmt: skip
    sums = Sums(dtype, average)
    sums.update(a, b)
    error = float((sums.correlation() - exact).abs().max())
    print(f"{name}: correlations off by up to {error:.1e}, the lowest is {float(sums.correlation().min()):.2f}")

# %% [markdown]
# ## Every network (Table 2)
#
# `moved` is the share of the live units that are matched otherwise than by this library. The barrier is that of the
# midpoint's test accuracy, in points, after RESET where there is BatchNorm. Seconds depend on the machine; their ratios
# less so.

# %%
if fig := section.item("rethink/table2"):
    table = fig.measure(implementation_rows)
    found = barriers(table)
    found["moved"] = 100 * found["moved"] / found["units"]
    mean = found.assign(barrier=100 * found["accuracy_barrier"]).groupby(["series", "implementation"], sort=False)
    mean = mean[["barrier", "moved", "seconds"]].mean()
    display(mean.round(2).unstack("implementation", sort=False).T)
    short = {"this library": "here", "float64, one": "own", "float64, layer": "b", "float32, mean": "a_mean_right",
             "float32, faulty": "a"}  # fmt: skip
    names = {i: next(name for start, name in short.items() if i.startswith(start)) for i in mean.index.unique(1)}
    summary = {f"{s}_{names[i]}": row["barrier"] for (s, i), row in mean.iterrows()}
    seconds = mean["seconds"].rename(names, level="implementation")
    times = {f"{s}_time_{name}": value / seconds[s, "own"] for (s, name), value in seconds.items() if name != "own"}
    fig.save(table, None, summary | times)

# %% [markdown]
# ## Check
#
# What the paper claims of this table, and what ours shows. A claim that does not hold here says so.

# %%
section.check()
