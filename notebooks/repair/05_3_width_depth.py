# %% [markdown]
# # REPAIR, Section 5.3: network width and depth
#
# How far the straight path between two aligned networks falls below its ends (Jordan et al. 2022, Eq. 1), before
# REPAIR and after, for MLPs and ResNets of growing width on several data sets and for VGGs of growing depth
# (Fig. 6; Fig. 12 shows the same in test loss). The paper's findings, which the last cell checks:
#
# * REPAIR lowers the barrier everywhere, and the wider the networks, the lower it is after REPAIR;
# * before REPAIR it rises with depth, after REPAIR it is small and nearly flat.
#
# Where the papers use MNIST, FashionMNIST, SVHN and CIFAR-10, scale `quick` has scikit-learn's digits and the same
# digits made harder: moved, turned, beside a neighbour, greyer, noisy (`repairlib.data.clutter`).

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "repair/fig6-left,repair/fig6-right"; empty: all

# %% tags=["runs"]
from repairlib.report import by_scale, wanted

SEEDS = by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2), paper=(1, 2))  # every two of them are a pair
data = by_scale(
    scale,
    smoke=["digits"],
    quick=["digits", "digits-hard"],
    fast=["mnist", "fashionmnist", "svhn", "cifar10"],
    paper=["mnist", "fashionmnist", "svhn", "cifar10"],
)
mlp = by_scale(
    scale,
    smoke="{}/mlp2-fused-w{}/smoke",
    quick="{}/mlp10-fused-w{}/quick",
    fast="{}/mlp10-fused-w{}/fast",
    paper="{}/mlp10-fused-w{}/jordan",
)
resnet = by_scale(
    scale,
    smoke="{}/resnet8-bn-w{}/smoke",
    quick="{}/resnet20-bn-w{}/quick",
    fast="{}/resnet20-bn-w{}/fast",
    paper="{}/resnet20-bn-w{}/jordan",
)
vgg = by_scale(
    scale,
    smoke="digits/vgg{}-fused-w0.0625/smoke",
    quick="digits/vgg{}-fused-w0.125/quick",
    fast="cifar10/vgg{}-fused-w1/fast",
    paper="cifar10/vgg{}-fused-w1/jordan",
)
units = by_scale(
    scale, smoke=[8, 16], quick=[16, 64, 256], fast=[32, 128, 512], paper=[32, 64, 128, 256, 512, 1024, 2048]
)
multipliers = by_scale(scale, smoke=[0.125, 0.25], quick=[0.25, 0.5, 1], fast=[1, 2, 4], paper=[1, 2, 4, 8, 16])
depths = by_scale(scale, smoke=[11, 13], quick=[11, 13, 16, 19], fast=[11, 13, 16, 19], paper=[11, 13, 16, 19])

panels = {
    "left": [{"run": mlp.format(name, n), "series": name, "width": n} for name in data for n in units],
    "middle": [{"run": resnet.format(name, n), "series": name, "width": n} for name in data for n in multipliers],
    "right": [{"run": vgg.format(depth), "depth": depth} for depth in depths],
}
panels = {k: v for k, v in panels.items() if wanted(f"repair/fig6-{k}", items) or wanted("repair/fig12", items)}
runs_of = {panel: [f"{row['run']}/s{seed}" for row in rows for seed in SEEDS] for panel, rows in panels.items()}
runs = [run for names in runs_of.values() for run in names]

# %%
import time

import matplotlib.pyplot as plt
import pandas as pd

from repairlib import plots
from repairlib.pairs import barrier_rows
from repairlib.report import save_item
from repairlib.train import default_device, parse_run

# %% [markdown]
# ## Barriers
#
# Every two seeds of every network, once for all figures: aligned by activations on training images, interpolated half
# way, and REPAIRed. As in the paper the barrier is that of the midpoint, measured on test images; for the VGGs on
# training images too. MLPs and VGGs are trained with BatchNorm, which is then fused into the weights: the networks
# that are averaged are plain. BatchNorms of ResNets are kept as interpolated (the released code re-estimates them:
# `barrier_rows(..., bn="reset")`).

# %%
tables, seconds = {}, {}
for panel, configurations in panels.items():
    start = time.perf_counter()
    tables[panel] = barrier_rows(configurations, SEEDS, splits=("test", "train") if panel == "right" else ("test",))
    seconds[panel] = time.perf_counter() - start


# %%
def means(panel: str, metric: str) -> pd.DataFrame:
    """Barriers before and after REPAIR (points or nats), means over pairs, by series (VGGs: split) and size."""
    frame = pd.DataFrame(tables[panel])
    keys = ["split", "depth"] if panel == "right" else ["series", "width"]
    columns = {f"{metric}_before": "before", f"{metric}_after": "after"}
    return frame.groupby(keys, sort=False)[list(columns)].mean().rename(columns=columns) * (
        100 if metric == "accuracy" else 1
    )


