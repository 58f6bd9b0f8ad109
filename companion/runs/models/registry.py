"""The families of networks, and what their names mean."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from companion.runs.models.initial import initialise
from repairlib.names import nearest

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ModelName:
    """A parsed model name; `str` gives the name back in full, with its width."""

    family: str
    depth: int = 0  # hidden layers of an MLP; weight layers of the others; 0 if names of the family have none
    norm: str = ""  # plain, bn, ln, fused or fixup; "" if names of the family have none
    width: float = 1.0  # units per hidden layer of an MLP; multiplier of the others' channels
    flags: tuple[str, ...] = ()  # such as "nobias", in the order of the family's flags

    def __str__(self) -> str:
        for preset, name in FAMILIES[self.family].presets.items():
            if name == self:
                return preset
        return _join(self.family, self.depth, self.norm, f"{self.width:.12g}", self.flags)

    @property
    def kind(self) -> str:
        """What recipes may depend on, what counts most first: family, norm, the family's `variant`, no biases.

        As in `vgg-plain-nobias` or `resnet-bn-bottleneck`.
        """
        parts = [self.family, self.norm, FAMILIES[self.family].variant(self), "" if self.bias else "nobias"]
        return "-".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """What pictures call it, without norm and width: ResNet20."""
        family = FAMILIES[self.family]
        return str(self).removeprefix(f"{self.family}-") if family.presets else f"{family.title}{self.depth or ''}"

    @property
    def bias(self) -> bool:
        """Whether layers that no norm follows have a bias."""
        return "nobias" not in self.flags

    @property
    def biased(self) -> bool:
        """Whether hidden layers have biases; before a norm they would do nothing, and Fixup has scalars instead."""
        return self.bias and self.norm in ("plain", "fused")


@dataclass(frozen=True)
class Family:
    """Networks named `<name>[<depth>][-<norm>][-w<width>][-<flag>...]`, and how they are made.

    >>> from torch import nn
    >>> def make(name, shape, classes):
    ...     return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    >>> register(Family("linear", make, recipes="mlp"))
    >>> build("linear", (1, 16, 16), 10)[1].weight.shape
    torch.Size([10, 256])
    >>> del FAMILIES["linear"]
    """

    name: str  # letters, digits and _
    build: Callable[[ModelName, Shape, int], nn.Module]  # of (name, shape of an input, classes)
    title: str = ""  # in pictures; default: the name
    depths: Sequence[int] | None = ()  # empty: names have no depth; None: all from 1
    norms: Sequence[str] = ()  # the one to propose first; empty: names have none
    width: float = 1.0  # of names that have none
    whole_widths: bool = False  # widths are numbers of units
    flags: Sequence[str] = ()  # that names may end in
    presets: Mapping[str, ModelName] = field(default_factory=dict)  # instead of all that: the only names there are
    problem: Callable[[ModelName], str] = lambda name: ""  # what is impossible about a name; "" if nothing is
    variant: Callable[[ModelName], str] = lambda name: ""  # more that recipes may depend on
    adjust: Callable[[nn.Module, ModelName], None] = lambda model, name: None  # changes initial weights
    own_init: bool = False  # keeps the initial weights that `build` gives, unless a recipe says other than the default
    recipes: str = ""  # the family whose recipes it is trained by, where RECIPES has none for this one

    @property
    def grammar(self) -> str:
        """How its names look."""
        if self.presets:
            return ", ".join(self.presets)
        depth = (
            "<layers>" if self.depths is None else "{" + ",".join(map(str, self.depths)) + "}" if self.depths else ""
        )
        norm = "-{" + ",".join(self.norms) + "}" if self.norms else ""
        width = "-w<units>" if self.whole_widths else "-w<multiplier>"
        return f"{self.name}{depth}{norm}{width}" + "".join(f"[-{flag}]" for flag in self.flags)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Give networks a name: `build`, `store.get` and notebooks know them from now on.

    Raises:
        ValueError: the name cannot be one, or is that of another family.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", family.name) or family.name in FAMILIES:
        raise ValueError(
            f"{family.name!r} cannot name a family, for which small letters, digits and _ will do; "
            f"taken are {', '.join(FAMILIES)}"
        )
    FAMILIES[family.name] = family


def parse(name: str) -> ModelName:
    """Parse a model name.

    Raises:
        ValueError: it is none; the message has the nearest that is, and how names look.

    >>> parse("resnet20-bn-w4")
    ModelName(family='resnet', depth=20, norm='bn', width=4.0, flags=())
    >>> str(parse("mlp10-fused"))
    'mlp10-fused-w128'
    """
    problem = ""
    for family in FAMILIES.values():
        if name in family.presets:
            return family.presets[name]
        number = r"([1-9]\d*)" if family.depths or family.depths is None else "()"
        norm = f"-({'|'.join(_all_norms())})" if family.norms else "()"
        flags = "|".join(_all_flags())
        match = re.fullmatch(rf"{family.name}{number}{norm}(?:-w(\d+(?:\.\d+)?))?((?:-(?:{flags}))*)", name)
        if match and not family.presets:
            depth, norm, width, flags = match.groups()
            parsed = ModelName(
                family.name, int(depth or 0), norm, float(width or family.width), tuple(flags.split("-")[1:])
            )
            problem = _problem(family, parsed)
            if not problem:
                return parsed
    raise ValueError(
        f"unknown model {name!r}{f': {problem}' if problem else ''}; the nearest valid name is "
        f"{_nearest_name(name)!r}; names are {'; '.join(family.grammar for family in FAMILIES.values())}"
    )


def build(
    name: str | ModelName, shape: Shape = (3, 32, 32), classes: int = 10, init: str = "kaiming-normal"
) -> nn.Module:
    """Build a network with fresh weights from torch's global generator; `fused` gives the plain network.

    Args:
        name: see the head of companion.runs.models.
        shape: (c, h, w) of one input.
        classes: number of outputs.
        init: how convolutions and linear layers begin, see initial.INITS.

    Raises:
        ValueError: unknown name (see `parse`), or torchvision's network with other than 3 channels.

    >>> import torch
    >>> build("vgg11-bn-w0.25", (1, 16, 16), 10)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """
    name = parse(name) if isinstance(name, str) else name
    family = FAMILIES[name.family]
    model = family.build(name, shape, classes)
    if not (family.own_init and init == "kaiming-normal"):
        initialise(model, init)
        family.adjust(model, name)
    return model


def _problem(family: Family, name: ModelName) -> str:
    """What is impossible about a name; "" if nothing is."""
    if family.depths and name.depth not in family.depths:
        return f"no {family.name} has depth {name.depth}"
    if name.width <= 0 or (family.whole_widths and name.width % 1):
        return f"width {name.width:g} is not possible"
    if name.norm and name.norm not in family.norms:
        return f"{family.name} has no {name.norm}, but {', '.join(family.norms)}"
    for flag in name.flags:
        if flag not in family.flags:
            return f"{family.name} has no -{flag}"
    if list(name.flags) != [flag for flag in family.flags if flag in name.flags]:
        return "its last parts are not in order, or there twice"
    if not name.bias and name.norm not in ("plain", ""):
        return "-nobias is for plain networks"
    return family.problem(name)


def _join(family: str, depth: int, norm: str, width: str, flags: Sequence[str]) -> str:
    parts = [f"{family}{depth or ''}", norm, f"w{width}" if width else "", *flags]
    return "-".join(part for part in parts if part)


def _all_norms() -> list[str]:
    return list(dict.fromkeys(norm for family in FAMILIES.values() for norm in family.norms))


def _all_flags() -> list[str]:
    return list(dict.fromkeys(flag for family in FAMILIES.values() for flag in family.flags))


def _nearest_name(name: str) -> str:
    """Mend a name part by part, so that the answer keeps what was right about it."""
    first, *rest = name.lower().split("-")
    family = FAMILIES[nearest(first if first in FAMILIES else re.sub(r"\d.*", "", first), list(FAMILIES))]
    if family.presets:
        return nearest(name.lower(), list(family.presets))
    depth, number = 0, re.search(r"[1-9]\d*", first)
    if family.depths or family.depths is None:
        depth = int(number[0]) if number else 10
        depth = min(family.depths or [depth], key=lambda known: abs(known - depth))
    flags = [flag for flag in family.flags if flag in rest]
    widths = [part[1:] for part in rest if re.fullmatch(r"w\d+(\.\d+)?", part)]
    widths = [f"{float(w):.12g}" for w in widths if float(w) and not (family.whole_widths and float(w) % 1)]
    norms = list(family.norms) or [""]
    if rest and not re.match(rf"w\d|{'|'.join(_all_flags())}", rest[0]):
        norms.insert(0, nearest(rest[0], _all_norms()))
    for norm in norms:
        for kept in (flags, *([flag] for flag in flags), []):
            if not _problem(family, ModelName(family.name, depth, norm, family.width, tuple(kept))):
                return _join(family.name, depth, norm, widths[0] if widths else "", kept)
    return family.grammar
