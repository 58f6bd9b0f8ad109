"""Renormalise networks: REPAIR, RESCALE, RESHIFT and RESET.

Every variant sets ``x -> gain x + shift`` per channel at chosen nodes. Reference networks give the goals, a mean and a
std for each channel. Gain and shift follow from the goals and from the network's present statistics (`correction`), and
go into ordinary weights (`fold`).
"""

import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from repairlib.corrections import (
    TARGETS,
    Correction,
    Repaired,
    Statistics,
    Units,
    attach,
    batchnorms,
    correct_moments,
    correction,
    fold,
    foldable,
    target_nodes,
)
from repairlib.data_independent import BatchNormTo
from repairlib.inputs import Batches, as_batches, check_limit, device_of
from repairlib.interpolate import check_compatible, check_models, mix_states, with_state
from repairlib.moments import Moments, gather, moments_of
from repairlib.names import check
from repairlib.progress import bar
from repairlib.recording import check_model, copy_model, eval_mode
from repairlib.tracing import TracedNet, check_graphs, trace

METHODS = ("closed-form", "simultaneous", "sequential", "batch")
CORRECT = ("repair", "rescale", "reshift")

GoalsT = TypeVar("GoalsT", bound="Goals")
Rule = Callable[[Moments], Correction]  # a target's present statistics -> its correction
Note = Callable[[Moments], Correction | None]  # the same, or None to leave it as it is
Constant = dict[str, Tensor]  # by node, which channels are constant, bool (units,)


def predicted_variance(ends: Moments, alpha: float = 0.5) -> Units:
    """Variance of each unit of the interpolated network, exact in the first layer (Jordan et al. 2022, Eq. 5).

    ``Var(X_alpha) = (1-alpha)^2 Var_1 + alpha^2 Var_2 + 2 alpha (1-alpha) Cov(X_1, X_2)``.

    Args:
        ends: moments of two aligned endpoints with ``cross="paired"`` or "full".
        alpha: interpolation coefficient.
    """
    w_a, w_b = 1 - alpha, alpha
    cov = ends.cov()
    total = w_a**2 * ends.var() + w_b**2 * ends.var(1)
    return (total + 2 * w_b * w_a * (cov.diagonal() if cov.ndim == 2 else cov)).clamp_min(0)


def _weights(point: Any, n: int) -> tuple[float, ...]:
    """One weight a network: ``(1 - alpha, alpha)`` for two, equal weights for None."""
    if point is None:
        return (1 / n,) * n
    weights = tuple(point) if np.ndim(point) else (1 - point, point)
    if len(weights) != n or not abs(sum(weights) - 1) < 1e-6:
        raise ValueError(f"{n} networks need {n} weights that sum to 1, not {weights}")
    return weights


def _norms_to_reset(net: TracedNet) -> dict[str, fx.Node]:
    """Nodes of BatchNorms with running statistics, each of them called once."""
    norms = batchnorms(net)
    calls = Counter(node.target for node in norms.values())
    for target, number in calls.items():
        if number > 1:
            raise ValueError(f"BatchNorm {target!r} is called {number} times, and its calls have statistics of their "
                             "own: give each call a module, or leave BatchNorms as they are")  # fmt: skip
    return norms


def _refuse_nan(values: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse statistics that are not finite; says at which node they are."""
    found = torch.stack([torch.stack([each.sum() for each in parts]).sum().cpu() for parts in values.values()])
    for name, finite in zip(values, found.isfinite().tolist(), strict=True):
        if not finite:
            raise ValueError(f"activations at node {name!r} are NaN or infinite on this data: look at the data, or "
                             "convert the network to a wider type")  # fmt: skip


def _statistics(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of channels, and which of them are constant."""
    return moments.mean(), moments.var(), moments.dead()


def _set_statistics(module: Any, mean: Tensor, var: Tensor) -> None:
    with torch.no_grad():
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)


