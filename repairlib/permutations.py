"""What is done with permutations once they are found: compare, chain and disturb them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from repairlib.graph import Permutation, PermutationSpec, compose, invert, permute, random_permutation
from repairlib.matching import Matching


def agreement(first: Permutation, second: Permutation) -> dict[str, float]:
    """Fraction of each group's units that two permutations send to the same place, in [0, 1].

    Raises:
        ValueError: they are not of the same groups and sizes.

    >>> agreement({"0": torch.tensor([0, 1, 2])}, {"0": torch.tensor([0, 2, 1])})
    {'0': 0.333...}
    """
    if {name: len(p) for name, p in first.items()} != {name: len(p) for name, p in second.items()}:
        raise ValueError("the permutations are of different groups; were they found for one architecture?")
    return {name: float((p.cpu() == second[name].cpu()).double().mean()) for name, p in first.items()}


def through(b_to_a: Permutation, c_to_a: Permutation) -> Permutation:
    """Matching of C to B by way of A: units that have the same partner in A (Csiszarik et al. 2023, Sec. 5.3).

    Unit i of A goes with unit ``b_to_a[i]`` of B and ``c_to_a[i]`` of C; so ``P_CB = P_CA[P_BA^-1]``. Transitivity: B
    and C permuted to A are also linearly connected with each other. `agreement` with a direct matching of C to B says
    how often the way through A ends at the same unit.
    """
    return compose(c_to_a, invert(b_to_a))


def shuffle_and_recover(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    match: Callable[[nn.Module, nn.Module], Matching],
    seed: int = 0,
) -> dict[str, float]:
    """Shuffle B at random, match it to A, and say how much of the order is found again (Qu & Horvath 2024, Sec. 3.2).

    Args:
        model_a, model_b: two networks in one basin, in one order of units, such as a network and a retrained copy.
        spec: their permutation groups.
        match: how to match, for instance ``lambda a, b: match_weights(a, b, spec=spec)``.
        seed: of the shuffle.

    Returns:
        Fraction of each group's units for which ``P_found = P_shuffle^-1``.
    """
    planted = random_permutation(spec, seed)
    return agreement(match(model_a, permute(model_b, spec, planted)).permutation, invert(planted))


def derange(
    permutation: Permutation, correlation: Mapping[str, Tensor], group: str, k: int, seed: int = 0
) -> Permutation:
    """Re-match the k least correlated pairs of one group at random, none with its old partner.

    The pairs are permuted by a derangement, uniform over all that have no fixed point: k = 0 changes nothing, k = 1 has
    none (Csiszarik et al. 2023, Sec. 6.3).

    Args:
        permutation: a matching of B to A. Untouched.
        correlation: of the matched units (units,), in A's order, as `Matching.correlation` holds them.
        group: whose units to re-match.
        k: how many, 0 or 2 to the group's size.
        seed: of the derangement.

    Raises:
        KeyError: no such group, or no correlations of it.
        ValueError: no derangement of k units exists.
    """
    if group not in permutation:
        raise KeyError(f"no group {group!r}; there are: {', '.join(permutation)}")
    old = permutation[group]
    if k == 1 or not 0 <= k <= len(old):
        raise ValueError(f"{k} of {len(old)} pairs cannot be deranged: k is 0, or 2 to {len(old)}")
    if group not in correlation:
        raise KeyError(
            f"no correlations of group {group!r}: a matching by weights has none, unit_agreement measures them"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(k)
    while k and (order == torch.arange(k)).any():  # one in e = 2.7 permutations is a derangement
        order = torch.randperm(k, generator=generator)
    worst = correlation[group].cpu().argsort(stable=True)[:k]
    new = old.clone()
    new[worst] = old[worst[order]]
    return permutation | {group: new}
