"""Antialiased resizing of uint8 pixels: within one grey level of Pillow's `Image.resize`, and for bicubic equal to it.

Equal, that is, where Pillow begins with the width, as older versions do; version 13 begins with the side that shrinks
more. Answers must not depend on its version, so here the order is the old one, also where Pillow is used.

A JPEG is always decoded at its full size first. Decoding at 1/2, 1/4 or 1/8 (DCT scaling) is quicker, but no margin was
found that keeps it within a level. Largest difference in levels, and how much larger than the short side of the result
the reduced image still was, over 60 wallpapers of 1 to 18 megapixels and synthetic noise, chequers and chroma edges:
at 1/2: 21 (2.4×), 8 (3.2×), 6 (5.6×), 2 (7×); at 1/4: 61 (1×), 14 (2.1×), 10 (2.8×), 6 (3.1×), 4 (3.5×); at 1/8: 114
(0.5×), 37 (1.6×), 18 (1.8×). A box filter over the blocks is not the triangle that the models were trained with.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.imaging.geometry import Interpolation, Span

try:
    import models.imaging._resize as _resize
except ImportError:  # installed where there was no compiler: slower, and the same pixels within a level
    _resize = None  # type: ignore[assignment]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_WHOLE_PIXELS = 64_000_000


def resize(
    pixels: NDArray[np.uint8],
    y: Span,
    x: Span,
    interpolation: Interpolation,
    out: NDArray[np.uint8],
    *,
    lying: bool = False,
) -> None:
    """Fills `out` [y.count, x.count, 3] from C-contiguous `pixels` [y.source, x.source, 3].

    lying: the pixels are stored with rows and columns exchanged. It matters to bicubic, whose first pass rounds and
    clips what the second one sees: it has to be the same pass as for the upright image.
    """
    if _resize is None:
        resize_with_pillow(pixels, y, x, interpolation, out, lying=lying)
        return
    tall, wide = (x, y) if lying else (y, x)
    strip = _is_strip(tall, wide)
    _resize.resize(
        pixels,
        (y.source, x.source),
        (y.scaled, y.start, y.count),
        (x.scaled, x.start, x.count),
        interpolation == "bicubic",
        strip != lying,
        out,
    )


def resize_with_pillow(
    pixels: NDArray[np.uint8],
    y: Span,
    x: Span,
    interpolation: Interpolation,
    out: NDArray[np.uint8],
    *,
    lying: bool = False,
) -> None:
    """The same without the compiled kernel."""
    if lying and interpolation == "bicubic":
        pixels, y, x, out = np.ascontiguousarray(pixels.transpose(1, 0, 2)), x, y, out.transpose(1, 0, 2)
    image = Image.frombuffer("RGB", (x.source, y.source), pixels, "raw", "RGB", 0, 1)
    if x.scaled * max(y.scaled, y.source) <= _WHOLE_PIXELS:
        if interpolation == "bicubic" and not _is_strip(y, x):
            image = image.resize((x.scaled, y.source), _FILTERS[interpolation])
        whole = np.asarray(image.resize((x.scaled, y.scaled), _FILTERS[interpolation]))
        out[:] = whole[y.start : y.start + y.count, x.start : x.start + x.count]
    else:  # of a long strip only the middle is wanted
        (left, right), (top, bottom) = _box_side(x), _box_side(y)
        out[:] = np.asarray(image.resize((x.count, y.count), _FILTERS[interpolation], box=(left, top, right, bottom)))


def _is_strip(y: Span, x: Span) -> bool:
    """Whether the first pass is along the height. Else along the width, as in older versions of Pillow."""
    return y.source > 100 * x.source and y.scaled < y.source


def _box_side(span: Span) -> tuple[float, float]:
    """Where the kept pixels lie in the source; Pillow refuses a box that rounding has pushed over the edge."""
    end = span.source * (span.start + span.count) / span.scaled
    return span.source * span.start / span.scaled, min(end, float(span.source))
