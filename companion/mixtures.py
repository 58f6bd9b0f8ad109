"""Samples of combined networks, scheme by scheme (Csiszarik et al. 2023, Secs. 4 and 5).

A scheme is a family of distributions of coefficients with one real parameter x; `combine.elementwise` draws a network
from it. Alpha = 0 is model A throughout, see `combine`.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from companion.pairs import Pair
from repairlib import combine
from repairlib.data import iterate
from repairlib.ensembles import predict
from repairlib.interpolate import State, empirical_barrier, with_state
from repairlib.names import check
from repairlib.stacked import evaluate_many


@dataclass(frozen=True)
class Scheme:
    """A family of distributions of coefficients.

    Attributes:
        make: from x to the quantile function of one coefficient.
        low, high: the range of x.
        xlabel: what x is called.
        random: whether two draws differ.
    """

    make: Callable[[float], combine.Quantile]
    low: float
    high: float
    xlabel: str
    random: bool = True

    def grid(self, points: int) -> list[float]:
        """Equidistant values of x, both ends included; exact at the ends and in the middle."""
        return [(self.low * (points - 1 - i) + self.high * i) / (points - 1) for i in range(points)]


SCHEMES = {
    "linear": Scheme(lambda alpha: lambda u: torch.full_like(u, alpha), 0, 1, r"$\alpha$", random=False),
    "extrapolation": Scheme(lambda alpha: lambda u: torch.full_like(u, alpha), -1, 2, r"$\alpha$", random=False),
    "uniform": Scheme(combine.box, 0, 0.5, r"half edge $s$ of the cube about the midpoint"),
    "subcube": Scheme(combine.subcube, 0, 1, r"centre $\alpha$ of the sub-cube"),
    "hyperplane": Scheme(combine.hyperplane, 0, 1, r"mean coefficient $\alpha$"),
    "bernoulli": Scheme(combine.bernoulli, 0, 1, r"probability $p$ of model B's entry"),
    "centred": Scheme(lambda s: combine.box(s, center=0.0), 0, 0.5, r"half edge $s$ of the box about model A"),
}
KINDS = ("permuted", "naive")  # B's units in A's order, or as trained


def maker(ends: tuple[State, State], scheme: str, x: float, sample: int, seed: int = 0) -> Callable[[], State]:
    """What draws one network of a scheme when it is called.

    Args:
        ends: state dicts of A and B.
        scheme: one of `SCHEMES`.
        x: its parameter.
        sample: number of the draw. Its uniform numbers are the same for every scheme, x and device, so that a sample is
            followed along x, and samples differ.
        seed: of all draws.
    """
    quantile = SCHEMES[check(scheme, SCHEMES, "scheme")].make(x)
    return lambda: combine.elementwise(*ends, quantile, seed * 1_000_003 + sample)


def states_of(pair: Pair, kind: str) -> tuple[State, State]:
    """State dicts of A and of B, the latter "permuted" to A's order or "naive"."""
    check(kind, KINDS, "kind")
    return pair.a.state_dict(), (pair.aligned if kind == "permuted" else pair.b).state_dict()


def evaluate_rows(
    pair: Pair, named: Iterable[tuple[dict, Callable[[], State]]], splits: Sequence[str] = ("test",)
) -> list[dict]:
    """Evaluate combinations of a pair together; a row each, in order.

    Args:
        pair: of the endpoints.
        named: columns that name a combination, and what makes its state dict.
        splits: "test", "train" or both.

    Returns:
        Rows {**columns, split, loss (nats), accuracy (in [0, 1]), end_loss, end_accuracy: means of the endpoints}.
    """
    named, rows = list(named), []
    for split in splits:
        batches = iterate(pair.dataset, split, batch_size=500)
        ends = evaluate_many(pair.a, [pair.a.state_dict(), pair.b.state_dict()], batches)
        mean = {name: sum(end[i] for end in ends) / 2 for i, name in enumerate(("end_loss", "end_accuracy"))}
        found = evaluate_many(pair.a, _Lazy([make for _, make in named]), batches)
        rows += [
            columns | {"split": split, "loss": loss, "accuracy": accuracy} | mean
            for (columns, _), (loss, accuracy) in zip(named, found, strict=True)
        ]
    return rows


