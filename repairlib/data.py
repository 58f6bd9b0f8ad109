"""Named data sets as tensors resident on the device, with batched augmentation there.

`load("digits")` and `load("digits-hard")` need nothing but scikit-learn; MNIST, FashionMNIST, SVHN and CIFAR come
through torchvision; any other name is an image folder `<root>/<name>/{train,test}/<class>/*`. The root is the argument,
else $REPAIRLIB_DATA, else the checkout's `data/`. Pixels stay uint8 until a batch is drawn, so CIFAR-10 takes 184 MB of
device memory.
"""

import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from repairlib.names import nearest

# name -> (class in torchvision.datasets, images in train and test, the files that class reads under the root)
ARCHIVES = {
    "mnist": ("MNIST", (60_000, 10_000), "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "fashionmnist": ("FashionMNIST", (60_000, 10_000), "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "svhn": ("SVHN", (73_257, 26_032), "SVHN/{train,test}_32x32.mat"),
    "cifar10": ("CIFAR10", (50_000, 10_000), "cifar-10-batches-py/*"),
    "cifar100": ("CIFAR100", (50_000, 10_000), "cifar-100-python/*"),
}
AUGMENTATIONS = ("translate", "flip", "cutout", "resize", "rotate", "resized-crop")
DIGITS_TEST = 400  # images of scikit-learn's 1,797 kept for testing


class DataMissing(FileNotFoundError):
    """A data set is not there, or is damaged, and could not be downloaded; the message says what to put where."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one half of a data set: images uint8 [n, c, h, w] in 0..255, labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set on one device; mean and std are per channel, of the training pixels scaled to 0..1."""

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one image."""
        return tuple(self.train.images.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.train.images.device

    def to(self, device: str | torch.device) -> "Dataset":
        """Return the same data on another device."""
        halves = (Split(half.images.to(device), half.labels.to(device)) for half in (self.train, self.test))
        return replace(self, train=next(halves), test=next(halves))


def project_root() -> Path:
    """Return the source checkout that holds this package, or the working folder if it is installed elsewhere."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder data sets are kept in: `root`, else $REPAIRLIB_DATA, else the checkout's `data`."""
    return Path(root or os.environ.get("REPAIRLIB_DATA") or project_root() / "data").expanduser().resolve()


def check_name(name: str, root: str | Path | None = None) -> str:
    """Return `name` if it names a known data set or an image folder under the root; ValueError otherwise."""
    root = data_root(root)
    folders = [path.name for path in root.iterdir() if _is_image_folder(path)] if root.is_dir() else []
    known = list(dict.fromkeys(["digits", "digits-hard", *ARCHIVES, *sorted(folders)]))
    if name not in known or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"unknown data set {name!r}; the nearest is {nearest(name, known)!r} (known: {', '.join(known)}); your own "
            f"goes into {root / (name or 'NAME')}/{{train,test}}/<class>/, or under another root: set REPAIRLIB_DATA"
        )
    return name


def load(
    name: str, root: str | Path | None = None, device: str | torch.device = "cpu", download: bool = True
) -> Dataset:
    """Load a data set by name onto a device.

    Args:
        name: digits, digits-hard (the same in disorder, see `clutter`), mnist, fashionmnist, svhn, cifar10, cifar100,
            or the name of an image folder under the root; an image folder of that name wins over torchvision's archive.
        root: where data sets are; default $REPAIRLIB_DATA, else `data` in the checkout. It may be read-only.
        device: where the tensors go.
        download: fetch what torchvision knows and is not there (checksums verified).

    Raises:
        ValueError: unknown name.
        DataMissing: not there and not to be had, or damaged.

    >>> digits = load("digits")
    >>> digits.shape, len(digits.train), len(digits.test), digits.classes
    ((1, 16, 16), 1397, 400, 10)
    """
    root = data_root(root)
    check_name(name, root)
    if _is_image_folder(root / name):
        train, test = _read_folder(root / name)
    elif name == "digits":
        train, test = _read_digits()
    elif name == "digits-hard":
        train, test = (clutter(half, seed) for seed, half in enumerate(_read_digits()))
    else:
        train, test = _read_archive(name, root, download)
    mean, std = _pixel_statistics(train.images)
    return Dataset(name, train, test, int(train.labels.max()) + 1, mean, std).to(device)


