"""Model fusion by optimal transport (Singh & Jaggi 2020): the soft alignment that the papers compare with."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from repairlib.groups import Axis, PermutationSpec, UnsupportedNode, permutation_spec
from repairlib.interpolate import check_compatible
from repairlib.matching import gather_groups, solve_assignment
from repairlib.names import check
from repairlib.tracing import Batches


@dataclass(frozen=True)
class SoftMatching:
    """Result of transporting B's units to A's, group by group.

    Attributes:
        spec: the permutation groups.
        plan: unit i of the transported network is ``sum_j plan[i, j] unit j of B`` (units, units); rows and columns sum
            to 1, and the plan is a permutation matrix where no regularisation blurs it.
    """

    spec: PermutationSpec
    plan: dict[str, Tensor]

    def apply(self, model_b: nn.Module) -> nn.Module:
        """Copy of B with its units transported; only for permutations does it compute what B does."""
        out = copy.deepcopy(model_b)
        out.load_state_dict(_transported(model_b.state_dict(), self.spec, self.plan))
        return out


def match_transport(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable,
    *,
    spec: PermutationSpec | None = None,
    cost: str = "activations",
    regularization: float = 0.0,
    tap: str = "post",
) -> SoftMatching:
    """Transport plan of least cost between the units of each group, ``T = argmin <T, C>`` with uniform marginals.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: any iterable of batches; with cost="weights", only the shape of the first counts.
        spec: their permutation groups; derived from `model_a` when left out.
        cost: "activations", ``C_ij = E[(X_i of A - X_j of B)^2]``, or "weights", the squared distance of incoming
            weights once the groups before have been transported, in order of execution.
        regularization: of the entropy (Cuturi 2013), relative to the mean cost; 0 gives permutations.
        tap: where activations are read, see `match_activations`.

    Raises:
        ImportError: regularisation needs the POT library, which is missing.
        ValueError: different architectures, non-finite weights or activations, an unknown option.
        UnsupportedNode: a group can be read at no node, or (cost="weights") has no incoming weights on a first axis.
    """
    check(cost, ("activations", "weights"), "cost")
    if not regularization >= 0:
        raise ValueError(f"regularization is 0 or more, not {regularization}")
    states = [model.state_dict() for model in (model_a, model_b)]
    check_compatible(*states)
    batches = Batches(data, model_a)
    spec = permutation_spec(model_a, batches.example()) if spec is None else spec
    moved = dict(states[1])
    if cost == "activations":
        moments = gather_groups(model_a, model_b, batches, spec, tap)
    parameters = dict(model_a.named_parameters())
    plan: dict[str, Tensor] = {}
    for group in spec.groups:
        if cost == "activations":
            moment, blocks = moments[group.taps[tap]], group.channels[tap].T
            square = [moment.var(k) + moment.mean(k) ** 2 for k in (0, 1)]
            distance = square[0][:, None] + square[1] - 2 * moment.inner()
            distance = sum(distance[channels][:, channels] for channels in blocks)
        else:
            axes = [axis for axis in group.axes if axis.axis == 0 and axis.tensor in parameters]
            if not any(parameters[axis.tensor].ndim > 1 for axis in axes) or _is_transposed(model_a, axes):
                raise UnsupportedNode(f"group {group.name!r} has no incoming weights along a first axis to compare; "
                                      "use cost='activations', or match_weights")  # fmt: skip
            rows = [torch.cat([_rows(s[axis.tensor], axis).flatten(1) for axis in axes], 1) for s in (states[0], moved)]
            distance = torch.cdist(*rows) ** 2
        if not distance.isfinite().all():
            raise ValueError(
                f"group {group.name!r}: the distances of units are not finite; look at the data, or convert the "
                "networks to a wider type"
            )
        plan[group.name] = _plan(distance.clamp_min(0).cpu(), regularization)
        if cost == "weights":
            moved = _transported(moved, spec, {group.name: plan[group.name]})
    return SoftMatching(spec, plan)


def _plan(distance: Tensor, regularization: float) -> Tensor:
    """Plan of least cost, its rows and columns of sum 1; without regularisation a permutation is among the best."""
    n = len(distance)
    if not regularization or not distance.any():
        return torch.eye(n, dtype=torch.float64)[solve_assignment(-distance)]
    try:
        import ot
    except ImportError as error:
        raise ImportError("regularised transport needs the POT library: pip install 'repairlib[fusion]'") from error
    uniform = ot.unif(n)
    blur = regularization * float(distance.mean())
    return n * torch.from_numpy(ot.sinkhorn(uniform, uniform, distance.numpy(), blur, "sinkhorn_log", 5000))


def _is_transposed(model: nn.Module, axes: list[Axis]) -> bool:
    """Whether one of the weights is of a transposed convolution, whose first axis is of the units it reads."""
    owners = (model.get_submodule(axis.tensor.rpartition(".")[0]) for axis in axes)
    return any(isinstance(owner, nn.modules.conv._ConvTransposeNd) for owner in owners)


def _rows(x: Tensor, axis: Axis) -> Float64[Tensor, "units ..."]:
    """A tensor with a row for each unit, in float64 (units, occurrences, ...)."""
    rows = x.double().movedim(axis.axis, 0)
    return rows[axis.positions.flatten().to(x.device)].unflatten(0, tuple(axis.positions.shape))


def _transported(state: Mapping[str, Tensor], spec: PermutationSpec, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with the units of the planned groups mixed, on every axis that indexes them."""
    out = dict(state)
    for name, mix in plan.items():
        for axis in spec[name].axes:
            old = out[axis.tensor]
            mixed = torch.tensordot(mix.to(old.device), _rows(old, axis), 1).flatten(0, 1).movedim(0, axis.axis)
            index = axis.positions.flatten().to(old.device)
            out[axis.tensor] = old.index_copy(axis.axis, index, mixed.to(old.dtype))
    return out
