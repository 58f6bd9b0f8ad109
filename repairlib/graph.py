"""Trace a network, read any of its nodes, derive its permutation groups from the graph and verify them.

A group is a set of hidden units that may be reordered without changing the function (Jordan et al. 2022, Sec. 2.2).
"""

import contextlib
import copy
import difflib
import math
import operator
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from repairlib.groups import FIXED, Labels, varies
from repairlib.groups import UnsupportedNode as UnsupportedNode


class UntraceableModel(ValueError):
    """The model's forward cannot be written as a graph; the message names the last node reached."""


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


def as_batches(data: Iterable) -> Iterable:
    """What can be iterated over several times: a tensor is one batch, not its rows, and an iterator is kept."""
    return [data] if isinstance(data, Tensor) else list(data) if isinstance(data, Iterator) else data


class Batches:
    """Inputs of any iterable of batches, re-iterable, on a model's device and in its floating type.

    Args:
        data: batches x or (x, y, ...); a tensor is one batch; a one-shot iterator is kept in memory because statistics
            need several passes. Empty batches are skipped.
        model: whose device and precision the inputs take.
        limit: stop after so many examples; a loader that shuffles then gives other ones in each pass.

    Raises:
        TypeError: a batch is no tensor and does not begin with one.
    """

    def __init__(self, data: Iterable, model: nn.Module, limit: int | None = None):
        self.data = as_batches(data)
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
            if len(x):
                yield x.to(self.device, self.dtype if x.is_floating_point() else None)

    def example(self) -> Tensor:
        """The first two inputs of the first batch.

        Raises:
            ValueError: the data is empty.
        """
        for x in self:
            return x[:2]
        raise ValueError("the calibration data is empty: it has no batch to measure statistics on")


# --------------------------------------------------------------------------------------------------- traced networks


class ChannelAffine(nn.Module):
    """Visible correction of a node: ``y_c = weight_c x_c + bias_c`` for inputs (n, c, ...)."""

    def __init__(self, weight: Float[Tensor, " channels"], bias: Float[Tensor, " channels"]):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "n channels ..."]) -> Float[Tensor, "n channels ..."]:
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)


