"""Match the hidden units of two networks by their weights."""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from repairlib.groups import Axis, Permutation, PermutationSpec, spec_of
from repairlib.inputs import Batches
from repairlib.interpolate import State, check_models
from repairlib.matching import Matching, solve_assignment
from repairlib.names import check
from repairlib.permutations import fill_identity, random_permutation
from repairlib.tracing import check_graphs, trace


def _select(x: Tensor, index: Iterable[Tensor], axes: Iterable[int] = range(1, 9)) -> Tensor:
    """Entries of a tensor along several axes, by default the second and those after it."""
    for axis, places in zip(axes, index, strict=False):
        if len(places) != x.shape[axis] or not torch.equal(places, torch.arange(len(places))):
            x = x.index_select(axis, places.to(x.device, non_blocking=True))  # waits for no GPU
    return x


class _Product:
    """Inner products of A's and B's units on one axis of one tensor, kept while B's other axes are permuted.

    ``C[i, j] = sum_u <A[i, u], B[j, p(u)]>`` over the places u of the other axis. Where p changes in a few places, only
    these are summed anew: most of the saving in the late sweeps of a descent.
    """

    def __init__(self, axis: Axis, a: Tensor, b: Tensor, others: list[int]):
        self.axis, self.weights, self.others = axis, (a, b), others
        self.index: list[Tensor] = []
        self.value: Any = None

    @functools.cached_property
    def a(self) -> Tensor:
        return self._units_first(self.weights[0])

    @functools.cached_property
    def b(self) -> Tensor:
        return self._units_first(self.weights[1])

    def _units_first(self, x: Tensor) -> Tensor:
        """Tensor as (units, one dimension for each other axis, all the rest)."""
        axis, at = self.axis, self.axis.positions.flatten()
        x = x.movedim([axis.axis, *self.others], list(range(1 + len(self.others))))
        if not torch.equal(at, torch.arange(len(x))):
            x = x[at.to(x.device)]
        x = x.reshape(len(axis.positions), axis.positions.shape[1], *x.shape[1 : 1 + len(self.others)], -1)
        return x.movedim(1, -2).flatten(-2).contiguous()

    def update(self, index: list[Tensor]) -> bool:
        """Update `value` to the places that the other axes' entries now come from; True if it changed."""
        if self.value is None:
            self.index, self.value = index, self.a.flatten(1) @ _select(self.b, index).flatten(1).T
            return True
        if all(map(torch.equal, index, self.index)):
            return False
        changed = torch.nonzero(index[0] != self.index[0]).flatten()
        if len(index) == 1 and 2 * len(changed) < len(index[0]):
            difference = _select(self.b, [index[0][changed]]) - _select(self.b, [self.index[0][changed]])
            self.value += _select(self.a, [changed]).flatten(1) @ difference.flatten(1).T
        else:
            self.value = self.a.flatten(1) @ _select(self.b, index).flatten(1).T
        self.index = index
        return True

    def gain(self, old: Tensor, new: Tensor) -> Tensor:
        """Change of ``sum_i C[i, p(i)]`` from one permutation to another, in float64 and from the weights."""
        moved = torch.nonzero(old != new).flatten()
        places = ((self.a, moved), (self.b, new[moved]), (self.b, old[moved]))
        a, b_new, b_old = (x[at.to(x.device, non_blocking=True)].double() for x, at in places)
        return (a * _select(b_new - b_old, self.index)).sum()


