"""Rethink Model Re-Basin (Qu and Horvath 2024): what each section trains and measures at every scale.

The paper's networks are VGG16s and ResNet20s on CIFAR-10, with BatchNorm, LayerNorm, Fixup or no normalisation
("plain"). It repeats some figures with a VGG11 and a plain ResNet20 on CIFAR-100. At `quick` these are a VGG11 and a
ResNet8 on harder digits; the repetition is on easier ones. At `fast` they are REPAIR's networks on CIFAR-10, so that
nobody trains twice: its plain VGG11 was trained with BatchNorm, which was then fused into the convolutions.
"""

import math
import re

from companion.experiments.grids import Grid
from companion.experiments.grids.repair import NORM_FREE, RESNET, VGG
from companion.experiments.scales import by_scale
from companion.runs.models import parse as parse_model
from companion.runs.names import parse_run, recipe_of, seeded
from companion.runs.recipes import CHANGES, Recipe, find_recipe

# Plain VGGs diverge at the rate that suits BatchNorm. The paper's weight decay is what REPAIR's failures hinge on.
VGG_CHANGES = {"plain": "~lr0.03~wd1e-4", "bn": "~wd1e-4"}

PAPER_SPARSITIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
SPARSITIES = [0.5, 0.8, 0.9, 0.95]


def _seeds(scale: str) -> tuple[int, ...]:
    """Seeds of most networks; every two of them are a pair."""
    return by_scale(scale, smoke=(1, 2), quick=(1, 2, 3), fast=(1, 2), paper=(1, 2, 3))


def vgg(scale: str, norm: str, width: float | None = None, again: bool = False, depth: int | None = None) -> str:
    """Run name, without its seed, of a VGG.

    Args:
        scale: smoke, quick, fast or paper.
        norm: "plain", "bn", "ln", or "nobias" for a plain one that never had biases.
        width: multiplier; default: the usual one of the scale.
        again: the repetition on a second data set, with a VGG11.
        depth: 11, 13, 16 or 19; default: the usual one of the scale.
    """
    width = width or by_scale(scale, smoke=0.0625, quick=0.25, fast=0.5, paper=1)
    depth = 11 if again else depth or by_scale(scale, smoke=11, quick=11, fast=11, paper=16)
    recipe = by_scale(
        scale,
        smoke="smoke",
        quick="quick" + VGG_CHANGES.get(norm, ""),
        fast=NORM_FREE if norm in ("ln", "nobias") else VGG,
        paper="qu-cifar100" if again else "qu" + "~warmup1" * (norm == "plain" and width == 8),  # App. C
    )
    kind = "fused" if (scale, norm) == ("fast", "plain") else norm
    return f"{_dataset(scale, again)}/vgg{depth}-{_norm(kind, width)}/{recipe}"


def resnet(scale: str, norm: str, width: float | None = None, again: bool = False) -> str:
    """Run name, without its seed, of a ResNet; for arguments see `vgg`, and norm may be "fixup"."""
    width = width or by_scale(scale, smoke=0.125, quick=0.5, fast=1, paper=1)
    depth = by_scale(scale, smoke=8, quick=8, fast=20, paper=20)
    shared = RESNET if norm == "bn" else NORM_FREE
    recipe = by_scale(scale, smoke="smoke", quick="quick", fast=shared, paper="qu")
    shortcuts = "-sc1" if scale == "paper" else ""
    return f"{_dataset(scale, again)}/resnet{depth}-{_norm(norm, width, shortcuts)}/{recipe}"


def _dataset(scale: str, again: bool) -> str:
    """The paper's CIFAR-10, or its CIFAR-100, and what stands for them."""
    first = by_scale(scale, smoke="digits", quick="digits-hard", fast="cifar10", paper="cifar10")
    second = by_scale(scale, smoke="digits", quick="digits", fast="cifar10", paper="cifar100")
    return second if again else first


def _norm(norm: str, width: float, shortcuts: str = "") -> str:
    """The middle of a model's name."""
    return f"plain-w{width:g}{shortcuts}-nobias" if norm == "nobias" else f"{norm}-w{width:g}{shortcuts}"


