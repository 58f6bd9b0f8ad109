"""REPAIR (Jordan et al. 2022): what each section trains and measures at every scale."""

from companion.experiments.grids import Grid
from companion.experiments.scales import by_scale


def width_depth(scale: str) -> Grid:
    """Section 5.3: MLPs and ResNets of growing width, VGGs of growing depth."""
    data = by_scale(
        scale,
        smoke=["digits"],
        quick=["digits", "digits-hard"],
        fast=["mnist", "fashionmnist", "svhn", "cifar10"],
        paper=["mnist", "fashionmnist", "svhn", "cifar10"],
    )
    mlp = by_scale(
        scale,
        smoke="{}/mlp2-fused-w{}/smoke",
        quick="{}/mlp10-fused-w{}/quick",
        fast="{}/mlp10-fused-w{}/fast",
        paper="{}/mlp10-fused-w{}/jordan",
    )
    resnet = by_scale(
        scale,
        smoke="{}/resnet8-bn-w{}/smoke",
        quick="{}/resnet20-bn-w{}/quick",
        fast="{}/resnet20-bn-w{}/fast",
        paper="{}/resnet20-bn-w{}/jordan",
    )
    vgg = by_scale(
        scale,
        smoke="digits/vgg{}-fused-w0.0625/smoke",
        quick="digits/vgg{}-fused-w0.125/quick",
        fast="cifar10/vgg{}-fused-w1/fast",
        paper="cifar10/vgg{}-fused-w1/jordan",
    )
    units = by_scale(
        scale, smoke=[8, 16], quick=[16, 64, 256], fast=[32, 128, 512], paper=[32, 64, 128, 256, 512, 1024, 2048]
    )
    widths = by_scale(scale, smoke=[0.125, 0.25], quick=[0.25, 0.5, 1], fast=[1, 2, 4], paper=[1, 2, 4, 8, 16])
    depths = by_scale(scale, smoke=[11, 13], quick=[11, 13, 16, 19], fast=[11, 13, 16, 19], paper=[11, 13, 16, 19])
    panels = {
        "repair/fig6-left": [{"run": mlp.format(d, n), "series": d, "width": n} for d in data for n in units],
        "repair/fig6-middle": [{"run": resnet.format(d, w), "series": d, "width": w} for d in data for w in widths],
        "repair/fig6-right": [{"run": vgg.format(depth), "depth": depth} for depth in depths],
    }
    everything = [network for networks in panels.values() for network in networks]
    return Grid(
        needs=panels | {"repair/fig12": everything},
        seeds=by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2), paper=(1, 2)),
        settings={
            "data": data,
            "MLP": mlp,
            "units": units,
            "ResNet": resnet,
            "widths": widths,
            "VGG": vgg,
            "depths": depths,
        },  # fmt: skip
    )
