"""Pruning a VGG16-BN by magnitude and renormalising it, in forward passes; WoodFisher over block sizes."""

import time

import torch
from common import arguments, images, network, save

from repairlib.pruning import magnitude_scores, mask_smallest, prune
from repairlib.recording import eval_mode
from repairlib.renorm import renormalize, reset
from repairlib.woodfisher import WoodFisher

BLOCKS = (16, 32, 64, 128)


def best_of(function, times: int = 3) -> float:
    """The least wall time of some calls, in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def forward(model, batches) -> None:
    with eval_mode(model):
        for x in batches:
            model(x)


def main() -> None:
    args = arguments(__doc__, number=1000)
    batches, rows = images(args.images), []
    model = network("vgg16-bn-w1", 0)
    a_pass = best_of(lambda: forward(model, batches))
    scores = magnitude_scores(model)
    masks = mask_smallest(scores, 0.9)
    pruned = prune(model, masks)
    parts = {
        "scores and masks": lambda: mask_smallest(magnitude_scores(model), 0.9),
        "prune": lambda: prune(model, masks),
        "RESET": lambda: reset(pruned, batches),
        "REPAIR": lambda: renormalize(pruned, model, batches, targets=("conv", "linear"), limit=None),
        "prune and RESET": lambda: reset(prune(model, masks), batches),
        "prune and REPAIR": lambda: renormalize(
            prune(model, masks), model, batches, targets=("conv", "linear"), limit=None
        ),
    }
    for what, function in parts.items():
        seconds = best_of(function)
        rows.append({"network": "vgg16-bn-w1", "what": what, "seconds": seconds, "a forward pass (s)": a_pass,
                     "in forward passes": seconds / a_pass})  # fmt: skip
    # At least: a gradient a sample, d B multiplications to add it up, and d B^2 / 3 for the factors of the blocks.
    small = network("resnet20-bn-w1", 0)
    x, y = torch.cat(batches)[:100], torch.arange(100) % 10
    weights = sum(w.numel() for w in magnitude_scores(small).values())

    def gradients() -> None:
        small.eval()
        for i in range(100):
            small.zero_grad()
            torch.nn.functional.cross_entropy(small(x[i : i + 1]), y[i : i + 1]).backward()

    floor = best_of(gradients, 2)
    for block in BLOCKS:
        seconds = best_of(lambda block=block: WoodFisher(small, [(x, y)], block=block), 2)
        rows.append({"network": "resnet20-bn-w1", "what": f"WoodFisher, blocks of {block}, 100 gradients",
                     "seconds": seconds, "the gradients alone (s)": floor, "ratio": seconds / floor,
                     "matrices (MB)": 4 * weights * block / 1e6})  # fmt: skip
    save(__file__, args, rows)


if __name__ == "__main__":
    main()
