"""Run names, recipes and the training loop.

A run is named `<data>/<model>/<recipe>/s<seed>`, and the name is all that is needed to train it:
`train("digits/resnet20-bn-w1/quick/s1")` gives the same network bit for bit on the same CPU. Started by torchrun, its
processes train one network together (see `fit`).
"""

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from companion.runs import models
from companion.runs.data import Dataset, base_name, check_name, iterate, load
from repairlib.evaluation import evaluate
from repairlib.names import nearest
from repairlib.progress import bar


class DivergedError(RuntimeError):
    """The loss became non-finite; the message names the run, the step and the last finite loss."""


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD on the cross entropy. New fields need a default, so that old checkpoints stay valid."""

    name: str
    epochs: int  # passes over the training set
    batch_size: int  # images
    lr: float  # peak learning rate, for the mean loss over a batch
    schedule: str  # after the warm-up: "linear" or "cosine" down to 0, or "step": divided by 10 at every milestone
    weight_decay: float = 0.0  # coefficient of (1/2)|w|^2 in the loss, for all parameters
    augment: tuple[str, ...] = ()  # see data.augment
    momentum: float = 0.9
    warmup_epochs: float = 0.0  # epochs of linear growth from 0 to lr
    nesterov: bool = False
    label_smoothing: float = 0.0  # probability spread evenly over the classes
    milestones: tuple[float, ...] = ()  # fractions of all steps, warm-up included

    def __post_init__(self):
        if self.schedule not in ("linear", "cosine", "step"):
            raise ValueError(f"unknown schedule {self.schedule!r}: linear, cosine or step")
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError(
                f"schedule {self.schedule!r} with milestones {self.milestones}: step needs them, and only it"
            )

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0.

        >>> recipe = Recipe("example", 10, 100, lr=0.4, schedule="linear", warmup_epochs=2)
        >>> [round(recipe.lr_at(step, 1), 3) for step in (0, 1, 2, 6, 9)]
        [0.2, 0.4, 0.4, 0.2, 0.05]
        """
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "step":
            total = self.epochs * steps_per_epoch
            return self.lr / 10 ** sum(step >= round(milestone * total) for milestone in self.milestones)
        progress = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.lr * (1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


_ALL = ("flip", "translate", "cutout")
_WARPS = ("resize", "flip", "rotate")

# Qu and Horvath 2024, App. C: iterations 32,000 and 48,000 of 160 epochs of CIFAR in batches of 128.
_STEP = Recipe("qu", 160, 128, 0.1, "step", 1e-4, ("flip", "translate"), milestones=(320 / 624, 480 / 624))
_COSINE = replace(_STEP, schedule="cosine", milestones=(), warmup_epochs=1)

# Without BatchNorm, networks diverge at the rates that suit it.
_FAST = Recipe("fast", 30, 128, 0.1, "cosine", 1e-4, ("flip", "translate"), warmup_epochs=1)
_QUICK = Recipe("quick", 20, 50, 0.02, "cosine", 1e-4, ("translate",), warmup_epochs=4)

# By recipe and by family (mlp, vgg, resnet, tiny, torchvision), family and norm, or family and `plain-nobias`; the
# closest key counts (see models.ModelName.kind).
#
# Jordan et al. 2022, Table 1 (momentum 0.9 throughout):
#
#                  MLP          VGG              ResNet20                ResNet50 on ImageNet
#   batch size     2000         500              500                     512
#   epochs         100          100              200                     300
#   learning rate  linear 0.2   cosine 0.08      cosine 0.4              linear 0.5
#   weight decay   0            0.0005           0.0001                  0.0001
#   augmentation   translate    flip+translate   flip+translate+cutout   flip+RandomResizedCrop
#
# `jordan-released` is what the authors' code does instead where it differs (the length of VGG's warm-up is ours).
# `qu`, and `qu-cifar100` and `qu-mnist` where they did otherwise there: Qu and Horvath 2024, App. C, which does not say
# how MLPs were trained. Warm-ups that they name for single widths and weight decays are for the whole family here.
# `csiszarik`: Csiszarik et al. 2023, App. A. Where these two begin a warm-up at 1e-6, ours begins at its first step.
# `fast` is for the papers' data sets within minutes, `quick` for digits; `fast-csiszarik` and `quick-csiszarik` have
# the augmentation of `csiszarik` and so much weight decay that the initial weights fade to about a tenth, the product
# of 1 - lr wd / (1 - momentum) over all steps: matching by weights and combining element by element need that. `smoke`
# takes a few steps, for tests. Networks trained elsewhere are `imported` (see store.Store.add) and not trained here.
RECIPES: dict[str, dict[str, Recipe]] = {
    "jordan": {
        "mlp": Recipe("jordan", 100, 2000, 0.2, "linear", augment=("translate",)),
        "vgg": Recipe("jordan", 100, 500, 0.08, "cosine", 5e-4, ("flip", "translate")),
        "resnet": Recipe("jordan", 200, 500, 0.4, "cosine", 1e-4, _ALL),
        "torchvision": Recipe("jordan", 300, 512, 0.5, "linear", 1e-4, ("flip", "resized-crop")),
    },
    "jordan-released": {
        "mlp": Recipe("jordan-released", 50, 1000, 0.05, "linear"),
        "vgg": Recipe("jordan-released", 250, 500, 0.08, "linear", 5e-4, ("flip", "translate"), warmup_epochs=5),
        "resnet": Recipe("jordan-released", 250, 500, 0.4, "cosine", 1e-4, _ALL),
        "resnet-ln": Recipe("jordan-released", 250, 100, 0.1, "cosine", 1e-4, _ALL),
    },
    "qu": {
        "mlp": replace(_STEP, augment=()),
        "vgg": _STEP,
        "vgg-ln": replace(_STEP, warmup_epochs=1),
        "vgg-plain-nobias": _COSINE,
        "resnet": replace(_STEP, warmup_epochs=1),
        "resnet-plain": _COSINE,
        "resnet-fixup": _COSINE,
    },
    "qu-cifar100": {"vgg": replace(_COSINE, name="qu-cifar100", warmup_epochs=2)},
    "qu-mnist": {"vgg": Recipe("qu-mnist", 25, 100, 0.1, "cosine", 5e-4, warmup_epochs=1)},
    "csiszarik": {
        "resnet": Recipe("csiszarik", 250, 100, 0.1, "cosine", 1e-4, _WARPS, warmup_epochs=1),
        "tiny": Recipe("csiszarik", 300, 100, 0.01, "step", 1e-4, _WARPS, milestones=(1 / 3, 2 / 3)),
    },
    "fast": {
        "mlp": Recipe("fast", 20, 1000, 0.05, "linear", warmup_epochs=10, nesterov=True),  # trains 35 layers, not 50
        "vgg": Recipe("fast", 30, 500, 0.08, "cosine", 5e-4, ("flip", "translate"), warmup_epochs=1),
        "resnet": Recipe("fast", 30, 500, 0.4, "cosine", 1e-4, ("flip", "translate"), warmup_epochs=1),
        **dict.fromkeys(("vgg-ln", "vgg-plain-nobias", "resnet-ln", "resnet-plain", "resnet-fixup", "tiny"), _FAST),
        "torchvision": Recipe("fast", 30, 256, 0.2, "cosine", 1e-4, ("flip", "resized-crop"), warmup_epochs=1),
    },
    "fast-csiszarik": dict.fromkeys(
        ("resnet", "tiny"), Recipe("fast-csiszarik", 30, 128, 0.1, "cosine", 4e-4, _WARPS, warmup_epochs=1)
    ),
    "quick": {
        "mlp": Recipe("quick", 80, 200, 0.1, "linear", warmup_epochs=25, nesterov=True),  # 35 layers need it all
        "vgg": Recipe("quick", 20, 100, 0.1, "cosine", 5e-4, ("translate",)),
        "resnet": Recipe("quick", 20, 100, 0.2, "cosine", 1e-4, ("translate",)),
        **dict.fromkeys(("vgg-ln", "vgg-plain-nobias", "resnet-ln", "resnet-fixup", "tiny"), _QUICK),
        "resnet-bn-bottleneck": _QUICK,
        "resnet-plain": replace(_QUICK, lr=0.01),
        "torchvision": Recipe("quick", 20, 100, 0.1, "cosine", 1e-4, ("translate",)),
    },
    "quick-csiszarik": dict.fromkeys(
        ("resnet", "tiny"), Recipe("quick-csiszarik", 30, 50, 0.05, "cosine", 0.01, _WARPS, warmup_epochs=4)
    ),
    "smoke": {
        "mlp": Recipe("smoke", 2, 200, 0.1, "linear"),
        "vgg": Recipe("smoke", 1, 200, 0.1, "linear"),
        "resnet": Recipe("smoke", 1, 200, 0.1, "linear"),
        "tiny": Recipe("smoke", 1, 200, 0.1, "linear"),
        "torchvision": Recipe("smoke", 1, 200, 0.1, "linear"),
    },
    "imported": dict.fromkeys(("mlp", "vgg", "resnet", "tiny", "torchvision"), Recipe("imported", 0, 1, 0.0, "linear")),
}
# Digits must not be mirrored, nor a part of their strokes cut out or off.
UPRIGHT = ("digits", "digits-hard", "mnist", "svhn")


def find_recipe(name: str, kind: str, data: str) -> Recipe:
    """Return a recipe by name for a kind of model (`vgg`, `resnet-ln`) and a data set; digits stay upright and whole.

    Raises:
        ValueError: unknown recipe, or none for such a model.

    >>> [find_recipe("jordan", "resnet-bn", data).augment for data in ("cifar10", "mnist")]
    [('flip', 'translate', 'cutout'), ('translate',)]
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the nearest is {nearest(name, list(RECIPES))!r} "
                         f"(known: {', '.join(RECIPES)})")  # fmt: skip
    key = kind
    while key not in RECIPES[name]:
        key = key.rpartition("-")[0]
        if not key:
            known = [other for other in RECIPES if kind.split("-")[0] in RECIPES[other]]
            raise ValueError(f"recipe {name!r} is for {', '.join(RECIPES[name])}, not for {kind}; "
                             f"the nearest that is: {nearest(name, known)!r}")  # fmt: skip
    found = RECIPES[name][key]
    if base_name(data).partition("@")[0] in UPRIGHT:
        found = replace(found, augment=tuple(a for a in found.augment if a not in ("flip", "cutout", "resized-crop")))
    return found


@dataclass(frozen=True)
class RunName:
    """A parsed run name; `str` gives the name back, with the model's width in full."""

    data: str
    model: models.ModelName
    recipe: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}/{self.model}/{self.recipe}/s{self.seed}"


