"""Permutations of hidden units: apply, compose, compare and disturb them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repairlib.groups import Permutation, PermutationSpec
from repairlib.interpolate import State, with_state


def permute_state(state: State, spec: PermutationSpec, permutation: Permutation) -> dict[str, Any]:
    """State dict of the permuted network: W -> P W on outgoing, W P^-1 on incoming axes (Jordan et al. 2022, Sec. 2.2).

    Args:
        state: the network's state dict. Untouched.
        spec: its groups.
        permutation: of some or all groups, int64 indices (units,): unit i of the result is unit ``perm[i]`` of the
            network.

    Raises:
        KeyError, ValueError: see `PermutationSpec.check` and `PermutationSpec.check_state`.
    """
    spec.check_state(state)
    out = dict(state)
    for tensor, axis, target, source in spec.moves(permutation):
        old = out[tensor]
        source, target = source.to(old.device), target.to(old.device)
        out[tensor] = old.index_copy(axis, target, old.index_select(axis, source))
    return out


def permute(model: nn.Module, spec: PermutationSpec, permutation: Permutation) -> nn.Module:
    """Permuted copy of a model; it computes the same function."""
    return with_state(model, permute_state(model.state_dict(), spec, permutation))


def random_permutation(spec: PermutationSpec, seed: int = 0) -> Permutation:
    """Independent uniform permutation of every group; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.size, generator=generator) for group in spec.groups}


def fill_identity(spec: PermutationSpec, some: Permutation | None) -> Permutation:
    """Permutations of all groups, the identity where `some` has none; raises what `PermutationSpec.check` does."""
    some = some or {}
    spec.check(some)
    identity = {group.name: torch.arange(group.size) for group in spec.groups}
    return identity | {name: perm.cpu() for name, perm in some.items()}


def invert(permutation: Permutation) -> Permutation:
    """Inverse: permuting by the result undoes permuting by the argument."""
    return {name: torch.argsort(perm) for name, perm in permutation.items()}


def compose(first: Permutation, then: Permutation) -> Permutation:
    """One permutation that does `first`, then `then`."""
    return {name: first[name][then[name]] for name in first}


def agreement(first: Permutation, second: Permutation) -> dict[str, float]:
    """Fraction of each group's units that two permutations of the same groups send to the same place, in [0, 1].

    >>> agreement({"0": torch.tensor([0, 1, 2])}, {"0": torch.tensor([0, 2, 1])})
    {'0': 0.333...}
    """
    if {name: len(p) for name, p in first.items()} != {name: len(p) for name, p in second.items()}:
        raise ValueError("the permutations are of different groups; were they found for one architecture?")
    return {name: float((p.cpu() == second[name].cpu()).double().mean()) for name, p in first.items()}


def chain(b_to_a: Permutation, c_to_a: Permutation) -> Permutation:
    """Matching of C to B through A: units with the same partner in A, ``P_CB = P_CA[P_BA^-1]``.

    `agreement` with a direct matching of C to B tells how transitive matching is (Csiszarik et al. 2023, Sec. 5.3).

    Args:
        b_to_a: unit i of A is matched with unit ``b_to_a[group][i]`` of B.
        c_to_a: the same for C.
    """
    return compose(c_to_a, invert(b_to_a))


def shuffle_and_recover(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    match: Callable[[nn.Module, nn.Module], Any],
    seed: int = 0,
) -> dict[str, float]:
    """Shuffle B at random, match it to A, and measure how much of the order is recovered (Qu & Horvath 2024, Sec. 3.2).

    Args:
        model_a, model_b: two networks in one basin and one order of units, such as a network and a retrained copy.
        spec: their permutation groups.
        match: function that returns a `Matching`, for instance ``lambda a, b: match_weights(a, b, spec=spec)``.
        seed: seed of the shuffle.

    Returns:
        Fraction of each group's units for which ``P_found = P_shuffle^-1``.
    """
    planted = random_permutation(spec, seed)
    return agreement(match(model_a, permute(model_b, spec, planted)).permutation, invert(planted))


def derange(
    permutation: Permutation, correlation: Mapping[str, Tensor], group: str, k: int, seed: int = 0
) -> Permutation:
    """Re-match the k least correlated pairs of one group by a random derangement (Csiszarik et al. 2023, Sec. 6.3).

    Args:
        permutation: a matching of B to A. Untouched.
        correlation: of the matched units (units,), see `Matching.correlation`.
        group: name of the group.
        k: number of pairs, 0 or 2 to the group's size; none keeps its partner.
        seed: seed of the derangement.

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
