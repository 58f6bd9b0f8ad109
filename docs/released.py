"""Measure what each option that follows the authors' released code changes: docs/released.md.

    python docs/released.py      # trains four small networks on digits first, if they are not stored yet

Two pairs of networks, quick recipe, digits; nothing in the table is typed in by hand.
"""

from pathlib import Path

from companion.experiments.pairs import Pair, load_pair
from companion.figures.report import environment
from repairlib.matching import match_activations
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
    return matched(pair, match_activations(pair.a, pair.b, pair.calibration, spec=pair.matching.spec, **options))


def weights(pair: Pair, **options) -> str:
    return matched(pair, match_weights(pair.a, pair.b, spec=pair.matching.spec, **options))


def barrier(pair: Pair, baseline: str) -> str:
    path = pair.path(pair.midpoint, [i / 10 for i in range(11)])
    return f"{path.barrier('loss', baseline):.3f}"


ROWS = {
    ("default", ""): accuracy,
    ("correlation + 1e-4 in the denominator", "`eps=1e-4`"): lambda p: activations(p, eps=1e-4),
    ("batches of 500 pooled with equal weight", '`pooling="batch-mean"`'): lambda p: activations(
        p, pooling="batch-mean"
    ),
    ("both of these", ""): lambda p: activations(p, eps=1e-4, pooling="batch-mean"),
    ("read before the non-linearity", '`tap="pre"`'): lambda p: activations(p, tap="pre"),
    ("inner products, not correlations", '`similarity="inner"`'): lambda p: activations(p, similarity="inner"),
    ("greedy, not exact", '`solver="greedy"`'): lambda p: activations(p, solver="greedy"),
    ("matched by weights", "`match_weights`"): weights,
    ("with running statistics as weights", "`buffers=True`"): lambda p: weights(p, buffers=True),
    ("REPAIR as published", '`method="simultaneous"`'): lambda p: accuracy(p, method="simultaneous"),
    ("batch statistics pooled with equal weight", '`pooling="batch-mean"`'): lambda p: accuracy(
        p, method="simultaneous", pooling="batch-mean"
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
