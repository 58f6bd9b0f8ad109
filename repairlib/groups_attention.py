"""Permutation rules of what no network of the papers has: attention, products, embeddings, recurrent layers.

Importing the module registers them beside those of `repairlib.groups`; a rule for a user's own node is added the same
way.
"""

import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from repairlib.groups import Labels, UnsupportedNode, fixed, rule, softmax, spread
from repairlib.recording import tensors_in


@rule("embedding", arguments="weight")
def embedding(labels: Labels, node, x, weight, **_):
    shape = labels.net.shapes[node.name]
    return spread(labels.produce(weight, None, labels.fresh(shape[-1]), 1), shape, -1)


@rule("normalize", arguments="p dim")
def normalize(labels: Labels, node, x, p=2.0, dim=1, **_):
    return softmax(labels, node, x, dim)


def product(labels: Labels, a: Tensor, b: Tensor) -> Tensor:
    """Labels of a matrix product over the last two axes."""
    return labels.collapse(labels.combine(a.unsqueeze(-1), b.unsqueeze(-3)), [-2]).squeeze(-2)


@rule("matmul")
def matmul(labels: Labels, node):
    a, b = node.args[:2]
    shapes = [labels.net.shapes[source.name] for source in (a, b)]
    weights = [labels.weight(source) for source in (a, b)]
    if weights[1] is not None and weights[0] is None and len(shapes[1]) == 2:
        return labels.layer(labels.units(a), weights[1], None, shapes[1][1], sides=(0, 1))
    if weights[0] is not None and weights[1] is None and len(shapes[0]) == 2 and len(shapes[1]) > 1:
        return labels.layer(labels.units(b), weights[0], None, shapes[0][0], axis=-2)
    return product(labels, labels.units(a), labels.units(b))


@rule("addmm")
def addmm(labels: Labels, node):
    bias, x, weight = node.args
    out = labels.layer(labels.units(x), labels.weight(weight), None, labels.net.shapes[weight.name][1], sides=(0, 1))
    return labels.combine(out, labels.units(bias))


@rule("einsum")
def einsum(labels: Labels, node):
    equation, *sources = node.args
    sources = sources[0] if isinstance(sources[0], tuple | list) else sources
    inputs, output = equation.replace(" ", "").split("->")
    names = inputs.split(",")
    ranks = [len(labels.net.shapes[source.name]) for source in sources]
    more = max(rank - len(each.replace("...", "")) for each, rank in zip(names, ranks, strict=True))
    rest = "ABCDEFGH"[:more]  # the axes that an ellipsis stands for
    output = output.replace("...", rest)
    names = [
        each.replace("...", rest[more - (rank - len(each) + 3) :]) for each, rank in zip(names, ranks, strict=True)
    ]
    for i, weight in enumerate(map(labels.weight, sources)):
        own, other = names[i], names[1 - i] if len(names) == 2 else ""
        summed, made = set(own) & set(other) - set(output), set(own) & set(output) - set(other)
        if weight is not None and len(own) == 2 and len(summed) == len(made) == 1 and set(own) == summed | made:
            axis = other.index(*summed)
            sides = own.index(*summed), own.index(*made)
            out = labels.net.shapes[sources[i].name][sides[1]]
            x = labels.layer(labels.units(sources[1 - i]), weight, None, out, axis, sides)
            now = other.replace(*summed, *made)
            return x.permute([now.index(letter) for letter in output])
    letters = sorted(set("".join(names)))
    aligned = []
    for own, source in zip(names, sources, strict=True):
        x = labels.units(source).permute([own.index(i) for i in letters if i in own])
        aligned.append(x[tuple(slice(None) if i in own else None for i in letters)])
    summed_axes = [axis for axis, i in enumerate(letters) if i not in output]
    x = labels.collapse(functools.reduce(labels.combine, aligned), summed_axes)
    left = [i for i in letters if i in output]
    return x[tuple(slice(None) if i in output else 0 for i in letters)].permute([left.index(i) for i in output])


@rule("bilinear", arguments="weight bias")
def bilinear(labels: Labels, node, x, weight, bias=None):
    shape = labels.net.shapes[node.name]
    for axis, source in enumerate(node.args, start=1):
        labels.mark(weight, axis, labels.channels(labels.units(source), -1))
    return spread(labels.produce(weight, bias, labels.fresh(shape[-1])), shape, -1)


