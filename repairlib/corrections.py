"""Affine corrections of a network's nodes: what they are, where they go, and how they fold into ordinary weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, fx, nn

from repairlib.inputs import Inputs
from repairlib.moments import Moments
from repairlib.recording import ChannelAffine, along, copy_model
from repairlib.tracing import TracedNet, aliases, trace

TARGETS = ("conv", "linear", "block")
ROLES = (*TARGETS, "classifier", "stem", "inner", "shortcut", "norm")
FOLDABLE = (
    "conv",
    "conv-transpose",
    "linear",
    "batchnorm",
    "groupnorm",
    "layernorm",
)  # kinds whose weight and bias take a correction up

Units = Float64[Tensor, " units"]
Statistics = Mapping[str, tuple[Tensor, Tensor]]  # by node: mean and std of its channels, (units,) each


@dataclass(frozen=True)
class Correction:
    """Affine map of one node's channels: ``x_c -> gain_c x_c + shift_c``, both (units,) float64."""

    gain: Units
    shift: Units

    def apply(self, x: Tensor, axis: int = 1) -> Tensor:
        """The corrected activation, with units on one axis, in its own precision."""
        gain, shift = (along(each.to(x.dtype), x.ndim, axis) for each in (self.gain, self.shift))
        return (x * gain).add_(shift)  # as a `ChannelAffine`, bit for bit, with less memory


def correction(
    mean: Units,
    var: Units,
    dead: Shaped[Tensor, " units"],
    goal_mean: Units,
    goal_std: Units,
    correct: str = "repair",
    eps: float = 0.0,
    noise: Units | None = None,
) -> Correction:
    """Gain and shift that take (mean, var) to the goal, wholly or in part (Qu & Horvath 2024, Sec. 4.1).

    * repair: ``x -> (x - mean) / std * goal_std + goal_mean`` (Jordan et al. 2022, Sec. 4.2; Qu & Horvath's text swaps
      the names of the two goals);
    * rescale: ``x -> x / std * goal_std``, about zero, so that a bias is scaled as well;
    * reshift: ``x -> x - mean + goal_mean``.

    with ``std = sqrt(var + eps)``. With `noise`, gains are shrunk, see `renorm.Options`.

    Args:
        mean, var: present statistics of the channels (units,).
        dead: which channels are constant (units,), bool; they are shifted, and scaled only if eps is added.
        goal_mean, goal_std: (units,).
        correct, eps: see `renorm.Options`.
        noise: variance of the logarithm of each gain (units,), from measuring it on few examples.
    """
    if eps:
        dead = torch.zeros_like(dead)
    std = (var + eps).sqrt().masked_fill(dead, 1.0)
    gain = torch.ones_like(std) if correct == "reshift" else torch.where(dead, 1.0, goal_std / std)
    if noise is not None:
        gain = _shrink(gain, noise, ~dead & (gain > 0))
    return Correction(gain, torch.zeros_like(gain) if correct == "rescale" else goal_mean - gain * mean)


def _shrink(gain: Units, noise: Units, which: Shaped[Tensor, " units"]) -> Units:
    """Some of the gains, drawn towards their geometric mean as far as noise explains how they differ (empirical Bayes).

    ``log gain_c -> m + t / (t + noise_c) (log gain_c - m)``, with mean m, and variance t in excess of the mean noise.
    """
    if not which.any():
        return gain
    logs, noise = gain[which].log(), noise[which]
    spread = (logs.var(correction=0) - noise.mean()).clamp_min(0)
    share = spread / (spread + noise).clamp_min(torch.finfo(logs.dtype).tiny)
    return gain.masked_scatter(which, (logs.mean() + share * (logs - logs.mean())).exp())


def correct_moments(now: Moments, *, shrink: bool = False, **goal) -> Correction:
    """`correction` from measured moments to a goal (goal_mean, goal_std, correct, eps).

    With `shrink`, the moments have the reference beside the network, see `renorm.Options`.
    """
    noise = (1 - now.corr() ** 2).clamp_min(0) / now.examples if shrink else None
    return correction(now.mean(), now.var(), now.dead(), **goal, noise=noise)


