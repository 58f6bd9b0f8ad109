"""Derive the permutation groups of a network from its graph, and verify them.

A group is a set of hidden units that may be reordered without changing the function (Jordan et al. 2022, Sec. 2.2).
Every element of every activation carries the number of the unit that it belongs to. Reshaping an activation reshapes
its numbers, adding two activations identifies their numbers, and a layer's weight axis inherits the numbers of its
input. Units whose numbers occur on the same axes form a group.
"""

import contextlib
import functools
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from repairlib._factored import Factored, factors
from repairlib.inputs import Inputs, call, count, map_inputs
from repairlib.interpolate import averaged, forget_caches
from repairlib.recording import along, copy_model, eval_mode, inside, tensors_in
from repairlib.tracing import TracedNet, aliases, trace

# Two numbers that are no unit's. FREE: a constant that is equal for all units, such as the zeros of a padding.
# FIXED: what may not move, such as the network's inputs and outputs.
FREE, FIXED = 0, 1
# Kinds of nodes at which a group's activations may be read.
TAPPED = ("conv", "conv-transpose", "linear", "batchnorm", "groupnorm", "add", "multiply", "activation", "permute")

# group name -> int64 indices (units,): unit i of the permuted network is unit perm[i] of the original
Permutation = dict[str, Tensor]


class UnsupportedNode(ValueError):
    """A node of the graph has no permutation rule; the message names the node and the missing rule."""


class SpecError(ValueError):
    """The derived groups do not leave the network's function unchanged."""


# ------------------------------------------------------------------------------------------------ permutation groups


@dataclass(frozen=True)
class Axis:
    """Place of a group's units: ``positions[i]`` are the indices of unit i along one axis of one tensor.

    `length` is how many entries that axis has.
    """

    tensor: str
    axis: int
    length: int
    positions: Int[Tensor, "units occurrences"]


@dataclass(frozen=True)
class Group:
    """Hidden units that move together.

    Attributes:
        name: of the first layer that makes them.
        size: number of units.
        axes: all weight axes that they index.
        taps: names of the nodes to read them at, "pre" and "post" activation.
        channels: at the same keys, (units, k): the k places on that node's axis of units which belong to each unit.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    taps: dict[str, str] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PermutationSpec:
    """All permutation groups of a network; prints as a table.

    Attributes:
        groups: of two units or more each.
        layers: those with weight matrices, in order of execution.
        stay: hidden layers none of whose units may move, as far as the rules can tell.
    """

    groups: tuple[Group, ...]
    layers: tuple[str, ...] = ()
    stay: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are: {', '.join(group.name for group in self.groups)}")

    def __str__(self) -> str:
        rows = [("group", "size", "tap", "parameters [axis]")]
        for group in self.groups:
            axes = ", ".join(f"{axis.tensor}[{axis.axis}]" for axis in group.axes)
            rows.append((group.name, str(group.size), group.taps.get("post", "-"), axes))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for *cells, axes in rows:
            start = "".join(cell.ljust(w + 2) for cell, w in zip(cells, widths, strict=True))
            if len(start) > 60:  # parameters on lines of their own where names are long
                lines.append(start.rstrip())
                start = " " * 4
            lines.append(textwrap.fill(axes, 120, initial_indent=start, subsequent_indent=" " * len(start)))
        if self.stay:
            lines.append(textwrap.fill(f"units stay as they are in: {', '.join(self.stay)}", 120))
        return "\n".join(lines)

    def check(self, permutation: Permutation) -> None:
        """Refuse what is no permutation of these groups.

        Raises:
            KeyError: a group that does not exist.
            ValueError: indices that are no permutation of the group's units.
        """
        for name, perm in permutation.items():
            if sorted(perm.tolist()) != list(range(self[name].size)):
                raise ValueError(f"group {name!r}: not a permutation of its {self[name].size} units")

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state dict of a network that these groups are not of; a ValueError names the first tensor."""
        for group in self.groups:
            for axis in group.axes:
                shape = tuple(state[axis.tensor].shape) if axis.tensor in state else ()
                if len(shape) <= axis.axis or shape[axis.axis] != axis.length:
                    here = f"is {shape}" if axis.tensor in state else "is not there"
                    raise ValueError(
                        f"the permutation groups are of another network, where axis {axis.axis} of {axis.tensor!r} has "
                        f"{axis.length} entries, and here it {here}; derive them with permutation_spec(model, example)"
                    )

    def moves(self, permutation: Permutation) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """Moved entries of every permuted axis: tensor, axis, positions to fill, and positions to fill them from."""
        self.check(permutation)
        for name, perm in permutation.items():
            for axis in self[name].axes:
                yield axis.tensor, axis.axis, axis.positions.flatten(), axis.positions[perm.cpu()].flatten()


def permutation_spec(model: nn.Module, example: Inputs, verify: bool = True) -> PermutationSpec:
    """Permutation groups of a model, derived from its graph and verified in float64.

    Args:
        model: any network, as it runs in evaluation mode. Untouched.
        example: inputs (n, ...) of a small batch: a tensor, or several in a tuple or by name.
        verify: permute every group at random in a float64 copy with random weights and compare outputs.

    Raises:
        UntraceableModel, UnsupportedNode: with the node's name.
        SpecError: the check failed: the rules do not fit this model, or its outputs can tell nothing.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> print(permutation_spec(net, torch.randn(2, 3)))
    group  size  tap  parameters [axis]
    0      4     _1   0.weight[0], 0.bias[0], 2.weight[1]
    """
    return spec_of(trace(model, example), example, verify)