@rule("recurrent")
def recurrent(labels: Labels, node) -> Any:
    """LSTM, GRU, RNN and their cells: a unit moves with its gates, in the weights of inputs and of the last state."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
    x, states = labels.units(node.args[0]), tensors_in(fx.node.map_arg(given, labels.units))
    layer, name = labels.net.modules[node.target], node.target
    cell = isinstance(layer, nn.modules.rnn.RNNCellBase)
    gates = layer.weight_hh.shape[0] // layer.hidden_size if cell else len(layer.weight_hh_l0) // layer.hidden_size
    projected = 0 if cell else layer.proj_size
    ends = (
        [""]
        if cell
        else [f"_l{i}{d}" for i in range(layer.num_layers) for d in (["", "_reverse"] if layer.bidirectional else [""])]
    )
    seen: list[Tensor] = []  # outputs of this layer's directions
    last: list[Tensor] = []
    hidden: list[Tensor] = []
    inputs = labels.channels(x, -1)
    for place, ending in enumerate(ends):
        own = labels.fresh(layer.hidden_size)
        out = labels.fresh(projected) if projected else own
        for kind, units in (("ih", inputs), ("hh", out)):
            labels.mark(f"{name}.weight_{kind}{ending}", 1, units)
            labels.produce(
                f"{name}.weight_{kind}{ending}",
                f"{name}.bias_{kind}{ending}" if layer.bias else None,
                own.repeat(gates),
            )
        if projected:
            labels.mark(f"{name}.weight_hr{ending}", 1, own)
            labels.produce(f"{name}.weight_hr{ending}", None, out)
        seen.append(out)
        last.append(out)
        hidden.append(own)
        if cell or not layer.bidirectional or place % 2:
            inputs, seen = torch.cat(seen), []

    def stack(units: list[Tensor]) -> Tensor:
        rows = units[0] if cell else torch.stack(units)[:, None]
        return rows.expand(len(x), -1) if cell else rows.expand(-1, x.shape[0 if layer.batch_first else 1], -1)

    for state, own_units in zip(states, (last, hidden), strict=False):
        labels.identify(state, stack(own_units))
    lstm = isinstance(layer, (nn.LSTM, nn.LSTMCell))
    end = (stack(last), stack(hidden)) if lstm else stack(last)
    return end if cell else (spread(inputs, (*x.shape[:-1], len(inputs)), -1), end)


@rule("dot-attention", arguments="key value attn_mask")
def dot_attention(labels: Labels, node, query, key, value, attn_mask=None, **_):
    scores = product(labels, query, labels.read(key).transpose(-1, -2))
    if attn_mask is not None:
        scores = labels.combine(scores, labels.read(attn_mask))
    return product(labels, softmax(labels, node, scores, -1), labels.read(value))


@rule("attention", arguments="key value key_padding_mask need_weights attn_mask average_attn_weights")
def attention(
    labels: Labels, node, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options
):
    if need_weights and not options.get("average_attn_weights", True):
        raise UnsupportedNode("the weights of each head as an output")
    module, name, shape = labels.net.modules[node.target], node.target, query.shape
    heads = labels.fresh(module.num_heads).repeat_interleave(module.head_dim)  # a head moves as one unit
    packed = module.in_proj_weight is not None
    for part, x in zip("qkv", (query, key, value), strict=True):
        weight = f"{name}.in_proj_weight" if packed else f"{name}.{part}_proj_weight"
        labels.mark(weight, 1, labels.channels(labels.read(x), -1))
        labels.mark(weight, 0, heads.repeat(3) if packed else heads)
    for parameter, axis, units in (("in_proj_bias", 0, heads.repeat(3)), ("bias_k", 2, heads), ("bias_v", 2, heads)):
        if getattr(module, parameter) is not None:
            labels.mark(f"{name}.{parameter}", axis, units)
    for mask in (key_padding_mask, attn_mask):
        if mask is not None:
            labels.fix(labels.read(mask))
    labels.mark(f"{name}.out_proj.weight", 1, heads)
    bias = None if module.out_proj.bias is None else f"{name}.out_proj.bias"
    out = spread(labels.produce(f"{name}.out_proj.weight", bias, labels.fresh(shape[-1])), shape, -1)
    weights = (shape[0], *(labels.read(x).shape[1] for x in (query, key))) if module.batch_first else (1, 1, 1)
    return out, fixed(weights)


@rule(
    "window-attention",
    arguments="qkv_weight proj_weight relative_position_bias window_size num_heads shift_size attention_dropout "
    "dropout qkv_bias proj_bias logit_scale",
)
def window_attention(labels: Labels, node, x, qkv_weight, proj_weight, relative_position_bias, num_heads, **options):
    heads = labels.fresh(num_heads)
    rows = heads.repeat_interleave(x.shape[-1] // num_heads)  # a head moves as one unit
    labels.mark(qkv_weight, 1, labels.channels(x, -1))
    labels.produce(qkv_weight, options.get("qkv_bias"), rows.repeat(3))
    labels.identify(labels.read(relative_position_bias), spread(heads, (1, num_heads, 1, 1), 1))
    if options.get("logit_scale") is not None:
        labels.mark(options["logit_scale"], 0, heads)
    labels.mark(proj_weight, 1, rows)
    return spread(labels.produce(proj_weight, options.get("proj_bias"), labels.fresh(x.shape[-1])), x.shape, -1)
