"""Loss and accuracy of one network, or of one architecture under many state dicts; or any other score."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repairlib.inputs import call, cast_input, device_of, inputs_of
from repairlib.interpolate import State, check_compatible, load_state
from repairlib.progress import bar
from repairlib.recording import copy_model, eval_mode

IGNORED = -100  # the label that PyTorch's losses leave out
# From outputs and the rest of a batch, one number for each example, or one for each of its positions.
Score = Callable[..., Tensor]


def evaluate(model: nn.Module, batches: Iterable) -> tuple[float, float]:
    """Mean cross entropy (nats) and accuracy (in [0, 1]) of a classifier, in evaluation mode; sums are float64.

    Args:
        model: its outputs are logits [b, classes], or [b, classes, ...] with a class for every position. Untouched.
        batches: (x, y, ...), y int64 [b] or [b, ...], on any device. Labels of -100 are left out. Floating x take the
            precision of the weights.

    Raises:
        ValueError: there are no batches, or labels are no class indices of the outputs; `mean_score` is for others.
    """
    parts: list[tuple[Tensor, ...]] = []
    with eval_mode(model):
        for batch in batches:
            logits, rest = _outputs(model, batch)
            if not rest:
                raise ValueError("batches have no labels: they must be (x, y)")
            y = rest[0]
            _check_labels(logits, y)
            logits, y = logits.double(), y.to(logits.device, torch.int64)
            judged = y.clamp(0, logits.shape[1] - 1) == y
            known = y.where(judged, IGNORED)
            loss = F.cross_entropy(logits, known, reduction="sum", ignore_index=IGNORED)
            # Numbers are read at the end, as a GPU would have to wait for each.
            counts = (logits.argmax(1) == y, judged, known != y)
            parts.append((loss, *(count.count_nonzero() for count in counts)))
    sums = [functools.reduce(torch.add, each) for each in zip(*parts, strict=True)] or [0] * 4
    total, correct, n, wrong = map(float, sums)
    if wrong:
        raise ValueError(f"{wrong:.0f} labels are no class indices: they must be 0 to the number of classes less one")
    if not n:
        raise ValueError("no batches to evaluate on, or none with a label")
    return total / n, correct / n


def mean_score(model: nn.Module, batches: Iterable, score: Score) -> float:
    """Mean over examples of what a function says of a network's outputs, in evaluation mode; sums are float64.

    Args:
        model: any network. Untouched.
        batches: (x, ...), or x alone, on any device; floating x take the precision of the weights.
        score: (outputs, *the rest of the batch) to one number for each example, or for each of its positions: a
            squared error, one minus an overlap, nats a token. For `barrier`, less is better.

    Raises:
        ValueError: there are no batches, or the score is no tensor of one number or more for each example.

    >>> net = nn.Linear(2, 1)
    >>> x = torch.randn(8, 2)
    >>> mean_score(net, [(x, net(x))], lambda outputs, y: (outputs - y) ** 2)
    0.0
    """
    total, n = torch.tensor(0.0), 0
    with eval_mode(model):
        for batch in batches:
            outputs, rest = _outputs(model, batch)
            values = score(outputs, *(each.to(device_of(model)) if isinstance(each, Tensor) else each for each in rest))
            if not isinstance(values, Tensor) or values.ndim == 0:
                raise ValueError(
                    "score must give one number for each example, not their mean: reduction='none' does so"
                )
            total = total + values.double().sum()
            n += values.numel()
    if n == 0:
        raise ValueError("no batches to evaluate on")
    return float(total) / n


def _outputs(model: nn.Module, batch: Any) -> tuple[Any, tuple]:
    """What a network makes of a batch, and the rest of the batch."""
    x, rest = inputs_of(batch), batch[1:] if isinstance(batch, (tuple, list)) else ()
    return call(model, cast_input(x, model)), tuple(rest)


def _check_labels(logits: Any, y: Any) -> None:
    """Refuse outputs that are no logits, and labels that cannot be class indices of them."""
    other = "give a score of your own: mean_score(model, batches, score), or barrier(..., score=score)"
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        what = str(tuple(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"outputs must be logits (n, classes), not {what}; {other}")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        what = str(y.dtype) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"labels must be class indices (integers), not {what}; {other}")
    if y.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(f"labels {tuple(y.shape)} are no class indices of outputs {tuple(logits.shape)}, whose "
                         f"classes are on axis 1; {other}")  # fmt: skip


@overload
def evaluate_many(
    model: nn.Module, states: Iterable[State], batches: Iterable, *, score: None = None, progress: bool = True
) -> list[tuple[float, float]]: ...
@overload
def evaluate_many(
    model: nn.Module, states: Iterable[State], batches: Iterable, *, score: Score, progress: bool = True
) -> list[float]: ...
def evaluate_many(
    model: nn.Module,
    states: Iterable[State],
    batches: Iterable,
    *,
    score: Score | None = None,
    progress: bool = True,
) -> list[Any]:
    """Loss and accuracy, as `evaluate`, of one architecture under many state dicts; or a score, as `mean_score`.

    Args:
        model: the architecture, and the device and precision to compute on. Untouched.
        states: state dicts, for instance from a generator: one at a time is taken, copied and let go.
        batches: read once a state; a one-shot iterator is kept in memory.
        score: another measure, see `mean_score`.
        progress: show a bar if somebody is looking, see `repairlib.progress.is_interactive`.

    Raises:
        ValueError: there are no batches, or a state does not fit the model; see also `evaluate`.
    """
    batches = list(batches) if isinstance(batches, Iterator) else batches
    net = copy_model(model)  # takes up one state after the other
    results: list[Any] = []
    remaining = iter(states)
    with bar(len(states) if isinstance(states, Sized) else None, "networks", "net", progress) as networks:
        while (state := next(remaining, None)) is not None:  # a for loop would keep the state while the next is made
            names = ("the model", f"state {len(results)}")
            check_compatible(net.state_dict(), state, names=names, types=False)
            load_state(net, state)
            del state
            results.append(evaluate(net, batches) if score is None else mean_score(net, batches, score))
            networks.update()
    return results
