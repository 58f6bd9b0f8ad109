"""Image folders: read whole if all images are of one size, or decoded batch by batch, as ImageNet must be.

What is read whole is decoded once: a copy of the pixels stays beside the folder, in `.decoded/<name>.safetensors`, and
is used as long as no file of the folder changes.

A folder holds `{train,test}/<class>/*`, or `{train,val}` like ImageNet's own; classes are in alphabetical order. Named
`<folder>@<side>` it is streamed: images of any size, grey or in colour, are decoded by threads while the batches before
them are used, and come out as [3, side, side].
"""

import hashlib
import math
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from companion.runs.files import atomic_write

# Of ImageNet's pixels / 255. All streamed folders are normalised by them, so that torchvision's weights fit.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AHEAD = 2  # batches that are decoded while one is used
# What makes an image upright, by EXIF's orientation; 1 is upright.
TURNS = dict(enumerate([Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90], start=2))  # fmt: skip
DECODER = "2"  # what decodes images; another one makes no use of what this one has decoded
KEPT = 2**30  # bytes; a sample that takes no more than this stays in memory once it is decoded


class DataMissing(FileNotFoundError):
    """A data set is not there, or is damaged, and could not be downloaded; the message says what to put where."""


@dataclass(frozen=True)
class Stream:
    """One half of a streamed folder; images are uint8 [3, side, side], labels int64 [n].

    Images are made upright first. Without a random crop, they are what torchvision's networks are evaluated on: the
    shorter side is resized to 256/224 of `side`, bilinearly with antialiasing, and the middle cut out. With it, a
    window of 8 to 100 % of the area and a ratio of sides from 3/4 to 4/3 is resized likewise (Szegedy et al. 2015). The
    window depends on the seed and on the image's index only, so that batches are the same for any number of threads.
    """

    paths: tuple[str, ...] = field(repr=False)  # ImageNet has 1.3 million
    labels: Tensor
    side: int
    keep: bool = False  # whether all images stay in memory once they are decoded for evaluation

    decode_time_augmentations = ("resized-crop",)  # made while decoding, where there is more of an image to see

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one image."""
        return 3, self.side, self.side

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.labels.device

    def to(self, device: str | torch.device) -> "Stream":
        """The same images, with batches on another device."""
        return replace(self, labels=self.labels.to(device))

    def take(self, chosen: Tensor) -> "Stream":
        """The images of these indices, int64 [m], in this order; a sample that is small enough is decoded once."""
        paths = tuple(self.paths[i] for i in chosen.tolist())
        keep = len(paths) * math.prod(self.shape) <= KEPT
        return replace(self, paths=paths, labels=self.labels[chosen.to(self.device)], keep=keep)

    def digest(self) -> str:
        """SHA-256 of labels and of the images' names and sizes in bytes; images are not read."""
        digest = hashlib.sha256(self.labels.cpu().numpy().tobytes())
        for path in map(Path, self.paths):
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def draw(self, batches: Iterable[slice | Tensor], crop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each of `batches`, which are indices; `crop` is the seed of random crops.

        Raises:
            DataMissing: an image (named) cannot be read.
        """
        batches = list(batches)
        images = (self._kept[each] for each in batches) if self.keep and crop is None else self._decode(batches, crop)
        yield from zip(images, (self.labels[each] for each in batches), strict=True)

    @cached_property
    def _kept(self) -> Tensor:
        images = torch.empty(len(self), *self.shape, dtype=torch.uint8, device=self.device)
        parts = [slice(start, start + 100) for start in range(0, len(self), 100)]
        for part, decoded in zip(parts, self._decode(parts, None), strict=True):
            images[part] = decoded
        return images

    def _decode(self, batches: list[slice | Tensor], crop: int | None) -> Iterator[Tensor]:
        indices = np.arange(len(self))
        waiting: deque = deque()

        def next_batch() -> Tensor:
            images = torch.from_numpy(np.stack([future.result() for future in waiting.popleft()]))
            return images.to(self.device).permute(0, 3, 1, 2).contiguous()

        pool = ThreadPoolExecutor(_workers())  # Pillow decodes and resizes outside the interpreter's lock
        try:
            for each in batches:
                chosen = indices[each if isinstance(each, slice) else each.cpu().numpy()]
                waiting.append([pool.submit(self._see, i, crop) for i in chosen.tolist()])
                if len(waiting) > AHEAD:
                    yield next_batch()
            while waiting:
                yield next_batch()
        finally:  # whoever asked may have stopped early
            pool.shutdown(cancel_futures=True)

    def _see(self, i: int, crop: int | None) -> np.ndarray:
        """Image i as uint8 [side, side, 3]."""
        image, side = _open(self.paths[i]), self.side
        if crop is None:
            width, height = (round(side * 256 / 224) * n // min(image.size) for n in image.size)
            x, y = (round((n - side) / 2) for n in (width, height))
            image = image.resize((width, height), Image.Resampling.BILINEAR).crop((x, y, x + side, y + side))
        else:
            image = image.crop(_window(*image.size, random.Random(f"{crop} {i}")))
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(image.convert("RGB"))


def halves_of(folder: Path) -> tuple[Path, Path] | None:
    """The folders of the training and of the test images; None if `folder` is no image folder."""
    tests = [folder / half for half in ("test", "val") if (folder / half).is_dir()]
    if not tests or not (folder / "train").is_dir():
        return None
    if len(tests) == 2 and not _subfolders(tests[0]):  # ImageNet's test has no labels, and so no folders
        return folder / "train", tests[1]
    return folder / "train", tests[0]


def stream_folder(folder: Path, side: int) -> tuple[Stream, Stream]:
    """Both halves of a folder, without reading an image yet; DataMissing if one or a class of it is empty."""
    train, test = (Stream(paths, labels, side) for paths, labels in _list_images(folder))
    return train, test


def read_folder(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Read images uint8 [n, c, h, w] and labels int64 [n] of both halves of a folder; c is 1 if all images are grey.

    Raises:
        DataMissing: an image (named) cannot be read or is of another size than the first; a half or class is empty.
    """
    halves = _list_images(folder)
    paths = [path for half, _ in halves for path in half]
    copy, state = folder.parent / ".decoded" / f"{folder.name}.safetensors", _state(folder, paths)
    images = _read_copy(copy, state)
    if not images:
        decoded = _decode(folder, paths)
        images = {"train": decoded[: len(halves[0][0])], "test": decoded[len(halves[0][0]) :]}
        try:
            atomic_write(copy, safetensors.torch.save(images, {"state": state}))
        except OSError:  # the root is read-only, or full
            pass
    return [(images[half], labels) for half, (_, labels) in zip(("train", "test"), halves, strict=True)]


def _state(folder: Path, paths: Iterable[str]) -> str:
    """A digest of the names, sizes and times of change of some files in a folder."""
    begin = len(str(folder))
    files = (f"{path[begin:]} {file.st_size} {file.st_mtime_ns}\n" for path in paths if (file := os.stat(path)))
    return hashlib.sha256("".join([DECODER, *files]).encode()).hexdigest()


def _read_copy(path: Path, state: str) -> dict[str, Tensor]:
    """Images of both halves from a copy that was made of the files as they are; empty if there is none."""
    try:
        with safe_open(path, "pt") as copy:
            if (copy.metadata() or {}).get("state") == state:
                return {half: copy.get_tensor(half) for half in ("train", "test")}
    except (OSError, SafetensorError):  # it is not there, or damaged
        pass
    return {}


def _decode(folder: Path, paths: list[str]) -> Tensor:
    """Decode images of one size; see `read_folder`."""
    arrays = []
    pool = ThreadPoolExecutor(8)
    try:
        for path, image in zip(paths, pool.map(_open, paths), strict=True):
            array = np.asarray(image)
            arrays.append(array.reshape(*array.shape[:2], -1))
            if array.shape[:2] != arrays[0].shape[:2]:
                height, width, _ = arrays[0].shape
                raise DataMissing(
                    f"{path} is {array.shape[1]}x{array.shape[0]} pixels, the first image {width}x{height}; resize all "
                    f"images of {folder} to one size, or have them cut to one: {folder.name}@{min(width, height)}"
                )
    finally:
        pool.shutdown(cancel_futures=True)
    channels = max(array.shape[2] for array in arrays)  # among colour images, grey ones get three channels
    images = np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _list_images(folder: Path) -> list[tuple[tuple[str, ...], Tensor]]:
    """Paths and labels of both halves; classes and files in alphabetical order."""
    halves = halves_of(folder)
    classes = [_subfolders(half) for half in halves]
    if odd := set(classes[0]) ^ set(classes[1]):
        raise DataMissing(f"class folder {min(odd)!r} is only in one of {halves[0]} and {halves[1]}")
    if not classes[0]:
        raise DataMissing(f"{halves[0]} and {halves[1]} hold no class folders")
    found = []
    for half in halves:
        paths, labels = [], []
        for label, name in enumerate(classes[0]):
            entries = [entry for entry in os.scandir(half / name) if not entry.name.startswith(".")]
            for entry in entries:
                if not entry.is_file():
                    what = (
                        "a folder: images lie in their class's folder itself" if entry.is_dir() else "a link to nothing"
                    )
                    raise DataMissing(f"{entry.path} is {what}")
            files = sorted(entry.path for entry in entries)
            if not files:
                raise DataMissing(f"{half / name} holds no images")
            paths += files
            labels += [label] * len(files)
        found.append((tuple(paths), torch.tensor(labels)))
    return found


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _open(path: str) -> Image.Image:
    """Decode an image upright, as grey values or RGB of 8 bits."""
    try:
        with Image.open(path) as file:
            turn = TURNS.get(file.getexif().get(0x0112))  # as cameras note that they were held
            image = file.transpose(turn) if turn is not None else file
            if image.mode.startswith("I"):  # Pillow would clip grey values of 16 bits at 255
                values = np.asarray(image).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("its values have more than 16 bits")
                return Image.fromarray(((values + 128) // 257).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its values are floating-point numbers, of no known range")
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    # What Pillow raises for damaged files, and for those that may be traps.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataMissing(f"{path} is not a readable image ({error}); replace or remove it") from error


def _window(width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
    """Draw a window (left, top, right, bottom) as torchvision does: after ten that do not fit, the middle."""
    for _ in range(10):
        area = width * height * draws.uniform(0.08, 1)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            x, y = (int(draws.random() * (room + 1)) for room in (width - across, height - down))
            return x, y, x + across, y + down
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x, y = (width - across) // 2, (height - down) // 2
    return x, y, x + across, y + down


def _workers() -> int:
    """Number of threads that decode: one a core; processes of torchrun on this machine share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
