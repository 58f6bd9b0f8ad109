"""Prune networks: how much each weight matters, which are kept, and the network that is left.

    masks = mask_smallest(magnitude_scores(model), 0.9)
    pruned = prune(model, masks)
    repaired = renormalize(pruned, model, images).model

Scores and masks are dictionaries by name of the weight. A mask is True where a weight is kept. Renormalising scales and
shifts whole channels, so that a weight that is zero stays zero (Qu & Horvath 2024, Sec. 5).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from repairlib.fisher import diagonal_fisher
from repairlib.names import check
from repairlib.recording import copy_model

SCOPES = ("global", "layer")

Scores = Mapping[str, Tensor]
Masks = Mapping[str, Tensor]


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Weights of all convolutions and linear layers by name: what is pruned (Singh & Alistarh 2020).

    Biases and normalisation layers are left alone. A weight that two layers share is there once.

    >>> list(prunable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))))
    ['0.weight', '3.weight']
    """
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    named = {id(module.weight): (f"{name}.weight".lstrip("."), module.weight.detach()) for name, module in layers}
    return dict(named.values())


# -------------------------------------------------------------------------------------------------------------- scores


def magnitude_scores(model: nn.Module) -> dict[str, Tensor]:
    """Magnitude ``|w|`` of every weight (Han et al. 2015)."""
    return {name: weight.abs() for name, weight in prunable(model).items()}


def fisher_scores(
    model: nn.Module, data: Iterable, labels: str = "data", *, limit: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """How much the loss rises without a weight, by the diagonal Fisher information, ``F_ii w_i^2 / 2``.

    This is Optimal Brain Damage (LeCun et al. 1989) with the Fisher information for the Hessian.

    Args:
        model: a classifier. Untouched.
        data: any iterable of batches (x, y).
        labels, limit, seed: see `fisher.diagonal_fisher`.
    """
    information = diagonal_fisher(model, data, labels, limit=limit, seed=seed)
    return {name: information[name] * weight.double() ** 2 / 2 for name, weight in prunable(model).items()}


def random_scores(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Uniform random numbers, the control that every other score must beat; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in prunable(model).items()}


# --------------------------------------------------------------------------------------------------------------- masks


def mask_smallest(scores: Scores, sparsity: float, scope: str = "global") -> dict[str, Tensor]:
    """Masks without the weights of the smallest scores.

    Exactly ``round(sparsity n)`` of n weights are masked. Of equal scores, the first ones are kept.

    Args:
        scores: by name, a number for every weight.
        sparsity: share of the weights to mask, in [0, 1].
        scope: "global" compares all weights with each other; "layer" masks the same share of every layer.

    Returns:
        By name, bool of the weight's shape: True is kept.

    Raises:
        ValueError: no scores, one that is NaN, a sparsity that is no share, or an unknown scope.

    >>> mask_smallest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 4.0])}, 0.5)
    {'a': tensor([ True, False]), 'b': tensor([False,  True])}
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the share of the weights to mask, in [0, 1], not {sparsity}")
    if not scores:
        raise ValueError("there are no scores: has the network a convolution or a linear layer?")
    for name, values in scores.items():
        if values.isnan().any():
            raise ValueError(f"scores of {name!r} are NaN, which is neither large nor small")
    if check(scope, SCOPES, "scope") == "layer":
        return {name: _largest(values.flatten(), sparsity).view(values.shape) for name, values in scores.items()}
    kept = _largest(torch.cat([values.flatten() for values in scores.values()]), sparsity)
    parts = kept.split([values.numel() for values in scores.values()])
    return {name: part.view(values.shape) for (name, values), part in zip(scores.items(), parts, strict=True)}


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """Which scores (n,) are among the n - round(sparsity n) largest."""
    masked = round(sparsity * len(scores))
    if not masked:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(masked).values
    kept = scores > threshold
    equal = (scores == threshold).nonzero().flatten()
    kept[equal[: len(scores) - masked - int(kept.sum())]] = True
    return kept


def mask_n_of_m(scores: Scores, n: int = 2, m: int = 4) -> dict[str, Tensor]:
    """Masks that keep the n largest of every m scores along the inputs of a layer, as 2:4 hardware wants it.

    Args:
        scores: by name, (outputs, inputs, ...).
        n, m: how many of how many. A layer whose number of inputs m does not divide keeps all its weights.

    Raises:
        ValueError: not 0 < n <= m.
    """
    if not 0 < n <= m:
        raise ValueError(f"{n} of {m} scores cannot be kept: n is 1 to m")
    masks = {}
    for name, values in scores.items():
        if values.shape[1] % m:
            masks[name] = torch.ones_like(values, dtype=torch.bool)
            continue
        rows = values.movedim(1, -1)
        parts = rows.reshape(-1, m)
        kept = torch.zeros_like(parts, dtype=torch.bool).scatter_(1, parts.topk(n, 1).indices, True)
        masks[name] = kept.view(rows.shape).movedim(-1, 1)
    return masks


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks of a network that `torch.nn.utils.prune` has pruned, or that has zeros already, for `prune`.

    >>> net = nn.Sequential(nn.Linear(4, 2))
    >>> _ = torch_prune.l1_unstructured(net[0], "weight", 6)
    >>> int(masks_of(net)["0.weight"].sum())
    2
    """
    return {name: weight != 0 for name, weight in prunable(model).items()}


# ------------------------------------------------------------------------------------------------------------- pruning


@torch.no_grad()
def prune(model: nn.Module, masks: Masks, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Copy of a network, of the same class, whose masked weights are zero.

    What `torch.nn.utils.prune` did to the network becomes permanent: the copy has ordinary parameters.

    Args:
        model: any network. Untouched.
        masks: by name of a parameter, bool or 0 and 1 of its shape. Parameters without a mask stay.
        weights: by name, new values of parameters, such as `WoodFisher.update` gives; then the masks apply.

    Raises:
        ValueError: a name that is no parameter, with the nearest; values or a mask of another shape; a mask of other
            numbers than 0 and 1.
    """
    # What a hook of torch.nn.utils.prune computes is no parameter, and copy.deepcopy would refuse it.
    computed = [
        vars(module)[hook._tensor_name]
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, torch_prune.BasePruningMethod)
    ]
    pruned = copy_model(model, {id(tensor): tensor.detach().clone() for tensor in computed})
    for module in list(pruned.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, torch_prune.BasePruningMethod):
                torch_prune.remove(module, hook._tensor_name)
    parameters = dict(pruned.named_parameters())
    for name in [*(weights or {}), *masks]:
        check(name, parameters, "parameter")
    for name, values in (weights or {}).items():
        if values.shape != parameters[name].shape:
            raise ValueError(f"{name!r} is {tuple(parameters[name].shape)}, its new values {tuple(values.shape)}")
        parameters[name].copy_(values)
    for name, mask in masks.items():
        parameter = parameters[name]
        if mask.shape != parameter.shape:
            raise ValueError(f"{name!r} is {tuple(parameter.shape)}, its mask {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"the mask of {name!r} has other numbers than 0 and 1")
        parameter.masked_fill_(~mask.to(parameter.device, torch.bool), 0.0)
    return pruned


def sparsity_of(model: nn.Module) -> float:
    """Share of zeros among the weights of convolutions and linear layers, in [0, 1]."""
    weights = list(prunable(model).values())
    return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)
