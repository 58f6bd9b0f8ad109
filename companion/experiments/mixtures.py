"""Samples of combined networks, scheme by scheme (Csiszarik et al. 2023, Secs. 4 and 5).

A scheme is a family of distributions of coefficients with one parameter x. Networks are drawn by `combine.elementwise`.
Coefficient 0 is model A everywhere.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from companion.experiments.pairs import Pair
from companion.experiments.tables import sample_barriers
from companion.runs.data import iterate
from repairlib import combine
from repairlib.evaluation import evaluate_many
from repairlib.interpolate import State, interpolate_states
from repairlib.names import check


@dataclass(frozen=True)
class Scheme:
    """A family of distributions of coefficients.

    Attributes:
        make: from x to the quantile function of one coefficient.
        low, high: the range of x.
        xlabel: the name of x in figures.
    """

    make: Callable[[float], combine.Quantile]
    low: float
    high: float
    xlabel: str

    def random(self, x: float) -> bool:
        """Whether two draws differ: quantile functions are monotone, so only if that of x rises between 0 and 1.

        >>> SCHEMES["subcube"].random(0.5), SCHEMES["subcube"].random(1), SCHEMES["linear"].random(0.5)
        (True, False, False)
        """
        low, high = self.make(x)(torch.tensor([0.0, math.nextafter(1, 0)], dtype=torch.float64)).tolist()
        return low != high

    def grid(self, points: int) -> list[float]:
        """Equidistant values of x, both ends included; exact at the ends and in the middle."""
        return [(self.low * (points - 1 - i) + self.high * i) / (points - 1) for i in range(points)]


SCHEMES = {
    "linear": Scheme(lambda alpha: lambda u: torch.full_like(u, alpha), 0, 1, r"$\alpha$"),
    "extrapolation": Scheme(lambda alpha: lambda u: torch.full_like(u, alpha), -1, 2, r"$\alpha$"),
    "uniform": Scheme(combine.box, 0, 0.5, r"half edge $s$ of the cube about the midpoint"),
    "subcube": Scheme(combine.subcube, 0, 1, r"centre $\alpha$ of the sub-cube"),
    "hyperplane": Scheme(combine.hyperplane, 0, 1, r"mean coefficient $\alpha$"),
    "bernoulli": Scheme(combine.bernoulli, 0, 1, r"probability $p$ of model B's entry"),
    "centred": Scheme(lambda s: combine.box(s, center=0.0), 0, 0.5, r"half edge $s$ of the box about model A"),
}
COMPARED = ("WM", "none")  # names of `MATCHINGS`: B's units in A's order by weights, and as trained


def maker(ends: tuple[State, State], scheme: str, x: float, sample: int, seed: int = 0) -> Callable[[], State]:
    """Function that draws one network of a scheme when it is called.

    Args:
        ends: state dicts of A and B.
        scheme: one of `SCHEMES`.
        x: its parameter.
        sample: number of the draw. A sample has the same uniform numbers for every scheme, x and device, so that it can
            be followed along x.
        seed: another seed gives all samples other numbers.
    """
    quantile = SCHEMES[check(scheme, SCHEMES, "scheme")].make(x)
    return lambda: combine.elementwise(*ends, quantile, seed * 1_000_003 + sample)


def coefficient_samples(
    schemes: Iterable[str], grid: Sequence[float] = (0.1, 0.25, 0.5), number: int = 100_000
) -> dict[str, dict[float, np.ndarray]]:
    """Coefficients that schemes draw, by scheme and x: the weights between a network of zeros and one of ones."""
    zero, one = {"w": torch.zeros(number)}, {"w": torch.ones(number)}
    return {scheme: {x: maker((zero, one), scheme, x, sample=0)()["w"].numpy() for x in grid} for scheme in schemes}


def states_of(pair: Pair, matching: str) -> tuple[State, State]:
    """State dicts of A and of B, with B's units in A's order ("WM") or as trained ("none")."""
    return pair.a.state_dict(), pair.aligned_by(matching).state_dict()


def evaluate_rows(
    pair: Pair,
    named: Iterable[tuple[dict, Callable[[], State]]],
    splits: Sequence[str] = ("test",),
    train_images: int | None = None,
) -> list[dict]:
    """Evaluate many combinations of a pair together.

    Args:
        pair: the endpoints.
        named: for each combination, columns that name it and a function that makes its state dict.
        splits: "test", "train" (without augmentation) or both.
        train_images: number of training images; default all.

    Returns:
        Rows in order {**columns, split, loss (nats), accuracy (in [0, 1]), end_loss, end_accuracy}; the last two are
        means of the endpoints.
    """
    named, rows = list(named), []
    for split in splits:
        batches = pair.test if split == "test" else iterate(pair.dataset, split, limit=train_images)
        ends = evaluate_many(pair.a, [pair.a.state_dict(), pair.b.state_dict()], batches)
        mean = {name: sum(end[i] for end in ends) / 2 for i, name in enumerate(("end_loss", "end_accuracy"))}
        found = evaluate_many(pair.a, Lazy([make for _, make in named]), batches)
        rows += [
            columns | {"split": split, "loss": loss, "accuracy": accuracy} | mean
            for (columns, _), (loss, accuracy) in zip(named, found, strict=True)
        ]
    return rows


def draw_networks(
    pair: Pair,
    scheme: str,
    grid: Iterable[float],
    samples: int = 4,
    *,
    matchings: Sequence[str] = COMPARED,
    seed: int = 0,
) -> list[tuple[dict, Callable[[], State]]]:
    """Networks drawn from a scheme at every point of a grid, each made when it is called; see `combination_rows`.

    Returns:
        For each network, columns {scheme, matching, x, sample} and a function that makes its state dict.
    """
    check(scheme, SCHEMES, "scheme")
    grid = list(grid)
    named = []
    for matching in matchings:
        ends = states_of(pair, matching)
        for x in grid:
            for i in range(samples if SCHEMES[scheme].random(x) else 1):
                columns = {"scheme": scheme, "matching": matching, "x": x, "sample": i}
                named.append((columns, maker(ends, scheme, x, i, seed)))
    return named


def combination_rows(
    pair: Pair,
    grids: Mapping[str, Iterable[float]],
    samples: int = 4,
    *,
    matchings: Sequence[str] = COMPARED,
    splits: Sequence[str] = ("test",),
    train_images: int | None = None,
    seed: int = 0,
) -> list[dict]:
    """Networks drawn from some schemes at every point of their grids, evaluated together.

    Args:
        pair: the endpoints.
        grids: scheme -> values of x, for instance ``{"subcube": SCHEMES["subcube"].grid(25)}``.
        samples: networks at each point; one where nothing is random.
        matchings: with B's units in A's order ("WM"), as trained ("none") or both.
        splits, train_images: see `evaluate_rows`.
        seed: see `maker`.

    Returns:
        Rows of `evaluate_rows` with columns {scheme, matching, x, sample}.
    """
    named = [
        each
        for scheme, grid in grids.items()
        for each in draw_networks(pair, scheme, grid, samples, matchings=matchings, seed=seed)
    ]
    return evaluate_rows(pair, named, splits, train_images)


def stitching_rows(pair: Pair, *, matchings: Sequence[str] = COMPARED) -> list[dict]:
    """Identity stitching at every layer: the first layers are A's, the rest B's (Csiszarik et al. 2023, Sec. 4.3).

    Returns:
        Rows of `evaluate_rows` with columns {matching, layer, name}: how many layers are A's, from 0 (B) to all (A),
        and the name of the last of them.
    """
    parts = combine.layers(pair.a, next(iter(pair.calibration))[0])
    named = []
    for matching in matchings:
        ends = states_of(pair, matching)
        for layer, name in enumerate(["", *parts]):
            columns = {"matching": matching, "layer": layer, "name": name}
            named.append((columns, lambda e=ends, n=layer: combine.stitch(*e, n, parts)))
    return evaluate_rows(pair, named)


def extreme_rows(pair: Pair, points: int, *, matchings: Sequence[str] = COMPARED) -> list[dict]:
    """Networks on the path from the Max to the Min model (Csiszarik et al. 2023, Sec. 4.5), see `combine.extreme`.

    Args:
        points: equidistant values of alpha, from 0 (Max) to 1 (Min).

    Returns:
        Rows of `evaluate_rows` with columns {matching, alpha}.
    """
    named = []
    for matching in matchings:
        trained = states_of(pair, matching)
        ends = combine.extreme(trained, "max"), combine.extreme(trained, "min")
        for alpha in SCHEMES["linear"].grid(points):
            named.append(({"matching": matching, "alpha": alpha}, partial(interpolate_states, *ends, alpha)))
    return evaluate_rows(pair, named)


RANDOM = ("uniform", "subcube", "hyperplane", "bernoulli")  # schemes of random coefficients (Sec. 4.2)


def scheme_barriers(pair: Pair, points: int, samples: int) -> list[dict]:
    """Barriers of all schemes between aligned networks, and of the line between networks as trained (Sec. 4.4).

    Args:
        points: values of each scheme's parameter, see `Scheme.grid`.
        samples: networks at each of them.

    Returns:
        Rows of `tables.sample_barriers`, by scheme and matching; identity stitching is one of the schemes.
    """
    grids = {scheme: SCHEMES[scheme].grid(points) for scheme in ("linear", *RANDOM)}
    rows = combination_rows(pair, grids, samples, matchings=["WM"])
    rows += combination_rows(pair, {"linear": grids["linear"]}, matchings=["none"])
    rows += [{"scheme": "stitching"} | row for row in stitching_rows(pair, matchings=["WM"])]
    return sample_barriers(rows)


def weight_rows(networks: Mapping[str, State], a: State, b: State) -> list[dict]:
    """Every weight of small networks with matrices as layers, for `plots_combine.schematic`.

    Returns:
        Rows {network, layer, row, column, weight, coefficient: of B, in [0, 1]}.
    """
    rows = []
    for name, state in networks.items():
        for layer, weights in state.items():
            coefficients = ((weights - a[layer]) / (b[layer] - a[layer])).clamp(0, 1)
            for row, column in itertools.product(*map(range, weights.shape)):
                values = {"weight": float(weights[row, column]), "coefficient": float(coefficients[row, column])}
                rows.append({"network": name, "layer": layer, "row": row, "column": column} | values)
    return rows


class Lazy:
    """State dicts, each made when it is asked for and not kept; the length is for the progress bar."""

    def __init__(self, makers: Sequence[Callable[[], State]]):
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __iter__(self) -> Iterator[State]:
        return (make() for make in self._makers)
