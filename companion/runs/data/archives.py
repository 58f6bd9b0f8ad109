"""Data sets that come through torchvision, downloaded if need be."""

import shutil
import socket
import tempfile
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from companion.runs.data.folders import DataMissing
from companion.runs.data.registry import DATASETS, Facts, Source, Split, register

CLASSES: dict[str, str] = {}  # in torchvision.datasets


def _read_archive(name: str, root: Path, download: bool) -> tuple[Split, Split]:
    """Read through torchvision, downloading first if need be."""
    try:
        return _open_archive(name, root)
    except (RuntimeError, ValueError, AssertionError, OSError, EOFError) as error:  # not there, or damaged
        problem: Exception = error
    if download:
        try:
            _download(name, root)
            return _open_archive(name, root)
        except (RuntimeError, OSError) as error:  # no network, or a root that cannot be written
            problem = error
    raise DataMissing(
        f"data set {name!r} is not (whole) in {root}"
        + (f", and downloading it failed ({problem})" if download else f" ({problem})")
        + f". Put torchvision's files there as {root / DATASETS[name].files}, or an image folder "
        f"{root / name}/{{train,test}}/<class>/*, or set REPAIRLIB_DATA to a folder that has either; data/README.md "
        "has sources and checksums"
    ) from problem


def _open_archive(name: str, root: Path) -> tuple[Split, Split]:
    import torchvision

    factory, splits = getattr(torchvision.datasets, CLASSES[name]), []
    for half, size in zip(("train", "test"), DATASETS[name].facts[:2], strict=True):
        if name == "svhn":
            archive = factory(root / "SVHN", split=half)
            images, labels = torch.from_numpy(archive.data), torch.as_tensor(archive.labels)
        else:
            archive = factory(root, train=half == "train")
            images, labels = torch.as_tensor(archive.data), torch.as_tensor(archive.targets)
            images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        if len(images) != size or len(labels) != size:
            raise ValueError(f"{half} set has {len(images)} images and {len(labels)} labels instead of {size}")
        splits.append(Split(images.contiguous(), labels.long()))
    return splits[0], splits[1]


def _download(name: str, root: Path) -> None:
    """Fetch with torchvision (which verifies checksums) into a temporary folder, then move into the root."""
    import torchvision

    root.mkdir(parents=True, exist_ok=True)
    family = getattr(torchvision.datasets, CLASSES[name])
    with FileLock(root / ".download.lock"):
        try:
            _open_archive(name, root)  # another process may have fetched it while this one waited
            return
        except (RuntimeError, ValueError, AssertionError, OSError, EOFError):
            pass
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds; torchvision sets none, and a silent network would block for ever
        incoming = Path(tempfile.mkdtemp(prefix=".incoming-", dir=root))
        try:
            if name == "svhn":
                for half in ("train", "test"):
                    family(incoming / "SVHN", split=half, download=True)
            else:
                family(incoming, download=True)
            for path in list(incoming.iterdir()):
                if (root / path.name).is_dir():
                    (root / path.name).rename(incoming / f"{path.name}.old")  # damaged: it would have been used
                path.rename(root / path.name)
        finally:
            socket.setdefaulttimeout(patience)
            shutil.rmtree(incoming, ignore_errors=True)


def _register(name: str, title: str, family: str, files: str, facts: Facts, **others: bool) -> None:
    CLASSES[name] = family
    register(Source(name, partial(_read_archive, name), facts, title, files=files, **others))


_MNIST = "/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
_register("mnist", "MNIST", "MNIST", f"MNIST{_MNIST}", Facts(60_000, 10_000, (1, 28, 28), 10), upright=True)
_register("fashionmnist", "FashionMNIST", "FashionMNIST", f"FashionMNIST{_MNIST}",
          Facts(60_000, 10_000, (1, 28, 28), 10))  # fmt: skip
_register("svhn", "SVHN", "SVHN", "SVHN/{train,test}_32x32.mat", Facts(73_257, 26_032, (3, 32, 32), 10), upright=True)
_register("cifar10", "CIFAR-10", "CIFAR10", "cifar-10-batches-py/*", Facts(50_000, 10_000, (3, 32, 32), 10), sort=True)
_register("cifar100", "CIFAR-100", "CIFAR100", "cifar-100-python/*", Facts(50_000, 10_000, (3, 32, 32), 100), sort=True)
# Not to be downloaded: an image folder that you must have, see data/README.md.
register(Source("imagenet", None, Facts(1_281_167, 50_000, (3, 224, 224), 1000), "ImageNet"))
