"""What a claim of a paper is; the claims of each paper stand in a module of their own beside this one."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Finding:
    """One comparison that a claim makes, in words with our numbers, and whether it came out as claimed."""

    text: str
    holds: bool

    def __post_init__(self):
        object.__setattr__(self, "holds", bool(self.holds))  # of numpy, often


@dataclass(frozen=True)
class Claim:
    """A statement of a paper that tables can confirm or refute.

    Attributes:
        name: ID, such as "repair/width-helps".
        statement: what must be seen.
        published: the paper's numbers, in words.
        items: the items it rests on.
        judge: from the table of an item (a frame, seeds and all) and its ID to findings, one at least.
    """

    name: str
    statement: str
    published: str
    items: tuple[str, ...]
    judge: Callable[[pd.DataFrame, str], list[Finding]]
