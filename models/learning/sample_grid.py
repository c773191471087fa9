"""Made images on one sheet, to be looked at."""

import numpy as np
from numpy.typing import NDArray

_COLUMNS = 8
_GAP = 2  # pixels


def grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """images [n, height, width, 3] → [rows, columns, 3], eight in a row, with white lines between."""
    count, height, width, _ = images.shape
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet
