"""Three networks, two of them in the order of units of the third (Csiszarik et al. 2023, Secs. 5.3 and 5.4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from companion.experiments.methods import MATCHINGS
from companion.experiments.mixtures import Lazy, evaluate_rows
from companion.experiments.pairs import Pair, load_pair, trained
from companion.runs.names import seeded
from repairlib.combine import simplex_grid
from repairlib.evaluation import evaluate_many
from repairlib.interpolate import interpolate_states, mix_states
from repairlib.permutations import agreement, chain
from repairlib.several import AlignedNetworks, match_several


@dataclass(frozen=True)
class Triple:
    """Networks A, B and C of one architecture, matched by weights.

    Attributes:
        a: the network that the two others are matched to, as trained.
        pair: B and C as trained, matched with each other, with their data.
        through_a: the three networks in A's order of units.
    """

    a: nn.Module
    pair: Pair
    through_a: AlignedNetworks


def load_triple(run: str, seeds: Sequence[int | str], restarts: int = 1, test_images: int | None = None) -> Triple:
    """The networks of three seeds of a run, trained first if they are not stored yet.

    Args:
        run: a run name without its seed, such as "digits/resnet20-ln-w1/quick".
        seeds: of A, B and C.
        restarts: of weight matching, see `repairlib.match_weights`.
        test_images: evaluate on so many, see `load_pair`.
    """
    name_a, *others = (seeded(run, seed) for seed in seeds)
    pair = load_pair(others, test_images=test_images, matching="WM", restarts=restarts)
    a = trained(name_a, pair.dataset.device)
    match = partial(MATCHINGS["WM"].match, data=pair.calibration, restarts=restarts)
    return Triple(a, pair, match_several([a, pair.a, pair.b], match))


def transitivity_rows(triple: Triple, alphas: Iterable[float]) -> list[dict]:
    """Three paths from B to C: both in A's order, C in B's order, and both as trained.

    Returns:
        Rows of `evaluate_rows` with columns {matching: "through A", "directly" or "none", alpha: 0 is B, 1 is C}.
    """
    pair, (_, *through_a) = triple.pair, triple.through_a.models
    paths = {"through A": through_a, "directly": (pair.a, pair.aligned), "none": (pair.a, pair.b)}
    ends = {matching: [model.state_dict() for model in models] for matching, models in paths.items()}
    alphas = list(alphas)
    named = [
        ({"matching": matching, "alpha": alpha}, partial(interpolate_states, *ends[matching], alpha))
        for matching in ends
        for alpha in alphas
    ]
    return evaluate_rows(pair, named)


def triangle_rows(triple: Triple, steps: int) -> list[dict]:
    """Test loss and accuracy of ``w_a A + w_b B + w_c C``, with B and C in A's order and as trained.

    Args:
        steps: weights are multiples of 1 / steps, see `simplex_grid`.

    Returns:
        Rows {matching: "WM" or "none", w_a, w_b, w_c, loss (nats), accuracy (in [0, 1])}.
    """
    pair, weights, rows = triple.pair, simplex_grid(3, steps), []
    for matching, models in {"WM": triple.through_a.models, "none": (triple.a, pair.a, pair.b)}.items():
        states = [model.state_dict() for model in models]
        measured = evaluate_many(pair.a, Lazy([partial(mix_states, states, w) for w in weights]), pair.test)
        columns = ("w_a", "w_b", "w_c", "loss", "accuracy")
        values = [(*w, *found) for w, found in zip(weights, measured, strict=True)]
        rows += [{"matching": matching} | dict(zip(columns, value, strict=True)) for value in values]
    return rows


def agreement_rows(triple: Triple) -> list[dict]:
    """How many units of B get the same partner in C through A as directly, group by group.

    Two random orders of n units agree on one of them on average.

    Returns:
        Rows {group, units, agreement (in [0, 1])}.
    """
    directly = triple.pair.matching.permutation
    found = agreement(chain(*triple.through_a.permutation[1:]), directly)
    return [{"group": group, "units": len(directly[group]), "agreement": value} for group, value in found.items()]
