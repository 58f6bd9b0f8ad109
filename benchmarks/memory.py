"""Peak memory of activation matching over 5,000 and 50,000 images, each in a process of its own."""

import argparse
import json
import resource
import statistics
import subprocess
import sys

import torch
from common import network, save

from repairlib.matching import match_activations

NAME = "resnet8-bn-w1"


class Synthetic:
    """Random images (b, 3, 32, 32), made when they are asked for."""

    def __init__(self, n: int, batch_size: int = 250):
        self.n, self.batch_size = n, batch_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.n, self.batch_size):
            yield torch.randn(min(self.batch_size, self.n - start), 3, 32, 32, generator=generator)


def peak(name: str, n: int) -> dict:
    """Match two networks on n images; peak resident memory in MB, and what it was before."""
    a, b = (network(name, seed) for seed in (0, 1))
    before = peak_memory()
    matching = match_activations(a, b, Synthetic(n))
    return {
        "peak before matching (MB)": before, "peak (MB)": peak_memory(), "objective": sum(matching.objective.values()),
    }  # fmt: skip


def peak_memory() -> float:
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, nargs=2, default=[5000, 50000])
    parser.add_argument("--repeats", type=int, default=3, help="processes each: the allocator varies")
    parser.add_argument("--one", type=int, help="only this many images, result on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(peak(NAME, args.one)))
        return
    rows = []
    for n in args.images:
        command = [sys.executable, __file__, "--threads", str(args.threads), "--one", str(n)]
        done = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(args.repeats)]
        found = [json.loads(process.stdout) for process in done]
        row = {key: [round(one[key], 1) for one in found] for key in found[0]}
        middle = statistics.median(one["peak (MB)"] for one in found)
        rows.append({"network": NAME, "images": n, **row, "median peak (MB)": middle})
    growth = rows[1]["median peak (MB)"] - rows[0]["median peak (MB)"]
    rows.append({"network": NAME, "growth of the median (MB)": growth})
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