def without_biases(scale: str, run: str) -> str:
    """Run name of a network whose biases are removed after training, and which is trained on after that (Sec. 3.4).

    Without its seed; the seed of the network that is continued is the same.
    """
    changes = by_scale(
        scale, smoke="", quick="~lr5e-3~wd0~epochs10", fast="~lr0.01~wd0~epochs3", paper="~lr0.01~wd0~epochs10"
    )
    return f"{run}/s{{seed}}/retrain{changes}{'~schedule=constant' if changes else ''}~nobias"


def child(scale: str, run: str) -> str:
    """Run name, without its seed, of a network that is trained on from an early epoch of another (Sec. 3.2).

    All seeds continue the same parent, of seed 1.
    """
    epochs = by_scale(scale, smoke=1, quick=2, fast=1, paper=2 if "resnet" in run else 1)
    run += "~epochs2" if scale == "smoke" else ""
    return f"{run}~stop{epochs}/s1/{run.split('/')[2]}~start{epochs}"


def copy(scale: str, run: str, seed: int | str = "{seed}") -> str:
    """Run name, without its seed, of a trained network that is trained on: fast, then slowly (App. C, E.2).

    Args:
        scale: smoke, quick, fast or paper.
        run: the network's run name, without its seed.
        seed: of the network; default: the same as that of the further training.
    """
    slower = "~lr2e-3" if "-ln-" in run and scale == "quick" else "~lr0.01"
    first, second = by_scale(
        scale,
        smoke=("", "~lr0.01"),
        quick=("~epochs10", slower + "~epochs3"),
        fast=("~epochs3", slower + "~epochs1"),
        paper=("~epochs20", slower + "~epochs5"),
    )
    return f"{run}/s{seed}/retrain{first}~schedule=constant/s{{seed}}/retrain{second}"


# ------------------------------------------------------------------------------------------------------------ sections


def renormalization(scale: str) -> Grid:
    """Section 3.1: plain VGGs and ResNets of growing width."""
    vgg_widths = by_scale(
        scale, smoke=[0.0625, 0.125], quick=[0.125, 0.25, 0.5], fast=[0.25, 0.5, 1], paper=[1, 2, 4, 8]
    )
    resnet_widths = by_scale(scale, smoke=[0.125, 0.25], quick=[0.25, 0.5, 1], fast=[1, 2, 4], paper=[1, 2, 4, 8])

    def networks(make, widths: list[float], **how) -> list[dict]:
        runs = [make(scale, width=width, **how) for width in widths]
        name = "VGG{}" if make is vgg else "ResNet{}"
        series = name.format("".join(filter(str.isdigit, runs[0].split("/")[1].split("-")[0])))
        series += ", no biases" * (how["norm"] == "nobias")
        return [{"run": run, "series": series, "width": width} for run, width in zip(runs, widths, strict=True)]

    plain = networks(vgg, vgg_widths, norm="plain") + networks(resnet, resnet_widths, norm="plain")
    shallow = [each for each in networks(vgg, vgg_widths, norm="plain", depth=11) if each not in plain]
    everything = shallow + plain + networks(resnet, resnet_widths, norm="nobias")
    return Grid(
        needs={"rethink/fig2b": plain, "rethink/fig7": everything, "rethink/fig8": everything},
        seeds=_seeds(scale),
        settings={
            "VGG": vgg(scale, "plain"),
            "ResNet": resnet(scale, "plain"),
            "widths of VGGs": vgg_widths,
            "widths of ResNets": resnet_widths,
        },
    )


