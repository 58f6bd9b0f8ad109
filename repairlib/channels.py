"""Structured pruning: remove whole channels, wherever a network's permutation groups say that they are.

    spec = permutation_spec(model, images)
    kept = keep_channels(channel_scores(model, spec), 0.5)
    masked = prune(model, channel_masks(model, spec, kept))   # zeros, of the same shapes
    small = remove_channels(model, spec, kept, images)        # physically smaller; computes the same as `masked`

A group knows all weights that make or read a channel, also those that a residual stream, a depthwise convolution or a
flattened map ties together. So what works for matching units works for removing them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repairlib.groups import PermutationSpec
from repairlib.inputs import Inputs, call, cast_input
from repairlib.names import check
from repairlib.pruning import SCOPES, prunable, prune
from repairlib.recording import copy_model, eval_mode, tensors_in

Kept = Mapping[str, Int[Tensor, " units"]]  # by group, the indices of the units that stay, in their order


def channel_scores(model: nn.Module, spec: PermutationSpec) -> dict[str, Float[Tensor, " units"]]:
    """Size of the weights that make a unit, relative to the other units of its group (after Li et al. 2017).

        score_u = sqrt(mean_l m_lu / mean_v m_lv),   m_lu = mean square of the weights of layer l that make unit u

    over all convolutions and linear layers l that have the unit among their outputs; a residual stream has several. As
    each layer counts relative to its own mean, a layer of many inputs or small weights counts as much as any other.

    Args:
        model: any network.
        spec: its groups, see `permutation_spec`.

    Returns:
        By group, float64 (units,); groups that no such layer makes are left out.
    """
    weights = prunable(model)
    outputs = {name: _output_axis(model, name) for name in weights}
    scores = {}
    for group in spec.groups:
        parts = []
        for axis in group.axes:
            if axis.tensor in weights and axis.axis == outputs[axis.tensor]:
                squares = weights[axis.tensor].double().movedim(axis.axis, 0).flatten(1).square().mean(1)
                units = squares[axis.positions.to(squares.device)].mean(1)
                parts.append(units / units.mean().clamp_min(torch.finfo(torch.float64).tiny))
        if parts:
            scores[group.name] = torch.stack(parts).mean(0).sqrt()
    return scores


def keep_channels(scores: Mapping[str, Tensor], sparsity: float, scope: str = "layer") -> dict[str, Tensor]:
    """Units of the largest scores; every group keeps one at least.

    Args:
        scores: by group, (units,).
        sparsity: share of the units that go, in [0, 1).
        scope: "layer" takes the same share of every group; "global" compares the units of all groups.

    Returns:
        By group, int64 indices in their order.

    Raises:
        ValueError: a sparsity that is no such share, or an unknown scope.

    >>> keep_channels({"conv1": torch.tensor([3.0, 1.0, 2.0, 4.0])}, 0.5)
    {'conv1': tensor([0, 3])}
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of the units to remove, in [0, 1), not {sparsity}")
    if check(scope, SCOPES, "scope") == "global":
        order = torch.cat([values.flatten() for values in scores.values()]).sort().values
        least = order[round(sparsity * len(order))]
        kept = {name: (values >= least).nonzero().flatten() for name, values in scores.items()}
    else:
        count = {name: len(values) - round(sparsity * len(values)) for name, values in scores.items()}
        kept = {name: values.topk(max(count[name], 1)).indices.sort().values for name, values in scores.items()}
    return {name: found if len(found) else scores[name].argmax()[None] for name, found in kept.items()}


def channel_masks(model: nn.Module, spec: PermutationSpec, kept: Kept) -> dict[str, Tensor]:
    """Masks, for `prune`, of every parameter that makes, scales, shifts or reads a unit that is not kept.

    Args:
        model: any network.
        spec: its groups.
        kept: by group, see `keep_channels`; a group that is not there keeps all its units.

    Raises:
        KeyError: a group that does not exist.
    """
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for tensor, axis, gone in _gone(spec, kept):
        if tensor in parameters:
            like = parameters[tensor]
            mask = masks.setdefault(tensor, torch.ones_like(like, dtype=torch.bool))
            mask.index_fill_(axis, gone.to(like.device), False)
    return masks


