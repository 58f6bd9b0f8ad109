"""Progress bars on stdout, where somebody is looking."""

import os
import sys

from tqdm import tqdm


def watched() -> bool:
    """Whether stdout is a terminal, or a notebook that a Jupyter server has opened; not one that is executed in batch.

    Kernels' streams are never terminals. A Jupyter server tells its kernels their session's name, papermill and nbval
    do not.
    """
    return sys.stdout.isatty() or "JPY_SESSION_NAME" in os.environ


def bar(total: int | None, desc: str, unit: str, show: bool = True) -> tqdm:
    """A bar with the time left, to be used in a `with`; it stays silent if nobody is looking, or if not `show`.

    Args:
        total: how many steps there are, if that is known.
        desc: what is going on.
        unit: what a step is.
    """
    return tqdm(total=total, desc=desc, unit=unit, file=sys.stdout, disable=not (show and watched()))