def summarise(panel: str, metric: str) -> dict:
    """The means of the smallest and of the largest networks."""
    table = means(panel, metric)
    sizes = table.index.get_level_values(1)
    ends = table[(sizes == sizes.min()) | (sizes == sizes.max())]
    kind = {"left": "mlp", "middle": "resnet", "right": "vgg"}[panel]
    return {
        f"{name}_{kind}{'' if panel == 'right' else '_w'}{size:g}_{when}": row[when]
        for (name, size), row in ends.iterrows()
        for when in ("before", "after")
    }


# %%
def draw(panel: str, metric: str, ax=None):
    """One panel of Fig. 6 or Fig. 12."""
    table, model = tables[panel], parse_run(runs_of[panel][0]).model
    if panel != "right":
        name, xlabel = ("MLPs", "units per layer") if panel == "left" else ("ResNets", "width multiplier")
        title = f"{name} of {model.depth} {'hidden layers' if panel == 'left' else 'layers'}"
        return plots.barriers(table, "width", metric=metric, lines=("--", "-"), xlabel=xlabel, title=title, ax=ax)
    table = [row | {"series": row["split"]} for row in table]  # a line for each
    title = f"VGGs of width {model.width:g} on {parse_run(runs_of[panel][0]).data}"
    figure = plots.barriers(
        table, "depth", metric=metric, lines=("--", "-"), xlabel="depth (VGG11 to VGG19)", title=title, ax=ax
    )
    figure.axes[0].set_ylabel("loss barrier (nats)" if metric == "loss" else "accuracy barrier\n(points)")
    return figure


def save_panel(panel: str) -> None:
    """Save one panel of Fig. 6 and print its means."""
    item = f"repair/fig6-{panel}"
    figure, summary = draw(panel, "accuracy"), summarise(panel, "accuracy")
    origin = {"runs": runs_of[panel], "device": default_device(), "seconds": seconds[panel]}
    save_item(item, scale, tables[panel], summary, figure, **origin)
    print(means(panel, "accuracy").round(1))


# %% [markdown]
# ## MLPs of growing width (Fig. 6 left)

# %%
if wanted("repair/fig6-left", items):
    save_panel("left")

# %% [markdown]
# ## ResNets of growing width (Fig. 6 middle)

# %%
if wanted("repair/fig6-middle", items):
    save_panel("middle")

# %% [markdown]
# ## VGGs of growing depth (Fig. 6 right)

# %%
if wanted("repair/fig6-right", items):
    save_panel("right")

# %% [markdown]
# ## In test loss (Fig. 12)

# %%
if wanted("repair/fig12", items):
    with plots.style():
        figure = plt.figure(figsize=(plots.COLUMN_WIDTH, 6.8))
        for panel, place in zip(panels, figure.subfigures(3), strict=True):
            draw(panel, "loss", place.subplots())
    table = [{"panel": panel} | row for panel, rows in tables.items() for row in rows]
    summary = {name: value for panel in panels for name, value in summarise(panel, "loss").items()}
    save_item(
        "repair/fig12", scale, table, summary, figure, runs=runs, device=default_device(), seconds=sum(seconds.values())
    )
    print(*(means(panel, "loss").round(3) for panel in panels), sep="\n")

# %% [markdown]
# ## Check
#
# The two findings, read off the tables: points of test accuracy, means over pairs. The second one needs networks that
# are wide enough. At `quick` VGGs have 8 to 64 channels: before REPAIR their midpoint is at chance with 11 layers
# already, so that its barrier has no room to rise, and after REPAIR the barrier rises. So only the first is asserted.


# %%
def width_helps(panel: str) -> dict[str, tuple[float, float]]:
    """Barrier after REPAIR of the narrowest and the widest networks, by data set."""
    after = means(panel, "accuracy")["after"]
    found = {name: (rows.iloc[0], rows.iloc[-1]) for name, rows in after.groupby(level=0, sort=False)}
    for name, (narrow, wide) in found.items():
        verdict = "falls" if wide < narrow else "does not fall"
        print(f"fig6-{panel}, {name}: the barrier after REPAIR {verdict} with width, {narrow:.1f} to {wide:.1f}")
    return found


def depth_is_flat(margin: float = 5) -> dict[str, tuple[float, float]]:
    """Barrier of the shallowest and the deepest VGGs before and after REPAIR; more than `margin` points is a change."""
    table = means("right", "accuracy").loc["test"]
    found = {when: (table[when].iloc[0], table[when].iloc[-1]) for when in table}
    for when, (shallow, deep) in found.items():
        verdict = "rises" if deep > shallow + margin else "falls" if deep < shallow - margin else "is flat"
        print(f"fig6-right: the barrier {when} REPAIR {verdict} with depth, {shallow:.1f} to {deep:.1f}")
    return found


# %%
for panel in ("left", "middle"):
    if panel in panels:
        found, table = width_helps(panel), means(panel, "accuracy")
        if scale == "quick":
            assert all(wide < 0.7 * narrow for narrow, wide in found.values()), found
            assert (table["after"] < table["before"]).all(), table
if "right" in panels:
    found, table = depth_is_flat(), means("right", "accuracy")
    if scale == "quick":
        assert (table["after"] < table["before"] - 5).all(), table