@dataclass(frozen=True, repr=False)
class Repaired:
    """A renormalised network and how it was made; prints as a table.

    Attributes:
        model: the network with corrections folded into its weights where that is possible.
        corrections: by node, folded or not; none with ``method="batch"`` or from `reset`.
        visible: nodes whose correction no weight can take up, such as block outputs. If there are any, `model` is a
            torch.fx.GraphModule with a `ChannelAffine` after each of them (functional dropout in it stays as in
            evaluation); otherwise it has the original class and architecture.
        new_biases: layers that had no bias and received one.
        dead: by node, int64 indices of the channels that are constant on the data before their correction, if there are
            any. Pruning may have killed them. They are shifted, and no gain can bring them back.
        matching: how the second network was matched to the first, from `repairlib.merge`.
    """

    model: nn.Module
    corrections: dict[str, Correction]
    visible: tuple[str, ...] = ()
    new_biases: tuple[str, ...] = ()
    dead: dict[str, Tensor] = field(default_factory=dict)
    matching: Any = None

    def __repr__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.corrections)} corrected, {len(self.visible)} visible"]
        if self.dead:
            lines[0] += f"; constant channels: {', '.join(f'{len(c)} of {name}' for name, c in self.dead.items())}"
        width = max(map(len, ("node", *self.corrections)))
        if self.corrections:
            lines.append(f"{'node':{width}}  units  mean gain  correction")
        for name, fix in self.corrections.items():
            place = "visible" if name in self.visible else "folded"
            lines.append(f"{name:{width}}  {len(fix.gain):5d}  {float(fix.gain.mean()):9.3f}  {place}")
        return "\n".join(lines)


