"""Straight and homogeneous paths between networks, weighted means of several, and the barrier along a path."""

import copy
import math
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from repairlib.inputs import Inputs
from repairlib.names import check
from repairlib.recording import check_model, copy_model, heeds_mode
from repairlib.tracing import TracedNet, aliases, trace

State = Mapping[str, Any]  # tensors, and what `get_extra_state` gives


def check_compatible(*states: State, names: Sequence[str] = (), types: bool = True) -> set[str]:
    """Refuse state dicts that cannot be interpolated; each is compared with the first.

    Args:
        states: at least one.
        names: names for messages; default: model A, model B, ...
        types: whether the precision must be the same.

    What is no tensor must be a module's extra state (`get_extra_state`), which nobody compares. Infinities that are the
    same everywhere, as in the buffer of a causal mask, are fine.

    Returns:
        Names of the entries that hold infinities.

    Raises:
        ValueError: names the first entry that is missing, has another shape or type, is not finite, or is no tensor.
    """
    check_architectures(*states, names=names, types=types)
    return check_finite(*states, names=names)


def _titles(states: Sequence[State], names: Sequence[str]) -> tuple[str, Sequence[str]]:
    return ("", names) if names else ("model ", [*ascii_uppercase, *map(str, range(27, len(states) + 1))])


def check_architectures(*states: State, names: Sequence[str] = (), types: bool = True) -> None:
    """The part of `check_compatible` that does not read the weights."""
    kind, names = _titles(states, names)
    first = names[0]
    for which, state in zip(names, states, strict=False):
        for name in [k for k in states[0] if k not in state] + [k for k in state if k not in states[0]]:
            owner = first if name in states[0] else which
            way = ""
            if "_affine." in name:
                way = (
                    ": a visible correction of a merged network. Merge all at once, with match_several and Repair(..., "
                    "others=[...])"
                )
            raise ValueError(f"different architectures: {name!r} is in {kind}{owner} only{way}")
        for name, value in state.items():
            if not isinstance(value, Tensor):
                if name.rpartition(".")[2] == "_extra_state":
                    continue
                raise ValueError(f"{name!r} in {kind}{which} is no tensor but {type(value).__name__}; of a checkpoint, "
                                 "pass the entry that holds the weights, often checkpoint['state_dict']")  # fmt: skip
            if value.shape != states[0][name].shape:
                shapes = f"{tuple(states[0][name].shape)} in {first}, {tuple(value.shape)} in {which}"
                raise ValueError(f"different architectures: {name!r} is {shapes}")
            if types and value.dtype != states[0][name].dtype:
                kinds = f"{states[0][name].dtype} in {first}, {value.dtype} in {which}"
                raise ValueError(f"{name!r} is {kinds}; convert one of the networks, for instance with .float()")


def check_finite(*states: State, names: Sequence[str] = ()) -> set[str]:
    """The part of `check_compatible` that reads the weights."""
    kind, names = _titles(states, names)
    infinite: set[str] = set()
    for which, state in zip(names, states, strict=False):
        for bad in non_finite(state):
            infinite.add(bad)
            if not all(torch.equal(other[bad], state[bad].to(other[bad].device)) for other in states):
                raise ValueError(
                    f"{kind}{which}: {bad!r} holds NaN or infinity; was training stopped, or a file damaged?"
                )
    return infinite


def check_models(*models: nn.Module) -> set[str]:
    """Refuse what are no networks, or networks whose weights cannot be interpolated; see `check_compatible`."""
    for model in models:
        check_model(model)
    return check_compatible(*(model.state_dict() for model in models))


def non_finite(state: State) -> list[str]:
    """Names of the entries that hold NaN or infinity."""
    floating = {name: torch.view_as_real(x) if x.is_complex() else x for name, x in state.items() if averaged(x)}
    floating = {name: x for name, x in floating.items() if x.numel()}
    # A sum is finite only if all numbers are, and 20 times as fast as isfinite().all(). Read at once, a GPU stops once.
    finite = torch.stack([x.sum() for x in floating.values()]).isfinite().tolist() if floating else []
    suspects = [name for name, all_finite in zip(floating, finite, strict=True) if not all_finite]
    return [name for name in suspects if not floating[name].isfinite().all()]  # a sum may also overflow


