"""The training step, on pretended devices: "meta" tensors have a shape and no numbers, so that nothing can be read."""

import contextlib
import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion.runs.data import iterate, load
from companion.runs.models import build
from companion.runs.recipes import Recipe
from companion.runs.steps import GraphStep, Step
from companion.runs.train import fit

aten = torch.ops.aten


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def tensors(*trees):
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


class Waits(TorchDispatchMode):
    """Count where the processor would wait for a device: at copies to it and from it, and at numbers that are read."""

    number = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = {x.device.type for x in tensors(args, kwargs) if x.ndim}
        there = torch.device(kwargs.get("device") or "cpu").type
        copied = op is aten._to_copy.default and "device" in kwargs and {there} != {args[0].device.type}
        read = op is aten._local_scalar_dense.default and args[0].is_meta
        self.number += copied or read or here >= {"cpu", "meta"}
        if read or copied and there == "cpu":  # what is read is finite, not zero and true
            return True if read else torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return op(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch, digits):
    """Waits of the training of a network for so many steps on a device that is only pretended."""

    def count(steps, augment=(), callback=None):
        data = replace(digits, train=digits.train.take(torch.arange(20 * steps))).to("meta")
        recipe = Recipe("test", 1, 20, 0.1, "linear", augment=augment)
        with Waits() as counted, monkeypatch.context() as patched:
            patched.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no "meta"

            def counting(make, *args, device=None, **kwargs):  # copies numbers where no dispatch sees it
                counted.number += torch.device(device or "cpu").type == "meta"
                return make(*args, device=device, **kwargs)

            for name in ("tensor", "as_tensor"):
                patched.setattr(torch, name, partial(counting, getattr(torch, name)))
            losses = fit(build("mlp2-bn-w4", digits.shape), data, recipe, callback=callback)
        assert len(losses) == steps
        return counted.number

    return count


@pytest.mark.parametrize("augment", [(), ("translate", "flip", "cutout"), ("resize", "rotate"), ("resized-crop",)])
def test_no_step_of_training_waits_for_the_device(waits, augment):
    assert waits(20, augment) == waits(2, augment) > 0


def test_a_step_that_waits_is_counted(waits):
    def read(step, model, loss):
        return float(loss) < 0

    assert waits(20, callback=read) - waits(20) == 20


class Tape(TorchDispatchMode):
    """A CUDA graph in pretence: operations are noted with their tensors, not done, and done again at each replay."""

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in (x.untyped_storage() for x in tensors(args, kwargs)):
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = op(*args, **kwargs)
        self.operations.append((op, args, kwargs, out))
        return out

    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.inference_mode()
    def replay(self):
        for op, args, kwargs, out in self.operations:
            for kept, made in zip(tensors(out), tensors(op(*args, **kwargs)), strict=True):
                if kept.untyped_storage().data_ptr() != made.untyped_storage().data_ptr():
                    kept.copy_(made)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on the CPU; the list gets what they are, and an error in it is raised at the end of a recording."""
    errors, recorded = [], []

    @contextlib.contextmanager
    def record(graph, stream):
        recorded.append(graph)
        with graph:
            yield
        graph.undo()
        if errors:
            raise errors.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return recorded, errors


def train(kind, digits, half, steps=9):
    """Losses of a step's calls with ever other batches and learning rates, and the network after them."""
    torch.manual_seed(0)
    net = build("resnet8-bn-w0.25", digits.shape).train()
    step = kind(net, Recipe("test", 1, 50, 0.1, "linear", weight_decay=1e-3, label_smoothing=0.1), half)
    batches = iterate(digits, "train", 50, ("translate",), torch.Generator().manual_seed(0))
    losses = [step(x, y, 0.2 / (i + 1)) for i, (x, y) in zip(range(steps), batches, strict=False)]
    assert not any(loss.requires_grad for loss in losses)
    return torch.stack(losses), net


@pytest.mark.parametrize("half", [False, True])
def test_a_graph_replays_the_step_on_other_batches_and_learning_rates(graphs, digits, half):
    recorded, _ = graphs
    (direct, net), (replayed, same) = (train(kind, digits, half) for kind in (Step, GraphStep))
    assert len(recorded) == 1 and len(recorded[0].operations) > 100
    assert torch.allclose(direct, replayed, atol=0.05 if half else 1e-5) and len(direct.unique()) == 9
    for (name, value), other in zip(net.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.allclose(value, other, atol=0.05 if half else 1e-5), name


def test_a_step_that_cannot_be_recorded_is_taken_operation_by_operation(graphs, digits):
    _, errors = graphs
    errors.append(RuntimeError("operation not permitted when stream is capturing"))
    with pytest.warns(UserWarning, match="no CUDA graph, which may be slower: operation not permitted"):
        failed, net = train(GraphStep, digits, half=False)
    direct, same = train(Step, digits, half=False)
    assert torch.allclose(direct, failed, atol=1e-5)
    assert torch.allclose(net.head.weight, same.head.weight, atol=1e-5)


def test_a_cpu_has_no_graphs(digits, monkeypatch):
    states = []
    for setting in ("0", "1"):
        monkeypatch.setenv("REPAIRLIB_GRAPH", setting)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
        fit(net, digits, Recipe("test", 1, 500, 0.1, "linear"))
        states.append(copy.deepcopy(net.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
