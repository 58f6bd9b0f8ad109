"""How units are matched and networks are renormalised, by name: one vocabulary for tables, figures and the explorer.

Whoever adds a matching or a renormalisation adds an entry here.
"""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from torch import nn

from repairlib import interpolate_models, match_activations, match_straight_through, match_transport, match_weights
from repairlib.renorm import Repair, reset

Path = Callable[[float], nn.Module]  # alpha -> network


class MatchingMethod(NamedTuple):
    """One way to match units.

    Attributes:
        label: what it is called where there is room.
        match: (model_a, model_b, data, **options) -> `Matching`; None leaves B's units as trained.
    """

    label: str
    match: Callable | None


class Renormalisation(NamedTuple):
    """One way to renormalise the networks between two endpoints.

    Attributes:
        label: what it is called where there is room.
        path: (model_a, model_b, data, **options) -> `Path`.
        moves_ends: whether it changes the networks at alpha 0 and 1 too. Then each depends on its own endpoint only.
        needs: a kind of layer that the networks must have, such as "BatchNorm"; empty if any network will do.
    """

    label: str
    path: Callable[..., Path]
    moves_ends: bool = False
    needs: str = ""


def _interpolated(model_a: nn.Module, model_b: nn.Module, data: Iterable, **options) -> Path:
    return lambda alpha: interpolate_models(model_a, model_b, alpha)


class RepairPath:
    """REPAIR with some options fixed; all of the data counts unless `limit` says otherwise.

    Args:
        **fixed: options of `repairlib.Repair`.
    """

    def __init__(self, **fixed):
        self.fixed = {"limit": None} | fixed

    def __call__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        data: Iterable,
        *,
        measured: list[Repair] | None = None,
        **options,
    ) -> Path:
        """The path.

        Args:
            model_a, model_b, data: aligned endpoints, and what statistics are measured on.
            measured: REPAIRs of the same three. Their statistics are used where they fit; else a new one is added.
            **options: further options.
        """
        options = self.fixed | options
        measured = [] if measured is None or "others" in options else measured  # others are endpoints, too
        for repair in measured:
            with contextlib.suppress(ValueError):  # it has other statistics
                return _models(repair.with_options(**options))
        measured.append(Repair(model_a, model_b, data, **options))
        return _models(measured[-1])


def _models(repair: Repair) -> Path:
    return lambda alpha: repair(alpha).model


def _reset(model_a: nn.Module, model_b: nn.Module, data: Iterable, **options) -> Path:
    return lambda alpha: reset(interpolate_models(model_a, model_b, alpha), data, **options).model


MATCHINGS: dict[str, MatchingMethod] = {
    "none": MatchingMethod("not aligned", None),
    "AM": MatchingMethod("aligned by activations", match_activations),
    # From the order as trained, as the papers run it; the default start of the library finds higher optima.
    "WM": MatchingMethod("aligned by weights", partial(match_weights, start="identity")),
    "STE": MatchingMethod("aligned by straight-through training", match_straight_through),
    "OT": MatchingMethod("fused by optimal transport", match_transport),
}
RENORMS: dict[str, Renormalisation] = {
    "none": Renormalisation("as interpolated", _interpolated),
    "REPAIR": Renormalisation("REPAIR", RepairPath()),
    "REPAIR closed form": Renormalisation("REPAIR, closed form", RepairPath(method="closed-form")),
    "REPAIR simultaneous": Renormalisation("REPAIR, simultaneous", RepairPath(method="simultaneous")),
    "REPAIR conv": Renormalisation("REPAIR of convolutions only", RepairPath(targets="conv"), needs="Conv"),
    "REPAIR bn reset": Renormalisation(
        "REPAIR, BatchNorms reset", RepairPath(bn="reset"), moves_ends=True, needs="BatchNorm"
    ),
    "RESCALE": Renormalisation("RESCALE", RepairPath(correct="rescale")),
    "RESCALE average": Renormalisation("RESCALE, one scale a layer", RepairPath(correct="rescale", average=True)),
    "RESCALE simultaneous": Renormalisation(
        "RESCALE, simultaneous", RepairPath(correct="rescale", method="simultaneous")
    ),
    "RESHIFT": Renormalisation("RESHIFT", RepairPath(correct="reshift")),
    "RESET": Renormalisation("RESET", _reset, moves_ends=True, needs="BatchNorm"),
}
