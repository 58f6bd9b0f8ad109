"""Derive and verify the permutation groups of torchvision's classification models, and merge two: docs/torchvision.md.

    python docs/torchvision_groups.py                    # the models that have no row yet
    python docs/torchvision_groups.py resnet50 vit_b_16  # these, again
    python docs/torchvision_groups.py --all              # every model, again

Each model runs in a process of its own, one after the other, with a time limit: the largest (vit_h_14, regnet_y_128gf)
take 12 GB, and vit_h_14 nearly 30 to be merged.
"""

import argparse
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

import repairlib
from repairlib.groups import SpecError, UnsupportedNode, invariance_error, permutation_spec
from repairlib.recording import UntraceableModel

TABLE = Path(__file__).with_name("torchvision.md")
OPTIONS = dict.fromkeys(("googlenet", "inception_v3"), {"aux_logits": False, "init_weights": False})
HEADER = """# torchvision's classification models

Written by `docs/torchvision_groups.py` with torchvision {version}, on {threads} CPU thread(s) of a busy machine, for
images of {small} pixels where a model takes them. Error: the largest relative change of the output in float64 when
every group of a copy with random weights is permuted at random, on two random inputs. Seconds: deriving the groups,
with this check.

Two networks of random weights are then aligned by the activations of four random images, and merged by
`repairlib.merge`. Aligned: the largest change of B's outputs by that, relative to the largest output, in float32; "-"
where a model's last layer begins with zeros. Merged: whether the result is finite and of the model's own
class. Seconds: both together. The auxiliary classifiers of GoogLeNet and Inception, used in training only, are left
out.

| model | input | groups | units | error | seconds | aligned by activations | merged | seconds |
|---|---|---|---|---|---|---|---|---|
"""
SMALL = 64


def sized(name: str) -> tuple[Callable[[], nn.Module], int]:
    """How to make a model, and the size of images for it: small if it takes them."""

    def make() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {})).eval()

    model = make()
    size = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    size = getattr(model, "image_size", size)  # vit_h_14 is built for 224, unless with its weights for 518
    try:
        with torch.no_grad():
            model(torch.zeros(2, 3, SMALL, SMALL))
        return make, SMALL
    except (RuntimeError, ValueError, AssertionError):
        return make, size


def row(name: str) -> str:
    """Line of the table for one model."""
    make, size = sized(name)
    torch.manual_seed(0)
    a, b, x = make(), make(), torch.randn(4, 3, size, size)
    start = time.perf_counter()
    try:
        spec = permutation_spec(a, x[:2], verify=False)
        error = invariance_error(a, spec, x[:2])
        derived = time.perf_counter() - start
        if not error < 1e-8:
            raise SpecError(f"permuting changes its output by {error:.1e}")
        start = time.perf_counter()
        matching = repairlib.match_activations(a, b, [x], spec=spec)
        aligned = matching.apply(b)
        with torch.no_grad():
            before, after = b(x), aligned(x)
        del aligned
        change = float((after - before).abs().max() / before.abs().max())
        merged = repairlib.merge(a, b, [x], match=matching).model
        with torch.no_grad():
            fine = bool(merged(x).isfinite().all()) and type(merged) is type(a)
        seconds = time.perf_counter() - start
    except (UntraceableModel, UnsupportedNode, SpecError) as error:
        return f"| {name} | {size} | {type(error).__name__}: {error} | | | | | | |"
    units = sum(group.size for group in spec.groups)
    shown = "-" if math.isnan(change) else f"{change:.0e}"
    return (
        f"| {name} | {size} | {len(spec.groups)} | {units:,} | {error:.0e} | {derived:.1f} | {shown} | "
        f"{'yes' if fine else 'no'} | {seconds:.1f} |"
    )


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; those without a row if none is named")
    parser.add_argument("--all", action="store_true", help="every model again")
    parser.add_argument("--row", action="store_true", help="print the row of one model and end")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a model")
    options = parser.parse_args()
    if options.row:
        print(row(options.names[0]))
        return
    every = torchvision.models.list_models(module=torchvision.models)
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = {found[1]: line for line in lines if (found := re.match(r"\| (\w+) \| \d", line))}
    for name in options.names or [name for name in every if options.all or name not in rows]:
        command = [sys.executable, __file__, "--row", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
            rows[name] = done.stdout.strip() or f"| {name} | 0 | ended with status {done.returncode} | | | | | | |"
            print(rows[name], done.stderr[-2000:] if done.returncode else "", flush=True)
        except subprocess.TimeoutExpired:
            rows[name] = f"| {name} | 0 | took more than {options.limit:.0f} s | | | | | | |"
        header = HEADER.format(version=torchvision.__version__, threads=torch.get_num_threads(), small=SMALL)
        TABLE.write_text(header + "".join(rows[name] + "\n" for name in every if name in rows))


if __name__ == "__main__":
    main()
