"""One mask file as run-length masks, one for each value or colour that its pixels have."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import Rejected
from models.imaging import masks
from models.imaging.header import sniff
from models.imaging.pillow_decode import open_image

MOST_VALUES = 256
MOST_PIXELS = 100_000_000

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


class BadMask(Exception):
    """A mask that cannot be read: the reason, and the detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class NeedsColours(BadMask):
    """A mask in colours, without a list that says what they are."""


@dataclass(frozen=True)
class MaskValues:
    """What a mask file holds: counts by value (colours: r·65536 + g·256 + b)."""

    size_hw: tuple[int, int]
    counts: dict[int, str]
    is_colour: bool


def read_mask(data: bytes, *, has_colours: bool) -> MaskValues:
    """The mask of a file. `has_colours`: the class list gives colours, so a palette stands for its colours.

    Bilevel masks have the values 0 and 255. Raises BadMask.
    """
    pixels, is_colour = _pixels(data, has_colours)
    values = np.unique(pixels)
    if len(values) > MOST_VALUES:
        what = "colours" if is_colour else "values"
        raise BadMask("too many values", f"{len(values)} {what} in one mask: is it a photograph, or instance numbers?")
    height, width = pixels.shape
    counts = {int(value): masks.encode(pixels == value) for value in values}
    return MaskValues((height, width), counts, is_colour)


def _pixels(data: bytes, has_colours: bool) -> tuple[NDArray[Any], bool]:
    """Values [height, width], and whether they are colours."""
    try:
        name = sniff(data)
        if name == "JPEG":
            raise BadMask("lossy mask", "JPEG changes the values of pixels: save masks as PNG")
        image = open_image(data, name)
        if image.width * image.height > MOST_PIXELS:
            raise BadMask("mask too large", f"{image.width}×{image.height} pixels")
        image.load()
    except Rejected as rejected:
        raise BadMask("unreadable mask", rejected.reason) from None
    except (BadMask, MemoryError):
        raise
    except Exception as error:  # Pillow's plug-ins let whatever their parsing meets escape
        raise BadMask("unreadable mask", f"{name}: {' '.join(str(error).split())[:200]}") from None
    return _values(image, has_colours)


def _values(image: Image.Image, has_colours: bool) -> tuple[NDArray[Any], bool]:
    mode = image.mode
    if mode == "1":
        return np.asarray(image.convert("L")), False
    if mode == "P" and not has_colours:
        return np.asarray(image), False
    if mode in ("L", "LA", "La", *_SIXTEEN_BIT):
        values = np.asarray(image)
        return (values[..., 0] if values.ndim == 3 else values), False
    if mode == "I":
        return np.asarray(image), False
    if mode not in ("P", "PA", "RGB", "RGBA", "RGBX"):
        raise BadMask("unreadable mask", f"pixels of the kind {mode} are neither indices nor colours")
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.uint32), 2, 0)  # each [height, width]
    if has_colours:
        return red << 16 | green << 8 | blue, True
    if (red == green).all() and (red == blue).all():
        return red, False
    raise NeedsColours("colours without a list", "give a table of name, r, g, b with --annotations")
