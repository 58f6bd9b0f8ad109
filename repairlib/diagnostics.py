"""What happens inside an interpolated network: variance ratios, channel statistics, agreement of aligned units."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from repairlib.corrections import target_nodes
from repairlib.moments import Moments, gather
from repairlib.renorm import predicted_variance
from repairlib.tracing import Batches, trace


def variance_ratio(moments: Moments, k: int, ends: tuple[int, int] = (0, 1)) -> float:
    """Variance of a layer of network k relative to the endpoints: 1 is healthy, towards 0 is collapse.

    ``v_k / ((v_1 + v_2) / 2)`` with v the sum of the units' variances (Jordan et al. 2022, Sec. 3.1).

    Args:
        moments: of all networks at one tap.
        k: the network in question.
        ends: which networks are the endpoints.

    Raises:
        ValueError: both endpoints are constant there, so that the ratio is undefined.
    """
    v = moments.var(k).sum()
    end = (moments.var(ends[0]).sum() + moments.var(ends[1]).sum()) / 2
    if end == 0:
        raise ValueError("the endpoints do not vary at this node; a variance ratio is undefined")
    return float(v / end)


def _gather_at(
    models: Sequence[nn.Module], data: Iterable, targets: Sequence[str], cross: str = "none"
) -> dict[str, Moments]:
    """Moments of several networks at the targets of the first, in order of execution."""
    batches = Batches(data, models[0])
    example = batches.example()
    nets = [trace(model, example) for model in models]
    return gather(nets, batches, target_nodes(nets[0], targets), cross)


def variance_profile(
    model_a: nn.Module,
    model_b: nn.Module,
    models: dict[str, nn.Module],
    data: Iterable,
    targets: Sequence[str] = ("conv", "linear"),
) -> list[dict]:
    """Variance ratio of several networks at every layer, from one pass (Jordan et al. 2022, Fig. 2).

    Args:
        model_a, model_b: endpoints; aligned ones, for the goal.
        models: name -> network of the same architecture, repaired or not.
        data: any iterable of batches.
        targets: layers to report, see `repairlib.corrections.target_nodes`; preactivations unless blocks are asked for.

    Returns:
        Rows {network, layer (from 1), node, ratio, goal}, where goal is what REPAIR asks for at the midpoint: a little
        below 1 if matched units differ in std, as Eq. 4 interpolates stds and the ratio compares variances.
    """
    moments = _gather_at([model_a, model_b, *models.values()], data, targets)
    goals = {
        node: float(((m.std(0) + m.std(1)) / 2).square().sum() / ((m.var(0) + m.var(1)) / 2).sum())
        for node, m in moments.items()
    }
    return [
        {"network": name, "layer": layer, "node": node, "ratio": variance_ratio(m, k), "goal": goals[node]}
        for k, name in enumerate(models, start=2)
        for layer, (node, m) in enumerate(moments.items(), start=1)
    ]


def channel_statistics(models: dict[str, nn.Module], data: Iterable, node: str) -> list[dict]:
    """Variance of every channel of one node (Jordan et al. 2022, Fig. 3 left).

    Args:
        models: name -> network, all of one architecture.
        data: any iterable of batches.
        node: name of the node.

    Returns:
        Rows {network, channel, variance}.
    """
    moments = _gather_at(list(models.values()), data, [node])[node]
    return [
        {"network": name, "channel": c, "variance": float(var)}
        for k, name in enumerate(models)
        for c, var in enumerate(moments.var(k))
    ]


def unit_agreement(
    model_a: nn.Module, model_b: nn.Module, data: Iterable, targets: Sequence[str] = ("conv", "linear")
) -> dict[str, Tensor]:
    """Correlation of unit i of A with unit i of B at every layer (units,): how alike aligned units are."""
    return {name: m.corr() for name, m in _gather_at([model_a, model_b], data, targets, cross="paired").items()}


def std_over_root_variance(
    model_a: nn.Module, model_b: nn.Module, data: Iterable, targets: Sequence[str] = ("conv",), alpha: float = 0.5
) -> dict[str, float]:
    """How far REPAIR's goal lies below what an interpolated BatchNorm divides by, mean over channels, per layer.

    ``[(1-alpha) std_1 + alpha std_2] / sqrt((1-alpha) std_1^2 + alpha std_2^2)``, at most 1: REPAIR interpolates the
    std (Jordan et al. 2022, Eq. 4), interpolated BatchNorm statistics hold the interpolated variance. Channels that
    are constant in both networks are left out.
    """
    ratios = {}
    for name, m in _gather_at([model_a, model_b], data, targets).items():
        variance = (1 - alpha) * m.var(0) + alpha * m.var(1)
        std = (1 - alpha) * m.std(0) + alpha * m.std(1)
        ratios[name] = float((std / variance.sqrt())[variance > 0].mean())
    return ratios


def first_layer_theory(
    model_a: nn.Module, model_b: nn.Module, model_mid: nn.Module, data: Iterable, alpha: float = 0.5
) -> list[dict]:
    """Predicted and measured variance of the first layer's units (Jordan et al. 2022, Sec. 3.2).

    Compares the measured ``Var(X_alpha)`` with Eq. 5 and with the rule of thumb ``(0.5 + 0.5 corr) Var(X_1)``.

    Args:
        model_a, model_b: aligned endpoints.
        model_mid: their interpolation at `alpha`.
        data: any iterable of batches.
        alpha: interpolation coefficient.

    Returns:
        Rows {unit, corr, variance_a, variance_b, eq5, rule_of_thumb, measured}; dead units are left out.
    """
    (m,) = _gather_at([model_a, model_b, model_mid], data, ["stem"], cross="paired").values()
    corr, eq5 = m.corr(), predicted_variance(m, alpha)
    alive = ~(m.dead(0) | m.dead(1))
    columns = {
        "corr": corr, "variance_a": m.var(0), "variance_b": m.var(1), "eq5": eq5,
        "rule_of_thumb": (0.5 + 0.5 * corr) * m.var(0), "measured": m.var(2),
    }  # fmt: skip
    return [
        {"unit": i, **{k: float(v[i]) for k, v in columns.items()}} for i in torch.nonzero(alive).flatten().tolist()
    ]
