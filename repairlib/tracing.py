"""Networks as graphs of named nodes, and the inputs that are run through them.

Every algorithm of the library reads activations by the names of nodes (taps), whatever the network's modules are.
"""

import contextlib
import difflib
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler


class UntraceableModel(ValueError):
    """The model's forward cannot be written as a graph; the message names the last node reached."""


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


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """Names of every tensor in the state dict, by the tensor's `id`; a tied weight has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return names


class _Kept:
    """Batches of an iterator, kept as they are read: the same in every pass, and no more of them than are read."""

    def __init__(self, batches: Iterable):
        self.rest, self.kept = iter(batches), []

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
        TypeError: not batches, but examples, one batch that is no tensor, or something else; the message says the way.
    """
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, (Mapping, np.ndarray, str)):
        raise TypeError(f"batches are an iterable of tensors x or pairs (x, y), not {type(data).__name__}: {_WAYS}")
    if isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data):
        raise TypeError("a tuple of tensors could be one batch (x, y): pass [(x, y)], or a list of batches")
    if isinstance(data, Dataset):
        raise TypeError(f"{type(data).__name__} is a Dataset of single examples: pass a DataLoader of it")
    if isinstance(data, DataLoader):
        plain = type(data.batch_sampler) is BatchSampler
        order = data.batch_sampler.sampler if plain else data.sampler if data.batch_sampler is None else None
        return data if isinstance(order, SequentialSampler) else _Kept(data)
    return _Kept(data) if isinstance(data, Iterator) else data


_WAYS = (
    "of a dictionary, pass [(batch['image'], batch['label']) for batch in loader] with your own names; of an array, "
    "torch.as_tensor(array)"
)


def cast_input(x: Tensor, model: nn.Module) -> Tensor:
    """Inputs on a model's device; floating ones in its precision, integers (tokens) as they are."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return x.to(like.device, like.dtype if x.is_floating_point() else None)


class Batches:
    """Inputs of any iterable of batches, re-iterable, on a model's device and in its precision.

    Args:
        data: batches x or (x, y, ...), see `as_batches`. Empty batches are skipped.
        model: network that will read them.
        limit: number of examples to stop after; a loader that shuffles then gives other ones in each pass.

    Raises:
        TypeError: a batch is no tensor and does not begin with one.
    """

    def __init__(self, data: Iterable, model: nn.Module, limit: int | None = None):
        self.data = as_batches(data)
        self.model = model
        self.limit = limit

    def __iter__(self) -> Iterator[Tensor]:
        left = self.limit
        for batch in self.data:
            if left == 0:
                return
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"a batch must be a tensor or begin with one, not {type(x).__name__}: {_WAYS}")
            if left is not None:
                x = x[:left]
                left -= len(x)
            if len(x):
                yield cast_input(x, self.model)

    def example(self) -> Tensor:
        """First two inputs of the first batch; ValueError if there is none."""
        for x in self:
            return x[:2]
        raise ValueError("the calibration data is empty: it has no batch to measure statistics on")


def along(values: Tensor, ndim: int, axis: int | tuple[int, ...] = 1) -> Tensor:
    """View of values, one a channel, that broadcasts along an axis of a tensor of `ndim` axes, or along several."""
    places = dict(zip((axis,) if isinstance(axis, int) else axis, values.shape, strict=True))
    return values.view([places.get(i, 1) for i in range(ndim)])


def affine(x: Tensor, gain: Float[Tensor, " channels"], shift: Float[Tensor, " channels"]) -> Tensor:
    """Affine map of the channels of x (n, channels, ...): ``y_c = gain_c x_c + shift_c``."""
    return x * along(gain, x.ndim) + along(shift, x.ndim)


class ChannelAffine(nn.Module):
    """Visible correction of a node: ``y_c = weight_c x_c + bias_c`` for inputs (n, c, ...)."""

    def __init__(self, weight: Float[Tensor, " channels"], bias: Float[Tensor, " channels"]):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "n channels ..."]) -> Float[Tensor, "n channels ..."]:
        return affine(x, self.weight, self.bias)


class _Tracer(fx.Tracer):
    """Keeps corrections whole, so that a repaired network has the node names of the network it came from."""

    proxy_buffer_attributes = True  # what is computed from buffers is part of the graph, not a constant

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, ChannelAffine) or super().is_leaf_module(module, name)


_NO_INPUT, _NOTHING = object(), iter(())
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
    """Graph of a model's named nodes, which can be run, read and edited; the weights are the model's own.

    ``kinds[name]`` is the kind of a node ("conv", "linear", "batchnorm", "activation", "add", "pool", ..., or "") and
    ``shapes[name]`` the shape of its value for the example, None if it is no tensor.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, example: Tensor):
        self.model = model
        self.graph = graph
        self.modules: dict[Any, Any] = dict(model.named_modules())  # by the target of a node
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
        self.shapes: dict[str, Any] = {}
        self.plain: dict[str, object] = {}  # values that hold no tensor: sizes and what is computed from them
        values: dict[fx.Node, Any] = {}
        inputs = iter((example,))
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
        return _KIND_OF_NAME.get(str(node.target), "") if node.op == "call_method" else ""

    def compute(self, node: fx.Node, values: dict[fx.Node, Any], inputs: Iterator = _NOTHING) -> Any:
        """Value of one node from the values of the nodes before it; `inputs` feeds the placeholders."""
        target: Any = node.target
        if node.op == "placeholder":
            value = next(inputs, node.args[0] if node.args else _NO_INPUT)
            if value is _NO_INPUT:
                raise UntraceableModel(f"forward needs a second input, {target!r}; wrap it to take one tensor")
            return value.clone() if isinstance(value, Tensor) else value  # the first operation may be in place
        if node.op == "get_attr":
            return operator.attrgetter(target)(self.model)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_module":
            return self.modules[target](*args, **kwargs)
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return args[0]  # output

    def forget(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Drop the values that nothing after `node` reads."""
        for dead in self._dead_after.get(node, ()):
            values.pop(dead, None)

    def walk(
        self, x: Tensor, taps: Collection[str], edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None
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

    def check_names(self, names: Iterable[str], others: Iterable[str] = ()) -> None:
        """Refuse a node that is not in the graph: KeyError with the nearest names, `others` among them."""
        for name in names:
            if name not in self.kinds:
                near = difflib.get_close_matches(name, [*others, *self.kinds], n=3) or sorted(self.kinds)[:8]
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
    return TracedNet(model, graph_of(model), example)


def graph_of(model: nn.Module) -> fx.Graph:
    """Graph of a model's operations, recorded in evaluation mode; raises what `trace` does."""
    tracer = _Tracer()
    with eval_mode(model):
        try:
            return tracer.trace(model)
        except Exception as error:
            nodes = list(getattr(tracer, "graph", fx.Graph()).nodes)
            last = f"after node '{nodes[-1].name}' ({nodes[-1].target})" if nodes else "at its first line"
            raise UntraceableModel(
                f"{type(model).__name__}.forward cannot be traced {last}: {error}. Control flow that depends on the "
                "data is not a graph; move it out of forward or make it a leaf module."
            ) from error
