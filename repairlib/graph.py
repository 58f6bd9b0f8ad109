"""Trace a network, read any of its nodes, and derive its permutation groups from the graph.

A group is a set of hidden units that may be reordered without changing the function (Jordan et al. 2022, Sec. 2.2).
Every element of every activation carries the number of the unit it belongs to; reshaping an activation reshapes its
numbers, adding two activations identifies their numbers, and a layer's weight axis inherits the numbers of its input.
"""

import contextlib
import copy
import difflib
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

FIXED = 0  # the unit number of everything that may not move: network inputs and outputs


class UntraceableModel(ValueError):
    """The model's forward cannot be written as a graph; the message names the last node reached."""


class UnsupportedNode(ValueError):
    """A node of the graph has no permutation rule; the message names the node and the missing rule."""


class SpecError(ValueError):
    """The derived groups do not leave the network's function unchanged."""


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients, and give every submodule its own training flag back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


class Batches:
    """Inputs of any iterable of batches, re-iterable, on a model's device and in its floating type.

    Args:
        data: batches x or (x, y, ...); a one-shot iterator is kept in memory because statistics need several passes.
        model: whose device and precision the inputs take.
        limit: stop after so many examples; a loader that shuffles then gives other ones in each pass.

    Raises:
        TypeError: a batch is no tensor and does not begin with one.
    """

    def __init__(self, data: Iterable, model: nn.Module, limit: int | None = None):
        self.data = list(data) if isinstance(data, Iterator) else data
        self.limit = limit
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = like.device, like.dtype

    def __iter__(self) -> Iterator[Tensor]:
        left = self.limit
        for batch in self.data:
            if left == 0:
                return
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"a batch must be a tensor or begin with one, not {type(x).__name__}")
            if left is not None:
                x = x[:left]
                left -= len(x)
            yield x.to(self.device, self.dtype if x.is_floating_point() else None)

    def example(self) -> Tensor:
        """The first two inputs of the first batch.

        Raises:
            ValueError: the data is empty.
        """
        for x in self:
            if len(x):
                return x[:2]
        raise ValueError("the calibration data is empty: it has no batch to measure statistics on")


# --------------------------------------------------------------------------------------------------- traced networks


class ChannelAffine(nn.Module):
    """Visible correction of a node: ``y_c = weight_c x_c + bias_c`` for inputs (n, c, ...)."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)


class _Tracer(fx.Tracer):
    """Keeps corrections whole, so that a repaired network has the node names of the network it came from."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, ChannelAffine) or super().is_leaf_module(module, name)


_NO_INPUT = object()
_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.LeakyReLU,
    nn.ELU,
)
_KIND_OF_MODULE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.Conv1d, "conv"), (nn.Conv2d, "conv"), (nn.Conv3d, "conv"), (nn.Linear, "linear"),
    (nn.modules.batchnorm._BatchNorm, "batchnorm"), (ChannelAffine, "affine"), (_ACTIVATIONS, "activation"),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity), "identity"),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
      nn.AdaptiveMaxPool2d), "pool"),
    (nn.LayerNorm, "layernorm"), (nn.GroupNorm, "groupnorm"), (nn.Flatten, "reshape"),
    ((nn.Softmax, nn.LogSoftmax), "softmax"),
)  # fmt: skip
_KIND_OF_FUNCTION: dict[object, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.elu,
                     F.leaky_relu, torch.sigmoid, torch.tanh), "activation"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, operator.sub), "add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), "multiply"),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), "pool"),
    **dict.fromkeys((F.dropout, F.dropout2d), "identity"),
    **dict.fromkeys((torch.flatten, torch.reshape), "reshape"),
    **dict.fromkeys((torch.cat, torch.concat), "concat"),
    **dict.fromkeys((torch.permute, torch.transpose), "permute"),
    **dict.fromkeys((torch.chunk, torch.split), "split"),
    operator.getitem: "getitem",
    **dict.fromkeys((F.softmax, F.log_softmax, torch.softmax, torch.log_softmax), "softmax"),
    torch.mean: "mean",
}  # fmt: skip
_KIND_OF_METHOD = {
    **dict.fromkeys(("relu", "relu_", "sigmoid", "tanh"), "activation"),
    **dict.fromkeys(("add", "add_"), "add"),
    **dict.fromkeys(("mul", "mul_"), "multiply"),
    **dict.fromkeys(("flatten", "view", "reshape"), "reshape"),
    **dict.fromkeys(("permute", "transpose"), "permute"),
    **dict.fromkeys(("chunk", "split"), "split"),
    **dict.fromkeys(("contiguous", "clone", "detach"), "identity"),
    **dict.fromkeys(("softmax", "log_softmax"), "softmax"),
    "mean": "mean",
}