def same_basin(scale: str) -> Grid:
    """Section 3.2: networks from different seeds, children of one parent, and copies of a network trained on."""
    width = by_scale(scale, smoke=None, quick=1, fast=None, paper=4)
    both = {"VGG": vgg(scale, "bn"), "ResNet": resnet(scale, "bn", width)}
    seeds = _seeds(scale)

    def three_ways(series: str) -> list:
        run = both[series]
        return [
            {"run": run, "series": series, "basin": "independent", "kind": f"{series} independent"},
            {"run": child(scale, run), "series": series, "basin": "spawned", "kind": f"{series} spawned"},
            *copies(series),
        ]

    def copies(series: str) -> list[str]:
        return [seeded(copy(scale, both[series]), seed) for seed in seeds]

    norms = {f"{name}_{norm}": make(scale, norm, w) for name, make, w in (("vgg", vgg, None), ("resnet", resnet, width))
             for norm in ("bn", "ln")}  # fmt: skip
    return Grid(
        needs={
            "rethink/fig2c": three_ways("VGG"),
            "rethink/fig2d": three_ways("VGG")[:1] + copies("VGG"),
            "rethink/fig9-12": three_ways("VGG") + three_ways("ResNet"),
            "rethink/fig13": [seeded(run, seeds[0]) for run in both.values()],
            "rethink/table3": [{"run": run, "series": name} for name, run in norms.items()],
        },
        seeds=seeds,
        compares={"rethink/fig2c": "kind", "rethink/fig9-12": "kind"},
        settings={
            **both,
            "children": child(scale, both["VGG"]),
            "copies": copy(scale, both["VGG"]),
            "points": by_scale(scale, smoke=3, quick=7, fast=7, paper=11),  # of a path, ends included
            "every": by_scale(scale, smoke=5, quick=7, fast=200, paper=200),  # steps from one measurement to the next
        },
    )


def many_models(scale: str) -> Grid:
    """Section 3.3: averages of more and more networks."""
    width = by_scale(scale, smoke=None, quick=1, fast=None, paper=4)
    several = by_scale(scale, smoke=(1, 2, 3), quick=(1, 2, 3, 4), fast=(1, 2, 3), paper=tuple(range(1, 9)))
    mlps = by_scale(scale, smoke=(1, 2, 3), quick=tuple(range(1, 9)), fast=tuple(range(1, 9)), paper=tuple(range(1, 9)))
    mlp = by_scale(
        scale,
        smoke="digits/mlp2-plain-w120-taper/smoke",
        quick="digits/mlp2-plain-w120-taper/quick~wd5e-3~batch50",  # few images: more of what regularises
        fast="mnist/mlp2-plain-w120-taper/qu~epochs40",
        paper="mnist/mlp2-plain-w120-taper/qu",
    )

    def networks(make, *how) -> list[dict]:
        runs = {norm: make(scale, norm, *how) for norm in ("bn", "ln")}
        named = [{"run": run, "series": norm, "basin": "independent", "seeds": several} for norm, run in runs.items()]
        same = [{**each, "run": copy(scale, each["run"], 1), "basin": "same"} for each in named]
        return named + same

    resnets, vggs = networks(resnet, width), networks(vgg)
    return Grid(
        needs={
            "rethink/fig3ab": resnets,
            "rethink/fig14-15": vggs + resnets,
            "rethink/fig16": [{"run": mlp, "series": "plain", "basin": "independent", "seeds": mlps}],
        },
        seeds=several,
        settings={
            "VGG": vggs[0]["run"],
            "ResNet": resnets[0]["run"],
            "copies": resnets[2]["run"],
            "MLP": mlp,
            "numbers": [n for n in by_scale(scale, smoke=(2, 3), quick=(2, 3, 4), fast=(2, 3), paper=range(2, 9))],
            "numbers of MLPs": [n for n in by_scale(scale, smoke=(2, 3), quick=(2, 4, 6, 8), fast=(2, 4, 6, 8),
                                                    paper=range(2, 9))],
            "orders": by_scale(scale, smoke=1, quick=2, fast=1, paper=3),
            "rounds": by_scale(scale, smoke=2, quick=5, fast=30, paper=30),  # of iterative matching, at most
        },
    )  # fmt: skip