def averaged(value: object) -> TypeGuard[Tensor]:
    """Whether an entry of a state dict is averaged: floating and complex tensors are, all else is copied."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def clamp_variance(name: str, value: Tensor) -> Tensor:
    """Clamp an extrapolated BatchNorm variance at 0: a negative one would make every output NaN."""
    return value.clamp_min(0) if name.rpartition(".")[2] == "running_var" else value


def mix_states(states: Sequence[State], weights: Sequence[float]) -> dict[str, Any]:
    """Weighted mean of state dicts, ``sum_i w_i theta_i`` with weights of sum 1 (Csiszarik et al. 2023, Sec. 5.4).

    The paper's ``theta_a + l_b (theta_b - theta_a) + l_c (theta_c - theta_a)`` has weights (1 - l_b - l_c, l_b, l_c).
    A model of weight 0 is left out: one weight of 1 gives that model bit for bit. Integer buffers (BatchNorm's batch
    counts), extra state and what holds infinities come from the first model whose weight is not 0. Half precision is
    averaged in float32.

    Args:
        states: state dicts of one architecture.
        weights: one number a state; negative ones extrapolate, and BatchNorm variances are then clamped at 0.

    Raises:
        ValueError: weights do not sum to 1, or are not as many as states; see also `check_compatible`.

    >>> mix_states([{"w": torch.tensor([v])} for v in (0.0, 4.0, 8.0)], [0.5, 0.25, 0.25])["w"]
    tensor([3.])
    """
    if len(states) != len(weights):
        raise ValueError(f"{len(states)} models have {len(weights)} weights; each needs one")
    _check_sum(weights)
    return _mix(states, weights, check_compatible(*states))


def _check_sum(weights: Sequence[float]) -> None:
    total = math.fsum(weights)
    if not abs(total - 1) <= 1e-6:  # so written, NaN is refused
        raise ValueError(f"weights must sum to 1, not {total:g}: divide them by their sum")


def _mix(
    states: Sequence[State], weights: Sequence[float], infinite: Container[str], out: State | None = None
) -> dict[str, Any]:
    """The weighted mean of states whose `infinite` entries are known, in tensors of its own or in those of `out`."""
    used = [(weight, state) for weight, state in zip(weights, states, strict=True) if weight != 0]

    def mix(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        into = torch.empty_like(value) if out is None else out[name]
        if len(used) == 1 or name in infinite or not averaged(value):
            return into.copy_(value)
        wide = torch.promote_types(value.dtype, torch.float32)
        fits = into.dtype == wide and into.device == value.device
        mean = into if fits else torch.empty_like(value, dtype=wide)
        mean.fill_(-0.0)  # -0.0 + x is x, the sign of a zero included
        for weight, state in used:
            mean.add_(state[name], alpha=weight)
        return into.copy_(clamp_variance(name, mean))

    return {name: mix(name, value) for name, value in used[0][1].items()}


def interpolate_states(state_a: State, state_b: State, alpha: float) -> dict[str, Any]:
    """Interpolated state dict ``theta_alpha = (1 - alpha) theta_a + alpha theta_b`` (Jordan et al. 2022, Sec. 2.1).

    Args:
        state_a, state_b: state dicts of one architecture.
        alpha: 0 gives `state_a` and 1 gives `state_b`, bit for bit; values outside [0, 1] extrapolate, see
            `mix_states`.

    >>> interpolate_states({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)["w"]
    tensor([1.])
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a number, not {alpha}")
    return mix_states((state_a, state_b), (1 - alpha, alpha))


def load_state(model: nn.Module, state: State, versions: Any = None) -> None:
    """Load parameters and buffers.

    Args:
        model: changed in place.
        state: its parameters and buffers.
        versions: `_metadata` of its own state dict, which some modules look at; found out if it is not given.
    """
    versioned = OrderedDict(state)
    versioned._metadata = versions or getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(versioned)
    forget_caches(model)


def forget_caches(model: nn.Module) -> None:
    """Let modules drop what they have computed from their weights and keep for evaluation: train mode says so."""
    flags = [(module, module.training) for module in model.modules()]
    if any(heeds_mode(module) for module, _ in flags):
        model.train()
        for module, training in flags:
            module.training = training


# How modules make and take state dicts. BatchNorm's own way only adds what those of old versions lack.
_LOADING = {
    method: (getattr(nn.Module, method), getattr(_NormBase, method))
    for method in ("state_dict", "_save_to_state_dict", "get_extra_state", "load_state_dict", "_load_from_state_dict")
}
_LOADING_HOOKS = ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
                  "_load_state_dict_post_hooks")  # fmt: skip


