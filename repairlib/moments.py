"""Streaming statistics of activations: one pass gives all that matching, renormalisation and diagnostics read."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from repairlib.inputs import Inputs
from repairlib.names import check
from repairlib.progress import bar
from repairlib.recording import eval_mode
from repairlib.tracing import TracedNet

CROSS = ("none", "paired", "full")


class Moments:
    """Means, variances and cross-covariances of k networks' units at one tap, gathered batch by batch.

    Products of batch-centred values are summed in the activations' own precision (float32 at least) and merged in
    float64: for batches of m and n values with means u and v, ``M2 = M2_u + M2_v + (v - u)^2 m n / (m + n)`` (Chan et
    al. 1979). Neither batch sizes nor means that are large beside the standard deviation change the result.

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
        self._mean: list[Tensor] = []
        self._m2: list[Tensor] = []
        self._cross: list[Tensor] = []

    def update(self, *activations: Tensor) -> None:
        """Add one batch: for each network, values (n, units, ...) of the same inputs."""
        if not self._mean:
            units = [x.shape[1] for x in activations]
            zeros = [
                torch.zeros(c, dtype=torch.float64, device=x.device) for c, x in zip(units, activations, strict=True)
            ]
            self._mean, self._m2 = zeros, [z.clone() for z in zeros]
            if self.cross != "none":
                self._cross = [z.new_zeros((units[0], len(z)) if self.cross == "full" else len(z)) for z in zeros[1:]]
        self.examples += len(activations[0])
        with torch.autocast(activations[0].device.type, enabled=False):  # a caller's would halve the precision
            self._add(*zip(*map(_centre, activations), strict=True))

    def _add(self, centred: tuple[Tensor, ...], means: tuple[Tensor, ...]) -> None:
        m = centred[0].shape[1]
        total = self.count + m
        offsets = [r.sum(1).double() / m for r in centred]  # what rounding left of the batch mean
        steps = [mean + offset - old for mean, offset, old in zip(means, offsets, self._mean, strict=True)]
        weight = self.count * m / total
        for k, (r, offset, step) in enumerate(zip(centred, offsets, steps, strict=True)):
            self._m2[k] += _dot(r, r) - m * offset**2 + weight * step**2
            if k and self.cross == "full":
                self._cross[k - 1] += (
                    (centred[0] @ r.T).double()
                    - m * torch.outer(offsets[0], offset)
                    + weight * torch.outer(steps[0], step)
                )
            elif k and self.cross == "paired":
                self._cross[k - 1] += _dot(centred[0], r) - m * offsets[0] * offset + weight * steps[0] * step
            self._mean[k] += step * (m / total)
        self.count = total

    def mean(self, k: int = 0) -> Tensor:
        """Mean of network k's units (units,), float64."""
        return self._mean[k]

    def var(self, k: int = 0) -> Tensor:
        """Variance ``M2 / count`` of network k's units (units,), as BatchNorm normalises with."""
        return self._m2[k].clamp_min(0) / self.count

    def unbiased(self) -> "Moments":
        """The same means, with variances ``M2 / (count - 1)``."""
        out = copy.copy(self)
        out._m2 = [x * (self.count / max(self.count - 1, 1)) for x in self._m2]
        return out

    def std(self, k: int = 0) -> Tensor:
        """Standard deviation of network k's units (units,)."""
        return self.var(k).sqrt()

    def cov(self, k: int = 1) -> Tensor:
        """Covariance of network 0 with network k > 0: (units, units) when cross is "full", (units,) when "paired"."""
        if not 0 < k <= len(self._cross):
            raise ValueError(f"covariances with network {k} were not gathered; pass cross='full' or 'paired'")
        return self._cross[k - 1] / self.count

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


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values less their batch mean as (units, count), and the mean in float64."""
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    rows = x.transpose(0, 1).flatten(1)
    if rows.shape[1] == 0:
        raise ValueError("an empty batch has no statistics")
    mean = rows.mean(1)
    return rows - mean[:, None], mean.double()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products, as float64; the norm needs no temporary of the operands' size."""
    if a is b:
        return torch.linalg.vector_norm(a, dim=1).double() ** 2
    return (a * b).sum(1).double()


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