def biases(scale: str) -> Grid:
    """Section 3.4: plain networks with biases, with them removed after training, and trained without any."""
    made = {
        "VGG": (vgg(scale, "plain"), vgg(scale, "nobias")),
        "ResNet": (resnet(scale, "plain"), resnet(scale, "nobias")),
        "VGG again": (vgg(scale, "plain", again=True), vgg(scale, "nobias", again=True)),
        "ResNet again": (resnet(scale, "plain", again=True), resnet(scale, "nobias", again=True)),
    }

    def networks(*series: str) -> list[dict]:
        return [
            {"run": run, "series": name, "biases": kept, "kind": f"{name} {kept}"}
            for name in series
            for run, kept in zip(
                (made[name][0], without_biases(scale, made[name][0]), made[name][1]),
                ("kept", "removed", "never"),
                strict=True,
            )
        ]

    return Grid(
        needs={
            "rethink/fig3cd": networks("VGG"),
            "rethink/fig17-24": networks(*made),
            "rethink/fig25-26": networks("VGG", "ResNet"),
            "rethink/fig27-28": networks("VGG", "ResNet"),
        },
        seeds=_seeds(scale),
        compares={f"rethink/fig{item}": "kind" for item in ("3cd", "17-24", "25-26", "27-28")},
        settings={
            **{name: run for name, (run, _) in made.items()},
            "removed": without_biases(scale, made["VGG"][0]),
            "never": made["VGG"][1],
            "points": by_scale(scale, smoke=3, quick=7, fast=7, paper=11),  # of a path, ends included
        },
    )


def rescaling(scale: str) -> Grid:
    """Section 4.1: which part of REPAIR matters, on plain networks and Fixup."""
    runs = {
        "VGG": vgg(scale, "plain"),
        "ResNet": resnet(scale, "plain"),
        "Fixup": resnet(scale, "fixup"),
        "VGG again": vgg(scale, "plain", again=True),
    }
    network = {name: [{"run": run, "series": name}] for name, run in runs.items()}
    return Grid(
        needs={
            "rethink/fig4ab": network["VGG"],
            "rethink/fig29-34": network["VGG"] + network["ResNet"],
            "rethink/table1": network["VGG"],
            "rethink/table4": network["VGG"],
            "rethink/table5": network["VGG again"],
            "rethink/table6": network["ResNet"],
            "rethink/table7": network["Fixup"],
            # Every pair, and a network of another seed.
            "rethink/table8": [{**network["VGG"][0], "seeds": (1, 2, 3)}],
            "rethink/table9": network["VGG"],
        },
        seeds=_seeds(scale),
        passes=70,
        settings=runs,
    )


def data_independent(scale: str) -> Grid:
    """Appendix F.2: renormalisation without data."""
    batchnorm = by_scale(scale, smoke=vgg, quick=vgg, fast=resnet, paper=vgg)  # at `fast`, what REPAIR has
    runs = {"BatchNorm": batchnorm(scale, "bn"), "LayerNorm": vgg(scale, "ln")}
    return Grid(
        needs={
            "rethink/table10": [{"run": runs["BatchNorm"]}],
            "rethink/table11": [{"run": runs["LayerNorm"]}],
        },
        seeds=_seeds(scale),
        settings=runs,
    )


def matching_retains(scale: str) -> Grid:
    """Section 4.2: midpoints trained on, and what of the endpoints is left in them."""
    width = by_scale(scale, smoke=None, quick=1, fast=None, paper=4)
    runs = {
        "VGG": vgg(scale, "plain"),
        "VGG-BN": vgg(scale, "bn"),
        "ResNet": resnet(scale, "plain"),
        "ResNet-BN": resnet(scale, "bn", width),
        "VGG again": vgg(scale, "plain", again=True),
        "ResNet again": resnet(scale, "plain", again=True),
    }
    network = {name: [{"run": run, "series": name}] for name, run in runs.items()}
    plain = network["VGG"] + network["ResNet"]
    return Grid(
        needs={
            "rethink/fig4c": network["VGG"],
            "rethink/fig4d": network["VGG"],
            "rethink/fig35": network["VGG"],
            "rethink/fig36-41": [each for name in runs for each in network[name]],
            "rethink/fig42": plain,
            "rethink/fig43": plain,
            "rethink/no-matching": network["VGG"],
        },
        seeds=_seeds(scale),
        passes=100,
        settings={
            **runs,
            "learning rate": by_scale(scale, smoke=0.01, quick=0.01, fast=0.01, paper=0.01),
            "epochs": by_scale(scale, smoke=1, quick=25, fast=5, paper=20),  # at most
            "every": by_scale(scale, smoke=5, quick=10, fast=10, paper=5),  # steps from one measurement to the next
            # that 90 % of must be right
            "training images": by_scale(scale, smoke=100, quick=250, fast=500, paper=5000),
            "images for Fisher information": by_scale(scale, smoke=20, quick=300, fast=1000, paper=5000),
        },
    )


