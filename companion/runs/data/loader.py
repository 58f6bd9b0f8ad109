"""Batches of a data set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import torch
from torch import Tensor

from companion.runs.data.augmentation import AUGMENTATIONS, apply, draw
from companion.runs.data.folders import Stream
from companion.runs.data.registry import Dataset, Split
from repairlib.names import check


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
    skip: int = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last) - self.skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.split.device
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        gain, shift = 1 / (255 * std), -mean / std
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.split), generator=generator).to(device) if self.shuffle else None
        # Each batch whole as (start, stop), and the part of it that is drawn.
        starts = range(0, (self.skip + len(self)) * self.batch_size, self.batch_size)
        whole = [(start, min(start + self.batch_size, len(self.split))) for start in starts]
        parts = [slice(*(a + (b - a) * (self.part[0] + i) // self.part[1] for i in (0, 1))) for a, b in whole]
        drawn = self.split.draw(
            parts[self.skip :] if order is None else (order[part] for part in parts[self.skip :]),
            self.seed if set(self.augment) & set(self.split.decode_time_augmentations) else None,
        )
        names = [name for name in self.augment if name not in self.split.decode_time_augmentations]
        changes = self._changes(names, [stop - start for start, stop in whole], generator)
        some = slice(self.skip, None)  # the others' augmentation is drawn, too, so that these have the same as ever
        for (start, _), part, change, (images, labels) in zip(
            whole[some], parts[some], islice(changes, self.skip, None), drawn, strict=True
        ):
            x = apply(images, names, [each[part.start - start : part.stop - start] for each in change])
            yield torch.addcmul(shift, x.float(), gain), labels

    def _changes(self, names: list[str], sizes: list[int], generator: torch.Generator) -> Iterator[Sequence[Tensor]]:
        """What changes the images of each batch: drawn batch by batch, moved to the device at once.

        A copy makes the processor wait for the device, so that one in every step would slow training down.
        """
        batches = [draw(names, self.split.shape, size, generator) for size in sizes]
        moved = [torch.cat(each).to(self.split.device).split(sizes) for each in zip(*batches, strict=True)]
        return zip(*moved, strict=True) if moved else repeat((), len(sizes))


def iterate(
    dataset: Dataset,
    split: str = "train",
    batch_size: int | None = None,
    augment: Sequence[str] = (),
    generator: torch.Generator | None = None,
    shuffle: bool = False,
    limit: int | None = None,
    drop_last: bool = False,
    part: tuple[int, int] = (0, 1),
    skip: int = 0,
) -> Loader:
    """Draw batches (x, y): x float32 [b, c, h, w] normalised per channel, y int64 [b].

    Args:
        dataset: of `load`.
        split: "train" or "test".
        batch_size: images in a batch; the last may have fewer. Default: 500; on a CPU as many as have 100,000 pixels,
            10 to 500.
        augment: names, see `augment`.
        generator: on the CPU; one number is drawn from it, the seed of this pass (0 without it), so calling again with
            the same generator gives another pass, while iterating twice over one result gives the same pass twice.
        shuffle: draw a random order.
        limit: use only so many images, drawn by a fixed seed: a fair sample, always the same one. A sample of a
            streamed folder stays in memory once it is decoded, up to 1 GiB of pixels.
        drop_last: leave out a last batch that is not full.
        part: (i, n) draws only the i-th of n equal parts of each batch, from 0, as one of n processes must.
        skip: batches at the beginning that are left out; the others are as they would be after them.

    Raises:
        ValueError: unknown split or augmentation, or a size below 1.

    >>> from companion.runs.data import load
    >>> digits = load("digits")
    >>> [len(y) for x, y in iterate(digits, "test", batch_size=150)]
    [150, 150, 100]
    """
    check(split, ("train", "test"), "split")
    for name in augment:
        check(name, AUGMENTATIONS, "augmentation")
    if batch_size is None:
        # 64 channels of so many pixels are 26 MB. Above 32 MB, memory is mapped anew for each layer, page by page.
        fitting = 102_400 // (dataset.shape[1] * dataset.shape[2])
        batch_size = min(max(fitting, 10), 500) if dataset.device.type == "cpu" else 500
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit are at least 1, not {batch_size} and {limit}")
    half = getattr(dataset, split)
    if limit is not None and limit < len(half):
        sample = torch.randperm(len(half), generator=torch.Generator().manual_seed(0))[:limit]
        half = half.take(sample)
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
    return Loader(half, dataset.mean, dataset.std, batch_size, tuple(augment), shuffle, drop_last, seed, part, skip)
