"""Matchings that the papers compare with: by training (straight-through estimator) and by optimal transport."""

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from repairlib.groups import Permutation, PermutationSpec, permutation_spec
from repairlib.interpolate import check_compatible
from repairlib.matching import Matching, gather_groups, solve_assignment
from repairlib.permutations import fill_identity, permute_state
from repairlib.tracing import Batches, as_batches, cast_input
from repairlib.weight_matching import WeightCost, derive_spec, float_weights, match_weights


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
    """Match by training, for the least loss of the midpoint (Ainsworth et al. 2022, Algorithm 2).

    Weights ``theta`` start at A's. Each step projects them to ``P(theta_B)`` by one sweep of weight matching from the
    last P, and moves them by SGD along the gradient of the loss at ``(theta_A + P(theta_B)) / 2``, as if the projection
    were the identity. BatchNorms of the midpoint use batch statistics, so a batch needs two examples or more.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: re-iterable batches (x, y) with class labels y.
        spec: their permutation groups; derived from `model_a` when left out.
        start: permutations to start at; those of `match_weights` when left out, the identity where groups are missing.
        seed: seed of the order of the groups.
        epochs: number of passes over the data.
        lr, momentum: of SGD.

    Returns:
        The best of the permutations at the start and after every epoch.

    Raises:
        ValueError: different architectures, non-finite weights, empty data, batches without labels.
    """
    data = as_batches(data)
    check_compatible(model_a.state_dict(), model_b.state_dict())
    if spec is None:
        spec = derive_spec(model_a, data)
    if start is None:
        start = match_weights(model_a, model_b, spec=spec, seed=seed).permutation
    permutation = fill_identity(spec, start)
    a, b = (float_weights(model, buffers=False) for model in (model_a, model_b))
    whole_b = {name: value.detach() for name, value in model_b.state_dict().items()}
    dtype = torch.promote_types(torch.float32, next(iter(a.values())).dtype)
    net = copy.deepcopy(model_a).to(dtype).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()

    def midpoint() -> dict[str, Tensor]:
        projected = permute_state(whole_b, spec, permutation)
        return {name: (a[name] + projected[name].to(a[name].dtype)) / 2 for name in a}

    def loss_of(weights: dict[str, Tensor], batch: object) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ValueError("straight-through matching trains on labels: batches must be (x, y)")
        x, y = batch[:2]
        try:
            logits = functional_call(net, weights, (cast_input(x, net),))
            return F.cross_entropy(logits, y.to(logits.device))
        except ValueError as error:
            raise ValueError(f"a batch of {len(x)} cannot be trained on: {error}; drop the last one?") from error

    def mean_loss() -> float:
        weights = midpoint()
        with torch.no_grad():
            losses = [(float(loss_of(weights, batch)), len(batch[1])) for batch in data]
        if not losses:
            raise ValueError("the training data is empty")
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

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
            with torch.enable_grad():
                weights = {name: value.requires_grad_() for name, value in midpoint().items()}
                loss = loss_of(weights, batch)
                gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True, allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                velocity[name].mul_(momentum).add_(gradient, alpha=0.5)  # half: d midpoint / d theta
                theta[name].sub_(velocity[name], alpha=lr)
        history.append(mean_loss())
        if history[-1] < best_loss:
            best, best_loss = permutation, history[-1]
    return Matching(spec, best, history=tuple(history))


@dataclass(frozen=True)
class SoftMatching:
    """Transport of B's units to A's, group by group.

    Attributes:
        spec: the permutation groups.
        plan: by group (units, units): unit i of the transported network is ``sum_j plan[i, j] unit j of B``. Rows and
            columns sum to 1; without regularisation it is a permutation matrix.
    """

    spec: PermutationSpec
    plan: dict[str, Tensor]

    def apply(self, model_b: nn.Module) -> nn.Module:
        """Copy of B with its units transported; it computes what B does only if the plans are permutations."""
        out = copy.deepcopy(model_b)
        state = dict(model_b.state_dict())
        for name, mix in self.plan.items():
            for axis in self.spec[name].axes:
                old = state[axis.tensor]
                index = axis.positions.flatten().to(old.device)
                rows = old.double().movedim(axis.axis, 0)[index].unflatten(0, tuple(axis.positions.shape))
                mixed = torch.tensordot(mix.to(old.device), rows, 1).flatten(0, 1).movedim(0, axis.axis)
                state[axis.tensor] = old.index_copy(axis.axis, index, mixed.to(old.dtype))
        out.load_state_dict(state)
        return out


def match_transport(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable,
    *,
    spec: PermutationSpec | None = None,
    regularization: float = 0.0,
    tap: str = "post",
) -> SoftMatching:
    """Transport plan of least cost between the units of each group, ``T = argmin <T, C>`` with uniform marginals.

    The cost is ``C_ij = E[(X_i of A - X_j of B)^2]``, by activations (Singh & Jaggi 2020, Sec. 4).

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: any iterable of batches.
        spec: their permutation groups; derived from `model_a` when left out.
        regularization: of the entropy (Cuturi 2013), relative to the mean cost; 0 gives permutations.
        tap: where activations are read, see `match_activations`.

    Raises:
        ImportError: regularisation needs the POT library, which is missing.
        ValueError: different architectures, non-finite weights or activations, an unknown option.
        UnsupportedNode: a group can be read at no node.
    """
    if not regularization >= 0:
        raise ValueError(f"regularization is 0 or more, not {regularization}")
    check_compatible(model_a.state_dict(), model_b.state_dict())
    batches = Batches(data, model_a)
    spec = permutation_spec(model_a, batches.example()) if spec is None else spec
    moments = gather_groups(model_a, model_b, batches, spec, tap)
    plan: dict[str, Tensor] = {}
    for group in spec.groups:
        moment = moments[group.taps[tap]]
        square = [moment.var(k) + moment.mean(k) ** 2 for k in (0, 1)]
        distance = square[0][:, None] + square[1] - 2 * moment.inner()
        blocks = group.channels[tap].T
        distance = functools.reduce(torch.add, (distance[channels][:, channels] for channels in blocks))
        if not distance.isfinite().all():
            raise ValueError(
                f"group {group.name!r}: the distances of units are not finite; look at the data, or convert the "
                "networks to a wider type"
            )
        plan[group.name] = _plan(distance.clamp_min(0).cpu(), regularization)
    return SoftMatching(spec, plan)


def _plan(distance: Tensor, regularization: float) -> Tensor:
    """Plan of least cost with rows and columns of sum 1; without regularisation, a permutation is among the best."""
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
