"""Streaming statistics of activations: one pass gives all that matching, renormalisation and diagnostics read."""

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from repairlib.inputs import Inputs
from repairlib.names import check
from repairlib.progress import bar
from repairlib.recording import along, eval_mode
from repairlib.tracing import TracedNet

CROSS = ("none", "paired", "full")
CACHED = 2**17  # values centred at once by each thread of a CPU: half a megabyte
LAUNCHED = 2**26  # and on other devices, where every operation costs a launch
# Up to so many times as many new values as are known are centred at the mean of these. Then their squares about it are
# 17 times those about their own mean at most, beside which they are added up, and four bits are lost.
REACH = 16
SIDE_BY_SIDE = 64  # from so many positions on, a unit's are summed one unit after the other
MANY = 16  # examples from which on it pays to add them up side by side


class Moments:
    """Means, variances and cross-covariances of k networks' units at one tap, gathered batch by batch.

    Values are centred at the mean so far, or at their own. Their products are summed in the activations' own precision
    (float32 at least) and merged in float64: for batches of m and n values with means u and v,
    ``M2 = M2_u + M2_v + (v - u)^2 m n / (m + n)`` (Chan et al. 1979). Neither batch sizes nor means that are large
    beside the standard deviation change the result.

    Args:
        cross: "full" keeps cov(unit i of network 0, unit j of network k), "paired" its diagonal only, "none" neither.

    >>> m = Moments()
    >>> m.update(torch.tensor([[1.0], [3.0]])); m.update(torch.tensor([[5.0]]))
    >>> float(m.mean()[0]), round(float(m.var()[0]), 4)
    (3.0, 2.6667)
    """

    def __init__(self, cross: str = "none"):
        self.cross = check(cross, CROSS, "cross")
        self.count = 0  # examples times positions
        self.examples = 0
        # Of all networks (k, units). Covariances are (k - 1, units) or, as one product for all others gives them,
        # (k - 1, units of the other, units of network 0).
        self._mean = self._m2 = self._cross = torch.zeros(0)

    def update(self, *activations: Tensor) -> None:
        """Add one batch: for each network, values (n, units, ...) of the same inputs.

        Raises:
            ValueError: no example, complex values, networks of different shapes, or another number of networks than in
                the first batch.
        """
        values = [x.detach() for x in activations]
        if values[0].numel() == 0:
            raise ValueError("an empty batch has no statistics")
        if any(x.shape != values[0].shape for x in values):
            shapes = ", ".join(str(tuple(x.shape)) for x in values)
            raise ValueError(f"the networks' activations have different shapes: {shapes}")
        if self.count and len(values) != len(self._mean):
            raise ValueError(f"a batch of {len(values)} networks' activations, where the first was of "
                             f"{len(self._mean)}: gather them in moments of their own")  # fmt: skip
        if any(x.is_complex() for x in values):
            raise ValueError("activations are complex: their real and imaginary parts have statistics, they have none")
        if not self.count:
            units = values[0].shape[1]
            self._mean = values[0].new_zeros(len(values), units, dtype=torch.float64)
            self._m2 = torch.zeros_like(self._mean)
            if self.cross != "none":
                shape = (units, units) if self.cross == "full" else (units,)
                self._cross = self._mean.new_zeros(len(values) - 1, *shape)
        n, size, start = len(values[0]), self._examples_at_once(values[0]), 0
        with torch.autocast(values[0].device.type, enabled=False):  # a caller's would halve the precision
            while start < n:
                stop = start + max(size, REACH * self.examples)
                self._add([x[start:stop] for x in values], size)
                start = stop

    def _examples_at_once(self, x: Tensor) -> int:
        """How many examples are centred at once, so that what is made of them stays in the cache."""
        elements = CACHED * torch.get_num_threads() if x.device.type == "cpu" else LAUNCHED
        if self.cross == "full":
            elements = max(elements, 4 * x.shape[1] ** 2)  # else adding products up would cost more than making them
        return max(1, elements // x[0].numel())

    def _add(self, values: list[Tensor], size: int) -> None:
        """Add values (n, units, ...) of n examples, some at a time."""
        m, full = values[0][:, 0].numel(), self.cross == "full"
        total = self.count + m
        kind = functools.reduce(torch.promote_types, (x.dtype for x in values), torch.float32)
        if REACH * self.count >= m:
            centres = self._mean.to(kind)
        else:
            axes = [axis for axis in range(values[0].ndim) if axis != 1]
            centres = torch.stack([x.mean(axes, dtype=kind) for x in values])
        sums, squares, products = self._centred_sums(values, centres, size)
        offsets = sums / m
        steps = centres.double() + offsets - self._mean
        weight = self.count * m / total
        self._m2 += squares - m * offsets**2 + weight * steps**2
        self._mean += steps * (m / total)
        if products is not None:
            for cross, product, offset, step in zip(self._cross, products, offsets[1:], steps[1:], strict=True):
                cross += product - m * _product(offset, offsets[0], full)
                cross += weight * _product(step, steps[0], full)
        self.count, self.examples = total, self.examples + len(values[0])

    def _centred_sums(self, values: list[Tensor], centres: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums of values less their centres (k, units), of their squares, and of products with those of network 0.

        Products are shaped as the covariances, and None if there are none to gather.
        """
        order = _order(values[0], size, self.cross == "full")
        axis, positions = 2 if order == "units" else 1, values[0][0, 0].numel()
        k, units = centres.shape
        sums: list[Tensor] = []
        squares: list[Tensor] = []
        products: list[Tensor] = []
        full = last = None
        for rows in _centred(values, centres, order, size):
            if self.cross == "paired":
                products.append((rows[0] * rows[1:]).sum(axis))
            elif self.cross == "full":
                if rows is not last:  # views of the buffer, made once for all parts that it takes up
                    last, first, others = rows, rows[0], rows[1:]
                    if order == "units":  # one product for all others
                        first, others = first.T, others.flatten(0, 1)
                    else:
                        first, others = first.expand_as(others), others.mT
                if full is None:
                    full = others @ first
                else:
                    full = (full.addmm_ if order == "units" else full.baddbmm_)(others, first)
            sums.append(rows.sum(axis))
            squares.append(rows.square_().sum(axis))

        def total(parts: list[Tensor]) -> Tensor:
            added = parts[0].double() if len(parts) == 1 else torch.stack(parts).sum(0, dtype=torch.float64)
            return added.unflatten(1, (units, positions)).sum(2) if order == "examples" else added

        if full is not None:
            return total(sums), total(squares), full.view(k - 1, units, units)
        return total(sums), total(squares), total(products) if products else None

    def mean(self, k: int = 0) -> Tensor:
        """Mean of network k's units (units,), float64."""
        return self._mean[k]

    def var(self, k: int = 0) -> Tensor:
        """Variance ``M2 / count`` of network k's units (units,), as BatchNorm normalises with."""
        return self._m2[k].clamp_min(0) / self.count

    def unbiased(self) -> "Moments":
        """The same means, with variances ``M2 / (count - 1)``."""
        out = copy.copy(self)
        out._m2 = self._m2 * (self.count / max(self.count - 1, 1))
        return out

    def std(self, k: int = 0) -> Tensor:
        """Standard deviation of network k's units (units,)."""
        return self.var(k).sqrt()

    def cov(self, k: int = 1) -> Tensor:
        """Covariance of network 0 with network k > 0: (units, units) when cross is "full", (units,) when "paired"."""
        if not 0 < k <= len(self._cross):
            raise ValueError(f"covariances with network {k} were not gathered; pass cross='full' or 'paired'")
        return self._cross[k - 1].t() / self.count

    def inner(self, k: int = 1) -> Tensor:
        """Mean product ``E[X_i X_j]`` of network 0 with network k, shaped as `cov`."""
        cov = self.cov(k)
        return cov + _product(self._mean[0], self._mean[k], cov.ndim == 2)

    def dead(self, k: int = 0) -> Tensor:
        """Units (units,) of network k that are constant to rounding, so that no correlation exists."""
        return self.var(k) <= 1e-12 * self._mean[k] ** 2

    def corr(self, k: int = 1, eps: float = 0.0) -> Tensor:
        """Pearson correlation of network 0 with network k, shaped as `cov`; 0 where a unit is dead.

        ``cov / (std_0 std_k + eps)`` (Jordan et al. 2022, Eq. 2; eps = 1e-4 is what their released code adds).
        """
        cov = self.cov(k)
        a, b = (self.std(i).masked_fill(self.dead(i), torch.inf) for i in (0, k))
        return cov / (_product(a, b, cov.ndim == 2) + eps)


def _product(a: Tensor, b: Tensor, full: bool) -> Tensor:
    return torch.outer(a, b) if full else a * b


def _order(x: Tensor, size: int, full: bool) -> str:
    """The matrix that values (n, units, ...) are fastest to sum in, with `size` examples at a time.

    "positions": (n positions, units), "units": (units, n positions), "examples": (n, units positions).
    """
    if x.ndim == 2 or x.stride(1) == 1:
        return "positions"  # as they lie in memory
    return "units" if full or size < MANY or x[0, 0].numel() >= SIDE_BY_SIDE else "examples"


def _centred(values: list[Tensor], centres: Tensor, order: str, size: int) -> Iterator[Tensor]:
    """Values (n, units, ...) of k networks less their centres (k, units), as k matrices of some examples, see `_order`.

    Each overwrites the one before, in memory that stays in the cache.
    """
    ndim, axis, shaped = values[0].ndim, 0, list(centres)
    if order == "units":
        values, axis = [x.transpose(0, 1) for x in values], 1
        shaped = [along(centre, ndim, 0) for centre in shaped]
    elif order == "positions":
        values = [x.movedim(1, -1) for x in values]
    else:
        shaped = [along(centre, ndim - 1, 0).expand(values[0].shape[1:]).contiguous() for centre in shaped]
    shape = None
    for parts in zip(*(x.split(size, axis) for x in values), strict=True):
        if parts[0].shape != shape:
            shape = parts[0].shape
            space = centres.new_empty(len(parts), *shape)
            rows = space.flatten(1, -2) if order == "positions" else space.flatten(2)
            places = space.unbind()
        for part, centre, place in zip(parts, shaped, places, strict=True):
            torch.sub(part, centre, out=place)
        yield rows


def moments_of(chunks: Iterable[Tensor], axis: int = 1) -> Moments:
    """Moments of one network's values, with units on one axis, given in parts."""
    moments = Moments()
    for chunk in chunks:
        moments.update(chunk.movedim(axis, 1))
    return moments


def gather(
    nets: Sequence[TracedNet], batches: Iterable[Inputs], taps: Iterable[str], cross: str = "none"
) -> dict[str, Moments]:
    """Moments at every tap, from one pass of all networks over the data, in step, node by node.

    Args:
        nets: k traced networks of one architecture.
        batches: inputs, on the networks' device.
        taps: node names; units are on `TracedNet.axis` there.
        cross: see `Moments`.

    Raises:
        ValueError: no batch at all.
    """
    moments = {tap: Moments(cross) for tap in dict.fromkeys(taps)}
    with eval_mode(*(net.model for net in nets)), bar(None, "activations", "batch") as progress:
        for x in batches:
            progress.update()
            for values in zip(*(net.walk(x, list(moments)) for net in nets), strict=True):
                tap = values[0][0]
                moments[tap].update(*(value.movedim(nets[0].axis(tap), 1) for _, value in values))
    if not all(moment.count for moment in moments.values()):
        raise ValueError("the calibration data is empty: it has no batch to measure statistics on")
    return moments
