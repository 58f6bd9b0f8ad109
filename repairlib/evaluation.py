"""Loss and accuracy of one network, or of one architecture under many state dicts."""

import copy
from collections.abc import Iterable, Iterator, Sized

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repairlib.interpolate import State, check_compatible
from repairlib.progress import bar
from repairlib.tracing import cast_input, eval_mode


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross entropy (nats) and accuracy (in [0, 1]), in evaluation mode; sums are float64.

    Args:
        model: a classifier. Untouched.
        batches: (x [b, ...], y int64 [b]), on any device; floating x take the precision of the weights.

    Raises:
        ValueError: there are no batches.
    """
    total, correct, n = torch.tensor(0.0), torch.tensor(0), 0
    with eval_mode(model):
        for x, y in batches:
            logits = model(cast_input(x, model)).double()
            y = y.to(logits.device)
            total = total + F.cross_entropy(logits, y, reduction="sum")
            correct = correct + (logits.argmax(1) == y).sum()
            n += len(y)
    if n == 0:
        raise ValueError("no batches to evaluate on")
    return float(total) / n, int(correct) / n


def evaluate_many(
    model: nn.Module,
    states: Iterable[State],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    progress: bool = True,
) -> list[tuple[float, float]]:
    """Loss and accuracy, as `evaluate`, of one architecture under many state dicts.

    Args:
        model: the architecture, and the device and precision to compute on. Untouched.
        states: state dicts, for instance from a generator: one at a time is taken, copied and let go.
        batches: (x [b, ...], y int64 [b]), read once a state; a one-shot iterator is kept in memory.
        progress: show a bar if somebody is looking, see `repairlib.progress.is_interactive`.

    Raises:
        ValueError: there are no batches, or a state does not fit the model.
    """
    batches = list(batches) if isinstance(batches, Iterator) else batches
    net = copy.deepcopy(model)  # takes up one state after the other
    results: list[tuple[float, float]] = []
    remaining = iter(states)
    with bar(len(states) if isinstance(states, Sized) else None, "networks", "net", progress) as networks:
        while (state := next(remaining, None)) is not None:  # a for loop would keep the state while the next is made
            names = ("the model", f"state {len(results)}")
            check_compatible(net.state_dict(), state, names=names, types=False)
            net.load_state_dict(state)
            del state
            results.append(evaluate(net, batches))
            networks.update()
    return results
