"""Averages of networks within one basin of the loss, and of many networks (Qu and Horvath 2024, Secs. 3.2 and 3.3)."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from companion.experiments.methods import MATCHINGS
from companion.experiments.pairs import CALIBRATION_BATCH, Pair, trained
from companion.experiments.statistics import MATCHED, has_batchnorm
from companion.runs.data import iterate, load
from repairlib.diagnostics import distance
from repairlib.evaluation import evaluate
from repairlib.groups import permutation_spec
from repairlib.interpolate import interpolate_models, mix_states, with_state
from repairlib.names import check
from repairlib.permutations import invert, permute, random_permutation
from repairlib.renorm import reset
from repairlib.several import REGIMES, match_several, running_means


def shuffle_rows(pair: Pair, alphas: Iterable[float], seed: int = 1) -> list[dict]:
    """The units of A shuffled, then matched with B's: paths from it to B (Sec. 3.2, Fig. 2D).

    Args:
        pair: two networks, of one basin or not.
        alphas: points of the paths.
        seed: of the shuffle.

    Returns:
        Rows {matching: "none" for the shuffled network, "WM", "AM", recovered: share of the live
        units whose shuffle was undone exactly, alpha, loss (nats), accuracy (in [0, 1])}.
    """
    spec, alphas = pair.matching.spec, list(alphas)
    shuffle = random_permutation(spec, seed)
    shuffled, back = permute(pair.a, spec, shuffle), invert(shuffle)
    starts: dict[str, tuple[nn.Module, float]] = {"none": (shuffled, 0.0)}
    for name in MATCHED:
        found = MATCHINGS[name].match(pair.b, shuffled, pair.calibration, spec=spec)
        same = {group: perm == back[group] for group, perm in found.permutation.items()}
        # By activations, units that are dead on all images match in any order; they do not count.
        alive = {group: found.correlation.get(group, torch.ones(len(each))) != 0 for group, each in same.items()}
        right = sum(int((same[group] & mask).sum()) for group, mask in alive.items())
        starts[name] = found.apply(shuffled), right / sum(int(mask.sum()) for mask in alive.values())
    measured = [
        (name, share, alpha, pair.evaluate(interpolate_models(start, pair.b, alpha)))
        for name, (start, share) in starts.items()
        for alpha in alphas
    ]
    return [
        {"matching": name, "recovered": share, "alpha": alpha, "loss": loss, "accuracy": accuracy}
        for name, share, alpha, (loss, accuracy) in measured
    ]


def distance_rows(pair: Pair) -> list[dict]:
    """Distances of A from B, as trained and matched (Table 3).

    Returns:
        Rows {matching: "none", "WM" or "AM", buffers: whether BatchNorm statistics count, distance}.
    """
    kinds = [False, True] if has_batchnorm(pair.a) else [False]
    return [
        {"matching": name, "buffers": buffers, "distance": distance(pair.a, pair.aligned_by(name), buffers)}
        for buffers in kinds
        for name in ("none", *MATCHED)
    ]


def average_rows(
    runs: Sequence[str],
    numbers: Sequence[int],
    regimes: Sequence[str] = ("reference", "sequential", "iterative"),
    *,
    rounds: int = 30,
    calibration: int = 5000,
) -> list[dict]:
    """Averages of the first n networks, brought into one order of units in several ways (Sec. 3.3, Figs. 3, 14 to 16).

    Units are matched by weights and by activations. The regime "same basin" matches nothing: its networks share one as
    they are. Averages of networks with BatchNorm are reset.

    Args:
        runs: names of at least max(numbers) runs; the first so many are used.
        numbers: how many networks are averaged.
        regimes: see `repairlib.several.match_several`, or "same basin".
        rounds: of the iterative regime, at most.
        calibration: training images for matching and RESET.

    Returns:
        Rows {regime, matching ("none" where nothing is matched), n, loss (nats), accuracy (in [0, 1]), ends: mean
        accuracy of the n networks, rounds, converged}.
    """
    for regime in regimes:
        check(regime, (*REGIMES, "same basin"), "regime")
    dataset = load(runs[0].split("/")[0])
    models = [trained(run, dataset.device) for run in runs[: max(numbers)]]
    data = iterate(dataset, "train", CALIBRATION_BATCH, limit=calibration)
    test = iterate(dataset, "test")
    ends = [evaluate(model, test)[1] for model in models]
    spec = permutation_spec(models[0], next(iter(data))[0][:2])
    rows = []
    for regime in regimes:
        for matching in MATCHED if regime in REGIMES else ["none"]:
            match = functools.partial(MATCHINGS[matching].match, data=data, spec=spec) if regime in REGIMES else None
            for n, mean, how in _averages(models, numbers, regime, match, rounds):
                mean = reset(mean, data).model if has_batchnorm(mean) else mean
                loss, accuracy = evaluate(mean, test)
                rows.append(
                    {"regime": regime, "matching": matching, "n": n, "loss": loss, "accuracy": accuracy,
                     "ends": sum(ends[:n]) / n, **how}
                )  # fmt: skip
    return rows


def _averages(
    models: Sequence[nn.Module], numbers: Sequence[int], regime: str, match: Callable | None, rounds: int
) -> Iterator[tuple[int, nn.Module, dict]]:
    """Number, mean of the first so many networks in one order of units, and how the matching went."""
    if match is None:
        for n in numbers:
            states = [model.state_dict() for model in models[:n]]
            yield n, with_state(models[0], mix_states(states, [1 / n] * n)), {"rounds": 0, "converged": True}
    elif regime == "iterative":
        for n in numbers:
            aligned = match_several(models[:n], match, regime, rounds=rounds)
            yield n, aligned.mean(), {"rounds": aligned.rounds, "converged": aligned.converged}
    else:
        for n, mean in enumerate(running_means(models, match, regime), start=1):
            if n in numbers:
                yield n, mean, {"rounds": 1, "converged": True}
