"""Training: of a run by its name, and of any network by a recipe.

`train("digits/resnet20-bn-w1/quick/s1")` gives the same network bit for bit on the same CPU. On a GPU it gives another
one each time, as cuDNN adds up in an order that varies. Started by torchrun, its processes train one network together
(see `fit`).
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from companion.runs import models
from companion.runs.data import Dataset, iterate, load
from companion.runs.devices import default_device, device_name, has_bfloat16, tensor_float32, training_threads
from companion.runs.names import RunName, lineage, parse_run, recipe_of
from companion.runs.recipes import RECIPES, Recipe, find_recipe
from companion.runs.resume import SavedState, seconds_between_saves
from companion.runs.steps import GraphStep, Step
from repairlib.corrections import fold_batchnorms
from repairlib.evaluation import evaluate
from repairlib.interpolate import non_finite
from repairlib.progress import bar

__all__ = [
    "RECIPES", "DivergedError", "Recipe", "RunName", "default_device", "find_recipe", "fit", "lineage", "measure",
    "parse_run", "processes", "recipe_of", "broadcast", "train",
]  # fmt: skip


class DivergedError(RuntimeError):
    """The loss became non-finite; the message names the run, the step and the last finite loss."""


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes of torchrun, which the first call joins in a group; else (0, 1).

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


def broadcast(value: Any) -> Any:
    """Wait for all processes, and give each of them the value of the first."""
    if processes()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def train(
    run: str | RunName,
    *,
    parent: nn.Module | None = None,
    recipe: Recipe | None = None,
    dataset: Dataset | None = None,
    data_root: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    callback: Callable[[int, nn.Module, Tensor], bool | None] | None = None,
    progress: bool = True,
    state: str | os.PathLike | None = None,
) -> tuple[nn.Module, dict]:
    """Train a run by name.

    The seed gives the initial weights and, separately, the order and augmentation of the data; the global generator is
    left alone. The number of threads is fixed ($REPAIRLIB_THREADS, default 1), because sums over another number of
    parts round differently. On a GPU their order varies, so that the same name gives another network each time. A
    `fused` network is trained with BatchNorm and then fused. If torchrun started several processes (see `fit`), the
    first one evaluates and prints.

    Args:
        run: its name.
        parent: the network that the run continues, of the run before it in `lineage`; default: it is trained now.
        recipe, dataset: instead of those in the name.
        data_root: where data sets are (see data.load).
        device: default `default_device()`.
        callback: see `fit`; steps are counted from 1, and 0 is the network before the first.
        progress: a bar if somebody is looking, and one line at the end.
        state: a file that keeps how far the training is, every $REPAIRLIB_SAVE_MINUTES (default 10). If it is there,
            the training goes on from it, unless it is of another network, recipe or data set, number of threads or
            processes, version of PyTorch, or CPU. It may be deleted once the network is stored.

    Returns:
        The network, on the CPU in evaluation mode, and its metrics: {train,test}_{loss,accuracy} (nats; 0 to 1),
        seconds, threads, device, its processor, precision, TF32 flags, data_sha256, shape and classes; and graph, which
        is True, if steps were a CUDA graph.

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
    how = recipe or recipe_of(run)
    device = torch.device(device or default_device())
    dataset = load(run.data, data_root, device) if dataset is None else dataset.to(device)
    if run.parent and parent is None:
        parent, _ = train(run.parent, dataset=dataset, device=device, progress=progress)
    start = time.perf_counter()
    trained = replace(run.model, norm="bn") if run.model.norm == "fused" else run.model
    with _fixed_threads() as threads, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.seed)  # of the CPU, where weights are drawn, and of no GPU
        model = models.build(trained, dataset.shape, dataset.classes, how.init)
        if run.parent:
            values = parent.state_dict()
            model.load_state_dict({key: values[key] for key in model.state_dict()})  # without biases if it has none
        facts: dict[str, bool] = {}
        if callback is not None:
            callback(0, model.to(device), torch.tensor(math.nan, device=device))
        saved = None
        if state is not None:
            about = {"run": str(run), "recipe": asdict(how), "data": dataset.digest(), "threads": threads}
            about |= {"torch": torch.__version__, "processes": processes()[1]}
            # On a GPU bits differ from time to time anyway, so that any GPU may go on.
            about |= {"processor": device_name(device) if device.type == "cpu" else device.type}
            saved = SavedState(state, about, seconds_between_saves())
        fit(
            model, dataset, how, run.seed, callback=callback, name=str(run), progress=progress, facts=facts, state=saved
        )
        if trained is not run.model:
            plain = models.build(run.model, dataset.shape, dataset.classes)
            plain.load_state_dict(fold_batchnorms(model, torch.zeros(2, *dataset.shape)).state_dict())
            model = plain.to(device)
        model.eval()
        metrics = broadcast(measure(model, dataset, str(run)) if rank == 0 else None)
    seconds = time.perf_counter() - start + (saved.earlier if saved is not None else 0.0)
    metrics |= {"seconds": seconds, "threads": threads, "device": str(device)}
    metrics |= {"processor": device_name(device), "tf32": tensor_float32(device)}
    metrics |= {"precision": precision(how, device), "data_sha256": dataset.digest()}
    metrics |= {"shape": dataset.shape, "classes": dataset.classes, **facts}
    if progress and rank == 0:
        print(f"{run}: test accuracy {metrics['test_accuracy']:.2%}, {metrics['seconds']:.0f} s", flush=True)
    return model.to("cpu", memory_format=torch.contiguous_format), metrics


