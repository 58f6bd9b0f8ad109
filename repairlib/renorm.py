"""Renormalise interpolated networks: REPAIR in its three variants, RESET, and folding into ordinary weights.

Every variant sets, at chosen nodes, ``x -> gain x + shift`` per channel; they differ in how gain and shift follow from
the statistics of the endpoints and of the interpolated network.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from repairlib.graph import Batches, ChannelAffine, TracedNet, eval_mode, trace
from repairlib.interpolate import check_compatible, interpolate_models
from repairlib.moments import BatchMeanMoments, Moments, gather

METHODS = ("closed-form", "simultaneous", "sequential")
TARGETS = ("conv", "linear", "block")


@dataclass(frozen=True)
class Correction:
    """Affine map of one node's channels: ``x_c -> gain_c x_c + shift_c``, both (units,) float64."""

    gain: Tensor
    shift: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """The corrected activation (n, units, ...), in its own precision."""
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x * self.gain.to(x.dtype).view(shape) + self.shift.to(x.dtype).view(shape)


@dataclass(frozen=True)
class Repaired:
    """A renormalised network and how it was made.

    Attributes:
        model: the network with corrections folded into its weights where that is possible.
        corrections: by node, whether folded or not.
        visible: nodes whose correction no weight can take up (block outputs); `model` then is a torch.fx.GraphModule
            with a `ChannelAffine` after each of them, and functional dropout in it stays as in evaluation. Empty:
            `model` is of the original class and architecture.
        new_biases: layers that had no bias and received one.
    """

    model: nn.Module
    corrections: dict[str, Correction]
    visible: tuple[str, ...] = ()
    new_biases: tuple[str, ...] = ()


# ----------------------------------------------------------------------------------------------------- what to correct


