"""Decoding of everything that is not JPEG, by Pillow, to 8-bit RGB."""

import io
import re
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.errors import Rejected
from models.imaging.orientation import exif_orientation
from models.records import Status

# The size of every image is checked against our own limit before a pixel is decoded. Pillow's limit is a second one,
# for the whole process, that warns at 89 megapixels and refuses at twice as many.
Image.MAX_IMAGE_PIXELS = None

# Decoding runs in threads, where `warnings.catch_warnings` is not safe; what Pillow would say ends in the image's row.
_QUIET: Any = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_PNG_END = b"IEND\xaeB`\x82"  # the last chunk and its checksum, always the same

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


def open_image(data: bytes, format_name: str) -> Image.Image:
    """Reads the header only, by the one decoder named. Raises Rejected (corrupt), MemoryError."""
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    if format_name == "PNG" and _PNG_END not in data:  # Pillow is content with all pixels
        raise Rejected(Status.CORRUPT, "PNG: it is cut off before its end")
    try:
        return Image.open(io.BytesIO(data), formats=[format_name])
    except UnidentifiedImageError as error:  # its own words hold an address in memory, which no two runs share
        raise Rejected(Status.CORRUPT, f"{format_name}: its header cannot be read") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins let whatever their parsing meets escape
        raise Rejected(Status.CORRUPT, f"{format_name}: {_one_line(error)}") from error


def decode_image(image: Image.Image) -> tuple[NDArray[np.uint8], int]:
    """Pixels [height, width, 3] as stored, and the orientation still to be applied.

    Raises Rejected (corrupt), MemoryError.
    """
    name = image.format
    try:
        image.load()
        orientation = exif_orientation(image.info.get("exif") or b"")
        return np.ascontiguousarray(_to_rgb(image)), orientation
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise Rejected(Status.CORRUPT, f"{name}: {_one_line(error)}") from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in _SIXTEEN_BIT or image.mode in ("I", "F"):
        grey = _scale_to_8_bits(np.asarray(image))  # [height, width]
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[np.asarray(image) == key] = 255
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)  # [height, width, 3]
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(with_alpha, mask=with_alpha)
        return np.asarray(white)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scale_to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Unsigned 16-bit by its full range.

    For 32-bit integers and floats there is none that all agree on: the smallest usual one that holds the maximum.
    """
    if values.dtype.kind == "u":
        return (values >> 8).astype(np.uint8)
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(finite.max())
    usual = (255.0, 65535.0) if values.dtype.kind == "i" else (1.0, 255.0, 65535.0)
    full = next((limit for limit in usual if highest <= limit), highest)
    return (np.clip(finite / full, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
