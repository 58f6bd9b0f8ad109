"""Random changes of images, made for a whole batch where it is."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repairlib.names import check

AUGMENTATIONS = ("translate", "flip", "cutout", "resize", "rotate", "resized-crop")


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
        place: (i, m) if `images` are rows i, i + 1, ... of a batch of m; the draws are then those of the whole batch.

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
            rows = _square(draw(height), height, images.device)
            columns = _square(draw(width), width, images.device)
            images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
        elif name == "resize":
            side = 1 / uniform(0.8, 1.2)  # of the window that is seen, in sides of the image
            images = warp(images, side, side, (1 - side) * uniform(-1, 1), (1 - side) * uniform(-1, 1))
        elif name == "rotate":
            images = warp(images, angle=uniform(-math.pi / 6, math.pi / 6))
        elif name == "resized-crop":
            area, ratio = uniform(0.08, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
            across, down = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
            images = warp(images, across, down, (1 - across) * uniform(-1, 1), (1 - down) * uniform(-1, 1))
        else:
            check(name, AUGMENTATIONS, "augmentation")
    return images


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
    angle = torch.as_tensor(angle, device=images.device).expand(len(images))
    cos, sin = angle.cos(), angle.sin()
    # Coordinates run from -1 to 1 along both sides, so that turning an oblong image changes their units.
    rows = ((across * cos, -down * sin * (height / width), x), (across * sin * (width / height), down * cos, y))
    theta = torch.stack([torch.stack([torch.as_tensor(v).to(cos).expand_as(cos) for v in row], 1) for row in rows], 1)
    pixels = images if images.is_floating_point() else images.float()
    grid = F.affine_grid(theta.to(pixels.dtype), list(images.shape), align_corners=False)
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return seen if images.is_floating_point() else seen.round().to(images.dtype)


def _square(centre: Tensor, side: int, device: torch.device) -> Tensor:
    """Mark the side // 4 positions around each centre: bool [n, side]."""
    offset = torch.arange(side, device=device) - centre[:, None] + side // 8
    return (offset >= 0) & (offset < max(1, side // 4))
