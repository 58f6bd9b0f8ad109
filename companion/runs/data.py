"""Named data sets as tensors resident on the device, or streamed to it, with batched augmentation there.

`load("digits")` and `load("digits-hard")` need nothing but scikit-learn; MNIST, FashionMNIST, SVHN and CIFAR come
through torchvision; any other name is an image folder `<root>/<name>/{train,test}/<class>/*`, which as `<name>@<side>`
is not resident but decoded when batches are drawn (see `folders`). `<name>-first80` and `<name>-last80` are disjoint,
biased halves of any of them, see `base_name`. The root is the argument, else $REPAIRLIB_DATA, else the checkout's
`data/`. Pixels stay uint8 until a batch is drawn, so CIFAR-10 takes 184 MB of device memory.
"""

import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from companion.runs.files import project_root as project_root
from companion.runs.folders import MEAN, STD, DataMissing, Stream, halves_of, read_folder, stream_folder
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
HALF = re.compile(r"(?<=.)-(first|last)(5[1-9]|[6-9]\d)$")  # the end of the name of a biased half
DIGITS_TEST = 400  # images of scikit-learn's 1,797 kept for testing


@dataclass(frozen=True)
class Split:
    """Images and labels of one half of a data set: images uint8 [n, c, h, w] in 0..255, labels int64 [n]."""

    images: Tensor
    labels: Tensor

    own = ()  # as of folders.Stream: nothing is augmented before it is drawn

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
        """Return the same images on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, chosen: Tensor) -> "Split":
        """Return the images of these indices, int64 [m], in this order."""
        chosen = chosen.to(self.labels.device)
        return Split(self.images[chosen], self.labels[chosen])

    def draw(self, batches: Iterable[slice | Tensor], crop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each of `batches`, which are indices; `crop` is for folders.Stream."""
        return ((self.images[each], self.labels[each]) for each in batches)


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
        """Return the same data on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder data sets are kept in: `root`, else $REPAIRLIB_DATA, else the checkout's `data`."""
    return Path(root or os.environ.get("REPAIRLIB_DATA") or project_root() / "data").expanduser().resolve()


def base_name(name: str) -> str:
    """Return the name of the data set that `name` is a biased half of; any other name as it is.

    The training set of `<base>-first<p>`, with p from 51 to 99, has a random p % of the images of each class in the
    first half of the classes and 100 - p % in the second; that of `<base>-last<p>` has all the others. The test set is
    the base's, whole. (Jordan et al. 2022, Sec. 5.4, with p = 80.)

    >>> base_name("cifar100-first80"), base_name("cifar100")
    ('cifar100', 'cifar100')
    """
    return HALF.sub("", name)


def check_name(name: str, root: str | Path | None = None) -> str:
    """Return `name` if it names a known data set, an image folder under the root, or a biased half (`base_name`).

    Raises:
        ValueError: it does not; the message has the nearest that does.
    """
    root = data_root(root)
    folders = sorted(path.name for path in root.iterdir() if halves_of(path)) if root.is_dir() else []
    known = list(dict.fromkeys(["digits", "digits-hard", *ARCHIVES, *folders]))
    base = base_name(name)
    streamed = base.rpartition("@")[0] in folders
    if not (streamed or {name, base} & set(known)) or not re.fullmatch(r"\w[\w.-]*(@[1-9]\d{0,3})?", base, re.ASCII):
        known += [f"{folder}@224" for folder in folders]
        halves = [f"{each}-{which}80" for which in ("first", "last") for each in known]
        raise ValueError(
            f"unknown data set {name!r}; the nearest is {nearest(name, known + halves)!r} (known: {', '.join(known)}, "
            "and of each the biased halves NAME-first80 and NAME-last80, with 51 to 99 for 80); your own goes into "
            f"{root / (base.partition('@')[0] or 'NAME')}/{{train,test}}/<class>/, or under another root: set "
            "REPAIRLIB_DATA"
        )
    return name


