"""Match the hidden units of two networks by their activations."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repairlib.groups import Group, Permutation, PermutationSpec, UnsupportedNode, permutation_spec
from repairlib.inputs import Batches
from repairlib.interpolate import check_models
from repairlib.moments import Moments, gather
from repairlib.names import check
from repairlib.permutations import permute
from repairlib.tracing import check_graphs, trace


@dataclass(frozen=True)
class Matching:
    """Matching of model B's units to model A's, group by group; prints as a table.

    Attributes:
        spec: the permutation groups.
        permutation: unit i of A is matched with unit ``permutation[group][i]`` of B.
        correlation: of the matched units (units,), in A's order, 0 where one of the two is dead; the mean product with
            similarity="inner". By activations only.
        objective: maximised value of each group. By activations, the sum of the matched similarities (Jordan et al.
            2022, Eq. 2); by weights, the inner product of the weights that the group indexes.
        dead: numbers of A's and B's units that are constant on the data, which match in any order. By activations only.
        history: objective at the start and after every sweep (by weights), or loss in nats at the start and after every
            epoch (straight-through).
    """

    spec: PermutationSpec
    permutation: Permutation
    correlation: dict[str, Tensor] = field(default_factory=dict)
    objective: dict[str, float] = field(default_factory=dict)
    dead: dict[str, tuple[int, int]] = field(default_factory=dict)
    history: tuple[float, ...] = ()

    def apply(self, model_b: nn.Module) -> nn.Module:
        """Copy of B with its units in A's order."""
        return permute(model_b, self.spec, self.permutation)

    def __str__(self) -> str:
        rows = [f"{'group':24} units  moved  objective  mean corr  dead A/B"]
        for name, perm in self.permutation.items():
            moved = int((perm != torch.arange(len(perm))).sum())
            row = f"{name:24} {len(perm):5d}  {moved:5d}  {self.objective.get(name, math.nan):9.4g}"
            if name in self.correlation:
                row += f"  {self.correlation[name].mean():9.3f}  {'/'.join(map(str, self.dead.get(name, '')))}"
            rows.append(row)
        return "\n".join(rows)


def solve_assignment(similarity: Float[Tensor, "units units"]) -> Int[Tensor, " units"]:
    """Permutation that maximises ``sum_i similarity[i, perm[i]]`` exactly (Kuhn 1955, by scipy).

    >>> solve_assignment(torch.tensor([[0.1, 0.9], [0.8, 0.95]])).tolist()
    [1, 0]
    """
    from scipy.optimize import linear_sum_assignment  # here: it takes longer to import than all the rest

    _, columns = linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)


SIMILARITIES = ("correlation", "inner")


def gather_groups(models: Sequence[nn.Module], batches: Batches, spec: PermutationSpec, tap: str) -> dict[str, Moments]:
    """Moments of networks at the groups' taps, by node, the first with each of the others (``cross="full"``).

    Groups that no node shows are left out.
    """
    check(tap, ("pre", "post"), "tap")
    for group in spec.groups:
        if group.taps and tap not in group.taps:
            raise UnsupportedNode(
                f"group {group.name!r}: no node {tap}-activation holds its units; use tap={next(iter(group.taps))!r}"
            )
    example = batches.example()
    nets = [trace(model, example) for model in models]
    check_graphs(*nets)
    return gather(nets, batches, [group.taps[tap] for group in spec.groups if group.taps], "full")


def match_activations(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable,
    *,
    spec: PermutationSpec | None = None,
    tap: str = "post",
    similarity: str = "correlation",
    eps: float = 0.0,
) -> Matching:
    """Match by activations, all layers from one pass over the data (Jordan et al. 2022, Eq. 2).

    ``P_l = argmax_P sum_i corr(X_i of A, X_P(i) of B)`` for every group l. Groups whose units no node shows, such as
    the heads inside nn.MultiheadAttention, are matched by their weights, given all others.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: any iterable of batches x or (x, y).
        spec: their permutation groups; derived from `model_a` when left out.
        tap: "post" reads a group after its non-linearity, as the released code does; "pre" before it.
        similarity: "correlation", or "inner" for ``E[X_i X_j]``, not centred (Ainsworth et al. 2022, Eq. 1).
        eps: added to the product of standard deviations; 1e-4 is what the released code does.

    Raises:
        ValueError: different architectures (first differing parameter named), non-finite weights, empty data, or an
            option that does not exist.
        UnsupportedNode: a group can be read at its other tap only.

    >>> a = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> match_activations(a, a, [torch.randn(64, 2)]).permutation["0"].tolist()
    [0, 1, 2]
    """
    return match_activations_of_many(model_a, [model_b], data, spec=spec, tap=tap, similarity=similarity, eps=eps)[0]


