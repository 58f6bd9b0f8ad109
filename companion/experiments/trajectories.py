"""What happens to a network while it is trained on, every so many steps (Qu and Horvath 2024, Secs. 3.2 and 4.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from companion.experiments.pairs import Pair
from companion.runs import store, train
from companion.runs.data import Dataset, iterate, load
from companion.runs.names import parse_run, recipe_of
from companion.runs.recipes import Recipe
from companion.runs.train import fit
from repairlib.diagnostics import distance
from repairlib.evaluation import evaluate
from repairlib.recording import copy_model

Measure = Callable[[nn.Module], Mapping[str, float]]


def trajectory(
    model: nn.Module,
    dataset: Dataset,
    recipes: Sequence[Recipe],
    measure: Measure,
    every: int,
    *,
    until: Callable[[Mapping[str, float]], bool] = lambda row: False,
    seed: int = 0,
) -> list[dict]:
    """Train a copy of a network by one recipe after the other, and measure it on the way.

    Args:
        model: where to start. Untouched.
        dataset: what to train on.
        recipes: how; the momentum starts anew with each.
        measure: of the network, in evaluation mode or not, to numbers by name.
        every: steps from one measurement to the next; the start and the end are measured, too.
        until: of the latest numbers, whether to stop.
        seed: of the order and the augmentation of the data.

    Returns:
        Rows {step, **measured}.
    """
    model = copy_model(model).to(dataset.device)
    rows = [{"step": 0, **measure(model)}]
    for recipe in recipes:
        before = rows[-1]["step"]
        last = recipe.trained_epochs * max(1, len(dataset.train) // recipe.batch_size)

        def look(step: int, network: nn.Module, loss, before: int = before, last: int = last) -> bool:
            if step % every and step != last:
                return False
            rows.append({"step": before + step, **measure(network)})
            return until(rows[-1])

        if not until(rows[-1]):
            fit(model, dataset, recipe, seed, callback=look)
    return rows


def recovery_rows(
    pair: Pair,
    starts: Mapping[str, nn.Module],
    lr: float,
    epochs: int,
    every: int,
    enough: float = 0.9,
    images: int = 500,
) -> list[dict]:
    """Networks trained until they fit the training data (Sec. 4.2, Figs. 4C, 36 to 41).

    Args:
        pair: of the data, and of the recipe, which is that of the endpoints at a constant rate (App. C).
        starts: the networks by name, for instance midpoints. Untouched.
        lr: learning rate.
        epochs: at most.
        every: steps from one measurement to the next.
        enough: accuracy on training images to stop at, in (0, 1].
        images: how many training images that accuracy is measured on, the first ones.

    Returns:
        Rows {network, step, accuracy: on the test set, train_accuracy}.
    """
    recipe = replace(
        recipe_of(parse_run(pair.runs[0])), name="recovery", epochs=epochs, lr=lr, schedule="constant", milestones=(),
        warmup_epochs=0, weight_decay=1e-4, start=0, stop=None, until=None, init=Recipe.init, nobias=False,
    )  # fmt: skip
    known = iterate(pair.dataset, "train", limit=images)

    def measure(model: nn.Module) -> dict[str, float]:
        return {"accuracy": pair.evaluate(model)[1], "train_accuracy": evaluate(model, known)[1]}

    return [
        {"network": network, **row}
        for network, start in starts.items()
        for row in trajectory(
            start, pair.dataset, [recipe], measure, every, until=lambda row: row["train_accuracy"] >= enough
        )
    ]


def distance_rows(runs: tuple[str, str], epochs: Sequence[int]) -> list[dict]:
    """Distance between two networks while they are trained, from their initial weights on (Figs. 5C and 62).

    Both are trained anew, as their names say, up to the last of the epochs. The stored networks are the end.

    Args:
        runs: names of two runs of one model, none of which continues another.
        epochs: after which to measure; those from the last one on are left out.

    Returns:
        Rows {epoch: from 0, distance: l2 of all parameters}.
    """
    recipe, dataset = recipe_of(parse_run(runs[0])), load(parse_run(runs[0]).data, device=train.default_device())
    per_epoch = max(1, len(dataset.train) // recipe.batch_size)
    steps = {0: 0} | {epoch * per_epoch: epoch for epoch in epochs if epoch < recipe.trained_epochs}
    seen: dict[int, list[nn.Module]] = {step: [] for step in steps}

    def keep(step: int, model: nn.Module, loss: Tensor) -> bool:
        if step in steps:
            seen[step].append(copy_model(model).cpu())
        return step == max(steps)

    for run in runs:
        train.train(run, dataset=dataset, device=dataset.device, callback=keep, progress=False)
    ends = [store.get(run, "cpu") for run in runs]
    found = {epoch: distance(*seen[step]) for step, epoch in steps.items()}
    found[recipe.trained_epochs] = distance(*ends)
    return [{"epoch": epoch, "distance": value} for epoch, value in found.items()]


def retraining_rows(pair: Pair, recipes: Sequence[Recipe], every: int) -> list[dict]:
    """Network A trained on: out of its basin, and back to another place of it (App. E.2, Fig. 13).

    Returns:
        Rows {step, accuracy: on the test set, distance: from A, BatchNorm statistics included}.
    """

    def measure(model: nn.Module) -> dict[str, float]:
        return {"accuracy": pair.evaluate(model)[1], "distance": distance(pair.a, model, buffers=True)}

    return trajectory(pair.a, pair.dataset, recipes, measure, every)
