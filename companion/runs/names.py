"""Run names: `<data>/<model>/<recipe>/s<seed>`, and two more parts for each time that the network is trained on.

    digits/resnet20-bn-w1/quick/s1                      data set, model, recipe, seed
    cifar10/vgg16-ln-w1/qu~lr0.03~init=uniform/s1       the recipe changed
    cifar10/vgg16-bn-w1/qu/s1/retrain/s2                a run that continues the run cifar10/vgg16-bn-w1/qu/s1

docs/runs.md has the whole grammar. A name holds everything that is needed to train its network, and is the path of its
checkpoint.
"""

import os
import re
from dataclasses import dataclass, replace

from companion.runs import models
from companion.runs.data import check_name
from companion.runs.recipes import Recipe, find_recipe


@dataclass(frozen=True)
class RunName:
    """A parsed run name; `str` gives the name back in full: with the model's width, and changes in their one form."""

    data: str
    model: models.ModelName  # of this run; its parent's may be another
    recipe: str
    seed: int
    parent: "RunName | None" = None  # the run that this one continues

    def __str__(self) -> str:
        return f"{self.parent or f'{self.data}/{self.model}'}/{self.recipe}/s{self.seed}"


def parse_run(name: str, data_root: str | os.PathLike | None = None, *, check_data: bool = True) -> RunName:
    """Parse a run name.

    Args:
        name: see the head of this module.
        data_root: where image folders are looked for, see data.load.
        check_data: False takes any name that a data set may have.

    Raises:
        ValueError: some part is wrong; the message names the nearest that is right.

    >>> str(parse_run("digits/resnet20-bn/quick/s1"))
    'digits/resnet20-bn-w1/quick/s1'
    >>> str(parse_run("digits/mlp2-plain-w8/smoke/s1/retrain/s2").parent)
    'digits/mlp2-plain-w8/smoke/s1'
    """
    parts = name.split("/")
    if len(parts) < 4 or len(parts) % 2:
        raise ValueError(
            f"run name {name!r} is not <data>/<model>/<recipe>/s<seed>, like digits/vgg11-bn-w0.25/quick/s1, with two "
            "more parts for each run that continues it, like retrain/s2"
        )
    try:
        data = check_name(parts[0], data_root) if check_data else parts[0]
        if not re.fullmatch(r"\w[\w.@-]*", data, re.ASCII):  # it is a folder of the store
            raise ValueError(f"unknown data set {data!r}: names have letters, digits, '_', '.', '-' and '@'")
        model, run = models.parse(parts[1]), None
        for recipe, seed in zip(parts[2::2], parts[3::2], strict=True):
            if not re.fullmatch(r"s(0|[1-9]\d{0,17})", seed):
                number = re.search(r"[1-9]\d*", seed)
                raise ValueError(f"{seed!r} is not a seed; the nearest is {f's{number[0] if number else 1}'!r}")
            if run:
                model = _child_model(model, "nobias" in recipe.split("~")[1:])
            found = find_recipe(recipe, model.kind, data, recipe_of(run) if run else None)
            _check_place(found, run)
            run = RunName(data, model, found.name, int(seed[1:]), run)
    except ValueError as error:
        raise ValueError(f"run name {name!r}: {error}") from error
    return run


def seeded(run: str, seed: int | str) -> str:
    """Name of a run from its name without the seed. `{seed}` inside, of the run that it continues, is the same seed.

    >>> seeded("digits/mlp2-plain-w8/quick/s{seed}/retrain", 2)
    'digits/mlp2-plain-w8/quick/s2/retrain/s2'
    """
    return f"{run}/s{seed}".replace("{seed}", str(seed))


def recipe_of(run: RunName) -> Recipe:
    """The recipe that a run is trained by, with its changes."""
    return find_recipe(run.recipe, run.model.kind, run.data, recipe_of(run.parent) if run.parent else None)


def lineage(run: str | RunName) -> list[str]:
    """Names of a run and all that it continues, in the order of training: the run itself is the last.

    >>> lineage("digits/mlp2-plain-w8/smoke/s1/retrain/s2")
    ['digits/mlp2-plain-w8/smoke/s1', 'digits/mlp2-plain-w8/smoke/s1/retrain/s2']
    """
    run = parse_run(run, check_data=False) if isinstance(run, str) else run
    return [*(lineage(run.parent) if run.parent else ()), str(run)]


def _child_model(parent: models.ModelName, nobias: bool) -> models.ModelName:
    """The model of a run that continues one of `parent`: plain if that was fused, without biases if so wished."""
    model = replace(parent, norm="plain") if parent.norm == "fused" else parent
    if not nobias:
        return model
    if model.norm not in ("plain", "") or "nobias" not in models.FAMILIES[model.family].flags or not model.bias:
        raise ValueError(f"~nobias takes the biases out of a plain network, and {parent} has "
                         f"{'none' if not model.bias else 'normalisation layers'}")  # fmt: skip
    return replace(model, flags=(*model.flags, "nobias"))


def _check_place(recipe: Recipe, parent: RunName | None) -> None:
    """Raise ValueError if a recipe cannot stand first in a name, or cannot continue a run."""
    if parent is None and recipe.start:
        raise ValueError(f"recipe {recipe.name!r} goes on with an epoch of another run: name that run before it, like "
                         f"<data>/<model>/<recipe>~stop{recipe.start}/s1/{recipe.name}/s2")  # fmt: skip
    if parent is None and recipe.nobias:
        raise ValueError(f"recipe {recipe.name!r} takes biases out of another run's network: name that run before it, "
                         "or end the name of the model in -nobias")  # fmt: skip
    if parent and recipe.init != Recipe.init:
        raise ValueError(f"recipe {recipe.name!r} changes the initial weights, which are those of {parent} here")
    if parent and not recipe.epochs:
        raise ValueError(f"recipe {recipe.name!r} does not train, and so continues no run")
