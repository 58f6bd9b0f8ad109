"""Batches of inputs, of whatever kind a network takes."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

# What a network is called with: one tensor (n, ...), several in a tuple or list, or several by name.
Inputs = Any

_WAYS = (
    "of a dictionary, pass [(batch['image'], batch['label']) for batch in loader] with your own names; of an array, "
    "torch.as_tensor(array)"
)


class _Kept:
    """Batches of an iterator, kept as they are read: the same in every pass, and no more of them than are read."""

    def __init__(self, batches: Iterable):
        self.rest = iter(batches)
        self.kept: list[Any] = []

    def __iter__(self) -> Iterator:
        for place in itertools.count():
            if place == len(self.kept):
                try:
                    self.kept.append(next(self.rest))
                except StopIteration:
                    return
            yield self.kept[place]


def as_batches(data: Iterable) -> Iterable:
    """Batches that are the same in every pass.

    A tensor is one batch. Batches of an iterator are kept in memory, and so are those of a DataLoader that shuffles:
    otherwise endpoints and the network between them would be measured on different examples.

    Raises:
        TypeError: the data is no iterable of batches, for instance a Dataset or a single (x, y). The message says what
            to pass instead.
    """
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, (Mapping, np.ndarray, str)):
        raise TypeError(f"batches are an iterable of tensors x or pairs (x, y), not {type(data).__name__}: {_WAYS}")
    if isinstance(data, (tuple, list)) and _could_be_one_batch(data):
        raise TypeError("two tensors could be one batch (x, y): pass [(x, y)], or a list of batches")
    if isinstance(data, Dataset):
        raise TypeError(f"{type(data).__name__} is a Dataset of single examples: pass a DataLoader of it")
    if isinstance(data, DataLoader):
        plain = type(data.batch_sampler) is BatchSampler
        order = data.batch_sampler.sampler if plain else data.sampler if data.batch_sampler is None else None
        return data if isinstance(order, SequentialSampler) else _Kept(data)
    return _Kept(data) if isinstance(data, Iterator) else data


def _could_be_one_batch(data: tuple | list) -> bool:
    """Whether tensors look like (x, y), not like the parts that `x.split(100)` gives."""
    if len(data) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in data):
        return False
    if isinstance(data, list):  # of batches, unless the second is of another kind
        kinds = {(part.dtype, part.shape[1:]) for part in data}
        return len(data) == len(kinds) == 2 and len(data[0]) == len(data[1])
    apart = len({part.untyped_storage().data_ptr() for part in data}) > 1
    return apart and len({len(part) for part in data}) == 1


def inputs_of(batch: Any) -> Inputs:
    """Inputs x of a batch x or (x, y, ...); TypeError if they have no tensor, or if the batch is a dictionary."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    args, named = arguments(x)
    if batch is x and named or not any(isinstance(part, Tensor) for part in (*args, *named.values())):
        raise TypeError(f"a batch must be a tensor or begin with one, not {type(x).__name__}: {_WAYS}")
    return x


def map_inputs(function: Callable[[Tensor], Tensor], x: Inputs) -> Inputs:
    """The same inputs with a function applied to each tensor."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {name: map_inputs(function, part) for name, part in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple(map_inputs(function, part) for part in x)
    return x


def arguments(x: Inputs) -> tuple[tuple, dict[str, Any]]:
    """Positional and named arguments that a network is called with."""
    return ((), dict(x)) if isinstance(x, Mapping) else (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def call(model: Callable, x: Inputs) -> Any:
    """What a network makes of inputs."""
    args, named = arguments(x)
    return model(*args, **named)


def count(x: Inputs) -> int:
    """Number of examples: length of the first tensor."""
    args, named = arguments(x)
    return len(next(part for part in (*args, *named.values()) if isinstance(part, Tensor)))


def examples(x: Inputs, start: int, stop: int | None, n: int | None = None) -> Inputs:
    """Some of the n examples; a tensor of another length than the first, such as a graph, belongs to all of them."""
    n = count(x) if n is None else n
    return map_inputs(lambda part: part[start:stop] if part.ndim and len(part) == n else part, x)


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's weights."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def cast_input(x: Inputs, model: nn.Module) -> Inputs:
    """Inputs on a model's device; floating ones in its precision, integers (tokens) as they are."""
    like: Tensor | None = next((p for p in model.parameters() if p.is_floating_point()), None)
    like = torch.zeros(()) if like is None else like
    return map_inputs(lambda part: part.to(like.device, like.dtype if part.is_floating_point() else None), x)


def check_limit(limit: int | None) -> None:
    """Refuse what is no number of examples."""
    if limit is not None and (not isinstance(limit, Integral) or limit < 1):
        raise ValueError(f"limit is a number of examples, 1 or more, or None for all, not {limit!r}")


class Limited:
    """The first examples of some batches; an endless loader ends here.

    Args:
        batches: re-iterable batches.
        limit: number of examples; None for all.
    """

    def __init__(self, batches: Iterable, limit: int | None = None):
        check_limit(limit)
        self.batches, self.limit = batches, limit

    def __iter__(self) -> Iterator:
        left = self.limit
        for batch in self.batches:
            if left == 0:
                return
            n = count(inputs_of(batch))
            if left is not None and n > left:
                whole = not isinstance(batch, (tuple, list))
                parts = tuple(examples(part, 0, left, n) for part in ([batch] if whole else batch))
                batch, n = parts[0] if whole else parts, left
            yield batch
            left = None if left is None else left - n


class Batches:
    """Inputs of any iterable of batches, re-iterable, on a model's device and in its precision.

    Args:
        data: batches x or (x, y, ...), see `as_batches`; x is a tensor, or several in a tuple or by name, as the model
            is called. Empty batches are skipped.
        model: network that will read them.
        limit: number of examples to stop after, the first ones.

    Raises:
        TypeError: a batch has no tensor of inputs, or is a dictionary.
    """

    def __init__(self, data: Iterable, model: nn.Module, limit: int | None = None):
        check_limit(limit)
        self.data = as_batches(data)
        self.model = model
        self.limit = limit

    def __iter__(self) -> Iterator[Inputs]:
        for batch in Limited(self.data, self.limit):
            x = inputs_of(batch)
            if count(x):
                yield cast_input(x, self.model)

    def example(self) -> Inputs:
        """First two inputs of the first batch; ValueError if there is none."""
        for x in self:
            return examples(x, 0, 2)
        raise ValueError("the calibration data is empty: it has no batch to measure statistics on")
