"""One rule for every kind of node: which hidden units may change places, and which axes of weights hold them.

Every element of every activation carries the number of the unit it belongs to. Reshaping an activation reshapes its
numbers, adding two activations identifies their numbers, and a layer's weight axis inherits the numbers of its input.
"""

import functools
import operator
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from repairlib.graph import TracedNet

# Unit numbers of what has no unit: constants, equal for all units (padding with zeros makes them), and of what may not
# move, network inputs and outputs.
FREE, FIXED = 0, 1
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


class UnsupportedNode(ValueError):
    """A node of the graph has no permutation rule; the message names the node and the missing rule."""


def varies(x: Tensor, axis: int) -> bool:
    return x.shape[axis] > 1 and x.stride(axis) != 0


def _thin(x: Tensor) -> Tensor:
    """The labels without repetition: length 1 on every axis along which they do not differ."""
    return x[tuple(slice(None) if varies(x, axis) else slice(0, 1) for axis in range(x.ndim))]


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


class Labels:
    """Unit numbers of every activation and weight axis while the graph is walked.

    Operations that only move elements about (reshape, concatenate, pad, ...) are run on the labels themselves. Where a
    rule needs units to move together that need not, it identifies them: that loses a symmetry and never invents one.
    """

    def __init__(self, net: "TracedNet"):
        self.net = net
        self.count = 2  # FREE and FIXED
        self.values: dict[fx.Node, object] = {}  # labels (or tuples of labels) in the shape of the node's value
        self.fed: set[fx.Node] = set()  # nodes that depend on the input
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
        where = tuple(slice(None) if varies(a, i) or varies(b, i) else slice(0, 1) for i in range(a.ndim))
        a, b = a[where].flatten(), b[where].flatten()
        known = (a != b) & (a != FREE) & (b != FREE)
        self.same.append((a[known], b[known]))

    def fix(self, x: Tensor) -> None:
        self.identify(x, torch.tensor(FIXED))

    def check(self, tensor: str) -> None:
        if tensor not in self.aliases:
            what = repr(tensor) if isinstance(tensor, str) else "a weight"
            raise UnsupportedNode(
                f"{what} is no parameter but computed from others (weight norm, a parametrization, pruning); "
                "make it permanent first, with torch.nn.utils.parametrize or prune's remove function"
            )

    def mark(self, tensor: str, axis: int, units: Tensor) -> None:
        """Say that an axis of a parameter or buffer indexes `units`; a shared module says it more than once."""
        self.check(tensor)
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
        self.check(name)
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
        over_a = [i for i in range(rank) if a.shape[i] == 1 and varies(b, i)]
        over_b = [i for i in range(rank) if b.shape[i] == 1 and varies(a, i)]
        if over_a and over_b:
            self.fix(a)
            self.fix(b)
            return torch.tensor(FIXED).expand(shape)
        if over_a or over_b:  # a few values, each used by many units
            few, many = (a, b) if over_a else (b, a)
            if not any(varies(few, i) and varies(many, i) for i in range(rank)):
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
        inside = any(varies(x, i) for i in axes)
        if inside and any(varies(x, i) for i in range(x.ndim) if i not in axes):
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
            if isinstance(name, str | Tensor):  # of rms_norm, the third is a number
                x = self.combine(x, self.labels(name))
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
        equation, *sources = node.args
        sources = sources[0] if isinstance(sources[0], tuple | list) else sources
        inputs, output = equation.replace(" ", "").split("->")
        letters = sorted(set(inputs) - {","})
        aligned = []
        for names, source in zip(inputs.split(","), sources, strict=True):
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
        if node.op == "placeholder" or self.fed.intersection(node.all_input_nodes):
            self.fed.add(node)
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
        marked = [units for units in self.axes.values() if units is not None] + [units for units, _ in self.apart]
        uses = torch.bincount(torch.cat([root, *(root[units].flatten() for units in marked)]))
        for name, elements in self.leaves.items():
            units = torch.where(uses[root[elements]] > 1, root[elements], FREE)  # positions beyond the input's length
            chosen = None
            for axis in range(units.ndim):
                rows = units.movedim(axis, -1).reshape(-1, units.shape[axis])
                on_axis = rows.amax(0)
                if ((rows == on_axis) | (rows == FREE)).all() and len(on_axis.unique()) > 1:
                    chosen = axis
                    self.mark(name, axis, torch.where(on_axis == FREE, FIXED, on_axis))
            if chosen is None:
                self.fix(elements)
            for axis in range(units.ndim):
                if axis != chosen and self.axes.get((name, axis)) is not None:
                    self.fix(self.axes[name, axis])
        return self.resolve()
