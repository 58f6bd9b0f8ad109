"""The four scales of every experiment, and which items a notebook was asked for."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

SCALES = ("smoke", "quick", "fast", "paper")


def by_scale(scale: str, *, smoke: Any, quick: Any, fast: Any, paper: Any) -> Any:
    """The value for `scale`; all four stand side by side, so that a reader sees what the paper used.

    >>> by_scale("quick", smoke=[1], quick=[4, 8, 16], fast=[1, 2, 4, 8], paper=[1, 2, 4, 8, 16])
    [4, 8, 16]
    """
    check_scale(scale)
    return {"smoke": smoke, "quick": quick, "fast": fast, "paper": paper}[scale]


def calibration_images(scale: str) -> int:
    """Training images for matching and statistics: 5,000 suffice (Jordan et al. 2022, Sec. 4.2), 500 of digits."""
    return by_scale(scale, smoke=500, quick=500, fast=5000, paper=5000)


def check(name: str, known: Collection[str], kind: str) -> str:
    """The name if it is known; ValueError that names the nearest otherwise. Unlike `repairlib.names` without torch."""
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0) or ["none"]
        raise ValueError(f"unknown {kind} {name!r}; the nearest is {near[0]!r} (known: {', '.join(known)})")
    return name


def check_scale(scale: str) -> str:
    """Return `scale` if it is one of the four; ValueError otherwise."""
    return check(scale, SCALES, "scale")


def wanted(item: str, items: str) -> bool:
    """Whether a notebook's parameter `items` (comma-separated IDs, empty = all) asks for `item`.

    >>> wanted("repair/samples", ""), wanted("repair/samples", "repair/fig2-left")
    (True, False)
    """
    return not items.strip() or item in [name.strip() for name in items.split(",")]