def spec_of(net: TracedNet, example: Inputs, verify: bool = True) -> PermutationSpec:
    """Permutation groups of a traced network; for arguments and errors see `permutation_spec`."""
    labels = Labels(net)
    for node in net.nodes:
        labels.visit(node)
    spec, model = _groups(labels), net.model
    if verify:
        error, precision = _invariance(model, spec, example, any_size=_is_of_any_size(net))
        if math.isinf(error):
            raise SpecError(
                f"the groups of {type(model).__name__} cannot be verified: on random inputs an output is zero, not "
                "finite or the same for both, or there is none"
            )
        if not error < (_STRICT if precision == torch.float64 else math.sqrt(torch.finfo(precision).eps)):
            raise SpecError(f"permuting the groups of {type(model).__name__} changes its output by {error:.1e}")
    return spec


def _groups(labels: "Labels") -> PermutationSpec:
    """Groups of units that occur equally often on the same axes, and where to read them."""
    root = labels.settle().numpy()
    axes = {key: root[units.numpy()] for key, units in labels.axes.items() if units is not None}
    movable = _numbers(labels.count, axes.values())
    movable[root[FIXED]] = False
    movable = np.flatnonzero(movable)
    place = np.full(labels.count, -1)
    place[movable] = np.arange(len(movable))
    # The sum of random 64-bit keys, one an axis, tells sets of axes apart without a table of units x axes.
    rng = np.random.default_rng(0)
    signature = np.zeros(len(movable), dtype=np.int64)
    for units in axes.values():
        places = place[units]
        signature += rng.integers(1, 2**62) * np.bincount(places[places >= 0], minlength=len(movable))
    for units, classes in labels.apart:
        places, keys = place[root[units.numpy()]], rng.integers(1, 2**62, size=int(classes.max()) + 1)[classes]
        np.add.at(signature, places[places >= 0], keys[places >= 0])
    _, first, same = np.unique(signature, return_index=True, return_inverse=True)
    group_of = np.argsort(np.argsort(first))[same]  # groups in order of their first unit
    units_of = [movable[places] for places in _by_key(group_of)]

    @functools.cache
    def _members(on_axis: bytes) -> list[tuple[int, Tensor]]:
        units = np.frombuffer(on_axis, dtype=root.dtype)
        moving = np.flatnonzero(place[units] >= 0)
        found = []
        for positions in _by_key(group_of[place[units[moving]]], units[moving]):
            positions = moving[positions]
            g = int(group_of[place[units[positions[0]]]])
            occurrences, rest = divmod(len(positions), len(units_of[g]))
            if not rest and np.array_equal(units[positions], np.repeat(units_of[g], occurrences)):
                found.append((g, torch.from_numpy(positions.reshape(-1, occurrences))))
        return found

    def members(on_axis: np.ndarray) -> list[tuple[int, Tensor]]:
        """Groups all of whose units are on an axis, equally often: number, and positions (units, occurrences)."""
        return _members(on_axis.tobytes())  # several axes have the same units

    axes_of: list[list[Axis]] = [[] for _ in units_of]
    for (tensor, axis), on_axis in axes.items():
        for g, positions in members(on_axis):
            axes_of[g].append(Axis(tensor, axis, len(on_axis), positions))
    # Tap of each group: its last node before ("pre") and after ("post") the non-linearity. That of a residual stream is
    # the end of its last block.
    taps: list[dict[str, str]] = [{} for _ in units_of]
    channels: list[dict[str, Tensor]] = [{} for _ in units_of]
    for node, label in labels.values.items():
        kind = labels.kind(node)
        if node not in labels.net.fed or kind not in TAPPED or not isinstance(label, Tensor) or label.ndim < 2:
            continue
        axis = labels.net.axis(node.name)
        if [i for i in range(label.ndim) if varies(label, i)] != [axis]:
            continue
        for g, positions in members(root[label.movedim(axis, -1).flatten(0, -2)[0].numpy()]):
            for tap in ("post",) if kind == "activation" else ("pre", "post"):
                # Once a map is flattened, its units have as many channels as it had positions: read them before.
                if tap not in channels[g] or positions.shape[1] <= channels[g][tap].shape[1]:
                    taps[g][tap], channels[g][tap] = node.name, positions
    groups: list[Group] = []
    seen: dict[str, int] = {}
    for g, units in enumerate(units_of):
        if len(units) == 1:
            continue
        name = next((a.tensor.rpartition(".")[0] for a in axes_of[g] if "." in a.tensor), axes_of[g][0].tensor)
        seen[name] = seen.get(name, 0) + 1
        name += f":{seen[name]}" if seen[name] > 1 else ""  # a layer whose units fall into several groups
        groups.append(Group(name, len(units), tuple(axes_of[g]), taps[g], channels[g]))
    weights = [t for t, _ in axes if t.endswith("weight") and labels.state[t].ndim > 1]
    layers = tuple(dict.fromkeys(t.rpartition(".")[0] for t in weights))
    listed = _numbers(labels.count, (units for units in units_of if len(units) > 1))
    hidden = labels.net.read_by_layers()
    stay: dict[str, bool] = {}
    for node, layer, made in labels.made:
        if node in hidden and len(made) > 1:
            stay[layer] = stay.get(layer, True) and not listed[root[made.numpy()]].any()
    return PermutationSpec(tuple(groups), layers, tuple(layer for layer, all_stay in stay.items() if all_stay))