class WeightCost:
    """Objective of weight matching, ``<theta_A, P(theta_B)>``, kept up to date as groups move.

    As a function of one group's permutation it is ``sum_i C[i, p(i)]`` (Ainsworth et al. 2022, Eq. 4). C sums one
    product of matrices for every weight axis that the group indexes. Groups that `start` leaves out start at the
    identity.
    """

    def __init__(self, state_a: State, state_b: State, spec: PermutationSpec, start: Permutation | None = None):
        self.a, self.b = state_a, state_b
        self.permutation = fill_identity(spec, start)
        self.on: dict[str, dict[int, list[tuple[str, Axis]]]] = {}  # tensor -> axis -> groups that index it
        for group in spec.groups:
            for axis in group.axes:
                if axis.tensor in state_a:
                    self.on.setdefault(axis.tensor, {}).setdefault(axis.axis, []).append((group.name, axis))
        self.products: dict[str, list[tuple[str, _Product]]] = {}
        for tensor, by_axis in self.on.items():
            for number, groups in by_axis.items():
                others = [other for other in by_axis if other != number]
                for name, axis in groups:
                    product = _Product(axis, state_a[tensor], state_b[tensor], others)
                    self.products.setdefault(name, []).append((tensor, product))

    @functools.cached_property
    def least_gain(self) -> float:
        """What is more than rounding: 1e-12 of the largest value that the objective could have."""
        return 1e-12 * float(sum((self.a[n].norm() * self.b[n].norm()).double() for n in self.on))

    def places(self, tensor: str, axis: int) -> Tensor:
        """Index of the permuted B's entries along one axis of one tensor of B."""
        index = torch.arange(self.b[tensor].shape[axis])
        for group, indexed in self.on[tensor][axis]:
            index[indexed.positions.flatten()] = indexed.positions[self.permutation[group]].flatten()
        return index

    def update(self, group: str) -> bool:
        """Update the products of a group; True if one changed."""
        return any([p.update([self.places(tensor, axis) for axis in p.others]) for tensor, p in self.products[group]])

    def similarity(self, group: str) -> Tensor:
        """``C[i, j]``: inner product of the weights of A's unit i and B's unit j (units, units)."""
        self.update(group)
        return functools.reduce(torch.add, (product.value for _, product in self.products[group]))

    def objective(self) -> float:
        """``<theta_A, P(theta_B)>`` in float64, over the tensors that some group indexes."""
        places = {name: [self.places(name, axis) for axis in axes] for name, axes in self.on.items()}
        products = (self.a[x].double() * _select(self.b[x], places[x], on).double() for x, on in self.on.items())
        return float(sum(product.sum() for product in products))

    def gain(self, group: str, perm: Tensor) -> float:
        """Change of the objective when a group moves to `perm`."""
        old = self.permutation[group]
        if len({tensor for tensor, _ in self.products[group]}) == len(self.products[group]):
            return float(sum(product.gain(old, perm) for _, product in self.products[group]))
        # Where one group lies on two axes of a tensor, C holds only for the permutation that it was computed with.
        before, self.permutation[group] = self.objective(), perm
        after, self.permutation[group] = self.objective(), old
        return after - before

    def forward(self, only: Collection[str]) -> None:
        """Solve some groups once, in the order from inputs to outputs, if that is better than leaving them in place.

        A group is solved by those weights whose other axes are in order already. Weights that lead to groups not solved
        yet are left out: their inner products are noise. Groups that are not in `only` count as solved.
        """
        before, unmoved = self.objective(), dict(self.permutation)
        solved = self.products.keys() - {*only}
        for group in (name for name in self.products if name in only):
            self.update(group)
            known = [
                product.value
                for tensor, product in self.products[group]
                if solved >= {name for axis in product.others for name, _ in self.on[tensor][axis]}
            ]
            self.permutation[group] = solve_assignment(
                functools.reduce(torch.add, known) if known else self.similarity(group)
            )
            solved |= {group}
        if not self.objective() - before > self.least_gain:
            self.permutation = unmoved

    def descend(self, sweeps: int, generator: torch.Generator, only: Collection[str] | None = None) -> list[float]:
        """Solve group after group, in a new random order every sweep, until a sweep gains nothing.

        Args:
            sweeps: largest number of them.
            generator: of the order.
            only: groups to solve; None for all.

        Returns:
            Objective at the start and after every sweep; it never decreases.
        """
        history = [self.objective()]
        names, solved = [name for name in self.products if only is None or name in only], set()
        for _ in range(sweeps):
            gained = 0.0
            for group in (names[i] for i in torch.randperm(len(names), generator=generator).tolist()):
                if not self.update(group) and group in solved:
                    continue
                solved.add(group)
                perm = solve_assignment(self.similarity(group))
                gain = 0.0 if torch.equal(perm, self.permutation[group]) else self.gain(group, perm)
                if gain > self.least_gain:
                    self.permutation[group] = perm
                    gained += gain
            history.append(history[-1] + gained)
            if not gained:
                break
        return history


