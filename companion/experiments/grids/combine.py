"""The networks that the notebooks of Mode Combinability combine (Csiszarik et al. 2023, Sec. 4.1), scale by scale."""

from typing import NamedTuple

import pandas as pd

from companion.experiments.scales import SCALES, by_scale


class Combined(NamedTuple):
    """What is combined at one scale.

    Attributes:
        resnet, tiny: run names without their seed, of a ResNet with LayerNorm and of Tiny-10.
        seeds: which; every two of them are a pair.
        restarts: descents of weight matching, of which the one with the best objective counts; the paper makes one.
    """

    resnet: str
    tiny: str
    seeds: tuple[int, ...]
    restarts: int


def combined(scale: str, width: float | None = None) -> Combined:
    """The networks of a scale; both of another width, if one is given.

    The paper's widths are 32 "if not noted otherwise"; of Tiny-10 it notes one, 16 (Fig. 13), taken for all of them.

    >>> combined("paper").tiny, combined("fast", width=1).resnet
    ('cifar10/tiny10-ln-w16/csiszarik', 'cifar10/resnet20-ln-w1/fast-csiszarik')
    """
    resnet, tiny = by_scale(
        scale,
        smoke=("digits/resnet8-ln-w{:g}/smoke", "digits/tiny10-ln-w{:g}/smoke"),
        quick=("digits-hard/resnet8-ln-w{:g}/quick-csiszarik", "digits-hard/tiny10-ln-w{:g}/quick-csiszarik"),
        fast=("cifar10/resnet20-ln-w{:g}/fast-csiszarik", "cifar10/tiny10-ln-w{:g}/fast-csiszarik"),
        paper=("cifar10/resnet20-ln-w{:g}/csiszarik", "cifar10/tiny10-ln-w{:g}/csiszarik"),
    )
    widths = by_scale(scale, smoke=(0.25, 0.25), quick=(2, 2), fast=(4, 4), paper=(32, 16))
    seeds = by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2, 3), paper=(1, 2, 3))
    restarts = by_scale(scale, smoke=2, quick=10, fast=5, paper=1)
    widths = widths if width is None else (width, width)
    return Combined(resnet.format(widths[0]), tiny.format(widths[1]), seeds, restarts)


def overview() -> pd.DataFrame:
    """What is combined at every scale, side by side."""
    return pd.DataFrame({scale: combined(scale)._asdict() for scale in SCALES})