def _numbers(count: int, sets: Iterable[np.ndarray]) -> np.ndarray:
    """Of every unit number, whether it is in one of the sets."""
    found = np.zeros(count, dtype=bool)
    for numbers in sets:
        found[numbers] = True
    return found


def _by_key(keys: np.ndarray, *then_by: np.ndarray) -> list[np.ndarray]:
    """Places of every key in order of the keys, and of some others where keys are the same."""
    order = np.lexsort((*then_by, keys))
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else []


# ------------------------------------------------------------------------------------------------------ verification


class _Precision(TorchFunctionMode):
    """Notes the lowest precision that a network computes in."""

    def __init__(self):
        super().__init__()
        self.lowest = torch.float64

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.dtype.itemsize < self.lowest.itemsize:
            self.lowest = out.dtype
        return out


# A change of the output that is no rounding error.
_STRICT = 1e-8
# Maps of this many pixels a side show what larger ones do, where neither code nor weights depend on their size.
_SIDE = 64


def invariance_error(model: nn.Module, spec: PermutationSpec, example: Inputs, seed: int = 0) -> float:
    """Largest relative change of the output, in float64, when every group is permuted at random.

    ``max |f(P theta) - f(theta)| / max |f(theta)|`` of two random inputs, for a copy with random weights and
    normalisation statistics, so that a forgotten axis cannot hide behind ones and zeros. Infinite where an output is
    zero, not finite or the same for both inputs, or where there is none: that would hide any mistake.
    """
    return _invariance(model, spec, example, seed)[0]


def _invariance(
    model: nn.Module, spec: PermutationSpec, example: Inputs, seed: int = 0, any_size: bool = False
) -> tuple[float, torch.dtype]:
    """`invariance_error`, and the lowest precision that the copy computed in.

    A cheap copy may fail where the network does not, so it only accepts; what none of them accepts is asked again with
    all weights drawn in full.
    """
    for error, precision in _of_cheap_copies(model, spec, example, seed, any_size):
        if precision != torch.float64:
            break
        if error < _STRICT:
            return error, precision
    try:
        return _change(copy_model(model), spec, example, seed)
    except RuntimeError:  # some code is of one precision only
        return _change(copy_model(model), spec, example, seed, torch.float32)


def _of_cheap_copies(
    model: nn.Module, spec: PermutationSpec, example: Inputs, seed: int, any_size: bool
) -> Iterator[tuple[float, torch.dtype]]:
    """`_change` where large weights are of low rank (`Factored`), and first of small maps, where any size will do.

    The same code runs in float64. Its random weights and inputs are others.
    """
    # Units that an axis has more than once may be of a flattened map, whose places cannot be told apart in a small one.
    once = all(axis.positions.shape[1] == 1 for group in spec.groups for axis in group.axes)
    small = _small(example) if any_size and once else None
    for x in (example,) if small is None else (small, example):
        memo = factors(model, torch.Generator().manual_seed(seed + 2), torch.float64)
        if memo or x is small:
            with contextlib.suppress(Exception):  # of any kind, as it is of any module
                yield _change(copy_model(model, memo), spec, x, seed)


def _is_of_any_size(net: TracedNet) -> bool:
    """Whether maps of `_SIDE` pixels are enough: no code asked for sizes, and no map shrinks to a single pixel."""
    maps = [shape[-2:] for shape in net.shapes.values() if shape is not None and len(shape) > 3]
    largest = max((max(sides) for sides in maps), default=0)
    return not net.of_size and all(side == 1 or side * _SIDE >= 2 * largest for sides in maps for side in sides)


def _small(example: Inputs) -> Inputs | None:
    """Corners of maps (n, channels, ..., height, width) that are large; None if there are none."""
    large = []

    def corner(x: Tensor) -> Tensor:
        if x.ndim < 4 or not x.is_floating_point() or min(x.shape[-2:]) <= _SIDE:
            return x
        large.append(x)
        return x[..., :_SIDE, :_SIDE]

    small = map_inputs(corner, example)
    return small if large else None