def match_weights(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable | None = None,
    *,
    spec: PermutationSpec | None = None,
    start: Permutation | str = "forward",
    seed: int = 0,
    restarts: int = 1,
    sweeps: int = 100,
    buffers: bool = False,
    only: Collection[str] | None = None,
) -> Matching:
    """Match by weights: permutation coordinate descent (Ainsworth et al. 2022, Algorithm 1).

    ``argmax_P <theta_A, P(theta_B)>``, which is ``argmin_P |theta_A - P(theta_B)|``, one group after the other.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: any iterable of batches; only the shape of the first is used, to derive `spec`.
        spec: their permutation groups; derived from `model_a` when left out.
        start: where the first descent starts:

            * "forward": every group is matched once, from the inputs on, by the weights from groups that are matched
              already. Higher optima in fewer sweeps than from the identity, above all between wide networks;
            * "identity": B's units as they are, as the algorithm is published. Also used where "forward" would begin
              lower;
            * permutations of yours.
        seed: seed of the order of the groups. The r-th restart has seed ``seed + r``.
        restarts: number of descents, the first from `start`, the others from random permutations; the best counts.
        sweeps: largest number of sweeps over all groups in a descent.
        only: names of the groups to match; None for all. The others stay where `start` has them, and have no objective.
        buffers: whether BatchNorm's running statistics count as weights, as in the code of Qu & Horvath 2024.

    Raises:
        ValueError: different architectures, non-finite weights, neither data nor spec, restarts or sweeps below 1, or
            an unknown start.

    >>> a = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> match_weights(a, a, torch.zeros(1, 2)).permutation["0"].tolist()
    [0, 1, 2]
    """
    if restarts < 1 or sweeps < 1:
        raise ValueError(f"restarts and sweeps are at least 1, not {restarts} and {sweeps}")
    if isinstance(start, str):
        check(start, ("forward", "identity"), "start")
    check_models(model_a, model_b)
    if spec is None:
        spec = derive_spec(model_a, model_b, data)
    spec.check_state(model_a.state_dict())
    only = [group.name for group in spec.groups] if only is None else [only] if isinstance(only, str) else list(only)
    for name in only:
        spec[name]  # a KeyError lists the groups
    states = [float_weights(model, buffers) for model in (model_a, model_b)]
    given = {} if isinstance(start, str) else start
    cost = WeightCost(states[0], states[1], spec, given)
    if start == "forward":
        cost.forward(only)
    best: Permutation = {}
    history = [-math.inf]
    for restart in range(restarts):
        if restart:
            drawn = random_permutation(spec, seed + restart)
            cost.permutation = fill_identity(spec, given) | {name: drawn[name] for name in only}
        objectives = cost.descend(sweeps, torch.Generator().manual_seed(seed + restart), only)
        if objectives[-1] > history[-1]:
            best, history = dict(cost.permutation), objectives
    cost.permutation = best
    objective = {}
    for group, perm in ((group, best[group]) for group in only):
        similarity = cost.similarity(group).cpu() if group in cost.products else torch.zeros(len(perm), len(perm))
        objective[group] = float(similarity[torch.arange(len(perm)), perm].double().sum())
    return Matching(spec, best, objective=objective, history=tuple(history))


def derive_spec(model_a: nn.Module, model_b: nn.Module, data: Iterable | None) -> PermutationSpec:
    """Permutation groups of two models of one architecture, for inputs of the shape of the first batch."""
    if data is None:
        raise ValueError("give `spec`, or data whose first batch shows the shape of an input")
    if isinstance(data, Iterator):
        data = itertools.islice(data, 1)
    example = Batches(data, model_a).example()
    net = trace(model_a, example)
    check_graphs(net, trace(model_b, example))
    return spec_of(net, example)


def float_weights(model: nn.Module, buffers: bool) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, and running statistics if asked for; half precision as float32."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if buffers:
        tensors |= {name: x for name, x in model.named_buffers() if x.is_floating_point()}
    return {name: x.detach() if x.dtype == torch.float64 else x.detach().float() for name, x in tensors.items()}
