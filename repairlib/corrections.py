"""Affine corrections of a network's nodes: where they go, as visible modules or folded into ordinary weights."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, fx, nn

from repairlib.tracing import ChannelAffine, TracedNet, trace

TARGETS = ("conv", "linear", "block")
ROLES = (*TARGETS, "classifier", "stem", "inner", "shortcut", "norm")
FOLDABLE = ("conv", "linear", "batchnorm", "groupnorm", "layernorm")  # kinds whose weight and bias take a correction up

Units = Float64[Tensor, " units"]


@dataclass(frozen=True)
class Correction:
    """Affine map of one node's channels: ``x_c -> gain_c x_c + shift_c``, both (units,) float64."""

    gain: Units
    shift: Units

    def apply(self, x: Shaped[Tensor, "n units *rest"]) -> Shaped[Tensor, "n units *rest"]:
        """The corrected activation (n, units, ...), in its own precision."""
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x * self.gain.to(x.dtype).view(shape) + self.shift.to(x.dtype).view(shape)


@dataclass(frozen=True, repr=False)
class Repaired:
    """A renormalised network and how it was made; prints as a table.

    Attributes:
        model: the network with corrections folded into its weights where that is possible.
        corrections: by node, whether folded or not; none with ``method="batch"``, which corrects every batch anew, and
            none of `reset`, which measures BatchNorm statistics only.
        visible: nodes whose correction no weight can take up (block outputs); `model` then is a torch.fx.GraphModule
            with a `ChannelAffine` after each of them, and functional dropout in it stays as in evaluation. Empty:
            `model` is of the original class and architecture.
        new_biases: layers that had no bias and received one.
    """

    model: nn.Module
    corrections: dict[str, Correction]
    visible: tuple[str, ...] = ()
    new_biases: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.corrections)} corrected, {len(self.visible)} visible"]
        width = max(map(len, ("node", *self.corrections)))
        if self.corrections:
            lines.append(f"{'node':{width}}  units  mean gain  correction")
        for name, fix in self.corrections.items():
            place = "visible" if name in self.visible else "folded"
            lines.append(f"{name:{width}}  {len(fix.gain):5d}  {float(fix.gain.mean()):9.3f}  {place}")
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- what to correct


