"""Measure which renormalisation is best after pruning, and what removing whole channels costs: docs/pruning.md.

    python docs/pruning.py      # ten minutes on one core; trains what is not stored yet

Nothing in the tables is typed in by hand.
"""

import textwrap
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenet_v2

import repairlib
from companion.experiments.grids.repair import RESNET, VGG
from companion.experiments.pruning import AFTER_PRUNING, FOLDED, Settings, Trained, load_trained, pruning_rows
from companion.experiments.statistics import has_batchnorm
from companion.figures.report import environment
from companion.runs.data import iterate, load
from companion.runs.recipes import Recipe
from companion.runs.train import fit
from repairlib.channels import channel_masks, channel_scores, keep_channels, remove_channels
from repairlib.evaluation import evaluate
from repairlib.pruning import prune

PAGE = Path(__file__).with_name("pruning.md")
SPARSITIES = (0.6, 0.8, 0.9)
PRUNERS = ("global magnitude", "WoodFisher")
TEST = 600  # images of CIFAR-10
IMAGES = 256  # that renormalisations read, once
NETWORKS = {  # run names without seeds: seeds
    f"cifar10/resnet20-bn-w1/{RESNET}": (1, 2),
    f"cifar10/vgg11-fused-w0.5/{VGG}": (1, 2),
    "digits-hard/vgg11-bn-w0.25/quick~wd1e-4": (1, 2, 3),
    "digits-hard/resnet8-ln-w1/quick": (1, 2, 3),
}
HOW = Settings(images=100, gradients=100, block=50)
HEADER = """# Pruning: which renormalisation, and whole channels

Written by `docs/pruning.py` at commit {commit}, on {device}. [guide.md](guide.md#pruning) shows how to do it.

## Which renormalisation

Test accuracy (%) of networks that lose their weights at once, mean over seeds and over two ways to choose the weights:
{pruners}. The statistics are of {images} training images{limit}. "As pruned" is without renormalisation.

"""
BEST = """
**Recommendation.** {best} It needs the dense network, and the same one batch for both. Its corrections go into weights
and biases: no operation is added, and every zero stays. RESET needs no dense network, but reads its statistics from few
images alone, while REPAIR compares both networks on the same images, so that what is special about these images drops
out. RESCALE leaves the means wrong. To shrink gains (`shrink=True`, after the idea of Zhan et al. 2026, arXiv
2605.21426, who repair channels before a RESET) is meant for gains that are measured badly; here it changes the mean
over all of the above by {shrunk:+.1f} points with {images} images, and by {few:+.1f} with 16.

"""
CHANNELS = """## Whole channels

A quarter or half of the channels of every group are removed, those of the smallest weights. The network is then
physically smaller, and computes the same as one with zeros in their place. RESET measures its BatchNorms anew. REPAIR
gives the channels that stay the statistics that they have in the whole network; it needs channels of the same number,
so the network is masked, REPAIRed, and then made smaller. MACs are multiplications of a forward pass of one image.

| network | | parameters | MACs | test accuracy (%) |
|---|---|---|---|---|
"""


def which_renormalisation() -> tuple[str, pd.Series]:
    """Table of all renormalisations; their means over everything that all of them are for."""
    text, means = "", []
    for run, seeds in NETWORKS.items():
        first = load_trained(f"{run}/s{seeds[0]}", IMAGES)
        renorms = [name for name in AFTER_PRUNING if name != "renormalised" and
                   (name != "RESET" or has_batchnorm(first.model))]  # fmt: skip
        rows = []
        for seed in seeds:
            network = load_trained(f"{run}/s{seed}", IMAGES, test_images=TEST)
            rows += [{"seed": seed, **row} for row in pruning_rows(network, SPARSITIES, PRUNERS, renorms, HOW)]
        frame = pd.DataFrame(rows)
        dense = 100 * frame[frame["sparsity"] == 0]["accuracy"].mean()
        pruned = frame[frame["sparsity"] > 0]
        table = 100 * pruned.groupby(["renorm", "sparsity"], sort=False)["accuracy"].mean().unstack("sparsity")
        means.append(table.mean(axis=1))
        data, model, _ = run.split("/")
        text += f"| {model} on {data}, dense {dense:.1f} | {' | '.join(f'{s:.0%}' for s in SPARSITIES)} |\n"
        text += f"|---|{'---|' * len(SPARSITIES)}\n"
        for name, row in table.iterrows():
            best = table.max()
            cells = [f"**{v:.1f}**" if v > best[s] - 0.05 else f"{v:.1f}" for s, v in row.items()]
            text += f"| {'as pruned' if name == 'none' else name} | {' | '.join(cells)} |\n"
        text += "\n"
        print(text.rpartition("| dense")[0] or text, flush=True)
    return text, pd.concat(means, axis=1).dropna().mean(axis=1)