class _Tracer(fx.Tracer):
    """Keeps corrections whole, so that a repaired network has the node names of the network it came from."""

    proxy_buffer_attributes = True  # what is computed from buffers is part of the graph, not a constant

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
    "clamp clamp_ clamp_min clamp_max clip sign nan_to_num pow pos gt lt ge le eq ne"
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
_TAPPED = (
    "conv", "conv-transpose", "linear", "batchnorm", "groupnorm", "add", "multiply", "activation", "permute",
)  # fmt: skip
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
            return value.clone() if isinstance(value, Tensor) else value  # the first operation may be in place
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
    positions: Int[Tensor, "units occurrences"]


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
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are: {', '.join(group.name for group in self.groups)}")

    def __str__(self) -> str:
        rows = [("group", "size", "tap", "parameters [axis]")]
        for g in self.groups:
            axes = ", ".join(f"{a.tensor}[{a.axis}]" for a in g.axes)
            rows.append((g.name, str(g.size), g.taps.get("post", "-"), axes))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        left = sum(widths) + 6
        margin = " " * (left if left <= 60 else 4)  # parameters on lines of their own where names are long
        lines = []
        for *cells, axes in rows:
            start = "".join(cell.ljust(w + 2) for cell, w in zip(cells, widths, strict=True))
            first, *rest = textwrap.wrap(axes, 120 - len(margin), break_long_words=False, break_on_hyphens=False)
            lines += [start + first] if left <= 60 else [start.rstrip(), margin + first]
            lines += [margin + line for line in rest]
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
        bands = [[(rows[a.tensor.rpartition(".")[0]], a.axis) for a in group.axes
                  if a.tensor.rpartition(".")[0] in rows] for group in self.groups]  # fmt: skip
        shown = [(min(band)[0], max(band)[0], k) for k, band in enumerate(bands) if band]
        lanes: list[list[tuple[int, int]]] = []
        lane_of = {}
        for top, bottom, k in sorted(shown, key=lambda band: (band[0] - band[1], band)):  # long ones to the left
            free = (i for i, lane in enumerate(lanes) if all(bottom < start or end < top for start, end in lane))
            lane_of[k] = next(free, len(lanes))
            lanes += [[]] * (lane_of[k] == len(lanes))
            lanes[lane_of[k]].append((top, bottom))
        if ax is None:
            width = max(3.3, 1 + 0.07 * max(map(len, rows), default=0) + 0.3 * len(lanes))
            ax = plt.subplots(figsize=(width, 0.6 + 0.2 * len(rows)), layout="constrained")[1]
        sizes: dict[int, list[str]] = {}
        for top, bottom, k in shown:
            sizes.setdefault(top, []).append(str(self.groups[k].size))
            color, lane = colors[k % len(colors)], lane_of[k]
            ax.plot([lane, lane], [top, bottom], color=color, linewidth=5, alpha=0.35, solid_capstyle="round")
            for row, axis in bands[k]:
                ax.plot(lane, row, "o", color=color, markersize=5, markerfacecolor="white" if axis == 1 else color)
        for row, texts in sizes.items():
            ax.text(len(lanes) - 0.4, row, " + ".join(texts), va="center", fontsize=8)
        ax.hlines(range(len(rows)), -0.6, len(lanes) - 0.6, color="0.9", linewidth=0.5, zorder=0)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        ax.set_title("\u25cf makes units, \u25cb reads them; right: how many", fontsize=8, loc="right")
        ax.set(xlim=(-0.6, len(lanes) + 0.6), ylim=(len(rows) - 0.5, -0.7), xticks=[])
        ax.spines[:].set_visible(False)
        ax.tick_params(left=False)
        return ax


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
    labels = Labels(net)
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


def _groups(net: TracedNet, labels: Labels) -> PermutationSpec:
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
        """Of every group whose units are all on an axis, equally often: its number, positions (units, occurrences)."""
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
        if node not in labels.fed or kind not in _TAPPED or label.ndim < 2:
            continue
        if any(varies(label, axis) for axis in range(label.ndim) if axis != 1):
            continue
        for g, positions in members(root[label.movedim(1, -1).flatten(0, -2)[0].numpy()]):
            for tap in ("post",) if kind == "activation" else ("pre", "post"):
                # Once a map is flattened, its units have as many channels as it had positions: read them before.
                if tap not in channels[g] or positions.shape[1] <= channels[g][tap].shape[1]:
                    taps[g][tap], channels[g][tap] = node.name, positions
    groups, seen = [], {}
    for g, units in enumerate(units_of):
        name = next((a.tensor.rpartition(".")[0] for a in found[g] if "." in a.tensor), found[g][0].tensor)
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
        _move_statistics(probe)
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
            new.isfinite().all() and scale.isfinite().all() and (old[0] - old[-1]).abs().max() > 1e-8 * scale.max()
        ):
            return math.inf
        worst = max(worst, float(((new - old).abs().amax(1) / scale).max()))
    return worst


def _move_statistics(model: nn.Module) -> None:
    """In the next pass, move every BatchNorm's statistics, which are of order one, to its input's mean and variance.

    Otherwise a deep network forgets its input, or its activations grow until a sigmoid hides what comes before. One
    variance for the whole layer, as dividing by that of a dead channel would blow up rounding errors.
    """
    pending = {}

    def move(module, inputs):
        pending.pop(module).remove()
        var, mean = torch.var_mean(inputs[0].transpose(0, 1).flatten(1), 1)
        module.running_mean.sub_(1).mul_(var.mean().sqrt()).add_(mean)
        module.running_var.mul_(var.mean())

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            pending[module] = module.register_forward_pre_hook(move)