def target_nodes(net: TracedNet, targets: Iterable[str] = TARGETS) -> list[str]:
    """Names of the nodes to correct, in order of execution.

    Args:
        net: the traced network.
        targets: names of nodes, or roles; a name that equals a role means the role:

            * "conv", "linear": outputs of every hidden convolution (transposed or not), of every hidden linear layer;
            * "block": outputs of residual blocks, after their final activation;
            * "classifier": layers whose outputs no other layer reads, one of each head; they have no other role;
            * "stem": the first convolution or linear layer;
            * "shortcut": convolutions on the branch of a residual block that has fewer of them;
            * "inner": convolutions on the other branch, which Qu & Horvath's released code repairs in a ResNet;
            * "norm": outputs of normalisation layers.

    If an earlier REPAIR left a `ChannelAffine` after a node, its output is measured and corrected instead.

    Raises:
        KeyError: a name that is neither, with the nearest names.
        ValueError: the node of a name is no single tensor.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    names = [t for t in targets if t not in ROLES]
    net.check_names(names, ROLES)
    roles = _roles(net)
    chosen = {}
    for node in net.nodes:
        name = node.name
        if name in names or roles.get(name, set()).intersection(targets):
            if net.shapes[name] is None:
                raise ValueError(f"node {name!r} is no single tensor: name a node that reads it")
            chosen[net.corrected(name)] = name  # once, also where a node and its correction are both named
    return list(chosen.values())


def _roles(net: TracedNet) -> dict[str, set[str]]:
    """Roles of every node, in the words of `target_nodes`."""
    roles: dict[str, set[str]] = {}

    def mark(role: str, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            roles.setdefault(node.name, set()).add(role)

    before: dict[fx.Node, set[fx.Node]] = {}  # all that a node's value depends on, itself included
    layers: list[tuple[fx.Node, str]] = []
    read = net.read_by_layers()
    inner: set[fx.Node] = set()
    shortcuts: set[fx.Node] = set()
    for node in net.nodes:
        kind, users = net.kinds[node.name].removeprefix("functional-"), list(node.users)
        before[node] = {node}.union(*(before[source] for source in node.all_input_nodes))
        follower = net.kinds[users[0].name] if len(users) == 1 else ""
        if kind in ("conv", "conv-transpose", "linear"):
            layers.append((node, kind.removesuffix("-transpose")))
        elif kind in ("batchnorm", "layernorm", "groupnorm"):
            mark("norm", [node])
        elif kind == "add" and net.shapes[node.name] is not None:
            # Two branches: one that starts at a parameter (Fixup's biases, a position embedding) is none.
            ends = [s for s in node.all_input_nodes if any(n.op == "placeholder" for n in before[s])]
            if len(ends) == 2:
                mark("block", users if follower == "activation" else [node])
                only = [before[a] - before[b] for a, b in (ends, ends[::-1])]  # back to their common ancestor
                fewer, more = sorted(
                    ({n for n in side if net.kinds[n.name].endswith("conv")} for side in only), key=len
                )
                inner |= more
                (shortcuts if len(fewer) < len(more) else inner).update(fewer)
    hidden = [(node, kind) for node, kind in layers if node in read]
    for node, kind in hidden:
        mark(kind, [node])
    mark("stem", (node for node, _ in hidden[:1]))
    mark("classifier", (node for node, _ in layers if node not in read))
    mark("shortcut", shortcuts)
    mark("inner", inner - shortcuts - {node for node, _ in hidden[:1]})
    return roles


def batchnorms(net: TracedNet) -> dict[str, fx.Node]:
    """Nodes of BatchNorm layers with running statistics, by name."""
    return {
        node.name: node
        for node in net.nodes
        if net.kinds[node.name] == "batchnorm" and net.modules[node.target].running_mean is not None
    }


def attach(net: TracedNet, corrections: Mapping[str, Correction | ChannelAffine]) -> fx.GraphModule:
    """Put every correction, by node name, into a traced model as a visible `ChannelAffine` after its node."""
    out = net.model
    like = next(out.parameters())
    for name, fix in corrections.items():
        node = net.node(name)
        module = f"{name}_affine"
        ready = fix if isinstance(fix, ChannelAffine) else ChannelAffine(fix.gain, fix.shift, net.axis(name))
        out.add_module(module, ready.to(like))
        with net.graph.inserting_after(node):
            after = net.graph.call_module(module)
        node.replace_all_uses_with(after)
        after.args = (node,)
    for name, value in net.constants.items():
        out.register_buffer(name, value, persistent=False)
    graph_module = fx.GraphModule(out, net.graph, class_name=type(out).__name__)
    graph_module.training = out.training  # submodules keep the flags that they have
    return graph_module


def foldable(net: TracedNet, names: Iterable[str]) -> list[str]:
    """Those of some nodes whose correction goes into weights: of a layer that is called once and owns its weights.

    An earlier REPAIR's `ChannelAffine` behind a node takes corrections up as well.
    """
    calls = [node.target for node in net.nodes if node.op == "call_module"]
    known = aliases(net.model)
    # A weight's shape or precision may be read by anybody.
    read = {node.target for node in net.nodes
            if node.op == "get_attr" and any(user.name not in net.plain for user in node.users)}  # fmt: skip

    def is_own(layer: Any) -> bool:
        """Whether nobody else reads a layer's weight and bias, and nothing overwrites them before its forward."""
        tensors = [p for p in (layer._parameters.get("weight"), layer._parameters.get("bias")) if p is not None]
        mine = [name for tensor in tensors for name in known.get(id(tensor), [])]
        plain = layer._parameters.get("weight") is not None and not (layer._forward_pre_hooks or layer._forward_hooks)
        return plain and "bias" in layer._parameters and len(mine) == len(tensors) and not read.intersection(mine)

    def folds(name: str) -> bool:
        name = net.corrected(name)
        target = net.node(name).target
        once = net.kinds[name] in (*FOLDABLE, "affine") and calls.count(target) == 1
        return once and is_own(net.modules[target])

    return [name for name in names if folds(name)]


