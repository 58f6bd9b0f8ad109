"""Progress bars on stdout, where somebody is looking."""

import os
import sys

from tqdm import tqdm


def is_interactive() -> bool:
    """Whether stdout is a terminal, or a notebook in a Jupyter server, which tells kernels their session's name."""
    return sys.stdout.isatty() or "JPY_SESSION_NAME" in os.environ


def bar(total: int | None, desc: str, unit: str, show: bool = True) -> tqdm:
    """Progress bar with the time left, for a `with`; silent if nobody is looking, or if not `show`.

    Args:
        total: number of steps, if that is known.
        desc, unit: names of the task and of a step.
    """
    return tqdm(total=total, desc=desc, unit=unit, file=sys.stdout, disable=not (show and is_interactive()))
