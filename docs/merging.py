"""Measure what merging gives, and what helps where it goes badly: docs/merging.md.

    python docs/merging.py      # from the networks of `make figures` at quick; trains three small transformers

Nothing in the tables is typed in by hand.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import repairlib
from companion.experiments.pairs import Pair, load_pair
from companion.figures.report import environment
from companion.runs.data import iterate, load

SEEDS = (1, 2, 3)
ZOO = (
    "digits/mlp4-fused-w128/quick", "digits-hard/vgg11-plain-w0.25/quick~lr0.03~wd1e-4",
    "digits-hard/vgg11-bn-w0.25/quick~wd1e-4", "digits-hard/resnet8-plain-w0.5/quick",
    "digits-hard/resnet8-ln-w1/quick", "digits-hard/tiny10-ln-w1/quick-csiszarik", "digits-hard/resnet20-bn-w0.5/quick",
    "digits-hard/resnet20-bn-w0.75/quick", "digits-hard/resnet26-bn-w0.25/quick",
)  # fmt: skip
EPOCHS = 20
PAGE = Path(__file__).with_name("merging.md")
HEADER = """# What merging gives

Written by `docs/merging.py` at commit {commit}, on {device}. Test accuracy (%) in the middle of two networks, mean over
the three pairs of seeds 1, 2 and 3.

## Ways to merge

Networks of `make figures` at `quick`. *Ends*: the two networks. *Midpoint*: aligned by activations, weights averaged.
*Paper*: REPAIR of convolutions, linear layers and outputs of residual blocks, `merge(a, b, data, visible=True)`.
*Default*: of convolutions and linear layers, heads included, which all fold, `merge(a, b, data)`. *Reset*: the default
with `bn="reset"`, for networks with BatchNorm. *Weights*: the default with `match="weights"`. *Tuned*: the default,
trained for one more epoch by SGD at learning rate 0.01 or 0.001 (momentum 0.9, batches of 50). Correlation: of matched
units, mean over all groups.

| network | correlation | ends | midpoint | paper | default | reset | weights | tuned, 0.01 | tuned, 0.001 |
|---|---|---|---|---|---|---|---|---|---|
"""
TRANSFORMERS = """
## Transformers

Three vision transformers (3 blocks, 64 features, 4 heads; `torchvision`'s class), trained for {epochs} epochs on
scikit-learn's digits to {ends:.1f} % on average. REPAIR is that of `merge`: convolutions and linear layers, heads
included.

| aligned by | midpoint | with REPAIR |
|---|---|---|
"""
WAYS: dict[str, Callable[[Pair], nn.Module]] = {
    "midpoint": lambda pair: repairlib.interpolate_models(pair.a, pair.aligned),
    "paper": lambda pair: merged(pair, visible=True),
    "default": lambda pair: merged(pair),
    "reset": lambda pair: merged(pair, bn="reset"),
    "weights": lambda pair: merged(pair, match="weights"),
    "tuned, 0.01": lambda pair: tuned(pair, 0.01),
    "tuned, 0.001": lambda pair: tuned(pair, 0.001),
}


def merged(pair: Pair, match: object = None, **options) -> nn.Module:
    """Midpoint of a pair by `repairlib.merge`."""
    return repairlib.merge(pair.a, pair.b, pair.calibration, match=match or pair.matching, **options).model


def tuned(pair: Pair, lr: float) -> nn.Module:
    """The default, trained for one more epoch."""
    model = merged(pair).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for x, y in iterate(pair.dataset, "train", 50):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def zoo_row(name: str) -> tuple[str, list[float]]:
    """Line of the table, and the gain of the default over the paper's choice for each pair, in points."""
    values: dict[str, list[float]] = {way: [] for way in ("correlation", "ends", *WAYS)}
    for seeds in itertools.combinations(SEEDS, 2):
        pair = load_pair([f"{name}/s{seed}" for seed in seeds])
        correlation = pair.matching.correlation.values()
        values["correlation"].append(float(torch.stack([c.mean() for c in correlation]).mean()))
        values["ends"].append(100 * pair.endpoint_accuracy)
        for way, make in WAYS.items():
            if way != "reset" or "-bn-" in name:
                values[way].append(100 * pair.evaluate(make(pair))[1])
    means = {way: sum(found) / len(found) for way, found in values.items() if found}
    cells = [f"{means['correlation']:.2f}", *(f"{means[way]:.1f}" if way in means else "" for way in ("ends", *WAYS))]
    gains = [new - old for new, old in zip(values["default"], values["paper"], strict=True)]
    return f"| {name} | {' | '.join(cells)} |", gains


def transformer(seed: int, train: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Small ViT, trained on digits by Adam."""
    torch.manual_seed(seed)
    size = train[0][0].shape[-1]
    model = VisionTransformer(size, 4, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * len(train))
    for _ in range(EPOCHS):
        for i in torch.randperm(len(train)).tolist():
            x, y = train[i]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def transformer_table() -> str:
    """Section on the transformers."""
    dataset = load("digits")
    train, test = ([(x.expand(-1, 3, -1, -1), y) for x, y in iterate(dataset, part, 64)] for part in ("train", "test"))
    networks = [transformer(seed, train) for seed in SEEDS]
    ends = [100 * repairlib.evaluate(network, test)[1] for network in networks]
    lines = [TRANSFORMERS.format(epochs=EPOCHS, ends=sum(ends) / len(ends))]
    for method in ("not aligned", "activations", "weights"):
        found: list[list[float]] = [[], []]
        for a, b in itertools.combinations(networks, 2):
            end = b if method == "not aligned" else repairlib.align(a, b, train, method)
            middle = repairlib.interpolate_models(a, end)
            repaired = repairlib.repair(a, end, train, targets=("conv", "linear", "classifier"), visible=False).model
            for values, model in zip(found, (middle, repaired), strict=True):
                values.append(100 * repairlib.evaluate(model, test)[1])
        lines.append(f"| {method} | {' | '.join(f'{sum(values) / len(values):.1f}' for values in found)} |\n")
    return "".join(lines)


def main() -> None:
    """Write the page."""
    where = environment()
    lines = [HEADER.format(commit=where["commit"], device=where["device"])]
    gains: list[float] = []
    for name in ZOO:
        line, gain = zoo_row(name)
        gains += gain
        lines.append(line + "\n")
        print(line, flush=True)
    better = sum(gain > 0 for gain in gains)
    lines.append(
        f"\nThe default is better than the paper's choice in {better} of {len(gains)} pairs. The difference is "
        f"{min(gains):+.1f} to {max(gains):+.1f} points, {sum(gains) / len(gains):+.1f} on average.\n"
    )
    lines.append(transformer_table())
    PAGE.write_text("".join(lines))


if __name__ == "__main__":
    main()
