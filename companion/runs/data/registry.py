"""What a data set is, and which there are."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from companion.runs.data.folders import Stream
from companion.runs.files import project_root


@dataclass(frozen=True)
class Split:
    """Images and labels of one half of a data set: images uint8 [n, c, h, w] in 0..255, labels int64 [n]."""

    images: Tensor
    labels: Tensor

    decode_time_augmentations = ()  # see folders.Stream

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one image."""
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def to(self, device: str | torch.device) -> "Split":
        """The same images on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, chosen: Tensor) -> "Split":
        """The images of these indices, int64 [m], in this order."""
        chosen = chosen.to(self.labels.device)
        return Split(self.images[chosen], self.labels[chosen])

    def draw(self, batches: Iterable[slice | Tensor], crop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each of `batches`, which are indices; `crop` is for folders.Stream."""
        return ((self.images[each], self.labels[each]) for each in batches)

    def sorted(self) -> "Split":
        """The same images in the order of their content and label, which is the same for all sources of a data set."""
        digests = [hashlib.sha256(image.tobytes()).digest() for image in self.images.numpy()]
        keys = list(zip(digests, self.labels.tolist(), strict=True))  # an image may be there twice, in two classes
        return self.take(torch.tensor(sorted(range(len(self)), key=keys.__getitem__)))

    def digest(self) -> str:
        """SHA-256 of labels and pixels."""
        digest = hashlib.sha256(self.labels.cpu().numpy().tobytes())
        digest.update(self.images.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A data set on one device, to be used through `iterate` and `take` of its halves.

    mean and std are per channel, of the whole training set's pixels scaled to 0..1, or ImageNet's if it is streamed.
    """

    name: str
    train: Split | Stream
    test: Split | Stream
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one image."""
        return self.train.shape

    @property
    def device(self) -> torch.device:
        """Where the images are, or batches of a streamed folder go."""
        return self.train.device

    def to(self, device: str | torch.device) -> "Dataset":
        """The same data on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def digest(self) -> str:
        """SHA-256 of both halves, in order: two data sets of one name that differ have different ones."""
        return hashlib.sha256(f"{self.train.digest()}{self.test.digest()}".encode()).hexdigest()


def data_root(root: str | Path | None = None) -> Path:
    """The folder that data sets are kept in: `root`, else $REPAIRLIB_DATA, else the checkout's `data`."""
    return Path(root or os.environ.get("REPAIRLIB_DATA") or project_root() / "data").expanduser().resolve()


class Facts(NamedTuple):
    """Size of a data set: images for training and testing, shape (c, h, w) of one, classes."""

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class Source:
    """A named data set.

    >>> def read(root, download):
    ...     half = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)
    ...     return half, half
    >>> register(Source("black", read, Facts(4, 4, (1, 8, 8), 2)))
    >>> del DATASETS["black"]
    """

    name: str
    read: Callable[[Path, bool], tuple[Split, Split]] | None  # of (root, download); None: it is an image folder
    facts: Facts | None = None  # so that its costs are known before it is there
    title: str = ""  # in pictures; default: the name
    sort: bool = False  # by content, because it is about both as an archive and as image folders, in other orders
    files: str = ""  # that it reads, as a path below the root
    upright: bool = False  # digits must not be mirrored, nor a part of their strokes cut out or off

    def is_there(self, root: Path) -> bool:
        """Whether it can be read without a download."""
        return self.read is not None and (not self.files or (root / self.files.partition("/")[0]).is_dir())


DATASETS: dict[str, Source] = {}


def register(source: Source) -> None:
    """Give a data set a name: `load`, `store.get` and notebooks know it from now on.

    Raises:
        ValueError: the name cannot be one, or is that of another data set.
    """
    if not re.fullmatch(r"\w[\w.-]*", source.name, re.ASCII) or source.name in DATASETS:
        raise ValueError(
            f"{source.name!r} cannot name a data set, for which letters, digits and _.- will do; "
            f"taken are {', '.join(DATASETS)}"
        )
    DATASETS[source.name] = source
