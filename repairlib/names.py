"""Check names that a user gives, and suggest the nearest."""

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher


def nearest(word: str, options: Sequence[str]) -> str:
    """Option most like `word`, for error messages.

    >>> nearest("minst", ["digits", "mnist", "svhn"])
    'mnist'
    """
    return max(options, key=lambda option: SequenceMatcher(None, word.lower(), option.lower()).ratio())


def check(name: str, valid: Iterable[str], kind: str) -> str:
    """`name` if it is valid; otherwise a ValueError that names the nearest.

    >>> check("quik", ("smoke", "quick", "fast", "paper"), "scale")
    Traceback (most recent call last):
    ValueError: unknown scale 'quik'; the nearest is 'quick' (known: smoke, quick, fast, paper)
    """
    valid = list(valid)
    if name not in valid:
        hint = f"the nearest is {nearest(str(name), valid)!r} (known: {', '.join(valid)})" if valid else "there is none"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    return name
