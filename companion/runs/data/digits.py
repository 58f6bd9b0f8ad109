"""scikit-learn's digits, and the same made harder."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.runs.data.augmentation import warp
from companion.runs.data.registry import Facts, Source, Split, register

TEST = 400  # images of scikit-learn's 1,797 kept for testing


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
    test, train = order[:TEST].sort().values, order[TEST:].sort().values
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def clutter(split: Split, seed: int) -> Split:
    """Make a harder version of every image of a half, in the same order and under the same label.

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
        return warp(images, 1 / size, 1 / size, (y * sin - x * cos) / size, -(x * sin + y * cos) / size, angle)

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


def _read_hard() -> tuple[Split, Split]:
    train, test = (clutter(half, seed) for seed, half in enumerate(_read_digits()))
    return train, test


FACTS = Facts(1797 - TEST, TEST, (1, 16, 16), 10)
register(Source("digits", lambda root, download: _read_digits(), FACTS, "digits", upright=True))
register(Source("digits-hard", lambda root, download: _read_hard(), FACTS, "harder digits", upright=True))
