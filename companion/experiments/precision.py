"""Activation matching as three codes do it, beside ours (Qu and Horvath 2024, App. D.2, Table 2).

They differ in how the mean, variance and covariance of activations are summed up. Each is written from what the paper
says of it, and from what reading the released codes has shown.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from companion.experiments.pairs import Pair
from companion.experiments.statistics import has_batchnorm
from repairlib.groups import permutation_spec
from repairlib.inputs import Batches
from repairlib.interpolate import interpolate_models
from repairlib.matching import Matching, match_activations, solve_assignment
from repairlib.recording import eval_mode
from repairlib.renorm import reset
from repairlib.tracing import trace

EPS = 1e-4  # added to the product of standard deviations by the released codes


class Sums:
    """Means and products of two networks' units at one node, summed up in one type.

    Args:
        dtype: of the sums.
        average: "pooled" divides the sums over all data by their number; "batches" takes the mean of the batches'
            means; "faulty" divides the sum over examples and positions by the number of examples only. So each mean is
            too large by the number of positions.
    """

    def __init__(self, dtype: torch.dtype, average: str = "pooled"):
        self.dtype, self.average = dtype, average
        self.sums: list[Tensor] | None = None
        self.count = self.examples = 0

    def update(self, a: Tensor, b: Tensor) -> None:
        """Add one batch of activations (n, units, ...) of both networks."""
        examples = len(a)
        a, b = (x.to(self.dtype).transpose(0, 1).flatten(1) for x in (a, b))
        found = [a.sum(1), b.sum(1), (a * a).sum(1), (b * b).sum(1), a @ b.T]
        if self.average == "batches":
            found = [value / a.shape[1] for value in found]
        self.sums = found if self.sums is None else [x + y for x, y in zip(self.sums, found, strict=True)]
        self.count += 1 if self.average == "batches" else a.shape[1]
        self.examples += examples

    def correlation(self) -> Tensor:
        """``(E[x y] - m E[y] - E[x] m' + m m') / (s s' + eps)`` with the means m and m' that the code uses.

        With the right means that is Pearson's correlation (units, units). Spreads s are about the same means.
        """
        mean_a, mean_b, square_a, square_b, product = (value / self.count for value in self.sums)
        wrong = self.count / self.examples if self.average == "faulty" else 1
        m_a, m_b = mean_a * wrong, mean_b * wrong
        cov = product - torch.outer(m_a, mean_b) - torch.outer(mean_a, m_b) + torch.outer(m_a, m_b)
        std_a, std_b = (
            (square - 2 * m * mean + m * m).clamp_min(0).sqrt()
            for square, m, mean in ((square_a, m_a, mean_a), (square_b, m_b, mean_b))
        )
        return cov / (torch.outer(std_a, std_b) + EPS)


def match_by(
    model_a: nn.Module, model_b: nn.Module, data: Iterable, sums: Callable[[], Sums], one_pass: bool = True
) -> Matching:
    """Match by activations with other sums than the library's.

    Args:
        model_a, model_b: networks of one architecture. Untouched.
        data: any iterable of batches x or (x, y).
        sums: makes the sums of one node.
        one_pass: False runs both networks over all the data again for every group of units.
    """
    batches = Batches(data, model_a)
    example = batches.example()
    spec = permutation_spec(model_a, example)
    nets = [trace(model, example) for model in (model_a, model_b)]
    taps = [group.taps["post"] for group in spec.groups]
    found: dict[str, Sums] = {tap: sums() for tap in taps}
    with eval_mode(model_a, model_b):
        for some in [taps] if one_pass else [[tap] for tap in taps]:
            for x in batches:
                for (tap, a), (_, b) in zip(*(net.walk(x, some) for net in nets), strict=True):
                    found[tap].update(a, b)
    correlations = {group.name: found[tap].correlation().cpu() for group, tap in zip(spec.groups, taps, strict=True)}
    return Matching(spec, {name: solve_assignment(values.nan_to_num()) for name, values in correlations.items()})


Match = Callable[[nn.Module, nn.Module, Iterable], Matching]
# The paper's names are "Ours", "B" (of REPAIR's code) and "A" (of Git Re-Basin's code).
IMPLEMENTATIONS: Mapping[str, Match] = {
    "this library": match_activations,
    "float64, one pass (paper: ours)": functools.partial(
        match_by, sums=functools.partial(Sums, torch.float64, "batches")
    ),
    "float64, layer by layer (paper: B)": functools.partial(
        match_by, sums=functools.partial(Sums, torch.float64, "batches"), one_pass=False
    ),
    "float32, mean right": functools.partial(match_by, sums=functools.partial(Sums, torch.float32)),
    "float32, faulty mean (paper: A)": functools.partial(
        match_by, sums=functools.partial(Sums, torch.float32, "faulty")
    ),
}


def implementation_rows(pair: Pair) -> list[dict]:
    """Every implementation on one pair: units, barrier of the midpoint, time.

    Midpoints of networks with BatchNorm are reset, as in the paper.

    Returns:
        Rows {implementation, moved: live units that are matched otherwise than by the library, units: live ones,
        alpha: 0, 0.5 or 1, loss (nats), accuracy (in [0, 1]), seconds}.
    """
    ends = {alpha: pair.evaluate(model) for alpha, model in ((0, pair.a), (1, pair.b))}
    rows, ours = [], None
    for name, match in IMPLEMENTATIONS.items():
        start = time.perf_counter()
        matching = match(pair.a, pair.b, pair.calibration)
        seconds = time.perf_counter() - start
        ours = ours or matching
        middle = interpolate_models(pair.a, matching.apply(pair.b))
        middle = reset(middle, pair.calibration).model if has_batchnorm(middle) else middle
        moved, units = _moved(ours, matching)
        rows += [
            {"implementation": name, "moved": moved, "units": units, "seconds": seconds,
             "alpha": alpha, "loss": loss, "accuracy": accuracy}
            for alpha, (loss, accuracy) in {**ends, 0.5: pair.evaluate(middle)}.items()
        ]  # fmt: skip
    return rows


def _moved(ours: Matching, other: Matching) -> tuple[int, int]:
    """How many units with a correlation are matched otherwise, and how many there are."""
    alive = {name: values != 0 for name, values in ours.correlation.items()}
    moved = [int((other.permutation[name] != perm)[alive[name]].sum()) for name, perm in ours.permutation.items()]
    return sum(moved), sum(int(each.sum()) for each in alive.values())
