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
from repairlib.tracing import cast_input, eval_mode

# Elements of a stack's largest activation on a CPU (2 MB in float32): beyond, it leaves the cache, and networks run
# faster one by one. A stack of less than 4 does not pay. Measured by benchmarks/stacked.py.
CPU_STACK = 500_000
STACK_BYTES = 2e9  # bytes that the weights and four of the largest activations of a stack may take


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
    stack: int | None = None,
    progress: bool = True,
) -> list[tuple[float, float]]:
    """Loss and accuracy, as `evaluate`, of one architecture under many state dicts.

    Args:
        model: the architecture, and the device and precision to compute on. Untouched.
        states: state dicts, for instance from a generator: one at a time is taken, copied and let go.
        batches: (x [b, ...], y int64 [b]), read once a stack; a one-shot iterator is kept in memory.
        stack: how many networks run as one (`torch.vmap`); 1 evaluates one after the other. Default: what is fastest
            for the size of the largest activation, and fits the memory.
        progress: show a bar if somebody is looking, see `repairlib.progress.is_interactive`.

    Raises:
        ValueError: there are no batches, or a state does not fit the model.
        RuntimeError: vmap cannot run the model, and `stack` is given; by default networks then run one by one.
    """
    if stack is not None and stack < 1:
        raise ValueError(f"stack is a number of networks, at least 1, not {stack}")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    net = copy.deepcopy(model)  # takes up one state after the other
    own = net.state_dict()
    count = len(states) if isinstance(states, Sized) else None
    fitting = _default_stack(net, batches)
    together = (stack or fitting) > 1
    size = stack or (fitting if count is None else max(1, min(fitting, count)))
    results: list[tuple[float, float]] = []
    remaining = iter(states)
    with bar(count, "networks", "net", progress) as networks:
        while group := _stack(own, remaining, size if together else 1, len(results)):
            number = len(next(iter(group.values())))
            if together:
                try:
                    results += _evaluate_stack(net, group, batches)
                except RuntimeError:  # whatever is wrong with more than vmap is raised again one by one
                    if stack:
                        raise
                    together = False
            if not together:
                for i in range(number):
                    net.load_state_dict({name: values[i] for name, values in group.items()})
                    results.append(evaluate(net, batches))
            networks.update(number)
            del group  # before the next one is made
    return results


def _default_stack(net: nn.Module, batches: Iterable) -> int:
    """Networks that run as one: as many as the memory, or a CPU's cache, holds; 1 where that does not pay."""
    largest = _largest_activation(net, batches)
    tensors = list(net.state_dict().values())
    like = next((value for value in tensors if value.is_floating_point()), torch.zeros(()))
    size = sum(value.numel() * value.element_size() for value in tensors) + 4 * like.element_size() * largest
    fits = min(64, int(STACK_BYTES / size), 64 if like.is_cuda else CPU_STACK // largest)
    return fits if fits >= (2 if like.is_cuda else 4) else 1


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
        net(cast_input(x[:1], net))
    for handle in handles:
        handle.remove()
    return max(sizes) * len(x)


def _stack(own: State, states: Iterator[State], size: int, before: int) -> dict[str, Tensor]:
    """The next states, at most `size`, one above the other; nothing if there are none."""
    out: dict[str, Tensor] = {}
    n = 0
    for state in itertools.islice(states, size):  # not enumerated: enumerate keeps what it gave
        check_compatible(own, state, names=("the model", f"state {before + n}"), types=False)
        out = out or {name: value.new_empty((size, *value.shape)) for name, value in own.items()}
        for name, values in out.items():
            values[n].copy_(state[name])
        n += 1
        del state  # before the next one is made
    return {name: values[:n] for name, values in out.items()}


def _evaluate_stack(net: nn.Module, group: State, batches: Iterable) -> list[tuple[float, float]]:
    total, correct, n = torch.tensor(0.0), torch.tensor(0), 0
    # A module with two names is given its tensors once; functional_call would else leave the first stack in it.
    held = (
        kind(path, recurse=False) for path, m in net.named_modules() for kind in (m.named_parameters, m.named_buffers)
    )
    group = {name: group[name] for pairs in held for name, _ in pairs if name in group}
    run = torch.vmap(lambda state, x: functional_call(net, state, (x,), tie_weights=False), in_dims=(0, None))
    with eval_mode(net), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")  # pooling after LayerNorm: slower, but small
        for x, y in batches:
            logits = run(group, cast_input(x, net)).double()  # (networks, b, classes)
            labels = y.to(logits.device).expand(len(logits), -1)
            total = total + F.cross_entropy(logits.mT, labels, reduction="none").sum(1)
            correct = correct + (logits.argmax(2) == labels).sum(1)
            n += len(y)
    return [(float(t) / n, int(c) / n) for t, c in zip(total, correct, strict=True)]
