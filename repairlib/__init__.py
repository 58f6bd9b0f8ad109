"""Align, merge, repair, renormalise, prune and diagnose neural networks.

The algorithms of Jordan et al. 2022 (REPAIR), Qu & Horvath 2024 (Rethink Model Re-Basin) and Csiszarik et al. 2023
(Mode Combinability).
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

# Every public module is there after `import repairlib`; groups_attention registers its rules.
from repairlib import channels as channels
from repairlib import combine as combine
from repairlib import diagnostics as diagnostics
from repairlib import fisher as fisher
from repairlib import groups_attention as groups_attention
from repairlib import permutations as permutations
from repairlib import pruning as pruning
from repairlib.corrections import Repaired
from repairlib.data_independent import Recorder, batch_statistics
from repairlib.evaluation import Score, evaluate, evaluate_many, mean_score
from repairlib.groups import permutation_spec
from repairlib.inputs import Limited, as_batches
from repairlib.interpolate import LinearPath, barrier_of, interpolate_models
from repairlib.matching import Matching, match_activations
from repairlib.names import check
from repairlib.other_matchings import match_straight_through, match_transport
from repairlib.permutations import permute
from repairlib.renorm import Goals, Repair, renormalize, reset
from repairlib.reports import Report, report
from repairlib.several import match_several, running_means
from repairlib.tracing import trace
from repairlib.weight_matching import match_weights
from repairlib.woodfisher import WoodFisher

__version__ = "0.1.0"
__all__ = [
    "Goals", "Matching", "Recorder", "Repair", "Repaired", "Report", "WoodFisher", "align", "barrier", "barrier_of",
    "batch_statistics", "evaluate", "evaluate_many", "interpolate_models", "match_activations",
    "match_several", "match_straight_through", "match_transport", "match_weights", "mean_score", "merge",
    "permutation_spec", "permute", "renormalize", "repair", "report", "reset", "running_means", "trace",
]  # fmt: skip
MATCH: dict[str, Callable] = {
    "activations": match_activations, "weights": match_weights,
    "straight-through": match_straight_through, "transport": match_transport,
}  # fmt: skip


def align(model_a: nn.Module, model_b: nn.Module, data: Iterable, method: str = "activations", **options) -> nn.Module:
    """Copy of B with its hidden units in A's order; it computes the same function as B.

    Args:
        model_a, model_b: two networks of one architecture. Untouched.
        data: any iterable of batches x or (x, y); "straight-through" needs labels, "weights" only one batch's shape.
        method: "activations", "weights", "straight-through" or "transport".
        **options: see `match_activations`, `match_weights`, `match_straight_through` and `match_transport`, which also
            return the permutation and how good it is.

    Raises:
        ValueError: unknown method, or networks that do not fit together.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> x = torch.randn(100, 2)
    >>> torch.allclose(align(a, b, [x])(x), b(x), atol=1e-6)
    True
    """
    return _match(model_a, model_b, data, method, **options).apply(model_b)


def _match(model_a: nn.Module, model_b: nn.Module, data: Iterable, method: str, **options) -> Matching:
    matching = MATCH[check(method, MATCH, "method")](model_a, model_b, data, **options)
    if matching.spec.stay:
        warnings.warn(f"no rule can free the hidden units of {', '.join(matching.spec.stay)}: they stay in B's order, "
                      "unmatched; print permutation_spec(model, x) to see all groups", stacklevel=3)  # fmt: skip
    return matching


def repair(model_a: nn.Module, model_b: nn.Module, data: Iterable, alpha: float = 0.5, **options) -> Repaired:
    """Interpolate two aligned networks and restore the statistics of the result (Jordan et al. 2022, Sec. 4).

    For arguments and errors see `Repair`, which makes many alphas from one pass and takes more than two networks.
    """
    return Repair(model_a, model_b, data, **options)(alpha)


def merge(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable,
    alpha: float = 0.5,
    *,
    match: str | Matching = "activations",
    limit: int | None = 5000,
    visible: bool = False,
    **options,
) -> Repaired:
    """Merge two networks into one: align B to A, interpolate, REPAIR.

    Args:
        model_a, model_b: two networks of one architecture, trained separately. Untouched.
        data: any iterable of batches x or (x, y) of training data.
        alpha: 0 is A, 1 is (the aligned) B.
        match: how to align, a method of `align`, or a matching that is there already.
        limit: number of examples to use, the first ones; None for all.
        visible: False corrects the convolutions and linear layers, heads included, whose weights can take a correction
            up. The result is then of the networks' own class. True is the paper's choice: convolutions, hidden linear
            layers and outputs of residual blocks.
        **options: see `Repair`, also for errors.

    Returns:
        The merged network as ``.model``, and the matching as ``.matching``; `report` says how it went.
    """
    data = Limited(as_batches(data), limit)
    matching = _match(model_a, model_b, data, match) if isinstance(match, str) else match
    if not visible:
        options = {"targets": ("conv", "linear", "classifier")} | options
    merged = repair(model_a, matching.apply(model_b), data, alpha, limit=limit, visible=visible, **options)
    return replace(merged, matching=matching)


def barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    test: Iterable,
    *,
    points: int = 11,
    metric: str = "loss",
    baseline: str = "linear",
    repaired: Repair | None = None,
    score: Score | None = None,
) -> float:
    """Barrier of the straight path: largest rise of the test loss, or error, over its ends (Jordan et al. 2022, Eq. 1).

    Args:
        model_a, model_b: endpoints.
        test: any iterable of batches (x, y, ...) with class labels y; see `evaluate`.
        points: number of equally spaced alphas, both ends included; at least 2.
        metric: "loss" (nats) or "accuracy", whose error is in [0, 1].
        baseline: "linear" (Eq. 1) or "mean" of the endpoints.
        repaired: `Repair` of the same endpoints, to measure the repaired path instead.
        score: another cost than these two, less is better, for networks that are no classifiers; see `mean_score`. The
            barrier has its unit.

    Raises:
        ValueError: fewer than two points, no batches, a cost that is NaN, `repaired` of other endpoints, an unknown
            metric or baseline.
    """
    if points < 2:
        raise ValueError(f"a path has two points or more, not {points}")
    test = as_batches(test)
    check(metric, ("loss", "accuracy"), "metric")
    if repaired is None:
        line = LinearPath(model_a, model_b)
        line.model.eval()  # once, not at every point
    else:
        repaired.check_ends(model_a, model_b)
    alphas, costs = [i / (points - 1) for i in range(points)], []
    for alpha in alphas:
        model = line.at(alpha) if repaired is None else repaired(alpha).model
        if score is not None:
            costs.append(mean_score(model, test, score))
            continue
        loss, accuracy = evaluate(model, test)
        costs.append(loss if metric == "loss" else 1 - accuracy)
    return barrier_of(alphas, costs, baseline)
