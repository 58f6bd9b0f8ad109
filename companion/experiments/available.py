"""Which networks of `fast` can be had here, and what to say of the others."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping

from companion.runs.data import base_name, is_there
from companion.runs.devices import default_device
from companion.runs.store import Store

# Data sets that `fast` needs, which are downloaded if need be. Of others it takes those that are there.
PAPERS_DATA = ("mnist", "cifar10")
DIGITS = ("digits", "digits-hard")


def can_train() -> bool:
    """Whether notebooks train the networks of `fast` that are not there: $REPAIRLIB_TRAIN, else on a GPU only.

    On a CPU they would take weeks. Figures are made of those that are stored or come with the repository.
    """
    setting = os.environ.get("REPAIRLIB_TRAIN") or str(int(default_device() != "cpu"))
    if setting not in ("0", "1"):
        raise ValueError(f"REPAIRLIB_TRAIN is 0 or 1, not {setting!r}")
    return setting == "1"


def can_be_had() -> Callable[[str], bool]:
    """Whether a run of `fast` is stored, or can be trained here; runs of `quick` always can, within seconds."""
    stored, training = {*Store().names()}, can_train()

    @functools.cache
    def has(run: str) -> bool:
        data, recipe = run.split("/")[0], run.split("/")[2].partition("~")[0]
        if recipe in ("smoke", "quick", "quick-csiszarik", "imported"):
            return True
        return (run in stored or training) and (base_name(data) in (*PAPERS_DATA, *DIGITS) or is_there(data))

    return has


def say_left_out(left_out: Mapping[str, Iterable[str]], gone: Iterable[str]) -> str:
    """What is left out, and how to get it.

    Args:
        left_out, gone: runs by item, and items that are not made for lack of them, see figures.section.Section.
    """
    networks = list(dict.fromkeys(run.rpartition("/")[0] for runs in left_out.values() for run in runs))
    some = ", ".join(networks[:3]) + f" and {len(networks) - 3} more" * (len(networks) > 3)
    lines = [f"Left out, because they are not trained: {some or 'none'}."]
    if gone := list(gone):
        lines.append(f"Not made, because they lack too much: {', '.join(gone)}.")
    lines.append(
        "TRAIN=1 (or REPAIRLIB_TRAIN=1 in the environment) trains them; `make plan SCALE=fast TRAIN=1` says how long "
        f"that takes. Data sets other than {' and '.join(PAPERS_DATA)} count if they are in the data folder."
    )
    return "\n".join(lines)
