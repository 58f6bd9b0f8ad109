"""Match the hidden units of two networks by their weights, and by training through that matching."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from repairlib.graph import (
    Axis,
    Batches,
    Permutation,
    PermutationSpec,
    permutation_spec,
    permute_state,
    random_permutation,
)  # fmt: skip
from repairlib.interpolate import check_compatible
from repairlib.matching import Matching, solve_assignment


class WeightCost:
    """Similarity ``<theta_A, P(theta_B)>`` of the weights of A and of a permuted B, kept up to date as groups move.

    As a function of one group's permutation it is ``sum_i C[i, p(i)]`` (Ainsworth et al. 2022, Eq. 4), where C sums one
    product of matrices for every weight axis that the group indexes. Such a product depends only on the groups on
    the *other* axes of its tensor, so that it is kept until one of them moves.

    Args:
        state_a, state_b: tensors of both networks by name, those to be compared.
        spec: the permutation groups.
        start: permutations to start at; a group that is missing starts at the identity.
    """

    def __init__(
        self,
        state_a: Mapping[str, Tensor],
        state_b: Mapping[str, Tensor],
        spec: PermutationSpec,
        start: Permutation | None = None,
    ):
        self.a, self.b = state_a, state_b
        self.permutation = {g.name: torch.arange(g.size) for g in spec.groups} | dict(start or {})
        self.axes: dict[str, list[Axis]] = {}
        self.on: dict[str, list[tuple[str, Axis]]] = {}  # tensor -> groups that it is indexed by
        for group in spec.groups:
            axes = [axis for axis in group.axes if axis.tensor in state_a]
            if axes:
                self.axes[group.name] = axes
            for axis in axes:
                self.on.setdefault(axis.tensor, []).append((group.name, axis))
        # Where one group lies on two axes of a tensor, C holds only for the permutation that it was computed with.
        self.quadratic = {name for name, axes in self.axes.items() if len({a.tensor for a in axes}) < len(axes)}
        self._products: dict[tuple[str, int, str], Tensor] = {}

    def permuted(self, tensor: str, but: int | None = None) -> Tensor:
        """B's tensor with its axes permuted, but for one."""
        value = self.b[tensor]
        order: dict[int, Tensor] = {}
        for group, axis in self.on[tensor]:
            if axis.axis != but:
                index = order.setdefault(axis.axis, torch.arange(value.shape[axis.axis]))
                index[axis.positions.flatten()] = axis.positions[self.permutation[group]].flatten()
        for number, index in order.items():
            value = value.index_select(number, index.to(value.device))
        return value

    def _rows(self, axis: Axis) -> tuple[Tensor, Tensor]:
        """A's tensor, and B's as the other groups permute it, with a row for every unit (units, ...)."""
        at = axis.positions.flatten()
        pair = []
        for x in (self.a[axis.tensor], self.permuted(axis.tensor, axis.axis)):
            x = x.movedim(axis.axis, 0)
            if not torch.equal(at, torch.arange(len(x))):
                x = x[at.to(x.device)]
            pair.append(x.reshape(len(axis.positions), -1))
        return pair[0], pair[1]

    def similarity(self, group: str) -> Tensor:
        """``C[i, j]``: inner product of the weights of A's unit i and B's unit j (units, units)."""
        total = 0
        for axis in self.axes[group]:
            key = (axis.tensor, axis.axis, group)
            if key not in self._products:
                a, b = self._rows(axis)
                self._products[key] = a @ b.T
            total = total + self._products[key]
        return total

    def up_to_date(self, group: str) -> bool:
        """Whether nothing that C depends on has moved since it was computed."""
        return all((axis.tensor, axis.axis, group) in self._products for axis in self.axes[group])

    def gain(self, group: str, perm: Tensor) -> float:
        """What the objective gains when a group moves to `perm`, in float64."""
        old = self.permutation[group]
        if group in self.quadratic:
            before = self.objective()
            self.permutation[group] = perm
            after, self.permutation[group] = self.objective(), old
            return after - before
        moved = torch.nonzero(perm != old).flatten()
        total = 0.0
        for axis in self.axes[group]:
            a, b = self._rows(axis)
            total += float((a[moved].double() * (b[perm[moved]].double() - b[old[moved]].double())).sum())
        return total

    def move(self, group: str, perm: Tensor) -> None:
        """Give a group another permutation; the products that it enters are forgotten."""
        self.permutation[group] = perm
        for axis in self.axes[group]:
            for other, its in self.on[axis.tensor]:
                if its.axis != axis.axis:
                    self._products.pop((its.tensor, its.axis, other), None)

    def objective(self) -> float:
        """``<theta_A, P(theta_B)>`` in float64, over the tensors that some group indexes."""
        return sum(float((self.a[name].double() * self.permuted(name).double()).sum()) for name in self.on)

    def descend(self, sweeps: int, generator: torch.Generator, tolerance: float = 1e-12) -> list[float]:
        """Solve the groups one after the other, in a new random order every sweep, until a sweep gains nothing.

        Returns:
            The objective at the start and after every sweep; it never decreases.
        """
        history = [self.objective()]
        scale = sum(float(self.a[n].double().norm() * self.b[n].double().norm()) for n in self.on)  # its largest value
        names, solved = list(self.axes), set()
        for _ in range(sweeps):
            gained = 0.0
            for group in (names[i] for i in torch.randperm(len(names), generator=generator).tolist()):
                if group in solved and self.up_to_date(group):
                    continue
                solved.add(group)
                perm = solve_assignment(self.similarity(group))
                # Rounding may prefer what is no better, in float32 by more than the tolerance.
                if (
                    not torch.equal(perm, self.permutation[group])
                    and (gain := self.gain(group, perm)) > tolerance * scale
                ):
                    self.move(group, perm)
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
    start: Permutation | None = None,
    seed: int = 0,
    restarts: int = 1,
    sweeps: int = 100,
    tolerance: float = 1e-12,
    buffers: bool = False,
) -> Matching:
    """Match by weights: permutation coordinate descent (Ainsworth et al. 2022, Algorithm 1).

    ``argmax_P <theta_A, P(theta_B)>``, which is ``argmin_P |theta_A - P(theta_B)|``, one group after the other.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: a batch of inputs, or an iterable of batches; only the shape of the first counts, and only without `spec`.
        spec: their permutation groups; derived from `model_a` when left out.
        start: permutations to start at instead of the identity.
        seed: of the order of the groups. The r-th restart has seed ``seed + r``.
        restarts: how many descents to make, the first from `start`, others from random permutations; the best counts.
        sweeps: most sweeps over all groups in a descent.
        tolerance: least gain of a step, relative to ``sum |W_A| |W_B|`` over the tensors W.
        buffers: whether BatchNorm's running statistics count as weights, as in the code of Qu & Horvath 2024.

    Returns:
        The best matching; its `history` is the objective at the start and after every sweep, never decreasing.

    Raises:
        ValueError: different architectures, non-finite weights, neither data nor spec, restarts or sweeps below 1.

    >>> a = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> match_weights(a, a, torch.zeros(1, 2)).permutation["0"].tolist()
    [0, 1, 2]
    """
    if restarts < 1 or sweeps < 1:
        raise ValueError(f"restarts and sweeps are at least 1, not {restarts} and {sweeps}")
    check_compatible(model_a.state_dict(), model_b.state_dict())
    if spec is None:
        spec = _derive(model_a, data)
    states = [_weights(model, buffers) for model in (model_a, model_b)]
    found = []
    for restart in range(restarts):
        first = start if restart == 0 else random_permutation(spec, seed + restart)
        cost = WeightCost(*states, spec, first)
        history = cost.descend(sweeps, torch.Generator().manual_seed(seed + restart), tolerance)
        found.append((history[-1], -restart, cost, history))
    _, _, best, history = max(found, key=lambda entry: entry[:2])
    objective = {}
    for group, perm in best.permutation.items():
        similarity = best.similarity(group).cpu() if group in best.axes else torch.zeros(len(perm), len(perm))
        objective[group] = float(similarity[torch.arange(len(perm)), perm].double().sum())
    return Matching(spec, best.permutation, objective=objective, history=tuple(history))


