"""Measure what makes two small networks combinable: docs/combining.md.

    python docs/combining.py      # trains 24 small networks, a quarter of an hour on one core

How they are trained and how they are matched is varied one by one; nothing in the table is typed in by hand.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pandas as pd

from companion.experiments.mixtures import combination_rows, stitching_rows
from companion.experiments.pairs import Pair
from companion.experiments.tables import sample_barriers
from companion.figures.report import environment
from companion.runs.data import iterate, load
from companion.runs.train import RECIPES, find_recipe, train
from repairlib.matching import match_activations

DATA, SEEDS, RESTARTS = "digits-hard", (1, 2, 3), 10
MODELS = ("resnet8-ln-w2", "tiny10-ln-w2")
PAGE = Path(__file__).with_name("combining.md")
HEADER = """# What makes small networks combinable

Written by `docs/combining.py` at commit {commit}, on {device}: {data}, seeds 1, 2 and 3. Test accuracy that
combinations of aligned networks lose against their endpoints, in points: the worst of a pair, mean over the three
pairs. *Midpoint*: straight interpolation. *Hypercube*: every weight uniform between A's and B's, 4 networks.
*Bernoulli*: every weight A's or B's, 4 networks. *Cut*: the first layers A's, the others B's, the worst of all cuts.

The first line is as in the notebooks of Mode Combinability: recipe `quick-csiszarik`, matched by weights, the best of
{restarts} descents. Each other line changes what it says.

"""
RECIPE, QUICK = find_recipe("quick-csiszarik", "resnet-ln", DATA), RECIPES["quick"]["resnet-ln"]
TRAINED = {
    "as in the notebooks": RECIPE,
    "weight decay 1e-4 instead of 0.01": replace(RECIPE, weight_decay=1e-4),
    "shifted only, neither resized nor rotated": replace(RECIPE, augment=("translate",)),
    f"recipe `quick`: both, learning rate 0.02, {QUICK.epochs} epochs": QUICK,
}


def by_weights(pair: Pair, **options) -> Pair:
    return replace(pair, method="WM", options=options)


def from_activations(pair: Pair) -> Pair:
    start = match_activations(pair.a, pair.b, pair.calibration).permutation
    return by_weights(pair, start=start)


MATCHED = {
    "one descent, from the order as trained": lambda pair: by_weights(pair),
    "one descent, from the matching by activations": from_activations,
    "matched by activations": lambda pair: replace(pair, method="AM", options={}),
}


def losses(pair: Pair) -> dict[str, float]:
    """Points of accuracy lost by the worst of each kind of combination."""
    grids = {"linear": [0.5], "uniform": [0.5], "bernoulli": [0.5]}
    rows = combination_rows(pair, grids, samples=4, matchings=("WM",))
    rows += [{"scheme": "cut"} | row for row in stitching_rows(pair, matchings=("WM",))]
    found = {row["scheme"]: 100 * row["accuracy_barrier"] for row in sample_barriers(rows, ("scheme",))}
    names = {"linear": "midpoint", "uniform": "hypercube", "bernoulli": "Bernoulli", "cut": "cut"}
    return {"ends": 100 * rows[0]["end_accuracy"]} | {name: found[scheme] for scheme, name in names.items()}


def pairs_of(model: str, recipe) -> list[Pair]:
    dataset = load(DATA)
    runs = [f"{DATA}/{model}/quick-csiszarik/s{seed}" for seed in SEEDS]
    nets = [train(run, recipe=recipe, device="cpu", progress=False)[0] for run in runs]
    batches = iterate(dataset, "train", limit=500), iterate(dataset, "test")
    return [by_weights(Pair((a, b), nets[i], nets[j], dataset, *batches), restarts=RESTARTS)
            for (i, a), (j, b) in itertools.combinations(enumerate(runs), 2)]  # fmt: skip


def main() -> None:
    made = environment()
    text = HEADER.format(commit=made["commit"][:12], device=made["device"], data=DATA, restarts=RESTARTS)
    for model in MODELS:
        text += f"| {model} | ends (%) | midpoint | hypercube | Bernoulli | cut |\n|---|---|---|---|---|---|\n"
        for what, recipe in TRAINED.items():
            pairs = pairs_of(model, recipe)
            variants = {what: lambda pair: pair} | (MATCHED if recipe is RECIPE else {})
            for name, change in variants.items():
                mean = pd.DataFrame([losses(change(pair)) for pair in pairs]).mean()
                text += f"| {name} | {' | '.join(f'{value:.1f}' for value in mean)} |\n"
                print(text.splitlines()[-1], flush=True)
        text += "\n"
    PAGE.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
