"""Combinations of networks beyond the straight line, element by element and layer by layer (Csiszarik et al. 2023).

Coefficient 0 is model A and 1 is model B, as in the paper's text (Sec. 4.2.2, 4.3). Its Eq. 1 multiplies A by v, so
figures drawn from it have their axis flipped. Every entry of a state dict is combined, running statistics of
BatchNorm included; integer buffers are A's.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from repairlib.interpolate import State, check_architectures, check_compatible, check_finite, clamp_variance
from repairlib.names import check
from repairlib.tracing import aliases, trace

PIECE = 2**17  # numbers that are combined at a time on a CPU: four tensors of these fit into its cache
# A distribution of coefficients, as the function that turns uniform numbers in [0, 1) into numbers that have it.
Quantile = Callable[[Tensor], Tensor]


def elementwise(state_a: State, state_b: State, quantile: Quantile, seed: int) -> dict[str, Tensor]:
    """Element-wise combination ``theta_i = (1 - c_i) a_i + c_i b_i`` with c_i i.i.d. (Csiszarik et al. 2023, Def. 3.2).

    An entry whose coefficient is 0 or 1 is A's or B's bit for bit. BatchNorm variances are clamped at 0.

    Args:
        state_a, state_b: state dicts of one architecture.
        quantile: distribution of the coefficients: `box`, `subcube`, `hyperplane`, `bernoulli`, or any function that
            turns a float32 tensor of uniform numbers into coefficients number by number.
        seed: gives the same uniform numbers for every distribution, precision, device and order of entries.

    >>> a, b = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    >>> elementwise(a, b, bernoulli(0.5), seed=0)["w"]
    tensor([1., 0., 1., 1.])
    """
    check_architectures(state_a, state_b)
    sizes = {name: a.numel() for name, a in sorted(state_a.items()) if a.is_floating_point()}
    uniform = _uniform([*sizes.values()], seed, next(iter(state_a.values())).device if state_a else torch.device("cpu"))
    out = {name: value.clone() for name, value in state_a.items() if name not in sizes}
    sums: list[Tensor] = []
    for name in sizes:
        a, b = (state[name].detach().reshape(-1) for state in (state_a, state_b))
        mixed = torch.empty_like(a)
        for start, u in next(uniform):
            here = slice(start, start + len(u))
            of_a, of_b, into, c = a[here], b[here], mixed[here], quantile(u).to(a)
            torch.lerp(of_a, of_b, c, out=into)
            sums.append(into.sum().float())
            if not _inside(c):
                for end, part in ((0, of_a), (1, of_b)):  # bit for bit, the sign of a zero included
                    torch.where(c == end, part, into, out=into)
        out[name] = clamp_variance(name, mixed.view(state_a[name].shape))
    # NaN and infinity carry into the sums of what is still in the cache. To look for them before takes as long again.
    if sums and not torch.stack(sums).isfinite().all():
        out |= {name: state_a[name].clone() for name in check_finite(state_a, state_b)}
    return {name: out[name] for name in state_a}


def _inside(c: Tensor) -> bool:
    """Whether all coefficients are known to lie between 0 and 1; to look, a GPU would have to wait."""
    if c.device.type != "cpu":
        return False
    least, largest = c.aminmax()
    return bool(least > 0) and bool(largest < 1)


def _uniform(sizes: Sequence[int], seed: int, device: torch.device) -> Iterator[Iterator[tuple[int, Tensor]]]:
    """Uniform numbers for tensors of some sizes: of each, the pieces and where they begin.

    They are drawn on the CPU, where a seed means the same everywhere. There a piece fits into the cache. For a GPU all
    are drawn and moved at once, as each copy waits for it.
    """
    how: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float32}
    if device.type == "cpu":
        for size in sizes:
            starts = range(0, size, PIECE)
            yield ((start, torch.rand(min(PIECE, size - start), **how)) for start in starts)
        return
    numbers = torch.rand(sum(sizes), **how).to(device, non_blocking=True)
    for part in numbers.split([*sizes]):
        yield iter([(0, part)])


def box(s: float, center: float = 0.5) -> Quantile:
    """Uniform on ``[center - s, center + s]^d``.

    Args:
        s: half the edge, at least 0.
        center: 0.5 and s <= 0.5 for cubes about the midpoint (Sec. 4.2.1; s = 0.5 is the whole hypercube); 0 for boxes
            about A, which extrapolate (Sec. 5.2).
    """
    if not 0 <= s < math.inf:
        raise ValueError(f"s is half the edge of a box, at least 0, not {s}")
    if s == center == 0.5:
        return lambda u: u
    return lambda u: (2 * s * u).add_(center - s)


def subcube(alpha: float) -> Quantile:
    """Uniform on ``[0, 2 alpha]^d`` if alpha <= 0.5, else on ``[2 alpha - 1, 1]^d`` (Sec. 4.2.2).

    Args:
        alpha: centre of the cube, in [0, 1]; 0 gives A and 1 gives B.
    """
    _check_unit("alpha", alpha)
    return box(min(alpha, 1 - alpha), alpha)


def hyperplane(alpha: float) -> Quantile:
    """Nearly uniform on the part of the unit cube where ``mean_i c_i = alpha`` (Sec. 4.2.3).

    Coefficients are independent with density ``r exp(-r c) / (1 - exp(-r))`` on [0, 1], whose rate r gives the mean
    alpha: the mean of d coefficients is alpha up to O(1 / sqrt(d)).

    Args:
        alpha: mean of the coefficients, in [0, 1]; 0 gives A and 1 gives B.
    """
    _check_unit("alpha", alpha)
    if alpha in (0, 1):
        return lambda u: torch.full_like(u, alpha)
    if alpha > 0.5:  # the mirror image: no exponential of anything positive is ever taken
        mirrored = hyperplane(1 - alpha)
        return lambda u: 1 - mirrored(1 - u)
    rate = _rate(alpha)
    if rate == 0:
        return lambda u: u
    return lambda u: (torch.log1p(u * math.expm1(-rate)) / -rate).clamp(0, 1)


def _rate(mean: float) -> float:
    """Solve ``1 / r - 1 / (exp(r) - 1) = mean`` for r >= 0, with 0 < mean <= 0.5."""
    if mean < 0.02:  # the second term is below exp(-50)
        return 1 / mean

    def excess(r: float) -> float:
        # Near 0 the two terms are large and alike: their difference from its Taylor series.
        return (0.5 - r / 12 + r**3 / 720 if r < 1e-2 else 1 / r - 1 / math.expm1(r)) - mean

    from scipy.optimize import brentq  # here, as it takes long to import

    return brentq(excess, 0, 2 / mean, xtol=1e-14)


def bernoulli(p: float) -> Quantile:
    """Vertices of the hypercube: every entry is B's with probability p, else A's (Sec. 4.2.4)."""
    _check_unit("p", p)
    return lambda u: (u < p).to(u)


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {value}")


def simplex_grid(models: int, steps: int) -> list[tuple[float, ...]]:
    """Weights (w_1, ..., w_models) for `mix_states`: all multiples of 1 / steps that sum to 1 (Sec. 5.4).

    >>> simplex_grid(2, 2)
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    """
    if models < 1 or steps < 1:
        raise ValueError(f"a grid needs at least one model and one step, not {models} and {steps}")

    def split(left: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (left,)
            return
        for first in range(left, -1, -1):
            yield from ((first, *rest) for rest in split(left - first, parts - 1))

    return [tuple(w / steps for w in weights) for weights in split(steps, models)]


def extreme(states: Sequence[State], which: Literal["min", "max"]) -> dict[str, Tensor]:
    """The 'Min' or 'Max' model: every entry is that of the model where its magnitude is least or largest (Sec. 4.5.1).

    Args:
        states: state dicts of one architecture. Where two magnitudes are equal, "max" takes the first model and "min"
            the last. (The paper's formulas take the first in both.) So for two models Min has every entry that Max has
            not, and their midpoint is that of the models.
        which: "min" or "max".

    >>> extreme([{"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([-3.0, 1.0])}], "min")["w"]
    tensor([1., 1.])
    """
    check(which, ("min", "max"), "which")
    check_compatible(*states)

    def pick(x: Tensor, y: Tensor) -> Tensor:
        larger = y.abs() > x.abs()  # one comparison for both: what the one takes, the other leaves
        return torch.where(larger, y, x) if which == "max" else torch.where(larger, x, y)

    return {
        name: functools.reduce(pick, (state[name] for state in states)).clone() if x.is_floating_point() else x.clone()
        for name, x in states[0].items()
    }


# Kinds of nodes (see TracedNet) that begin a layer if they read a matrix; "" is what has no rule there.
_WEIGHTED = ("conv", "linear", "conv-transpose", "embedding", "attention", "functional-conv", "functional-linear", "")


def layers(model: nn.Module, example: Tensor) -> dict[str, tuple[str, ...]]:
    """Weight layers in order of execution, each with the state-dict entries that `stitch` moves with it.

    A normalisation or scalar belongs to the weight layer whose output it reads; after an addition, to the one that runs
    last. What precedes all layers, or is never read, belongs to the first. A shortcut's convolution is its own layer.

    >>> list(layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8)))
    ['0', '2']
    """
    net = trace(model, example)
    names = aliases(model)
    titles: list[str] = []
    entries: list[list[str]] = [[]]  # the first are those that precede all layers
    owner: dict[fx.Node, int] = {}
    for node in net.nodes:
        owner[node] = max((owner[source] for source in node.all_input_nodes), default=0)
        if node.op == "get_attr":  # a parameter without a module goes with the node that reads it
            continue
        read = [net.compute(source, {}) for source in node.all_input_nodes if source.op == "get_attr"]
        if node.op == "call_module":
            read += net.modules[node.target].state_dict(keep_vars=True).values()
        entries_read = [name for tensor in read for name in names.pop(id(tensor), [])]
        if entries_read and net.kinds[node.name] in _WEIGHTED and any(tensor.ndim > 1 for tensor in read):
            titles.append(str(node.target) if node.op == "call_module" else node.name)
            entries.append([])
            owner[node] = len(titles)
        entries[owner[node]] += entries_read
    if not titles:
        raise ValueError(f"{type(model).__name__} has no weight layer to stitch at")
    entries[1] = entries[0] + entries[1] + [name for left in names.values() for name in left]
    return {title: tuple(part) for title, part in zip(titles, entries[1:], strict=True)}


def stitch(state_a: State, state_b: State, layer: int, parts: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Stitched state dict: the first `layer` layers of A, then those of B, with the identity between them (Sec. 4.3).

    Args:
        state_a, state_b: state dicts of one architecture.
        layer: from 0, which gives `state_b`, to the number of layers, which gives `state_a`, bit for bit.
        parts: entries of every layer, from `layers`.

    Raises:
        ValueError: no such layer, or parts of another architecture.
    """
    check_compatible(state_a, state_b)
    if not isinstance(layer, Integral) or not 0 <= layer <= len(parts):
        raise ValueError(f"layer must be a whole number from 0 to {len(parts)}, the number of layers, not {layer}")
    position = {name: i for i, part in enumerate(parts.values()) for name in part}
    if missing := [name for name in state_a if name not in position]:
        raise ValueError(f"no layer has {missing[0]!r}; parts must be layers(model, example) of this architecture")
    return {name: (a if position[name] < layer else state_b[name]).clone() for name, a in state_a.items()}
