"""Several images in one, for detectors: a mosaic of four, two mixed, and an image warped; the objects follow.

A mosaic (Bochkovskiy et al., YOLOv4, arXiv 2004.10934, section 3.4) shows objects beside others than their own and at
other scales; mix-up (Zhang et al., arXiv 1710.09412, for detectors as in YOLOX, arXiv 2107.08430) shows two images at
once. What is drawn at random comes from the generator that is given.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from models.imaging.geometry import ResizeRule
from models.learning.moved_objects import Objects, cut_out, joined, pasted, warped

_CENTRE = 0.25, 0.75  # between which shares of a side the four images of a mosaic meet
_BLEND = 32.0  # of the Beta distribution of the share of each of two mixed images: nearly halves, so that both are seen


class Shown(NamedTuple):
    """An image and its objects."""

    image: Tensor  # uint8 [3, height, width]
    target: Objects


def mosaic(
    drawn: Generator, four: Sequence[Shown], rule: ResizeRule, enlarged: float, scales: tuple[float, float]
) -> Shown:
    """Parts of four images that meet in a point, as one image by `rule`.

    four: without padding, each prepared at `enlarged` times the size that it has in use. scales: between which an image
    is shown, by the size that it has in use. Each is resized once, from just the pixels that are seen.
    """
    size_hw = rule.height, rule.width
    middle_y, middle_x = (round(size * drawn.uniform(*_CENTRE)) for size in size_hw)
    canvas = four[0].image.new_empty((*size_hw, 3)).permute(2, 0, 1)  # [3, height, width], as images lie in memory
    canvas[:] = canvas.new_tensor(rule.pad_rgb)[:, None, None]
    targets = []
    for number, (image, target) in enumerate(four):
        is_lower, is_right = divmod(number, 2)
        scale = drawn.uniform(*scales) / enlarged
        y, out_y = _seen(drawn, image.shape[1], scale, middle_y, size_hw[0], bool(is_lower))
        x, out_x = _seen(drawn, image.shape[2], scale, middle_x, size_hw[1], bool(is_right))
        out_hw = out_y.stop - out_y.start, out_x.stop - out_x.start
        canvas[:, out_y, out_x] = F.resize(
            image[:, y, x], list(out_hw), InterpolationMode(rule.interpolation), antialias=True
        )
        part = cut_out(target, y.start, x.start, y.stop - y.start, x.stop - x.start, out_hw)
        targets.append(pasted(part, out_y.start, out_x.start, size_hw))
    return Shown(canvas, joined(targets))


def mixed_up(drawn: Generator, one: Shown, other: Shown) -> Shown:
    """Both images, one shining through the other, with the objects of both."""
    share = drawn.beta(_BLEND, _BLEND)
    image = torch.lerp(one.image.float(), other.image.float(), share).round_().to(torch.uint8)
    return Shown(image, joined([one.target, other.target]))


def random_warp(drawn: Generator, degrees: float, shear: float, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """A turn by up to ± `degrees` and a shear by up to ± `shear` degrees along both sides, around the centre, as a
    matrix [2, 3]: where a point (x, y, 1) comes to lie."""
    angle, shear_x, shear_y = (math.radians(most * drawn.uniform(-1, 1)) for most in (degrees, shear, shear))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.array([[1.0, math.tan(shear_x)], [math.tan(shear_y), 1.0]])
    centre = np.array([size_hw[1] / 2, size_hw[0] / 2])
    return np.column_stack([linear, centre - linear @ centre])


def warp(shown: Shown, matrix: NDArray[np.float64], pad_rgb: tuple[int, int, int]) -> Shown:
    """An image warped in place, bilinearly; what comes from outside is `pad_rgb`."""
    image, target = shown
    size_hw = image.shape[1], image.shape[2]
    linear = np.linalg.inv(matrix[:, :2])
    back = np.column_stack([linear, -linear @ matrix[:, 2]])
    pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    turned = pixels.transform(
        pixels.size, Image.Transform.AFFINE, tuple(back.flatten()), Image.Resampling.BILINEAR, fillcolor=pad_rgb
    )
    return Shown(torch.from_numpy(np.array(turned)).permute(2, 0, 1), warped(target, matrix, size_hw))


def _seen(
    drawn: Generator, size: int, scale: float, middle: int, out_size: int, is_second: bool
) -> tuple[slice, slice]:
    """Along one side: the pixels of an image of `size` that are seen, and where they come to lie.

    They fill the side from the middle to its own end as far as they reach; of a longer image any part is seen.
    """
    room = out_size - middle if is_second else middle
    length = min(max(1, round(room / scale)), size)
    start = int(drawn.integers(size - length + 1))
    out_length = room if length < size else min(max(1, round(length * scale)), room)
    out_start = middle if is_second else middle - out_length
    return slice(start, start + length), slice(out_start, out_start + out_length)
