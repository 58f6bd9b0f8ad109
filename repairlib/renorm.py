"""Renormalise networks: REPAIR, RESCALE, RESHIFT and RESET, and folding into ordinary weights.

Every variant sets, at chosen nodes, ``x -> gain x + shift`` per channel. Goals, a mean and a std for each channel, come
from reference networks; gain and shift follow from the goals and from what the network's statistics are now; `fold`
puts them into ordinary weights.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from repairlib.corrections import TARGETS, Correction, Repaired, Units, attach, batchnorms, fold, target_nodes
from repairlib.interpolate import check_compatible, mix_states, with_state
from repairlib.moments import BatchMeanMoments, Moments, gather
from repairlib.names import check
from repairlib.tracing import Batches, ChannelAffine, TracedNet, as_batches, eval_mode, trace

METHODS = ("closed-form", "simultaneous", "sequential", "batch")
CORRECT = ("repair", "rescale", "reshift")

Statistics = Mapping[str, tuple[Tensor, Tensor]]  # by node: mean and std of its channels, (units,) each
Rule = Callable[[Moments | BatchMeanMoments], Correction]  # what a target's present statistics ask for


# -------------------------------------------------------------------------------------------- how gain and shift follow


def correction(
    mean: Units,
    var: Units,
    dead: Shaped[Tensor, " units"],
    goal_mean: Units,
    goal_std: Units,
    correct: str = "repair",
    eps: float = 0.0,
) -> Correction:
    """Gain and shift that take (mean, var) to the goal, wholly or in part (Qu & Horvath 2024, Sec. 4.1).

    * repair: ``x -> (x - mean) / std * goal_std + goal_mean`` (Jordan et al. 2022, Sec. 4.2; Qu & Horvath's text swaps
      the names of the two goals);
    * rescale: ``x -> x / std * goal_std``, about zero, so that a bias is scaled as well;
    * reshift: ``x -> x - mean + goal_mean``.

    with ``std = sqrt(var + eps)``.

    Args:
        mean, var: of the channels now (units,).
        dead: which of them are constant (units,), bool; they are shifted, and scaled only if eps is added.
        goal_mean, goal_std: what they shall be (units,).
        correct, eps: see `Options`.
    """
    if eps:
        dead = torch.zeros_like(dead)
    std = (var + eps).sqrt().masked_fill(dead, 1.0)
    gain = torch.ones_like(std) if correct == "reshift" else torch.where(dead, 1.0, goal_std / std)
    return Correction(gain, torch.zeros_like(gain) if correct == "rescale" else goal_mean - gain * mean)


def _correct(now: Moments | BatchMeanMoments, **goal) -> Correction:
    return correction(now.mean(), now.var(), now.dead(), **goal)


def predicted_variance(ends: Moments | Sequence[Moments], alpha: float | Sequence[float] = 0.5) -> Units:
    """Variance of each unit of the interpolated network, exact in the first layer (Jordan et al. 2022, Eq. 5).

    ``Var(sum_i w_i X_i) = sum_i w_i^2 Var_i + 2 sum_{i<j} w_i w_j Cov(X_i, X_j)``, for two networks
    ``(1-alpha)^2 Var_1 + alpha^2 Var_2 + 2 alpha (1-alpha) Cov(X_1, X_2)``.

    Args:
        ends: moments of both aligned endpoints with ``cross="paired"``, or "full". Of n networks, a list: the moments
            of networks i to n-1 at place i, without the last, as `gather` makes them.
        alpha: interpolation coefficient, or one weight a network.
    """
    ends = [ends] if isinstance(ends, Moments) else ends
    w = _weights(alpha, len(ends) + 1)
    total = w[0] ** 2 * ends[0].var()
    for i, first in enumerate(ends):
        total = total + w[i + 1] ** 2 * first.var(1)
        for j in range(1, len(ends) + 1 - i):
            cov = first.cov(j)
            total = total + 2 * w[i + j] * w[i] * (cov.diagonal() if cov.ndim == 2 else cov)
    return total.clamp_min(0)


def _weights(point: float | Sequence[float] | None, n: int) -> tuple[float, ...]:
    """One weight a network: of two, ``(1 - alpha, alpha)``; None weighs all alike."""
    if point is None:
        return (1 / n,) * n
    weights = tuple(point) if isinstance(point, Sequence) else (1 - point, point)
    if len(weights) != n or not abs(sum(weights) - 1) < 1e-6:
        raise ValueError(f"{n} networks need {n} weights that sum to 1, not {weights}")
    return weights


def _moments_of(chunks: Iterable[Tensor]) -> Moments:
    moments = Moments()
    for chunk in chunks:
        moments.update(chunk)
    return moments


def _set_statistics(module: nn.Module, moments) -> None:
    with torch.no_grad():
        module.running_mean.copy_(moments.mean())
        module.running_var.copy_(moments.var())


def _sequential(net: TracedNet, batches: Batches, goals: Mapping[str, Rule], reset: bool) -> dict[str, Correction]:
    """Exact statistics in one pass: every node is computed for the whole set before the next one.

    A target's statistics are measured with all corrections before it in place, which a procedure that repairs one
    layer at a time reaches with one pass a layer. All activations of the set are held at the nodes in flight.
    """
    norms = batchnorms(net) if reset else {}
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
                fix = corrections[node.name] = goals[node.name](_moments_of(chunk[node] for chunk in values))
                for chunk in values:
                    chunk[node] = fix.apply(chunk[node])
                left -= 1
    return corrections


def _simultaneous(
    net: TracedNet, batches: Batches, goals: Mapping[str, Rule], reset: bool, pooling: str
) -> dict[str, Correction]:
    """The paper's procedure: targets normalise each batch by its own statistics while these are being recorded."""
    new = BatchMeanMoments if pooling == "batch-mean" else Moments
    norms = batchnorms(net) if reset else {}
    if both := norms.keys() & goals.keys():
        raise ValueError(f"node {min(both)!r} cannot be reset and corrected at once; use method='sequential'")
    seen: dict[str, Moments] = {name: new() for name in (*goals, *norms)}

    def target(name):
        def edit(x):
            seen[name].update(x)
            return goals[name](_moments_of([x])).apply(x)

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
    return {name: goals[name](seen[name]) for name in goals}