class TracedNet:
    """A model as a graph of named nodes that can be run, read and edited node by node.

    ``kinds[name]`` is the role of a node ("conv", "linear", "batchnorm", "activation", "add", "pool", ...; "" when it
    has none) and ``shapes[name]`` the shape of its value for the example, None when it is not a tensor. The weights
    are the model's own, not a copy.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, example: Tensor):
        self.model = model
        self.graph = graph
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.kinds = {node.name: self._kind(node) for node in self.nodes}
        self._by_name = {node.name: node for node in self.nodes}
        last_use = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                last_use[source] = node
        self._dead_after: dict[fx.Node, list[fx.Node]] = {}
        for source, user in last_use.items():
            self._dead_after.setdefault(user, []).append(source)
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        values, inputs = {}, iter((example,))
        with eval_mode(model):
            for node in self.nodes:
                values[node] = value = self.compute(node, values, inputs)
                self.shapes[node.name] = tuple(value.shape) if isinstance(value, Tensor) else None
                self.forget(node, values)

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.modules[node.target]
            return next((kind for types, kind in _KIND_OF_MODULE if isinstance(module, types)), "")
        if node.op == "call_function":
            if getattr(node.target, "__name__", "") == "stochastic_depth":  # torchvision's; does nothing in evaluation
                return "identity"
            return _KIND_OF_FUNCTION.get(node.target, "")
        return _KIND_OF_METHOD.get(node.target, "") if node.op == "call_method" else ""

    def compute(self, node: fx.Node, values: dict[fx.Node, object], inputs: Iterator | None = None) -> object:
        """Value of one node from the values of the nodes before it; `inputs` feeds the placeholders."""
        if node.op == "placeholder":
            value = next(inputs, *node.args, _NO_INPUT)
            if value is _NO_INPUT:
                raise UntraceableModel(f"forward needs a second input, {node.target!r}; wrap it to take one tensor")
            return value
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.model)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_module":
            return self.modules[node.target](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return args[0]  # output

    def forget(self, node: fx.Node, values: dict[fx.Node, object]) -> None:
        """Drop the values that nothing after `node` reads."""
        for dead in self._dead_after.get(node, ()):
            values.pop(dead, None)

    def walk(
        self, x: Tensor, taps: Collection[str], edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> Iterator[tuple[str, object]]:
        """Run on `x` and yield (name, value) at every tap in order of execution, stopping after the last of them.

        ``edits[name]`` replaces the value of a node before it is yielded and before later nodes read it. Values must
        be used before the walk goes on: an in-place operation further on may overwrite them. A node that carries a
        `ChannelAffine` is read after it: the value that the rest of the network sees.
        """
        edits = edits or {}
        self.check_names([*taps, *edits])
        wanted = {self.corrected(name): name for name in taps}
        values: dict[fx.Node, object] = {}
        inputs = iter((x,))
        for node in self.nodes:
            if not wanted:
                return
            values[node] = self.compute(node, values, inputs)
            self.forget(node, values)
            if node.name in edits:
                values[node] = edits[node.name](values[node])
            if node.name in wanted:
                yield wanted.pop(node.name), values[node]

    def corrected(self, name: str) -> str:
        """Name of the `ChannelAffine` that corrects a node, or the node's own name if it carries none."""
        users = list(self.node(name).users)
        return users[0].name if len(users) == 1 and self.kinds[users[0].name] == "affine" else name

    def check_names(self, names: Iterable[str]) -> None:
        """KeyError with the nearest names for a node that is not in the graph."""
        for name in names:
            if name not in self.kinds:
                near = difflib.get_close_matches(name, self.kinds, n=3) or sorted(self.kinds)[:8]
                raise KeyError(f"no node {name!r} in the graph; nearest: {', '.join(near)}")

    def run(self, x: Tensor, edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Output of the network, with the values of some nodes edited on the way."""
        ((_, output),) = self.walk(x, [self.nodes[-1].name], edits)
        return output

    def node(self, name: str) -> fx.Node:
        """The graph's node of that name."""
        self.check_names([name])
        return self._by_name[name]


def trace(model: nn.Module, example: Tensor) -> TracedNet:
    """Graph of a model, recorded in evaluation mode.

    Args:
        model: any module that torch.fx can trace; its weights are shared, not copied.
        example: one batch of inputs (n, ...), used for the shapes only.

    Raises:
        UntraceableModel: forward depends on the data; the message names the last node that was reached.

    >>> net = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3))
    >>> [name for name, kind in net.kinds.items() if kind]
    ['_0', '_1', '_2']
    """
    tracer = _Tracer()
    with eval_mode(model):
        try:
            graph = tracer.trace(model)
        except Exception as error:
            nodes = list(getattr(tracer, "graph", fx.Graph()).nodes)
            last = f"after node '{nodes[-1].name}' ({nodes[-1].target})" if nodes else "at its first line"
            raise UntraceableModel(
                f"{type(model).__name__}.forward cannot be traced {last}: {error}. Control flow that depends on the "
                "data is not a graph; move it out of forward or make it a leaf module."
            ) from error
    return TracedNet(model, graph, example)


# ------------------------------------------------------------------------------------------------ permutation groups


@dataclass(frozen=True)
class Axis:
    """Where a group's units live: ``positions[i]`` are the indices of unit i along one axis of one tensor."""

    tensor: str
    axis: int
    positions: Tensor  # (units, occurrences) int64


@dataclass(frozen=True)
class Group:
    """Hidden units that move together: their number, the weight axes that they index, and where to read them."""

    name: str
    size: int
    axes: tuple[Axis, ...]
    taps: dict[str, str] = field(default_factory=dict)  # "pre" and "post" activation node
    channels: dict[str, Tensor] = field(default_factory=dict)  # (units, channels of a unit) on axis 1 of the tap's node


@dataclass(frozen=True)
class PermutationSpec:
    """All permutation groups of a network; prints as a table."""

    groups: tuple[Group, ...]

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def __str__(self) -> str:
        rows = [("group", "size", "tap", "parameters [axis]")]
        for g in self.groups:
            axes = ", ".join(f"{a.tensor}[{a.axis}]" for a in g.axes)
            rows.append((g.name, str(g.size), g.taps.get("post", "-"), axes))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


class _Labels:
    """Unit numbers of every activation and weight axis while the graph is walked."""

    def __init__(self, net: TracedNet):
        self.net = net
        self.count = 1  # unit 0 is FIXED
        # Labels of one example (shape without the batch axis); of a split, a tuple of them.
        self.activations: dict[fx.Node, np.ndarray | tuple[np.ndarray, ...]] = {}
        self.axes: dict[tuple[str, int], np.ndarray] = {}
        self.same: list[tuple[np.ndarray, np.ndarray]] = []
        self.apart: list[tuple[np.ndarray, np.ndarray]] = []  # units and a number each: other number, other group
        self.aliases: dict[str, list[str]] = {}  # tied weights: one tensor, several names in the state dict
        by_tensor: dict[int, list[str]] = {}
        for name, tensor in net.model.state_dict(keep_vars=True).items():
            by_tensor.setdefault(id(tensor), []).append(name)
        for names in by_tensor.values():
            self.aliases |= dict.fromkeys(names, names)

    def fresh(self, n: int) -> np.ndarray:
        self.count += n
        return np.arange(self.count - n, self.count)

    def identify(self, a: np.ndarray, b: np.ndarray) -> None:
        self.same.append((np.ravel(a), np.ravel(b)))

    def mark(self, tensor: str, axis: int, units: np.ndarray) -> None:
        """Say that an axis of a parameter or buffer indexes `units`; a shared module says it more than once."""
        if tensor not in self.aliases:
            raise UnsupportedNode(
                f"{tensor!r} is no parameter but computed from others (weight norm, a parametrization, pruning); "
                "make it permanent first, with torch.nn.utils.parametrize or prune's remove function"
            )
        for name in self.aliases[tensor]:
            known = self.axes.setdefault((name, axis), units)
            if known is not units:
                self.identify(known, units)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.net.shapes[node.name][1:]

    def channels(self, node: fx.Node, labels: np.ndarray, axis: int = 0) -> np.ndarray:
        """Units along one axis of an activation, which must be the same everywhere else."""
        moved = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
        if (moved != moved[:, :1]).any():
            raise UnsupportedNode(f"node '{node.name}': its input's channels hold several units each; "
                                  "there is no permutation rule for this layout")  # fmt: skip
        return moved[:, 0]

    def spread(self, units: np.ndarray, shape: tuple[int, ...], axis: int = 0) -> np.ndarray:
        view = [1] * len(shape)
        view[axis] = -1
        return np.broadcast_to(units.reshape(view), shape)

    # ---- one rule per kind of node; each returns the labels of the node's value

    def conv(self, node, module, x):
        inputs = self.channels(node, x)
        if module.groups == 1:
            self.mark(f"{node.target}.weight", 1, inputs)
            return self.spread(self._produce(node, module), self.shape(node))
        # The weight's input axis is shared by all groups, so the channels of a group stay together and in order; a
        # group moves as one unit, its outputs with its inputs. A depthwise convolution has groups of one channel.
        blocks = inputs.reshape(module.groups, -1)
        first = np.broadcast_to(blocks[:, :1], blocks.shape)
        self.identify(first, blocks)
        units = np.repeat(blocks[:, 0], module.weight.shape[0] // module.groups)
        return self.spread(self._produce(node, module, units), self.shape(node))

    def linear(self, node, module, x):
        axis = x.ndim - 1
        self.mark(f"{node.target}.weight", 1, self.channels(node, x, axis))
        return self.spread(self._produce(node, module), self.shape(node), axis)

    def _produce(self, node, module, units=None):
        if units is None:
            known = self.axes.get((f"{node.target}.weight", 0))
            units = self.fresh(module.weight.shape[0]) if known is None else known
        self.mark(f"{node.target}.weight", 0, units)
        if module.bias is not None:
            self.mark(f"{node.target}.bias", 0, units)
        return units

    def batchnorm(self, node, module, x):
        units = self.channels(node, x)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                self.mark(f"{node.target}.{name}", 0, units)
        return x

    affine = batchnorm

    def layernorm(self, node, module, x):
        inner = range(x.ndim - len(module.normalized_shape), x.ndim)
        varies = [(x != np.take(x, [0], axis)).any() for axis in range(x.ndim)]
        if any(varies[axis] for axis in inner) and any(v for axis, v in enumerate(varies) if axis not in inner):
            raise UnsupportedNode(f"node '{node.name}': no permutation rule for a LayerNorm over part of the units")
        for name in ("weight", "bias"):
            if getattr(module, name) is not None:
                self._mark_broadcast(node, f"{node.target}.{name}", module.normalized_shape, x)
        return x

    def groupnorm(self, node, module, x):
        units = self.batchnorm(node, module, x)[(slice(None), *(0,) * (x.ndim - 1))]
        if module.num_groups > 1:  # statistics are shared within a group of channels: units stay in theirs
            self.apart.append((units, np.arange(len(units)) // (len(units) // module.num_groups)))
        return x

    def _mark_broadcast(self, node, tensor, shape, x):
        """A parameter that is broadcast against an activation: mark each of its axes along which units differ."""
        for axis, size in enumerate(shape):
            on = axis - len(shape)  # counted from the end, as broadcasting does
            if size > 1 and -on <= x.ndim and (x != np.take(x, [0], on)).any():
                self.mark(tensor, axis, self.channels(node, x, x.ndim + on))

    def activation(self, node, module, x):
        return x

    identity = softmax = activation  # a softmax permutes with its inputs, whatever axis it sums over

    def add(self, node, module, *xs):
        for source in node.all_input_nodes:
            if source.op == "get_attr":  # layer scale, position embedding
                self._mark_broadcast(node, source.target, self.net.shapes[source.name], xs[0])
        if len(xs) == 1:
            return xs[0]
        a, b = np.broadcast_arrays(*xs)
        self.identify(a, b)
        return a

    multiply = add

    def concat(self, node, module, *xs):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        axis = dim % len(self.net.shapes[node.name]) - 1
        if axis < 0:
            raise UnsupportedNode(f"node '{node.name}': no permutation rule for a concatenation along the batch axis")
        return np.concatenate([self.activations[source] for source in node.args[0]], axis)

    def split(self, node, module, x):
        cut = getattr(torch, getattr(node.target, "__name__", node.target))
        return tuple(part[0].numpy() for part in cut(torch.from_numpy(x.copy())[None], *node.args[1:], **node.kwargs))

    def getitem(self, node, module, parts):
        if not isinstance(parts, tuple):
            raise UnsupportedNode(f"node '{node.name}': no permutation rule for indexing an activation")
        return parts[node.args[1]]

    def permute(self, node, module, x):
        rank, dims = x.ndim + 1, node.args[1:]
        if dims and isinstance(dims[0], (tuple, list)):
            dims = dims[0]
        order = list(range(rank))
        if getattr(node.target, "__name__", node.target) == "transpose":
            a, b = (d % rank for d in dims)
            order[a], order[b] = b, a
        else:
            order = [d % rank for d in dims]
        if order[0] != 0:
            raise UnsupportedNode(f"node '{node.name}': no permutation rule for moving the batch axis")
        return np.transpose(x, [d - 1 for d in order[1:]])

    def pool(self, node, module, x):
        return self.spread(self.channels(node, x), self.shape(node))

    def mean(self, node, module, x):
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        rank = x.ndim + 1
        dims = sorted(d % rank for d in (dims if isinstance(dims, (tuple, list)) else [dims]) if d is not None)
        if not dims or dims[0] < 2:
            raise UnsupportedNode(f"node '{node.name}': no permutation rule for a mean over the batch or channel axis")
        return self.spread(self.channels(node, x), self.shape(node))

    def reshape(self, node, module, x):
        if self.net.shapes[node.name][0] != self.net.shapes[node.all_input_nodes[0].name][0]:
            raise UnsupportedNode(f"node '{node.name}': no permutation rule for a reshape that changes the batch axis")
        return np.reshape(x, self.shape(node))

    def visit(self, node: fx.Node) -> None:
        plain = self.net.shapes.get(node.name) is None and self.net.kinds[node.name] != "split"
        if node.op == "get_attr" or (plain and node.op != "output"):
            return  # parameters are marked where they are used; sizes and other plain numbers
        sources = [self.activations[n] for n in node.all_input_nodes if n in self.activations]
        if node.op == "placeholder":
            labels = np.full(self.shape(node), FIXED)
        elif node.op == "output":
            for x in sources:
                self.identify(x, np.full(x.shape, FIXED))
            return
        else:
            kind = self.net.kinds[node.name]
            module = self.net.modules[node.target] if node.op == "call_module" else None
            if not kind or not sources:
                what = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
                raise UnsupportedNode(f"node '{node.name}': no permutation rule for {what}")
            labels = getattr(self, kind)(node, module, *sources)
        self.activations[node] = labels

    def resolve(self) -> np.ndarray:
        """Representative of every unit number: the smallest number identified with it."""
        a, b = (np.concatenate([pair[i] for pair in self.same]) for i in (0, 1))
        edges = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(self.count, self.count))
        _, component = connected_components(edges, directed=False)
        smallest = np.full(component.max() + 1, self.count)
        np.minimum.at(smallest, component, np.arange(self.count))
        return smallest[component]


def permutation_spec(model: nn.Module, example: Tensor, verify: bool = True) -> PermutationSpec:
    """Permutation groups of any traced model, derived from its graph and verified in float64.

    Args:
        model: the network. Untouched.
        example: inputs (n, ...) of a small batch.
        verify: permute every group at random in a float64 copy with random weights and compare outputs.

    Raises:
        UntraceableModel, UnsupportedNode: with the node's name.
        SpecError: the check failed, so the graph rules do not fit this model.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> print(permutation_spec(net, torch.randn(2, 3)))
    group  size  tap  parameters [axis]
    0      4     _1   0.weight[0], 0.bias[0], 2.weight[1]
    """
    net = trace(model, example)
    labels = _Labels(net)
    for node in net.nodes:
        labels.visit(node)
    root = labels.resolve()
    axes = {key: root[units] for key, units in labels.axes.items()}
    spec = PermutationSpec(tuple(_groups(net, labels, root, axes)))
    if verify:
        error = invariance_error(model, spec, example)
        if not error < 1e-8:
            raise SpecError(
                f"permuting the groups of {type(model).__name__} changes its output by {error:.1e}"
            )
    return spec


def _groups(net, labels, root, axes) -> Iterator[Group]:
    # Two units are interchangeable when they occur equally often on the same axes. The sum of random 64-bit keys, one
    # an axis, tells these sets of axes apart without a units x axes table.
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 2**62, size=len(axes), dtype=np.int64)
    signature = np.zeros(labels.count, dtype=np.int64)
    for key, units in zip(keys, axes.values(), strict=True):
        signature += key * np.bincount(units, minlength=labels.count)
    for units, number in labels.apart:
        np.add.at(signature, root[units], rng.integers(1, 2**62, size=number.max() + 1, dtype=np.int64)[number])
    movable = np.unique(root)
    movable = movable[(movable != root[FIXED]) & (signature[movable] != 0)]
    seen, first = np.unique(signature[movable], return_index=True)
    seen_names: dict[str, int] = {}
    for sig in seen[np.argsort(first)]:
        units = movable[signature[movable] == sig]
        index = np.full(labels.count, -1)
        index[units] = np.arange(len(units))
        found = []
        for (tensor, axis), on_axis in axes.items():
            positions = np.flatnonzero(index[on_axis] >= 0)
            if len(positions):
                order = np.argsort(index[on_axis[positions]], kind="stable")
                positions = positions[order].reshape(len(units), -1)
                found.append(Axis(tensor, axis, torch.from_numpy(positions)))
        name = found[0].tensor.rpartition(".")[0]
        seen_names[name] = seen_names.get(name, 0) + 1
        name += f":{seen_names[name]}" if seen_names[name] > 1 else ""  # a layer whose units fall into several groups
        yield Group(name, len(units), tuple(found), *_taps(net, labels, root, units))


def _taps(net, labels, root, units) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The group's last node before and after its non-linearity: of a residual stream, the end of the last block.

    And where its units lie on axis 1 there (units, channels of a unit): one channel each, or the channels of a block.
    """
    taps, channels = {}, {}
    for node, label in labels.activations.items():
        kind = net.kinds[node.name]
        if kind not in ("conv", "linear", "batchnorm", "groupnorm", "add", "multiply", "activation", "permute"):
            continue
        on_axis = root[np.moveaxis(label, 0, -1).reshape(-1, label.shape[0])[0]]
        positions = np.flatnonzero(np.isin(on_axis, units))
        positions = positions[np.argsort(on_axis[positions], kind="stable")]
        each = len(positions) // len(units)
        if each and np.array_equal(on_axis[positions], np.repeat(units, each)):
            for tap in ("post",) if kind == "activation" else ("pre", "post"):
                taps[tap] = node.name
                channels[tap] = torch.from_numpy(positions.reshape(len(units), each))
    return taps, channels


# ------------------------------------------------------------------------------------------------------ permutations

# group name -> int64 indices (units,): unit i of the permuted network is unit perm[i] of the original
Permutation = dict[str, Tensor]


def permute_state(state: Mapping[str, Tensor], spec: PermutationSpec, permutation: Permutation) -> dict[str, Tensor]:
    """State dict of the permuted network: W -> P W on outgoing, W P^-1 on incoming axes (Jordan et al. 2022, Sec. 2.2).

    Args:
        state: the network's state dict. Untouched.
        spec: its groups.
        permutation: for some or all groups, int64 indices (units,): unit i of the result is unit ``perm[i]`` here.

    Raises:
        ValueError: an entry is no permutation of the group's units.
    """
    out = dict(state)
    for name, perm in permutation.items():
        group = spec[name]
        if sorted(perm.tolist()) != list(range(group.size)):
            raise ValueError(f"group {name!r}: not a permutation of its {group.size} units")
        for axis in group.axes:
            old = out[axis.tensor]
            source = axis.positions[perm.cpu()].flatten().to(old.device)
            target = axis.positions.flatten().to(old.device)
            out[axis.tensor] = old.index_copy(axis.axis, target, old.index_select(axis.axis, source))
    return out


def permute(model: nn.Module, spec: PermutationSpec, permutation: Permutation) -> nn.Module:
    """Permuted copy of a model; it computes the same function."""
    out = copy.deepcopy(model)
    out.load_state_dict(permute_state(model.state_dict(), spec, permutation))
    return out


def random_permutation(spec: PermutationSpec, seed: int = 0) -> Permutation:
    """Independent uniform permutation of every group; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.size, generator=generator) for group in spec.groups}