def target_nodes(net: TracedNet, targets: Iterable[str] = TARGETS) -> list[str]:
    """Names of the nodes to correct, in order of execution.

    Args:
        net: the traced network.
        targets: any of these, or names of nodes that are called otherwise:

            * "conv", "linear": outputs of every convolution, of every hidden linear layer;
            * "block": outputs of residual blocks, after their final activation;
            * "classifier": the convolution or linear layer that runs last, which is neither "conv" nor "linear";
            * "stem": the one that runs first;
            * "shortcut": convolutions on the branch of a residual block that has fewer of them;
            * "inner": those on the other branch, which are what Qu & Horvath's released code repairs in a ResNet;
            * "norm": outputs of normalisation layers, with channels on axis 1 again where these were moved.

    A node that carries a `ChannelAffine` from an earlier REPAIR stands for what leaves that module.

    Raises:
        KeyError: a name that is neither, with the nearest node names.
        ValueError: a linear layer or LayerNorm on (n, tokens, features), whose units are not on axis 1.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    names = [t for t in targets if t not in ROLES]  # a node may be called like a role: the role is meant
    net.check_names(names)
    roles = _roles(net)
    chosen = {}
    for node in net.nodes:
        name = node.name
        if name in names or roles.get(name, set()).intersection(targets):
            if net.kinds[name].endswith(("linear", "layernorm")) and len(net.shapes[name]) != 2:
                raise ValueError(
                    f"node {name!r}: the units of a {net.kinds[name]} node on {net.shapes[name]} are not on axis 1"
                )
            chosen[net.corrected(name)] = name  # once, also where a node and its correction are both named
    return list(chosen.values())


def _roles(net: TracedNet) -> dict[str, set[str]]:
    """By node, what it is in the words of `target_nodes`."""
    roles: dict[str, set[str]] = {}

    def mark(role: str, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            roles.setdefault(node.name, set()).add(role)

    before: dict[fx.Node, set[fx.Node]] = {}  # all that a node's value depends on, itself included
    layers, inner, shortcuts = [], set(), set()
    for node in net.nodes:
        kind, users = net.kinds[node.name].removeprefix("functional-"), list(node.users)
        before[node] = {node}.union(*(before[source] for source in node.all_input_nodes))
        follower = net.kinds[users[0].name] if len(users) == 1 else ""
        if kind in ("conv", "linear"):
            layers.append((node, kind))
        elif kind in ("batchnorm", "layernorm", "groupnorm"):
            mark("norm", users if follower == "permute" else [node])
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
    hidden, last = layers[:-1], layers[-1:]
    for node, kind in hidden:
        mark(kind, [node])
    mark("stem", (node for node, _ in hidden[:1]))
    mark("classifier", (node for node, _ in last))
    mark("shortcut", shortcuts)
    mark("inner", inner - shortcuts - {node for node, _ in hidden[:1]})
    return roles


# ------------------------------------------------------------------------------------------------ attaching and folding


def batchnorms(net: TracedNet) -> dict[str, fx.Node]:
    """Nodes of BatchNorm layers with running statistics, by name."""
    return {
        node.name: node
        for node in net.nodes
        if net.kinds[node.name] == "batchnorm" and net.modules[node.target].running_mean is not None
    }


def attach(model: nn.Module, corrections: Mapping[str, Correction | ChannelAffine], example: Tensor) -> nn.Module:
    """Copy of a model with every correction as a visible `ChannelAffine` after its node.

    Args:
        model: the network. Untouched.
        corrections: by node name, see `target_nodes`; also ready modules.
        example: inputs (n, ...), to trace with.
    """
    out = copy.deepcopy(model)
    net = trace(out, example)
    like = next(out.parameters())
    for name, fix in corrections.items():
        node = net.node(name)
        module = f"{name}_affine"
        ready = fix if isinstance(fix, ChannelAffine) else ChannelAffine(fix.gain, fix.shift)
        out.add_module(module, ready.to(like))
        with net.graph.inserting_after(node):
            affine = net.graph.call_module(module)
        node.replace_all_uses_with(affine)
        affine.args = (node,)
    graph_module = fx.GraphModule(out, net.graph, class_name=type(model).__name__)
    graph_module.training = model.training  # submodules keep the flags that they have
    return graph_module


def fold(model: nn.Module, corrections: dict[str, Correction], example: Tensor) -> Repaired:
    """Copy of a model with the corrections in its ordinary weights (Jordan et al. 2022, Sec. 4.2; Markus 2018).

    ``W' = gain W``, ``b' = gain b + shift``; without a bias, a BatchNorm that follows takes the shift,
    ``running_mean' = running_mean - shift``, else a shift other than 0 becomes a new bias (before a LayerNorm, say). A
    node that is no convolution, linear or normalisation layer, a layer called twice, or one whose weight is shared or
    computed (pruning, weight norm) keeps a visible `ChannelAffine`; the result says which. A node's mean may be right
    only behind a BatchNorm that took the shift.
    """
    out = copy.deepcopy(model)
    net = trace(out, example)
    calls = [node.target for node in net.nodes if node.op == "call_module"]
    norms = batchnorms(net)
    read = {node.target for node in net.nodes if node.op == "get_attr"}
    parameters = list(out.named_parameters(remove_duplicate=False))

    def own(module: nn.Module) -> bool:
        """Whether nobody else reads a layer's weight and bias, and nothing overwrites them before its forward."""
        tensors = [p for p in (module._parameters.get("weight"), module._parameters.get("bias")) if p is not None]
        names = [name for name, p in parameters if any(p is tensor for tensor in tensors)]
        plain = module._parameters.get("weight") is not None and not module._forward_pre_hooks
        return plain and "bias" in module._parameters and len(names) == len(tensors) and not read.intersection(names)

    visible, new_biases = {}, []
    with torch.no_grad():
        for name, fix in corrections.items():
            node = net.node(name)
            module, users = net.modules.get(str(node.target)), list(node.users)
            if type(module) is ChannelAffine:  # of an earlier REPAIR
                module.weight.mul_(fix.gain)
                module.bias.copy_(module.bias.double() * fix.gain + fix.shift)
                continue
            if net.kinds[name] not in FOLDABLE or calls.count(node.target) > 1 or not own(module):
                visible[name] = fix
                continue
            gain = fix.gain.to(module.weight.device)
            module.weight.copy_(module.weight.double() * gain.view((-1,) + (1,) * (module.weight.ndim - 1)))
            if module.bias is not None:
                module.bias.copy_(module.bias.double() * gain + fix.shift)
            elif not fix.shift.any():  # RESCALE
                continue
            elif len(users) == 1 and users[0].name in norms and calls.count(users[0].target) == 1:
                net.modules[users[0].target].running_mean.sub_(fix.shift)
            else:
                module.bias = nn.Parameter(fix.shift.to(module.weight.dtype))
                new_biases.append(node.target)
    if visible:
        out = attach(out, visible, example)
    return Repaired(out, corrections, tuple(visible), tuple(new_biases))