def _sequential(
    net: TracedNet, batches: Batches, goals: Mapping[str, Note], reset: bool, reference: TracedNet | None = None
) -> tuple[dict[str, Correction], Constant]:
    """Corrections from exact statistics, in one pass: every node is computed for the whole set before the next one.

    A target is measured with all corrections before it in place, as if the network were repaired layer by layer with
    one pass each. All activations of the set are held at the nodes in flight. A reference runs along, so that rules
    have the moments of both.
    """
    norms = _norms_to_reset(net) if reset else {}
    left = len(goals) + len(norms)
    values: list[dict] = [{} for _ in batches]
    others = [reference.walk(x, list(goals)) for x in batches] if reference else []
    corrections, constant = {}, {}
    known: dict[fx.Node, tuple[Tensor, Tensor, Tensor]] = {}  # `_statistics` of the node before, if it is a target
    models = [net.model, *([reference.model] if reference else [])]
    with eval_mode(*models), bar(left, "statistics", "layer") as progress:
        for node in net.nodes:
            if not left:
                break
            if node.name in norms:
                source: Any = node.args[0]
                mean, var, constant[node.name] = known.get(source) or _statistics(
                    moments_of(chunk[source] for chunk in values)
                )
                _set_statistics(net.modules[node.target], mean, var)
                left -= 1
                progress.update()
            # Only a placeholder reads the batches; the loader is asked once more, not held twice.
            inputs = batches if node.op == "placeholder" else [None] * len(values)
            for chunk, x in zip(values, inputs, strict=True):
                chunk[node] = net.compute(node, chunk, None if x is None else net.feed(x))
                net.forget(node, chunk)
            known = {}
            if node.name in goals:
                moments, axis = Moments("paired" if reference else "none"), net.axis(node.name)
                for chunk, other in itertools.zip_longest(values, others):
                    both = [chunk[node], *([next(other)[1]] if other else [])]
                    moments.update(*(x.movedim(axis, 1) for x in both))
                mean, var, dead = _statistics(moments)
                constant[node.name] = dead
                if (fix := goals[node.name](moments)) is not None:
                    corrections[node.name] = fix
                    for chunk in values:
                        chunk[node] = fix.apply(chunk[node], axis)
                    mean, var, dead = fix.gain * mean + fix.shift, fix.gain**2 * var, dead | (fix.gain == 0)
                known = {node: (mean, var, dead)} if axis == 1 else {}
                left -= 1
                progress.update()
    return corrections, constant