def remove_channels(model: nn.Module, spec: PermutationSpec, kept: Kept, example: Inputs) -> nn.Module:
    """Copy of a network, of the same class, with fewer channels; it computes what the masked network computes.

    Args:
        model: any network. Untouched.
        spec: its groups.
        kept: by group, see `keep_channels`.
        example: inputs (n, ...), on which the two are compared in float64.

    Raises:
        KeyError: a group that does not exist.
        ValueError: a layer that normalises across channels (LayerNorm, GroupNorm), so that removing some changes the
            others; a convolution in groups of several channels; or a forward with sizes of its own.
    """
    small = copy_model(model)
    gone: dict[tuple[str, int], Tensor] = {}
    for tensor, axis, positions in _gone(spec, kept):
        gone[tensor, axis] = torch.cat([gone.get((tensor, axis), positions.new_empty(0)), positions])
    touched = {}
    for (name, axis), positions in gone.items():
        owner, _, attribute = name.rpartition(".")
        module = small.get_submodule(owner)
        touched[owner] = module
        old = getattr(module, attribute)
        stays = torch.ones(old.shape[axis], dtype=torch.bool)
        stays[positions] = False
        new = old.detach().index_select(axis, stays.nonzero().flatten().to(old.device))
        setattr(module, attribute, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for name, module in touched.items():
        _resize(name, module)
    masked = prune(model, channel_masks(model, spec, kept)).double()
    x = cast_input(example, masked)
    probe = copy_model(small).double()
    with eval_mode(masked, probe):
        try:
            same = all(
                torch.allclose(a, b, rtol=1e-6, atol=1e-9)
                for a, b in zip(tensors_in(call(probe, x)), tensors_in(call(masked, x)), strict=True)
            )
        except RuntimeError as error:
            raise ValueError(f"channels of {type(model).__name__} cannot be removed, as its forward has sizes of its "
                             f"own: {error}; mask them with prune(model, channel_masks(...))") from error  # fmt: skip
    if not same:
        raise ValueError(f"without the channels, {type(model).__name__} computes something else than with zeros in "
                         "their place; mask them with prune(model, channel_masks(...))")  # fmt: skip
    return small


def _output_axis(model: nn.Module, name: str) -> int:
    transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvTransposeNd)
    return 1 if transposed else 0


def _gone(spec: PermutationSpec, kept: Kept) -> Iterator[tuple[str, int, Tensor]]:
    """Places of the units that are not kept: tensor, axis, positions."""
    for name, units in kept.items():
        group = spec[name]
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[units.cpu()] = True
        if not stays.any():
            raise ValueError(f"group {name!r} must keep one unit at least")
        for axis in group.axes:
            yield axis.tensor, axis.axis, axis.positions[~stays].flatten()


def _resize(name: str, module: Any) -> None:
    """Let a layer know its new shape."""
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        raise ValueError(f"{name!r} normalises across channels, so that removing some changes the others; mask them "
                         "with prune(model, channel_masks(...))")  # fmt: skip
    if isinstance(module, nn.modules.conv._ConvNd):
        outputs, inputs = module.weight.shape[:2]
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            outputs, inputs = inputs, outputs
        if module.groups > 1:
            if not module.groups == module.in_channels == module.out_channels:
                raise ValueError(f"{name!r} is a convolution in {module.groups} groups of several channels, which must "
                                 "stay equally large; mask them with prune(model, channel_masks(...))")  # fmt: skip
            module.groups = inputs = outputs
        module.out_channels, module.in_channels = outputs, inputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        module.num_features = len(next(t for t in (module.weight, module.running_mean) if t is not None))
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