def precision(recipe: Recipe, device: str | torch.device) -> str:
    """The type that a network computes in while it is trained: "bfloat16" if recipe and device allow it."""
    return "bfloat16" if recipe.bf16 and has_bfloat16(device) else "float32"


def measure(model: nn.Module, dataset: Dataset, name: str, splits: Sequence[str] = ("train", "test")) -> dict:
    """Loss and accuracy of a network on whole splits, as {train,test}_{loss,accuracy}.

    Raises:
        DivergedError: a loss is not finite; the message has `name`.
    """
    metrics = {}
    for split in splits:
        loss, accuracy = evaluate(model, iterate(dataset, split))
        metrics |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        if not math.isfinite(loss):
            raise DivergedError(
                f"{name}: the {split} loss of the trained network is {loss}; try a smaller learning rate"
            )
    return metrics


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    seed: int = 0,
    *,
    callback: Callable[[int, nn.Module, Tensor], bool | None] | None = None,
    name: str = "model",
    progress: bool = False,
    facts: dict[str, bool] | None = None,
    state: SavedState | None = None,
) -> Tensor:
    """Train `model` in place, on the device of the data.

    Batches that are not full are left out, unless the whole set is smaller than one. If `recipe.bf16` is set, the
    network computes in bfloat16 where the device has it (see `precision`), under autocast: weights, their gradients and
    the optimizer's state stay float32. Epoch k of a seed always has the same order and augmentation, also if it is the
    first that is trained (`recipe.start`); the momentum is zero before the first step. On a GPU no step waits for the
    device, and $REPAIRLIB_GRAPH=1 makes the whole step one CUDA graph, which narrow networks should be faster with.

    Started by `torchrun --nproc_per_node N`, each of N processes takes an N-th of every batch, with the draws that it
    gets in one process, and gradients are averaged: the same steps up to rounding, but for BatchNorm, which normalises
    by the statistics of each process's own part. The running statistics of the first process are kept.

    Args:
        model: any module whose outputs are logits [b, classes].
        dataset: what to train on; see data.load.
        recipe: how.
        seed: of the order and augmentation of the data.
        callback: called after each step as callback(step, model, loss), and ends the training if it returns True. Steps
            are those of the whole schedule, counted from 1; loss is the batch's before the step, a tensor without
            gradient. The callback may evaluate the model, which is put into training mode again after it.
        name: for messages.
        progress: show a bar if somebody is looking, see repairlib.progress.
        facts: gets `graph`: True if steps were a CUDA graph.
        state: kept in a file now and then; if it is there, the training goes on from it. Not with a callback, which
            would miss the steps before.

    Returns:
        The loss of every step, float32 [steps].

    Raises:
        ValueError: the batch does not divide into equal parts for all processes; or there are a callback and a state.
        DivergedError: names `name`, the step (from 1) and the last finite loss.
    """
    device, cuda = dataset.device, dataset.device.type == "cuda"
    half = precision(recipe, device) == "bfloat16"
    model.to(device, memory_format=torch.channels_last).train()  # the fastest layout for images, on CPUs and GPUs
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(recipe.batch_size, len(dataset.train))
    rank, number = processes()
    if batch_size % number:
        raise ValueError(f"{name}: batches of {batch_size} images cannot be divided among {number} processes")
    net = DistributedDataParallel(model) if number > 1 else model
    per_epoch = len(dataset.train) // batch_size
    first = recipe.start * per_epoch
    steps = recipe.trained_epochs * per_epoch
    graph = cuda and number == 1 and os.environ.get("REPAIRLIB_GRAPH") == "1"
    take_step = (GraphStep if graph else Step)(net, recipe, half)
    losses = torch.zeros(steps, device=device)
    if state is not None and callback is not None:
        raise ValueError(f"{name}: a callback would miss the steps that a saved state has; give one of both")
    step = state.restore(model, take_step.optimizer, losses) if state is not None else 0
    if step != broadcast(step):
        raise RuntimeError(f"{name}: this process goes on from step {step} of {state.path}, and the first does not; "
                           "all must see the same file")  # fmt: skip
    if step and rank == 0:
        print(f"{name}: goes on from step {step} of {steps}", flush=True)
    checked, stopped = step, False
    with bar(steps, name, "step", progress and rank == 0) as steps_done, _fastest_convolutions():
        steps_done.update(step)
        for epoch in range(recipe.start + recipe.trained_epochs):
            batches = iterate(
                dataset, "train", batch_size, recipe.augment, generator,
                shuffle=True, drop_last=True, part=(rank, number),
                skip=min(max(step - (epoch - recipe.start) * per_epoch, 0), per_epoch),
            )  # fmt: skip
            if epoch < recipe.start or step > (epoch - recipe.start + 1) * per_epoch:
                continue  # its order is drawn, as if it were trained
            for x, y in batches:
                loss = take_step(x, y, recipe.lr_at(first + step, per_epoch))
                losses[step] = loss
                step += 1
                if callback is not None:
                    stopped = broadcast(bool(callback(first + step, model, loss)))
                    model.train()
                # Reading a loss waits for the device.
                if device.type == "cpu" or step % 50 == 0 or step == steps or stopped:
                    if number > 1:  # the mean of all parts, so that all processes stop at the same step
                        dist.all_reduce(losses[checked:step])
                        losses[checked:step] /= number
                    _check_losses(losses, checked, step, name)
                    steps_done.update(step - checked)
                    checked = step
                if state is not None and rank == 0 and state.due() and bool(loss.isfinite()):
                    _save(state, name, model, take_step.optimizer, losses[:step], steps)
                if stopped:
                    break
            ended = step == (epoch - recipe.start + 1) * per_epoch  # now, and not before the training was interrupted
            if recipe.until is not None and not stopped and ended:
                stopped = broadcast(rank == 0 and evaluate(model, iterate(dataset, "train"))[1] >= recipe.until)
            if stopped:
                break
    if facts is not None and take_step.graph is not None:
        facts["graph"] = True
    for buffer in model.buffers() if number > 1 else ():
        dist.broadcast(buffer, 0)
    if bad := non_finite(model.state_dict()):
        raise DivergedError(f"{name}: {bad[0]} became non-finite at step {step} (the last), where the loss was still "
                            f"{float(losses[step - 1]):.6g}; try a smaller learning rate")  # fmt: skip
    return losses[:step].cpu()


def _save(
    state: SavedState, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Tensor, steps: int
) -> None:
    """Keep the state, and say how far the training is. A full disk is no reason to stop it."""
    try:
        state.save(model, optimizer, losses)
        print(f"{name}: step {len(losses)} of {steps}, loss {float(losses[-1]):.4g}; saved", flush=True)
    except OSError as error:
        print(f"{name}: step {len(losses)} of {steps}; its state is not saved: {error}", file=sys.stderr, flush=True)


@contextmanager
def _fixed_threads() -> Iterator[int]:
    """Compute with as many threads as a training does."""
    number, before = training_threads(), torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield number
    finally:
        torch.set_num_threads(before)


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms on the first batch, which all others are like, and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
