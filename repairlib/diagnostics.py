"""What happens inside networks: variances, activations and weights layer by layer, agreement of units, distances."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from repairlib.corrections import target_nodes
from repairlib.inputs import Batches
from repairlib.interpolate import check_models
from repairlib.moments import Moments, gather
from repairlib.recording import eval_mode
from repairlib.tracing import TracedNet, trace


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


def activation_scales(models: Mapping[str, nn.Module], data: Iterable) -> list[dict]:
    """Activations before and after every nonlinearity, averaged over units (Qu & Horvath 2024, Figs. 4, 29 to 34, 43).

        scale = mean_u E|x_u|,   mean = mean_u E[x_u],   std = mean_u std(x_u),   zeros = mean_u P(x_u = 0)

    with E, std and P over examples and positions. RESCALE restores std. A zero after a ReLU carries nothing on; `dead`
    is the share of the units that are zero everywhere.

    Args:
        models: name -> network, all of one architecture, repaired or not.
        data: any iterable of batches.

    Returns:
        Rows {network, layer (of the nonlinearity, from 1), node, place: "before" or "after", scale, mean, std, zeros,
        dead}, from one pass.

    Raises:
        ValueError: the networks have no nonlinearity.
    """
    batches = Batches(data, next(iter(models.values())))
    example = batches.example()
    nets = {name: trace(model, example) for name, model in models.items()}
    nodes = _nonlinearities(next(iter(nets.values())))
    if not nodes:
        raise ValueError("the networks have no nonlinearity to measure activations at")
    taps = [node for pair in nodes for node in pair]
    moments = {(name, tap): Moments() for name in nets for tap in taps}
    sizes: dict[tuple[str, str], Tensor | float] = dict.fromkeys(moments, 0.0)  # sums of |x|, unit by unit
    zeros: dict[tuple[str, str], Tensor | int] = dict.fromkeys(moments, 0)
    with eval_mode(*models.values()):
        for x in batches:
            for name, net in nets.items():
                for tap, value in net.walk(x, taps):
                    value = value.movedim(net.axis(tap), 1)
                    moments[name, tap].update(value)
                    units = value.transpose(0, 1).flatten(1)
                    sizes[name, tap] = sizes[name, tap] + units.abs().sum(1, dtype=torch.float64)
                    zeros[name, tap] = zeros[name, tap] + (units == 0).sum(1)
    return [
        {
            "network": name, "layer": layer, "node": pair[1], "place": place,
            "scale": float(sizes[name, tap].mean()) / m.count,
            "mean": float(m.mean().mean()), "std": float(m.std().mean()),
            "zeros": float(zeros[name, tap].double().mean()) / m.count,
            "dead": float((zeros[name, tap] == m.count).double().mean()),
        }
        for name in nets
        for layer, pair in enumerate(nodes, start=1)
        for place, tap in zip(("before", "after"), pair, strict=True)
        for m in [moments[name, tap]]
    ]  # fmt: skip


def _nonlinearities(net: TracedNet) -> list[tuple[str, str]]:
    """Names of every nonlinearity's input and of itself. An input that REPAIR corrects is known by its own name."""
    found = []
    for node in net.nodes:
        if net.kinds[node.name] == "activation":
            source = node.all_input_nodes[0]
            source = source.all_input_nodes[0] if net.kinds[source.name] == "affine" else source
            found.append((source.name, node.name))
    return found


def layer_means(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over the elements of every layer: of all its tensors, weights and biases, together.

    A layer is a module with a tensor of two axes or more: convolutions and linear layers, but no normalisation.

    Args:
        tensors: by name, as in a state dict; for instance Fisher information, see `fisher.diagonal_fisher`.

    >>> layer_means({"0.weight": torch.ones(2, 2), "0.bias": torch.zeros(4), "1.weight": torch.ones(2)})
    {'0': 0.5}
    """
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.rpartition(".")[0], []).append(tensor.detach().double().flatten())
    kept = [name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.ndim > 1]
    return {layer: float(torch.cat(layers[layer]).mean()) for layer in dict.fromkeys(kept)}


def weight_magnitudes(model: nn.Module) -> dict[str, float]:
    """Mean absolute value of every layer's parameters, ``mean_i |theta_i|`` (Qu & Horvath 2024, Figs. 4D and 43)."""
    return layer_means({name: p.abs() for name, p in model.named_parameters()})


def distance(model_a: nn.Module, model_b: nn.Module, buffers: bool = False) -> float:
    """Euclidean distance of two networks' parameters, ``|theta_A - theta_B|`` (Qu & Horvath 2024, Table 3).

    Args:
        model_a, model_b: networks of one architecture.
        buffers: whether means and variances of BatchNorms count as well, as in the upper half of Table 3.

    Raises:
        ValueError: the networks do not have the same tensors.
    """
    check_models(model_a, model_b)
    a, b = (
        dict(model.named_parameters()) | (dict(model.named_buffers()) if buffers else {})
        for model in (model_a, model_b)
    )
    square = sum(
        (value.detach().double() - b[name].detach().double().to(value.device)).square().sum()
        for name, value in a.items()
        if value.is_floating_point()
    )
    return float(square) ** 0.5