def _simultaneous(
    net: TracedNet, batches: Batches, goals: Mapping[str, Rule], reset: bool, unbiased: bool = False
) -> tuple[dict[str, Correction], Constant]:
    """Corrections by the paper's procedure: targets normalise each batch by its own statistics while recording them."""
    norms = _norms_to_reset(net) if reset else {}
    if both := norms.keys() & goals.keys():
        raise ValueError(f"node {min(both)!r} cannot be reset and corrected at once; use method='sequential'")
    seen = {name: Moments() for name in (*goals, *norms)}

    def correct(name: str, x: Tensor) -> Tensor:
        axis = net.axis(name)
        seen[name].update(x.movedim(axis, 1))
        batch = moments_of([x], axis)
        return goals[name](batch.unbiased() if unbiased else batch).apply(x, axis)

    def normalize(name: str, module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """BatchNorm in train mode: by this batch's statistics, which we pool ourselves."""
        (x,) = inputs
        seen[name].update(x)
        batch = moments_of([x])
        mean, var = batch.mean().to(x.dtype), batch.var().to(x.dtype)
        return nn.functional.batch_norm(x, mean, var, module.weight, module.bias, eps=module.eps)

    modules = {name: net.modules[node.target] for name, node in norms.items()}
    hooks = [module.register_forward_hook(functools.partial(normalize, name)) for name, module in modules.items()]
    edits = {name: functools.partial(correct, name) for name in goals}
    with eval_mode(net.model):
        for x in batches:
            for _ in net.walk(x, list(seen), edits):
                pass
    for hook in hooks:
        hook.remove()
    for name, module in modules.items():
        _set_statistics(module, seen[name].mean(), seen[name].var())
    corrections = {name: goals[name](seen[name]) for name in goals}
    return corrections, {name: moments.dead() for name, moments in seen.items()}


MEASURE: dict[str, Callable] = {"sequential": _sequential, "simultaneous": _simultaneous}


@dataclass(frozen=True)
class Options:
    """Options of every renormalisation: what is corrected, and from which statistics.

    Attributes:
        correct: "repair" (mean and std), "rescale" (std, about zero) or "reshift" (mean), see `correction`.
        average: replace a layer's goal stds by their mean over channels (RESCALE (average), Qu & Horvath 2024,
            Table 1).
        eps: added to the variance that is divided by; 1e-5 in Qu & Horvath's released code.
        shrink: draw a layer's gains towards their geometric mean, the more the less reliable they are (the idea of
            Zhan et al. 2026, arXiv 2605.21426). A gain's logarithm has a variance of about ``(1 - rho^2) / n`` from n
            examples, with rho the channel's correlation with itself in the reference. For "sequential", and one network
            as the reference.
        method: one of four:

            * "sequential": statistics are exact for the resulting network; one pass;
            * "simultaneous": Jordan et al.'s procedure, one pass with batch statistics;
            * "closed-form": Eq. 5, without a pass; for weighted averages of two references only;
            * "batch": every evaluated batch is normalised by its own statistics, see `BatchNormTo`.
        unbiased: whether "simultaneous" divides a batch by its unbiased variance while it records, as Qu & Horvath's
            released RESCALE does. Their released REPAIR does not.
        targets: see `target_nodes`. Recorded references bring their own.
        visible: whether targets are corrected whose correction no weight can take up, so that the result is a
            torch.fx.GraphModule; without them it stays of its own class.
        bn: existing BatchNorm layers stay "frozen" (the paper) or are "reset", also in the references (released code).
        limit: number of examples to use, the first ones; None for all. "sequential" holds their activations at two or
            three nodes at a time: 1.3 GB a node for 5,000 images of CIFAR-10 at 64 channels.

    Raises:
        ValueError: an unknown option, with the nearest, or two that exclude each other.
    """

    correct: str = "repair"
    average: bool = False
    eps: float = 0.0
    shrink: bool = False
    method: str = "sequential"
    unbiased: bool = False
    targets: str | Sequence[str] = TARGETS
    visible: bool = True
    bn: str = "frozen"
    limit: int | None = 5000

    def __post_init__(self):
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        check(self.correct, CORRECT, "correct")
        check(self.method, METHODS, "method")
        check(self.bn, ("frozen", "reset"), "bn")
        check_limit(self.limit)
        if not 0 <= self.eps < math.inf:  # so written, NaN is refused
            raise ValueError(f"eps is added to a variance: at least 0, not {self.eps}")
        if self.bn == "reset" and self.method in ("closed-form", "batch"):
            raise ValueError(
                f"method={self.method!r} makes no pass through the network, so it cannot reset BatchNorm layers"
            )
        if self.correct == "reshift" and self.method == "closed-form":
            raise ValueError("method='closed-form' takes the means to be right already: there is nothing to reshift")
        if self.method == "batch" and not self.visible:
            raise ValueError("method='batch' corrects every batch as it comes, so nothing folds: it needs visible=True")
        if self.shrink and (self.method != "sequential" or self.correct == "reshift"):
            raise ValueError("shrink=True shrinks gains from exact statistics: it needs method='sequential', and "
                             "correct='repair' or 'rescale'")  # fmt: skip
        if self.unbiased and self.method != "simultaneous":
            raise ValueError("unbiased=True is of method='simultaneous', which normalises batch by batch")
        if self.correct == "reshift" and self.average:
            raise ValueError("average=True averages the goal std, which correct='reshift' does not use")


class Goals:
    """Goal statistics from reference networks, measured once, to renormalise any number of networks.

    ``mean = sum_i w_i mean_i`` and ``std = sum_i w_i std_i`` for each channel of the targets (Jordan et al. 2022,
    Eqs. 3 and 4, for any number of networks).

    Args:
        references: one network or several of one architecture, untouched; or recorded statistics, see `Recorder`.
        data: one batch, or any iterable of batches x or (x, y); 5,000 examples suffice (Sec. 4.2).
        **options: see `Options`.

    Raises:
        ValueError: bad option, different architectures, non-finite weights, empty data, nothing to correct.
    """

    def __init__(self, references: nn.Module | Statistics | Sequence, data: Iterable, **options):
        for name in options:
            check(name, Options.__dataclass_fields__, "option")
        self.options = Options(**options)
        self.data = as_batches(data)
        self.references: list[Any] = [references] if isinstance(references, (nn.Module, Mapping)) else list(references)
        if not self.references:
            raise ValueError("renormalising needs at least one reference")
        recorded = isinstance(self.references[0], Mapping)
        if self.options.method == "closed-form" and (recorded or len(self.references) != 2):
            raise ValueError("method='closed-form' needs two networks as references")
        self._check_shrink()
        if recorded:
            self.statistics: list[Statistics] = self.references
            self.targets = list(self.statistics[0])
            if not self.targets or any(s.keys() != self.statistics[0].keys() for s in self.statistics):
                raise ValueError("recorded statistics must be of one or more nodes, the same in every reference")
            for statistics in self.statistics:
                _refuse_nan(statistics)
                for name, (_, std) in statistics.items():
                    if (std < 0).any():
                        raise ValueError(f"recorded statistics have a negative standard deviation at node {name!r}")
            return
        check_models(*self.references)
        self.batches = Batches(self.data, self.references[0], self.options.limit)
        self.example = self.batches.example()
        resets, method = self.options.bn == "reset", self.options.method
        if resets:
            self.references = [copy_model(model) for model in self.references]
        nets = [trace(model, self.example) for model in self.references]
        check_graphs(*nets)
        self.targets = target_nodes(nets[0], self.options.targets)
        if not self.options.visible:
            self.targets = foldable(nets[0], self.targets)
        if not self.targets:
            kind = "" if self.options.visible else " whose weights can take a correction up"
            raise ValueError(f"nothing to correct: the network has no {' or '.join(self.options.targets)} node{kind}")
        if resets and method == "sequential":  # goals are read in the pass that resets
            seen: list[dict[str, Moments]] = [{} for _ in nets]
            for net, found in zip(nets, seen, strict=True):
                notes = {net.corrected(name): functools.partial(found.__setitem__, name) for name in self.targets}
                _reset(net, self.batches, method, notes)
            self.statistics = [{name: (m.mean(), m.std()) for name, m in found.items()} for found in seen]
        else:
            for net in nets if resets else ():
                _reset(net, self.batches, method)
            self.ends = gather(nets, self.batches, self.targets, "paired" if method == "closed-form" else "none")
            self.statistics = [{name: (m.mean(k), m.std(k)) for name, m in self.ends.items()} for k in range(len(nets))]
        for statistics in self.statistics:
            _refuse_nan(statistics)

    def _check_shrink(self) -> None:
        if self.options.shrink and (isinstance(self.references[0], Mapping) or len(self.references) != 1):
            raise ValueError("shrink compares channels with those of one network as the reference")

    def with_options(self: GoalsT, **options) -> GoalsT:
        """The same, as made with these options, but nothing is measured again: to compare corrections.

        Args:
            **options: all that differ from the defaults, see `Options`.

        Raises:
            ValueError: a bad option, or one with which something else is measured: `targets`, `visible`, `bn`, `limit`,
                and `method` to or from "closed-form", or where BatchNorms are reset.

        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in "ab")
        >>> repair = Repair(a, b, [torch.randn(100, 4)])
        >>> rescaled = repair.with_options(correct="rescale")(0.5)
        """
        for name in options:
            check(name, Options.__dataclass_fields__, "option")
        out, mine = copy.copy(self), self.options
        out.options = Options(**options)
        deciding = [] if isinstance(self.references[0], Mapping) else ["targets", "visible", "bn", "limit"]
        if (deciding and mine.bn == "reset") or "closed-form" in (mine.method, out.options.method):
            deciding.append("method")
        for name in deciding:
            if getattr(out.options, name) != getattr(mine, name):
                raise ValueError(f"{name}={getattr(out.options, name)!r} needs other statistics than "
                                 f"{name}={getattr(mine, name)!r}, which were measured: make {type(self).__name__} "
                                 "anew")  # fmt: skip
        out._check_shrink()
        return out

    def at(self, weights: float | Sequence[float] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Goal mean and std (units,) at every target; a subclass may define others.

        Args:
            weights: one a reference, of sum 1; for two references also ``alpha``. Default: equal.
        """
        weights = _weights(weights, len(self.statistics))

        def mix(values: list[Tensor]) -> Tensor:
            return functools.reduce(torch.add, (w * value for w, value in zip(weights, values, strict=True)))

        goals = {}
        for name in self.statistics[0]:
            mean, std = (mix([s[name][i] for s in self.statistics]) for i in (0, 1))
            if self.options.correct != "reshift" and (std < 0).any():
                raise ValueError(f"so far outside the references, at weights {weights}, the goal standard deviation of "
                                 f"a channel at node {name!r} is negative: come closer")  # fmt: skip
            goals[name] = mean.double(), (std.mean().expand_as(std) if self.options.average else std).double()
        return goals

    def renormalize(self, model: nn.Module, weights: float | Sequence[float] | None = None) -> Repaired:
        """Copy of a network, of the references' architecture, with the goal statistics.

        Args:
            model: the network, on any device. Untouched.
            weights: see `at`.

        Raises:
            KeyError: a target is no node of this network.
            ValueError: the network is not finite or has other channels; or it is not the references' average, with
                ``method="closed-form"``.
        """
        check_model(model)
        check_compatible(model.state_dict(), names=["the network to renormalise"])
        if self.options.method == "closed-form":
            average = self._average(weights)
            check_compatible(average, model.state_dict())
            for name, value in model.state_dict().items():
                if value.is_floating_point() and not torch.allclose(value, average[name].to(value), 1e-2, 1e-4):
                    raise ValueError(f"method='closed-form' is for the weighted average of the references; {name!r} is "
                                     "something else: measure with method='sequential'")  # fmt: skip
        return self._renormalize(copy_model(model), weights)

    def _average(self, weights: float | Sequence[float] | None) -> dict[str, Tensor]:
        states = [model.state_dict() for model in self.references]
        return mix_states(states, _weights(weights, len(states)))

    def _renormalize(self, model: nn.Module, weights: float | Sequence[float] | None) -> Repaired:
        """Renormalise a network in place."""
        batches = Batches(self.data, model, self.options.limit)
        example = batches.example()
        net = trace(model, example)
        goals: dict[str, dict] = {}
        for name, (mean, std) in self.at(weights).items():
            net.check_names([name])
            name, units = net.corrected(name), net.shapes[name][net.axis(name)]
            if units != len(mean):
                raise ValueError(f"node {name!r} has {units} channels, its goals are of {len(mean)}")
            goals[name] = {
                "goal_mean": mean.to(device_of(model)), "goal_std": std.to(device_of(model)),
                "correct": self.options.correct, "eps": self.options.eps,
            }  # fmt: skip
        if self.options.method == "batch":
            modules = {name: BatchNormTo(**goal, axis=net.axis(name)) for name, goal in goals.items()}
            return Repaired(attach(net, modules), {}, tuple(modules))
        if self.options.method == "closed-form":
            _, alpha = _weights(weights, 2)
            corrections = {}
            for (name, goal), ends in zip(goals.items(), self.ends.values(), strict=True):
                mean, var = goal["goal_mean"], predicted_variance(ends, alpha)  # the first layer has this mean already
                corrections[name] = correction(mean, var, var.sqrt() <= 1e-6 * mean.abs(), **goal)
        else:
            shrink = self.options.shrink
            rules = {name: functools.partial(correct_moments, **goal, shrink=shrink) for name, goal in goals.items()}
            how: dict[str, Any] = {"reference": trace(self.references[0], example)} if shrink else {}
            how |= {"unbiased": True} if self.options.unbiased else {}
            corrections, constant = MEASURE[self.options.method](net, batches, rules, self.options.bn == "reset", **how)
            _refuse_nan({name: (fix.gain, fix.shift) for name, fix in corrections.items()})
            return _report(fold(net, corrections), constant)
        return fold(net, corrections)


class Repair(Goals):
    """REPAIR of every network between aligned endpoints (Jordan et al. 2022, Sec. 4).

    ``E[X_alpha] = (1-alpha) E[X_1] + alpha E[X_2]`` and ``std(X_alpha) = (1-alpha) std(X_1) + alpha std(X_2)`` for each
    channel of the targets. The endpoints are measured once, here; calling the object with an alpha makes the network.

    Args:
        model_a, model_b: aligned endpoints, see `repairlib.align`. Untouched.
        data: any iterable of batches x or (x, y); 5,000 examples suffice (Sec. 4.2).
        others: further aligned endpoints; calls then take one weight an endpoint.
        **options: see `Options`; RESCALE is ``correct="rescale"``.

    Raises:
        ValueError: unknown option, different architectures, non-finite weights, empty data, nothing to correct.
    """

    def __init__(
        self, model_a: nn.Module, model_b: nn.Module, data: Iterable, *, others: Sequence[nn.Module] = (), **options
    ):
        super().__init__([model_a, model_b, *others], data, **options)

    def check_ends(self, *models: nn.Module) -> None:
        """Refuse networks that are not its endpoints; a ValueError names the first parameter that differs."""
        for reference, model in zip(self.references, models, strict=False):
            theirs = dict(reference.named_parameters())
            for name, value in model.named_parameters():
                mine = theirs.get(name)
                if mine is None or not torch.equal(mine.detach(), value.detach().to(mine)):
                    raise ValueError(f"`repaired` is of other endpoints than these two: {name!r} differs; make it as "
                                     "Repair(model_a, model_b, data), of the aligned networks")  # fmt: skip

    def __call__(self, alpha: float | Sequence[float] = 0.5) -> Repaired:
        """Repaired network at `alpha`, or at one weight an endpoint.

        Alpha 0 and 1, or one weight of 1, give an endpoint bit for bit (the reset one with ``bn="reset"``).
        """
        weights = _weights(alpha, len(self.references))
        model = with_state(self.references[0], self._average(weights))
        return Repaired(model, {}) if weights.count(0) == len(weights) - 1 else self._renormalize(model, weights)


def renormalize(
    model: nn.Module,
    references: nn.Module | Statistics | Sequence,
    data: Iterable,
    *,
    weights: Sequence[float] | None = None,
    **options,
) -> Repaired:
    """Give a network's channels the mean and std that they have in reference networks, see `correction`.

    The reference of a pruned network is the dense one (Qu & Horvath 2024, Sec. 5). That of an average may even be an
    independent solution (Table 8).

    Args:
        model: any network. Untouched.
        references: one network or several of the same architecture, or recorded statistics; see `Goals`.
        data: one batch x (n, ...), which often is enough, or any iterable of batches x or (x, y).
        weights: one a reference, of sum 1; default: equal.
        **options: see `Options`.

    >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> from copy import deepcopy
    >>> pruned = deepcopy(dense)
    >>> _ = pruned[0].weight.data.mul_(torch.rand(8, 4) > 0.3)
    >>> repaired = renormalize(pruned, dense, [torch.randn(100, 4)])
    >>> list(repaired.corrections), repaired.visible
    (['_0'], ())
    """
    return Goals(references, data, **options).renormalize(model, weights)


def reset(model: nn.Module, data: Iterable, *, method: str = "sequential") -> Repaired:
    """Copy of a model whose BatchNorm statistics are measured anew (RESET; Izmailov et al. 2018).

    Args:
        model: any network with BatchNorm layers. Untouched.
        data: one batch, or any iterable of batches.
        method: "sequential" measures each layer's input over all data with the layers before it already reset;
            "simultaneous" lets layers normalise by batch statistics while measuring, as BatchNorm's train mode does.

    Raises:
        ValueError: the model has no BatchNorm statistics, or the data is empty.
    """
    check(method, MEASURE, "method")
    out = copy_model(model)
    batches = Batches(as_batches(data), out)
    constant = _reset(trace(out, batches.example()), batches, method)
    return _report(Repaired(out, {}), constant)


def _reset(net: TracedNet, batches: Batches, method: str, notes: Mapping[str, Note] | None = None) -> Constant:
    """Measure the BatchNorms of a network anew, in place; notes get the moments of further nodes. Returns constants."""
    if not (norms := batchnorms(net)):
        raise ValueError(f"{type(net.model).__name__} has no BatchNorm statistics to reset; use Repair instead")
    _, constant = MEASURE[method](net, batches, notes or {}, True)
    modules = {name: net.modules[node.target] for name, node in norms.items()}
    _refuse_nan({name: (module.running_mean, module.running_var) for name, module in modules.items()})
    return constant


def _report(repaired: Repaired, constant: Constant) -> Repaired:
    return replace(repaired, dead={name: flags.nonzero().flatten() for name, flags in constant.items() if flags.any()})
