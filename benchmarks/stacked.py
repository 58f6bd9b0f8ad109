"""Evaluating many networks of one architecture: stacked under vmap against one after the other."""

import statistics

import torch
from common import arguments, save, timed

from companion.runs import models
from repairlib.evaluation import CPU_STACK, _largest_activation, evaluate_many

NETWORKS, REPEATS = 11, 3
CASES = (  # name, shape of an image, images in a batch
    ("mlp3-plain-w128", (1, 28, 28), 10), ("mlp3-plain-w128", (1, 28, 28), 100), ("mlp3-plain-w128", (1, 28, 28), 1000),
    ("mlp10-fused-w32", (1, 8, 8), 100), ("mlp10-fused-w32", (1, 8, 8), 1000),
    ("resnet20-bn-w0.25", (1, 16, 16), 10), ("resnet20-bn-w0.25", (1, 16, 16), 100),
    ("tiny10-ln-w0.25", (1, 16, 16), 10), ("tiny10-ln-w0.25", (1, 16, 16), 100),
    ("vgg11-bn-w0.25", (1, 16, 16), 10), ("vgg11-bn-w0.25", (1, 16, 16), 100),
    ("resnet20-bn-w1", (3, 32, 32), 10), ("resnet20-bn-w1", (3, 32, 32), 50), ("vgg11-bn-w1", (3, 32, 32), 10),
)  # fmt: skip


def main() -> None:
    args = arguments(__doc__, number=1000)
    rows = []
    for name, shape, batch in CASES:
        batch = min(batch, args.images)
        torch.manual_seed(0)
        nets = [models.build(name, shape, 10) for _ in range(NETWORKS)]
        states = [net.state_dict() for net in nets]
        batches = [(torch.randn(batch, *shape), torch.randint(10, (batch,)))]
        largest = _largest_activation(nets[0], batches)
        chunk = max(1, min(NETWORKS, CPU_STACK // largest))
        times: dict[str, list[float]] = {"one": [], "all": [], "chunk": []}
        found = {}
        for repeat in range(REPEATS + 1):  # the first warms up; interleaved, so that other load meets all alike
            for key, size in {"one": 1, "all": NETWORKS, "chunk": chunk}.items():

                def run(size=size, net=nets[0], states=states, batches=batches):
                    return evaluate_many(net, states, batches, stack=size)

                found[key], seconds = timed(run)
                times[key] += [seconds] * (repeat > 0)
        gap = max(abs(a[0] - b[0]) / a[0] for key in found for a, b in zip(found["one"], found[key], strict=True))
        middle = {key: statistics.median(values) for key, values in times.items()}
        rows.append(
            {
                "network": name, "image": "x".join(map(str, shape)), "images": batch, "largest activation": largest,
                "one by one (s)": middle["one"], f"{NETWORKS} stacked (s)": middle["all"],
                f"ratio, {NETWORKS} stacked": middle["one"] / middle["all"],
                "chunk": chunk, "ratio, stacked in chunks": middle["one"] / middle["chunk"],
                "default": "stacked in chunks" if CPU_STACK // largest >= 4 else "one by one",
                "largest relative difference of a loss": gap,
            }
        )  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