def _measure(
    net: TracedNet, batches: Batches, goals: Mapping[str, Rule], method: str, reset_bn: bool, pooling: str
) -> dict[str, Correction]:
    """Corrections of the targets, each with the others in place; BatchNorm statistics are reset on the way."""
    if method == "sequential":
        return _sequential(net, batches, goals, reset_bn)
    return _simultaneous(net, batches, goals, reset_bn, pooling)


# ------------------------------------------------------------------------------------------------------------- public


@dataclass(frozen=True)
class Options:
    """What is corrected, and from which statistics: the options of every renormalisation here.

    Attributes:
        correct: "repair" (mean and std), "rescale" (std, about zero) or "reshift" (mean), see `correction`.
        average: replace the goal std of a layer by its mean over channels, ``mean(w) 1``; goal means stay as they are
            (RESCALE (average), Qu & Horvath 2024, Table 1).
        eps: added to the variance that is divided by; 1e-5 in Qu & Horvath's released code.
        method: "sequential" (statistics exact for the resulting network; one pass), "simultaneous" (Jordan et al.'s
            procedure: one pass in batch-statistics mode), "closed-form" (Eq. 5, no pass through the network, which must
            be the weighted average of its references) or "batch" (nothing is measured: every batch that is evaluated
            is normalised by its own statistics, `BatchNormTo`; data-independent, Qu & Horvath 2024, App. F.2).
        targets: see `target_nodes`. Recorded references themselves say where they belong.
        bn: existing BatchNorm layers stay "frozen" (the paper) or are "reset", also of the references (released code).
        pooling: how "simultaneous" pools batches, "exact" or "batch-mean" (released code, references included).
        limit: use the first so many examples of the data, None for all. "sequential" holds all their activations at the
            nodes in flight: 5,000 images of CIFAR-10 at 64 channels are 1.3 GB a node, two or three nodes at a time.

    Raises:
        ValueError: an unknown option, with the nearest, or two that exclude each other.
    """

    correct: str = "repair"
    average: bool = False
    eps: float = 0.0
    method: str = "sequential"
    targets: str | Sequence[str] = TARGETS
    bn: str = "frozen"
    pooling: str = "exact"
    limit: int | None = 5000

    def __post_init__(self):
        check(self.correct, CORRECT, "correct")
        check(self.method, METHODS, "method")
        check(self.bn, ("frozen", "reset"), "bn")
        _check_pooling(self.pooling, self.method)
        if self.bn == "reset" and self.method in ("closed-form", "batch"):
            raise ValueError(
                f"method={self.method!r} makes no pass through the network, so it cannot reset BatchNorm layers"
            )
        if self.correct == "reshift" and self.method == "closed-form":
            raise ValueError("method='closed-form' takes the means to be right already: there is nothing to reshift")
        if self.correct == "reshift" and self.average:
            raise ValueError("average=True averages the goal std, which correct='reshift' does not use")


