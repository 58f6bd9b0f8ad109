"""Random weights of low rank, which take the place of large ones where only a network's symmetries matter."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

RANK = 8

_aten = torch.ops.aten


class Factored(Tensor):
    """Weight ``W[a, b, ...] = sum_rs rows[a, r] core[r, s, ...] columns[b, s]`` that is not formed.

    Layers read its factors, and whatever else reads it gets it formed; nothing may write to it. It is indexed by units
    as any weight of its shape: those of its first two axes by the factors' rows, others by the core's axes. A product
    may repeat it along `batch` axes before these.
    """

    @staticmethod
    def __new__(cls, rows: Tensor, core: Tensor, columns: Tensor, batch: tuple[int, ...] = ()) -> "Factored":
        shape = (*batch, len(rows), len(columns), *core.shape[2:])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype)  # type: ignore[attr-defined]

    def __init__(self, rows: Tensor, core: Tensor, columns: Tensor, batch: tuple[int, ...] = ()):
        self.rows, self.core, self.columns, self.batch = rows, core, columns, batch

    def factor(self, axis: int) -> tuple[Tensor, int]:
        """Factor that has an axis of the weight, and the axis that it is there."""
        return ((self.rows, 0), (self.columns, 0))[axis] if axis < 2 else (self.core, axis)

    def formed(self) -> Tensor:
        """The weight as an ordinary tensor."""
        return torch.einsum("ar,rs...,bs->ab...", self.rows, self.core, self.columns).expand(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        rule = _RULES.get(func)
        out = rule(*args, **kwargs or {}) if rule else None
        if out is not None:
            return out
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a weight that is not formed, or read it in place")
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.formed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _same(weight: Factored) -> Factored:
    return Factored(weight.rows, weight.core, weight.columns, weight.batch)


def _repeated(weight: Factored, shape: Sequence[int], **_: Any) -> Factored | None:
    """What `torch.matmul` makes of a matrix that meets a batch: (b, n, m), of any strides."""
    if tuple(shape[-2:]) != tuple(weight.shape[-2:]) or min(shape) < 0 or weight.core.ndim != 2:
        return None
    return Factored(weight.rows, weight.core, weight.columns, tuple(shape[:-2]))


def _transposed(weight: Factored, *axes: int) -> Factored | None:
    if weight.ndim != 2 or (axes and {axis % 2 for axis in axes} != {0, 1}):
        return None
    return Factored(weight.columns, weight.core.T, weight.rows)


def _mm(x: Tensor, weight: Tensor) -> Tensor | None:
    if isinstance(x, Factored) or not isinstance(weight, Factored):
        return None
    return x @ weight.rows @ weight.core @ weight.columns.T


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> Tensor | None:
    if any(isinstance(each, Factored) for each in (bias, x)) or not isinstance(weight, Factored):
        return None
    return torch.addmm(bias, x @ weight.rows @ weight.core, weight.columns.T, **scales)


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor | None:
    if groups != 1 or any(isinstance(each, Factored) for each in (x, bias)):
        return None
    into, out = (weight.rows, weight.columns) if transposed else (weight.columns, weight.rows)
    x = (into.T @ x.flatten(2)).unflatten(2, x.shape[2:])
    x = torch.convolution(x, weight.core, None, stride, padding, dilation, transposed, output_padding, 1)
    shape = x.shape[2:]
    x = out @ x.flatten(2)
    return (x if bias is None else x.add_(bias[:, None])).unflatten(2, shape)


def _embedding(weight: Tensor, index: Tensor, *_: Any) -> Tensor:
    return weight.rows[index] @ (weight.core @ weight.columns.T)  # type: ignore[attr-defined]


_RULES = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.t.default: _transposed,
    _aten.transpose.int: _transposed,
    _aten.expand.default: _repeated,
    _aten.view.default: _repeated,
    _aten._unsafe_view.default: _repeated,
    _aten.mm.default: _mm,
    _aten.bmm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.convolution.default: _convolution,
    _aten.embedding.default: _embedding,
}


def factored_like(weight: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Factored | None:
    """Random factors of a weight's shape whose product varies as a layer's weights do; None if it is too small."""
    if weight.ndim < 2:
        return None
    rows, columns, *rest = weight.shape
    size = RANK * (rows + columns) + RANK**2 * math.prod(rest)
    if 2 * size > weight.numel():
        return None

    def uniform(*shape: int, variance: float) -> Tensor:
        bound = math.sqrt(3 * variance)
        return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)

    fan_in = math.prod(weight.shape[1:])
    return Factored(
        uniform(rows, RANK, variance=1 / RANK),
        uniform(RANK, RANK, *rest, variance=1 / RANK),
        uniform(columns, RANK, variance=2 / fan_in),
    )


def factors(model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[int, nn.Parameter]:
    """Factored stand-ins of a model's large weights, by their `id`: the memo with which `copy.deepcopy` uses them."""
    # Without its own kernel, a recurrent layer takes a step of Python for every step in time.
    skip = {id(p) for module in model.modules() if isinstance(module, nn.RNNBase) for p in module.parameters()}
    weights = [p for p in model.parameters() if type(p) is nn.Parameter and id(p) not in skip]
    found = {id(p): factored_like(p.detach(), generator, dtype) for p in weights}
    return {key: nn.Parameter(each, requires_grad=False) for key, each in found.items() if each is not None}
