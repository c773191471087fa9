"""From pixels to the bytes of an image file; the same pixels always give the same bytes."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import Rejected
from models.records import Status
from models.settings.fields import ImageFormat

SUFFIX: dict[ImageFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}

# PNG and WebP keep every pixel; a low effort of PNG is three times as fast and a few percent larger.
_OPTIONS: dict[ImageFormat, dict] = {
    "png": {"compress_level": 3},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"lossless": True, "method": 2},
}
_LONGEST_SIDE: dict[ImageFormat, int] = {"png": 2**31 - 1, "jpeg": 65_535, "webp": 16_383}


def encode(image: NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """The file of an RGB image [height, width, 3]. Raises Rejected where the format cannot hold one so long."""
    longest = max(image.shape[:2])
    if longest > _LONGEST_SIDE[image_format]:
        raise Rejected(
            Status.FAILED,
            f"{image_format} holds at most {_LONGEST_SIDE[image_format]:,} pixels a side, and this image has "
            f"{longest:,}: use --image-format png",
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, image_format, **_OPTIONS[image_format])
    return buffer.getvalue()