class Goals:
    """Statistics of reference networks, measured once, to renormalise any number of networks towards.

    ``mean = sum_i w_i mean_i`` and ``std = sum_i w_i std_i`` for each channel of the targets (Jordan et al. 2022, Eqs.
    3, 4, for any number of networks).

    Args:
        references: networks of one architecture, untouched, or recorded statistics (node -> mean and std, as `Recorder`
            keeps them); one or a sequence of either.
        data: one batch, or any iterable of batches x or (x, y); 5,000 examples suffice (Sec. 4.2).
        **options: see `Options`.

    Raises:
        ValueError: bad option, different architectures, non-finite weights, empty data, nothing to correct.
    """

    def __init__(self, references: nn.Module | Statistics | Sequence, data: Iterable, **options):
        self.options = how = Options(**options)
        self.data = as_batches(data)
        self.references = [references] if isinstance(references, (nn.Module, Mapping)) else list(references)
        if not self.references:
            raise ValueError("renormalising needs at least one reference")
        recorded = isinstance(self.references[0], Mapping)
        if how.method == "closed-form" and (recorded or len(self.references) < 2):
            raise ValueError("method='closed-form' needs two or more networks as references")
        if recorded:
            self.statistics: list[Statistics] = self.references
            self.targets = list(self.statistics[0])
            if not self.targets or any(s.keys() != self.statistics[0].keys() for s in self.statistics):
                raise ValueError("recorded statistics must be of one or more nodes, the same in every reference")
            return
        check_compatible(*(model.state_dict() for model in self.references))
        self.batches = Batches(self.data, self.references[0], how.limit)
        self.example = self.batches.example()
        if how.bn == "reset":
            self.references = [
                reset(m, self.batches, method=how.method, pooling=how.pooling).model for m in self.references
            ]
        nets = [trace(model, self.example) for model in self.references]
        self.targets = target_nodes(nets[0], how.targets)
        if not self.targets:
            wanted = [how.targets] if isinstance(how.targets, str) else how.targets
            raise ValueError(f"nothing to correct: the network has no {' or '.join(wanted)} node")
        # Of n networks, `Moments` keeps the covariances with the first: one pass each for the first, second, ...
        pairs = how.method == "closed-form"
        self._passes = [
            gather(nets[i:], self.batches, self.targets, "paired" if pairs else "none", how.pooling)
            for i in range(len(nets) - 1 if pairs else 1)
        ]
        self.ends = self._passes[0]
        self.statistics = [{name: (m.mean(k), m.std(k)) for name, m in self.ends.items()} for k in range(len(nets))]

    def at(self, weights: float | Sequence[float] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Goal mean and std (units,) at every target.

        Args:
            weights: one a reference, 1 in all; of two references also ``alpha``. Default: equal.
        """
        weights = _weights(weights, len(self.statistics))
        goals = {}
        for name in self.statistics[0]:
            mean, std = (sum(w * s[name][i] for w, s in zip(weights, self.statistics, strict=True)) for i in (0, 1))
            goals[name] = mean.double(), (std.mean().expand_as(std) if self.options.average else std).double()
        return goals

    def renormalize(self, model: nn.Module, weights: float | Sequence[float] | None = None) -> Repaired:
        """Copy of a network of the references' architecture, brought to the goals.

        Args:
            model: the network, on any device. Untouched.
            weights: see `at`.

        Raises:
            KeyError: a target is no node of this network.
            ValueError: it is not finite, has other channels, or ``method="closed-form"`` and it is not the references'
                average.
        """
        check_compatible(model.state_dict(), names=["the network to renormalise"])
        if self.options.method == "closed-form":
            average = self._average(weights)
            check_compatible(average, model.state_dict())
            for name, value in model.state_dict().items():
                if value.is_floating_point() and not torch.allclose(value, average[name].to(value), 1e-2, 1e-4):
                    raise ValueError(f"method='closed-form' is for the weighted average of the references; {name!r} is "
                                     "something else: measure with method='sequential'")  # fmt: skip
        return self._renormalize(model, weights)

    def _average(self, weights: float | Sequence[float] | None) -> dict[str, Tensor]:
        states = [model.state_dict() for model in self.references]
        return mix_states(states, _weights(weights, len(states)))

    def _renormalize(self, model: nn.Module, weights: float | Sequence[float] | None) -> Repaired:
        how = self.options
        batches = Batches(self.data, model, how.limit)
        example = batches.example()
        model = copy.deepcopy(model) if how.bn == "reset" else model
        net = trace(model, example)
        goals: dict[str, dict] = {}
        for name, (mean, std) in self.at(weights).items():
            net.check_names([name])
            name, units = net.corrected(name), net.shapes[name][1]
            if units != len(mean):
                raise ValueError(f"node {name!r} has {units} channels, its goals are of {len(mean)}")
            goals[name] = {
                "goal_mean": mean.to(batches.device), "goal_std": std.to(batches.device),
                "correct": how.correct, "eps": how.eps,
            }  # fmt: skip
        if how.method == "batch":
            modules = {name: BatchNormTo(**goal) for name, goal in goals.items()}
            return Repaired(attach(model, modules, example), {}, tuple(modules))
        if how.method == "closed-form":
            corrections = {}
            for (name, goal), *ends in zip(goals.items(), *(found.values() for found in self._passes), strict=True):
                var, mean = predicted_variance(ends, weights), goal["goal_mean"]  # which the first layer has already
                corrections[name] = correction(mean, var, var.sqrt() <= 1e-6 * mean.abs(), **goal)
        else:
            rules = {name: partial(_correct, **goal) for name, goal in goals.items()}
            corrections = _measure(net, batches, rules, how.method, how.bn == "reset", how.pooling)
        return fold(model, corrections, example)


class Repair(Goals):
    """REPAIR of every network between aligned endpoints (Jordan et al. 2022, Sec. 4).

    ``E[X_alpha] = (1-alpha) E[X_1] + alpha E[X_2]`` and ``std(X_alpha) = (1-alpha) std(X_1) + alpha std(X_2)`` for each
    channel of the targets. Statistics of the endpoints are measured once, here; calling the object with an alpha makes
    the network.

    Args:
        model_a, model_b: endpoints, aligned (see `repairlib.align`). Untouched.
        data: any iterable of batches x or (x, y); 5,000 examples suffice (Sec. 4.2).
        others: further endpoints, aligned as well; a network is then asked for by one weight an endpoint.
        **options: see `Options`; RESCALE is ``correct="rescale"``.

    Raises:
        ValueError: unknown option, different architectures, non-finite weights, empty data, nothing to correct.
    """

    def __init__(
        self, model_a: nn.Module, model_b: nn.Module, data: Iterable, *, others: Sequence[nn.Module] = (), **options
    ):
        super().__init__([model_a, model_b, *others], data, **options)

    def __call__(self, alpha: float | Sequence[float] = 0.5) -> Repaired:
        """The repaired network at `alpha`, or at one weight an endpoint.

        Alpha 0 and 1, and the weight 1, give an endpoint bit for bit (the reset one with ``bn="reset"``).
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
    """Give a network's channels the mean and std that they have in reference networks.

    ``x -> (x - mean) / std * sum_i w_i std_i + sum_i w_i mean_i``, or a part of it (see `correction`). The reference of
    a pruned network is the dense one (Qu & Horvath 2024, Sec. 5), that of an average may even be an independent
    solution (Table 8).

    Args:
        model: any network. Untouched.
        references: one network or several of the same architecture, or recorded statistics; see `Goals`.
        data: one batch x (n, ...), which often is enough, or any iterable of batches x or (x, y).
        weights: one a reference, 1 in all; default equal.
        **options: see `Options`.

    Raises:
        ValueError: see `Goals`.

    >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pruned = copy.deepcopy(dense)
    >>> _ = pruned[0].weight.data.mul_(torch.rand(8, 4) > 0.3)
    >>> repaired = renormalize(pruned, dense, [torch.randn(100, 4)])
    >>> list(repaired.corrections), repaired.visible
    (['_0'], ())
    """
    return Goals(references, data, **options).renormalize(model, weights)


def reset(model: nn.Module, data: Iterable, *, method: str = "sequential", pooling: str = "exact") -> Repaired:
    """Copy of a model whose BatchNorm statistics are measured anew (RESET; Izmailov et al. 2018).

    Args:
        model: any network with BatchNorm layers. Untouched.
        data: one batch, or any iterable of batches.
        method: "sequential" measures each layer's input over all data with the layers before it already reset;
            "simultaneous" lets layers normalise by batch statistics while measuring, as BatchNorm's train mode does.
        pooling: see `Repair`.

    Raises:
        ValueError: the model has no BatchNorm statistics, or the data is empty.
    """
    check(method, ("simultaneous", "sequential"), "method")
    _check_pooling(pooling, method)
    out = copy.deepcopy(model)
    batches = Batches(as_batches(data), out)
    net = trace(out, batches.example())
    if not batchnorms(net):
        raise ValueError(f"{type(model).__name__} has no BatchNorm statistics to reset; use Repair instead")
    _measure(net, batches, {}, method, True, pooling)
    return Repaired(out, {})


def batch_statistics(model: nn.Module) -> nn.Module:
    """Copy of a model whose BatchNorms use the statistics of every batch, also in evaluation mode.

    Data-independent RESET (Qu & Horvath 2024, App. F.2); evaluate it on batches of some size (theirs: 256).

    Args:
        model: any network with BatchNorm layers. Untouched.

    Raises:
        ValueError: the model has no BatchNorm statistics.
    """
    out = copy.deepcopy(model)
    norms = [m for m in out.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no BatchNorm statistics to leave out")
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return out


class BatchNormTo(ChannelAffine):
    """Give each batch's channels the goal statistics, from their own: REPAIR that measures nothing beforehand.

    ``y_c = (x_c - mean(x_c)) / std(x_c) * goal_std_c + goal_mean_c``, or a part of it, see `correction` (Qu & Horvath
    2024, App. F.2).

    Args:
        goal_mean, goal_std: (units,).
        correct, eps: see `Options`.
    """

    def __init__(self, goal_mean: Tensor, goal_std: Tensor, correct: str = "repair", eps: float = 0.0):
        super().__init__(goal_std, goal_mean)
        self.correct, self.eps = correct, eps

    def forward(self, x: Tensor) -> Tensor:
        goals = {"goal_mean": self.bias.double(), "goal_std": self.weight.double()}
        return _correct(_moments_of([x]), **goals, correct=self.correct, eps=self.eps).apply(x)


class Recorder:
    """Running mean and std of a network's targets while it trains: goals that need no data afterwards.

    ``running = (1 - momentum) running + momentum batch`` for mean and variance, as BatchNorm keeps them, in train mode
    only (Qu & Horvath 2024, App. F.2). Forward hooks do it: the module and its state dict stay as they are.

    Args:
        model: any network.
        example: inputs (n, ...), to trace with.
        targets: see `target_nodes`; outputs of modules that are called once.
        momentum: weight of the newest batch; None weighs all batches alike.

    Raises:
        ValueError: a target is no output of a module, or of one that is called twice.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with Recorder(net, torch.zeros(2, 4)) as recorder:
    ...     _ = net(torch.randn(100, 4))
    >>> {node: tuple(mean.shape) for node, (mean, std) in recorder.statistics.items()}
    {'_0': (8,)}
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        targets: str | Sequence[str] = ("conv", "linear"),
        momentum: float | None = 0.1,
    ):
        net = trace(model, example)
        self.momentum, self._seen = momentum, {}
        calls = [node.target for node in net.nodes if node.op == "call_module"]
        self._modules = {}
        for name in target_nodes(net, targets):
            node = net.node(net.corrected(name))
            if calls.count(node.target) != 1:
                raise ValueError(f"node {name!r} is not the output of one module that is called once: cannot record it")
            self._modules[name] = net.modules[node.target]

    def __enter__(self) -> "Recorder":
        self._hooks = [
            module.register_forward_hook(partial(self._update, name)) for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _update(self, name: str, module: nn.Module, args: tuple, value: Tensor) -> None:
        if module.training:
            batch = _moments_of([value])
            count, mean, var = self._seen.get(name, (0, 0, 0))
            new = 1 / (count + 1) if self.momentum is None or not count else self.momentum
            self._seen[name] = count + 1, mean + new * (batch.mean() - mean), var + new * (batch.var() - var)

    @property
    def statistics(self) -> Statistics:
        """By node, running mean and std (units,), float64; what `Goals` and `renormalize` take as a reference."""
        return {name: (mean, var.sqrt()) for name, (_, mean, var) in self._seen.items()}


def _check_pooling(pooling: str, method: str) -> None:
    check(pooling, ("exact", "batch-mean"), "pooling")
    if pooling == "batch-mean" and method != "simultaneous":
        raise ValueError(f"pooling='batch-mean' is of method='simultaneous'; {method!r} pools exactly")