def invert(permutation: Permutation) -> Permutation:
    """Inverse: permuting by the result undoes permuting by the argument."""
    return {name: torch.argsort(perm) for name, perm in permutation.items()}


def compose(first: Permutation, then: Permutation) -> Permutation:
    """One permutation that does `first`, then `then`."""
    return {name: first[name][then[name]] for name in first}


def invariance_error(model: nn.Module, spec: PermutationSpec, example: Tensor, seed: int = 0) -> float:
    """Largest relative change of the output, in float64, when every group is permuted at random.

    ``max |f(P theta) - f(theta)| / max |f(theta)|`` for a copy with random weights and normalisation statistics, so
    that a forgotten axis cannot hide behind ones and zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(model).cpu().double()
    with torch.no_grad():
        for tensor in probe.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                if tensor.ndim < 2:  # biases, scales, statistics: positive, of order one
                    tensor.copy_(0.5 + noise)
                else:
                    tensor.copy_((2 * noise - 1) * math.sqrt(6 / tensor[0].numel()))
    permuted = permute(probe, spec, random_permutation(spec, seed + 1))
    x = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    with eval_mode(probe, permuted):
        outputs = [[y for y in tree_leaves(net(x)) if isinstance(y, Tensor)] for net in (probe, permuted)]
    before, after = (torch.cat([y.double().flatten() for y in ys]) for ys in outputs)
    scale = before.abs().max()
    return float((after - before).abs().max() / scale) if scale > 0 and scale.isfinite() else math.inf