def precision(scale: str) -> Grid:
    """Appendix D.2: activation matching as three codes do it."""
    width = by_scale(scale, smoke=None, quick=1, fast=None, paper=None)  # at `quick`, those of other sections
    runs = {
        "vgg": vgg(scale, "plain"),
        "vgg_bn": vgg(scale, "bn"),
        "vgg_ln": vgg(scale, "ln"),
        "resnet_bn": resnet(scale, "bn", width),
        "resnet_ln": resnet(scale, "ln", width),
    }
    networks = [{"run": run, "series": name} for name, run in runs.items()]
    everything = {"calibration": by_scale(scale, smoke=500, quick=5000, fast=5000, paper=5000)}  # sums are the subject
    return Grid(needs={"rethink/table2": networks}, seeds=_seeds(scale), settings=runs | everything)


def changed(run: str, change: str, value: float) -> str:
    """A run name, without its seed, with another learning rate ("lr") or weight decay ("wd"), in its one form.

    >>> changed("cifar10/vgg16-bn-w1/qu", "lr", 0.03), changed("cifar10/vgg16-bn-w1/qu~lr0.03", "lr", 0.1)
    ('cifar10/vgg16-bn-w1/qu~lr0.03', 'cifar10/vgg16-bn-w1/qu')
    """
    data, model, recipe = run.split("/")
    name, *changes = recipe.split("~")
    others = [each for each in changes if not re.match(change + r"[\d.]", each)]
    kind = parse_model(model).kind
    usual = find_recipe("~".join([name, *others]), kind, data)
    if math.isclose(getattr(usual, CHANGES[change].field), value):
        return f"{data}/{model}/{usual.name}"
    return f"{data}/{model}/{find_recipe('~'.join([usual.name, f'{change}{value:g}']), kind, data).name}"


def _epoch(scale: str) -> str:
    """Changes of `retrain` for one more epoch at the same rate."""
    return by_scale(scale, smoke="", quick="~epochs1", fast="~epochs1", paper="~epochs1") + "~schedule=constant"


def _as_trained(networks: list[dict]) -> list[dict]:
    """Networks beside which there are degraded ones."""
    return [{**network, "degraded": False} for network in networks]


def _usual(run: str) -> Recipe:
    return recipe_of(parse_run(seeded(run, 1), check_data=False))