def augment(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Augment a batch where it is: each image gets its own random draw.

    Args:
        images: [n, c, h, w], any dtype; untouched.
        names: "translate" pads with zeros by an eighth of the side (4 at 32x32) and crops back at a random place;
            "flip" mirrors left-right with probability 1/2; "cutout" sets a square of a quarter of the side (8 at
            32x32), centred at random, to zero (DeVries and Taylor 2017); "resize" scales by 0.8 to 1.2 and crops a
            larger image, or pads a smaller one with zeros, at a random place; "rotate" turns by up to 30 degrees either
            way, corners filled with zeros (both Csiszarik et al. 2023, App. A); "resized-crop" enlarges a window of 8
            to 100 % of the area and a ratio of sides from 3/4 to 4/3 (Szegedy et al. 2015). The last three interpolate
            bilinearly and round if the images are integers.
        generator: on the CPU; draws are made there and moved, so they are the same on every device.

    Raises:
        ValueError: unknown name.
    """
    n, _, height, width = images.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator).to(images.device)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator)).to(images.device)

    for name in names:
        if name == "translate":
            pad_y, pad_x = height // 8, width // 8
            # Every crop as a strided view [n, c, 2 pad_y + 1, 2 pad_x + 1, h, w]: choosing one per image is one index.
            crops = F.pad(images, (pad_x, pad_x, pad_y, pad_y)).unfold(2, height, 1).unfold(3, width, 1)
            each = torch.arange(n, device=images.device)
            images = crops[each, :, draw(2 * pad_y + 1), draw(2 * pad_x + 1)]
        elif name == "flip":
            images = torch.where(draw(2).bool()[:, None, None, None], images.flip(3), images)
        elif name == "cutout":
            rows = _near(draw(height), height, images.device)
            columns = _near(draw(width), width, images.device)
            images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
        elif name == "resize":
            side = 1 / uniform(0.8, 1.2)  # of the window that is seen, in sides of the image
            images = _look(images, side, side, (1 - side) * uniform(-1, 1), (1 - side) * uniform(-1, 1))
        elif name == "rotate":
            images = _look(images, angle=uniform(-math.pi / 6, math.pi / 6))
        elif name == "resized-crop":
            area, ratio = uniform(0.08, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
            across, down = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
            images = _look(images, across, down, (1 - across) * uniform(-1, 1), (1 - down) * uniform(-1, 1))
        else:
            raise ValueError(f"unknown augmentation {name!r}; the nearest is {nearest(name, AUGMENTATIONS)!r}")
    return images


@dataclass(frozen=True)
class Batches:
    """A pass over images, which can be repeated: every iteration gives the same batches (see `iterate`)."""

    split: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    augment: tuple[str, ...]
    shuffle: bool
    drop_last: bool
    seed: int

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.split.images, self.split.labels
        device = images.device
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        gain, shift = 1 / (255 * std), -mean / std
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator).to(device) if self.shuffle else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = slice(start, start + self.batch_size)
            chosen = chosen if order is None else order[chosen]
            x = augment(images[chosen], self.augment, generator)
            yield torch.addcmul(shift, x.float(), gain), labels[chosen]


def iterate(
    dataset: Dataset,
    split: str = "train",
    batch_size: int = 500,
    augment: Sequence[str] = (),
    generator: torch.Generator | None = None,
    shuffle: bool = False,
    limit: int | None = None,
    drop_last: bool = False,
) -> Batches:
    """Return batches (x, y): x float32 [b, c, h, w] normalised per channel, y int64 [b].

    Args:
        dataset: of `load`.
        split: "train" or "test".
        batch_size: images in a batch; the last may have fewer.
        augment: names, see `augment`.
        generator: on the CPU; one number is drawn from it, the seed of this pass (0 without it), so calling again with
            the same generator gives another pass, while iterating twice over one result gives the same pass twice.
        shuffle: draw a random order.
        limit: use only so many images, drawn by a fixed seed: a fair sample, always the same one.
        drop_last: leave out a last batch that is not full.

    Raises:
        ValueError: unknown split or augmentation, or a size below 1.

    >>> digits = load("digits")
    >>> [len(y) for x, y in iterate(digits, "test", batch_size=150)]
    [150, 150, 100]
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; the nearest is {nearest(split, ('train', 'test'))!r}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit are at least 1, not {batch_size} and {limit}")
    if unknown := set(augment) - set(AUGMENTATIONS):
        raise ValueError(f"unknown augmentation {(bad := min(unknown))!r}; nearest: {nearest(bad, AUGMENTATIONS)!r}")
    half: Split = getattr(dataset, split)
    if limit is not None and limit < len(half):
        sample = torch.randperm(len(half), generator=torch.Generator().manual_seed(0))[:limit].to(dataset.device)
        half = Split(half.images[sample], half.labels[sample])
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
    return Batches(half, dataset.mean, dataset.std, batch_size, tuple(augment), shuffle, drop_last, seed)


def _look(
    images: Tensor, across: Tensor | float = 1.0, down: Tensor | float = 1.0,
    x: Tensor | float = 0.0, y: Tensor | float = 0.0, angle: Tensor | float = 0.0,
) -> Tensor:  # fmt: skip
    """Show what each image [n, c, h, w] has in a window of its own, enlarged or reduced to the image's size.

    The window's size is in sides of the image and its centre in half sides from the middle, [n] each; it is turned by
    `angle` in radians. Outside the image there are zeros.
    """
    height, width = images.shape[2:]
    angle = torch.as_tensor(angle, device=images.device).expand(len(images))
    cos, sin = angle.cos(), angle.sin()
    # Coordinates run from -1 to 1 along both sides, so that turning an oblong image changes their units.
    rows = ((across * cos, -down * sin * (height / width), x), (across * sin * (width / height), down * cos, y))
    theta = torch.stack([torch.stack([torch.as_tensor(v).to(cos).expand_as(cos) for v in row], 1) for row in rows], 1)
    pixels = images if images.is_floating_point() else images.float()
    grid = F.affine_grid(theta.to(pixels.dtype), list(images.shape), align_corners=False)
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return seen if images.is_floating_point() else seen.round().to(images.dtype)


def _near(centre: Tensor, side: int, device: torch.device) -> Tensor:
    """Mark the side // 4 positions around each centre: bool [n, side]."""
    offset = torch.arange(side, device=device) - centre[:, None] + side // 8
    return (offset >= 0) & (offset < max(1, side // 4))


def _pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of pixels / 255, exact (from integer histograms)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = [torch.bincount(channel.flatten(), minlength=256).double() for channel in images.unbind(1)]
    weights = torch.stack([w / w.sum() for w in weights])
    mean = weights @ values
    std = ((values - mean[:, None]) ** 2 * weights).sum(1).sqrt()
    std[std == 0] = 1  # a constant channel stays at zero instead of becoming NaN
    return tuple(mean.tolist()), tuple(std.tolist())


def _read_digits() -> tuple[Split, Split]:
    """scikit-learn's 8x8 digits enlarged to 16x16; the split is stratified and fixed."""
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images).unsqueeze(1), size=(16, 16), mode="bilinear")
    images = (images * (255 / 16)).round().to(torch.uint8)
    # Each image's rank within its shuffled class, as a fraction: the lowest ranks of all are a stratified sample.
    # numpy's legacy RandomState, because its stream is frozen for all versions.
    rank = np.empty(len(digits.target))
    shuffled = np.random.RandomState(0).permutation(len(digits.target))
    for label in range(10):
        members = shuffled[digits.target[shuffled] == label]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = torch.from_numpy(np.argsort(rank, kind="stable"))
    labels = torch.from_numpy(digits.target).long()
    test, train = order[:DIGITS_TEST].sort().values, order[DIGITS_TEST:].sort().values
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def clutter(split: Split, seed: int) -> Split:
    """Return one harder version of every image of a half, in the same order and under the same label.

    Each image gets draws of its own:

    1. it is reduced to 75 to 100 % of its side, turned by up to 15 degrees either way and put at a random place where
       its frame, before turning, fits;
    2. another image of the same half, reduced and turned likewise, looks in from the left or the right: its middle lies
       1.1 to 1.5 half sides from the canvas's, and up to 0.3 above or below. Where both have ink, the stronger counts;
    3. paper becomes a grey value of 0 to 20 % and ink one of 70 to 100 %;
    4. normal noise of 5 % is added, and the result is cut to 0 to 100 % and rounded.

    `digits-hard` is this of both halves of `digits`, train with seed 0 and test with seed 1. Since the neighbours of 2.
    come from the same half, no part of a test image is trained on. The draws are of numpy's legacy RandomState(seed),
    whose stream is frozen for all versions, and all is float64 until it is rounded: the result is always the same.
    """
    random, n = np.random.RandomState(seed), len(split)

    def uniform(low: float, high: float) -> Tensor:
        return torch.from_numpy(random.uniform(low, high, n))

    def place(images: Tensor, size: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Images of `size` sides of the canvas, turned, with their middles at (x, y) half sides from the canvas's."""
        angle = uniform(-15, 15).deg2rad()
        cos, sin = angle.cos(), angle.sin()
        return _look(images, 1 / size, 1 / size, (y * sin - x * cos) / size, -(x * sin + y * cos) / size, angle)

    ink = split.images.double() / 255
    size = uniform(0.75, 1)
    own = place(ink, size, (1 - size) * uniform(-1, 1), (1 - size) * uniform(-1, 1))
    side = torch.from_numpy(random.choice([-1.0, 1.0], n))
    other = ink[torch.from_numpy((np.arange(n) + random.randint(1, n, n)) % n)]
    beside = place(other, uniform(0.75, 1), side * uniform(1.1, 1.5), uniform(-0.3, 0.3))
    paper, black = (v.view(-1, 1, 1, 1) for v in (uniform(0, 0.2), uniform(0.7, 1)))
    images = paper + (black - paper) * torch.maximum(own, beside)
    images = images + torch.from_numpy(random.normal(0, 0.05, images.shape))
    return Split((images.clamp(0, 1) * 255).round().to(torch.uint8), split.labels)


def _is_image_folder(folder: Path) -> bool:
    return (folder / "train").is_dir() and (folder / "test").is_dir()


def _read_folder(folder: Path) -> tuple[Split, Split]:
    """Read <folder>/{train,test}/<class>/*; classes and files in alphabetical order."""
    classes = {half: sorted(p.name for p in (folder / half).iterdir() if p.is_dir()) for half in ("train", "test")}
    if odd := set(classes["train"]) ^ set(classes["test"]):
        raise DataMissing(f"class folder {min(odd)!r} is only in one of {folder}/train and {folder}/test")
    files = []
    for half, names in classes.items():
        for label, name in enumerate(names):
            paths = sorted(p for p in (folder / half / name).iterdir() if p.is_file() and not p.name.startswith("."))
            files += [(half, label, path) for path in paths]
            if not paths:
                raise DataMissing(f"{folder / half / name} holds no images")
    if not files:
        raise DataMissing(f"{folder}/train and {folder}/test hold no class folders")
    with ThreadPoolExecutor(8) as pool:  # Pillow decodes outside the interpreter's lock
        arrays = list(pool.map(_read_image, (path for _, _, path in files)))
    height, width, _ = arrays[0].shape
    for (_, _, path), array in zip(files, arrays, strict=True):
        if array.shape[:2] != (height, width):
            raise DataMissing(
                f"{path} is {array.shape[1]}x{array.shape[0]} pixels, the first image {width}x{height}; "
                f"resize all images of {folder} to one size"
            )
    shape = (
        height,
        width,
        max(array.shape[2] for array in arrays),
    )  # among colour images, grey ones get three channels
    splits = []
    for wanted in classes:
        images = [np.broadcast_to(a, shape) for a, (half, _, _) in zip(arrays, files, strict=True) if half == wanted]
        labels = [label for half, label, _ in files if half == wanted]
        splits.append(Split(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()), torch.tensor(labels)))
    return splits[0], splits[1]


def _read_image(path: Path) -> np.ndarray:
    """Read an image as uint8 [h, w, 1 or 3]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise DataMissing(f"{path} is not a readable image ({error}); replace or remove it") from error
    return pixels.reshape(*pixels.shape[:2], -1)


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
        + f". Put torchvision's files there as {root / ARCHIVES[name][2]}, or an image folder "
        f"{root / name}/{{train,test}}/<class>/*, or set REPAIRLIB_DATA to a folder that has either; data/README.md "
        "has sources and checksums"
    ) from problem


def _open_archive(name: str, root: Path) -> tuple[Split, Split]:
    import torchvision

    family, sizes, _ = ARCHIVES[name]
    factory, splits = getattr(torchvision.datasets, family), []
    for half, size in zip(("train", "test"), sizes, strict=True):
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
    family = getattr(torchvision.datasets, ARCHIVES[name][0])
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