def fold(net: TracedNet, corrections: dict[str, Correction]) -> Repaired:
    """Put corrections into a traced model's ordinary weights (Jordan et al. 2022, Sec. 4.2; Markus 2018).

    ``W' = gain W``, ``b' = gain b + shift``. Without a bias, a BatchNorm that follows takes the shift,
    ``running_mean' = running_mean - shift``; otherwise a shift other than 0 becomes a new bias. A correction stays
    visible, as a `ChannelAffine`, where it is not `foldable`: where its node is no convolution, linear or normalisation
    layer, where that layer is called twice, and where its weight is shared or computed (pruning, weight norm). A node's
    mean may be right only behind a BatchNorm that took the shift. The model itself changes.
    """
    out = net.model
    calls = [node.target for node in net.nodes if node.op == "call_module"]
    norms, ready = batchnorms(net), foldable(net, corrections)

    visible, new_biases = {}, []
    for name, fix in corrections.items():
        node = net.node(name)
        layer, users = net.modules.get(str(node.target)), list(node.users)
        if type(layer) is ChannelAffine:  # of an earlier REPAIR
            _scale(layer, fix.gain, fix.shift)
            continue
        if name not in ready:
            visible[name] = fix
            continue
        shift: Tensor | None = fix.shift
        if layer.bias is None:
            if len(users) == 1 and users[0].name in norms and calls.count(users[0].target) == 1:
                net.modules[users[0].target].running_mean.sub_(fix.shift)
                shift = None
            elif fix.shift.any():
                new_biases.append(str(node.target))
            else:
                shift = None
        _scale(layer, fix.gain.to(layer.weight.device), shift)
    if visible:
        out = attach(net, visible)
    return Repaired(out, corrections, tuple(visible), tuple(new_biases))


@torch.no_grad()
def _scale(layer: Any, gain: Units, shift: Units | None, center: Units | float = 0.0) -> None:
    """Let a layer compute ``gain (layer(x) - center) + shift``, in float64; no shift leaves the bias as it is."""
    weight = layer.weight.double()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (inputs, outputs / groups, ...), group after group
        parts = weight.unflatten(0, (layer.groups, -1))
        layer.weight.copy_((parts * along(gain.view(layer.groups, -1), parts.ndim, (0, 2))).flatten(0, 1))
    else:
        layer.weight.copy_(weight * along(gain, weight.ndim, 0))
    if shift is None:
        return
    like = weight if isinstance(layer, nn.LayerNorm) else gain  # whose bias may have several axes
    bias = (torch.zeros_like(like) if layer.bias is None else layer.bias.double()) - center
    bias = bias * along(gain, bias.ndim, 0) + along(shift, bias.ndim, 0)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
    else:
        layer.bias.copy_(bias)


def fold_batchnorms(model: nn.Module, example: Inputs) -> nn.Module:
    """Copy of a model in evaluation mode, every BatchNorm folded into the convolution or linear layer before it.

        W' = W g / sqrt(v + eps),   b' = (b - m) g / sqrt(v + eps) + beta

    per output channel, with running mean m and variance v, gain g and shift beta; in float64, so that outputs stay the
    same to rounding. Where a BatchNorm was, an Identity is left.

    Args:
        model: any network. Untouched.
        example: a batch of inputs (n, ...), to trace with.

    Raises:
        ValueError: a BatchNorm (named) does not directly follow such a layer, or has no running statistics.
    """
    model = copy_model(model).eval()
    calls = [node for node in trace(model, example).nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    for node in calls:
        norm, source = model.get_submodule(str(node.target)), node.args[0]
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        layer = model.get_submodule(str(source.target)) if source.op == "call_module" else None
        convs = (nn.modules.conv._ConvNd, nn.Linear)
        if not isinstance(layer, convs) or len(source.users) > 1 or norm.running_var is None:
            raise ValueError(f"cannot fold {node.target!r}: it does not follow one convolution or linear layer alone, "
                             "or keeps no running statistics")  # fmt: skip
        if max(targets.count(node.target), targets.count(source.target)) > 1:
            raise ValueError(f"cannot fold {node.target!r}: the layer is used more than once")
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        gain = gain if norm.weight is None else gain * norm.weight.detach().double()
        shift = torch.zeros_like(gain) if norm.bias is None else norm.bias.detach().double()
        _scale(layer, gain, shift, norm.running_mean.double())
        model.set_submodule(str(node.target), nn.Identity())
    return model