def _change(
    probe: nn.Module, spec: PermutationSpec, example: Inputs, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[float, torch.dtype]:
    """`_invariance` of a copy of the network, which is given random weights."""
    generator = torch.Generator().manual_seed(seed)
    probe = probe.cpu().to(dtype)
    state = {
        id(t) if isinstance(t, Factored) else t.data_ptr(): (name, t)
        for name, t in reversed(probe.state_dict(keep_vars=True).items())
        if averaged(t)
    }
    n = count(example)

    def two(x: Tensor) -> Tensor:
        """Two random examples, or the first two of tokens; what belongs to all examples stays."""
        if x.ndim == 0 or len(x) != n:
            return x.cpu().to(dtype if x.is_floating_point() else x.dtype)
        if x.is_floating_point():
            return torch.randn(2, *x.shape[1:], generator=generator, dtype=dtype)
        return (torch.cat([x, x.roll(1, -1)]) if n == 1 else x)[:2].cpu()

    def outputs() -> list[Tensor]:
        return tensors_in(call(inside(probe), x))

    with torch.no_grad():
        for _, tensor in reversed(state.values()):
            if tensor.ndim < 2:  # biases, scales, statistics: positive, of order one
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif not isinstance(tensor, Factored) and tensor.isfinite().all():  # a mask of infinities stays
                bound = math.sqrt(6 / tensor[0].numel())
                tensor.uniform_(-bound, bound, generator=generator)
    x = map_inputs(two, example)
    with eval_mode(probe), _Precision() as precision:
        forget_caches(probe)
        _move_statistics(probe)
        before = outputs()
        # In place: a network of 5 GB should not be there twice.
        tensors = dict(state.values())
        generator = torch.Generator().manual_seed(seed + 1)
        permutation = {group.name: _not_identity(group.size, generator) for group in spec.groups}
        for name, axis, target, source in spec.moves(permutation):
            if name in tensors:  # of tied weights, the first name only
                tensor = tensors[name]
                tensor, axis = tensor.factor(axis) if isinstance(tensor, Factored) else (tensor, axis)
                tensor.index_copy_(axis, target, tensor.index_select(axis, source))
        forget_caches(probe)
        after = outputs()
    worst = 0.0 if before else math.inf
    telling = any(map(averaged, before))
    for old, new in zip(before, after, strict=True):
        if telling and not averaged(old):  # predicted classes may be the same for both, beside logits that are not
            worst = max(worst, float((old != new).any()))
            continue
        old, new = (y.to(dtype).reshape(1 if y.numel() % 2 else 2, -1) for y in (old, new))
        scale = old.abs().amax(1)
        distinct = len(old) == 1 or (old[0] - old[1]).abs().max() > 1e-8 * scale.max()
        if not (new.isfinite().all() and scale.isfinite().all() and scale.all() and distinct):
            return math.inf, precision.lowest
        worst = max(worst, float(((new - old).abs().amax(1) / scale).max()))
    return worst, precision.lowest


def _not_identity(n: int, generator: torch.Generator) -> Tensor:
    """Random permutation that moves some units, if there are two or more."""
    perm = torch.randperm(n, generator=generator)
    return perm if n < 2 or (perm != torch.arange(n)).any() else _not_identity(n, generator)


def _move_statistics(model: nn.Module) -> None:
    """In the next pass, move every BatchNorm's statistics, which are of order one, to its input's mean and variance.

    Otherwise a deep network forgets its input, or its activations grow until a sigmoid hides what comes before. One
    variance for the whole layer, as dividing by that of a dead channel would blow up rounding errors.
    """
    pending: dict[nn.Module, Any] = {}

    def move(module, inputs):
        pending.pop(module).remove()
        var, mean = torch.var_mean(inputs[0].transpose(0, 1).flatten(1), 1)
        module.running_mean.sub_(1).mul_(var.mean().sqrt()).add_(mean)
        module.running_var.mul_(var.mean())

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            pending[module] = module.register_forward_pre_hook(move)


# ----------------------------------------------------------------------------------------------------- unit numbers


def varies(x: Tensor, axis: int) -> bool:
    """Whether labels may differ along an axis."""
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


def spread(units: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Labels of an activation whose units lie along one axis."""
    return along(units, len(shape), axis).expand(shape)


def _in_place(node: fx.Node) -> bool:
    return str(getattr(node.target, "__name__", node.target)).endswith("_")


def _compact_all(out: Any) -> Any:
    return tuple(map(_compact_all, out)) if isinstance(out, tuple | list) else _compact(out)


def constant(value: Tensor) -> Tensor:
    """Labels of a tensor that depends on no activation: it may not move, unless it is the same everywhere."""
    same = value.numel() > 0 and bool((value == value.flatten()[0]).all())
    return torch.tensor(FREE if same else FIXED).expand(value.shape)


def fixed(shape: tuple[int, ...]) -> Tensor:
    """Labels of an activation of which nothing may move."""
    return torch.tensor(FIXED).expand(shape)


class Labels:
    """Unit numbers of every activation and weight axis while the graph is walked.

    Operations that only move elements (reshape, concatenate, pad, ...) run on the labels themselves. Where a rule is
    not sure, it identifies units: that loses a symmetry and never invents one.
    """

    def __init__(self, net: TracedNet):
        self.net = net
        self.count = 2  # FREE and FIXED
        self.values: dict[fx.Node, Any] = {}  # labels (or tuples of labels) in the shape of the node's value
        self.plain: dict[fx.Node, Any] = {}  # sizes, indices and other values that depend on no activation
        self.axes: dict[tuple[str, int], Tensor | None] = {}  # in order of use; None where no axis was chosen yet
        self.leaves: dict[str, Tensor] = {}  # parameters that take part like activations: a label for every element
        self.same = [(torch.tensor([FIXED]), torch.tensor([FIXED]))]
        self.root = torch.arange(0)
        self.apart: list[tuple[Tensor, Tensor]] = []  # (units, class): units of different classes may not share a group
        self.state: dict[Any, Tensor] = net.model.state_dict(keep_vars=True)
        self.aliases = {name: names for names in aliases(net.model).values() for name in names}
        self.sides_of: dict[fx.Node, list[Tensor]] = {}  # units on every axis of a weight that forward computes
        self.made: list[tuple[fx.Node, str, Tensor]] = []  # (node, layer, its output units)
        self.now: Any = None  # the node whose rule is applied

    def fresh(self, n: int) -> Tensor:
        """Numbers of n new units."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def identify(self, a: Tensor, b: Tensor) -> None:
        """Make units the same, element by element."""
        a, b = torch.broadcast_tensors(a, b)
        where = tuple(slice(None) if varies(a, i) or varies(b, i) else slice(0, 1) for i in range(a.ndim))
        a, b = a[where].flatten(), b[where].flatten()
        known = (a != b) & (a != FREE) & (b != FREE)
        self.same.append((a[known], b[known]))

    def fix(self, x: Tensor) -> None:
        """Let these units never move."""
        self.identify(x, torch.tensor(FIXED))

    def check(self, tensor: Any) -> None:
        if tensor not in self.aliases:
            what = repr(tensor) if isinstance(tensor, str) else "a weight"
            raise UnsupportedNode(
                f"{what} is no parameter but computed before forward (weight norm, a parametrization, pruning); "
                "make it permanent first, with torch.nn.utils.parametrize or prune's remove function"
            )

    def mark(self, tensor: Any, axis: int, units: Tensor) -> None:
        """Say that an axis of a parameter or buffer indexes `units`; a shared module says it more than once.

        Of a weight that forward computes, `tensor` is the node.
        """
        if isinstance(tensor, fx.Node):
            self.identify(self.sides(tensor)[axis], units)
            return
        self.check(tensor)
        for name in self.aliases[tensor]:
            known = self.axes.get((name, axis))
            if known is None:
                self.axes[name, axis] = units
            else:
                self.identify(known, units)

    def sides(self, node: fx.Node) -> list[Tensor]:
        """Units on every axis of a weight that forward computes from parameters, element by element or by a product."""
        if node not in self.sides_of:
            self.sides_of[node] = self._sides(node)
        return self.sides_of[node]

    def _sides(self, node: fx.Node) -> list[Tensor]:
        shape, kind = self.net.shapes[node.name], self.kind(node)
        sources = [s for s in node.all_input_nodes if self.net.shapes[s.name] is not None]
        if node in self.plain or shape is None:
            return [torch.tensor(FIXED).expand(n) for n in shape or ()]
        if node.op == "get_attr":
            units = [self.fresh(n) for n in shape]
            for axis, each in enumerate(units):
                self.mark(node.target, axis, each)
            return units
        if len(shape) == 1:  # a bias: each of its elements is a unit's
            return [self.units(node)]
        if kind == "permute":
            order = torch.zeros(self.net.shapes[sources[0].name])
            like = self.net.compute(node, {s: order for s in node.all_input_nodes} | self.plain)
            strides = {stride: axis for axis, stride in enumerate(order.stride()) if order.shape[axis] > 1}
            found = self.sides(sources[0])
            return [found[strides[stride]] if n > 1 else torch.tensor([FREE])
                    for n, stride in zip(like.shape, like.stride(), strict=True)]  # fmt: skip
        if kind == "matmul":
            (*_, rows, inner), (*_, other, columns) = map(self.sides, sources)
            self.identify(inner, other)
            return [rows, columns]
        if kind not in ("add", "multiply", "activation", "identity", "normalize", "mean", "norm"):
            raise UnsupportedNode(f"a weight that forward computes by {node.target}: there is no rule for it")
        units = [torch.tensor(FREE).expand(n) for n in shape]
        for found in map(self.sides, sources):
            for axis in range(-min(len(found), len(shape)), 0):
                if shape[axis] > 1 and len(found[axis]) > 1:
                    self.identify(units[axis], found[axis])
                    units[axis] = torch.where(units[axis] == FREE, found[axis], units[axis])
        return units

    def weight(self, node: Any) -> Any:
        """What `mark` calls a weight: the parameter's name, or the node that computes it; None if it is no weight."""
        if not isinstance(node, fx.Node) or node in self.net.fed or node in self.plain:
            return None
        return node.target if node.op == "get_attr" else node

    def layer(self, x: Tensor, weight: Any, bias: Any, out: int, axis: int = -1, sides: tuple[int, int] = (1, 0)):
        """Units after a matrix along one axis; `sides` are the weight's axes of inputs and outputs.

        If no units lie on that axis but on another, each of them goes through the same matrix, and stays.
        """
        axis %= x.ndim
        shape = (*x.shape[:axis], out, *x.shape[axis + 1 :])
        if not varies(x, axis) and any(varies(x, i) for i in range(x.ndim)):
            for side, n in zip(sides, (x.shape[axis], out), strict=True):
                self.mark(weight, side, torch.tensor(FIXED).expand(n))
            if bias is not None:
                self.mark(bias, 0, torch.tensor(FIXED).expand(out))
            return x.narrow(axis, 0, 1).expand(shape)
        self.mark(weight, sides[0], self.channels(x, axis))
        return spread(self.produce(weight, bias, self.fresh(out), sides[1]), shape, axis)

    def produce(self, weight: Any, bias: Any, units: Tensor, axis: int = 0) -> Tensor:
        """Mark the axes of a layer's weight and bias that make its output units."""
        self.mark(weight, axis, units)
        if bias is not None:
            self.mark(bias, 0, units)
        if isinstance(weight, str):
            self.made.append((self.now, weight.rpartition(".")[0] or weight, units))
        return units

    def channels(self, x: Tensor, axis: int) -> Tensor:
        """Units along one axis of an activation, the same everywhere else."""
        moved = _thin(x.movedim(axis, -1)).flatten(0, -2).expand(-1, x.shape[axis])
        units = moved.amax(0)
        self.identify(moved, units)
        free = units == FREE
        units[free] = self.fresh(int(free.sum()))
        return units

    def parameter(self, name: Any) -> Tensor:
        """Labels of a parameter's elements; which of its axes holds units is settled when the graph has been walked."""
        self.check(name)
        tensor = self.state[name]
        if (known := self.leaves.get(self.aliases[name][0])) is None:
            known = self.leaves[self.aliases[name][0]] = self.fresh(tensor.numel()).view(tensor.shape)
            for alias in self.aliases[name]:
                self.axes |= {(alias, axis): self.axes.get((alias, axis)) for axis in range(tensor.ndim)}
        return known

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
            return fixed(shape)
        if over_a or over_b:  # a few values, each used by many units
            few, many = (a, b) if over_a else (b, a)
            if not any(varies(few, i) and varies(many, i) for i in range(rank)):
                if not (_thin(few) == FREE).all():
                    self.fix(few)
                    self.separate(many, [i for i in range(rank) if few.shape[i] > 1 and varies(many, i)])
                return many.expand(shape)
            many = self.merge(many, over_a or over_b)  # one value for each block of units: the block moves as a unit
            a, b = few, many
        self.identify(a, b)
        a, b = sorted((a.expand(shape), b.expand(shape)), key=lambda x: _thin(x).numel())
        return _compact(torch.where(a == FREE, b, a)) if (_thin(a) == FREE).any() else a

    def merge(self, x: Tensor, axes: Collection[int]) -> Tensor:
        """Make the units along these axes one."""
        first = _thin(x).amax(tuple(axes), keepdim=True)
        self.identify(x, first)
        return first.expand(x.shape)

    def together(self, x: Tensor, axes: Collection[int]) -> None:
        """A symmetric reduction over these axes: their units may permute among themselves only."""
        rows = _thin(x).movedim(tuple(axes), tuple(range(-len(axes), 0))).flatten(-len(axes))
        rows = rows.reshape(-1, rows.shape[-1])
        if rows.shape[1] > 1:
            self.apart.append((rows, torch.arange(len(rows))[:, None].expand_as(rows)))

    def separate(self, x: Tensor, axes: Collection[int]) -> None:
        """Units at different places along these axes meet different constants: they may not change places."""
        if axes:
            x = _thin(x)
            place = torch.arange(math.prod(x.shape[i] for i in axes))
            place = place.view([x.shape[i] if i in axes else 1 for i in range(x.ndim)])
            self.apart.append((x.reshape(-1), place.expand(x.shape).reshape(-1)))

    def collapse(self, x: Tensor, axes: Collection[int]) -> Tensor:
        """Units of a sum, mean, maximum, ... over some axes, which keep length 1."""
        axes = [axis % x.ndim for axis in axes]
        within = any(varies(x, i) for i in axes)
        if within and any(varies(x, i) for i in range(x.ndim) if i not in axes):
            x = self.merge(x, axes)
        elif within:
            self.together(x, axes)
            x = fixed(x.shape)
        return x[tuple(slice(0, 1) if i in axes else slice(None) for i in range(x.ndim))]

    # ---- the walk

    def value(self, node: fx.Node) -> Any:
        """Labels of an input of a rule; indices, sizes and the like as they are."""
        if node in self.plain:
            value = self.plain[node]
            return constant(value) if isinstance(value, Tensor) and value.is_floating_point() else value
        if node not in self.values and node.op == "get_attr":
            table = all(self.kind(user) in ("conv", "linear") for user in node.users)  # a table of coordinates
            if isinstance(self.state[node.target], nn.Parameter) or not table:
                return self.parameter(node.target)
            return fixed(self.state[node.target].shape)
        if node not in self.values:  # what is computed from parameters alone is labelled when it is used
            self.values[node] = self.apply(node)
        return self.values[node]

    def units(self, node: fx.Node) -> Any:
        """Labels of an input of a rule; of indices and masks as well, which depend on no activation."""
        known = self.plain.get(node)
        return constant(known) if isinstance(known, Tensor) else self.value(node)

    def read(self, argument: str | fx.Node | Tensor) -> Tensor:
        """Labels of an argument of a rule: of a parameter, by its name, of a computed one, or of an activation."""
        if isinstance(argument, fx.Node):
            return self.units(argument)
        return self.parameter(argument) if isinstance(argument, str) else argument

    def kind(self, node: fx.Node) -> str:
        """Kind of a node, the same for a module and its function."""
        return self.net.kinds[node.name].removeprefix("functional-")

    def arguments(self, node: fx.Node, names: tuple[str, ...]) -> tuple[Tensor, dict[str, Any]]:
        """Labels of the input and, by name, the rest: names of parameters, labels of activations, plain values."""

        def read(source):
            weight = self.weight(source)
            return self.units(source) if weight is None else weight

        given: dict[str, Any] = dict(node.kwargs)
        positional: Any = node.args or [given.pop(next(iter(given)))]
        first, *rest = positional
        if node.op != "call_module" or self.kind(node) == "attention":
            return self.units(first), fx.node.map_arg(dict(zip(names, rest, strict=False)) | given, read)
        module = self.net.modules[node.target]
        values = {name: getattr(module, name, None) for name in names}
        values = {k: f"{node.target}.{k}" if isinstance(v, Tensor) else v for k, v in values.items() if v is not None}
        return self.units(first), values

    def visit(self, node: fx.Node) -> None:
        """Label a node's value; the nodes before it have been visited."""
        if node.name in self.net.plain:
            self.plain[node] = self.net.plain[node.name]
        elif node.op == "get_attr":  # parameters are labelled where they are used
            tensor = self.net.compute(node, {})
            if not averaged(self.state.get(node.target)):
                self.plain[node] = tensor.detach().cpu()
        elif node.op == "placeholder":
            shape = self.net.shapes[node.name]
            if shape is None:
                raise UnsupportedNode(f"input {node.target!r} is no tensor; pass several as (x, z) or by name")
            self.values[node] = fixed(shape)
        elif node.op == "output":
            for x in tensors_in([self.units(source) for source in node.all_input_nodes]):
                self.fix(x)
        elif all(source in self.plain for source in node.all_input_nodes) and not self._has_parameters(node):
            value = self.net.compute(node, self.plain)
            self.plain[node] = value.cpu() if isinstance(value, Tensor) else value
        elif (node in self.net.fed or self._has_parameters(node)) and (node.users or _in_place(node)):
            self.values[node] = self.apply(node)

    def _has_parameters(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(True for _ in self.net.modules[node.target].parameters())

    def apply(self, node: fx.Node) -> Tensor | tuple:
        """Labels of a node's value, by the rule of its kind."""
        what = type(self.net.modules[node.target]) if node.op == "call_module" else node.target
        missing = f"node '{node.name}': no permutation rule for {getattr(what, '__name__', what)}"
        if self.kind(node) not in RULES:
            if all(user.op == "output" for user in node.users) and self.net.shapes[node.name] is not None:
                for source in node.all_input_nodes:  # such as the predicted class: what it reads may not move
                    for x in tensors_in(self.units(source)):
                        self.fix(x)
                return fixed(self.net.shapes[node.name])
            raise UnsupportedNode(missing)
        function, names = RULES[self.kind(node)]
        before, self.now = self.now, node
        try:
            if names:
                x, arguments = self.arguments(node, names)
                out = function(self, node, x, **arguments)
            else:
                out = function(self, node)
            return _compact_all(out)
        except Exception as error:  # arguments that the rule does not know, among others
            raise UnsupportedNode(f"{missing} in this use: {error}") from error
        finally:
            self.now = before

    def resolve(self) -> Tensor:
        """Representative of every unit number: the smallest number identified with it, as far as is known now."""
        from scipy.sparse import coo_array  # here, as it takes long to import
        from scipy.sparse.csgraph import connected_components

        self.root = torch.cat([self.root, torch.arange(len(self.root), self.count)])
        a, b = (self.root[torch.cat([pair[i] for pair in self.same])].numpy() for i in (0, 1))
        edges = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(self.count, self.count))
        _, component = connected_components(edges, directed=False)
        smallest = np.full(component.max() + 1, self.count)
        np.minimum.at(smallest, component, np.arange(self.count))
        self.root = torch.from_numpy(smallest[component])[self.root]
        self.same = self.same[:1]  # the others are in the representatives now
        return self.root

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
                if axis != chosen and (other := self.axes.get((name, axis))) is not None:
                    self.fix(other)
        return self.resolve()


# ------------------------------------------------------------------------------------- one rule for every kind of node

# kind (see `TracedNet`) -> rule, and names of its arguments after the input. A rule returns the labels of the node's
# value. It gets (labels, node), and if arguments are named: the labels of the input, and the arguments by their names,
# which are a function's parameters in order, or a module's attributes.
RULES: dict[str, tuple[Callable, tuple[str, ...]]] = {}


def rule(*kinds: str, arguments: str = "") -> Callable[[Callable], Callable]:
    """Register a rule for some kinds of nodes."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(kinds, (function, tuple(arguments.split()))))
        return function

    return register


@rule("conv", arguments="weight bias stride padding dilation groups")
@rule("conv-transpose", arguments="weight bias stride padding output_padding groups")
def conv(labels: Labels, node, x, weight, bias=None, groups=1, **_):
    inputs, shape = labels.channels(x, 1), labels.net.shapes[node.name]
    out = int(labels.kind(node) == "conv-transpose")  # the weight's axis of outputs
    if groups == 1:
        labels.mark(weight, 1 - out, inputs)
        return spread(labels.produce(weight, bias, labels.fresh(shape[1]), out), shape, 1)
    # The weight's input axis is shared by all groups, so the channels of a group stay together and in order; a
    # group moves as one unit, its outputs with its inputs. A depthwise convolution has groups of one channel.
    blocks = inputs.view(groups, -1)
    labels.identify(blocks, blocks[:, :1])
    outputs = blocks[:, 0].repeat_interleave(shape[1] // groups)
    labels.produce(weight, None if out else bias, inputs if out else outputs)
    if out and bias is not None:
        labels.mark(bias, 0, outputs)
    return spread(outputs, shape, 1)


@rule("linear", arguments="weight bias")
def linear(labels: Labels, node, x, weight, bias=None, **_):
    return labels.layer(x, weight, bias, labels.net.shapes[node.name][-1])


@rule("batchnorm", "instancenorm", arguments="running_mean running_var weight bias")
@rule("affine", arguments="weight bias")
def batchnorm(labels: Labels, node, x, **parameters):
    axis = labels.net.axis(node.name)
    units = labels.channels(x, axis)
    for name in parameters.values():
        if isinstance(name, str | fx.Node | Tensor):
            labels.mark(name, 0, units)
    return spread(units, x.shape, axis)


@rule("layernorm", arguments="normalized_shape weight bias")
def layernorm(labels: Labels, node, x, normalized_shape, weight=None, bias=None, **_):
    labels.together(x, range(-len(normalized_shape), 0))
    for name in (weight, bias):
        if isinstance(name, str | fx.Node | Tensor):  # the third argument of rms_norm is a number
            x = labels.combine(x, labels.read(name))
    return x


@rule("groupnorm", arguments="num_groups weight bias")
def groupnorm(labels: Labels, node, x, num_groups, weight=None, bias=None, **_):
    x = batchnorm(labels, node, x, weight=weight, bias=bias)
    labels.together(labels.channels(x, 1).view(num_groups, -1), [1])  # they share mean and variance
    return x


@rule("add", "multiply")
def pointwise(labels: Labels, node):
    return functools.reduce(labels.combine, tensors_in([labels.units(source) for source in node.all_input_nodes]))


@rule("activation")
def activation(labels: Labels, node):
    module = labels.net.modules.get(node.target)
    prelu = isinstance(module, nn.PReLU)
    if not prelu and node.target is not torch.prelu:
        return pointwise(labels, node)
    x, weight = labels.units(node.args[0]), f"{node.target}.weight" if prelu else node.args[1].target
    return labels.combine(x, labels.parameter(weight).view(-1, *[1] * (x.ndim - 2)))


@rule("identity")
def identity(labels: Labels, node):
    return labels.units(node.all_input_nodes[0])


@rule("softmax", arguments="dim")
def softmax(labels: Labels, node, x, dim, **_):
    labels.together(x, [dim])
    return x


@rule("mean", arguments="dim keepdim")
def mean(labels: Labels, node, x, dim=None, keepdim=False, **_):
    if isinstance(dim, Tensor):  # the larger of two
        return pointwise(labels, node)
    axes = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    out, shape = labels.collapse(x, axes), labels.net.shapes[node.name]
    if shape is None:  # values, and where they are
        out = out if keepdim is True else out.squeeze(axes)
        return out, fixed(out.shape)
    return out.reshape(shape)


@rule("norm", arguments="p dim keepdim")
def norm(labels: Labels, node, x, dim=None, **_):
    return mean(labels, node, x, dim)


@rule("glu", arguments="dim")
def glu(labels: Labels, node, x, dim=-1, **_):
    return labels.combine(*x.chunk(2, dim))


@rule("constant")
def same_everywhere(labels: Labels, node):
    return torch.tensor(FREE).expand(labels.net.shapes[node.name])


@rule("field")
def field_of(labels: Labels, node):
    return labels.units(node.args[0])[("values", "indices").index(node.args[1])]


@rule("record")
def parts(labels: Labels, node):
    return tuple(labels.units(source) for source in node.all_input_nodes)


@rule("pool", "resize")
def pool(labels: Labels, node):
    return spread(labels.channels(identity(labels, node), 1), labels.net.shapes[node.name], 1)


@rule("reshape", "permute", "concat", "split", "getitem")
def structure(labels: Labels, node):
    values = {source: labels.value(source) for source in node.all_input_nodes}
    if node.target == "view":  # the labels' strides are others than the activation's
        x, *shape = fx.node.map_arg(node.args, values.__getitem__)
        return x.reshape(*shape)
    return labels.net.compute(node, values)


@rule("unfold")
def unfold(labels: Labels, node):
    (source,) = node.all_input_nodes
    return labels.net.compute(node, {source: labels.units(source).double()}).long()


@rule("pad", arguments="padding mode value")
def pad(labels: Labels, node, x, padding, mode="constant", value=None):
    return F.pad(x.double(), padding, mode).long()  # a constant is FREE, whatever its value
