"""repairlib: align, merge, repair, renormalise and diagnose neural networks; a reproducible companion to three papers.

Jordan et al. 2022 (REPAIR), Qu & Horvath 2024 (Rethink Model Re-Basin), Csiszarik et al. 2023 (Mode Combinability).
"""

from collections.abc import Iterable

from torch import nn

# Every public module is there after `import repairlib`; groups_attention registers its rules.
from repairlib import combine as combine
from repairlib import diagnostics as diagnostics
from repairlib import groups_attention as groups_attention
from repairlib import permutations as permutations
from repairlib.corrections import Repaired
from repairlib.data_independent import Recorder, batch_statistics
from repairlib.evaluation import evaluate, evaluate_many
from repairlib.groups import permutation_spec
from repairlib.interpolate import Path, barrier_of, interpolate_models, walk_path
from repairlib.matching import Matching, match_activations
from repairlib.names import check as _check
from repairlib.other_matchings import match_straight_through, match_transport
from repairlib.permutations import permute
from repairlib.renorm import Goals, Repair, renormalize, reset
from repairlib.several import match_several
from repairlib.tracing import trace
from repairlib.weight_matching import match_weights

__version__ = "0.1.0"
__all__ = [
    "Goals", "Matching", "Path", "Recorder", "Repair", "Repaired", "align", "barrier", "barrier_of", "batch_statistics",
    "evaluate", "evaluate_many", "interpolate_models", "match_activations", "match_several", "match_straight_through",
    "match_transport", "match_weights", "merge", "permutation_spec", "permute", "renormalize", "repair", "reset",
    "trace", "walk_path",
]  # fmt: skip
MATCH = {
    "activations": match_activations, "weights": match_weights,
    "straight-through": match_straight_through, "transport": match_transport,
}  # fmt: skip


def align(model_a: nn.Module, model_b: nn.Module, data: Iterable, method: str = "activations", **options) -> nn.Module:
    """Copy of B with its hidden units reordered to match A's; it computes the same function as B.

    Args:
        model_a, model_b: two networks of one architecture. Untouched.
        data: any iterable of batches x or (x, y); "straight-through" needs labels, "weights" only one batch's shape.
        method: "activations", "weights", "straight-through", or "transport", whose result is a permuted B only where
            no regularisation mixes units.
        **options: of `match_activations`, `match_weights`, `match_straight_through` or `match_transport`, whose result
            holds the permutation and how good it is.

    Raises:
        ValueError: unknown method, or networks that do not fit together.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> x = torch.randn(100, 2)
    >>> torch.allclose(align(a, b, [x])(x), b(x), atol=1e-6)
    True
    """
    return MATCH[_check(method, MATCH, "method")](model_a, model_b, data, **options).apply(model_b)


def repair(model_a: nn.Module, model_b: nn.Module, data: Iterable, alpha: float = 0.5, **options) -> Repaired:
    """Interpolate two aligned networks and restore the statistics of the result (Jordan et al. 2022, Sec. 4).

    Args:
        model_a, model_b: aligned endpoints. Untouched.
        data: any iterable of batches x or (x, y); about 5,000 examples.
        alpha: 0 is A, 1 is B.
        **options: of `Repair`, which makes many alphas from one pass and takes more than two networks.
    """
    return Repair(model_a, model_b, data, **options)(alpha)


def merge(model_a: nn.Module, model_b: nn.Module, data: Iterable, alpha: float = 0.5, **options) -> Repaired:
    """Align B to A, interpolate, REPAIR: two networks into one.

    Args:
        model_a, model_b: two networks of one architecture, trained separately. Untouched.
        data: any iterable of batches x or (x, y) of training data; about 5,000 examples.
        alpha: 0 is A, 1 is (the aligned) B.
        **options: of `Repair`.
    """
    data = list(data) if iter(data) is data else data
    return repair(model_a, align(model_a, model_b, data), data, alpha, **options)


def barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    test: Iterable,
    *,
    points: int = 11,
    metric: str = "loss",
    baseline: str = "linear",
    repaired: Repair | None = None,
) -> float:
    """Largest rise of the test loss (nats), or error in [0, 1], along the straight path (Jordan et al. 2022, Eq. 1).

    Args:
        model_a, model_b: endpoints.
        test: any iterable of batches (x, y) with class labels y.
        points: equally spaced alphas, both ends included.
        metric: "loss" or "accuracy".
        baseline: "linear" (Eq. 1) or "mean" of the endpoints.
        repaired: REPAIR of the same endpoints: measure the repaired path instead.
    """
    test = list(test) if iter(test) is test else test
    make = (lambda a: repaired(a).model) if repaired else (lambda a: interpolate_models(model_a, model_b, a))
    alphas = [i / (points - 1) for i in range(points)]
    return walk_path(make, alphas, lambda net: evaluate(net, test)).barrier(metric, baseline)
