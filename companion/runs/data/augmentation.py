"""Random changes of images, made for a whole batch where it is."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repairlib.names import check

AUGMENTATIONS = ("translate", "flip", "cutout", "resize", "rotate", "resized-crop")


def draw(names: Sequence[str], shape: Sequence[int], n: int, generator: torch.Generator) -> list[Tensor]:
    """Draw what `apply` needs to augment a batch of n images.

    Args:
        names: see `augment`.
        shape: of one image, (c, h, w).
        n: images in the batch.
        generator: on the CPU, where the draws stay; so they are the same on every device.

    Returns:
        A tensor [n] for each random number of an image, in the order that `apply` takes them.

    Raises:
        ValueError: unknown name.
    """
    _, height, width = shape

    def whole(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    drawn = []
    for name in names:
        if name == "translate":
            drawn += [whole(2 * (height // 8) + 1), whole(2 * (width // 8) + 1)]
        elif name == "flip":
            drawn += [whole(2)]
        elif name == "cutout":
            drawn += [whole(height), whole(width)]
        elif name == "resize":
            drawn += [uniform(0.8, 1.2), uniform(-1, 1), uniform(-1, 1)]
        elif name == "rotate":
            drawn += [uniform(-math.pi / 6, math.pi / 6)]
        elif name == "resized-crop":
            drawn += [uniform(0.08, 1), uniform(math.log(3 / 4), math.log(4 / 3)), uniform(-1, 1), uniform(-1, 1)]
        else:
            check(name, AUGMENTATIONS, "augmentation")
    return drawn


def apply(images: Tensor, names: Sequence[str], drawn: Iterable[Tensor]) -> Tensor:
    """Augment a batch [n, c, h, w] where it is, by numbers that `draw` drew, [n] each, on the same device."""
    n, _, height, width = images.shape
    drawn = iter(drawn)
    for name in names:
        if name == "translate":
            pad_y, pad_x = height // 8, width // 8
            # Every crop as a strided view [n, c, 2 pad_y + 1, 2 pad_x + 1, h, w]: choosing one per image is one index.
            crops = F.pad(images, (pad_x, pad_x, pad_y, pad_y)).unfold(2, height, 1).unfold(3, width, 1)
            images = crops[torch.arange(n, device=images.device), :, next(drawn), next(drawn)]
        elif name == "flip":
            images = torch.where(next(drawn).bool()[:, None, None, None], images.flip(3), images)
        elif name == "cutout":
            rows, columns = (_square(next(drawn), side, images.device) for side in (height, width))
            images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
        elif name == "resize":
            side = 1 / next(drawn)  # of the window that is seen, in sides of the image
            images = warp(images, side, side, (1 - side) * next(drawn), (1 - side) * next(drawn))
        elif name == "rotate":
            images = warp(images, angle=next(drawn))
        else:  # resized-crop
            area, ratio = next(drawn), next(drawn).exp()
            across, down = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
            images = warp(images, across, down, (1 - across) * next(drawn), (1 - down) * next(drawn))
    return images


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
        generator: on the CPU, see `draw`.

    Raises:
        ValueError: unknown name.
    """
    drawn = draw(names, images.shape[1:], len(images), generator)
    return apply(images, names, [each.to(images.device) for each in drawn])


def warp(
    images: Tensor, across: Tensor | float = 1.0, down: Tensor | float = 1.0,
    x: Tensor | float = 0.0, y: Tensor | float = 0.0, angle: Tensor | float = 0.0,
) -> Tensor:  # fmt: skip
    """Cut a window out of each image, and resize it to the image's size.

    Args:
        images: [n, c, h, w]; outside of them there are zeros.
        across, down: width and height of the window, in sides of the image; [n] or one number, as all that follow.
        x, y: its centre, in half sides from the image's middle.
        angle: by which it is turned, in radians.

    Returns:
        Images of the same shape and type, interpolated bilinearly.
    """
    height, width = images.shape[2:]

    def each(value: Tensor | float) -> Tensor:  # a number is filled in on the device, as copying it would wait
        return value if isinstance(value, Tensor) else torch.full((len(images),), value, device=images.device)

    angle = each(angle)
    cos, sin = angle.cos(), angle.sin()
    # Coordinates run from -1 to 1 along both sides, so that turning an oblong image changes their units.
    rows = ((across * cos, -down * sin * (height / width), x), (across * sin * (width / height), down * cos, y))
    theta = torch.stack([torch.stack([each(value) for value in row], 1) for row in rows], 1)
    pixels = images if images.is_floating_point() else images.float()
    grid = F.affine_grid(theta.to(pixels.dtype), list(images.shape), align_corners=False)
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return seen if images.is_floating_point() else seen.round().to(images.dtype)


def _square(centre: Tensor, side: int, device: torch.device) -> Tensor:
    """Mark the side // 4 positions around each centre: bool [n, side]."""
    offset = torch.arange(side, device=device) - centre[:, None] + side // 8
    return (offset >= 0) & (offset < max(1, side // 4))
