"""Networks as graphs of named nodes, which can be run, read and edited.

Every algorithm of the library reads activations by the names of nodes (taps), whatever the network's modules are.
"""

import dataclasses
import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from repairlib.inputs import Inputs, arguments, call, cast_input, count, map_inputs
from repairlib.recording import (
    ChannelAffine,
    Tracer,
    UntraceableModel,
    along,
    check_model,
    inside,
    perform,
    record,
    tensors_in,
    untouched,
)


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """Names of every tensor in the state dict, by the tensor's `id`; a tied weight has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return names


_LAYERS = nn.modules
_KIND_OF_MODULE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"), (_LAYERS.conv._ConvTransposeNd, "conv-transpose"),
    (nn.Linear, "linear"), ((nn.Embedding, nn.EmbeddingBag), "embedding"), (nn.MultiheadAttention, "attention"),
    ((_LAYERS.rnn.RNNBase, _LAYERS.rnn.RNNCellBase), "recurrent"), (nn.Bilinear, "bilinear"), (nn.GLU, "glu"),
    (_LAYERS.batchnorm._BatchNorm, "batchnorm"), (_LAYERS.instancenorm._InstanceNorm, "instancenorm"),
    ((nn.LayerNorm, nn.RMSNorm), "layernorm"), (nn.GroupNorm, "groupnorm"), (ChannelAffine, "affine"),
    ((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
      nn.LogSigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softplus, nn.Softsign,
      nn.Softshrink, nn.Tanhshrink, nn.Threshold), "activation"),
    ((_LAYERS.dropout._DropoutNd, nn.Identity), "identity"),
    ((_LAYERS.pooling._MaxPoolNd, _LAYERS.pooling._AvgPoolNd, _LAYERS.pooling._LPPoolNd,
      _LAYERS.pooling._AdaptiveAvgPoolNd, _LAYERS.pooling._AdaptiveMaxPoolNd), "pool"), (nn.Upsample, "resize"),
    ((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), "reshape"),
    ((nn.Softmax, nn.LogSoftmax), "softmax"), (_LAYERS.padding._ConstantPadNd, "pad"), (nn.Unfold, "unfold"),
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
        "contiguous clone detach to float double half bfloat16 type type_as stochastic_depth",
        "reshape": "flatten reshape view unflatten squeeze unsqueeze expand expand_as repeat tile view_as reshape_as "
        "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle roll flip ravel broadcast_to "
        "_patch_merging_pad _get_relative_position_bias repeat_interleave",
        "permute": "permute transpose swapaxes swapdims movedim moveaxis t",
        "concat": "cat concat concatenate stack hstack vstack",
        "split": "chunk split unbind tensor_split",
        "getitem": "getitem select narrow index_select",
        "pad": "pad",
        "unfold": "unfold",
        "softmax": "softmax log_softmax",
        "normalize": "normalize",
        "mean": "mean sum amax amin logsumexp max min median var std",
        "norm": "norm vector_norm",
        "glu": "glu",
        "constant": "zeros_like ones_like full_like new_zeros new_ones new_full",
        "matmul": "matmul bmm mm",
        "addmm": "addmm",
        "functional-embedding": "embedding",
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
_KIND_OF_ATTRIBUTE = {"T": "permute", "mT": "permute", "data": "identity", "values": "field", "indices": "field"}
_PRODUCTS = ("matmul", "addmm", "einsum")
_LAYER_KINDS = (
    "conv", "conv-transpose", "linear", "attention", "recurrent", "bilinear", "window-attention", *_PRODUCTS,
)  # fmt: skip
_UNITS_LAST = ("linear", "attention", "embedding", "recurrent")
_UNITS_FIRST = ("conv", "conv-transpose", "batchnorm", "instancenorm", "groupnorm", "pool", "resize")
_MOVES = ("permute", "reshape", "getitem", "mean")
_OWN = ("torch", "operator", "_operator", "torchvision")  # modules whose functions are known by name


class TracedNet:
    """Graph of a model's named nodes, which can be run, read and edited; the weights are the model's own.

    Attributes:
        kinds: kind of every node by name ("conv", "linear", "batchnorm", "activation", "add", "pool", ..., or "").
        shapes: shape of its value for the example, None if it is no tensor.
        plain: values that hold no tensor: sizes and what is computed from them.
        constants: tensors that forward makes and that depend on nothing, by the target of their nodes.
        fed: nodes that depend on the inputs.
        of_size: whether code asked for sizes as plain numbers, so that the graph may be of these only.
    """

    def __init__(self, model: nn.Module, tracer: Tracer):
        self.model = model
        self.graph: fx.Graph = tracer.graph
        self.modules: dict[Any, Any] = tracer.modules  # by the target of a node
        self.plain, self.constants, self.of_size = tracer.plain, tracer.constants, tracer.asked
        self.nodes: list[fx.Node] = list(self.graph.nodes)
        self.kinds = {node.name: self._kind(node) for node in self.nodes}
        self.shapes: dict[str, Any] = {node.name: tracer.shapes.get(node.name) for node in self.nodes}
        self.shapes |= {node.name: tuple(self.compute(node, {}).shape) for node in self.nodes if node.op == "get_attr"}
        self._by_name = {node.name: node for node in self.nodes}
        self._inputs = [str(node.target) for node in self.nodes if node.op == "placeholder"]
        self.fed: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or self.fed.intersection(node.all_input_nodes):
                self.fed.add(node)
        last_use = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                last_use[source] = node
        self._dead_after: dict[fx.Node, list[fx.Node]] = {}
        for source, user in last_use.items():
            self._dead_after.setdefault(user, []).append(source)

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.modules[node.target]
            return next((kind for types, kind in _KIND_OF_MODULE if isinstance(module, types)), "")
        if node.op == "call_function":
            if node.target is getattr:
                return _KIND_OF_ATTRIBUTE.get(str(node.args[1]), "")
            if inspect.isclass(node.target) and (
                dataclasses.is_dataclass(node.target) or hasattr(node.target, "_fields")
            ):
                return "record"
            origin = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
            return _KIND_OF_NAME.get(getattr(node.target, "__name__", ""), "") if origin in _OWN else ""
        return _KIND_OF_NAME.get(str(node.target), "") if node.op == "call_method" else ""

    def feed(self, x: Inputs) -> dict[str, Any]:
        """Inputs by the names of the graph's placeholders."""
        args, named = arguments(x)
        return named or dict(zip(self._inputs, args, strict=True))

    def compute(self, node: fx.Node, values: Mapping[fx.Node, Any], inputs: Mapping[str, Any] | None = None) -> Any:
        """Value of one node from the values of the nodes before it; `inputs` are those of the placeholders."""
        if node.op == "placeholder":
            return map_inputs(torch.clone, (inputs or {})[str(node.target)])  # the first operation may be in place
        if node.op == "get_attr" and node.target in self.constants:
            return self.constants[node.target]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return perform(self.model, self.modules, node.op, node.target, args, kwargs)

    def forget(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Drop the values that nothing after `node` reads."""
        for dead in self._dead_after.get(node, ()):
            values.pop(dead, None)

    def walk(
        self, x: Inputs, taps: Collection[str], edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Run on `x` and yield (name, value) at every tap in order of execution, stopping after the last of them.

        ``edits[name]`` replaces the value of a node before it is yielded and before later nodes read it. Values must
        be used before the walk goes on: an in-place operation further on may overwrite them. A node that carries a
        `ChannelAffine` is read after it: the value that the rest of the network sees.
        """
        edits = edits or {}
        self.check_names([*taps, *edits])
        wanted = {self.corrected(name): name for name in taps}
        values: dict[fx.Node, Any] = {}
        inputs = self.feed(x)
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

    def check_names(self, names: Iterable[str], others: Iterable[str] = ()) -> None:
        """Refuse a node that is not in the graph: KeyError with the nearest names, `others` among them."""
        for name in names:
            if name not in self.kinds:
                near = difflib.get_close_matches(name, [*others, *self.kinds], n=3) or sorted(self.kinds)[:8]
                raise KeyError(f"no node {name!r} in the graph; nearest: {', '.join(near)}")

    def run(self, x: Inputs, edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Any:
        """Output of the network, with the values of some nodes edited on the way."""
        ((_, output),) = self.walk(x, [self.nodes[-1].name], edits)
        return output

    def node(self, name: str) -> fx.Node:
        """The graph's node of that name."""
        self.check_names([name])
        return self._by_name[name]

    def weights(self) -> set[fx.Node]:
        """Nodes of parameters, and of what is computed from them alone."""
        return {node for node in self.nodes if node not in self.fed and node.name not in self.plain}

    def read_by_layers(self) -> set[fx.Node]:
        """Nodes whose values reach a layer, and so the output only through it.

        A product counts as a layer if one of its factors is a parameter, such as the prototypes of classes.
        """
        fixed = self.weights()
        read: set[fx.Node] = set()
        for node in reversed(self.nodes):
            kind = self.kinds[node.name].removeprefix("functional-")
            layer = kind in _LAYER_KINDS and (kind not in _PRODUCTS or fixed & {*node.all_input_nodes})
            if layer or node in read:
                read.update(node.all_input_nodes)
        return read

    def axis(self, name: str) -> int:
        """Axis of a node's value on which its units lie: 1 in maps of channels, the last one in tokens (n, t, units).

        Layers say where they are; other nodes keep the units of what they read where it goes.
        """
        return self._axes[name]

    @functools.cached_property
    def _axes(self) -> dict[str, int]:
        axes: dict[str, int] = {}
        fixed = self.weights()
        for node in self.nodes:
            shape, kind = self.shapes[node.name], self.kinds[node.name].removeprefix("functional-")
            sources = [s for s in node.all_input_nodes if s.name in axes]
            if kind == "layernorm":
                module = self.modules.get(node.target) if node.op == "call_module" else None
                given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
                given = self.plain[given.name] if isinstance(given, fx.Node) else given
                axes[node.name] = -len(module.normalized_shape if module else given)
            elif kind in ("matmul", "addmm") and node.args[-1] in fixed:
                axes[node.name] = -1  # the columns of a weight
            elif kind in _UNITS_LAST:
                axes[node.name] = -1
            elif kind == "affine":
                axes[node.name] = self.modules[node.target].axis
            elif kind in _UNITS_FIRST or not sources:
                axes[node.name] = 1
            elif kind in _MOVES:
                axes[node.name] = self._moved(node, sources[0], axes[sources[0].name])
            else:  # as that of the input which has the most axes; a value that is broadcast says nothing
                widths = [(len(like), len(like) > 1 and like[axes[s.name]] > 1)
                          for s in sources for like in [self.shapes[s.name] or ()]]  # fmt: skip
                axes[node.name] = axes[sources[widths.index(max(widths))].name]
            if shape is not None and len(shape) > 1:
                axes[node.name] %= len(shape)
        return axes

    def _moved(self, node: fx.Node, source: fx.Node, axis: int) -> int:
        """Where units on an axis of the input go when a node moves elements about."""
        shape = self.shapes[source.name]
        if shape is None or self.shapes[node.name] is None or len(shape) < 2:
            return axis
        values: dict[fx.Node, Any] = {}
        for each in node.all_input_nodes:
            like = self.shapes[each.name]
            values[each] = self.plain.get(each.name) if like is None else torch.zeros(()).expand(like)
        values[source] = along(torch.arange(1.0, shape[axis] + 1), len(shape), axis).expand(shape)
        try:
            out = self.compute(node, values)
        except Exception:  # an index that is no plain value, among others
            return axis
        varying = [i for i in range(1, out.ndim) if out.shape[i] > 1 and not (out == out.narrow(i, 0, 1)).all()]
        return varying[0] if varying else min(axis, out.ndim - 1)


# Attributes of layers that change no function in evaluation mode.
_OF_TRAINING = ("training", "p", "dropout", "inplace", "momentum", "checkpoint")


def check_graphs(first: TracedNet, *others: TracedNet) -> None:
    """Refuse networks of one state dict whose forwards differ, such as in a shortcut, a stride or a number of heads.

    Raises:
        ValueError: names the first node that differs.
    """
    state = first.model.state_dict()
    for other in others:
        for node, same in itertools.zip_longest(first.nodes, other.nodes):
            if node is None or same is None or _says(first, node) != _says(other, same):
                raise ValueError(
                    f"different architectures: the weights fit together, but forward differs at node "
                    f"'{(node or same).name}'"
                )
            if node.op == "get_attr" and node.target not in state:
                ours, theirs = first.compute(node, {}), other.compute(same, {})
                if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours.device)):
                    raise ValueError(f"constant {node.target!r} differs and is in no state dict: make it equal")


