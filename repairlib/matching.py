"""Match the hidden units of two networks by their activations."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from repairlib.graph import Batches, Permutation, PermutationSpec, UnsupportedNode, permutation_spec, permute, trace
from repairlib.interpolate import check_compatible
from repairlib.moments import Moments, gather


@dataclass(frozen=True)
class Matching:
    """Result of matching model B to model A, group by group.

    Attributes:
        spec: the permutation groups.
        permutation: unit i of A is matched with unit ``permutation[group][i]`` of B.
        correlation: of the matched units (units,), in A's order; 0 where one of the two is dead.
        objective: sum of the matched correlations (Jordan et al. 2022, Eq. 2).
        dead: numbers of units of A and of B that are constant on the data, matched in whatever order remains.
    """

    spec: PermutationSpec
    permutation: Permutation
    correlation: dict[str, Tensor]
    objective: dict[str, float]
    dead: dict[str, tuple[int, int]]

    def apply(self, model_b: nn.Module) -> nn.Module:
        """Copy of B with its units in A's order."""
        return permute(model_b, self.spec, self.permutation)

    def __str__(self) -> str:
        rows = [f"{'group':24} units  mean corr  dead A/B"]
        for name, corr in self.correlation.items():
            dead_a, dead_b = self.dead[name]
            rows.append(f"{name:24} {len(corr):5d}  {corr.mean():9.3f}  {dead_a}/{dead_b}")
        return "\n".join(rows)


def solve_assignment(similarity: Tensor) -> Tensor:
    """Permutation that maximises ``sum_i similarity[i, perm[i]]`` exactly (Kuhn 1955, by scipy).

    >>> solve_assignment(torch.tensor([[0.1, 0.9], [0.8, 0.95]])).tolist()
    [1, 0]
    """
    _, columns = linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)


def match_moments(moments: dict[str, Moments], spec: PermutationSpec, tap: str = "post", eps: float = 0.0) -> Matching:
    """Matching from statistics gathered with ``cross="full"`` at the groups' taps."""
    matching = Matching(spec, {}, {}, {}, {})
    for group in spec.groups:
        moment = moments[group.taps[tap]]
        # A unit of several channels (a group of a grouped convolution) is as similar as its channels are, in order.
        full, blocks = moment.corr(eps=eps).cpu(), group.channels[tap].T
        corr = sum(full[channels][:, channels] for channels in blocks)
        perm = solve_assignment(corr)
        matched = corr[torch.arange(group.size), perm]
        matching.permutation[group.name] = perm
        matching.correlation[group.name] = matched / len(blocks)
        matching.objective[group.name] = float(matched.sum())
        matching.dead[group.name] = (int(moment.dead(0).sum()), int(moment.dead(1).sum()))
    return matching


def match_activations(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable,
    *,
    spec: PermutationSpec | None = None,
    tap: str = "post",
    eps: float = 0.0,
) -> Matching:
    """Match by correlation of activations, all layers from one pass over the data.

    ``P_l = argmax_P sum_i corr(X_i of A, X_P(i) of B)`` for every group l (Jordan et al. 2022, Eq. 2).

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: any iterable of batches x or (x, y).
        spec: their permutation groups; derived from `model_a` when left out.
        tap: "post" reads a group after its non-linearity (as released), "pre" before it.
        eps: added to the product of standard deviations; 1e-4 is what the released code does.

    Raises:
        ValueError: different architectures (first differing parameter named), non-finite weights, empty data.

    >>> a = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> match_activations(a, a, [torch.randn(64, 2)]).permutation["0"].tolist()
    [0, 1, 2]
    """
    if tap not in ("pre", "post"):
        raise ValueError(f"tap must be 'pre' or 'post', not {tap!r}")
    check_compatible(model_a.state_dict(), model_b.state_dict())
    batches = Batches(data, model_a)
    example = batches.example()
    if spec is None:
        spec = permutation_spec(model_a, example)
    if unread := [group.name for group in spec.groups if tap not in group.taps]:
        raise UnsupportedNode(f"group {unread[0]!r}: no node holds its units along axis 1, to correlate them there")
    nets = [trace(model, example) for model in (model_a, model_b)]
    moments = gather(nets, batches, [group.taps[tap] for group in spec.groups], cross="full")
    return match_moments(moments, spec, tap, eps)