def few_images() -> float:
    """What shrinking changes with 16 images: points, mean over networks and sparsities, pruned by magnitude."""
    changes = []
    for run, seeds in NETWORKS.items():
        for seed in seeds:
            network = load_trained(f"{run}/s{seed}", 16, test_images=TEST)
            rows = pd.DataFrame(pruning_rows(network, SPARSITIES, PRUNERS[:1], ["REPAIR", "REPAIR, shrunk"], HOW))
            mean = 100 * rows[rows["sparsity"] > 0].groupby("renorm")["accuracy"].mean()
            changes.append(mean["REPAIR, shrunk"] - mean["REPAIR"])
    return sum(changes) / len(changes)


def macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiplications of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    return counter.get_total_flops() // 2


def trained_mobilenet() -> Trained:
    """torchvision's MobileNetV2 for small grey images, trained on digits for a minute or two."""
    dataset = load("digits-hard")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = mobilenet_v2(num_classes=dataset.classes)
        model.features[0][0] = nn.Conv2d(1, 32, 3, padding=1, bias=False)
    model.features[2].conv[1][0].stride = (1, 1)  # so that maps of 16x16 do not shrink to a point too soon
    fit(model, dataset, Recipe("pruning", 20, 50, 0.05, "cosine", 1e-4, ("translate",), warmup_epochs=2), seed=1)
    batches = iterate(dataset, "train"), iterate(dataset, "test"), iterate(dataset, "train", 250, limit=500)
    return Trained(model.eval(), *batches)


def whole_channels() -> str:
    """Table of networks with half of their channels."""
    resnet = load_trained(f"cifar10/resnet20-bn-w1/{RESNET}/s1", 500, test_images=2000)
    text = ""
    for name, network in {"ResNet20 on CIFAR-10": resnet, "MobileNetV2 on digits-hard": trained_mobilenet()}.items():
        model, x = network.model, next(iter(network.train))[0][:2]
        spec = repairlib.permutation_spec(model, x)
        for share in (0.25, 0.5):
            kept = keep_channels(channel_scores(model, spec), share)
            masked = prune(model, channel_masks(model, spec, kept))
            small = remove_channels(model, spec, kept, x)
            repaired = repairlib.renormalize(masked, model, network.calibration, **FOLDED).model
            models = {"whole": model} if share == 0.25 else {}
            models |= {
                f"{share:.0%} of its channels removed": small,
                "and RESET": repairlib.reset(small, network.calibration).model,
                "or REPAIRed before": remove_channels(repaired, spec, kept, x),
            }
            for what, each in models.items():
                size = f"{sum(p.numel() for p in each.parameters()):,} | {macs(each, x):,}"
                text += f"| {name} | {what} | {size} | {100 * evaluate(each, network.test)[1]:.1f} |\n"
                print(text.splitlines()[-1], flush=True)
    return text


def main() -> None:
    made = environment()
    head = HEADER.format(
        commit=made["commit"][:12], device=made["device"], pruners=" and ".join(PRUNERS), images=IMAGES,
        limit=f"; CIFAR-10 is tested on {TEST}",
    )  # fmt: skip
    table, means = which_renormalisation()
    folded = means.drop(["none", "REPAIR, blocks too"])
    best = f"REPAIR of convolutions and linear layers: {folded['REPAIR']:.1f} % on average over the tables above, "
    best += f"{means['none']:.1f} % as pruned, and {folded.drop('REPAIR').max():.1f} % with "
    best += f"{folded.drop('REPAIR').idxmax()}, the next best."
    words = BEST.format(best=best, shrunk=means["REPAIR, shrunk"] - means["REPAIR"], few=few_images(), images=IMAGES)
    words = f"\n{textwrap.fill(words.strip(), 118)}\n\n"
    PAGE.write_text(head + table.rstrip() + "\n" + words + CHANNELS + whole_channels())


if __name__ == "__main__":
    main()