def learning_rate(scale: str) -> Grid:
    """Section 4.3: networks trained at several learning rates, from two initialisations."""
    shares = by_scale(scale, smoke=[0.1, 1], quick=[0.2, 0.5, 1], fast=[0.1, 0.3, 1], paper=[0.1, 0.3, 0.5, 0.7, 1])
    width = by_scale(scale, smoke=None, quick=1, fast=None, paper=4)
    models = {
        "VGG-BN": vgg(scale, "bn"),
        "VGG-LN": vgg(scale, "ln"),
        "ResNet-BN": resnet(scale, "bn", width),
        "ResNet-LN": resnet(scale, "ln", width),
    }

    def rates(series: str, run: str, shares: list[float]) -> list[dict]:
        """A network at some shares of its usual learning rate."""
        found = {share: round(share * _usual(run).lr, 6) for share in shares}
        return [
            {"run": changed(run, "lr", lr), "series": series, "lr": lr, "share": share} for share, lr in found.items()
        ]

    networks = {series: rates(series, run, shares) for series, run in models.items()}

    def control(series: str) -> dict:
        """The networks of the largest rate, trained on at that rate, which makes them worse."""
        largest = networks[series][-1]
        return {**largest, "run": f"{largest['run']}/s{{seed}}/retrain{_epoch(scale)}", "degraded": True}

    def inits(series: str) -> list[dict]:
        """The smallest and the largest rate, from normal and from uniform initial weights."""
        normal = by_scale(scale, smoke="", quick="", fast="", paper="~init=fan-out")
        named = {"Kaiming normal": normal, "Kaiming uniform": "~init=uniform"}
        ends = networks[series][:: len(shares) - 1]
        return [{**each, "run": each["run"] + change, "init": init} for init, change in named.items() for each in ends]

    easier = by_scale(
        scale,
        smoke="digits/vgg11-ln-w0.0625/smoke",
        quick="digits/vgg11-ln-w0.25/quick",
        fast="mnist/vgg11-ln-w0.5/qu-mnist~epochs5",
        paper="mnist/vgg16-ln-w1/qu-mnist~init=uniform",
    )
    tenths = by_scale(scale, smoke=[0.1, 1], quick=[0.1, 0.3, 1], fast=[0.01, 0.1, 1], paper=[0.01, 0.1, 1])
    on_easier = rates("VGG-LN", easier, tenths)
    everything = [each for series in models for each in networks[series]]
    return Grid(
        needs={
            "rethink/fig5a": networks["VGG-LN"],
            "rethink/fig45-46": everything,
            "rethink/fig47-58": _as_trained(everything) + [control(series) for series in models],
            "rethink/fig44": networks["VGG-BN"] + networks["ResNet-BN"],
            "rethink/fig5d": on_easier,
            "rethink/fig59": on_easier,
            "rethink/fig5b": inits("VGG-LN"),
            "rethink/fig5c": inits("VGG-LN"),
            "rethink/fig60-62": inits("VGG-LN") + inits("ResNet-LN"),
        },
        seeds=_seeds(scale),
        compares={f"rethink/fig{item}": "share" for item in ("5a", "45-46", "47-58", "44", "5d", "59")}
        | {f"rethink/fig{item}": "init" for item in ("5b", "5c", "60-62")},
        settings={
            **models,
            "shares of the usual learning rate": shares,
            "on the easier data": easier,
            "shares of its learning rate": tenths,
            "points": by_scale(scale, smoke=3, quick=5, fast=5, paper=11),  # of a path, ends included
            "sparsities": by_scale(scale, smoke=[0.5], quick=SPARSITIES, fast=SPARSITIES, paper=PAPER_SPARSITIES),
            "measured after epochs": by_scale(
                scale, smoke=[1], quick=[1, 2, 5, 9], fast=[1, 2, 5], paper=[1, 2, 5, 10, 20, 40, 80, 120]
            ),
        },
    )


def weight_decay(scale: str) -> Grid:
    """Section 4.3: networks trained with several weight decays."""
    # Within so few steps as at `quick`, weights fade only if they decay faster.
    decays = by_scale(
        scale, smoke=[1e-4, 1e-2], quick=[1e-4, 1e-3, 1e-2], fast=[1e-4, 5e-4], paper=[1e-4, 2e-4, 3e-4, 4e-4, 5e-4]
    )
    width = by_scale(scale, smoke=None, quick=1, fast=None, paper=1)
    runs = {
        "VGG": vgg(scale, "plain"),
        "ResNet-BN": resnet(scale, "bn", width),
        "ResNet-LN": resnet(scale, "ln", width),
    }
    # The paper warms plain VGGs up, too, if they have more weight decay (App. C).
    warmup = by_scale(scale, smoke="", quick="", fast="", paper="~warmup1")
    networks = {
        series: [
            {
                "run": changed(run, "wd", decay) + warmup * (series == "VGG" and decay > decays[0]),
                "series": series,
                "wd": decay,
            }
            for decay in decays
        ]
        for series, run in runs.items()
    }

    def control(series: str) -> dict:
        """The networks of the smallest weight decay, trained on with the largest."""
        least = networks[series][0]
        change = find_recipe(f"retrain~wd{decays[-1]:g}{_epoch(scale)}", "", "", _usual(least["run"]))
        return {**least, "run": f"{least['run']}/s{{seed}}/{change.name}", "degraded": True}

    everything = [network for each in networks.values() for network in each]
    compressed = [each for series in ("VGG", "ResNet-BN") for each in (networks[series][0], networks[series][-1])]
    return Grid(
        needs={
            "rethink/fig6a": everything,
            "rethink/fig63-68": _as_trained(everything) + [control(series) for series in runs],
            "rethink/fig6b": compressed[:2],
            "rethink/fig69-70": compressed,
            "rethink/fig6c": networks["VGG"],
            "rethink/fig71": networks["VGG"],
        },
        seeds=_seeds(scale),
        compares={f"rethink/fig{item}": "wd" for item in ("6a", "63-68", "6b", "69-70", "6c", "71")},
        settings={
            **runs,
            "weight decays": decays,
            "points": by_scale(scale, smoke=3, quick=5, fast=5, paper=11),  # of a path, ends included
        },
    )


