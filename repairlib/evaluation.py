"""Loss and accuracy of one network, or of many of one architecture together."""

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sized

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from repairlib.interpolate import State, check_compatible
from repairlib.progress import bar
from repairlib.tracing import eval_mode

# Elements of a stack's largest activation on a CPU (2 MB in float32): beyond, it leaves the cache, and networks run
# faster one by one. A stack of less than 4 does not pay. Measured by benchmarks/stacked.py.
CPU_STACK = 500_000


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the mean cross entropy (nats) and the accuracy (0 to 1) over batches (x [b, ...], y int64 [b]).

    In evaluation mode, which is undone afterwards; sums are float64.

    Raises:
        ValueError: there are no batches.
    """
    like = next(model.parameters(), torch.zeros(()))  # inputs go to the device and precision of the weights
    total, correct, n = 0.0, 0, 0
    with eval_mode(model):
        for x, y in batches:
            logits, y = model(x.to(like)).double(), y.to(like.device)
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
    chunk: int | None = None,
    stacked: bool | None = None,
    memory: float = 2e9,
    progress: bool = True,
) -> list[tuple[float, float]]:
    """(mean cross entropy in nats, accuracy in [0, 1]) of one architecture under many state dicts, as `evaluate`.

    Stacked, the networks of a chunk run as one (`torch.vmap`); else one after the other.

    Args:
        model: the architecture, and the device and precision to compute on. Untouched.
        states: state dicts, for instance from a generator: one at a time is taken, copied and let go, and no more than
            a chunk of copies is alive.
        batches: (x [b, ...], y int64 [b]), read once a chunk; a one-shot iterator is kept in memory.
        chunk: networks in a stack; default: as many as `memory` holds, at least 1 and at most 64; on a CPU, as the
            largest activation, for the first batch, goes into `CPU_STACK` elements.
        stacked: default: on a GPU if the default chunk is 2 or more, on a CPU if it is 4 or more; and one after the
            other if vmap cannot run the model (True raises then).
        memory: bytes that the weights and four of the largest activations of a stack may take, if chunk is None. One
            network is evaluated however large it is.
        progress: show a bar if somebody is looking, see `progress.watched`.

    Raises:
        ValueError: there are no batches, or a state does not fit the model.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a number of networks, at least 1, not {chunk}")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    net = copy.deepcopy(model)  # takes up one state after the other
    own = net.state_dict()
    count = len(states) if isinstance(states, Sized) else None
    floats = [value for value in own.values() if value.is_floating_point()] or [torch.zeros(())]
    largest = _largest_activation(net, batches)
    size = sum(value.numel() * value.element_size() for value in own.values()) + 4 * floats[0].element_size() * largest
    fits = min(64, int(memory / size), 64 if floats[0].is_cuda else CPU_STACK // largest)
    forced, stacked = stacked, fits >= (2 if floats[0].is_cuda else 4) if stacked is None else stacked
    chunk = chunk or max(1, fits if count is None else min(fits, count))
    results: list[tuple[float, float]] = []
    left = iter(states)
    with bar(count, "networks", "net", progress) as networks:
        while group := _stack(own, left, chunk if stacked else 1, len(results)):
            number = len(next(iter(group.values())))
            if stacked:
                try:
                    results += _evaluate_stack(net, group, batches)
                except Exception:  # whatever is wrong with more than vmap is raised again one by one
                    if forced:
                        raise
                    stacked = False
            if not stacked:
                for i in range(number):
                    net.load_state_dict({name: values[i] for name, values in group.items()})
                    results.append(evaluate(net, batches))
            networks.update(number)
            del group  # before the next one is made
    return results


def _stack(own: State, states: Iterator[State], chunk: int, before: int) -> dict[str, Tensor]:
    """The next states, at most `chunk`, one above the other; nothing if there are none."""
    out: dict[str, Tensor] = {}
    n = 0
    for state in itertools.islice(states, chunk):  # not enumerated: enumerate keeps what it gave
        check_compatible(own, state, names=("the model", f"state {before + n}"), types=False)
        out = out or {name: value.new_empty((chunk, *value.shape)) for name, value in own.items()}
        for name, values in out.items():
            values[n].copy_(state[name])
        n += 1
        del state  # before the next one is made
    return {name: values[:n] for name, values in out.items()}


def _evaluate_stack(net: nn.Module, group: State, batches: Iterable) -> list[tuple[float, float]]:
    like = next(net.parameters(), torch.zeros(()))
    n, total, correct = 0, 0.0, 0
    # A module with two names is given its tensors once; functional_call would else leave the first stack in it.
    held = (
        kind(path, recurse=False) for path, m in net.named_modules() for kind in (m.named_parameters, m.named_buffers)
    )
    group = {name: group[name] for pairs in held for name, _ in pairs if name in group}
    run = torch.vmap(lambda state, x: functional_call(net, state, (x,), tie_weights=False), in_dims=(0, None))
    with eval_mode(net), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")  # pooling after LayerNorm: slower, but small
        for x, y in batches:
            logits = run(group, x.to(like)).double()  # (networks, b, classes)
            labels = y.to(like.device).expand(len(logits), -1)
            total = total + F.cross_entropy(logits.mT, labels, reduction="none").sum(1)
            correct = correct + (logits.argmax(2) == labels).sum(1)
            n += len(y)
    return [(float(t) / n, int(c) / n) for t, c in zip(total, correct, strict=True)]


def _largest_activation(net: nn.Module, batches: Iterable) -> int:
    """Elements of the largest input or output of a submodule for a batch as large as the first."""
    x, _ = next(iter(batches), (torch.empty(0), None))
    if not len(x):
        raise ValueError("no batches to evaluate on")
    sizes = [x[:1].numel()]
    handles = [
        module.register_forward_hook(lambda _m, _x, y: sizes.append(y.numel() if isinstance(y, Tensor) else 0))
        for module in net.modules()
    ]
    with eval_mode(net):
        net(x[:1].to(next(net.parameters(), torch.zeros(()))))
    for handle in handles:
        handle.remove()
    return max(sizes) * len(x)
