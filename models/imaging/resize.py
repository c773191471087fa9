"""Antialiased resizing of uint8 pixels, equal to Pillow's within one grey level."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.imaging.geometry import Interpolation, Span

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(pixels: NDArray[np.uint8], y: Span, x: Span, interpolation: Interpolation, out: NDArray[np.uint8]) -> None:
    """Fills `out` [y.count, x.count, 3] from contiguous `pixels` [y.source, x.source, 3]."""
    _resize_with_pillow(pixels, y, x, interpolation, out)


def _resize_with_pillow(
    pixels: NDArray[np.uint8], y: Span, x: Span, interpolation: Interpolation, out: NDArray[np.uint8]
) -> None:
    left, right = (x.source * column / x.scaled for column in (x.start, x.start + x.count))
    top, bottom = (y.source * row / y.scaled for row in (y.start, y.start + y.count))
    image = Image.frombuffer("RGB", (x.source, y.source), pixels, "raw", "RGB", 0, 1)
    box = (left, top, min(right, x.source), min(bottom, y.source))
    out[:] = np.asarray(image.resize((x.count, y.count), _FILTERS[interpolation], box=box))
