"""REPAIR (Jordan et al. 2022): what each section trains and measures at every scale."""

from companion.experiments.grids import Grid
from companion.experiments.scales import by_scale
from companion.runs.models import parse

# Recipes of `fast` on CIFAR-10: one core with bfloat16 trains a ResNet20 or a thin VGG11 in about half an hour.
VGG = "fast~lr0.1~epochs24~batch125"
RESNET = "fast~wd5e-4~epochs16~batch250"
NORM_FREE = "fast~epochs14"  # with LayerNorm too: what has no BatchNorm needs smaller steps


def _seeds(scale: str) -> tuple[int, ...]:
    """Seeds of a section's networks; every two of them are a pair."""
    return by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2), paper=(1, 2))


def quickstart(scale: str) -> Grid:
    """Two small VGGs without normalisation, which train within a minute on a laptop; they are Section 3's too."""
    vgg = by_scale(
        scale,
        smoke="digits/vgg11-fused-w0.0625/smoke",
        quick="digits/vgg11-fused-w0.25/quick",
        fast=f"cifar10/vgg11-fused-w0.5/{VGG}",
        paper="cifar10/vgg11-fused-w1/jordan",
    )
    return Grid(needs={"quickstart": [{"run": vgg}]}, seeds=(1, 2), settings={"networks": vgg})


def variance_collapse(scale: str) -> Grid:
    """Section 3: a deep MLP, a VGG and a ResNet of bottlenecks."""
    mlp = by_scale(
        scale,
        smoke="digits/mlp4-fused-w32/smoke",
        quick="digits/mlp35-fused-w128/quick",
        fast="mnist/mlp35-fused-w128/fast",
        paper="mnist/mlp35-fused-w128/jordan-released",
    )
    vgg = by_scale(
        scale,
        smoke="digits/vgg11-fused-w0.0625/smoke",
        quick="digits/vgg11-fused-w0.25/quick",
        fast=f"cifar10/vgg11-fused-w0.5/{VGG}",
        paper="cifar10/vgg11-fused-w1/jordan",
    )
    resnet = by_scale(
        scale,
        smoke="digits/resnet26-bn-w0.0625/smoke",
        quick="digits-hard/resnet26-bn-w0.125/quick",
        fast=f"cifar10/resnet50-bn-w1/{RESNET}",  # `fast` does without ImageNet
        paper="imagenet@224/torchvision-resnet50/jordan",
    )
    return Grid(
        needs={
            "repair/fig2-left": [{"run": mlp}],
            "repair/fig2-middle": [{"run": vgg}],
            "repair/fig2-right": [{"run": resnet}],
            "repair/sec3-theory": [{"run": mlp}],
        },
        seeds=_seeds(scale),
        settings={"MLP": mlp, "VGG": vgg, "ResNet": resnet},
    )


def repair(scale: str) -> Grid:
    """Section 4: MLPs of growing depth and a ResNet18."""
    mlp = by_scale(
        scale,
        smoke="digits/mlp{}-fused-w32/smoke",
        quick="digits/mlp{}-fused-w128/quick",
        fast="mnist/mlp{}-fused-w128/fast",
        paper="mnist/mlp{}-fused-w128/jordan-released",
    )
    depths = by_scale(
        scale,
        smoke=[2, 4],
        quick=[2, 4, 6, 8, 10, 15, 20, 27, 35],
        fast=[2, 4, 6, 8, 10, 15, 20, 27, 35],
        paper=[2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 21, 24, 27, 30, 35, 40, 45, 50],
    )
    resnet = by_scale(
        scale,
        smoke="digits/resnet18-bn-w0.0625/smoke",
        quick="digits/resnet18-bn-w0.25/quick",
        fast=f"cifar10/resnet18-bn-w0.5/{RESNET}",
        paper="cifar10/resnet18-bn-w1/jordan",
    )
    sampled = mlp.format(by_scale(scale, smoke=4, quick=20, fast=20, paper=20))
    first_pair = (1, 2)
    return Grid(
        needs={
            "repair/fig3-left": [{"run": resnet, "seeds": first_pair}],
            "repair/fig3-middle": [{"run": resnet}],
            "repair/fig3-right": [{"run": mlp.format(depth), "depth": depth} for depth in depths],
            "repair/samples": [{"run": sampled, "seeds": first_pair}],
            "repair/equivalence": [{"run": resnet, "seeds": first_pair}],
        },
        seeds=_seeds(scale),
        passes=60,
        settings={
            "MLP": mlp,
            "depths": depths,
            "MLP of the samples": sampled,
            "ResNet": resnet,
            "points of a path": by_scale(scale, smoke=3, quick=9, fast=21, paper=101),
        },
    )


