"""Measure what each option that follows the authors' released code changes: docs/released.md.

    python docs/released.py      # trains four small networks on digits first, if they are not stored yet

Two pairs of networks, quick recipe, digits; nothing in the table is typed in by hand.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.experiments.pairs import Pair, load_pair
from companion.figures.report import environment
from repairlib.matching import match_activations
from repairlib.moments import CROSS, Moments, gather
from repairlib.names import check
from repairlib.permutations import agreement
from repairlib.renorm import Repair
from repairlib.weight_matching import match_weights

MODELS = ("resnet20-bn-w1", "vgg11-fused-w0.25")
PAGE = Path(__file__).with_name("released.md")
HEADER = """# What the released codes' ways change

Written by `docs/released.py` at commit {commit}, on {device}: digits, recipe `quick`, seeds 1 and 2.
Test accuracy of the midpoint of two networks that are matched by activations and REPAIRed (`sequential`, all
convolutions and block outputs) unless the row says otherwise. *Same units*: how many of all hidden units are matched
as by default. The last two rows are barriers in the loss (nats) along the path that is aligned but not renormalised,
over 11 points.

| what | option | {models} |
|---|---|{lines}|
"""


class BatchMeanMoments(Moments):
    """Moments as the released code of Jordan et al. 2022 pools them: of each batch, averaged with equal weight.

    Variances are unbiased. What varies between batches is missing from them, and a small last batch counts as much as
    a full one. Correlations divide by the average of the batches' standard deviations, and exceed 1 for units that are
    active in a few batches only.
    """

    def __init__(self, cross: str = "none"):
        self.cross = check(cross, CROSS, "cross")
        self.count = 0  # batches
        self._sums: dict[str, list[Tensor]] = {}

    def update(self, *activations: Tensor) -> None:
        """Add one batch: for each network, values (n, units, ...) of the same inputs."""
        rows = [x.detach().transpose(0, 1).flatten(1).double() for x in activations]
        if rows[0].shape[1] < 2:
            raise ValueError("pooling batches needs two values a channel in every batch; drop the last one")
        new = {"mean": [r.mean(1) for r in rows], "var": [r.var(1) for r in rows]}
        new["std"] = [v.sqrt() for v in new["var"]]
        if self.cross == "full":
            new["inner"] = [rows[0] @ r.T / r.shape[1] for r in rows]
        elif self.cross == "paired":
            new["inner"] = [(rows[0] * r).mean(1) for r in rows]
        for name, values in new.items():
            old = self._sums.get(name, [0.0] * len(values))
            self._sums[name] = [a + b for a, b in zip(old, values, strict=True)]
        self.count += 1

    def mean(self, k: int = 0) -> Tensor:
        """Mean of network k's units (units,), float64."""
        return self._sums["mean"][k] / self.count

    def var(self, k: int = 0) -> Tensor:
        """Variance of network k's units (units,), float64."""
        return self._sums["var"][k] / self.count

    def std(self, k: int = 0) -> Tensor:
        """Standard deviation of network k's units (units,): the root of `var`."""
        return self.var(k).sqrt()

    def inner(self, k: int = 1) -> Tensor:
        """Mean product of network 0 with network k > 0, as `Moments.inner`."""
        if not 0 < k < len(self._sums.get("inner", ())):
            raise ValueError(f"products with network {k} were not gathered; pass cross='full' or 'paired'")
        return self._sums["inner"][k] / self.count

    def cov(self, k: int = 1) -> Tensor:
        """Mean product less the product of means: with what varies between batches, unlike `var`."""
        inner = self.inner(k)
        return inner - _product(self.mean(0), self.mean(k), inner.ndim == 2)

    def dead(self, k: int = 0) -> Tensor:
        """Units (units,) of network k that are constant to rounding."""
        return self.std(k) <= 1e-6 * self.mean(k).abs()

    def corr(self, k: int = 1, eps: float = 0.0) -> Tensor:
        """``cov / (mean std_0 mean std_k + eps)``, shaped as `cov`; 0 where a unit is dead."""
        cov = self.cov(k)
        a, b = (self._sums["std"][i].div(self.count).masked_fill(self.dead(i), torch.inf) for i in (0, k))
        return cov / (_product(a, b, cov.ndim == 2) + eps)


def _product(a: Tensor, b: Tensor, full: bool) -> Tensor:
    return torch.outer(a, b) if full else a * b


@contextlib.contextmanager
def batch_means():
    """Let matching and `Repair(method="simultaneous")` pool moments as the released code does."""

    def gather_batch_means(*arguments):
        with patch("repairlib.moments.Moments", BatchMeanMoments):
            return gather(*arguments)

    with (
        patch("repairlib.matching.gather", gather_batch_means),
        patch("repairlib.renorm.gather", gather_batch_means),
        patch("repairlib.renorm.Moments", BatchMeanMoments),
    ):
        yield


