"""Trace a network, read any of its nodes, and derive its permutation groups from the graph.

A group is a set of hidden units that may be reordered without changing the function (Jordan et al. 2022, Sec. 2.2).
Every element of every activation carries the number of the unit it belongs to; reshaping an activation reshapes its
numbers, adding two activations identifies their numbers, and a layer's weight axis inherits the numbers of its input.
"""

import contextlib
import copy
import difflib
import functools
import math
import operator
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

# Unit numbers of what has no unit: constants, equal for all units (padding with zeros makes them), and of what may not
# move, network inputs and outputs.
FREE, FIXED = 0, 1


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
_LAYERS = nn.modules
_KIND_OF_MODULE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"), (_LAYERS.conv._ConvTransposeNd, "conv-transpose"),
    (nn.Linear, "linear"), (nn.Embedding, "embedding"), (nn.MultiheadAttention, "attention"),
    (_LAYERS.batchnorm._BatchNorm, "batchnorm"), (_LAYERS.instancenorm._InstanceNorm, "instancenorm"),
    ((nn.LayerNorm, nn.RMSNorm), "layernorm"), (nn.GroupNorm, "groupnorm"), (ChannelAffine, "affine"),
    ((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
      nn.LogSigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softplus, nn.Softsign,
      nn.Softshrink, nn.Tanhshrink, nn.Threshold), "activation"),
    ((_LAYERS.dropout._DropoutNd, nn.Identity), "identity"),
    ((_LAYERS.pooling._MaxPoolNd, _LAYERS.pooling._AvgPoolNd, _LAYERS.pooling._LPPoolNd,
      _LAYERS.pooling._AdaptiveAvgPoolNd, _LAYERS.pooling._AdaptiveMaxPoolNd), "pool"), (nn.Upsample, "resize"),
    ((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), "reshape"),
    ((nn.Softmax, nn.LogSoftmax), "softmax"), (_LAYERS.padding._ConstantPadNd, "pad"),
)  # fmt: skip
_POINTWISE = (
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu elu elu_ selu selu_ celu celu_ gelu silu mish sigmoid sigmoid_ "
    "logsigmoid log_sigmoid tanh tanh_ hardswish hardsigmoid hardtanh hardtanh_ hardshrink softplus softsign "
    "softshrink tanhshrink threshold abs neg negative exp expm1 log log1p sqrt rsqrt square reciprocal sin cos erf "
    "clamp clamp_ clamp_min clamp_max clip sign nan_to_num pow pos"
)
# Names of functions in torch, torch.nn.functional and operator, and of tensor methods: what they say, they do.
_KIND_OF_NAME: dict[str, str] = {
    name: kind
    for kind, names in {
        "activation": _POINTWISE,
        "add": "add add_ iadd sub sub_ isub subtract rsub",
        "multiply": "mul mul_ imul multiply div div_ truediv itruediv divide true_divide minimum maximum where "
        "masked_fill addcmul lerp",
        "pool": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
        "resize": "interpolate",
        "identity": "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
        "contiguous clone detach to float double half type type_as stochastic_depth",
        "reshape": "flatten reshape view unflatten squeeze unsqueeze expand expand_as repeat tile view_as reshape_as "
        "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle roll flip ravel broadcast_to "
        "_patch_merging_pad _get_relative_position_bias",
        "permute": "permute transpose swapaxes swapdims movedim moveaxis t",
        "concat": "cat concat concatenate stack hstack vstack",
        "split": "chunk split unbind tensor_split",
        "getitem": "getitem select narrow index_select",
        "pad": "pad",
        "softmax": "softmax log_softmax",
        "normalize": "normalize",
        "mean": "mean sum amax amin logsumexp",
        "matmul": "matmul bmm",
        "einsum": "einsum",
        "functional-conv": "conv1d conv2d conv3d",
        "functional-linear": "linear",
        "functional-batchnorm": "batch_norm",
        "functional-layernorm": "layer_norm rms_norm",
        "functional-groupnorm": "group_norm",
        "dot-attention": "scaled_dot_product_attention",
        "window-attention": "shifted_window_attention",
    }.items()
    for name in names.split()
}
# Positional arguments after the input, by their names: those of a function are those of its module's attributes.
_ARGUMENTS = {
    "conv": ("weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv-transpose": ("weight", "bias", "stride", "padding", "output_padding", "groups"),
    "linear": ("weight", "bias"),
    "embedding": ("weight",),
    "batchnorm": ("running_mean", "running_var", "weight", "bias"),
    "instancenorm": ("running_mean", "running_var", "weight", "bias"),
    "affine": ("weight", "bias"),
    "layernorm": ("normalized_shape", "weight", "bias"),
    "groupnorm": ("num_groups", "weight", "bias"),
    "softmax": ("dim",),
    "normalize": ("p", "dim"),
    "pad": ("padding", "mode", "value"),
    "mean": ("dim",),
    "attention": ("key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights"),
    "dot-attention": ("key", "value", "attn_mask"),
    "window-attention": ("qkv_weight", "proj_weight", "relative_position_bias", "window_size", "num_heads",
                         "shift_size", "attention_dropout", "dropout", "qkv_bias", "proj_bias", "logit_scale"),
}  # fmt: skip
_TAPPED = ("conv", "linear", "batchnorm", "groupnorm", "add", "multiply", "activation", "permute")
_OWN = ("torch", "operator", "_operator", "torchvision")  # modules whose functions are known by name


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
        self.plain: dict[str, object] = {}  # values that hold no tensor: sizes and what is computed from them
        values, inputs = {}, iter((example,))
        with eval_mode(model):
            for node in self.nodes:
                values[node] = value = self.compute(node, values, inputs)
                self.shapes[node.name] = tuple(value.shape) if isinstance(value, Tensor) else None
                if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    self.plain[node.name] = value
                self.forget(node, values)

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.modules[node.target]
            return next((kind for types, kind in _KIND_OF_MODULE if isinstance(module, types)), "")
        if node.op == "call_function":
            origin = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
            return _KIND_OF_NAME.get(getattr(node.target, "__name__", ""), "") if origin in _OWN else ""
        return _KIND_OF_NAME.get(node.target, "") if node.op == "call_method" else ""

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
    layers: tuple[str, ...] = ()  # those with weight matrices, in order of execution

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def __str__(self) -> str:
        rows = [("group", "size", "tap", "parameters [axis]")]
        for g in self.groups:
            axes = ", ".join(f"{a.tensor}[{a.axis}]" for a in g.axes)
            rows.append((g.name, str(g.size), g.taps.get("post", "-"), axes))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        left = sum(widths) + 6
        lines = []
        for *cells, axes in rows:
            start = "".join(cell.ljust(w + 2) for cell, w in zip(cells, widths, strict=True))
            wrapped = textwrap.wrap(axes, max(40, 120 - left), break_long_words=False, break_on_hyphens=False)
            lines += [start + wrapped[0], *(" " * left + line for line in wrapped[1:])]
        return "\n".join(lines)

    def draw(self, ax=None):
        """Diagram of layers and groups: a group is a band, filled where a layer makes its units, open where one reads.

        Args:
            ax: matplotlib Axes to draw on; a new figure of fitting size if None.

        Returns:
            The Axes.
        """
        import matplotlib.pyplot as plt

        rows = {layer: i for i, layer in enumerate(self.layers)}
        colors = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")  # Okabe and Ito
        if ax is None:
            ax = plt.subplots(figsize=(5, 0.6 + 0.2 * len(rows)), layout="constrained")[1]
        ends: list[int] = []  # last row of every lane
        sizes: dict[int, list[str]] = {}
        for k, group in enumerate(self.groups):
            seen = [(rows[a.tensor.rpartition(".")[0]], a) for a in group.axes if a.tensor.rpartition(".")[0] in rows]
            if not seen:
                continue
            top, bottom = min(row for row, _ in seen), max(row for row, _ in seen)
            lane = next((i for i, end in enumerate(ends) if end < top), len(ends))
            ends[lane : lane + 1] = [bottom]
            sizes.setdefault(top, []).append(str(group.size))
            color = colors[k % len(colors)]
            ax.plot([lane, lane], [top, bottom], color=color, linewidth=5, alpha=0.35, solid_capstyle="round")
            for row, axis in seen:
                ax.plot(lane, row, "o", color=color, markersize=5, markerfacecolor="white" if axis.axis == 1 else color)
        for row, texts in sizes.items():
            ax.text(len(ends) - 0.4, row, " + ".join(texts), va="center", fontsize=8)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        ax.set(xlim=(-0.6, len(ends) + 0.6), ylim=(len(rows) - 0.5, -0.7), xticks=[])
        ax.spines[:].set_visible(False)
        ax.tick_params(left=False)
        return ax


def _varies(x: Tensor, axis: int) -> bool:
    return x.shape[axis] > 1 and x.stride(axis) != 0


def _thin(x: Tensor) -> Tensor:
    """The labels without repetition: length 1 on every axis along which they do not differ."""
    return x[tuple(slice(None) if _varies(x, axis) else slice(0, 1) for axis in range(x.ndim))]


def _compact(x: Tensor) -> Tensor:
    """The same labels, expanded with stride 0 along every axis on which they do not differ: no map is ever stored."""
    thin = _thin(x)
    for axis in range(x.ndim):
        if thin.shape[axis] > 1 and (thin == thin.narrow(axis, 0, 1)).all():
            thin = thin.narrow(axis, 0, 1)
    return thin.expand(x.shape)


def _spread(units: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    axis %= len(shape)
    return units.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


class _Labels:
    """Unit numbers of every activation and weight axis while the graph is walked.

    Operations that only move elements about (reshape, concatenate, pad, ...) are run on the labels themselves. Where a
    rule needs units to move together that need not, it identifies them: that loses a symmetry and never invents one.
    """

    def __init__(self, net: TracedNet):
        self.net = net
        self.count = 2  # FREE and FIXED
        self.values: dict[fx.Node, object] = {}  # labels (or tuples of labels) in the shape of the node's value
        self.plain: dict[fx.Node, object] = {}  # sizes, indices and other values that depend on no activation
        self.axes: dict[tuple[str, int], Tensor | None] = {}  # in order of use; None where no axis was chosen yet
        self.leaves: dict[str, Tensor] = {}  # parameters that take part like activations: a label for every element
        self.same = [(torch.tensor([FIXED]), torch.tensor([FIXED]))]
        self.apart: list[tuple[Tensor, Tensor]] = []  # units and a number each: other number, other group
        self.aliases: dict[str, list[str]] = {}  # tied weights: one tensor, several names in the state dict
        by_tensor: dict[int, list[str]] = {}
        self.state = net.model.state_dict(keep_vars=True)
        for name, tensor in self.state.items():
            by_tensor.setdefault(id(tensor), []).append(name)
        for names in by_tensor.values():
            self.aliases |= dict.fromkeys(names, names)

    def fresh(self, n: int) -> Tensor:
        self.count += n
        return torch.arange(self.count - n, self.count)

    def identify(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        where = tuple(slice(None) if _varies(a, i) or _varies(b, i) else slice(0, 1) for i in range(a.ndim))
        a, b = a[where].flatten(), b[where].flatten()
        known = (a != b) & (a != FREE) & (b != FREE)
        self.same.append((a[known], b[known]))

    def fix(self, x: Tensor) -> None:
        self.identify(x, torch.tensor(FIXED))

    def mark(self, tensor: str, axis: int, units: Tensor) -> None:
        """Say that an axis of a parameter or buffer indexes `units`; a shared module says it more than once."""
        if tensor not in self.aliases:
            what = repr(tensor) if isinstance(tensor, str) else "a weight"
            raise UnsupportedNode(
                f"{what} is no parameter but computed from others (weight norm, a parametrization, pruning); "
                "make it permanent first, with torch.nn.utils.parametrize or prune's remove function"
            )
        for name in self.aliases[tensor]:
            known = self.axes.get((name, axis))
            if known is None:
                self.axes[name, axis] = units
            else:
                self.identify(known, units)

    def channels(self, x: Tensor, axis: int) -> Tensor:
        """Units along one axis of an activation, the same everywhere else."""
        moved = _thin(x.movedim(axis, -1)).flatten(0, -2).expand(-1, x.shape[axis])
        units = moved.amax(0)
        self.identify(moved, units)
        free = units == FREE
        units[free] = self.fresh(int(free.sum()))
        return units

    def parameter(self, name: str) -> Tensor:
        """Labels of a parameter's elements; which of its axes holds units is settled when the graph has been walked."""
        tensor = self.state[name]
        if (known := self.leaves.get(self.aliases[name][0])) is None:
            known = self.leaves[self.aliases[name][0]] = self.fresh(tensor.numel()).view(tensor.shape)
            for alias in self.aliases[name]:
                self.axes |= {(alias, axis): self.axes.get((alias, axis)) for axis in range(tensor.ndim)}
        return known

    def value(self, node: fx.Node) -> object:
        """Labels of an input of a rule; indices, sizes and the like as they are."""
        if node in self.values:
            return self.values[node]
        if node in self.plain:
            value = self.plain[node]
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return torch.tensor(FIXED).expand(value.shape) if floating else value
        constant = all(self.rule(user) in ("conv", "linear") for user in node.users)  # a table of coordinates
        if isinstance(self.state[node.target], nn.Parameter) or not constant:
            return self.parameter(node.target)
        return torch.tensor(FIXED).expand(self.state[node.target].shape)

    # ---- what may move after two activations are combined, or one is summed over axes

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Units of a + b, a * b, ..., with broadcasting."""
        rank = max(a.ndim, b.ndim)
        a, b = (x[(None,) * (rank - x.ndim)] for x in (a, b))
        shape = torch.broadcast_shapes(a.shape, b.shape)
        over_a = [i for i in range(rank) if a.shape[i] == 1 and _varies(b, i)]
        over_b = [i for i in range(rank) if b.shape[i] == 1 and _varies(a, i)]
        if over_a and over_b:
            self.fix(a)
            self.fix(b)
            return torch.tensor(FIXED).expand(shape)
        if over_a or over_b:  # a few values, each used by many units
            few, many = (a, b) if over_a else (b, a)
            if not any(_varies(few, i) and _varies(many, i) for i in range(rank)):
                self.fix(few)
                return many.expand(shape)
            many = self.merge(many, over_a or over_b)  # one value for each block of units: the block moves as a unit
            a, b = few, many
        self.identify(a, b)
        a, b = sorted((a.expand(shape), b.expand(shape)), key=lambda x: _thin(x).numel())
        return _compact(torch.where(a == FREE, b, a)) if (_thin(a) == FREE).any() else a

    def merge(self, x: Tensor, axes: Collection[int]) -> Tensor:
        first = _thin(x).amax(tuple(axes), keepdim=True)
        self.identify(x, first)
        return first.expand(x.shape)

    def together(self, x: Tensor, axes: Collection[int]) -> None:
        """Units are treated alike along these axes: they may change places, but not with units from elsewhere."""
        rows = _thin(x).movedim(tuple(axes), tuple(range(-len(axes), 0))).flatten(-len(axes))
        rows = rows.reshape(-1, rows.shape[-1])
        if rows.shape[1] > 1:
            self.apart.append((rows, torch.arange(len(rows))[:, None].expand_as(rows)))

    def collapse(self, x: Tensor, axes: Collection[int]) -> Tensor:
        """Units of a sum, mean, maximum, ... over some axes, which keep length 1."""
        axes = [axis % x.ndim for axis in axes]
        inside = any(_varies(x, i) for i in axes)
        if inside and any(_varies(x, i) for i in range(x.ndim) if i not in axes):
            x = self.merge(x, axes)
        elif inside:
            self.together(x, axes)
            x = torch.tensor(FIXED).expand(x.shape)
        return x[tuple(slice(0, 1) if i in axes else slice(None) for i in range(x.ndim))]

    # ---- one rule per kind of node; each returns the labels of the node's value

    def conv(self, node, x, weight, bias=None, groups=1, out=0, **_):
        inputs, shape = self.channels(x, 1), self.net.shapes[node.name]
        if groups == 1:
            self.mark(weight, 1 - out, inputs)
            return _spread(self.produce(weight, bias, self.fresh(shape[1]), out), shape, 1)
        if out == 1:
            raise UnsupportedNode("a transposed convolution in groups")
        # The weight's input axis is shared by all groups, so the channels of a group stay together and in order; a
        # group moves as one unit, its outputs with its inputs. A depthwise convolution has groups of one channel.
        blocks = inputs.view(groups, -1)
        self.identify(blocks, blocks[:, :1])
        return _spread(self.produce(weight, bias, blocks[:, 0].repeat_interleave(shape[1] // groups)), shape, 1)

    def conv_transpose(self, node, x, **arguments):
        return self.conv(node, x, **arguments, out=1)

    def linear(self, node, x, weight, bias=None, **_):
        shape = self.net.shapes[node.name]
        self.mark(weight, 1, self.channels(x, -1))
        return _spread(self.produce(weight, bias, self.fresh(shape[-1])), shape, -1)

    def embedding(self, node, x, weight):
        shape = self.net.shapes[node.name]
        return _spread(self.produce(weight, None, self.fresh(shape[-1]), 1), shape, -1)

    def produce(self, weight, bias, units, axis=0):
        self.mark(weight, axis, units)
        if bias is not None:
            self.mark(bias, 0, units)
        return units

    def batchnorm(self, node, x, **parameters):
        units = self.channels(x, 1)
        for name in parameters.values():
            if isinstance(name, str | Tensor):
                self.mark(name, 0, units)
        return _spread(units, x.shape, 1)

    affine = instancenorm = batchnorm

    def layernorm(self, node, x, normalized_shape, weight=None, bias=None, **_):
        self.together(x, range(-len(normalized_shape), 0))
        for name in (weight, bias):
            if name is not None:
                x = self.combine(x, self.parameter(name))
        return x

    def groupnorm(self, node, x, num_groups, weight=None, bias=None, **_):
        x = self.batchnorm(node, x, weight=weight, bias=bias)
        self.together(self.channels(x, 1).view(num_groups, -1), [1])  # they share mean and variance: they stay together
        return x

    def pointwise(self, node):
        return functools.reduce(self.combine, map(self.units, node.all_input_nodes))

    add = multiply = pointwise

    def activation(self, node):
        module = self.net.modules.get(node.target)
        prelu = isinstance(module, nn.PReLU)
        if not prelu and node.target is not torch.prelu:
            return self.pointwise(node)
        x, weight = self.units(node.args[0]), f"{node.target}.weight" if prelu else node.args[1].target
        return self.combine(x, self.parameter(weight).view(-1, *[1] * (x.ndim - 2)))

    def identity(self, node):
        return self.units(node.all_input_nodes[0])

    def softmax(self, node, x, dim, **_):
        self.together(x, [dim])
        return x

    def normalize(self, node, x, p=2.0, dim=1, **_):
        return self.softmax(node, x, dim)

    def mean(self, node, x, dim=None, keepdim=False, dtype=None):
        axes = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        return self.collapse(x, axes).reshape(self.net.shapes[node.name])

    def pool(self, node):
        return _spread(self.channels(self.identity(node), 1), self.net.shapes[node.name], 1)

    resize = pool

    def structure(self, node):
        values = {n: self.value(n) for n in node.all_input_nodes}
        if node.target == "view":  # the labels' strides are others than the activation's
            x, *shape = fx.node.map_arg(node.args, values.__getitem__)
            return x.reshape(*shape)
        return self.net.compute(node, values)

    reshape = permute = concat = split = getitem = structure

    def pad(self, node, x, padding, mode="constant", value=None):
        return F.pad(x.double(), padding, mode).long()  # a constant is FREE, whatever its value

    def product(self, a, b):
        return self.collapse(self.combine(a.unsqueeze(-1), b.unsqueeze(-3)), [-2]).squeeze(-2)

    def matmul(self, node):
        a, b = node.args
        if b.op == "get_attr" and len(self.net.shapes[b.name]) == 2:
            shape = self.net.shapes[node.name]
            self.mark(b.target, 0, self.channels(self.units(a), -1))
            return _spread(self.produce(b.target, None, self.fresh(shape[-1]), 1), shape, -1)
        return self.product(self.units(a), self.units(b))

    def einsum(self, node):
        inputs, output = node.args[0].replace(" ", "").split("->")
        letters = sorted(set(inputs) - {","})
        aligned = []
        for names, source in zip(inputs.split(","), node.all_input_nodes, strict=True):
            x = self.units(source).permute([names.index(i) for i in letters if i in names])
            aligned.append(x[tuple(slice(None) if i in names else None for i in letters)])
        summed = [axis for axis, i in enumerate(letters) if i not in output]
        x = self.collapse(functools.reduce(self.combine, aligned), summed)
        left = [i for i in letters if i in output]
        return x[tuple(slice(None) if i in output else 0 for i in letters)].permute([left.index(i) for i in output])

    def dot_attention(self, node, query, key, value, attn_mask=None, **_):
        scores = self.product(query, self.labels(key).transpose(-1, -2))
        if attn_mask is not None:
            scores = self.combine(scores, self.labels(attn_mask))
        return self.product(self.softmax(node, scores, -1), self.labels(value))

    def attention(self, node, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options):
        if need_weights and not options.get("average_attn_weights", True):
            raise UnsupportedNode("the weights of each head as an output")
        module, name, shape = self.net.modules[node.target], node.target, query.shape
        heads = self.fresh(module.num_heads).repeat_interleave(module.head_dim)  # a head moves as one unit
        for part, x in zip("qkv", (query, key, value), strict=True):
            weight = f"{name}.{part}_proj_weight" if module.in_proj_weight is None else f"{name}.in_proj_weight"
            self.mark(weight, 1, self.channels(self.labels(x), -1))
            self.mark(weight, 0, heads if module.in_proj_weight is None else heads.repeat(3))
        for parameter, axis, units in (
            ("in_proj_bias", 0, heads.repeat(3)),
            ("bias_k", 2, heads),
            ("bias_v", 2, heads),
        ):
            if getattr(module, parameter) is not None:
                self.mark(f"{name}.{parameter}", axis, units)
        for mask in (key_padding_mask, attn_mask):
            if mask is not None:
                self.fix(self.labels(mask))
        self.mark(f"{name}.out_proj.weight", 1, heads)
        bias = None if module.out_proj.bias is None else f"{name}.out_proj.bias"
        out = _spread(self.produce(f"{name}.out_proj.weight", bias, self.fresh(shape[-1])), shape, -1)
        weights = (shape[0], *(self.labels(x).shape[1] for x in (query, key))) if module.batch_first else (1, 1, 1)
        return out, torch.tensor(FIXED).expand(weights)

    def window_attention(self, node, x, qkv_weight, proj_weight, relative_position_bias, num_heads, **options):
        heads = self.fresh(num_heads)
        rows = heads.repeat_interleave(x.shape[-1] // num_heads)  # a head moves as one unit
        self.mark(qkv_weight, 1, self.channels(x, -1))
        self.produce(qkv_weight, options.get("qkv_bias"), rows.repeat(3))
        self.identify(self.labels(relative_position_bias), _spread(heads, (1, num_heads, 1, 1), 1))
        if options.get("logit_scale") is not None:
            self.mark(options["logit_scale"], 0, heads)
        self.mark(proj_weight, 1, rows)
        return _spread(self.produce(proj_weight, options.get("proj_bias"), self.fresh(x.shape[-1])), x.shape, -1)

    # ---- the walk

    def labels(self, argument: str | Tensor) -> Tensor:
        return self.parameter(argument) if isinstance(argument, str) else argument

    def units(self, node: fx.Node) -> object:
        value = self.value(node)
        return torch.tensor(FIXED).expand(value.shape) if node in self.plain and isinstance(value, Tensor) else value

    def arguments(self, node: fx.Node, kind: str) -> tuple[Tensor, dict[str, object]]:
        """Labels of the input and, by name, the rest: names of parameters, labels of activations, plain values."""

        def read(source):
            parameter = source.op == "get_attr" and source not in self.plain
            return source.target if parameter else self.units(source)

        given = dict(node.kwargs)
        first, *rest = node.args or [given.pop(next(iter(given)))]
        if node.op != "call_module" or kind == "attention":
            return self.units(first), fx.node.map_arg(dict(zip(_ARGUMENTS[kind], rest, strict=False)) | given, read)
        module = self.net.modules[node.target]
        values = {name: getattr(module, name, None) for name in _ARGUMENTS[kind]}
        values = {k: f"{node.target}.{k}" if isinstance(v, Tensor) else v for k, v in values.items() if v is not None}
        return self.units(first), values

    def visit(self, node: fx.Node) -> None:
        if node.name in self.net.plain:
            self.plain[node] = self.net.plain[node.name]
        elif node.op == "get_attr":  # parameters are labelled where they are used
            tensor = operator.attrgetter(node.target)(self.net.model)
            if node.target not in self.state or not tensor.is_floating_point():
                self.plain[node] = tensor.detach().cpu()
        elif node.op == "placeholder":
            self.values[node] = torch.tensor(FIXED).expand(self.net.shapes[node.name])
        elif node.op == "output":
            for x in tree_leaves([self.units(source) for source in node.all_input_nodes]):
                if isinstance(x, Tensor):
                    self.fix(x)
        elif all(source in self.plain for source in node.all_input_nodes):
            value = self.net.compute(node, self.plain)
            self.plain[node] = value.cpu() if isinstance(value, Tensor) else value
        else:
            self.values[node] = self.apply(node)

    def rule(self, node: fx.Node) -> str:
        return self.net.kinds[node.name].removeprefix("functional-")

    def apply(self, node: fx.Node) -> Tensor | tuple:
        kind = self.rule(node)
        what = type(self.net.modules[node.target]) if node.op == "call_module" else node.target
        missing = f"node '{node.name}': no permutation rule for {getattr(what, '__name__', what)}"
        if not kind:
            raise UnsupportedNode(missing)
        try:
            rule = getattr(self, kind.replace("-", "_"))
            if kind in _ARGUMENTS:
                x, arguments = self.arguments(node, kind)
                out = rule(node, x, **arguments)
            else:
                out = rule(node)
            return tuple(map(_compact, out)) if isinstance(out, tuple | list) else _compact(out)
        except Exception as error:  # arguments that the rule does not know, among others
            raise UnsupportedNode(f"{missing} in this use: {error}") from error

    def resolve(self) -> Tensor:
        """Representative of every unit number: the smallest number identified with it."""
        a, b = (torch.cat([pair[i] for pair in self.same]).numpy() for i in (0, 1))
        edges = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(self.count, self.count))
        _, component = connected_components(edges, directed=False)
        smallest = np.full(component.max() + 1, self.count)
        np.minimum.at(smallest, component, np.arange(self.count))
        return torch.from_numpy(smallest[component])

    def settle(self) -> Tensor:
        """Choose the axis of each parameter that took part like an activation; representatives after that."""
        root = self.resolve()
        for name, elements in self.leaves.items():
            units = _compact(root[elements])
            varying = [axis for axis in range(units.ndim) if _varies(units, axis)]
            if len(varying) == 1:
                self.mark(
                    name, varying[0], units.movedim(varying[0], -1).flatten(0, -2)[0] if units.ndim > 1 else units
                )
            else:
                self.fix(elements)
            for axis in range(units.ndim):
                if [axis] != varying and self.axes.get((name, axis)) is not None:
                    self.fix(self.axes[name, axis])
        return self.resolve()


def permutation_spec(model: nn.Module, example: Tensor, verify: bool = True) -> PermutationSpec:
    """Permutation groups of any traced model, derived from its graph and verified in float64.

    Args:
        model: the network, as it runs in evaluation mode. Untouched.
        example: inputs (n, ...) of a small batch.
        verify: permute every group at random in a float64 copy with random weights and compare outputs.

    Raises:
        UntraceableModel, UnsupportedNode: with the node's name.
        SpecError: the check failed, so the graph rules do not fit this model, or it can tell nothing.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> print(permutation_spec(net, torch.randn(2, 3)))
    group  size  tap  parameters [axis]
    0      4     _1   0.weight[0], 0.bias[0], 2.weight[1]
    """
    net = trace(model, example)
    labels = _Labels(net)
    for node in net.nodes:
        labels.visit(node)
    spec = _groups(net, labels)
    if verify:
        error = invariance_error(model, spec, example)
        if math.isinf(error):
            raise SpecError(
                f"the groups of {type(model).__name__} cannot be verified: on random inputs an output is zero, not "
                "finite or the same for both"
            )
        if not error < 1e-8:
            raise SpecError(f"permuting the groups of {type(model).__name__} changes its output by {error:.1e}")
    return spec


def _groups(net: TracedNet, labels: _Labels) -> PermutationSpec:
    root = labels.settle().numpy()
    axes = {key: root[units.numpy()] for key, units in labels.axes.items() if units is not None}
    movable = np.unique(np.concatenate([[root[FIXED]], *axes.values()]))
    movable = movable[movable != root[FIXED]]
    place = np.full(labels.count, -1)
    place[movable] = np.arange(len(movable))
    # Two units are interchangeable when they occur equally often on the same axes. The sum of random 64-bit keys, one
    # an axis, tells these sets of axes apart without a units x axes table.
    rng = np.random.default_rng(0)
    signature = np.zeros(len(movable), dtype=np.int64)
    for units in axes.values():
        here = place[units]
        signature += rng.integers(1, 2**62) * np.bincount(here[here >= 0], minlength=len(movable))
    for units, number in labels.apart:
        here, keys = place[root[units.numpy()]], rng.integers(1, 2**62, size=int(number.max()) + 1)[number]
        np.add.at(signature, here[here >= 0], keys[here >= 0])
    _, first, kind = np.unique(signature, return_index=True, return_inverse=True)
    group_of = np.argsort(np.argsort(first))[kind]  # groups in order of their first unit
    units_of = [movable[group_of == g] for g in range(len(first))]

    def members(on_axis: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Of every group on an axis: its number, and positions (units, occurrences), None where these differ."""
        here = place[on_axis]
        for g in np.unique(group_of[here[here >= 0]]):
            positions = np.flatnonzero((here >= 0) & (group_of[here] == g))
            positions = positions[np.argsort(on_axis[positions], kind="stable")]
            each, rest = divmod(len(positions), len(units_of[g]))
            if not rest and np.array_equal(on_axis[positions], np.repeat(units_of[g], each)):
                yield g, torch.from_numpy(positions.reshape(-1, each))

    found: list[list[Axis]] = [[] for _ in units_of]
    for (tensor, axis), on_axis in axes.items():
        for g, positions in members(on_axis):
            found[g].append(Axis(tensor, axis, positions))
    # The group's last node before and after its non-linearity, of a residual stream the end of the last block; and
    # where its units lie on axis 1 there (units, channels of a unit): one channel each, or the channels of a block.
    taps: list[dict[str, str]] = [{} for _ in units_of]
    channels: list[dict[str, Tensor]] = [{} for _ in units_of]
    for node, label in labels.values.items():
        kind = labels.rule(node)
        if kind not in _TAPPED or label.ndim < 2 or any(_varies(label, i) for i in range(label.ndim) if i != 1):
            continue
        for g, positions in members(root[label.movedim(1, -1).flatten(0, -2)[0].numpy()]):
            for tap in ("post",) if kind == "activation" else ("pre", "post"):
                taps[g][tap], channels[g][tap] = node.name, positions
    groups, seen = [], {}
    for g, units in enumerate(units_of):
        name = found[g][0].tensor.rpartition(".")[0]
        seen[name] = seen.get(name, 0) + 1
        name += f":{seen[name]}" if seen[name] > 1 else ""  # a layer whose units fall into several groups
        groups.append(Group(name, len(units), tuple(found[g]), taps[g], channels[g]))
    weights = [t for t, _ in axes if t.endswith("weight") and labels.state[t].ndim > 1]
    return PermutationSpec(tuple(groups), tuple(dict.fromkeys(t.rpartition(".")[0] for t in weights)))


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
    for tensor, axis, target, source in _moves(spec, permutation):
        old = out[tensor]
        source, target = source.to(old.device), target.to(old.device)
        out[tensor] = old.index_copy(axis, target, old.index_select(axis, source))
    return out


def _moves(spec: PermutationSpec, permutation: Permutation) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """For every permuted axis of every tensor: positions to fill, and positions to fill them from."""
    for name, perm in permutation.items():
        group = spec[name]
        if sorted(perm.tolist()) != list(range(group.size)):
            raise ValueError(f"group {name!r}: not a permutation of its {group.size} units")
        for axis in group.axes:
            yield axis.tensor, axis.axis, axis.positions.flatten(), axis.positions[perm.cpu()].flatten()


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

    ``max |f(P theta) - f(theta)| / max |f(theta)|`` of two random inputs, for a copy with random weights and
    normalisation statistics, so that a forgotten axis cannot hide behind ones and zeros. Infinite where an output is
    zero, not finite or the same for both inputs: such an output would hide any mistake.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(model).cpu().double()
    state = {t.data_ptr(): (name, t) for name, t in reversed(probe.state_dict().items()) if t.is_floating_point()}
    for _, tensor in reversed(state.values()):
        if tensor.ndim < 2:  # biases, scales, statistics: positive, of order one
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            bound = math.sqrt(6 / tensor[0].numel())
            tensor.uniform_(-bound, bound, generator=generator)
    shape, floating = example.shape[1:], example.is_floating_point()
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64) if floating else example[:2].cpu()

    def outputs():
        return [y.double().reshape(len(x), -1) for y in tree_leaves(probe(x)) if isinstance(y, Tensor)]

    with eval_mode(probe):
        _scale_statistics(probe)
        before = outputs()
        # In place: a network of 5 GB should not be there twice.
        tensors = dict(state.values())
        for name, axis, target, source in _moves(spec, random_permutation(spec, seed + 1)):
            if name in tensors:  # of tied weights, the first name only
                tensors[name].index_copy_(axis, target, tensors[name].index_select(axis, source))
        after = outputs()
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        scale = old.abs().amax(1)
        if not (
            new.isfinite().all() and scale.isfinite().all() and (old[0] - old[-1]).abs().max() > 1e-6 * scale.max()
        ):
            return math.inf
        worst = max(worst, float(((new - old).abs().amax(1) / scale).max()))
    return worst


def _scale_statistics(model: nn.Module) -> None:
    """In the next pass, multiply every BatchNorm's statistics by the size of its inputs.

    Deep networks would otherwise grow or shrink their activations until a sigmoid or softmax hides what comes before.
    """
    pending = {}

    def scale(module, inputs):
        pending.pop(module).remove()
        size = inputs[0].square().mean().sqrt()
        module.running_mean.sub_(1).mul_(size)
        module.running_var.mul_(size**2)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            pending[module] = module.register_forward_pre_hook(scale)
