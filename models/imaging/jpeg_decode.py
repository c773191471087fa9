"""Decoding of JPEG to 8-bit RGB, strictly: a decoder that repairs what it can passes rotten files as pictures."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from models.errors import Rejected
from models.imaging.jpeg_header import JpegHeader
from models.records import Status


def decode_jpeg(data: bytes, header: JpegHeader, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels [height, width, 3] as stored, in `buffer`, which holds at least height·width·components bytes.

    Raises Rejected (corrupt), also where only the middle of the file is damaged.
    """
    space = "CMYK" if header.components == 4 else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(data, space, buffer=buffer, strict=True)
    except MemoryError as error:
        raise Rejected(Status.CORRUPT, "JPEG: needs more memory than there is") from error
    except ValueError as error:
        raise Rejected(Status.CORRUPT, f"JPEG: {error}") from error
    return _cmyk_to_rgb(pixels) if space == "CMYK" else pixels


def _cmyk_to_rgb(inverted: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[height, width, 4] as Adobe stores it, where 255 is no ink; every CMYK JPEG in the wild is written so."""
    rgb = np.empty((*inverted.shape[:2], 3), np.uint8)
    for row, target in zip(
        inverted, rgb, strict=True
    ):  # by rows: 16-bit copies of the whole would cost five times its size
        target[:] = (row[:, :3].astype(np.uint16) * row[:, 3:] + 127) // 255
    return rgb
