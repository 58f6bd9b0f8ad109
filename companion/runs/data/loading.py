"""Find a data set by name, and read it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.runs.data.folders import MEAN, STD, Stream, halves_of, read_folder, stream_folder
from companion.runs.data.registry import DATASETS, Dataset, Split, data_root
from repairlib.names import nearest

HALF = re.compile(r"(?<=.)-(first|last)(5[1-9]|[6-9]\d)$")  # the end of the name of a biased half


def base_name(name: str) -> str:
    """The name of the data set that `name` is a biased half of; any other name as it is.

    The training set of `<base>-first<p>`, with p from 51 to 99, has a random p % of the images of each class in the
    first half of the classes and 100 - p % in the second; that of `<base>-last<p>` has all the others. The test set is
    the base's, whole. (Jordan et al. 2022, Sec. 5.4, with p = 80.)

    >>> base_name("cifar100-first80"), base_name("cifar100")
    ('cifar100', 'cifar100')
    """
    return HALF.sub("", name)


def check_name(name: str, root: str | Path | None = None) -> str:
    """Check that a name is that of a data set, an image folder under the root, or a biased half (`base_name`).

    Returns:
        The name.

    Raises:
        ValueError: it is none; the message has the nearest that is.
    """
    root = data_root(root)
    folders = sorted(path.name for path in root.iterdir() if halves_of(path)) if root.is_dir() else []
    known = list(dict.fromkeys([*(name for name, source in DATASETS.items() if source.read), *folders]))
    base = base_name(name)
    streamed = base.rpartition("@")[0] in folders
    if not (streamed or {name, base} & set(known)) or not re.fullmatch(r"\w[\w.-]*(@[1-9]\d{0,3})?", base, re.ASCII):
        folder = root / base.partition("@")[0]
        if (folder / "train").is_dir() and not halves_of(folder):
            raise ValueError(f"data set {name!r}: {folder} has train/ and neither test/ nor val/; it needs two halves, "
                             "each with a folder for every class")  # fmt: skip
        known += [f"{folder}@224" for folder in folders]
        halves = [f"{each}-{which}80" for which in ("first", "last") for each in known]
        raise ValueError(
            f"unknown data set {name!r}; the nearest is {nearest(name, known + halves)!r} (known: {', '.join(known)}, "
            "and of each the biased halves NAME-first80 and NAME-last80, with 51 to 99 for 80); your own goes into "
            f"{root / (base.partition('@')[0] or 'NAME')}/{{train,test}}/<class>/, or under another root: set "
            "REPAIRLIB_DATA"
        )
    return name


def is_there(name: str, root: str | Path | None = None) -> bool:
    """Whether a data set can be loaded without downloading it: an image folder, torchvision's files, or digits."""
    root, base = data_root(root), base_name(name).partition("@")[0]
    if halves_of(root / name) or halves_of(root / base):
        return True
    return base in DATASETS and DATASETS[base].is_there(root)


def load(
    name: str, root: str | Path | None = None, device: str | torch.device = "cpu", download: bool = True
) -> Dataset:
    """Load a data set by name onto a device.

    Args:
        name: one of `DATASETS`, or of an image folder under the root, which wins over the former. With a side in
            pixels, like imagenet@224: images of any size, decoded when they are drawn and normalised by ImageNet's mean
            and std. Or a biased half of one of these, see `base_name`.
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
    else:
        train, test = DATASETS[name].read(root, download)
    if name in DATASETS and DATASETS[name].sort:
        train, test = train.sorted(), test.sorted()
    mean, std = _pixel_statistics(train.images)
    return Dataset(name, train, test, int(train.labels.max()) + 1, mean, std).to(device)


def _biased_half(whole: Dataset, half: re.Match) -> Split | Stream:
    """The training images of a biased half, in the order of the whole; see `base_name`."""
    random, labels = np.random.RandomState(0), whole.train.labels.cpu().numpy()  # whose stream is frozen
    first = np.zeros(len(labels), dtype=bool)
    for label in range(whole.classes):
        members = random.permutation(np.flatnonzero(labels == label))
        percent = int(half[2]) if label < whole.classes // 2 else 100 - int(half[2])
        first[members[: round(len(members) * percent / 100)]] = True
    return whole.train.take(torch.from_numpy(np.flatnonzero(first if half[1] == "first" else ~first)))


def _pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of pixels / 255, exact (from integer histograms)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = [torch.bincount(channel.flatten(), minlength=256).double() for channel in images.unbind(1)]
    weights = torch.stack([w / w.sum() for w in weights])
    mean = weights @ values
    std = ((values - mean[:, None]) ** 2 * weights).sum(1).sqrt()
    std[std == 0] = 1  # a constant channel stays at zero instead of becoming NaN
    return tuple(mean.tolist()), tuple(std.tolist())


def title_of(name: str) -> str:
    """What pictures call a data set: CIFAR-10, CIFAR-10 first80; a name that is not registered as it is.

    >>> title_of("cifar10"), title_of("cifar100-last80"), title_of("imagenet@224")
    ('CIFAR-10', 'CIFAR-100 last80', 'ImageNet')
    """
    base = base_name(name).partition("@")[0]
    title = DATASETS[base].title or base if base in DATASETS else base
    return f"{title} {name.removeprefix(f'{base_name(name)}-')}" if base_name(name) != name else title
