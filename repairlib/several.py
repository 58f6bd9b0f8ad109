"""Bring more than two networks into one order of units."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from repairlib.groups import Permutation
from repairlib.interpolate import interpolate_models, mix_states, with_state
from repairlib.matching import Matching, match_activations, match_activations_of_many
from repairlib.names import check
from repairlib.permutations import compose
from repairlib.recording import copy_model

REGIMES = ("reference", "sequential", "iterative")


@dataclass(frozen=True)
class AlignedNetworks:
    """Networks in one order of units.

    Attributes:
        models: the networks, permuted.
        permutation: unit i of the k-th result is unit ``permutation[k][group][i]`` of the k-th input.
        rounds: number of times that every network was matched.
        converged: whether the last round moved nothing (iterative); True in the other regimes, which need one round.
    """

    models: tuple[nn.Module, ...]
    permutation: tuple[Permutation, ...]
    rounds: int = 1
    converged: bool = True

    def mean(self) -> nn.Module:
        """Network with the mean of all weights, ``theta = sum_i theta_i / n``."""
        states = [model.state_dict() for model in self.models]
        return with_state(self.models[0], mix_states(states, [1 / len(states)] * len(states)))


def match_several(
    models: Sequence[nn.Module],
    match: Callable[[nn.Module, nn.Module], Matching],
    regime: str = "reference",
    *,
    rounds: int = 30,
    seed: int = 0,
) -> AlignedNetworks:
    """Match n networks (Qu & Horvath 2024, App. E.3, Algorithms 1 to 3).

    * reference: each to the first;
    * sequential: each to the one before it, as permuted;
    * iterative: in random order, each to the mean of all others, until a round moves nothing (Ainsworth et al. 2022,
      Algorithm 3). By weights it always converges; by activations often not, since those of a mean may collapse.

    Args:
        models: networks of one architecture. Untouched.
        match: function that matches a second network to a first, for instance
            ``lambda a, b: match_weights(a, b, spec=spec)``. With ``functools.partial(match_activations, data=data)``
            the reference regime runs every network once, side by side: all fit into memory, with a matrix (units,
            units) of each group and network.
        regime: one of the three.
        rounds: largest number of rounds of the iterative regime; the paper stops after 30.
        seed: seed of the order in the iterative regime.

    Raises:
        ValueError: unknown regime, or fewer than two networks.

    >>> from repairlib.weight_matching import match_weights
    >>> nets = [nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
    >>> match_several(nets, lambda a, b: match_weights(a, b, torch.zeros(1, 2)), "iterative").converged
    True
    """
    check(regime, REGIMES, "regime")
    if len(models) < 2 or rounds < 1:
        raise ValueError(f"matching needs two networks or more and a round, not {len(models)} and {rounds}")
    aligned = [copy_model(models[0]), *models[1:]]
    if regime != "iterative":
        permutations: list[Permutation] = []
        together = _match_together(match, models) if regime == "reference" else None
        for i in range(1, len(models)):
            matching = together[i - 1] if together else match(aligned[0 if regime == "reference" else i - 1], models[i])
            aligned[i] = matching.apply(models[i])
            permutations.append(matching.permutation)
        own = {name: torch.arange(len(perm)) for name, perm in permutations[0].items()}
        return AlignedNetworks(tuple(aligned), (own, *permutations))
    total: list[Permutation] = [{} for _ in models]
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, rounds + 1):
        moved = False
        for i in torch.randperm(len(models), generator=generator).tolist():
            others = [model.state_dict() for k, model in enumerate(aligned) if k != i]
            center = with_state(models[0], mix_states(others, [1 / len(others)] * len(others)))
            matching = match(center, aligned[i])
            moved |= any((perm != torch.arange(len(perm))).any() for perm in matching.permutation.values())
            aligned[i] = matching.apply(aligned[i])
            total[i] = compose(total[i], matching.permutation) if total[i] else matching.permutation
        if not moved:
            return AlignedNetworks(tuple(aligned), tuple(total), number, True)
    return AlignedNetworks(tuple(aligned), tuple(total), rounds, False)


def _match_together(match: Callable, models: Sequence[nn.Module]) -> list[Matching] | None:
    """All matchings to the first model from one pass of each, if it is activations that are matched."""
    if isinstance(match, functools.partial) and match.func is match_activations and not match.args:
        return match_activations_of_many(models[0], models[1:], **match.keywords)
    return None


def running_means(
    models: Iterable[nn.Module], match: Callable[[nn.Module, nn.Module], Matching], regime: str = "reference"
) -> Iterator[nn.Module]:
    """Means of the first 1, 2, 3, ... networks in one order of units, ``m_n = m_(n-1) + (theta_n - m_(n-1)) / n``.

    Each network is matched once and then let go, so that a hundred need no more memory than three. The n-th mean is
    that of `match_several` on the first n networks.

    Args:
        models: networks of one architecture; a generator may load each when its turn comes. Untouched.
        match: see `match_several`.
        regime: "reference" or "sequential" (Qu & Horvath 2024, App. E.3, Algorithms 1 and 2).

    Yields:
        One network for each of the models; the first is a copy of the first model.

    Raises:
        ValueError: unknown regime, or no network.

    >>> from repairlib.weight_matching import match_weights
    >>> nets = (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3))
    >>> len(list(running_means(nets, lambda a, b: match_weights(a, b, torch.zeros(1, 2)))))
    3
    """
    check(regime, REGIMES[:2], "regime")
    rest = iter(models)
    target = next(rest, None)
    if target is None:
        raise ValueError("there is no network to average")
    mean = copy_model(target)
    yield copy_model(mean)  # so that what is done to it changes no later mean
    for n, model in enumerate(rest, start=2):
        aligned = match(target, model).apply(model)
        mean = interpolate_models(mean, aligned, 1 / n)
        target = aligned if regime == "sequential" else target
        yield copy_model(mean)