def greedy_assignment(similarity: Float[Tensor, "units units"]) -> Int[Tensor, " units"]:
    """Permutation that takes the most similar pair, then the most similar of what is left, and so on (Li et al. 2015).

    >>> greedy_assignment(torch.tensor([[0.1, 0.9], [0.8, 0.95]])).tolist()  # 0.95 + 0.1, where 0.9 + 0.8 is the most
    [0, 1]
    """
    n = len(similarity)
    perm, free, left = [-1] * n, [True] * n, n
    for place in similarity.flatten().argsort(descending=True, stable=True).tolist():
        i, j = divmod(place, n)
        if perm[i] < 0 and free[j]:
            perm[i], free[j], left = j, False, left - 1
            if not left:
                break
    return torch.tensor(perm, dtype=torch.int64)


def accuracy(pair: Pair, end=None, **options) -> str:
    """Accuracy of the REPAIRed midpoint between A and an aligned B."""
    options = {"limit": None} | options
    return f"{pair.evaluate(Repair(pair.a, end or pair.aligned, pair.calibration, **options)(0.5).model)[1]:.1%}"


def matched(pair: Pair, matching) -> str:
    """Accuracy with another matching, and how much of it is the default one."""
    same = agreement(matching.permutation, pair.matching.permutation)
    units = sum(share * len(matching.permutation[group]) for group, share in same.items())
    total = sum(len(perm) for perm in matching.permutation.values())
    return f"{accuracy(pair, matching.apply(pair.b))}, {units / total:.0%} same units"


def activations(pair: Pair, **options) -> str:
    """Accuracy if matched by activations in another way."""
    return matched(pair, match_activations(pair.a, pair.b, pair.calibration, spec=pair.matching.spec, **options))


def weights(pair: Pair, **options) -> str:
    """Accuracy if matched by weights."""
    return matched(pair, match_weights(pair.a, pair.b, spec=pair.matching.spec, start="identity", **options))


def pooled(measure: Callable[..., str]) -> Callable[..., str]:
    """The same measurement with the released code's pooling."""

    def run(pair: Pair, **options) -> str:
        with batch_means():
            return measure(pair, **options)

    return run


def greedily(pair: Pair) -> str:
    """Accuracy if pairs of units are taken greedily."""
    with patch("repairlib.matching.solve_assignment", greedy_assignment):
        return activations(pair)


def barrier(pair: Pair, baseline: str) -> str:
    """Barrier of the aligned path."""
    path = pair.path(pair.midpoint, [i / 10 for i in range(11)])
    return f"{path.barrier('loss', baseline):.3f}"


ROWS = {
    ("default", ""): accuracy,
    ("correlation + 1e-4 in the denominator", "`eps=1e-4`"): lambda p: activations(p, eps=1e-4),
    ("batches of 500 pooled with equal weight", "`batch_means` here"): pooled(activations),
    ("both of these", ""): lambda p: pooled(activations)(p, eps=1e-4),
    ("read before the non-linearity", '`tap="pre"`'): lambda p: activations(p, tap="pre"),
    ("inner products, not correlations", '`similarity="inner"`'): lambda p: activations(p, similarity="inner"),
    ("greedy, not exact", "`greedy_assignment` here"): greedily,
    ("matched by weights", "`match_weights`"): weights,
    ("with running statistics as weights", "`buffers=True`"): lambda p: weights(p, buffers=True),
    ("REPAIR as published", '`method="simultaneous"`'): lambda p: accuracy(p, method="simultaneous"),
    ("batch statistics pooled with equal weight", "`batch_means` here"): lambda p: pooled(accuracy)(
        p, method="simultaneous"
    ),
    ("BatchNorms estimated again", '`bn="reset"`'): lambda p: accuracy(p, bn="reset") if "bn" in p.runs[0] else "-",
    ("inner convolutions only", '`targets="inner"`'): lambda p: (
        accuracy(p, targets="inner") if "resnet" in p.runs[0] else "-"
    ),
    ("RESCALE", '`correct="rescale"`'): lambda p: accuracy(p, correct="rescale"),
    ("RESCALE, variance + 1e-5", "`eps=1e-5`"): lambda p: accuracy(p, correct="rescale", eps=1e-5),
    ("barrier over the line between the ends", '`baseline="linear"`'): lambda p: barrier(p, "linear"),
    ("barrier over their mean", '`baseline="mean"`'): lambda p: barrier(p, "mean"),
}


def main() -> None:
    pairs = [load_pair([f"digits/{model}/quick/s{seed}" for seed in (1, 2)]) for model in MODELS]
    columns = [f"{model}, ends {pair.accuracy:.1%}" for model, pair in zip(MODELS, pairs, strict=True)]
    made = environment()
    text = HEADER.format(
        models=" | ".join(columns),
        lines="|".join(["---"] * len(MODELS)),
        commit=made["commit"][:12],
        device=made["device"],
    )
    for (what, option), measure in ROWS.items():
        text += f"| {what} | {option} | {' | '.join(measure(pair) for pair in pairs)} |\n"
        print(text.splitlines()[-1], flush=True)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
