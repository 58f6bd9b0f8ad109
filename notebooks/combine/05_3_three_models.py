# %% [markdown]
# # Mode Combinability, Sections 5.3 and 5.4: three models
#
# Two networks B and C are matched to a third one, A. Are they then matched with each other (Csiszárik et al. 2023,
# Sec. 5.3, Fig. 11a)? The path between them through A,
#
# $$\Theta_\alpha = (1-\alpha)\,\pi_B(\Theta_B) + \alpha\,\pi_C(\Theta_C),$$
#
# is drawn beside that of B and C as trained, and, which the paper does not show, that of B and C matched directly. Then
# all three are combined (Sec. 5.4, Fig. 11b):
#
# $$\Theta = w_A \Theta_A + w_B\,\pi_B(\Theta_B) + w_C\,\pi_C(\Theta_C), \qquad w_A + w_B + w_C = 1,\ w \ge 0,$$
#
# which is the paper's $\Theta_A + \lambda_B(\pi_B(\Theta_B) - \Theta_A) + \lambda_C(\pi_C(\Theta_C) - \Theta_A)$ with
# $\lambda_B = w_B$, $\lambda_C = w_C$. In Eq. 1 of the paper the coefficient multiplies the first network; here
# $\alpha = 0$ is the first one everywhere. Units are matched by weights (App. C).

# %% tags=["parameters"]
scale: str = "smoke"  # smoke, quick, fast or paper
items: str = ""  # comma-separated items to make, for instance "combine/fig11a"; empty: all

# %% tags=["runs"]
from companion.experiments.grids.combine import combined, overview
from companion.experiments.scales import by_scale, wanted

resnet, tiny, _, restarts = combined(scale)  # see the table below
# Seeds of A, B and C.
ONE, ALL = [(1, 2, 3)], [(1, 2, 3), (2, 3, 1), (3, 1, 2)]
TRIPLES = by_scale(scale, smoke=ONE, quick=ALL, fast=ALL, paper=ALL)
wide = by_scale(scale, smoke=resnet, quick=resnet, fast=resnet, paper="cifar10/resnet20-ln-w40/csiszarik")
points = by_scale(scale, smoke=3, quick=9, fast=25, paper=25)  # of a path, ends included
steps = by_scale(scale, smoke=2, quick=6, fast=20, paper=20)  # along each edge of the triangle

needs = {"combine/fig11a": resnet, "combine/figB20": tiny, "combine/fig11b": wide}
needs = {item: run for item, run in needs.items() if wanted(item, items)}
seeds = sorted({seed for triple in TRIPLES for seed in triple})
runs_of = {item: [f"{run}/s{seed}" for seed in seeds] for item, run in needs.items()}
runs = [run for used in runs_of.values() for run in used]

# %%
import time
from functools import partial

import pandas as pd
from torch import nn

from companion.experiments.mixtures import Lazy, best_combinations, evaluate_rows, mean_barriers
from companion.experiments.pairs import Pair, load_pair, title_of
from companion.figures.plots import combine as plots_combine
from companion.figures.report import save_item
from companion.runs import store
from repairlib.combine import simplex_grid
from repairlib.evaluation import evaluate_many
from repairlib.interpolate import interpolate_states, mix_states
from repairlib.permutations import agreement, chain
from repairlib.several import Several, match_several
from repairlib.weight_matching import match_weights

overview()

# %% [markdown]
# ## Measure
#
# `agreement` is the fraction of units of B that the way through A sends to the same unit of C as the direct matching
# does. Two random orders of n units agree on one of them on average.


# %%
def path_table(pair: Pair, several: Several, alphas: list[float]) -> list[dict]:
    """Rows of the three paths between B and C."""
    b, c, b_like_a, c_like_a = (net.state_dict() for net in (pair.a, pair.b, *several.models[1:]))
    ends = {"transitive": (b_like_a, c_like_a), "direct": (b, pair.aligned.state_dict()), "naive": (b, c)}
    named = [({"kind": kind, "alpha": alpha}, partial(interpolate_states, *ends[kind], alpha))
             for kind in ends for alpha in alphas]  # fmt: skip
    return evaluate_rows(pair, named)


