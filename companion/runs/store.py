"""The store of trained networks: ask for a run by name; it is loaded if it is there and trained if it is not.
Some come with the repository, compressed, and need not be trained.

    get("digits/resnet20-bn-w1/quick/s1")          python -m companion.runs.store train digits/resnet20-bn-w1/quick/s1

On several GPUs: torchrun --nproc_per_node 8 -m companion.runs.store train imagenet@224/torchvision-resnet50/jordan/s1
Trained elsewhere: python -m companion.runs.store import imagenet@224/torchvision-resnet50/imported/s1 FILE.safetensors

A run is a folder `<root>/<data>/<model>/<recipe>/s<seed>` with the weights (model.safetensors) and a sidecar
(run.json: recipe, metrics, versions, device, seconds, and the digest of the weights). It is there whole or not at
all, it is never overwritten, and it is trained once however many processes ask for it. A training that is killed goes
on from where it was some minutes before (see companion.runs.resume). A run that continues another one,
`<run>/<recipe>/s<seed>`, is a folder in that one's; the other is trained first, and its digest is kept.

A run that comes with the repository is such a folder in `data/networks`, with the weights compressed (model.packed).
Whoever asks for it gets it from there into the store.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from companion.runs import models
from companion.runs.data import DATASETS, DataMissing, base_name, load, project_root
from companion.runs.devices import default_device, device_name, training_threads
from companion.runs.files import write_folder
from companion.runs.packing import pack, unpack
from companion.runs.train import (
    DivergedError,
    Recipe,
    RunName,
    broadcast,
    measure,
    parse_run,
    processes,
    recipe_of,
    train,
)
from repairlib.interpolate import non_finite
from repairlib.names import nearest

__all__ = ["CorruptCheckpoint", "RunName", "StaleRun", "Store", "get", "parse_run"]
WEIGHTS, PACKED, SIDECAR = "model.safetensors", "model.packed", "run.json"
SHIPPED = 25_000_000  # bytes that all networks in the repository may take together
# What a sidecar says beside the metrics, of the network and how it was made.
FACTS = ("shape", "classes", "device", "processor", "precision", "tf32", "graph", "threads", "seconds", "data_sha256",
         "source")  # fmt: skip


# What every sidecar has, what it may have, and what kind of thing that is.
SIDECAR_PARTS = {"classes": int, "metrics": dict, "recipe": dict, "run": str, "sha256": str, "shape": list}
OPTIONAL_PARTS = {"seconds": float | int, "device": str, "processor": str, "threads": int}


class CorruptCheckpoint(RuntimeError):
    """A stored run is truncated, altered or not finite; the message names the file and how to get it back."""


class StaleRun(RuntimeError):
    """A stored run has another recipe, order of images or parent's weights than its name stands for today."""


def shipped_root() -> Path:
    """The folder of the networks that come with the repository: $REPAIRLIB_NETWORKS, else the checkout's."""
    return Path(os.environ.get("REPAIRLIB_NETWORKS") or project_root() / "data" / "networks").expanduser().resolve()


