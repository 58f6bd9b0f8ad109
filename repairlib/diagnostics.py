"""What happens inside an interpolated network: variance ratios, channel statistics, agreement of aligned units."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from repairlib.corrections import target_nodes
from repairlib.moments import Moments, gather
from repairlib.tracing import Batches, trace


def variance_ratio(moments: Moments, k: int, ends: tuple[int, int] = (0, 1)) -> float:
    """Variance of a layer of network k relative to the endpoints: 1 is healthy, towards 0 is collapse.

    ``v_k / ((v_1 + v_2) / 2)`` with v the sum of the units' variances (Jordan et al. 2022, Sec. 3.1).

    Args:
        moments: moments of all networks at one tap.
        k: index of the network.
        ends: indices of the endpoints.

    Raises:
        ValueError: both endpoints are constant there.
    """
    v = moments.var(k).sum()
    end = (moments.var(ends[0]).sum() + moments.var(ends[1]).sum()) / 2
    if end == 0:
        raise ValueError("the endpoints do not vary at this node; a variance ratio is undefined")
    return float(v / end)


def layer_moments(
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
        Rows {network, layer (from 1), node, ratio, goal}. The goal is REPAIR's at the midpoint: a little below 1, as
        Eq. 4 interpolates stds and the ratio compares variances.
    """
    moments = layer_moments([model_a, model_b, *models.values()], data, targets)
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
    moments = layer_moments(list(models.values()), data, [node])[node]
    return [
        {"network": name, "channel": c, "variance": float(var)}
        for k, name in enumerate(models)
        for c, var in enumerate(moments.var(k))
    ]


def unit_agreement(
    model_a: nn.Module, model_b: nn.Module, data: Iterable, targets: Sequence[str] = ("conv", "linear")
) -> dict[str, Tensor]:
    """Correlation of unit i of A with unit i of B (units,), by layer."""
    return {name: m.corr() for name, m in layer_moments([model_a, model_b], data, targets, cross="paired").items()}
