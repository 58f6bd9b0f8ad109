"""Permutation rules of what no network of the papers has: attention, products of activations, embeddings.

Importing the module registers them beside those of `repairlib.groups`; a rule for a user's own node is added the same
way.
"""

import functools

from torch import Tensor

from repairlib.groups import Labels, UnsupportedNode, fixed, rule, softmax, spread


@rule("embedding", arguments="weight")
def embedding(labels: Labels, node, x, weight):
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
    a, b = node.args
    if b.op == "get_attr" and len(labels.net.shapes[b.name]) == 2:
        shape = labels.net.shapes[node.name]
        labels.mark(b.target, 0, labels.channels(labels.units(a), -1))
        return spread(labels.produce(b.target, None, labels.fresh(shape[-1]), 1), shape, -1)
    return product(labels, labels.units(a), labels.units(b))


@rule("einsum")
def einsum(labels: Labels, node):
    equation, *sources = node.args
    sources = sources[0] if isinstance(sources[0], tuple | list) else sources
    inputs, output = equation.replace(" ", "").split("->")
    letters = sorted(set(inputs) - {","})
    aligned = []
    for names, source in zip(inputs.split(","), sources, strict=True):
        x = labels.units(source).permute([names.index(i) for i in letters if i in names])
        aligned.append(x[tuple(slice(None) if i in names else None for i in letters)])
    summed = [axis for axis, i in enumerate(letters) if i not in output]
    x = labels.collapse(functools.reduce(labels.combine, aligned), summed)
    left = [i for i in letters if i in output]
    return x[tuple(slice(None) if i in output else 0 for i in letters)].permute([left.index(i) for i in output])


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