def loads_by_copy(model: nn.Module) -> bool:
    """Whether to load a state dict is to copy tensors: no module has hooks for it, a way of its own, or caches."""
    return not any(
        heeds_mode(module)
        or any(getattr(module, hooks) for hooks in _LOADING_HOOKS)
        or any(getattr(type(module), name) not in known or name in vars(module) for name, known in _LOADING.items())
        for module in model.modules()
    )


def with_state(model: nn.Module, state: State) -> nn.Module:
    """Copy of a module with other parameters and buffers."""
    out = copy_model(model)
    load_state(out, state)
    return out


def interpolate_models(model_a: nn.Module, model_b: nn.Module, alpha: float = 0.5) -> nn.Module:
    """Network with the weights ``(1 - alpha) theta_a + alpha theta_b``; see `interpolate_states`."""
    return LinearPath(model_a, model_b).at(alpha)


class LinearPath:
    """The networks ``(1 - alpha) theta_a + alpha theta_b``, one after the other in one module.

    The endpoints are checked once, so that a path of many points costs little more than evaluating them.

    Args:
        model_a, model_b: endpoints. Untouched.

    Raises:
        ValueError: their weights do not fit, see `check_compatible`.

    >>> path = LinearPath(nn.Linear(2, 1), nn.Linear(2, 1))
    >>> path.at(0.25) is path.at(0.5)
    True
    """

    def __init__(self, model_a: nn.Module, model_b: nn.Module):
        self.infinite = check_models(model_a, model_b)
        self.states = (model_a.state_dict(), model_b.state_dict())
        self.model = copy_model(model_a)
        self.in_place = loads_by_copy(self.model)

    def at(self, alpha: float) -> nn.Module:
        """The network at a point, in the module that held the one before.

        Args:
            alpha: 0 gives A and 1 gives B, bit for bit; values outside [0, 1] extrapolate, see `mix_states`.
        """
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be a number, not {alpha}")
        weights = (1 - alpha, alpha)
        _check_sum(weights)  # refuses an alpha so large that the 1 is lost to rounding, such as 1e17
        own = self.model.state_dict() if self.in_place else {}
        if own.keys() == self.states[0].keys():
            _mix(self.states, weights, self.infinite, own)
        else:
            mean = _mix(self.states, weights, self.infinite)
            load_state(self.model, mean, getattr(self.states[0], "_metadata", None))
        return self.model


_SCALABLE = ("conv", "linear", "pool", "reshape", "mean", "concat", "permute", "split", "getitem", "identity")
_RELUS = (F.relu, torch.relu, torch.relu_, F.leaky_relu, "relu", "relu_")


def bias_depths(model: nn.Module, example: Inputs) -> dict[str, int]:
    """Depth of every bias: number of weight layers on the longest path from the input to its layer, itself included.

    Args:
        model: a network of convolutions, linear layers, (leaky) ReLUs, pooling, sums and changes of shape only.
        example: one batch of inputs (n, ...), for the shapes.

    Raises:
        ValueError: names a node or a parameter that makes the network inhomogeneous in its weight layers.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> bias_depths(net, torch.zeros(1, 3))
    {'0.bias': 1, '2.bias': 2}
    """
    net = trace(model, example)
    names = aliases(model)
    depth: dict[fx.Node, int] = {}
    depths: dict[str, int] = {}
    refused = "no homogeneous interpolation: {}; use interpolate_states".format
    for node in net.nodes:
        depth[node] = max((depth[source] for source in node.all_input_nodes), default=0)
        if not _is_homogeneous(net, node):
            what = f"node '{node.name}' ({net.kinds[node.name] or node.target})"
            raise ValueError(refused(f"{what} does not scale with its input"))
        if net.kinds[node.name] in ("conv", "linear"):
            depth[node] += 1
            layer = net.modules[node.target]
            if not names.pop(id(layer.weight), None):
                raise ValueError(refused(f"{node.target}.weight is used twice or computed, so its layer has no depth"))
            depths |= dict.fromkeys(names.pop(id(layer.bias), []), depth[node])
    for left in names.values():
        raise ValueError(refused(f"{left[0]!r} is no weight or bias of a layer that is used"))
    return depths


