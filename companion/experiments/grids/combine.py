"""The networks that the notebooks of Mode Combinability combine (Csiszarik et al. 2023, Sec. 4.1), scale by scale."""

from typing import NamedTuple

from companion.experiments.grids import Grid, Network
from companion.experiments.scales import by_scale

# Recipes of `fast`. Weight decay is such that the initial weights fade to a tenth within so few epochs.
RESNET = "fast-csiszarik"
TINY = "fast-csiszarik~wd3e-4~epochs44~augment=flip+translate"


class Combined(NamedTuple):
    """What is combined at one scale.

    Attributes:
        resnet, tiny: run names of a ResNet with LayerNorm and of a Tiny-10, without their seed.
        seeds: every two of them are a pair.
        restarts: how often weight matching descends; the matching with the best objective counts. The paper makes one.
        test_images: how many are evaluated on, always the same; None is all. Hundreds of networks are evaluated.
    """

    resnet: str
    tiny: str
    seeds: tuple[int, ...]
    restarts: int
    test_images: int | None


def combined(scale: str, width: float | None = None) -> Combined:
    """The networks of a scale; both of another width, if one is given.

    The paper's widths are 32 "if not noted otherwise". For Tiny-10 it notes 16 once (Fig. 13), which is taken for all.

    >>> combined("paper").tiny, combined("fast", width=1).resnet
    ('cifar10/tiny10-ln-w16/csiszarik', 'cifar10/resnet20-ln-w1/fast-csiszarik')
    """
    resnet, tiny = by_scale(
        scale,
        smoke=("digits/resnet8-ln-w{:g}/smoke", "digits/tiny10-ln-w{:g}/smoke"),
        quick=("digits-hard/resnet8-ln-w{:g}/quick-csiszarik", "digits-hard/tiny10-ln-w{:g}/quick-csiszarik"),
        fast=("cifar10/resnet20-ln-w{:g}/" + RESNET, "cifar10/tiny10-ln-w{:g}/" + TINY),
        paper=("cifar10/resnet20-ln-w{:g}/csiszarik", "cifar10/tiny10-ln-w{:g}/csiszarik"),
    )
    widths = by_scale(scale, smoke=(0.25, 0.25), quick=(2, 2), fast=(2, 2), paper=(32, 16))
    seeds = by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2, 3), paper=(1, 2, 3))
    restarts = by_scale(scale, smoke=2, quick=5, fast=5, paper=1)
    test_images = by_scale(scale, smoke=None, quick=None, fast=2000, paper=None)
    widths = widths if width is None else (width, width)
    return Combined(resnet.format(widths[0]), tiny.format(widths[1]), seeds, restarts, test_images)


def _networks(scale: str, width: float | None = None) -> tuple[Network, Network]:
    """The ResNet and the Tiny-10 of a scale, as networks of a grid."""
    both = combined(scale, width)
    return tuple({"run": run, "model": run.split("/")[1]} for run in (both.resnet, both.tiny))


def hypercube(scale: str) -> Grid:
    """Section 4.2: coefficients drawn at random from the unit hypercube."""
    both, (resnet, tiny) = combined(scale), _networks(scale)
    small = "digits/mlp2-fused-w128/quick"
    mlp = by_scale(scale, smoke="digits/mlp2-fused-w16/smoke", quick=small, fast=small, paper=small)
    drawn = {f"combine/fig{number}": [resnet] for number in (2, 3, 4, 5)} | {"combine/figB15-B18": [tiny]}
    by_hand = [f"{mlp}/s1", f"{mlp}/s2"]  # to match by hand
    return Grid(
        needs={"combine/fig1": [], "combine/algorithm1": [resnet, tiny, *by_hand], **drawn, "combine/tableA1": []},
        seeds=both.seeds,
        settings={
            "resnet": both.resnet,
            "tiny": both.tiny,
            "mlp": mlp,
            "restarts": both.restarts,
            "test_images": both.test_images,
            "points": by_scale(scale, smoke=3, quick=5, fast=9, paper=25),
            "samples": by_scale(scale, smoke=1, quick=2, fast=1, paper=10),
        },
    )


def stitching(scale: str) -> Grid:
    """Section 4.3: the first layers of A, the rest of B."""
    both, (resnet, tiny) = combined(scale), _networks(scale)
    return Grid(
        needs={"combine/fig6": [resnet], "combine/figB19": [tiny]},
        seeds=both.seeds,
        settings={
            "resnet": both.resnet,
            "tiny": both.tiny,
            "restarts": both.restarts,
            "test_images": both.test_images,
        },
    )


