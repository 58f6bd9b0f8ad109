"""How cost grows with width, images, depth and the number of networks: CPU time and peak memory, each in a new process.

Beside each peak stands a formula, so that it can be worked out for any network; `large` does so for two large ones.
"""

import argparse
import ctypes
import functools
import gc
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from common import save
from floors import forward, least
from memory import peak_memory
from torch import nn

from companion.runs import costs, models
from repairlib.groups import PermutationSpec, permutation_spec
from repairlib.matching import match_activations, solve_assignment
from repairlib.renorm import Repair
from repairlib.several import match_several
from repairlib.tracing import trace
from repairlib.weight_matching import match_weights


@dataclass(frozen=True)
class Case:
    """Networks and images to measure with.

    Attributes:
        network: a name of companion.runs.models, or of torchvision.models.
        images: how many; batches are of up to `batch`.
        side: pixels of an image's side.
        networks: how many are matched.
    """

    network: str
    images: int
    batch: int = 250
    side: int = 32
    networks: int = 2

    def build(self) -> nn.Module:
        """A network with random weights."""
        if self.network in torchvision.models.list_models():
            return torchvision.models.get_model(self.network)
        return models.build(self.network, (3, self.side, self.side), 1000 if self.side == 224 else 10)

    def ready(self) -> list[nn.Module]:
        """The networks, with BatchNorm statistics of some images: activations as in a trained network."""
        found = []
        for seed in range(self.networks):
            torch.manual_seed(seed)
            net = self.build()
            with torch.no_grad():
                net.train()(torch.randn(4, 3, self.side, self.side))
            found.append(net.eval())
        return found

    def batches(self) -> list[torch.Tensor]:
        """Random images."""
        x = torch.randn(self.images, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        return list(x.split(self.batch))

    def sizes(self) -> "Sizes":
        """See there."""
        return sizes(self.build().eval(), torch.zeros(2, 3, self.side, self.side))

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs of one image's forward pass."""
        with torch.device("meta"):
            return costs.count_flops(self.build(), (3, self.side, self.side))


# ----------------------------------------------------------------------------------------------------- what to expect


@dataclass(frozen=True)
class Sizes:
    """What formulas need to know of a network; numbers of values, not bytes.

    Attributes:
        units: of each group.
        taps: of each group, values of one image at the node where it is matched (0 where no node shows it).
        weights: all of the network.
        tensors: numbers of values and shapes of the axes that are permuted, of each tensor.
        alive: values of one image that are held at one time, at most, when nodes are computed one by one.
    """

    units: list[int]
    taps: list[int]
    weights: int
    tensors: list[tuple[int, tuple[tuple[int, int], ...]]]
    alive: int


def sizes(model: nn.Module, example: torch.Tensor) -> Sizes:
    """Of a model, from its graph."""
    net, spec = trace(model, example), permutation_spec(model, example, verify=False)
    per_image = {node.name: torch.Size(net.shapes[node.name] or ()).numel() // len(example) for node in net.nodes}
    values, alive = {}, 0
    for node in net.nodes:
        values[node] = per_image[node.name]
        alive = max(alive, sum(values.values()))
        net.forget(node, values)
    return Sizes(
        [group.size for group in spec.groups],
        [per_image[net.corrected(group.taps["post"])] if group.taps else 0 for group in spec.groups],
        sum(p.numel() for p in model.parameters()),
        axes_of(spec, dict(model.named_parameters())),
        alive,
    )


def axes_of(
    spec: PermutationSpec, parameters: dict[str, nn.Parameter]
) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """Of every tensor that some group indexes: number of values, and length of each axis that is permuted."""
    found: dict[str, dict[int, int]] = {}
    for group in spec.groups:
        for axis in group.axes:
            if axis.tensor in parameters:
                found.setdefault(axis.tensor, {})[axis.axis] = group.size
    return [(parameters[name].numel(), tuple(axes.items())) for name, axes in found.items()]


def expected_bytes(what: str, s: Sizes, images: int, batch: int, networks: int = 2) -> float:
    """Peak memory of a procedure beyond networks and images, in bytes; README.md says where each term comes from."""
    batch = min(batch, images)
    if what in ("activations", "several"):
        sums = 8 * (networks - 1) * sum(n * n for n in s.units)
        step = 4 * batch * (networks * s.alive + (networks + 1) * max(s.taps))
        hidden = expected_bytes("weights", s, images, batch) if 0 in s.taps else 0  # heads are matched by weights
        return sums + max(step, 6 * 8 * max(s.units) ** 2, hidden)
    if what == "weights":
        products = sum(4 * n * n for _, axes in s.tensors for _, n in axes)
        copies = sum(2 * 4 * size * sum(axis > 0 for axis, _ in axes) for size, axes in s.tensors)
        return products + copies + max(3 * 8 * size for size, _ in s.tensors)
    return 4 * images * s.alive + 4 * 4 * s.weights  # both ends, their mean, and the network made of it


def expected_flops(what: str, s: Sizes, one: int, images: int, networks: int = 2) -> float:
    """FLOPs of a procedure; of weight matching those of one sweep, without its assignments."""
    if what in ("activations", "several"):
        pairs = sum(2 * n * tap for n, tap in zip(s.units, s.taps, strict=True))
        hidden = expected_flops("weights", s, one, images) if 0 in s.taps else 0
        return images * (networks * one + (networks - 1) * pairs) + (networks - 1) * hidden
    if what == "weights":
        return sum(2 * size * n for size, axes in s.tensors for _, n in axes)
    return 3 * images * one if what == "repair" else 0.0


# ---------------------------------------------------------------------------------------------------------- measuring


def run(what: str, nets: list[nn.Module], batches: list) -> Callable:
    """The call that is measured."""
    a, b = nets[:2]
    spec = permutation_spec(a, batches[0][:2], verify=False)
    if what == "several":
        match = functools.partial(match_activations, data=batches, spec=spec)
        return lambda: match_several(nets, match)
    if what == "activations":
        return lambda: match_activations(a, b, batches, spec=spec)
    if what == "weights":
        return lambda: match_weights(a, b, spec=spec, start="forward")
    norm = any(isinstance(module, nn.BatchNorm2d) for module in a.modules())
    return lambda: Repair(a, b, batches, bn="reset" if norm else "frozen", limit=None)(0.5)


def seconds(what: str, case: Case, times: int) -> dict:
    """CPU seconds of a procedure and of a forward pass of one network in turns; peak memory (MB) as malloc has it."""
    call, once = ready(what, case)
    before = peak_memory()
    found = least({"ours": call} | ({} if what == "weights" else {"forward": once}), times)
    row = {"seconds": found["ours"], "peak as it is (MB)": peak_memory() - before}
    if "forward" in found:
        row |= {"forward passes": found["ours"] / found["forward"],
                "GFLOP/s": case.flops * case.images / found["forward"] / 1e9}  # fmt: skip
    return row


def memory(what: str, case: Case) -> dict:
    """Peak memory (MB) if malloc gives blocks above 128 kB back when they are freed, beside the formula."""
    ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, which else grows to 32 MB
    call, _ = ready(what, case)
    before = peak_memory()
    result = call()
    peak, s = peak_memory() - before, case.sizes()
    row = {"peak (MB)": peak, "formula (MB)": expected_bytes(what, s, case.images, case.batch, case.networks) / 1e6}
    flops = expected_flops(what, s, case.flops, case.images, case.networks)
    if what == "weights":
        row |= {"sweeps": len(result.history) - 1, "GFLOPs of a sweep": flops / 1e9}
    elif flops:
        row |= {"forward passes at least": flops / case.flops / case.images}
    return row


def ready(what: str, case: Case) -> tuple[Callable, Callable]:
    """What is measured, and a forward pass of one network; everything is loaded, and peak memory starts from here."""
    small = Case("resnet8-bn-w0.25", 2, networks=case.networks)
    run(what, small.ready(), small.batches())()
    nets, batches = case.ready(), case.batches()
    call = run(what, nets, batches)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    return call, lambda: forward(nets[:1], batches)


def alone(function: Callable, *arguments: object) -> dict:
    """Call a function in a fork of this process, whose peak memory is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


WIDTH = {"0.5": 500, "1": 250, "2": 100, "4": 50, "8": 16, "16": 4}
CASES = {
    "width": [Case(f"resnet20-bn-w{width}", images, 50) for width, images in WIDTH.items()],
    "images": [Case("resnet20-bn-w1", images, 50) for images in (250, 1000)],
    "depth": [Case(f"resnet{depth}-bn-w1", 50, 50) for depth in (8, 56)],
    "networks": [Case("resnet20-bn-w1", 50, 50, networks=n) for n in (2, 4, 8)],
    "wide": [Case(f"mlp3-plain-w{width}", 500) for width in (1024, 2048)],
    "imagenet": [Case("torchvision-resnet50", 16, 16, 224), Case("vit_b_16", 4, 4, 224)],
}
ONLY = {"images": ("activations", "repair"), "networks": ("several",)}


def growth(name: str, times: int) -> Iterator[dict]:
    """Rows of one part."""
    for case in CASES[name]:
        for what in ONLY.get(name, ("activations", "weights", "repair")):
            about = {"part": name, "what": what, "network": case.network, "networks": case.networks,
                     "images": case.images, "batch": min(case.batch, case.images)}  # fmt: skip
            yield about | alone(seconds, what, case, times) | alone(memory, what, case)


def assignments(sizes: Iterable[int] = (1024, 2048, 4096, 8192)) -> Iterator[dict]:
    """Seconds of one assignment, of units that have partners and of units that have none."""
    for n in sizes:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(n, n, generator=generator) / 30
        partners = noise.clone()
        partners[torch.arange(n), torch.randperm(n, generator=generator)] += 0.3
        found = least(
            {"noise": lambda x=noise: solve_assignment(x), "partners": lambda x=partners: solve_assignment(x)}, 1
        )
        yield {"part": "assignments", "units": n, **{f"{name} (s)": value for name, value in found.items()}}


# ----------------------------------------------------------------------------------------------------- large networks


@dataclass(frozen=True)
class Large:
    """A network that is worked out, not measured.

    Attributes:
        like: the measured network whose times are scaled.
        build: the network with some number of layers, all alike.
        layers: how many it has; 0 where `build` gives the whole network.
        images, batch, side: as of a `Case`.
    """

    like: str
    build: Callable[[int], nn.Module]
    layers: int
    images: int = 5000
    batch: int = 50
    side: int = 224

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Of the whole network: that of two layers, and what the third adds, so often."""
        example = torch.zeros(2, 3, self.side, self.side)
        found = [sizes(self.build(number).eval(), example) for number in self._few]

        def repeated(lists: list[list]) -> list:
            return lists[0] + [*(Counter(lists[-1]) - Counter(lists[0])).elements()] * (self.layers - 2)

        groups = repeated([list(zip(s.units, s.taps, strict=True)) for s in found])
        units, taps = (list(numbers) for numbers in zip(*groups, strict=True))
        weights = int(self._whole([s.weights for s in found]))
        return Sizes(units, taps, weights, repeated([s.tensors for s in found]), max(s.alive for s in found))

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of one image's forward pass."""
        with torch.device("meta"):
            return self._whole([costs.count_flops(self.build(n), (3, self.side, self.side)) for n in self._few])

    @property
    def _few(self) -> tuple[int, ...]:
        return (2, 3) if self.layers else (0,)

    def _whole(self, numbers: list) -> float:
        """A number of the network, which grows by the same with every layer."""
        return numbers[0] + (numbers[-1] - numbers[0]) * (self.layers - 2)


LARGE = {
    "ResNet50": Large("torchvision-resnet50", lambda _: torchvision.models.resnet50(), 0),
    "ViT-g/14": Large("vit_b_16", lambda n: torchvision.models.VisionTransformer(224, 14, n, 16, 1408, 6144), 40),
    "MLP 5 x 16384": Large(
        "mlp3-plain-w2048", lambda n: models.build(f"mlp{n}-plain-w16384", (3, 32, 32), 10), 5, side=32
    ),
}


def assignment_seconds(units: Iterable[int], rows: list[dict]) -> float:
    """Seconds of the assignments of some groups, as measured; beyond that they grow with the cube."""
    known = {row["units"]: row["noise (s)"] for row in rows if row["part"] == "assignments"}
    at, logs = np.log([*known]), np.log([*known.values()])

    def one(n: int) -> float:
        inside = min(max(n, min(known)), max(known))
        return float(np.exp(np.interp(np.log(inside), at, logs)) * (n / inside) ** 3)

    return sum(map(one, units))


def model_seconds(what: str, flops: float, assignments: float, rate: float, sweeps: int) -> float:
    """Seconds if all products ran at the FLOP/s of a forward pass, and nothing else took time but assignments."""
    return (1 + sweeps) * (flops / rate + (0.0 if what == "repair" else assignments))


def large(rows: list[dict]) -> Iterator[dict]:
    """Large networks: the seconds of a like one times the ratio of `model_seconds`; and a check of it."""
    parts = ("width", "wide", "imagenet")
    cases = {case.network: case for part in parts for case in CASES[part]}
    measured = {(row["network"], row["what"]): row for row in rows if row["part"] in parts}

    def like(network: str, what: str) -> tuple[dict, float, int, float]:
        """Of a measured network: its row, FLOP/s, sweeps, and seconds over those of the model."""
        row, case, s = measured[network, what], cases[network], cases[network].sizes()
        rate = 1e9 * max(measured[network, each]["GFLOP/s"] for each in ("activations", "repair"))
        sweeps = row.get("sweeps", 0)
        flops = expected_flops(what, s, case.flops, case.images)
        return (
            row,
            rate,
            sweeps,
            row["seconds"] / model_seconds(what, flops, assignment_seconds(s.units, rows), rate, sweeps),
        )

    for network in ("torchvision-resnet50", "vit_b_16"):
        for what in ("activations", "weights", "repair"):
            row, _, _, own = like(network, what)
            yield {"part": "large", "what": what, "network": network, "from": "resnet20-bn-w4",
                   "extrapolated / measured seconds": like("resnet20-bn-w4", what)[-1] / own,
                   "formula / measured peak": row["formula (MB)"] / row["peak (MB)"]}  # fmt: skip
    for name, net in LARGE.items():
        for what in ("activations", "weights", "repair"):
            _, rate, sweeps, over = like(net.like, what)
            flops = expected_flops(what, net.sizes, net.flops, net.images)
            size = expected_bytes(what, net.sizes, net.images, net.batch)
            assignments, weights = assignment_seconds(net.sizes.units, rows), net.sizes.weights
            yield {"part": "large", "what": what, "network": name, "from": net.like, "images": net.images,
                   "weights (millions)": weights / 1e6, "PFLOPs": flops * (1 + sweeps) / 1e15,
                   "assignments (s)": assignments * (1 + sweeps) * (what != "repair"),
                   "minutes of a core": over * model_seconds(what, flops, assignments, rate, sweeps) / 60,
                   "formula (GB)": size / 1e9}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="repetitions, of which the least counts")
    parser.add_argument("--parts", default=",".join((*CASES, "assignments", "large")), help="which to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = Path(__file__).parent / "results/growth.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for part in args.parts.split(","):
        rows = [row for row in rows if row["part"] != part]
        found = assignments() if part == "assignments" else large(rows) if part == "large" else growth(part, args.times)
        for row in found:
            rows.append(row)
            print(row, flush=True)
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
