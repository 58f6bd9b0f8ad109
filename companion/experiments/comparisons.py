"""How alike two aligned networks are, and how much of their alignment matters (Csiszarik et al. 2023, Sec. 6)."""

import itertools
from collections.abc import Iterable, Sequence, Sized

import numpy as np
import torch
from torch import Tensor, nn

from companion.experiments.ensembles import predict
from companion.experiments.mixtures import Lazy, draw_networks, evaluate_rows, states_of
from companion.experiments.pairs import Pair
from companion.experiments.tables import sample_barriers
from repairlib.groups import Permutation
from repairlib.inputs import Batches
from repairlib.interpolate import State, interpolate_states
from repairlib.matching import gather_groups
from repairlib.permutations import derange, permute_state
from repairlib.progress import bar
from repairlib.recording import copy_model


def label_agreement(
    model: nn.Module, states: Iterable[State], ends: tuple[State, State], batches: Iterable
) -> list[dict]:
    """Whose labels combined networks predict: A's, B's, both's or neither's (Csiszarik et al. 2023, Sec. 6.1).

    Args:
        model: the architecture. Untouched.
        states: of the combined networks, taken one at a time.
        ends: of A and of B.
        batches: (x, y).

    Returns:
        One row a network: counts of examples {a_correct, a_wrong, b_correct, b_wrong, both_correct, both_wrong,
        neither_correct, neither_wrong}.
    """
    net = copy_model(model)  # takes up one state after the other

    def labels(state: State) -> torch.Tensor:
        net.load_state_dict(state)
        return predict(net, batches).argmax(1)

    of_a, of_b = map(labels, ends)
    truth = torch.cat([y for _, y in batches]).to(of_a.device)
    rows = []
    with bar(len(states) if isinstance(states, Sized) else None, "networks", "net") as networks:
        for of in map(labels, states):
            like_a, like_b, right = of == of_a, of == of_b, of == truth
            groups = {"a": like_a & ~like_b, "b": like_b & ~like_a, "both": like_a & like_b,
                      "neither": ~like_a & ~like_b}  # fmt: skip
            counts = {f"{name}_{word}": (group & ok).sum() for name, group in groups.items()
                      for word, ok in (("correct", right), ("wrong", ~right))}  # fmt: skip
            rows.append(dict(zip(counts, torch.stack([*counts.values()]).tolist(), strict=True)))
            networks.update()
    return rows


def label_rows(pair: Pair, scheme: str, grid: Iterable[float], samples: int = 1, matching: str = "WM") -> list[dict]:
    """`label_agreement` on the test set of networks drawn from a scheme, see `mixtures.combination_rows`.

    Returns:
        Rows {scheme, matching, x, sample, **counts}.
    """
    named = draw_networks(pair, scheme, grid, samples, matchings=[matching])
    states = Lazy([make for _, make in named])
    counts = label_agreement(pair.a, states, states_of(pair, matching), pair.test)
    return [columns | count for (columns, _), count in zip(named, counts, strict=True)]


def edge_rows(pair: Pair, matching: str = "WM", bins: Sequence[float] = tuple(i / 10 for i in range(41))) -> list[dict]:
    """How long the edges of the hypercube between A and B are, layer by layer (Csiszarik et al. 2023, Fig. 13).

        |a_i - b_i| / sqrt(mean_i (a_i^2 + b_i^2) / 2)

    in units of the root mean square of the layer's weights, so that layers can be compared: on average over the weights
    the square is 2 between networks that have nothing to do with each other. Biases and normalisations are left out.

    Args:
        matching: with B's units in A's order ("WM") or as trained ("none").
        bins: edges of the histogram; what is longer counts in the last bin.

    Returns:
        Rows {matching, layer, rms of its weights, median length, bin_low, bin_high, share of the weights in the bin (in
        [0, 1])}.
    """
    ends, rows = states_of(pair, matching), []
    for name in [name for name, weight in ends[0].items() if weight.ndim > 1]:
        a, b = (end[name].double().flatten().cpu().numpy() for end in ends)
        size = np.sqrt((a**2 + b**2).mean() / 2)
        length = abs(a - b) / size
        share = np.histogram(length.clip(max=bins[-1]), bins)[0] / len(length)
        here = {"matching": matching, "layer": name.removesuffix(".weight"), "rms": size, "median": np.median(length)}
        rows += [here | {"bin_low": low, "bin_high": high, "share": part}
                 for low, high, part in zip(bins, bins[1:], share, strict=False)]  # fmt: skip
    return rows


def group_correlations(pair: Pair) -> dict[str, Tensor]:
    """Correlation of matched units behind each group's non-linearity (units,), in A's order."""
    spec = pair.matching.spec
    moments = gather_groups([pair.a, pair.aligned], Batches(pair.calibration, pair.a), spec, "post")
    return {group.name: moments[group.taps["post"]].corr().diagonal() for group in spec.groups}


def derangements(pair: Pair, steps: int, draws: int) -> list[tuple[dict, Permutation]]:
    """Matchings with the k least correlated pairs of one layer deranged, see `permutations.derange`.

    Args:
        steps: k is 0, 2, and 1/steps, 2/steps, ..., 1 times the layer's units.
        draws: derangements for each k; for k = 2 there is only one.

    Returns:
        Columns {layer, k, units, draw} and the matching.
    """
    found, correlation = [], group_correlations(pair)
    for group, n in ((group.name, group.size) for group in pair.matching.spec.groups):
        for k in sorted({0, 2} | {max(2, n * i // steps) for i in range(1, steps + 1)}):
            for draw in range(draws if k > 2 else 1):
                matching = derange(pair.matching.permutation, correlation, group, k, seed=draw)
                found.append(({"layer": group, "k": k, "units": n, "draw": draw}, matching))
    return found


def derangement_rows(pair: Pair, steps: int, draws: int, alphas: Sequence[float] = (0.5,)) -> list[dict]:
    """Barriers between A and B whose matching is disturbed in every way of `derangements` (Csiszarik et al. 2023, 6.3).

    Args:
        steps, draws: see `derangements`.
        alphas: points of the path; the worst of them is the barrier.

    Returns:
        Rows {layer, k, units, draw, loss_barrier (nats), accuracy_barrier (a fraction), end_loss, end_accuracy,
        networks, not_aligned_loss_barrier, not_aligned_accuracy_barrier: with B's units as trained}.
    """
    spec, a, b = pair.matching.spec, pair.a.state_dict(), pair.b.state_dict()

    def make(alpha: float, permutation: Permutation):
        return lambda: interpolate_states(a, permute_state(b, spec, permutation) if permutation else b, alpha)

    what = [*derangements(pair, steps, draws), ({"layer": "", "k": 0, "units": 0, "draw": 0}, {})]
    named = [(columns, make(alpha, matching)) for (columns, matching), alpha in itertools.product(what, alphas)]
    *rows, not_aligned = sample_barriers(evaluate_rows(pair, named), by=("layer", "k", "units", "draw"))
    beside = {f"not_aligned_{metric}_barrier": not_aligned[f"{metric}_barrier"] for metric in ("loss", "accuracy")}
    return [row | beside for row in rows]