def triangle_table(pair: Pair, several: Several, a: nn.Module, steps: int) -> list[dict]:
    """Rows of all combinations of the three on a grid, aligned with A and as trained."""
    rows = []
    for kind, networks in {"permuted": several.models, "naive": (a, pair.a, pair.b)}.items():
        states, weights = [net.state_dict() for net in networks], simplex_grid(3, steps)
        found = evaluate_many(pair.a, Lazy([partial(mix_states, states, w) for w in weights]), pair.test)
        rows += [{"kind": kind} | dict(zip(("w_a", "w_b", "w_c", "loss", "accuracy"), (*w, *result), strict=True))
                 for w, result in zip(weights, found, strict=True)]  # fmt: skip
    return rows


def agreement_table(pair: Pair, several: Several) -> list[dict]:
    """Rows of every group's agreement between the way through A and the direct matching."""
    direct = pair.matching.permutation
    found = agreement(chain(*several.permutation[1:]), direct)
    return [{"group": group, "units": len(direct[group]), "agreement": value} for group, value in found.items()]


# %%
alphas = [i / (points - 1) for i in range(points)]
tables, agreements, seconds = {}, {}, {}
for item, run in needs.items():
    start = time.perf_counter()
    tables[item], agreements[item] = [], []
    for triple in TRIPLES:
        columns = {"model": run, "triple": "-".join(map(str, triple))}
        a, b, c = (f"{run}/s{seed}" for seed in triple)
        pair = load_pair([b, c], match="weights", restarts=restarts)
        networks = [store.get(a, pair.dataset.device), pair.a, pair.b]
        several = match_several(networks, partial(match_weights, data=pair.calibration, restarts=restarts))
        if item == "combine/fig11b":
            tables[item] += [columns | row for row in triangle_table(pair, several, networks[0], steps)]
        else:
            tables[item] += [columns | row for row in path_table(pair, several, alphas)]
            agreements[item] += [columns | row for row in agreement_table(pair, several)]
    seconds[item] = time.perf_counter() - start


# %%
def path_summary(item: str) -> dict[str, float]:
    """Barriers (accuracy in [0, 1]), means over triples, and agreement over all units."""
    means = mean_barriers(tables[item], each="triple")
    groups = pd.DataFrame(agreements[item])
    print(groups.groupby(["group", "units"], sort=False)["agreement"].mean().round(3).to_string())
    return {f"{kind}_{metric}": row[metric] for kind, row in means.iterrows() for metric in means} | {
        "agreement": (groups.agreement * groups.units).sum() / groups.units.sum(),
        "agreement_by_chance": len(groups) / groups.units.sum(),
    }


def save_path(item: str, summary: dict[str, float]) -> None:
    """Draw, print and save the paths."""
    title, marks = title_of(needs[item]), {0: "model B", 1: "model C"}
    figure = plots_combine.performance(tables[item], "alpha", xlabel=r"$\alpha$", title=title, marks=marks)
    save_item(item, scale, tables[item], summary, figure, runs=runs_of[item], seconds=seconds[item])
    print(pd.Series(summary).round(3).to_string())


# %% [markdown]
# ## Transitivity (Fig. 11a)
#
# At `quick` (seeds 1 to 3, each of them A once) the way through A connects ResNets: at the middle they lose 5 points,
# against 1 when they are aligned directly and 62 when they are not aligned at all. Both ways agree on 16 % of the
# units only, if ten times as many as by chance: they are two different matchings.

# %%
if wanted("combine/fig11a", items):
    fig11a = path_summary("combine/fig11a")
    save_path("combine/fig11a", fig11a)

# %% [markdown]
# ## Transitivity, Tiny-10 (Fig. B.20)

