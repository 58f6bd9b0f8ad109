"""Recipes: how networks are trained, by name; and the changes of a recipe that a run name may carry."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, NamedTuple

from companion.runs.data import AUGMENTATIONS, DATASETS, base_name
from companion.runs.models import FAMILIES, INITS
from repairlib.names import check, nearest

SCHEDULES = ("linear", "cosine", "step", "constant")


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD on the cross entropy.

    A new field needs a default that means what was done before, because a stored run that lacks the field counts as
    trained with its default.
    """

    name: str  # with its changes, like "qu~lr0.03"
    epochs: int  # passes over the training set
    batch_size: int  # images
    lr: float  # peak learning rate, for the mean loss over a batch
    schedule: str  # after the warm-up: "linear" or "cosine" to 0, "constant", or "step": a tenth at each milestone
    weight_decay: float = 0.0  # coefficient of (1/2)|w|^2 in the loss, for all parameters
    augment: tuple[str, ...] = ()  # see data.augment
    momentum: float = 0.9
    warmup_epochs: float = 0.0  # epochs of linear growth from 0 to lr
    nesterov: bool = False
    label_smoothing: float = 0.0  # probability spread evenly over the classes
    milestones: tuple[float, ...] = ()  # fractions of all steps, warm-up included
    init: str = "kaiming-normal"  # initial weights, see models.initial.INITS
    until: float | None = None  # stop after the first epoch with this accuracy on the training set, in (0, 1]
    start: int = 0  # epochs of the schedule that are left out, because the parent had them
    stop: int | None = None  # stop after this epoch of the schedule
    bf16: bool = False  # compute in bfloat16 where the device can (see train.precision); weights stay float32
    nobias: bool = False  # take all biases out of the parent's network first

    def __post_init__(self):
        check(self.schedule, SCHEDULES, "schedule")
        check(self.init, INITS, "init")
        for each in self.augment:
            check(each, AUGMENTATIONS, "augmentation")
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError(
                f"schedule {self.schedule!r} with milestones {self.milestones}: step needs them, and only it"
            )
        end = self.epochs if self.stop is None else self.stop
        if self.epochs and not 0 <= self.start < end <= self.epochs - (self.stop is not None):
            raise ValueError(f"start {self.start} and stop {self.stop} must lie in order within {self.epochs} epochs")

    @property
    def trained_epochs(self) -> int:
        """Epochs that are trained at most: all of the schedule, or those from `start` to `stop`."""
        return (self.epochs if self.stop is None else self.stop) - self.start

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0.

        >>> recipe = Recipe("example", 10, 100, lr=0.4, schedule="linear", warmup_epochs=2)
        >>> [round(recipe.lr_at(step, 1), 3) for step in (0, 1, 2, 6, 9)]
        [0.2, 0.4, 0.4, 0.2, 0.05]
        """
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "step":
            total = self.epochs * steps_per_epoch
            return self.lr / 10 ** sum(step >= round(milestone * total) for milestone in self.milestones)
        if self.schedule == "constant":
            return self.lr
        progress = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.lr * (1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


_ALL = ("flip", "translate", "cutout")
_WARPS = ("resize", "flip", "rotate")

# Qu and Horvath 2024, App. C: iterations 32,000 and 48,000 of 160 epochs of CIFAR in batches of 128.
_STEP = Recipe("qu", 160, 128, 0.1, "step", 1e-4, ("flip", "translate"), milestones=(320 / 624, 480 / 624))
_COSINE = replace(_STEP, schedule="cosine", milestones=(), warmup_epochs=1)

# Without BatchNorm, networks diverge at the rates that suit it, and some seeds diverge without a long warm-up.
_FAST = Recipe("fast", 30, 128, 0.1, "cosine", 1e-4, ("flip", "translate"), warmup_epochs=1)
_QUICK = Recipe("quick", 20, 50, 0.02, "cosine", 1e-4, ("translate",), warmup_epochs=4)

# By recipe, and by kind of network (see models.ModelName.kind): the longest key counts that the kind begins with.
#
# Jordan et al. 2022, Table 1 (momentum 0.9 throughout):
#
#                  MLP          VGG              ResNet20                ResNet50 on ImageNet
#   batch size     2000         500              500                     512
#   epochs         100          100              200                     300
#   learning rate  linear 0.2   cosine 0.08      cosine 0.4              linear 0.5
#   weight decay   0            0.0005           0.0001                  0.0001
#   augmentation   translate    flip+translate   flip+translate+cutout   flip+RandomResizedCrop
#
# jordan-released   what the authors' code does where it differs; the length of VGG's warm-up is ours
# qu                Qu and Horvath 2024, App. C, with qu-cifar100 and qu-mnist for what differs there. The paper does
#                   not say how MLPs were trained. Where it prints a warm-up for one width or weight decay only, we use
#                   it for the whole family.
# csiszarik         Csiszarik et al. 2023, App. A. These two papers begin a warm-up at 1e-6; ours begins at lr / steps.
# fast, quick       ours: for the papers' data within minutes, and for digits
# fast-csiszarik, quick-csiszarik
#                   The augmentation of csiszarik, and so much weight decay that the initial weights fade to about a
#                   tenth: the product of 1 - lr wd / (1 - momentum) over all steps. Matching by weights and combining
#                   element by element need that.
# smoke             a few steps, for tests
# imported          trained elsewhere (see store.Store.add), and not here
RECIPES: dict[str, dict[str, Recipe]] = {
    "jordan": {
        "mlp": Recipe("jordan", 100, 2000, 0.2, "linear", augment=("translate",)),
        "vgg": Recipe("jordan", 100, 500, 0.08, "cosine", 5e-4, ("flip", "translate")),
        "resnet": Recipe("jordan", 200, 500, 0.4, "cosine", 1e-4, _ALL),
        "torchvision": Recipe("jordan", 300, 512, 0.5, "linear", 1e-4, ("flip", "resized-crop")),
    },
    "jordan-released": {
        "mlp": Recipe("jordan-released", 50, 1000, 0.05, "linear"),
        "vgg": Recipe("jordan-released", 250, 500, 0.08, "linear", 5e-4, ("flip", "translate"), warmup_epochs=5),
        "resnet": Recipe("jordan-released", 250, 500, 0.4, "cosine", 1e-4, _ALL),
        "resnet-ln": Recipe("jordan-released", 250, 100, 0.1, "cosine", 1e-4, _ALL),
    },
    "qu": {
        "mlp": replace(_STEP, augment=()),
        "vgg": _STEP,
        "vgg-ln": replace(_STEP, warmup_epochs=1),
        "vgg-plain-nobias": _COSINE,
        "resnet": replace(_STEP, warmup_epochs=1),
        "resnet-plain": _COSINE,
        "resnet-fixup": _COSINE,
    },
    "qu-cifar100": {"vgg": replace(_COSINE, name="qu-cifar100", warmup_epochs=2)},
    "qu-mnist": {"vgg": Recipe("qu-mnist", 25, 100, 0.1, "cosine", 5e-4, warmup_epochs=1)},
    "csiszarik": {
        "resnet": Recipe("csiszarik", 250, 100, 0.1, "cosine", 1e-4, _WARPS, warmup_epochs=1),
        "tiny": Recipe("csiszarik", 300, 100, 0.01, "step", 1e-4, _WARPS, milestones=(1 / 3, 2 / 3)),
    },
    "fast": {
        "mlp": Recipe("fast", 20, 1000, 0.05, "linear", warmup_epochs=10, nesterov=True),  # trains 35 layers, not 50
        "vgg": Recipe("fast", 30, 500, 0.08, "cosine", 5e-4, ("flip", "translate"), warmup_epochs=1),
        "resnet": Recipe("fast", 30, 500, 0.4, "cosine", 1e-4, ("flip", "translate"), warmup_epochs=1),
        **dict.fromkeys(("vgg-ln", "vgg-plain-nobias", "resnet-ln", "resnet-plain", "resnet-fixup", "tiny"), _FAST),
        "torchvision": Recipe("fast", 30, 256, 0.2, "cosine", 1e-4, ("flip", "resized-crop"), warmup_epochs=1),
    },
    "fast-csiszarik": dict.fromkeys(
        ("resnet", "tiny"), Recipe("fast-csiszarik", 30, 128, 0.1, "cosine", 4e-4, _WARPS, warmup_epochs=1)
    ),
    "quick": {
        "mlp": Recipe("quick", 80, 200, 0.1, "linear", warmup_epochs=25, nesterov=True),  # 35 layers need it all
        "vgg": Recipe("quick", 20, 100, 0.1, "cosine", 5e-4, ("translate",), warmup_epochs=4),
        **dict.fromkeys(("vgg-bn", "vgg-fused"), Recipe("quick", 16, 100, 0.1, "cosine", 5e-4, ("translate",))),
        "resnet": Recipe("quick", 16, 100, 0.2, "cosine", 1e-4, ("translate",)),
        **dict.fromkeys(("vgg-plain-nobias", "resnet-fixup", "tiny"), _QUICK),
        **dict.fromkeys(("vgg-ln", "resnet-ln"), replace(_QUICK, warmup_epochs=8)),
        "resnet-bn-bottleneck": replace(_QUICK, epochs=16),
        "resnet-plain": replace(_QUICK, lr=0.01),
        "torchvision": Recipe("quick", 20, 100, 0.1, "cosine", 1e-4, ("translate",)),
    },
    "quick-csiszarik": {
        "resnet": Recipe("quick-csiszarik", 30, 50, 0.05, "cosine", 0.01, _WARPS, warmup_epochs=4),
        "tiny": Recipe("quick-csiszarik", 30, 50, 0.03, "cosine", 0.0167, _WARPS, warmup_epochs=4),
    },
    "smoke": {
        "mlp": Recipe("smoke", 2, 200, 0.1, "linear"),
        "vgg": Recipe("smoke", 1, 200, 0.1, "linear"),
        "resnet": Recipe("smoke", 1, 200, 0.1, "linear"),
        "tiny": Recipe("smoke", 1, 200, 0.1, "linear"),
        "torchvision": Recipe("smoke", 1, 200, 0.1, "linear"),
    },
    "imported": dict.fromkeys(("mlp", "vgg", "resnet", "tiny", "torchvision"), Recipe("imported", 0, 1, 0.0, "linear")),
}

# Convolutional networks that train for long may round to bfloat16. What trains within a minute need not, and has the
# same bits on more CPUs.
for _name in RECIPES.keys() - {"quick", "quick-csiszarik", "smoke", "imported"}:
    RECIPES[_name] = {kind: replace(recipe, bf16=kind != "mlp") for kind, recipe in RECIPES[_name].items()}


def _number(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?(e-?\d{1,2})?", text):
        raise ValueError(f"{text!r} is not a number like 0.03 or 5e-4")
    return float(text)


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split("+"))


def _flag(text: str) -> bool:
    if text:
        raise ValueError(f"it takes no value, not {text!r}")
    return True


def _no_flag(text: str) -> bool:
    return not _flag(text)


class Change(NamedTuple):
    """A field of a recipe that run names may change, and how its value is read."""

    field: str
    read: Callable[[str], Any]


# By their names in run names, in the order that they have there.
CHANGES = {
    "lr": Change("lr", _number),
    "wd": Change("weight_decay", _number),
    "epochs": Change("epochs", _whole),
    "batch": Change("batch_size", _whole),
    "warmup": Change("warmup_epochs", _number),
    "momentum": Change("momentum", _number),
    "smoothing": Change("label_smoothing", _number),
    "schedule": Change("schedule", str),
    "milestones": Change("milestones", lambda text: tuple(map(_number, _words(text)))),
    "augment": Change("augment", _words),
    "init": Change("init", str),
    "until": Change("until", _number),
    "start": Change("start", _whole),
    "stop": Change("stop", _whole),
    "single": Change("bf16", _no_flag),
    "nobias": Change("nobias", _flag),
}


def find_recipe(name: str, kind: str, data: str, parent: Recipe | None = None) -> Recipe:
    """Find a recipe by name, for a kind of model and a data set, and make the changes that the name carries.

    Images of upright data sets (see data.Source) stay so: unless a change says otherwise, they are not mirrored or cut.

    Args:
        name: of `RECIPES`, then any changes: `qu~lr0.03~wd5e-4~init=uniform`. Or `retrain`, which is the parent's,
            without its warm-up.
        kind: of model (`vgg`, `resnet-ln`), see models.ModelName.kind.
        data: name of the data set.
        parent: the recipe of the run that is continued.

    Returns:
        The recipe; its `name` has the changes in their one order and form.

    Raises:
        ValueError: unknown recipe, none for such a model, or an impossible change; the message names the nearest.

    >>> [find_recipe("jordan", "resnet-bn", data).augment for data in ("cifar10", "mnist")]
    [('flip', 'translate', 'cutout'), ('translate',)]
    >>> find_recipe("qu~wd0.0005~lr3e-2", "vgg-bn", "cifar10").name
    'qu~lr0.03~wd5e-4'
    """
    base, *changes = name.split("~")
    if base == "retrain":
        if parent is None or not parent.epochs:
            raise ValueError("retrain trains a stored run once more by the recipe of that run: "
                             "<data>/<model>/<recipe>/s1/retrain/s2, where <recipe> is not imported")  # fmt: skip
        found = replace(
            parent, name=base, init=Recipe.init, until=None, start=0, stop=None, nobias=False, warmup_epochs=0.0
        )
    else:
        found = _find_entry(base, kind, data)
    return _change(found, changes) if changes else found


def _find_entry(name: str, kind: str, data: str) -> Recipe:
    check(name, [*RECIPES, "retrain"], "recipe")
    family, _, rest = kind.partition("-")
    key = "-".join(filter(None, [FAMILIES[family].recipes or family, rest])) if family not in RECIPES[name] else kind
    while key not in RECIPES[name]:
        key = key.rpartition("-")[0]
        if not key:
            known = [other for other in RECIPES if {family, FAMILIES[family].recipes} & set(RECIPES[other])]
            hint = f"the nearest that is: {nearest(name, known)!r}" if known else (
                "register the family with recipes='vgg' to train it like those, or add it to companion.runs.recipes"
            )  # fmt: skip
            raise ValueError(f"recipe {name!r} is for {', '.join(RECIPES[name])}, not for {kind}; {hint}")
    found = RECIPES[name][key]
    source = DATASETS.get(base_name(data).partition("@")[0])
    if source and source.upright:
        found = replace(found, augment=tuple(a for a in found.augment if a not in ("flip", "cutout", "resized-crop")))
    return found


def _change(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """Make changes such as "lr0.03" and "init=uniform"; the new recipe's name has them in the order of CHANGES."""
    if not recipe.epochs:
        raise ValueError(f"recipe {recipe.name!r} does not train, and cannot be changed")
    values = {}
    for change in changes:
        key, text = re.fullmatch(r"([a-z]*)=?(.*)", change).groups()
        if key not in CHANGES:
            better = f"{nearest(key, list(CHANGES))}{change[len(key) :]}"
            raise ValueError(f"unknown change {change!r}; the nearest is {better!r} (known: {', '.join(CHANGES)})")
        if key in values:
            raise ValueError(f"change {change!r} is the second of {key}: keep one")
        field, read = CHANGES[key]
        try:
            values[key] = read(text)
        except ValueError as error:
            raise ValueError(f"change {change!r}: {error}") from error
        if values[key] == getattr(recipe, field):
            raise ValueError(f"change {change!r} is what {recipe.name!r} does anyway: leave it out")
    fields = {CHANGES[key].field: value for key, value in values.items()}
    if fields.get("schedule", "step") != "step":
        fields.setdefault("milestones", ())
    name = "~".join([recipe.name, *(key + _write(values[key]) for key in CHANGES if key in values)])
    return replace(recipe, name=name, **fields)


def _write(value: Any) -> str:
    """Write the value of a change in its one form: 0.03, 5e-4 (below 0.01), =uniform, =flip+translate, =none.

    >>> [_write(value) for value in (0.03, 5e-4, 20, "uniform", ("flip", "translate"), (), True, False)]
    ['0.03', '5e-4', '20', '=uniform', '=flip+translate', '=none', '', '']
    """
    if isinstance(value, (tuple, str)):
        words = [value] if isinstance(value, str) else value
        return "=" + ("+".join(word if isinstance(word, str) else _write(word) for word in words) or "none")
    if isinstance(value, bool):
        return ""
    number = Decimal(repr(value)).normalize()
    return f"{number:e}" if 0 < number < Decimal("0.01") else f"{number:f}"