def load(
    name: str, root: str | Path | None = None, device: str | torch.device = "cpu", download: bool = True
) -> Dataset:
    """Load a data set by name onto a device.

    Args:
        name: digits, digits-hard (the same in disorder, see `clutter`), mnist, fashionmnist, svhn, cifar10, cifar100,
            or the name of an image folder under the root; an image folder of that name wins over everything else. Or an
            image folder's name and a side in pixels, imagenet@224: images of any size, decoded when they are drawn and
            normalised by ImageNet's mean and std. Or a biased half of one of these, see `base_name`.
        root: where data sets are; default $REPAIRLIB_DATA, else `data` in the checkout. It may be read-only.
        device: where the tensors go, or batches of a streamed folder.
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
    folder, _, side = name.partition("@")
    if name != base_name(name) and not halves_of(root / name):
        whole = load(base_name(name), root, device, download)
        # Mean and std stay those of the whole training set: networks of both halves must see the same pixels alike, as
        # their weights are averaged.
        return replace(whole, name=name, train=_biased_half(whole, HALF.search(name)))
    if side:
        train, test = stream_folder(root / folder, int(side))
        return Dataset(name, train, test, int(train.labels.max()) + 1, MEAN, STD).to(device)
    if halves_of(root / name):
        train, test = (Split(*half) for half in read_folder(root / name))
    elif name == "digits":
        train, test = _read_digits()
    elif name == "digits-hard":
        train, test = (clutter(half, seed) for seed, half in enumerate(_read_digits()))
    else:
        train, test = _read_archive(name, root, download)
    mean, std = _pixel_statistics(train.images)
    return Dataset(name, train, test, int(train.labels.max()) + 1, mean, std).to(device)


def augment(
    images: Tensor, names: Sequence[str], generator: torch.Generator, place: tuple[int, int] | None = None
) -> Tensor:
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
        place: (i, m) if these are images i, i + 1... of a batch of m, and get the draws that they get there.

    Raises:
        ValueError: unknown name.
    """
    n, _, height, width = images.shape
    first, total = place or (0, n)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (total,), generator=generator)[first : first + n].to(images.device)

    def uniform(low: float, high: float) -> Tensor:
        drawn = low + (high - low) * torch.rand(total, generator=generator)
        return drawn[first : first + n].to(images.device)

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
class Loader:
    """A pass over images, which can be repeated: every iteration gives the same batches (see `iterate`)."""

    split: Split | Stream
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    augment: tuple[str, ...]
    shuffle: bool
    drop_last: bool
    seed: int
    part: tuple[int, int]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.split.device
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        gain, shift = 1 / (255 * std), -mean / std
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.split), generator=generator).to(device) if self.shuffle else None
        # Each batch whole as (start, stop), and the part of it that is drawn.
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        whole = [(start, min(start + self.batch_size, len(self.split))) for start in starts]
        parts = [slice(*(a + (b - a) * (self.part[0] + i) // self.part[1] for i in (0, 1))) for a, b in whole]
        drawn = self.split.draw(
            parts if order is None else (order[part] for part in parts),
            self.seed if set(self.augment) & set(self.split.own) else None,
        )
        names = [name for name in self.augment if name not in self.split.own]
        for (start, stop), part, (images, labels) in zip(whole, parts, drawn, strict=True):
            x = augment(images, names, generator, (part.start - start, stop - start))
            yield torch.addcmul(shift, x.float(), gain), labels


def iterate(
    dataset: Dataset,
    split: str = "train",
    batch_size: int = 500,
    augment: Sequence[str] = (),
    generator: torch.Generator | None = None,
    shuffle: bool = False,
    limit: int | None = None,
    drop_last: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Loader:
    """Return batches (x, y): x float32 [b, c, h, w] normalised per channel, y int64 [b].

    Args:
        dataset: of `load`.
        split: "train" or "test".
        batch_size: images in a batch; the last may have fewer.
        augment: names, see `augment`.
        generator: on the CPU; one number is drawn from it, the seed of this pass (0 without it), so calling again with
            the same generator gives another pass, while iterating twice over one result gives the same pass twice.
        shuffle: draw a random order.
        limit: use only so many images, drawn by a fixed seed: a fair sample, always the same one. Of a streamed folder
            it stays in memory once it is decoded, up to 1 GiB of pixels.
        drop_last: leave out a last batch that is not full.
        part: (i, n) draws only the i-th of n equal parts of each batch, from 0, as one of n processes must.

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
    half = getattr(dataset, split)
    if limit is not None and limit < len(half):
        sample = torch.randperm(len(half), generator=torch.Generator().manual_seed(0))[:limit]
        half = half.take(sample)
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
    return Loader(half, dataset.mean, dataset.std, batch_size, tuple(augment), shuffle, drop_last, seed, part)


def _biased_half(whole: Dataset, half: re.Match) -> Split | Stream:
    """Return the training images of a biased half, in the order of the whole; see `base_name`."""
    random, labels = np.random.RandomState(0), whole.train.labels.cpu().numpy()  # whose stream is frozen
    first = np.zeros(len(labels), dtype=bool)
    for label in range(whole.classes):
        members = random.permutation(np.flatnonzero(labels == label))
        percent = int(half[2]) if label < whole.classes // 2 else 100 - int(half[2])
        first[members[: round(len(members) * percent / 100)]] = True
    return whole.train.take(torch.from_numpy(np.flatnonzero(first if half[1] == "first" else ~first)))


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
