"""How time grows with width, images, depth and the number of networks, and what that means for large ones.

Every point is the least of some repetitions, with one thread. A row has the exponent p of time ~ size^p, from its two
largest points. The last rows carry the times of one network over to another by its operations and weights.
"""

import argparse
import functools
import math

import torch
from common import images, network, save
from floors import least

from companion.runs import models
from companion.runs.costs import cost
from repairlib.groups import permutation_spec
from repairlib.interpolate import interpolate_models
from repairlib.matching import match_activations
from repairlib.renorm import Repair
from repairlib.several import match_several
from repairlib.weight_matching import match_weights

SIZE = (3, 32, 32)


def measure(name: str, number: int, times: int) -> dict[str, float]:
    """Seconds of each step for a pair of networks and some images."""
    a, b = (network(name, seed) for seed in (0, 1))
    batches = images(number)
    spec = permutation_spec(a, batches[0][:2], verify=False)
    return least({
        "groups": lambda: permutation_spec(a, batches[0][:2]),
        "activations": lambda: match_activations(a, b, batches, spec=spec),
        "weights": lambda: match_weights(a, b, spec=spec),
        "average": lambda: interpolate_models(a, b),
        "REPAIR": lambda: Repair(a, b, batches, limit=None)(0.5),
    }, times)  # fmt: skip


def row(what: str, sizes: list[float], found: list[dict[str, float]]) -> dict:
    """Times over a size, and with which power of it they grow at the end."""
    out: dict = {"over": what, "sizes": ", ".join(f"{size:g}" for size in sizes)}
    for step in found[0]:
        seconds = [each[step] for each in found]
        power = math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])
        out[f"{step} (s)"] = ", ".join(f"{each:.3g}" for each in seconds)
        out[f"{step}, power"] = round(power, 2)
    return out


def of_many(n: int, number: int, times: int) -> dict[str, float]:
    nets, batches = [network("resnet20-bn-w1", seed) for seed in range(n)], images(number)
    spec = permutation_spec(nets[0], batches[0][:2], verify=False)
    match = functools.partial(match_activations, data=batches, spec=spec)
    return least({"activations, to the first": lambda: match_several(nets, match)}, times)


def carried_over(args: argparse.Namespace) -> list[dict]:
    """ResNet50 on ImageNet, from the same network on small images; and a network of a billion weights, by its bytes."""
    name, number = "torchvision-resnet50", 100
    small = measure("resnet18-bn-w1", number, 1)
    flops, _ = cost(models.parse("resnet18-bn-w1"), SIZE, 10)
    large, size = cost(models.parse(name), (3, 224, 224), 1000)
    ratio = large / flops * 5000 / number
    return [
        {
            "network": "ResNet50, 5,000 images of 224 pixels, one core", "weights (MB)": size / 1e6,
            "activations (min)": small["activations"] * ratio / 60, "REPAIR (min)": small["REPAIR"] * ratio / 60,
        },
        {
            "network": "a billion weights in float32", "two networks and their average (GB)": 3 * 4.0,
            "average (s)": small["average"] * 1e9 * 4 / cost(models.parse("resnet18-bn-w1"), SIZE, 10)[1],
        },
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--times", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    widths, numbers, depths, many = [0.5, 1, 2, 4], [250, 500, 1000, 2000], [8, 20, 32, 56], [2, 4, 8]
    rows = [
        row("width of ResNet20", widths, [measure(f"resnet20-bn-w{w:g}", args.images, args.times) for w in widths]),
        row("images, ResNet20", numbers, [measure("resnet20-bn-w1", n, args.times) for n in numbers]),
        row("depth of a ResNet", depths, [measure(f"resnet{d}-bn-w1", args.images, args.times) for d in depths]),
        row("number of ResNet20s", many, [of_many(n, args.images, args.times) for n in many]),
        *carried_over(args),
    ]
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
