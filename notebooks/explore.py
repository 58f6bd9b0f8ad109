# %% [markdown]
# # Explore: what becomes of the path between two networks
#
# Take two trained networks, align the second with the first or not, renormalise the networks between them or not,
#
# $$\theta_\alpha = (1-\alpha)\,\theta_1 + \alpha\,P(\theta_2),$$
#
# and see what accuracy or loss this has along $\alpha$, and how much each layer still varies, relative to the endpoints
# (Jordan et al. 2022, Secs. 3 and 4; RESCALE and RESHIFT: Qu & Horvath 2024, Sec. 4.1). The pairs to choose from are
# all runs that are stored and differ in the seed only: each notebook adds its own.

# %% tags=["parameters"]
scale: str = "smoke"  # smoke: a few steps, to test; quick: trained on digits; also fast, paper
items: str = ""  # not used here

# %% tags=["runs"]
from companion.experiments.scales import by_scale

run = by_scale(
    scale,
    smoke="digits/resnet8-bn-w0.25/smoke",
    quick="digits/resnet18-bn-w0.25/quick",
    fast="mnist/mlp6-fused-w128/fast",
    paper="cifar10/resnet18-bn-w1/jordan",
)
runs = [f"{run}/s{seed}" for seed in (1, 2)]

# %%
from companion.figures.explore import Choice, Explorer, panel

explorer = Explorer(calibration=500)  # images; 5,000 as in the paper give the figures' numbers, and take longer
choice = Choice(tuple(runs), matching="activations", renormalisation="REPAIR")

# %% [markdown]
# One choice as a picture, for a reader without a running kernel. Trains the two runs if they are not there yet.

# %%
figure, text = explorer.view(choice, alpha=0.5, metric="accuracy")
print(text)

# %% [markdown]
# The same with widgets. Another pair, matching or renormalisation takes some seconds, on a large network more; once
# its path is complete, alpha moves at once. RESET is for networks with BatchNorm, and changes the ends of the path a
# little: their statistics are measured again as well.

# %%
panel(explorer, choice)

# %% [markdown]
# ## Check
#
# Interpolation ends at the endpoints, whose variances average to a ratio of 1, and REPAIR leaves them alone.

# %%
bare, repaired = (explorer.path(line) for line in choice.lines.values())
for end in (0, -1):
    assert bare.loss[end] == repaired.loss[end] and bare.accuracy[end] == repaired.accuracy[end]
profiles = [explorer.profile(choice, alpha) for alpha in (0.0, 1.0)]
assert all(abs(a["ratio"] + b["ratio"] - 2) < 1e-9 for a, b in zip(*profiles, strict=True))