def match_activations_of_many(
    model_a: nn.Module,
    others: Sequence[nn.Module],
    data: Iterable,
    *,
    spec: PermutationSpec | None = None,
    tap: str = "post",
    similarity: str = "correlation",
    eps: float = 0.0,
) -> list[Matching]:
    """Match several networks to one by activations, from one pass of each over the data.

    Args:
        model_a: the network that the others are matched to. Untouched.
        others: networks of its architecture. Untouched.
        data, spec, tap, similarity, eps: see `match_activations`, also for errors.

    Returns:
        The matching of each.
    """
    check(similarity, SIMILARITIES, "similarity")
    check_models(model_a, *others)
    batches = Batches(data, model_a)
    if not 0 <= eps < math.inf:  # so written, NaN is refused
        raise ValueError(f"eps is added to a product of standard deviations: at least 0, not {eps}")
    spec = permutation_spec(model_a, batches.example()) if spec is None else spec
    spec.check_state(model_a.state_dict())
    moments = gather_groups([model_a, *others], batches, spec, tap)
    matchings = [Matching(spec, {}) for _ in others]
    for group in spec.groups:
        if group.taps:
            for k, matching in enumerate(matchings, start=1):
                _match_group(matching, group, moments[group.taps[tap]], k, tap, similarity, eps)
    return [match_hidden(matching, model_a, other) for matching, other in zip(matchings, others, strict=True)]


def _match_group(
    matching: Matching, group: Group, moment: Moments, k: int, tap: str, similarity: str, eps: float
) -> None:
    """Match a group of network k to that of network 0, by their moments at its tap."""
    full = (moment.inner(k) if similarity == "inner" else moment.corr(k, eps=eps)).cpu()
    if not full.isfinite().all():
        raise ValueError(
            f"group {group.name!r}: the activations at node {group.taps[tap]!r} are not finite, or too large for "
            "their squares; look at the data, or convert the networks to a wider type"
        )
    # A unit of several channels (a group of a grouped convolution) is as similar as its channels are, in order.
    blocks = group.channels[tap].T
    similar = functools.reduce(torch.add, (full[channels][:, channels] for channels in blocks))
    # Among equals, such as dead units, a unit stays where it is: matching an aligned network moves nothing.
    stay = 1e-9 * float(similar.abs().max()) * torch.eye(group.size, dtype=similar.dtype)
    perm = solve_assignment(similar + stay)
    matched = similar[torch.arange(group.size), perm]
    matching.permutation[group.name] = perm
    matching.correlation[group.name] = matched / len(blocks)
    matching.objective[group.name] = float(matched.sum())
    dead = [moment.dead(i).cpu()[group.channels[tap]].all(1) for i in (0, k)]
    matching.dead[group.name] = (int(dead[0].sum()), int(dead[1].sum()))


def match_hidden(matching: Matching, model_a: nn.Module, model_b: nn.Module) -> Matching:
    """The same matching, with groups that are in no node's activations matched by their weights, given the others."""
    hidden = [group.name for group in matching.spec.groups if not group.taps]
    if not hidden:
        return matching
    from repairlib.weight_matching import match_weights  # here, as that module imports this one

    by_weights = match_weights(model_a, model_b, spec=matching.spec, start=matching.permutation, only=hidden)
    objective = matching.objective | {name: by_weights.objective[name] for name in hidden}
    return replace(matching, permutation=by_weights.permutation, objective=objective)
