"""Activations of midpoints, and goals for them from elsewhere (Qu and Horvath 2024, Sec. 4.1, App. F)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from companion.experiments.pairs import Pair, trained
from companion.experiments.tables import network_name
from companion.runs import models, train
from companion.runs.data import iterate, load
from companion.runs.names import parse_run, recipe_of
from repairlib.corrections import Statistics, target_nodes
from repairlib.data_independent import Recorder, batch_statistics
from repairlib.diagnostics import activation_scales, layer_means, weight_magnitudes
from repairlib.evaluation import evaluate
from repairlib.fisher import diagonal_fisher
from repairlib.interpolate import interpolate_models
from repairlib.pruning import prunable
from repairlib.recording import eval_mode
from repairlib.renorm import renormalize, reset
from repairlib.tracing import trace

MATCHED = ("WM", "AM")


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a network has BatchNorm layers, so that RESET can renormalise it."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def new_network(pair: Pair, seed: int = 0) -> nn.Module:
    """A network of the pair's architecture that nobody has trained."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = models.build(parse_run(pair.runs[0]).model, pair.dataset.shape, pair.dataset.classes)
    return network.to(pair.dataset.device).eval()


def midpoints(pair: Pair, renorms: Sequence[str] = ("none",), **options) -> dict[str, nn.Module]:
    """Midpoints as trained and matched by weights and by activations, each renormalised in some ways, by name."""
    return {
        network_name(matching, renorm).replace("aligned", f"aligned ({matching})" if matching != "none" else "aligned"):
            pair.path(matching, renorm, **(options if renorm != "none" else {}))(0.5)
        for matching in ("none", *MATCHED)
        for renorm in renorms
    }  # fmt: skip


def renormalised_rows(pair: Pair) -> list[dict]:
    """Midpoints as trained and matched by weights, renormalised or not, and their dead units (Sec. 4.2).

    Returns:
        Rows {matching, renorm: "none", "REPAIR" or "RESCALE", method, loss, accuracy, dead: share of the units that
        are zero behind their nonlinearity on all images, mean over layers}.
    """
    rows = []
    for matching in ("none", "WM"):
        for renorm in ("none", "REPAIR", "RESCALE"):
            model = pair.path(matching, renorm, **({"method": "simultaneous"} if renorm != "none" else {}))(0.5)
            loss, accuracy = pair.evaluate(model)
            scales = activation_scales({"midpoint": model}, pair.calibration)
            dead = [row["dead"] for row in scales if row["place"] == "after"]
            rows.append({"matching": matching, "renorm": renorm, "method": "simultaneous", "loss": loss,
                         "accuracy": accuracy, "dead": sum(dead) / len(dead)})  # fmt: skip
    return rows


def scale_rows(pair: Pair, beside_new: bool = False) -> list[dict]:
    """Activations of endpoints and midpoints at every nonlinearity (Figs. 4A, 4B, 29 to 34).

    Args:
        pair: the endpoints.
        beside_new: whether an untrained network is measured instead of renormalised midpoints.

    Returns:
        Rows {network, layer, node, place, scale, mean, std, zeros, dead}, see
        `repairlib.diagnostics.activation_scales`.
    """
    renorms = ["none"] if beside_new else ["none", "REPAIR", "RESCALE"]
    networks = {"endpoint A": pair.a} | midpoints(pair, renorms, method="simultaneous")
    if beside_new:
        networks["new network"] = new_network(pair)
    return activation_scales(networks, pair.calibration)


def independent_rows(pair: Pair, seeds: Sequence[int]) -> list[dict]:
    """Midpoints with RESCALE towards the statistics of a network of another seed (Table 8).

    Args:
        pair: the endpoints.
        seeds: of the section's networks; the first that is not an endpoint's is taken.

    Returns:
        Rows {matching, renorm: "none", "RESCALE" or "RESCALE average", other: the network's run, loss, accuracy}.
    """
    run, taken = pair.runs[0].rpartition("/")[0], {name.rpartition("/s")[2] for name in pair.runs}
    other = f"{run}/s{next(seed for seed in seeds if str(seed) not in taken)}"
    goal = trained(other, pair.dataset.device)
    how = {"correct": "rescale", "method": "simultaneous", "limit": None}
    rows = []
    for matching in MATCHED:
        middle = pair.path(matching)(0.5)
        made = {
            "none": middle,
            "RESCALE": renormalize(middle, goal, pair.calibration, **how).model,
            "RESCALE average": renormalize(middle, goal, pair.calibration, average=True, **how).model,
        }
        for renorm, model in made.items():
            loss, accuracy = pair.evaluate(model)
            rows.append({"matching": matching, "renorm": renorm, "other": other, "loss": loss, "accuracy": accuracy})
    return rows


def record(model: nn.Module, pair: Pair, seed: int = 0) -> Statistics:
    """Running statistics of a network's convolutions as training leaves them: of one epoch of augmented batches.

    The last steps of training no longer move the weights, so that this is what would have been recorded in them.

    Args:
        model: an endpoint. Untouched.
        pair: of the data.
        seed: of the order and augmentation.
    """
    recipe = recipe_of(parse_run(pair.runs[0]))
    batches = iterate(pair.dataset, "train", recipe.batch_size, recipe.augment, torch.Generator().manual_seed(seed),
                      shuffle=True, drop_last=True)  # fmt: skip
    training = model.training
    example = next(iter(pair.calibration))[0][:2]
    with Recorder(model, example, targets="conv") as recorder, torch.no_grad():
        model.train()
        for x, _ in batches:
            model(x)
    model.train(training)
    return recorder.statistics


