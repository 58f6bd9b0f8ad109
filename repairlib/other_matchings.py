"""Matchings that the papers compare with: by training (straight-through estimator) and by optimal transport."""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from repairlib.groups import Permutation, PermutationSpec, permutation_spec
from repairlib.inputs import Batches, arguments, as_batches, cast_input, count
from repairlib.interpolate import check_models
from repairlib.matching import Matching, gather_groups, match_hidden, solve_assignment
from repairlib.permutations import fill_identity, permute_state
from repairlib.recording import copy_model
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
    were the identity. The best permutations at the start or after an epoch count. BatchNorms of the midpoint use batch
    statistics, so a batch needs two examples or more.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: re-iterable batches (x, y) with class labels y.
        spec: their permutation groups; derived from `model_a` when left out.
        start: permutations to start at; those of `match_weights` when left out, the identity where groups are missing.
        seed: seed of the order of the groups.
        epochs: number of passes over the data.
        lr, momentum: of SGD.

    Raises:
        ValueError: different architectures, non-finite weights, empty data, batches without labels.
    """
    data = as_batches(data)
    check_models(model_a, model_b)
    if spec is None:
        spec = derive_spec(model_a, model_b, data)
    if start is None:
        start = match_weights(model_a, model_b, spec=spec, seed=seed).permutation
    permutation = fill_identity(spec, start)
    a, b = (float_weights(model, buffers=False) for model in (model_a, model_b))
    whole_b = {name: value.detach() for name, value in model_b.state_dict().items()}
    dtype = torch.promote_types(torch.float32, next(iter(a.values())).dtype)
    net = copy_model(model_a).to(dtype).eval()
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
            logits = functional_call(net, weights, *arguments(cast_input(x, net)))
            return F.cross_entropy(logits, y.to(logits.device))
        except ValueError as error:
            raise ValueError(f"a batch of {count(x)} cannot be trained on: {error}; drop the last one?") from error

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


def match_transport(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable,
    *,
    spec: PermutationSpec | None = None,
    tap: str = "post",
) -> Matching:
    """Match by optimal transport of activations (Singh & Jaggi 2020, Sec. 4).

    ``T = argmin <T, C>`` with ``C_ij = E[(X_i of A - X_j of B)^2]`` for the units of each group. With uniform marginals
    a permutation is among the best plans. The matching's objective is ``-<T, C>``.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: any iterable of batches.
        spec: their permutation groups; derived from `model_a` when left out.
        tap: where activations are read, see `match_activations`.

    Raises:
        ValueError: different architectures, non-finite weights or activations, an unknown option.
        UnsupportedNode: a group can be read at no node.
    """
    check_models(model_a, model_b)
    batches = Batches(data, model_a)
    spec = permutation_spec(model_a, batches.example()) if spec is None else spec
    moments = gather_groups([model_a, model_b], batches, spec, tap)
    matching = Matching(spec, {})
    for group in spec.groups:
        if not group.taps:
            continue
        moment, blocks = moments[group.taps[tap]], group.channels[tap].T
        square = [moment.var(k) + moment.mean(k) ** 2 for k in (0, 1)]
        distance = square[0][:, None] + square[1] - 2 * moment.inner()
        distance = functools.reduce(torch.add, (distance[channels][:, channels] for channels in blocks)).cpu()
        if not distance.isfinite().all():
            raise ValueError(
                f"group {group.name!r}: the distances of units are not finite; look at the data, or convert the "
                "networks to a wider type"
            )
        perm = solve_assignment(-distance.clamp_min(0))
        matching.permutation[group.name] = perm
        matching.objective[group.name] = -float(distance[torch.arange(group.size), perm].sum())
    return match_hidden(matching, model_a, model_b)