# %%
if wanted("combine/figB20", items):
    figB20 = path_summary("combine/figB20")
    save_path("combine/figB20", figB20)

# %% [markdown]
# ## Combining three models (Fig. 11b)
#
# One triangle for every choice of A. The best network, $\Theta^*$, is the one with the highest accuracy, of several the
# one with the lowest loss. As in the paper it is chosen on the test set among many, which alone makes it look better
# than it is; the lowest loss is less prone to that.
#
# At `quick` the best combination errs on fewer test images than all three ResNets in two of three triples; it lies on
# an edge, close to a corner. In the third it is as good as the best of them. No combination has a lower loss than the
# best of the three. The worst combinations of aligned networks lie between B and C, whose units were not matched with
# each other, and are still near the corners; others fall to chance in the middle.

# %%
if wanted("combine/fig11b", items):
    whole = pd.DataFrame(tables["combine/fig11b"])
    places = (whole[["w_a", "w_b", "w_c"]] > 0).sum(axis=1).map({1: "corner", 2: "edge", 3: "interior"})
    frame = whole.assign(place=places).query("kind == 'permuted'")
    best, corners = best_combinations(frame, "triple"), frame[frame["place"] == "corner"].groupby("triple")
    by_triple = frame.groupby("triple")
    fig11b = {"worst_accuracy": by_triple.accuracy.min().mean(), "best_accuracy": best.accuracy.mean()}
    fig11b |= {f"{which}_corner_accuracy": corners.accuracy.agg(how).mean()
               for which, how in (("best", "max"), ("mean", "mean"))}  # fmt: skip
    fig11b |= {"best_loss": by_triple.loss.min().mean(), "best_corner_loss": corners.loss.min().mean()}
    fig11b |= {f"best_in_{place}": int((best.place == place).sum()) for place in ("interior", "edge", "corner")}
    fig11b["beats_all_three"] = int((best.accuracy > corners.accuracy.max()).sum())
    fig11b["worst_accuracy_naive"] = whole.query("kind == 'naive'").groupby("triple").accuracy.min().mean()
    figure = plots_combine.triangle(whole, title=title_of(wide))
    of = {"runs": runs_of["combine/fig11b"], "seconds": seconds["combine/fig11b"]}
    save_item("combine/fig11b", scale, whole, fig11b, figure, **of)
    print(pd.Series(fig11b).round(4).to_string())

# %% [markdown]
# ## Check
#
# The order of units does not change the loss: all three paths have the same ends, and these are corners of the triangle
# if that is of the same networks. Of trained networks of digits is asserted, as means over triples: the barrier through
# A lies between that of the direct matching and half of that of no matching, and the two matchings agree on more than
# twice as many units as by chance.

# %%
for item in {"combine/fig11a", "combine/figB20"} & set(needs):
    frame = pd.DataFrame(tables[item])
    ends = frame[frame["alpha"].isin([0, 1])].groupby(["triple", "alpha"])["loss"].agg(["min", "max"])
    assert (ends["max"] - ends["min"]).max() < 1e-4, ends
if {"combine/fig11a", "combine/fig11b"} <= set(needs) and wide == resnet:
    frame, path = (pd.DataFrame(tables[item]) for item in ("combine/fig11b", "combine/fig11a"))
    frame = frame[frame["kind"] == "permuted"]
    for corner, alpha in {"w_b": 0, "w_c": 1}.items():
        found = frame[frame[corner] == 1].set_index("triple")["loss"]
        assert (found - path[path["alpha"] == alpha].groupby("triple")["loss"].mean()).abs().max() < 1e-4, found
if scale == "quick":
    for item in {"combine/fig11a", "combine/figB20"} & set(needs):
        found = fig11a if item == "combine/fig11a" else figB20
        through_a = found["transitive_accuracy_barrier"]
        assert found["direct_accuracy_barrier"] < through_a, found
        assert through_a < found["naive_accuracy_barrier"] / 2, found
        assert found["agreement"] > 2 * found["agreement_by_chance"], found
