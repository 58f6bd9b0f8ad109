"""Say how a merge went, and what to try where it went badly."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from repairlib.corrections import Repaired
from repairlib.diagnostics import layer_moments, variance_ratio
from repairlib.evaluation import Score, evaluate, mean_score
from repairlib.inputs import Limited, as_batches
from repairlib.interpolate import interpolate_models

FAR_BELOW = 0.9  # share of the ends' accuracy below which something should be tried
WEAK = 0.46  # mean correlation; networks of docs/merging.md below it lose 13 to 33 points, those above it 1 to 9


@dataclass(frozen=True)
class Report:
    """How a merge went; prints as a table.

    Attributes:
        correlation: mean correlation of matched units, by group; empty unless they were matched by activations.
        variance: by layer, (before, after): variance of the midpoint relative to the ends', without and with REPAIR.
        visible: nodes whose correction no weight could take up.
        stay: layers whose units could not be matched.
        scores: of "A", "B", "midpoint" (aligned, without REPAIR) and "merged": accuracy, or the score that was given.
        advice: what to try, in order. Empty if the merged network has 90 % of the ends' mean accuracy or more; without
            `test` nobody knows, and the advice is there.
    """

    correlation: dict[str, float]
    variance: dict[str, tuple[float, float]]
    visible: tuple[str, ...] = ()
    stay: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{name:12} {value:.4g}" for name, value in self.scores.items()]
        if self.correlation:
            width = max(map(len, self.correlation))
            lines += ["", f"{'group':{width}}  mean correlation of matched units"]
            lines += [f"{name:{width}}  {value:.3f}" for name, value in self.correlation.items()]
        width = max(map(len, ("layer", *self.variance)))
        lines += ["", f"{'layer':{width}}  variance of the midpoint, relative to the ends: before and after REPAIR"]
        lines += [f"{name:{width}}  {before:.3f}  {after:.3f}" for name, (before, after) in self.variance.items()]
        if self.visible:
            lines += ["", f"corrections that stay visible: {', '.join(self.visible)}"]
        if self.stay:
            lines += ["", f"layers whose units stay unmatched: {', '.join(self.stay)}"]
        if self.advice:
            lines += ["", "what to try:", *(f"- {line}" for line in self.advice)]
        return "\n".join(lines).strip()


def report(
    model_a: nn.Module,
    model_b: nn.Module,
    merged: Repaired,
    data: Iterable,
    test: Iterable | None = None,
    *,
    score: Score | None = None,
    limit: int | None = 5000,
) -> Report:
    """Say how a merge went.

    Args:
        model_a, model_b: the two networks that were merged, at ``alpha=0.5``.
        merged: what `repairlib.merge` returned.
        data: the batches that it was given.
        test: batches (x, y) to measure accuracy on, if there are any.
        score: another measure, see `mean_score`; less is better.
        limit: number of examples of `data` to use.

    Raises:
        ValueError: the result comes from elsewhere, and has no matching.

    >>> import torch, repairlib
    >>> a, b = (nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(2))
    >>> x = torch.randn(500, 4)
    >>> found = repairlib.report(a, b, repairlib.merge(a, b, x), x)
    >>> list(found.correlation), list(found.variance)
    (['0'], ['_0'])
    """
    if merged.matching is None:
        raise ValueError("a report is of what repairlib.merge returns, which knows how the networks were matched")
    data = Limited(as_batches(data), limit)
    aligned = merged.matching.apply(model_b)
    middle = interpolate_models(model_a, aligned)
    moments = layer_moments([model_a, aligned, middle, merged.model], data, ("conv", "linear"))
    varying = {node: m for node, m in moments.items() if float((m.var(0) + m.var(1)).sum()) > 0}
    ratios = {node: (variance_ratio(m, 2), variance_ratio(m, 3)) for node, m in varying.items()}
    scores = {}
    if test is not None:
        test = as_batches(test)
        networks = {"A": model_a, "B": model_b, "midpoint": middle, "merged": merged.model}
        scores = {
            name: evaluate(model, test)[1] if score is None else mean_score(model, test, score)
            for name, model in networks.items()
        }
    correlation = {name: float(values.mean()) for name, values in merged.matching.correlation.items()}
    found = Report(
        correlation,
        ratios,
        merged.visible,
        merged.matching.spec.stay,
        scores,
    )
    return replace(found, advice=_advice(found, lower_is_better=score is not None))


def _advice(found: Report, lower_is_better: bool) -> tuple[str, ...]:
    """What helped in our measurements, see "When the merged network is bad" in docs/guide.md."""
    if found.scores:
        a, b, merged = (found.scores[name] for name in ("A", "B", "merged"))
        worst = max(a, b) + (1 - FAR_BELOW) * abs(max(a, b))
        if (merged <= worst) if lower_is_better else (merged >= FAR_BELOW * (a + b) / 2):
            return ()
    lines = []
    if found.stay:
        lines.append("some layers are not matched at all: write them with operations that have a rule")
    if found.correlation and sum(found.correlation.values()) < WEAK * len(found.correlation):
        lines.append("matched units are weakly correlated: wider networks merge better")
    lines.append("fine-tune for an epoch at a small learning rate, 0.001 for instance, and compare")
    return tuple(lines)