def _says(net: TracedNet, node: fx.Node) -> tuple:
    """All that a node does, but for the values of weights."""
    settings: dict[str, Any] = {}
    if node.op == "call_module":
        settings = {
            name: value
            for name, value in vars(net.modules[node.target]).items()
            if name not in _OF_TRAINING and isinstance(value, (bool, int, float, str, tuple, type(None)))
        }
    return node.op, str(node.target), str(node.args), str(node.kwargs), settings


def trace(model: nn.Module, example: Inputs) -> TracedNet:
    """Graph of a model, recorded in evaluation mode.

    Args:
        model: any module; its weights are shared, not copied. Code may branch on sizes, not on data.
        example: a batch of inputs (n, ...), of two examples or more if forward looks at sizes: a tensor, or several in
            a tuple or by name.

    Raises:
        UntraceableModel: forward depends on the data, or on the number of examples; the message names the line.
        TypeError, ValueError: the model is no ordinary network.

    >>> net = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3))
    >>> [name for name, kind in net.kinds.items() if kind]
    ['_0', '_1', '_2']
    """
    check_model(model)
    example = cast_input(example, model)
    tracer = record(model, example)
    net = TracedNet(model, tracer)
    if net.of_size:  # perhaps of this number of examples only
        n = count(example)
        times = max(2, math.ceil(tracer.rows / n))
        more = map_inputs(lambda x: torch.cat([x] * times) if x.ndim and len(x) == n else x, example)
        with untouched(model):
            try:
                found, expected = (tensors_in(each) for each in (net.run(more), call(inside(model), more)))
                same = all(
                    torch.allclose(a, b, 1e-2, 1e-4, equal_nan=True) for a, b in zip(found, expected, strict=True)
                )
            except (RuntimeError, ValueError, IndexError, TypeError):
                same = False
        if not same:
            raise UntraceableModel(
                f"{type(model).__name__}.forward uses the number of examples as a plain number (in range, int or a "
                "branch), so its graph is of this number only; use x.shape[0] in shapes, or -1"
            )
    return net