def width(scale: str) -> Grid:
    """Section 4.4: the barrier of every scheme, network by network, as they grow wider."""
    widths = by_scale(scale, smoke=[0.125, 0.25], quick=[0.5, 1, 2], fast=[1, 2, 4], paper=[1, 2, 4, 8, 16, 32])
    both = combined(scale)
    resnets, tinys = [], []
    for size in widths:
        for network, found in zip(_networks(scale, size), (resnets, tinys), strict=True):
            found.append({**network, "model": network["model"].partition("-w")[0], "width": size})
    return Grid(
        needs={"combine/fig7": resnets, "combine/figB21": [network for network in tinys if network["width"] <= 16]},
        seeds=both.seeds[:2] if scale == "paper" else both.seeds,
        settings={
            "resnet": both.resnet,
            "tiny": both.tiny,
            "widths": widths,
            "restarts": both.restarts,
            "test_images": both.test_images,
            "points": by_scale(scale, smoke=3, quick=5, fast=9, paper=25),
            "samples": by_scale(scale, smoke=1, quick=1, fast=1, paper=10),
        },
    )


def min_max(scale: str) -> Grid:
    """Section 4.5: the path from the Max to the Min model."""
    both, (resnet, tiny) = combined(scale), _networks(scale)
    return Grid(
        needs={"combine/fig8": [resnet], "combine/figB22": [tiny]},
        seeds=both.seeds,
        settings={
            "resnet": both.resnet,
            "tiny": both.tiny,
            "restarts": both.restarts,
            "test_images": both.test_images,
            "points": by_scale(scale, smoke=3, quick=9, fast=13, paper=25),
        },
    )


def extrapolation(scale: str) -> Grid:
    """Sections 5.1 and 5.2: the line through two networks beyond both of them, and boxes about one of them."""
    both, (resnet, tiny) = combined(scale), _networks(scale)
    fine, finer = [-1 + i / 8 for i in range(25)], [i / 48 for i in range(25)]
    alphas = by_scale(
        scale, smoke=[-1, 0, 1, 2], quick=[-1, -0.5, -0.25, 0, 0.5, 1, 1.25, 1.5, 2], fast=fine[::2], paper=fine
    )
    return Grid(
        needs={"combine/fig9": [resnet], "combine/fig10": [resnet], "combine/figB23-B24": [tiny]},
        seeds=both.seeds,
        settings={
            "resnet": both.resnet,
            "tiny": both.tiny,
            "restarts": both.restarts,
            "test_images": both.test_images,
            "alphas": alphas,
            "half_edges": by_scale(
                scale, smoke=[0, 0.25, 0.5], quick=[0, 0.125, 0.25, 0.375, 0.5], fast=finer[::3], paper=finer
            ),
            "samples": by_scale(scale, smoke=1, quick=2, fast=1, paper=10),
            "train_images": by_scale(scale, smoke=200, quick=200, fast=2000, paper=50000),
        },
    )


def three_models(scale: str) -> Grid:
    """Sections 5.3 and 5.4: three networks, B and C in A's order of units; a triple is the seeds of A, B and C."""
    both = combined(scale)
    resnet, tiny = ({**network, "seeds": (1, 2, 3)} for network in _networks(scale))
    wide = resnet if scale != "paper" else {**_networks(scale, width=40)[0], "seeds": (1, 2, 3)}
    one, each = ["1-2-3"], ["1-2-3", "2-3-1", "3-1-2"]
    return Grid(
        needs={"combine/fig11a": [resnet], "combine/figB20": [tiny], "combine/fig11b": [wide]},
        seeds=(1, 2, 3),
        settings={
            "resnet": both.resnet,
            "wide": wide["run"],
            "tiny": both.tiny,
            "restarts": both.restarts,
            "test_images": both.test_images,
            "triples": by_scale(scale, smoke=one, quick=each, fast=each, paper=each),
            "points": by_scale(scale, smoke=3, quick=9, fast=13, paper=25),
            "steps": by_scale(scale, smoke=2, quick=6, fast=6, paper=20),
        },
    )


def functional_difference(scale: str) -> Grid:
    """Sections 6.1 and 6.2: whose labels combined networks predict, and how far apart the weights are."""
    both = combined(scale)
    resnet, tiny = ({**network, "model": network["model"].partition("-")[0]} for network in _networks(scale))
    return Grid(
        needs={"combine/fig12": [resnet], "combine/figB25-B26": [tiny, resnet], "combine/fig13": [tiny]},
        seeds=both.seeds,
        settings={
            "resnet": both.resnet,
            "tiny": both.tiny,
            "restarts": both.restarts,
            "test_images": both.test_images,
            "points": by_scale(scale, smoke=3, quick=5, fast=9, paper=25),
            "samples": by_scale(scale, smoke=1, quick=1, fast=1, paper=10),
        },
    )


def robustness(scale: str) -> Grid:
    """Section 6.3: the least correlated pairs of one layer are matched anew at random."""
    both, (_, tiny) = combined(scale), _networks(scale)
    return Grid(
        needs={"combine/fig14": [tiny]},
        seeds=both.seeds,
        passes=100,
        settings={
            "tiny": both.tiny,
            "restarts": both.restarts,
            "test_images": both.test_images,
            "steps": by_scale(scale, smoke=2, quick=4, fast=8, paper=16),
            "derangements": by_scale(scale, smoke=1, quick=2, fast=2, paper=5),
            "alphas": by_scale(scale, smoke=[0.5], quick=[0.5], fast=[0.5], paper=[0.25, 0.5, 0.75]),
        },
    )