def normalization(scale: str) -> Grid:
    """Section 5.1: ResNet20s with BatchNorm, LayerNorm and without any norm (Fixup), of growing width."""
    resnet = by_scale(
        scale,
        smoke="digits/resnet8-{}-w{}/smoke",
        quick="digits/resnet20-{}-w{}/quick",
        fast="cifar10/resnet20-{}-w{}/{}",
        paper="cifar10/resnet20-{}-w{}/jordan",
    )
    widths = by_scale(scale, smoke=[0.125, 0.25], quick=[0.25, 0.5, 0.75], fast=[1, 2, 4, 8], paper=[1, 2, 4, 8, 16])
    layer_norm_widths = widths + by_scale(scale, smoke=[], quick=[], fast=[], paper=[32])
    path_width = by_scale(scale, smoke=0.25, quick=0.75, fast=1, paper=4)

    def networks(norm: str, widths: list[float]) -> list[dict]:
        recipe = RESNET if norm == "bn" else NORM_FREE  # at `fast`; the other scales' names have it
        return [{"run": resnet.format(norm, width, recipe), "series": norm, "width": width} for width in widths]

    everything = networks("bn", widths) + networks("ln", widths) + networks("fixup", widths)
    paths = networks("bn", [path_width]) + networks("ln", [path_width])
    return Grid(
        needs={
            "repair/fig4-left": everything,
            "repair/fig4-middle": networks("bn", widths) + networks("ln", layer_norm_widths),
            "repair/fig4-right": paths,
            "repair/fig8-left": networks("ln", layer_norm_widths),
            "repair/fig10-left": everything,
            "repair/fig10-right": paths,
        },
        seeds=_seeds(scale),
        compares={"repair/fig4-middle": "series"},
        settings={
            "ResNet": resnet,
            "widths": widths,
            "widths with LayerNorm": layer_norm_widths,
            # Both ends included. The authors' released code looks at the middle only, and so do all scales but `paper`.
            "points of a barrier": by_scale(scale, smoke=3, quick=3, fast=3, paper=11),
            "width of the paths": path_width,
            "points of a path": by_scale(scale, smoke=3, quick=7, fast=7, paper=21),
        },
    )


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
        fast="{}/resnet20-bn-w{}/" + RESNET,
        paper="{}/resnet20-bn-w{}/jordan",
    )
    vgg = by_scale(
        scale,
        smoke="digits/vgg{}-fused-w0.0625/smoke",
        quick="digits/vgg{}-fused-w0.125/quick",
        fast="cifar10/vgg{}-fused-w0.5/" + VGG,
        paper="cifar10/vgg{}-fused-w1/jordan",
    )
    units = by_scale(
        scale, smoke=[8, 16], quick=[16, 64, 128], fast=[32, 128, 512], paper=[32, 64, 128, 256, 512, 1024, 2048]
    )
    widths = by_scale(scale, smoke=[0.125, 0.25], quick=[0.25, 0.5, 0.75], fast=[1, 2, 4], paper=[1, 2, 4, 8, 16])
    depths = by_scale(scale, smoke=[11, 13], quick=[11, 13, 16, 19], fast=[11, 13, 16, 19], paper=[11, 13, 16, 19])
    panels = {
        "repair/fig6-left": [{"run": mlp.format(d, n), "series": d, "width": n} for d in data for n in units],
        "repair/fig6-middle": [{"run": resnet.format(d, w), "series": d, "width": w} for d in data for w in widths],
        "repair/fig6-right": [{"run": vgg.format(depth), "depth": depth} for depth in depths],
    }
    everything = [network for networks in panels.values() for network in networks]
    return Grid(
        needs=panels | {"repair/fig12": everything},
        seeds=_seeds(scale),
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


def imagenet(scale: str, data: str = "", recipe: str = "") -> Grid:
    """Section 5.2: ResNet18, ResNet50 and its double on ImageNet, and what stands for them at smaller scales.

    Args:
        scale: smoke, quick, fast or paper.
        data: another image folder, such as "photos@224", whose networks are torchvision's.
        recipe: another recipe, such as "imported".
    """
    # torchvision's double has wide 3x3 convolutions only; that of `quick` is twice as wide everywhere.
    torchvision = ["torchvision-resnet18", "torchvision-resnet50", "torchvision-wide_resnet50_2"]
    models = by_scale(
        scale,
        smoke=["resnet18-bn-w0.0625", "resnet26-bn-w0.0625"],
        quick=["resnet18-bn-w0.125", "resnet26-bn-w0.125", "resnet26-bn-w0.25"],
        fast=["resnet18-bn-w1", "resnet50-bn-w1", "resnet50-bn-w2"],
        paper=torchvision,
    )
    models = torchvision[: len(models)] if data else models
    data = data or by_scale(scale, smoke="digits", quick="digits-hard", fast="cifar10", paper="imagenet@224")
    recipe = recipe or by_scale(scale, smoke="smoke", quick="quick", fast=RESNET, paper="jordan")
    runs = [f"{data}/{model}/{recipe}" for model in models]
    resnet50 = [{"run": runs[1]}]
    series = [f"ResNet{parse(model).depth}" + " 2x" * place for model, place in zip(models, (0, 0, 1), strict=False)]
    return Grid(
        needs={
            "repair/fig5-left": resnet50,
            "repair/fig5-right": [{"run": run, "series": name} for run, name in zip(runs, series, strict=True)],
            "repair/fig8-right": resnet50,
            "repair/fig9": resnet50,
        },
        seeds=_seeds(scale),
        settings={
            "data": data,
            "models": models,
            "recipe": recipe,
            "points": by_scale(scale, smoke=3, quick=5, fast=11, paper=51),  # of a path, ends included
        },
    )


def split_pairs(scale: str) -> list[dict]:
    """Section 5.4: every pair of networks that were trained on two halves of the data.

    Returns:
        {pair: "1-2", halves: the runs on the first half and on the other, whole: the run on all data, of A's seed}.
    """
    data = by_scale(scale, smoke="digits", quick="digits-hard", fast="cifar10", paper="cifar100")
    networks = by_scale(
        scale,
        smoke=["resnet8-bn-w0.25/smoke"],
        quick=["mlp3-fused-w256/quick", "resnet20-bn-w0.5/quick"],
        fast=[f"resnet18-bn-w0.5/{RESNET}"],
        paper=["resnet18-bn-w1/jordan"],
    )
    seeds = by_scale(scale, smoke=[(1, 2)], quick=[(1, 2), (2, 3), (3, 1)], fast=[(1, 2)], paper=[(1, 2)])
    return [
        {
            "pair": f"{a}-{b}",
            "halves": [f"{data}-first80/{network}/s{a}", f"{data}-last80/{network}/s{b}"],
            "whole": f"{data}/{network}/s{a}",
        }
        for network in networks
        for a, b in seeds
    ]


def split_data(scale: str) -> Grid:
    """Section 5.4: networks trained on two halves of the data, and one trained on all of it."""
    pairs = split_pairs(scale)
    halves = [run for pair in pairs for run in pair["halves"]]
    wholes = [pair["whole"] for pair in pairs]
    names = list(dict.fromkeys(pair["pair"] for pair in pairs))
    return Grid(
        needs={"repair/fig7": halves, "repair/fig13": halves + wholes},
        seeds=tuple(sorted({int(seed) for name in names for seed in name.split("-")})),
        settings={
            "data": wholes[0].partition("/")[0],
            "networks": list(dict.fromkeys(run.partition("/")[2].rpartition("/")[0] for run in wholes)),
            "pairs": names,
            "points": by_scale(scale, smoke=3, quick=9, fast=21, paper=21),  # of a path, ends included
        },
    )


def summary(scale: str) -> Grid:
    """Figures 1, 11 and 14, Table 1: most are made of what other notebooks saved."""
    networks = by_scale(
        scale,
        smoke=["digits/resnet18-bn-w0.0625/smoke", "digits/vgg11-fused-w0.0625/smoke"],
        quick=[
            "digits/resnet18-bn-w0.25/quick",
            "digits/vgg11-fused-w0.25/quick",
            "digits-hard/resnet26-bn-w0.125/quick",
        ],
        fast=[
            f"cifar10/resnet18-bn-w0.5/{RESNET}",
            f"cifar10/vgg11-fused-w0.5/{VGG}",
            f"cifar10/resnet50-bn-w1/{RESNET}",
        ],
        paper=[
            "cifar10/resnet18-bn-w1/jordan",
            "cifar10/vgg11-fused-w1/jordan",
            "imagenet@224/torchvision-resnet50/jordan",
        ],
    )
    panels = ["4-left", "6-left", "6-middle", "6-right", "3-middle", "5-right"]
    reads = {
        "repair/fig1-left": ["repair/fig2-left", "repair/fig2-middle", "repair/fig2-right"],
        "repair/fig1-middle": ["repair/fig5-left"],
        "repair/fig1-right": [f"repair/fig{panel}" for panel in panels],
        "repair/fig11": ["repair/fig5-left", "repair/fig5-right", "repair/fig3-middle"],
    }
    trained = {"repair/fig14": [{"run": run, "series": run.split("/")[1]} for run in networks], "repair/table1": []}
    return Grid(
        needs={item: [] for item in reads} | trained,
        seeds=_seeds(scale),
        settings={
            "networks": networks,
            "points": by_scale(scale, smoke=3, quick=9, fast=11, paper=21),  # of a path, ends included
        },
        reads=reads,
    )