def target_nodes(net: TracedNet, targets: Iterable[str] = TARGETS) -> list[str]:
    """Names of the nodes to correct, in order of execution.

    Args:
        net: the traced network.
        targets: any of "conv" (outputs of every convolution), "linear" (outputs of hidden linear layers), "block"
            (outputs of residual blocks, after their final activation), "classifier" (the last convolution or linear
            layer), or names of nodes.

    A node that carries a `ChannelAffine` from an earlier REPAIR stands for what leaves that module.

    Raises:
        KeyError: a name that is neither, with the nearest node names.
        ValueError: a linear layer on (n, tokens, features), whose units are not on axis 1.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    net.check_names([t for t in targets if t not in (*TARGETS, "classifier")])
    last = [node for node in net.nodes if net.kinds[node.name] in ("conv", "linear")][-1:]
    chosen = []
    for node in net.nodes:
        name, kind, users = node.name, net.kinds[node.name], list(node.users)
        if node in last:
            kind = "classifier"
        if kind in ("conv", "linear", "classifier"):
            wanted = kind in targets
        elif kind == "add" and "block" in targets and len(node.all_input_nodes) > 1:
            wanted = True
            if len(users) == 1 and net.kinds[users[0].name] == "activation":
                name = users[0].name
        else:
            wanted = False
        if wanted or name in targets:
            if net.kinds[name] == "linear" and len(net.shapes[name]) != 2:
                raise ValueError(f"node {name!r}: the units of a linear layer on {net.shapes[name]} are not on axis 1")
            chosen.append(net.corrected(name))
    order = {node.name: i for i, node in enumerate(net.nodes)}
    return sorted(set(chosen), key=order.__getitem__)


# -------------------------------------------------------------------------------------------- how gain and shift follow


def _correction(mean: Tensor, std: Tensor, goal_mean: Tensor, goal_std: Tensor, dead: Tensor) -> Correction:
    """Gain and shift that take (mean, std) to the goal; a dead channel can be shifted, not scaled."""
    gain = torch.where(dead, 1.0, goal_std / std.masked_fill(dead, 1.0))
    return Correction(gain, goal_mean - gain * mean)


def _goal(ends: Moments | BatchMeanMoments, alpha: float) -> tuple[Tensor, Tensor]:
    """``E = (1-alpha) E_1 + alpha E_2`` and ``std = (1-alpha) std_1 + alpha std_2`` (Jordan et al. 2022, Eqs. 3, 4)."""
    return (1 - alpha) * ends.mean(0) + alpha * ends.mean(1), (1 - alpha) * ends.std(0) + alpha * ends.std(1)


def predicted_variance(ends: Moments, alpha: float = 0.5) -> Tensor:
    """Variance of each unit of the interpolated network, exact in the first layer (Jordan et al. 2022, Eq. 5).

    ``Var = (1-alpha)^2 Var_1 + alpha^2 Var_2 + 2 alpha (1-alpha) Cov(X_1, X_2)``

    Args:
        ends: moments of both aligned endpoints with ``cross="paired"``, or "full".
        alpha: interpolation coefficient.
    """
    cov = ends.cov()
    cov = cov.diagonal() if cov.ndim == 2 else cov
    return ((1 - alpha) ** 2 * ends.var(0) + alpha**2 * ends.var(1) + 2 * alpha * (1 - alpha) * cov).clamp_min(0)


def _closed_form(ends: Moments, alpha: float) -> Correction:
    """``beta = std_goal / sqrt(Var of Eq. 5)``, about the mean that the first layer already has (Sec. 4.1)."""
    mean, std = _goal(ends, alpha)
    predicted = predicted_variance(ends, alpha).sqrt()
    return _correction(mean, predicted, mean, std, dead=predicted <= 1e-6 * mean.abs())


def _moments_of(chunks: Iterable[Tensor]) -> Moments:
    moments = Moments()
    for chunk in chunks:
        moments.update(chunk)
    return moments


def _set_statistics(module: nn.Module, moments) -> None:
    with torch.no_grad():
        module.running_mean.copy_(moments.mean())
        module.running_var.copy_(moments.var())


def _batchnorms(net: TracedNet) -> dict[str, fx.Node]:
    """Nodes of BatchNorm layers with running statistics, by name."""
    return {
        node.name: node
        for node in net.nodes
        if net.kinds[node.name] == "batchnorm" and net.modules[node.target].running_mean is not None
    }


def _sequential(net: TracedNet, batches: Batches, goals: dict, reset: bool) -> dict[str, Correction]:
    """Exact statistics in one pass: every node is computed for the whole set before the next one.

    A target's statistics are measured with all corrections before it in place, which a procedure that repairs one
    layer at a time reaches with one pass a layer. All activations of the set are held at the nodes in flight.
    """
    norms = _batchnorms(net) if reset else {}
    left = len(goals) + len(norms)
    values: list[dict] = [{} for _ in batches]
    corrections = {}
    with eval_mode(net.model):
        for node in net.nodes:
            if not left:
                break
            if node.name in norms:
                _set_statistics(net.modules[node.target], _moments_of(v[node.args[0]] for v in values))
                left -= 1
            # Only a placeholder reads the batches; the loader is asked once more, not held twice.
            inputs = batches if node.op == "placeholder" else [None] * len(values)
            for chunk, x in zip(values, inputs, strict=True):
                chunk[node] = net.compute(node, chunk, iter((x,)))
                net.forget(node, chunk)
            if node.name in goals:
                now = _moments_of(chunk[node] for chunk in values)
                fix = corrections[node.name] = _correction(now.mean(), now.std(), *goals[node.name], now.dead())
                for chunk in values:
                    chunk[node] = fix.apply(chunk[node])
                left -= 1
    return corrections


def _simultaneous(net: TracedNet, batches: Batches, goals: dict, reset: bool, pooling: str) -> dict[str, Correction]:
    """The paper's procedure: targets normalise each batch by its own statistics while these are being recorded."""
    new = BatchMeanMoments if pooling == "batch-mean" else Moments
    norms = _batchnorms(net) if reset else {}
    seen: dict[str, Moments] = {name: new() for name in (*goals, *norms)}

    def target(name):
        def edit(x):
            seen[name].update(x)
            batch = _moments_of([x])
            return _correction(batch.mean(), batch.std(), *goals[name], batch.dead()).apply(x)

        return edit

    def norm(name, node):
        def edit(x):
            # BatchNorm in train mode: this batch's statistics, pooled by us. The node's value came from old ones.
            before = inputs.pop(name)
            seen[name].update(before)
            module, batch = net.modules[node.target], _moments_of([before])
            return nn.functional.batch_norm(
                before,
                batch.mean().to(before.dtype),
                batch.var().to(before.dtype),
                module.weight,
                module.bias,
                eps=module.eps,
            )

        return edit

    inputs: dict[str, Tensor] = {}

    def remember(names, edit=None):
        def record(x):
            x = edit(x) if edit else x
            inputs.update(dict.fromkeys(names, x))
            return x

        return record

    edits = {name: target(name) for name in goals}
    readers: dict[str, list[str]] = {}
    for name, node in norms.items():
        edits[name] = norm(name, node)
        readers.setdefault(node.args[0].name, []).append(name)
    for source, names in readers.items():
        edits[source] = remember(names, edits.get(source))
    with eval_mode(net.model):
        for x in batches:
            for _ in net.walk(x, list(edits), edits):
                pass
    for name, node in norms.items():
        _set_statistics(net.modules[node.target], seen[name])
    return {name: _correction(m.mean(), m.std(), *goals[name], m.dead()) for name, m in seen.items() if name in goals}