class Store:
    """Trained networks by run name.

    Args:
        root: default $REPAIRLIB_RUNS, else `data/runs` in the checkout. A read-only root serves what it holds.
        data_root: where data sets are (see data.load).
        shipped: folder of networks that are there, too, and need not be trained; default `shipped_root()`, but none
            if a root is given.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        data_root: str | os.PathLike | None = None,
        shipped: str | os.PathLike | None = None,
    ):
        default = os.environ.get("REPAIRLIB_RUNS") or project_root() / "data" / "runs"
        self.root = Path(root or default).expanduser().resolve()
        self.data_root = data_root
        shipped = shipped or (None if root else shipped_root())
        self.shipped = Store(shipped, data_root) if shipped else None

    def get(
        self,
        name: str,
        device: str | torch.device = "cpu",
        *,
        train_device: str | torch.device | None = None,
        progress: bool = True,
    ) -> nn.Module:
        """Load a network by run name; train and save it first if it is not there, and before it the run it continues.

        A run that comes with the repository is not trained but copied into the root, or only read if that is read-only.
        All processes of torchrun must ask for it; the first locks and saves it.

        Args:
            name: of the run.
            device: where the network is returned.
            train_device: where it is trained; default $REPAIRLIB_DEVICE, else a GPU if there is one, else the CPU.
            progress: see train.train.

        Returns:
            The network, in evaluation mode on `device`.

        Raises:
            ValueError: the name does not parse, or the run is to be imported.
            CorruptCheckpoint, StaleRun: what is stored cannot be used.
            DataMissing, DivergedError: training failed.
        """
        first = processes()[0] == 0
        if broadcast(self._ships(name)):
            return (self._get_shipped(name, progress) if first else self.load(name)).to(device)
        if not broadcast(self.has(name)):
            before, parent = self._parse(name).parent, None
            self._check_place(name)
            if before:
                parent = self.get(str(before), train_device=train_device, progress=progress)
            with self._lock(name, progress) if first else nullcontext():
                if not broadcast(self.has(name)):  # another process may have trained it meanwhile
                    state = self.root / ".training" / f"{_file_name(self._parse(name))}.safetensors"
                    try:
                        model, metrics = train(
                            name, parent=parent, data_root=self.data_root, device=train_device, progress=progress,
                            state=state,
                        )  # fmt: skip
                    except DivergedError:
                        state.unlink(missing_ok=True)  # whatever led there
                        raise
                    broadcast(self._save(name, model, metrics) if first else None)
                    state.unlink(missing_ok=True)
        return self.load(name, device)

    def add(self, name: str, file: str | os.PathLike, *, evaluate: bool = True) -> dict:
        """Store a network that was trained elsewhere, evaluated on the test set.

        Values become float32. The sidecar has the file's name and SHA-256.

        Args:
            name: of the run, whose recipe is `imported`, like imagenet@224/torchvision-resnet50/imported/s1.
            file: a state dict as safetensors, with the keys of the model; `num_batches_tracked` may be left out.
            evaluate: False leaves the metrics out.

        Returns:
            Its metrics: test_loss (nats) and test_accuracy (0 to 1).

        Raises:
            ValueError: the recipe is another; the file is none of safetensors, or does not fit the model (the first
                missing, unexpected or wrong key is named); a value is not finite, or a variance negative.
            FileExistsError: the run is there.
            DataMissing: the data set is not.
        """
        run, file = self._parse(name), Path(file)
        if run.recipe != "imported":
            named = dataclasses.replace(run, recipe="imported")
            raise ValueError(f"run {name} cannot be imported, as its recipe says how it was trained; name it {named}")
        self._check_place(name)
        if self._holds(name):
            raise FileExistsError(f"{self.path(name)} exists and is not overwritten")
        start, content = time.perf_counter(), file.read_bytes()
        try:
            state = safetensors.torch.load(content)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); pickles (.pt, .pth) are not loaded, as they may "
                "hold code: convert one that you trust with `safetensors.torch.save_file(torch.load('FILE.pth', "
                "weights_only=True), 'FILE.safetensors')`"
            ) from error
        dataset = load(run.data, self.data_root, default_device())
        with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and replaced
            model = models.build(run.model, dataset.shape, dataset.classes)
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for key in [*expected, *state]:
            if key not in state and not key.endswith("num_batches_tracked"):
                raise ValueError(f"{file} lacks {key}, which {run.model} has")
            if key not in expected:
                raise ValueError(f"{file} has {key}, which {run.model} has not; nearest: {nearest(key, [*expected])}")
            if key in state and (found := tuple(state[key].shape)) != expected[key]:
                raise ValueError(f"{file} has {key} of shape {found}; {run.model} with {dataset.classes} classes and "
                                 f"images {dataset.shape} has {expected[key]}")  # fmt: skip
            if key in state and model.state_dict()[key].is_floating_point() and not state[key].is_floating_point():
                raise ValueError(f"{file} has {key} as {state[key].dtype}, and weights are floating-point numbers: "
                                 "quantised ones must be converted back first")  # fmt: skip
            if key.endswith("running_var") and key in state and (state[key] < 0).any():
                raise ValueError(f"{file} has negative variances in {key}")
        model.load_state_dict(state, strict=False)
        if bad := non_finite(model.state_dict()):
            raise ValueError(f"{file} holds non-finite values in {bad[0]}")
        metrics = measure(model.eval().to(dataset.device), dataset, name, ["test"] if evaluate else [])
        facts = {"shape": dataset.shape, "classes": dataset.classes, "device": str(dataset.device)}
        facts |= {"processor": device_name(dataset.device), "data_sha256": dataset.digest()}
        facts |= {"threads": torch.get_num_threads(), "seconds": time.perf_counter() - start}
        source = {"file": file.name, "sha256": hashlib.sha256(content).hexdigest()}
        self.save(name, model, metrics | facts | {"source": source})
        return metrics

    def load(self, name: str, device: str | torch.device = "cpu") -> nn.Module:
        """Load a stored network, in evaluation mode.

        Raises:
            FileNotFoundError: it is not there.
            CorruptCheckpoint: its files are damaged.
            StaleRun: its recipe or the order of its images has changed since it was trained, or those or the weights
                of a run it continues.
        """
        if self._ships(name):
            return self.shipped.load(name, device)
        model, _ = self._open(name)
        info = self.info(name)
        then, now = info.get("threads"), training_threads()
        here = (info.get("device"), info.get("processor")) == ("cpu", device_name("cpu"))
        if here and then not in (None, now) and info["recipe"].get("name") != "imported":
            warnings.warn(
                f"run {name} was trained with {then} threads, and REPAIRLIB_THREADS is {now} now, with which it would "
                f"have other weights; set it to {then}, or remove the run with {self._deletion(name)}",
                stacklevel=2,
            )
        return model.to(device)

    def save(self, name: str, model: nn.Module, metrics: Mapping[str, object]) -> None:
        """Store a network under a run name with the metrics that train.train returns.

        Raises:
            FileExistsError: it is there.
            ValueError: a weight is not finite.
            OSError: it cannot be written (the disk is full); nothing is left behind.
        """
        with self._lock(name):
            self._save(name, model, metrics)

    def ship(self, name: str) -> int:
        """Put a stored run into the folder of networks that come with the repository: see data/README.md.

        Its weights are compressed without loss, its sidecar is as it is.

        Returns:
            Bytes that all networks in that folder take now.

        Raises:
            FileNotFoundError, CorruptCheckpoint, StaleRun: it cannot be loaded.
            FileExistsError: it is in that folder with other weights.
            ValueError: it continues another run, or all networks together would take more than `SHIPPED`.
        """
        self.load(name)
        if parent := self._parse(name).parent:
            raise ValueError(
                f"run {name} continues {parent}, and only runs that continue none come with the repository"
            )
        shipped = self.shipped or Store(shipped_root(), self.data_root)
        sizes = {each: sum(path.stat().st_size for path in shipped.path(each).iterdir()) for each in shipped.names()}
        if shipped.has(name) and shipped.info(name)["sha256"] == self.info(name)["sha256"]:
            return sum(sizes.values())
        files = {PACKED: pack(self._read(name)[1]), SIDECAR: (self.path(name) / SIDECAR).read_bytes()}
        size = sum(map(len, files.values()))
        if size + sum(sizes.values()) > SHIPPED:
            there = "".join(f"\n{taken / 1e6:7.2f} MB  {each}" for each, taken in sizes.items())
            raise ValueError(f"run {name} takes {size / 1e6:.2f} MB, and all networks in {shipped.root} together may "
                             f"take {SHIPPED / 1e6:.0f} MB; there are:{there}")  # fmt: skip
        write_folder(shipped.path(name), files)
        return size + sum(sizes.values())

    def has(self, name: str) -> bool:
        """Whether a run need not be trained: it is stored, or comes with the repository."""
        return self._holds(name) or self._ships(name)

    def path(self, name: str) -> Path:
        """Folder of a run."""
        return self.root / str(self._parse(name))

    def info(self, name: str) -> dict:
        """Read the sidecar of a stored run.

        Raises:
            FileNotFoundError: the run is not there.
            CorruptCheckpoint: the sidecar is missing or damaged.
        """
        if self._ships(name):
            return self.shipped.info(name)
        path = self.path(name) / SIDECAR
        if not path.parent.is_dir():
            stored = self.names()
            hint = f"; the nearest that is: {nearest(name, stored)}" if stored else ""
            raise FileNotFoundError(f"run {name} is not stored in {self.root}{hint}")
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self._corrupt(name, path, "is missing") from None
        except (ValueError, OSError) as error:
            raise self._corrupt(name, path, f"is not valid JSON ({error})") from error
        if not isinstance(info, dict):
            raise self._corrupt(name, path, "is not the sidecar of a run")
        parts = SIDECAR_PARTS | {part: kind for part, kind in OPTIONAL_PARTS.items() if part in info}
        if wrong := [part for part, kind in parts.items() if not isinstance(info.get(part), kind)]:
            raise self._corrupt(name, path, f"lacks {', '.join(wrong)}, or has something else in its place")
        measured = [
            info["metrics"].get(f"{half}_{what}", 0) for half in ("train", "test") for what in ("loss", "accuracy")
        ]
        if not all(isinstance(value, float | int) for value in measured):
            raise self._corrupt(name, path, "has a metric that is no number")
        if info["run"] != (run := str(self._parse(name))):
            raise self._corrupt(name, path, f"is of another run, {info['run']}, and not of {run}")
        return info

    def names(self) -> list[str]:
        """Names of all runs that need not be trained in natural order; a run stands before those that continue it."""
        found, level = [], [path for path in self.root.glob("*/*/*/s*") if path.is_dir()]
        while level:
            found += level
            level = [path for folder in level for path in folder.glob("*/s*") if path.is_dir()]
        names = {path.relative_to(self.root).as_posix() for path in found}
        names.update(self.shipped.names() if self.shipped else ())
        return sorted(names, key=lambda n: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", n)])

    def children(self, name: str) -> list[str]:
        """Names of all runs in the root that continue a run, directly or not."""
        run = str(self._parse(name))
        return [other for other in self.names() if other.startswith(f"{run}/") and (self.root / other).is_dir()]

    def delete(self, name: str, *, children: bool = False) -> None:
        """Remove a stored run.

        Args:
            name: of the run.
            children: remove those that continue it, too.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: stored runs continue it, or it is not in the root but comes with the repository.
        """
        folder = self.path(name)
        if self._ships(name):
            raise ValueError(
                f"run {name} comes with the repository; remove it there with {self.shipped._deletion(name)}"
            )
        with self._lock(name):
            if not folder.is_dir():
                self.info(name)  # raises, with a hint
            if (found := self.children(name)) and not children:
                raise ValueError(f"run {name} is not removed, because these continue it: {', '.join(found)}; remove "
                                 "them, too, with `delete --children`")  # fmt: skip
            hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            folder.rename(hidden)  # gone at once, even if removing the files is interrupted
            shutil.rmtree(hidden)

    def _parse(self, name: str) -> RunName:
        """Parse a run name; what is stored needs no data set to be read."""
        try:
            run = parse_run(name, check_data=False)
        except ValueError:
            return parse_run(name, self.data_root)  # says more of what is wrong
        roots = [self.root, *([self.shipped.root] if self.shipped else ())]
        stored = any((root / str(run)).is_dir() for root in roots) and not name.startswith(".")
        return run if stored else parse_run(name, self.data_root)

    def _holds(self, name: str) -> bool:
        """Whether a run is in the root."""
        return self.path(name).is_dir()

    def _check_place(self, name: str) -> None:
        """Raise FileExistsError if something else lies where a run's folder belongs, before it is trained for long."""
        folder = self.path(name)
        for place in [folder, *folder.parents]:
            if place.is_relative_to(self.root) and os.path.lexists(place) and not place.is_dir():
                raise FileExistsError(
                    f"run {name} belongs into the folder {folder}, and {place} is a file, or a link to nothing: move "
                    "it away"
                )

    def _ships(self, name: str) -> bool:
        """Whether a run is not in the root but comes with the repository."""
        return self.shipped is not None and not self._holds(name) and self.shipped.has(name)

    def _read(self, name: str) -> tuple[Path, bytes]:
        """The file of a run's weights, and its content, unpacked and verified."""
        folder = self.path(name)
        path = folder / (PACKED if (folder / PACKED).exists() else WEIGHTS)
        try:
            content = unpack(path.read_bytes()) if path.name == PACKED else path.read_bytes()
        except FileNotFoundError:
            raise self._corrupt(name, path, "is missing") from None
        except ValueError as error:
            raise self._corrupt(name, path, f"was altered or truncated ({error})") from error
        expected, digest = str(self.info(name)["sha256"]), hashlib.sha256(content).hexdigest()
        if digest != expected:
            raise self._corrupt(name, path, f"was altered or truncated (sha256 {digest[:12]}..., expected "
                                            f"{expected[:12]}...; {len(content)} bytes)")  # fmt: skip
        return path, content

    def _open(self, name: str) -> tuple[nn.Module, bytes]:
        """The network of a run in the root, and the content of its file; see load for what is raised."""
        run, info = self._parse(name), self.info(name)
        self._check_fresh(run, info)
        path, content = self._read(name)
        try:
            with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and replaced
                model = models.build(run.model, tuple(info["shape"]), info["classes"])
            model.load_state_dict(safetensors.torch.load(content))
        except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise self._corrupt(
                name, path, f"does not fit the model {run.model} ({' '.join(str(error).split())})"
            ) from error
        if bad := non_finite(model.state_dict()):
            raise self._corrupt(name, path, f"holds non-finite values in {bad[0]}")
        return model.eval(), content

    def _get_shipped(self, name: str, progress: bool) -> nn.Module:
        """Load a run that comes with the repository and copy it into the root; only a copy is announced."""
        model, content = self.shipped._open(name)
        files = {WEIGHTS: content, SIDECAR: (self.shipped.path(name) / SIDECAR).read_bytes()}
        try:
            with self._lock(name):
                if self._holds(name):  # another process has copied it meanwhile
                    return model
                write_folder(self.path(name), files)
        except OSError:  # the root is read-only, or full
            return model
        if progress:
            print(f"{self._parse(name)}: comes with repairlib ({_origin(self.info(name))})", flush=True)
        return model

    def _save(self, name: str, model: nn.Module, metrics: Mapping[str, object]) -> None:
        """Write a run; the caller holds its lock."""
        run = self._parse(name)
        if bad := non_finite(model.state_dict()):
            raise ValueError(f"run {name} is not saved: {bad[0]} holds non-finite values")
        content = safetensors.torch.save({key: value.cpu().contiguous() for key, value in model.state_dict().items()})
        facts = [name for name in FACTS if name in metrics]
        info = {
            "run": str(run),
            "recipe": dataclasses.asdict(recipe_of(run)),
            **({"parent": self._digest(run.parent)} if run.parent else {}),
            **{key: metrics[key] for key in facts},
            "metrics": {key: value for key, value in metrics.items() if key not in facts},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        sidecar = json.dumps(info, indent=2, allow_nan=False) + "\n"
        write_folder(self.path(name), {WEIGHTS: content, SIDECAR: sidecar.encode()})

    def _lock(self, name: str, progress: bool = False) -> FileLock:
        """The lock of a run, of this run alone; the system releases it if its holder dies."""
        run = self._parse(name)
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{_file_name(run)}.lock")
        if progress:
            try:
                lock.acquire(timeout=0)
                lock.release()
            except Timeout:
                print(f"{run}: waiting for the process that is training it", flush=True)
        return lock

    def _digest(self, run: RunName) -> dict:
        """What the sidecar of a run says about the run that it continues."""
        return {"run": str(run), "sha256": self.info(str(run))["sha256"]}

    def _check_fresh(self, run: RunName, info: dict) -> None:
        """Compare a stored run to what its name stands for today; a field that it lacks counts as its default."""
        today = dataclasses.asdict(recipe_of(run))
        defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
        for field in today | info["recipe"]:
            then, now = info["recipe"].get(field, defaults.get(field)), today.get(field)
            if json.dumps(then) != json.dumps(now):
                raise self._stale(run, f"was trained with {field}={then!r}, and its recipe now has {now!r}")
        source = DATASETS.get(base_name(run.data))
        # Sidecars have the digest of the data since there is one order for all sources.
        if source and source.sort and run.recipe != "imported" and "data_sha256" not in info:
            raise self._stale(run, f"was trained on the images of {run.data} in another order than they have now")
        if run.parent:
            if info.get("parent") != self._digest(run.parent):
                raise self._stale(run, f"continues other weights than those that {run.parent} has now")
            self._check_fresh(run.parent, self.info(str(run.parent)))

    def _stale(self, run: RunName, problem: str) -> StaleRun:
        return StaleRun(
            f"run {run} {problem}: remove it with {self._deletion(str(run))} and it is trained again, or keep it "
            "and use another root (REPAIRLIB_RUNS)"
        )

    def _corrupt(self, name: str, path: Path, problem: str) -> CorruptCheckpoint:
        if self.shipped and self.shipped.has(name):
            again = f"get({name!r}) copies it again"
        else:
            again = "import it again" if self._parse(name).recipe == "imported" else f"get({name!r}) trains it again"
        restore = ", or restore its files with git" if path.with_name(PACKED).exists() else ""
        return CorruptCheckpoint(f"{path} {problem}; remove the run with {self._deletion(name)} and {again}{restore}")

    def _deletion(self, name: str) -> str:
        """The command that deletes a run, with those that continue it."""
        children = "--children " if self.children(name) else ""
        return f"`python -m companion.runs.store --root {self.root} delete {children}{name}`"


def get(name: str, device: str | torch.device = "cpu", progress: bool = True) -> nn.Module:
    """Load a network by run name from the default store, trained first if need be; see Store.get."""
    return Store().get(name, device, progress=progress)


def _file_name(run: RunName) -> str:
    """A run's name as that of a file."""
    return str(run).replace("/", "__")


def _origin(info: Mapping) -> str:
    """Where a network comes from, and how good it is, in words."""
    seconds, accuracy = info.get("seconds", 0), info["metrics"].get("test_accuracy")
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    made = f"trained in {took} on {info.get('processor', info.get('device'))}"
    if "source" in info:
        made = f"imported from {info['source']['file']}"
    return made if accuracy is None else f"{made}; test accuracy {accuracy:.1%}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: train, import, delete, ship, list or check runs; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m companion.runs.store", description="Trained networks by run name.")
    parser.add_argument("--root", help="where runs are stored (default: $REPAIRLIB_RUNS, else data/runs)")
    parser.add_argument("--data-root", help="where data sets are (default: $REPAIRLIB_DATA, else data)")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train runs that are not stored yet, and those that they continue")
    deleting = commands.add_parser("delete", help="remove runs")
    shipping = commands.add_parser("ship", help="copy stored runs, compressed, to those that come with the repository")
    for command in (training, deleting, shipping):
        command.add_argument("names", nargs="+", metavar="NAME")
    deleting.add_argument("--children", action="store_true", help="and the runs that continue them")
    importing = commands.add_parser("import", help="store a network that was trained elsewhere")
    importing.add_argument("names", nargs=1, metavar="NAME", help="DATA/MODEL/imported/sSEED")
    importing.add_argument("file", metavar="FILE.safetensors", help="its state dict")
    importing.add_argument("--no-evaluate", action="store_true", help="leave out its accuracy")
    commands.add_parser("list", help="list runs with their test accuracy, and which come with the repository")
    commands.add_parser("check", help="verify every stored run, and those that come with the repository")
    options = parser.parse_args(arguments)
    store = Store(options.root, options.data_root, shipped_root())
    failures = 0
    names = options.names if hasattr(options, "names") else store.names()
    if options.command == "delete":
        names = sorted(names, key=lambda name: -name.count("/"))  # children before their parents
    for name in names:
        try:
            if options.command == "train":
                store.get(name)
            elif options.command == "import":
                metrics = store.add(name, options.file, evaluate=not options.no_evaluate)
                print(f"{name}: imported" + (f", test accuracy {metrics['test_accuracy']:.2%}" if metrics else ""))
            elif options.command == "delete":
                store.delete(name, children=options.children)
            elif options.command == "ship":
                print(f"{name}: ships; all networks together take {store.ship(name) / 1e6:.2f} MB")
            elif options.command == "list":
                accuracy = store.info(name)["metrics"].get("test_accuracy", float("nan"))
                print(f"{name}  {accuracy:.2%}" + ("  comes with the repository" if store.shipped.has(name) else ""))
            else:
                store.load(name)
                if store.shipped.has(name):
                    store.shipped.load(name)
                print(f"{name}  ok")
        except (CorruptCheckpoint, StaleRun, DataMissing, DivergedError, ValueError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            failures += 1
            if processes()[1] > 1:
                break  # the others wait for this process; torchrun ends them
    if torch.distributed.is_initialized() and not failures:
        torch.distributed.destroy_process_group()
    return min(failures, 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # whoever stopped it need not be told where it was
