"""Peak memory of activation matching over 5,000 and 50,000 images, each in a process of its own."""

import argparse
import json
import resource
import subprocess
import sys

import torch
from common import network, save

from repairlib.matching import match_activations


class Synthetic:
    """Random images (b, 3, 32, 32), made when they are asked for."""

    def __init__(self, n: int, batch_size: int = 250):
        self.n, self.batch_size = n, batch_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.n, self.batch_size):
            yield torch.randn(min(self.batch_size, self.n - start), 3, 32, 32, generator=generator)


def peak(name: str, n: int) -> dict:
    """Match two networks on n images; peak resident memory in MB."""
    a, b = (network(name, seed) for seed in (0, 1))
    matching = match_activations(a, b, Synthetic(n))
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {
        "peak (MB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6,
        "objective": sum(matching.objective.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, nargs=2, default=[5000, 50000])
    parser.add_argument("--one", type=int, help="only this many images, result on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in ("resnet8-bn-w1",):
        if args.one:
            print(json.dumps(peak(name, args.one)))
            return
        found = []
        for n in args.images:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--one", str(n)]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            rows.append({"network": name, "images": n, **found[-1]})
        rows.append({"network": name, "growth (MB)": found[1]["peak (MB)"] - found[0]["peak (MB)"]})
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