def data_independent_rows(pair: Pair, batch_size: int = 256) -> list[dict]:
    """Midpoints renormalised with and without data (App. F.2, Tables 10 and 11).

    Networks with BatchNorm are RESET; without data, every evaluated batch is normalised by its own statistics. Others
    get REPAIR and RESCALE of their convolutions; without data, towards statistics that were recorded in training, each
    evaluated batch by its own.

    Args:
        pair: the endpoints.
        batch_size: images that are evaluated together; statistics of a batch depend on it.

    Returns:
        Rows {matching, renorm, data: "used" or "not used", loss, accuracy}, and of the midpoint as it is.
    """
    test = iterate(pair.dataset, "test", batch_size=batch_size)
    of_a = None if has_batchnorm(pair.a) else record(pair.a, pair)
    rows = []
    for matching in MATCHED:
        b = pair.aligned_by(matching)
        middle = interpolate_models(pair.a, b)
        made: dict[tuple[str, str], nn.Module] = {("none", "not used"): middle}
        if of_a is None:
            made["RESET", "used"] = reset(middle, pair.calibration, method="simultaneous").model
            made["RESET", "not used"] = batch_statistics(middle)
        else:
            recorded = [of_a, record(b, pair)]
            for renorm in ("REPAIR", "RESCALE"):
                how = {"correct": renorm.lower(), "limit": None}
                made[renorm, "used"] = renormalize(
                    middle, [pair.a, b], pair.calibration, targets="conv", method="simultaneous", **how
                ).model
                made[renorm, "not used"] = renormalize(middle, recorded, pair.calibration, method="batch", **how).model
        for (renorm, data), model in made.items():
            loss, accuracy = evaluate(model, test)
            rows.append({"matching": matching, "renorm": renorm, "data": data, "loss": loss, "accuracy": accuracy})
    return rows


def magnitude_rows(pair: Pair) -> list[dict]:
    """Mean size of the parameters of every layer, of endpoint A and of midpoints (Figs. 4D and 43).

    Returns:
        Rows {network, layer (from 1), node: the layer's name, magnitude}.
    """
    networks = {"endpoint A": pair.a} | midpoints(pair)
    return _by_layer({name: weight_magnitudes(model) for name, model in networks.items()}, "magnitude")


def fisher_rows(pair: Pair, images: int) -> list[dict]:
    """Mean Fisher information of every layer's parameters, of endpoint A and of midpoints (Fig. 42).

    Args:
        pair: the endpoints.
        images: how many training images it is measured on.

    Returns:
        Rows {network, layer (from 1), node: the layer's name, information}.
    """
    networks = {"endpoint A": pair.a} | midpoints(pair)
    found = {
        name: layer_means(diagonal_fisher(model, pair.calibration, limit=images)) for name, model in networks.items()
    }
    return _by_layer(found, "information")


def zero_rows(pair: Pair) -> list[dict]:
    """Share of activations that are zero behind every nonlinearity, of endpoint A and of midpoints (Fig. 43).

    Returns:
        Rows {network, layer (from 1), node, zeros (in [0, 1])}.
    """
    rows = activation_scales({"endpoint A": pair.a} | midpoints(pair), pair.calibration)
    columns = ("network", "layer", "node", "zeros")
    return [{column: row[column] for column in columns} for row in rows if row["place"] == "after"]


SIZES = np.linspace(-6, 2, 49)  # log10, edges of the bins that sizes are counted in


def density_rows(run: str, images: int = 500) -> list[dict]:
    """How often sizes of weights and of activations occur in a network (Figs. 6B, 69, 70).

    Weights are those of convolutions and linear layers; an activation is the mean size ``E|x_c|`` of a channel of a
    convolution's output.

    Args:
        run: the network's name.
        images: training images that activations are measured on.

    Returns:
        Rows {what: "weights" or "activations", size: log10 of it, the middle of a bin, density: the share in the bin
        divided by its width, median: of all}.
    """
    dataset = load(parse_run(run).data, device=train.default_device())
    model = trained(run, dataset.device)
    weights = torch.cat([weight.flatten() for weight in prunable(model).values()]).abs()
    batches = list(iterate(dataset, "train", limit=images))
    net = trace(model, batches[0][0][:2])
    sums: dict[str, Tensor] = {}
    with eval_mode(model):
        for x, _ in batches:
            for node, values in net.walk(x, target_nodes(net, "conv")):
                sums[node] = sums.get(node, 0) + values.abs().mean(list(range(2, values.ndim))).sum(0)
    channels = torch.cat(list(sums.values())) / sum(len(x) for x, _ in batches)
    rows = []
    for what, values in {"weights": weights, "activations": channels}.items():
        logs = values[values > 0].double().log10().cpu().numpy()
        density, edges = np.histogram(logs.clip(SIZES[0], SIZES[-1]), SIZES, density=True)
        rows += [
            {"what": what, "size": float(low + high) / 2, "density": float(share), "median": float(values.median())}
            for low, high, share in zip(edges, edges[1:], density, strict=False)
        ]
    return rows


def _by_layer(found: Mapping[str, Mapping[str, float]], measure: str) -> list[dict]:
    """Rows of numbers by network and layer."""
    return [
        {"network": network, "layer": layer, "node": node, measure: value}
        for network, values in found.items()
        for layer, (node, value) in enumerate(values.items(), start=1)
    ]
