"""Long tables: every network between every pair of runs, evaluated, a row each."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import nn

from companion.experiments.ensembles import Balanced, MixedLogits
from companion.experiments.methods import MATCHINGS, RENORMS
from companion.experiments.pairs import Pair, pairs_of
from companion.experiments.tables import MEASURES, Table, barriers
from companion.runs import train
from companion.runs.data import iterate
from companion.runs.names import seeded
from repairlib.diagnostics import unit_agreement
from repairlib.evaluation import evaluate
from repairlib.names import check


def path_rows(
    pair: Pair,
    alphas: Iterable[float],
    *,
    matchings: Sequence[str] | Mapping[str, Sequence[str]] = ("AM",),
    renorms: Sequence[str] = ("none", "REPAIR"),
    splits: Sequence[str] = ("test",),
    **options,
) -> list[dict]:
    """Rows of the paths between the endpoints of a pair.

    Each network is made once and evaluated on every split. Endpoints are evaluated once for all matchings, which only
    change the order of their units, and for all renormalisations that leave them as they are.

    Args:
        alphas: the points.
        matchings: names of `MATCHINGS`; or from each to its own renormalisations.
        renorms: names of `RENORMS`, for all matchings.
        splits: "test", "train" (without augmentation) or both.
        **options: of the renormalisations, see `renorm.Options`.

    Returns:
        Rows {matching, renorm, alpha, split, loss (nats), accuracy (in [0, 1])}, split by split.
    """
    each = matchings if isinstance(matchings, Mapping) else dict.fromkeys(matchings, renorms)
    data = {split: iterate(pair.dataset, split) for split in splits}
    alphas, evaluated, found = list(alphas), {}, {}
    for matching, its_renorms in each.items():
        check(matching, MATCHINGS, "matching")
        for renorm in its_renorms:
            how = options if renorm != "none" else {}
            path = pair.path(matching, renorm, **how)
            moves_ends = RENORMS[renorm].moves_ends or bool(how)
            for alpha in alphas:
                key = (matching, renorm, alpha)
                if alpha in (0, 1):
                    key = ("any", renorm if moves_ends else "any", alpha)
                if key not in evaluated:
                    model = path(alpha)
                    evaluated[key] = [evaluate(model, data[split]) for split in splits]
                found[matching, renorm, alpha] = evaluated[key]
    return [
        {"matching": matching, "renorm": renorm, "alpha": alpha, "split": split}
        | {"loss": results[place][0], "accuracy": results[place][1]}
        for place, split in enumerate(splits)
        for (matching, renorm, alpha), results in found.items()
    ]


def rows(
    configurations: Iterable[Mapping],
    seeds: Sequence[int],
    *,
    matchings: Sequence[str] | Mapping[str, Sequence[str]] = ("AM",),
    renorms: Sequence[str] = ("none", "REPAIR"),
    alphas: Iterable[float] = (0, 0.5, 1),
    splits: Sequence[str] = ("test",),
    calibration: int = 5000,
    device: str | None = None,
    pairs: Callable[..., Iterable[tuple[str, Pair]]] = pairs_of,
    **options,
) -> pd.DataFrame:
    """One row for each run, pair of seeds, matching, renormalisation, alpha and split.

    Each pair is loaded once, each matching made once, each network made once and evaluated on all splits.

    Args:
        configurations: each {"run": a run name without its seed, such as "digits/resnet20-ln-w1/quick", and any other
            columns, such as "series": "ln", "width": 1}, which its rows repeat.
        seeds: (1, 2, 3) gives the pairs 1-2, 1-3 and 2-3.
        matchings, renorms, alphas, splits, options: see `path_rows`.
        calibration: training images for matching and statistics, see `load_pair`.
        device: default `train.default_device()`.
        pairs: gives them, if they are kept somewhere; see `pairs_of`.

    Returns:
        Columns {**configuration, pair: "1-2", matching, renorm, alpha, split, loss (nats), accuracy (in [0, 1])}.
    """
    alphas = list(alphas)
    return pd.DataFrame(
        [
            {**configuration, "pair": name, **row}
            for configuration in configurations
            for name, pair in pairs(configuration["run"], seeds, calibration, device)
            for row in path_rows(pair, alphas, matchings=matchings, renorms=renorms, splits=splits, **options)
        ]
    )


def usual_renorm(run: str) -> str:
    """How a network between others is renormalised: RESET with BatchNorm, nothing with LayerNorm, else REPAIR.

    >>> usual_renorm("cifar10/vgg16-ln-w1/qu"), usual_renorm("cifar10/vgg16-plain-w1/qu")
    ('none', 'REPAIR')
    """
    norm = train.parse_run(seeded(run, 1), check_data=False).model.norm
    return {"bn": "RESET", "ln": "none"}.get(norm, "REPAIR")


def equal_steps(points: int) -> list[float]:
    """Equally spaced alphas from 0 to 1, both ends included.

    >>> equal_steps(3)
    [0.0, 0.5, 1.0]
    """
    return [i / (points - 1) for i in range(points)]


def match_rows(pair: Pair) -> list[dict]:
    """Similarity of the weights of A and B as trained, and while B's units are being matched by weights.

        <theta_A, P(theta_B)> / (|theta_A| |theta_B|),

    the objective (Csiszarik et al. 2023, Algorithm 1) relative to what it is between equal networks, over all weights
    that a permutation moves. Of several descents it is the best, which need not start at the order as trained.

    Returns:
        Rows {sweep: over all layers, from 0, similarity, as_trained: without any permutation}.
    """
    matching = pair.matching
    moved = {axis.tensor for group in matching.spec.groups for axis in group.axes}
    a, b = (
        torch.cat([value.detach().double().flatten() for name, value in model.named_parameters() if name in moved])
        for model in (pair.a, pair.b)
    )
    whole = float(a.norm() * b.norm())
    start = {"as_trained": float(a @ b) / whole}
    return [{"sweep": i, "similarity": value / whole} | start for i, value in enumerate(matching.history)]


def filter_rows(pair: Pair, layer: str = "stem", weight: str = "conv1.weight") -> list[dict]:
    """First-layer filters of A with those of B that they are matched with (Jordan et al. 2022, Fig. 9).

    Args:
        pair: matched by permutations.
        layer: the node whose units are correlated, see `corrections.target_nodes`.
        weight: the filters.

    Returns:
        Rows {unit: of A, matched_unit: of B, correlation: of these two on training images, as_trained: of unit i of A
        and unit i of B}.
    """
    group = next(g for g in pair.matching.spec.groups if (weight, 0) in {(axis.tensor, axis.axis) for axis in g.axes})
    matched, as_trained = (
        next(iter(unit_agreement(pair.a, b, pair.calibration, [layer]).values())).tolist()
        for b in (pair.aligned, pair.b)
    )
    units = zip(pair.matching.permutation[group.name].tolist(), matched, as_trained, strict=True)
    return [
        {"unit": i, "matched_unit": j, "correlation": after, "as_trained": before}
        for i, (j, after, before) in enumerate(units)
    ]


def reduction_rows(tables: Iterable[Table], least: float = 0.01) -> list[dict]:
    """By how much REPAIR lowers the accuracy barrier of the midpoint, ``(before - after) / before``, for each pair.

    Args:
        tables: long, see `rows`; the test split of aligned networks counts. A pair in two tables counts once.
        least: networks are left out if their mean barrier before REPAIR is smaller (0.01 is a point), and pairs that
            have none.

    Returns:
        Rows {run, row: "ResNet20, digits", norm: "bn", "ln" or "none", width, pair, before, after (points),
        reduction (%)}. `plots.reductions` draws them.
    """
    found: dict[tuple, dict] = {}
    for table in tables:
        table = pd.DataFrame(table)
        table = table[(table["alpha"].isin([0, 0.5, 1])) & (table["split"] == "test") & (table["matching"] != "none")]
        measured = barriers(table[["run", "pair", "renorm", "alpha", "loss", "accuracy"]])
        drops = measured.pivot_table(index=["run", "pair"], columns="renorm", values="accuracy_barrier", sort=False)
        drops = drops[drops["none"].groupby(level="run").transform("mean") >= least]
        for (run, pair), row in drops[drops["none"] > 0].iterrows():
            name = train.parse_run(f"{run}/s1", check_data=False)
            norm = name.model.norm if name.model.norm in ("bn", "ln") else "none"
            before, after = 100 * row["none"], 100 * row["REPAIR"]
            found[run, pair] = {
                "run": run, "row": f"{name.model.title}, {name.data}", "norm": norm,
                "width": name.model.width, "pair": pair,
                "before": before, "after": after, "reduction": 100 * (before - after) / before,
            }  # fmt: skip
    return list(found.values())


def baseline_rows(pair: Pair, whole: nn.Module, alphas: Iterable[float]) -> list[dict]:
    """Tidy rows of what merged networks are measured against (Jordan et al. 2022, App. C, Fig. 13).

    The endpoints are corrected on the pair's test images, whose labels are not used for it.

    Args:
        pair: A trained on data with more of the first half of the classes, B with more of the others.
        whole: a network trained on all of the data.
        alphas: the points at which the ensemble is evaluated.

    Returns:
        Rows {network, alpha, loss (nats), accuracy (in [0, 1])} on the test set: "ensemble" at every alpha, then
        "corrected A", "corrected B" and "full data", which have no alpha (None). `plots.merging` draws them.
    """
    classes = range(pair.dataset.classes)
    half = len(classes) // 2
    models = [("ensemble", alpha, MixedLogits(pair.a, pair.b, alpha)) for alpha in alphas]
    models += [
        ("corrected A", None, Balanced(pair.a, classes[:half], pair.test)),
        ("corrected B", None, Balanced(pair.b, classes[half:], pair.test)),
        ("full data", None, whole),
    ]
    return [
        {"network": network, "alpha": alpha, **dict(zip(MEASURES, pair.evaluate(model), strict=True))}
        for network, alpha, model in models
    ]