def _is_homogeneous(net: TracedNet, node: fx.Node) -> bool:
    kind = net.kinds[node.name]
    if kind == "activation":
        layer = net.modules.get(node.target)
        return isinstance(layer, (nn.ReLU, nn.LeakyReLU)) or node.target in _RELUS
    if kind == "add":  # of a number, it would be a bias
        return all(isinstance(arg, fx.Node) for arg in node.args)
    if kind == "softmax":  # of the logits, it is part of the loss
        return all(user.op == "output" for user in node.users)
    if getattr(node.target, "__name__", node.target) == "logsumexp":
        return False
    # What is no tensor is a shape or an index.
    return kind in _SCALABLE or node.op in ("placeholder", "output") or net.shapes[node.name] is None


def interpolate_homogeneous(state_a: State, state_b: State, alpha: float, depths: Mapping[str, int]) -> dict[str, Any]:
    """Homogeneous interpolation: straight in the weights, and in a bias by its depth h.

        W = (1 - alpha) W_a + alpha W_b,   b = (1 - alpha)^h b_a + alpha^h b_b

    Scaling every weight of a plain chain by s, and its biases by s^h, scales the output by s^depth. In a residual
    network paths of different length meet; h counts the longest, as no source defines it there (Wang et al. 2022,
    Sec. 5; Qu & Horvath 2024, App. E.5, "Bias Norm").

    Args:
        state_a, state_b: state dicts of one architecture.
        alpha: in [0, 1]; 0 gives `state_a` and 1 gives `state_b`, bit for bit.
        depths: of every bias, from `bias_depths`.

    Raises:
        ValueError: alpha lies outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], not {alpha}: the powers of a negative weight alternate in sign")
    out = interpolate_states(state_a, state_b, alpha)
    if 0 < alpha < 1:
        out |= {name: (1 - alpha) ** h * state_a[name] + alpha**h * state_b[name] for name, h in depths.items()}
    return out


def barrier_of(alpha: Sequence[float], cost: Sequence[float], baseline: str = "linear") -> float:
    """Barrier of a path: its largest height over its endpoints.

    * linear: ``max_alpha cost(alpha) - [(1 - alpha) cost(0) + alpha cost(1)]`` (Jordan et al. 2022, Eq. 1, read as the
      largest difference);
    * mean: ``max_alpha cost(alpha) - [cost(0) + cost(1)] / 2`` (the released code).

    Args:
        alpha: points of the path, among them 0 and 1.
        cost: loss or error at these points.
        baseline: "linear" or "mean".

    Raises:
        ValueError: an endpoint is missing, a cost is NaN, or an unknown baseline.

    >>> barrier_of([0, 0.5, 1], [1.0, 4.0, 2.0])
    2.5
    """
    check(baseline, ("linear", "mean"), "baseline")
    at = dict(zip(alpha, cost, strict=True))
    if 0 not in at or 1 not in at:
        raise ValueError("a barrier needs both endpoints: alpha must contain 0 and 1")
    if bad := [a for a, value in at.items() if math.isnan(value)]:
        raise ValueError(f"the cost is NaN at alpha = {bad[0]:g}, so the path has no barrier: look at the data, and at "
                         "the network there")  # fmt: skip
    ends = {a: (1 - a) * at[0] + a * at[1] if baseline == "linear" else (at[0] + at[1]) / 2 for a in at}
    return max(at[a] - ends[a] for a in at)