def match_straight_through(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable,
    *,
    spec: PermutationSpec | None = None,
    start: Permutation | None = None,
    seed: int = 0,
    epochs: int = 5,
    lr: float = 0.5,
    momentum: float = 0.9,
) -> Matching:
    """Match by training: the permutation whose midpoint has the least loss (Ainsworth et al. 2022, Algorithm 2).

    Weights ``theta`` start at A's. Each step projects them to ``P(theta_B)`` by weight matching, and moves them by SGD
    along the gradient of the loss at ``(theta_A + P(theta_B)) / 2``, as if the projection were the identity. BatchNorms
    of the midpoint use the statistics of the batch.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: re-iterable batches (x, y) with class labels y.
        spec: their permutation groups; derived from `model_a` when left out.
        start: permutations to start at; those of `match_weights` when left out.
        seed: of the order of the groups.
        epochs: passes over the data.
        lr, momentum: of SGD.

    Returns:
        The best permutations at the end of an epoch, or the start's; `history` is the midpoint's mean loss (nats) over
        the data at the start and after every epoch.

    Raises:
        ValueError: different architectures, non-finite weights, empty data, batches without labels.
    """
    data = list(data) if iter(data) is data else data
    if not all(isinstance(batch, (tuple, list)) and len(batch) > 1 for batch in data):
        raise ValueError("straight-through matching trains on labels: batches must be (x, y)")
    check_compatible(model_a.state_dict(), model_b.state_dict())
    if spec is None:
        spec = _derive(model_a, data)
    permutation = start or match_weights(model_a, model_b, spec=spec, seed=seed).permutation
    a, b = (_weights(model, buffers=False) for model in (model_a, model_b))
    whole_b = {name: value.detach() for name, value in model_b.state_dict().items()}
    net = copy.deepcopy(model_a).float().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    device = next(iter(a.values())).device

    def midpoint() -> dict[str, Tensor]:
        projected = permute_state(whole_b, spec, permutation)
        return {name: (a[name] + projected[name].to(a[name].dtype)) / 2 for name in a}

    def loss_of(weights: dict[str, Tensor], batch: Sequence) -> Tensor:
        x, y = (value.to(device) for value in batch[:2])
        return F.cross_entropy(functional_call(net, weights, (x.float(),)), y)

    def mean_loss() -> float:
        weights = midpoint()
        with torch.no_grad():
            losses = [(float(loss_of(weights, batch)), len(batch[1])) for batch in data]
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    if not any(len(batch[1]) for batch in data):
        raise ValueError("the training data is empty")
    theta = {name: value.clone() for name, value in a.items()}
    velocity = {name: torch.zeros_like(value) for name, value in a.items()}
    generator = torch.Generator().manual_seed(seed)
    history = [mean_loss()]
    best, best_loss = permutation, history[0]
    for _ in range(epochs):
        for batch in data:
            cost = WeightCost(theta, b, spec, permutation)
            cost.descend(1, generator)
            permutation = cost.permutation
            weights = {name: value.requires_grad_() for name, value in midpoint().items()}
            gradients = torch.autograd.grad(loss_of(weights, batch), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                velocity[name].mul_(momentum).add_(gradient, alpha=0.5)  # half: d midpoint / d theta
                theta[name].sub_(velocity[name], alpha=lr)
        history.append(mean_loss())
        if history[-1] < best_loss:
            best, best_loss = permutation, history[-1]
    return Matching(spec, best, history=tuple(history))


def _derive(model: nn.Module, data: Iterable | None) -> PermutationSpec:
    if data is None:
        raise ValueError("give `spec`, or data whose first batch shows the shape of an input")
    return permutation_spec(model, Batches([data] if isinstance(data, Tensor) else data, model).example())


def _weights(model: nn.Module, buffers: bool) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, and running statistics if asked for; half precision as float32."""
    tensors = dict(model.named_parameters())
    if buffers:
        tensors |= {name: x for name, x in model.named_buffers() if x.is_floating_point()}
    return {name: x.detach() if x.dtype == torch.float64 else x.detach().float() for name, x in tensors.items()}
