"""EXIF orientation: reading the tag, and turning pixels the right way up.

Source: CIPA DC-008 (Exif 2.32), section 4.6.4, tag 274; the layout is TIFF 6.0, section 2.
"""

import struct

import numpy as np
from numpy.typing import NDArray

from models.imaging.geometry import Span

_ORIENTATION_TAG = 274
_SHORT = 3


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, that an Exif block states, with or without its `Exif` prefix; 1 where it states none.

    Never raises: a photograph with damaged metadata is still a photograph.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "4xI", block)
        (entries,) = struct.unpack_from(order + "H", block, directory)
        for index in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", block, directory + 2 + 12 * index)
            if tag == _ORIENTATION_TAG:
                return value if kind == _SHORT and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def swaps_sides(orientation: int) -> bool:
    """Whether width and height change places."""
    return orientation >= 5


def stored_spans_yx(y: Span, x: Span, orientation: int) -> tuple[Span, Span]:
    """The same resize for the pixels as they are stored: turning its small result is cheaper than turning the image."""
    if orientation in (3, 4, 7, 8):  # as `orient` mirrors them
        y = y.mirrored()
    if orientation in (2, 3, 6, 7):
        x = x.mirrored()
    return (x, y) if swaps_sides(orientation) else (y, x)


def orient(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of [height, width, 3] pixels the right way up; 5 to 8 swap height and width."""
    if swaps_sides(orientation):
        pixels = pixels.transpose(1, 0, 2)  # [width, height, 3]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