def parse_run(name: str, data_root: str | os.PathLike | None = None, *, check_data: bool = True) -> RunName:
    """Parse `<data>/<model>/<recipe>/s<seed>`; ValueError with the nearest valid name for whatever part is wrong.

    Image folders are looked for under data_root (see data.load), unless check_data is False.

    >>> str(parse_run("digits/resnet20-bn/quick/s1"))
    'digits/resnet20-bn-w1/quick/s1'
    """
    parts = name.split("/")
    if len(parts) != 4:
        raise ValueError(
            f"run name {name!r} is not <data>/<model>/<recipe>/s<seed>, like digits/vgg11-bn-w0.25/quick/s1"
        )
    try:
        data, model = check_name(parts[0], data_root) if check_data else parts[0], models.parse(parts[1])
        find_recipe(parts[2], model.kind, data)
        if not re.fullmatch(r"s(0|[1-9]\d{0,17})", parts[3]):
            number = re.search(r"[1-9]\d*", parts[3])
            raise ValueError(f"{parts[3]!r} is not a seed; the nearest is {f's{number[0] if number else 1}'!r}")
    except ValueError as error:
        raise ValueError(f"run name {name!r}: {error}") from error
    return RunName(data, model, parts[2], int(parts[3][1:]))


def default_device() -> str:
    """Return $REPAIRLIB_DEVICE, else cuda where there is a GPU, else cpu."""
    return os.environ.get("REPAIRLIB_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def processes() -> tuple[int, int]:
    """Return (rank of this process, number of processes) of torchrun, joined in a group on the first call; or (0, 1).

    On a machine with GPUs each process gets its own.
    """
    number = int(os.environ.get("WORLD_SIZE", 1))
    if number == 1:
        return 0, 1
    if not dist.is_initialized():
        cuda = torch.cuda.is_available() and default_device() != "cpu"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The first process evaluates alone, or waits for another's lock, while the others wait for it.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))
    return dist.get_rank(), number


def share(value: Any) -> Any:
    """Return the first process's value in all processes, once all are here."""
    if processes()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def train(
    run: str | RunName,
    *,
    recipe: Recipe | None = None,
    dataset: Dataset | None = None,
    data_root: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[nn.Module, dict]:
    """Train a run by name; return the network, on the CPU in evaluation mode, and a dict of metrics.

    The metrics are {train,test}_{loss,accuracy} (nats; 0 to 1), seconds, threads, device, shape and classes.

    The seed gives the initial weights and, separately, the order and augmentation of the data; the global generator is
    left alone. Results are the same bit for bit on the same CPU, for which the number of threads is fixed:
    $REPAIRLIB_THREADS, default 1. A `fused` network is trained with BatchNorm and then fused. Of several processes
    (see `fit`) the first evaluates, and prints.

    Args:
        run: its name.
        recipe, dataset: instead of those that the name stands for.
        data_root: where data sets are (see data.load).
        device: default `default_device()`.
        progress: a bar if somebody is looking, and one line at the end.

    Raises:
        ValueError: the name does not parse, or is of an imported run.
        DivergedError: the loss or a weight became non-finite.
        DataMissing: see data.load.
    """
    run = parse_run(run, data_root) if isinstance(run, str) else run
    if run.recipe == "imported":
        raise ValueError(
            f"run {run} is not trained here: "
            f"import it with `python -m companion.runs.store import {run} FILE.safetensors`"
        )
    rank, _ = processes()
    how = recipe or find_recipe(run.recipe, run.model.kind, run.data)
    device = torch.device(device or default_device())
    dataset = load(run.data, data_root, device) if dataset is None else dataset.to(device)
    start = time.perf_counter()
    trained = replace(run.model, norm="bn") if run.model.norm == "fused" else run.model
    with _fixed_threads() as threads, torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = models.build(trained, dataset.shape, dataset.classes)
        fit(model, dataset, how, run.seed, name=str(run), progress=progress)
        if trained is not run.model:
            plain = models.build(run.model, dataset.shape, dataset.classes)
            plain.load_state_dict(models.fuse(model).state_dict())
            model = plain.to(device)
        model.eval()
        metrics = share(measure(model, dataset, str(run)) if rank == 0 else None)
    metrics |= {"seconds": time.perf_counter() - start, "threads": threads, "device": str(device)}
    metrics |= {"shape": dataset.shape, "classes": dataset.classes}
    if progress and rank == 0:
        print(f"{run}: test accuracy {metrics['test_accuracy']:.2%}, {metrics['seconds']:.0f} s", flush=True)
    return model.to("cpu", memory_format=torch.contiguous_format), metrics


def measure(model: nn.Module, dataset: Dataset, name: str, splits: Sequence[str] = ("train", "test")) -> dict:
    """Return {train,test}_{loss,accuracy} of a network on whole splits; DivergedError if a loss is not finite."""
    metrics = {}
    for split in splits:
        loss, accuracy = evaluate(model, iterate(dataset, split, 1000))
        metrics |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        if not math.isfinite(loss):
            raise DivergedError(
                f"{name}: the {split} loss of the trained network is {loss}; try a smaller learning rate"
            )
    return metrics


def fit(
    model: nn.Module, dataset: Dataset, recipe: Recipe, seed: int = 0, *, name: str = "model", progress: bool = False
) -> Tensor:
    """Train `model` in place, on the device of the data; return the loss of every step, float32 [steps].

    Batches that are not full are left out, unless the whole set is smaller than one. On GPUs that have it, bfloat16
    autocast is used.

    Started by `torchrun --nproc_per_node N`, each of N processes takes an N-th of every batch, with the draws that it
    gets in one process, and gradients are averaged: the same steps up to rounding, but for BatchNorm, which normalises
    by the statistics of each process's own part. The first one's running statistics are kept.

    Args:
        model: any module whose outputs are logits [b, classes].
        dataset: what to train on; see data.load.
        recipe: how.
        seed: of the order and augmentation of the data.
        name: for messages.
        progress: show a bar if somebody is looking, see `progress.watched`.

    Raises:
        ValueError: the batch does not divide into equal parts for all processes.
        DivergedError: names `name`, the step (from 1) and the last finite loss.
    """
    device, cuda = dataset.device, dataset.device.type == "cuda"
    half = cuda and torch.cuda.get_device_capability(device) >= (8, 0)  # older ones only emulate bfloat16
    model.to(device, memory_format=torch.channels_last if cuda else torch.preserve_format).train()
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(recipe.batch_size, len(dataset.train))
    rank, number = processes()
    if batch_size % number:
        raise ValueError(f"{name}: batches of {batch_size} images cannot be divided among {number} processes")
    net = DistributedDataParallel(model) if number > 1 else model
    per_epoch = len(dataset.train) // batch_size
    steps = recipe.epochs * per_epoch
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum,
        weight_decay=recipe.weight_decay, nesterov=recipe.nesterov, foreach=True,
    )  # fmt: skip
    losses = torch.zeros(steps, device=device)
    step, checked = 0, 0
    with bar(steps, name, "step", progress and rank == 0) as steps_done:
        for _ in range(recipe.epochs):
            for x, y in iterate(
                dataset, "train", batch_size, recipe.augment, generator,
                shuffle=True, drop_last=True, part=(rank, number),
            ):  # fmt: skip
                optimizer.param_groups[0]["lr"] = recipe.lr_at(step, per_epoch)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                    loss = F.cross_entropy(net(x), y, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[step] = loss.detach()
                step += 1
                if not cuda or step % 50 == 0 or step == steps:  # on a GPU, looking at a loss waits for it
                    if number > 1:  # the mean of all parts, so that all processes stop at the same step
                        dist.all_reduce(losses[checked:step])
                        losses[checked:step] /= number
                    _check_losses(losses, checked, step, name)
                    steps_done.update(step - checked)
                    checked = step
    for buffer in model.buffers() if number > 1 else ():
        dist.broadcast(buffer, 0)
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise DivergedError(f"{name}: {key} became non-finite at step {steps} (the last), where the loss was still "
                                f"{float(losses[-1]):.6g}; try a smaller learning rate")  # fmt: skip
    return losses.cpu()


@contextmanager
def _fixed_threads() -> Iterator[int]:
    """Compute with $REPAIRLIB_THREADS threads (default 1): sums over another number of parts would round otherwise."""
    setting = os.environ.get("REPAIRLIB_THREADS") or "1"
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"REPAIRLIB_THREADS is a number of threads, at least 1, not {setting!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(int(setting))
    try:
        yield int(setting)
    finally:
        torch.set_num_threads(before)


def _check_losses(losses: Tensor, start: int, stop: int, name: str) -> None:
    """Raise DivergedError if one of the losses start..stop is not finite; all before are known to be."""
    finite = losses[start:stop].isfinite()
    if not finite.all():
        step = start + int(finite.int().argmin())
        last = f"the last finite loss was {float(losses[step - 1]):.6g}" if step else "no loss was finite"
        raise DivergedError(
            f"{name}: the loss became {float(losses[step])} at step {step + 1} of {len(losses)}; {last}; "
            "try a smaller learning rate or more warm-up"
        )