def pruning(scale: str) -> Grid:
    """Section 5: trained networks, pruned at once in several ways, and renormalised."""
    width = by_scale(scale, smoke=None, quick=1, fast=None, paper=1)
    first = {
        "ResNet-BN": resnet(scale, "bn", width),
        "ResNet-LN": resnet(scale, "ln", width),
        "VGG-BN": vgg(scale, "bn"),
        "VGG-LN": vgg(scale, "ln"),
        "VGG": vgg(scale, "plain"),
    }
    again = by_scale(
        scale,
        smoke={"VGG-BN again": vgg(scale, "bn", again=True)},
        # REPAIR's, so that nobody trains others
        quick={
            "ResNet20-BN again": "digits/resnet20-bn-w0.5/quick",
            "ResNet20-LN again": "digits/resnet20-ln-w0.5/quick",
            "VGG again": "digits/vgg11-fused-w0.25/quick",
        },
        fast={"ResNet18-BN": f"cifar10/resnet18-bn-w0.5/{RESNET}"},
        paper={
            "ResNet-BN again": "cifar100/resnet20-bn-w1-sc1/qu",
            "ResNet-LN again": "cifar100/resnet20-ln-w1-sc1/qu",
            "VGG-BN again": "cifar100/vgg11-bn-w1/qu-cifar100",
        },
    )
    imagenet = by_scale(
        scale,
        smoke="digits/resnet26-bn-w0.0625/smoke",
        quick="digits-hard/resnet26-bn-w0.125/quick",
        fast=f"cifar10/resnet50-bn-w1/{RESNET}",
        paper="imagenet@224/torchvision-resnet50/jordan",
    )
    network = {series: [{"run": run, "series": series}] for series, run in (first | again).items()}
    plain = {"run": resnet(scale, "plain"), "series": "ResNet, plain"}
    return Grid(
        needs={
            "rethink/fig2a": network["ResNet-LN"],
            "rethink/fig6d": [{"run": imagenet, "series": f"ResNet{parse_model(imagenet.split('/')[1]).depth}"}],
            "rethink/fig72": [each for series in first for each in network[series]],
            "rethink/fig73": [plain] + [each for series in again for each in network[series]],
            "rethink/fig74": network["ResNet-BN"],
        },
        seeds=_seeds(scale),
        passes=by_scale(scale, smoke=None, quick=100, fast=100, paper=None),
        settings={
            **first,
            **again,
            "ResNet, plain": plain["run"],
            "ResNet50": imagenet,
            "sparsities": by_scale(scale, smoke=[0.5], quick=SPARSITIES, fast=SPARSITIES, paper=PAPER_SPARSITIES),
            "calibration": by_scale(scale, smoke=64, quick=256, fast=256, paper=5000),  # images, for renormalising
            # For the diagonal Fisher information; for WoodFisher gradients, each of how many images.
            "images for Fisher information": by_scale(scale, smoke=20, quick=100, fast=400, paper=1000),
            "gradients": by_scale(scale, smoke=20, quick=100, fast=400, paper=400),
            "images of a gradient": by_scale(scale, smoke=1, quick=1, fast=1, paper=400),
            "block": by_scale(scale, smoke=20, quick=50, fast=100, paper=1000),  # of WoodFisher, weights
            "test images": by_scale(scale, smoke=None, quick=None, fast=2000, paper=None),  # None is all
            "samples": by_scale(scale, smoke=[32, 64], quick=[64, 128, 256], fast=[64, 128, 256], paper=[64, 128, 256]),
        },
    )
