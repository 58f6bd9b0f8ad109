"""Trained networks pruned at once, and renormalised (Qu and Horvath 2024, Sec. 5, Apps. F.4 and G)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from companion.experiments.pairs import CALIBRATION_BATCH, trained
from companion.experiments.statistics import has_batchnorm
from companion.runs import train
from companion.runs.data import Loader, iterate, load
from repairlib import pruning
from repairlib.corrections import TARGETS
from repairlib.evaluation import evaluate
from repairlib.names import check
from repairlib.renorm import Goals, reset
from repairlib.woodfisher import WoodFisher


@dataclass(frozen=True)
class Trained:
    """A trained network with its data.

    Attributes:
        model: the network, as trained.
        train, test: batches of all training images, without augmentation, and of the test set.
        calibration: batches of the training images that statistics are measured on.
    """

    model: nn.Module
    train: Loader
    test: Loader
    calibration: Loader


def load_trained(
    run: str, calibration: int | None = None, device: str | None = None, *, test_images: int | None = None
) -> Trained:
    """The network of a run, trained first if it is not stored yet.

    Args:
        run: its name.
        calibration: training images for statistics, always the same; None for all.
        device: default `train.default_device()`.
        test_images: evaluate on so many, always the same; default all.
    """
    device = device or train.default_device()
    dataset = load(train.parse_run(run).data, device=device)
    known = iterate(dataset, "train", CALIBRATION_BATCH, limit=calibration)
    test = iterate(dataset, "test", limit=test_images)
    return Trained(trained(run, device), iterate(dataset, "train"), test, known)


@dataclass(frozen=True)
class Settings:
    """How second derivatives are estimated.

    Attributes:
        images: training images for the diagonal Fisher information.
        gradients, batch, block: of WoodFisher, see `repairlib.woodfisher.WoodFisher`.
    """

    images: int = 400
    gradients: int = 400
    batch: int = 1
    block: int = 100


Pruned = Iterator[tuple[float, nn.Module]]


def _by_scores(scores: pruning.Scores, scope: str, model: nn.Module, sparsities: Iterable[float]) -> Pruned:
    for sparsity in sparsities:
        yield sparsity, pruning.prune(model, pruning.mask_smallest(scores, sparsity, scope))


def _wood_fisher(network: Trained, sparsities: Iterable[float], how: Settings) -> Pruned:
    fisher = WoodFisher(network.model, network.train, block=how.block, samples=how.gradients, batch=how.batch)
    scores = fisher.scores()
    for sparsity in sparsities:
        masks = pruning.mask_smallest(scores, sparsity)
        yield sparsity, pruning.prune(network.model, masks, fisher.update(masks))


# By name: from a network, sparsities and settings to pairs (sparsity, pruned network). Scores are made once for all.
PRUNERS: dict[str, Callable[[Trained, Iterable[float], Settings], Pruned]] = {
    "global magnitude": lambda network, sparsities, how: _by_scores(
        pruning.magnitude_scores(network.model), "global", network.model, sparsities
    ),
    "layer magnitude": lambda network, sparsities, how: _by_scores(
        pruning.magnitude_scores(network.model), "layer", network.model, sparsities
    ),
    "diagonal Fisher": lambda network, sparsities, how: _by_scores(
        pruning.fisher_scores(network.model, network.train, limit=how.images), "global", network.model, sparsities
    ),
    "WoodFisher": _wood_fisher,
    "random": lambda network, sparsities, how: _by_scores(
        pruning.random_scores(network.model), "layer", network.model, sparsities
    ),
}


FOLDED = {"targets": ("conv", "linear"), "limit": None}  # corrections that weights and biases take up
After = Callable[[nn.Module], nn.Module]


def _repaired(**options) -> Callable[[nn.Module, Iterable], After]:
    """Towards the statistics of the dense network, which are measured once for all that is pruned from it."""

    def prepared(dense: nn.Module, data: Iterable) -> After:
        goals = Goals(dense, data, **(FOLDED | options))
        return lambda pruned: goals.renormalize(pruned).model

    return prepared


def _as_in_the_paper(dense: nn.Module, data: Iterable) -> After:
    """RESET of a network with BatchNorm, REPAIR of any other."""
    return AFTER_PRUNING["RESET" if has_batchnorm(dense) else "REPAIR"](dense, data)


# By name: from a dense network and data to a function from a network that was pruned from it to the renormalised one.
AFTER_PRUNING: dict[str, Callable[[nn.Module, Iterable], After]] = {
    "none": lambda dense, data: lambda pruned: pruned,
    "renormalised": _as_in_the_paper,
    "RESET": lambda dense, data: lambda pruned: reset(pruned, data).model,
    "REPAIR": _repaired(),
    "REPAIR, shrunk": _repaired(shrink=True),
    "REPAIR, simultaneous": _repaired(method="simultaneous"),
    "REPAIR, blocks too": _repaired(targets=TARGETS),
    "RESCALE": _repaired(correct="rescale"),
    "RESCALE, shrunk": _repaired(correct="rescale", shrink=True),
}


def pruning_rows(
    network: Trained,
    sparsities: Sequence[float],
    pruners: Sequence[str] = ("global magnitude", "layer magnitude", "diagonal Fisher", "WoodFisher"),
    renorms: Sequence[str] = ("none", "renormalised"),
    how: Settings | None = None,
) -> list[dict]:
    """A network pruned in some ways, before and after renormalisation (Figs. 2A, 6D, 72, 73).

    Args:
        network: what to prune. Untouched.
        sparsities: shares of the weights of convolutions and linear layers that go, in [0, 1].
        pruners: names of `PRUNERS`.
        renorms: names of `AFTER_PRUNING`.
        how: see `Settings`.

    Returns:
        Rows {pruner, sparsity, renorm, loss (nats), accuracy (in [0, 1])}, and for each pruner those of the dense
        network, of sparsity 0 and without renormalisation.
    """
    dense = dict(zip(("loss", "accuracy"), evaluate(network.model, network.test), strict=True))
    afters = {
        renorm: AFTER_PRUNING[check(renorm, AFTER_PRUNING, "renormalisation")](network.model, network.calibration)
        for renorm in renorms
    }
    rows = []
    for pruner in pruners:
        check(pruner, PRUNERS, "pruner")
        rows.append({"pruner": pruner, "sparsity": 0.0, "renorm": "none", **dense})
        for sparsity, pruned in PRUNERS[pruner](network, sparsities, how or Settings()):
            for renorm, after in afters.items():
                loss, accuracy = evaluate(after(pruned), network.test)
                rows.append(
                    {"pruner": pruner, "sparsity": sparsity, "renorm": renorm, "loss": loss, "accuracy": accuracy}
                )
    return rows


def sample_rows(
    run: str,
    sparsities: Sequence[float],
    samples: Iterable[int],
    pruners: Sequence[str],
    test_images: int | None = None,
) -> list[dict]:
    """A network pruned and renormalised with few training images, and with all (Fig. 74).

    Args:
        run: its name.
        sparsities, pruners: see `pruning_rows`.
        samples: numbers of images; all of them come last.
        test_images: see `load_trained`.

    Returns:
        Rows {samples: "64 images", ..., "all images" or "before", pruner, sparsity, renorm, loss, accuracy}.
    """
    rows = [
        {"samples": "before", **row}
        for row in pruning_rows(load_trained(run, 1, test_images=test_images), sparsities, pruners, ["none"])
    ]
    for number in (*samples, None):
        network = load_trained(run, number, test_images=test_images)
        name = "all images" if number is None else f"{number} images"
        found = pruning_rows(network, sparsities, pruners, ["renormalised"])
        rows += [{"samples": name, **row} for row in found if row["renorm"] != "none"]
    return rows