def combination_rows(
    pair: Pair,
    scheme: str,
    grid: Iterable[float],
    samples: int = 4,
    *,
    kinds: Sequence[str] = KINDS,
    splits: Sequence[str] = ("test",),
    seed: int = 0,
) -> list[dict]:
    """Networks drawn from a scheme at every point of a grid, evaluated.

    Args:
        pair: of the endpoints.
        scheme, seed: see `maker`.
        samples: networks at each point; a scheme that is not random gives one.
        grid: values of x, for instance ``SCHEMES[scheme].grid(25)``.
        kinds: with B aligned ("permuted") and as trained ("naive").
        splits: see `evaluate_rows`.

    Returns:
        Rows of `evaluate_rows` with columns {scheme, kind, x, sample}.
    """
    check(scheme, SCHEMES, "scheme")
    numbers, grid = range(samples if SCHEMES[scheme].random else 1), list(grid)
    ends = {kind: states_of(pair, kind) for kind in kinds}
    named = [
        ({"scheme": scheme, "kind": kind, "x": x, "sample": i}, maker(ends[kind], scheme, x, i, seed))
        for kind, x, i in itertools.product(kinds, grid, numbers)
    ]
    return evaluate_rows(pair, named, splits)


def stitching_rows(pair: Pair, *, kinds: Sequence[str] = KINDS) -> list[dict]:
    """Identity stitching at every layer: the first layers are A's, the rest B's (Csiszarik et al. 2023, Sec. 4.3).

    Returns:
        Rows of `evaluate_rows` with columns {kind, layer, name}: `layer` of them are A's, from 0, which is B, to all,
        which is A; `name` is that of the last of A's.
    """
    parts = combine.layers(pair.a, next(iter(pair.calibration))[0])
    named = []
    for kind in kinds:
        ends = states_of(pair, kind)
        for layer, name in enumerate(["", *parts]):
            columns = {"kind": kind, "layer": layer, "name": name}
            named.append((columns, lambda e=ends, n=layer: combine.stitch(*e, n, parts)))
    return evaluate_rows(pair, named)


def sample_barriers(table: Iterable[dict], by: Sequence[str] = ("scheme", "kind")) -> list[dict]:
    """Empirical barriers of what was evaluated: the worst network against the mean of the endpoints (Def. 3.3).

    Args:
        table: rows of `evaluate_rows`.
        by: columns; each combination of their values is a sample of its own. Name the pair among them.

    Returns:
        Rows {**by, loss_barrier (nats), accuracy_barrier (points), end_loss, end_accuracy, networks}.
    """
    rows = []
    for key, group in pd.DataFrame(table).groupby(list(by), sort=False):
        end = (group["end_loss"].iloc[0], group["end_accuracy"].iloc[0])
        sample = list(zip(group["loss"], group["accuracy"], strict=True))
        found = {m: empirical_barrier(sample, end, end, m) for m in ("loss", "accuracy")}
        rows.append(
            dict(zip(by, key, strict=True))
            | {"loss_barrier": found["loss"], "accuracy_barrier": 100 * found["accuracy"]}
            | {"end_loss": end[0], "end_accuracy": end[1], "networks": len(group)}
        )
    return rows


def label_agreement(
    model: nn.Module, states: Iterable[State], ends: tuple[State, State], batches: Iterable
) -> list[dict]:
    """Whose labels combined networks predict: A's, B's, both's or neither's (Csiszarik et al. 2023, Sec. 6.1).

    Args:
        model: the architecture. Untouched.
        states: of the combined networks.
        ends: of A and of B.
        batches: (x, y).

    Returns:
        One row a network: counts of examples {a_correct, a_wrong, b_correct, b_wrong, both_correct, both_wrong,
        neither_correct, neither_wrong}.
    """
    truth = torch.cat([y for _, y in batches])

    def labels(state: State) -> torch.Tensor:
        return predict(with_state(model, state), batches).argmax(1)

    of_a, of_b = map(labels, ends)
    rows = []
    for state in states:
        of = labels(state)
        like_a, like_b, right = of == of_a, of == of_b, of == truth.to(of.device)
        groups = {"a": like_a & ~like_b, "b": like_b & ~like_a, "both": like_a & like_b, "neither": ~like_a & ~like_b}
        rows.append({f"{name}_{word}": int((group & ok).sum()) for name, group in groups.items()
                     for word, ok in (("correct", right), ("wrong", ~right))})  # fmt: skip
    return rows


class _Lazy(Sequence):
    """State dicts that are made when they are asked for, and not kept; its length serves the progress bar."""

    def __init__(self, makers: Sequence[Callable[[], State]]):
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, i: int) -> State:
        return self._makers[i]()