# ------------------------------------------------------------------------------------------------------------- public


class Repair:
    """REPAIR of every network between two aligned endpoints (Jordan et al. 2022, Sec. 4).

    ``E[X_alpha] = (1-alpha) E[X_1] + alpha E[X_2]`` and ``std(X_alpha) = (1-alpha) std(X_1) + alpha std(X_2)`` for each
    channel of the targets. Statistics of the endpoints are measured once, here; calling the object with an alpha makes
    the network.

    Args:
        model_a, model_b: endpoints, aligned (see `repairlib.align`). Untouched.
        data: any iterable of batches x or (x, y); 5,000 examples suffice (Sec. 4.2).
        method: "closed-form" (Eq. 5, no pass through interpolated networks), "simultaneous" (the paper's exact method:
            one pass in batch-statistics mode) or "sequential" (statistics exact for the resulting network; one pass).
        targets: see `target_nodes`.
        bn: existing BatchNorm layers stay "frozen" (the paper) or are "reset", also of the endpoints (released code).
        pooling: how "simultaneous" pools batches, "exact" or "batch-mean" (the released code, endpoints included).
        limit: use the first so many examples of the data, None for all. "sequential" holds all their activations at the
            nodes in flight: 5,000 images of CIFAR-10 at 64 channels are 1.3 GB a node, two or three nodes at a time.

    Raises:
        ValueError: unknown option, different architectures, non-finite weights, empty data, nothing to correct.
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        data: Iterable,
        *,
        method: str = "sequential",
        targets: Sequence[str] = TARGETS,
        bn: str = "frozen",
        pooling: str = "exact",
        limit: int | None = 5000,
    ):
        _check_option("method", method, METHODS)
        _check_option("bn", bn, ("frozen", "reset"))
        _check_option("pooling", pooling, ("exact", "batch-mean"))
        _check_pooling(pooling, method)
        if method == "closed-form" and bn == "reset":
            raise ValueError(
                "method='closed-form' makes no pass through the network, so it cannot reset BatchNorm layers"
            )
        check_compatible(model_a.state_dict(), model_b.state_dict())
        self.method, self.bn, self.pooling = method, bn, pooling
        self.batches = Batches(data, model_a, limit)
        self.example = self.batches.example()
        if bn == "reset":
            how = "sequential" if method == "sequential" else "simultaneous"
            model_a, model_b = (reset(model, self.batches, method=how, pooling=pooling) for model in (model_a, model_b))
        self.model_a, self.model_b = model_a, model_b
        nets = [trace(model, self.example) for model in (model_a, model_b)]
        self.targets = target_nodes(nets[0], targets)
        if not self.targets:
            raise ValueError(f"nothing to correct: the network has no {' or '.join(targets)} node")
        cross = "paired" if method == "closed-form" else "none"
        self.ends = gather(nets, self.batches, self.targets, cross, pooling)

    def __call__(self, alpha: float = 0.5) -> Repaired:
        """The repaired network at `alpha`; 0 and 1 give the endpoints bit for bit (the reset ones with bn="reset")."""
        model = interpolate_models(self.model_a, self.model_b, alpha)
        if alpha in (0, 1):
            return Repaired(model, {})
        if self.method == "closed-form":
            corrections = {name: _closed_form(ends, alpha) for name, ends in self.ends.items()}
        else:
            goals = {name: _goal(ends, alpha) for name, ends in self.ends.items()}
            corrections = _measure(
                model, self.batches, self.example, goals, self.method, self.bn == "reset", self.pooling
            )
        return fold(model, corrections, self.example)


def reset(model: nn.Module, data: Iterable, *, method: str = "sequential", pooling: str = "exact") -> nn.Module:
    """Copy of a model whose BatchNorm statistics are measured anew (RESET; Izmailov et al. 2018).

    Args:
        model: any network with BatchNorm layers. Untouched.
        data: any iterable of batches.
        method: "sequential" measures each layer's input over all data with the layers before it already reset;
            "simultaneous" lets layers normalise by batch statistics while measuring, as BatchNorm's train mode does.
        pooling: see `Repair`.

    Raises:
        ValueError: the model has no BatchNorm statistics, or the data is empty.
    """
    _check_option("method", method, ("simultaneous", "sequential"))
    _check_pooling(pooling, method)
    out = copy.deepcopy(model)
    batches = Batches(data, out)
    example = batches.example()
    if not _batchnorms(trace(out, example)):
        raise ValueError(f"{type(model).__name__} has no BatchNorm statistics to reset; use Repair instead")
    _measure(out, batches, example, {}, method, True, pooling)
    return out


def _measure(model, batches, example, goals, method, reset_bn, pooling) -> dict[str, Correction]:
    net = trace(model, example)
    if method == "sequential":
        return _sequential(net, batches, goals, reset_bn)
    return _simultaneous(net, batches, goals, reset_bn, pooling)


def attach(model: nn.Module, corrections: dict[str, Correction], example: Tensor) -> nn.Module:
    """Copy of a model with every correction as a visible `ChannelAffine` after its node.

    Args:
        model: the network. Untouched.
        corrections: by node name, see `target_nodes`.
        example: inputs (n, ...), to trace with.
    """
    out = copy.deepcopy(model)
    net = trace(out, example)
    like = next(out.parameters())
    for name, fix in corrections.items():
        node = net.node(name)
        module = f"{name}_affine"
        out.add_module(module, ChannelAffine(fix.gain.to(like.dtype), fix.shift.to(like.dtype)))
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
    ``running_mean' = running_mean - shift``, else the layer receives a bias. A node that is no convolution or linear
    layer, a layer called twice, or one whose weight is shared or computed (pruning, weight norm) keeps a visible
    `ChannelAffine`; the result says which. A node's mean may be right only behind a BatchNorm that took the shift.
    """
    out = copy.deepcopy(model)
    net = trace(out, example)
    calls = [node.target for node in net.nodes if node.op == "call_module"]
    norms = _batchnorms(net)
    read = {node.target for node in net.nodes if node.op == "get_attr"}
    parameters = list(out.named_parameters(remove_duplicate=False))

    def own(module: nn.Module) -> bool:
        """Whether nobody else reads a layer's weight and bias, and nothing overwrites them before its forward."""
        tensors = [p for p in (module._parameters.get("weight"), module._parameters.get("bias")) if p is not None]
        names = [name for name, p in parameters if any(p is tensor for tensor in tensors)]
        plain = "weight" in module._parameters and not module._forward_pre_hooks
        return plain and len(names) == len(tensors) and not read.intersection(names)

    visible, new_biases = {}, []
    with torch.no_grad():
        for name, fix in corrections.items():
            node = net.node(name)
            module, users = net.modules.get(str(node.target)), list(node.users)
            if net.kinds[name] == "affine":  # of an earlier REPAIR
                module.weight.mul_(fix.gain)
                module.bias.copy_(module.bias.double() * fix.gain + fix.shift)
                continue
            if net.kinds[name] not in ("conv", "linear") or calls.count(node.target) > 1 or not own(module):
                visible[name] = fix
                continue
            gain = fix.gain.to(module.weight.device)
            module.weight.copy_(module.weight.double() * gain.view((-1,) + (1,) * (module.weight.ndim - 1)))
            if module.bias is not None:
                module.bias.copy_(module.bias.double() * gain + fix.shift)
            elif len(users) == 1 and users[0].name in norms and calls.count(users[0].target) == 1:
                net.modules[users[0].target].running_mean.sub_(fix.shift)
            else:
                module.bias = nn.Parameter(fix.shift.to(module.weight.dtype))
                new_biases.append(node.target)
    if visible:
        out = attach(out, visible, example)
    return Repaired(out, corrections, tuple(visible), tuple(new_biases))


def _check_pooling(pooling: str, method: str) -> None:
    if pooling == "batch-mean" and method != "simultaneous":
        raise ValueError(f"pooling='batch-mean' is of method='simultaneous'; {method!r} pools exactly")


def _check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
