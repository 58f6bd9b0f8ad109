"""What a claim of a paper is; the claims of each paper stand in a module of their own beside this one."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Finding:
    """One comparison that a claim makes, in words with our numbers.

    Attributes:
        text: the comparison, or what it lacks.
        holds: whether it came out as claimed; None if the table lacks the networks to judge it by.
    """

    text: str
    holds: bool | None

    def __post_init__(self):
        if self.holds is not None:
            object.__setattr__(self, "holds", bool(self.holds))  # of numpy, often

    def __str__(self) -> str:
        """The text; in front of it, unless the finding holds, that it does not or was not judged."""
        return {True: "", False: "**not**: ", None: "not judged: "}[self.holds] + self.text


@dataclass(frozen=True)
class Claim:
    """A statement of a paper that tables can confirm or refute.

    Attributes:
        name: ID, such as "repair/width-helps".
        statement: what must be seen.
        published: the paper's numbers, in words.
        items: the items it rests on.
        judge: from the table of an item (a frame, seeds and all) and its ID to findings. A table may hold a part of the
            item's networks only: one width, one norm.
        caveat: why small networks may not show it; the scorecard prints it where something does not hold.
    """

    name: str
    statement: str
    published: str
    items: tuple[str, ...]
    judge: Callable[[pd.DataFrame, str], list[Finding]]
    caveat: str = ""
