"""How well the outlines of a map of classes follow the true ones.

Boundary F1: Csurka et al., What is a good evaluation measure for semantic segmentation?, BMVC 2013, section 3. Of the
pixels of a class that border on another one, precision is the share that lies near a true one, and recall the share of
the true ones that lies near one that was found; near is within .75 % of the image's diagonal, as there.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.0075  # of the image's diagonal
LEAST_TOLERANCE = 1.0  # pixels: masks of small images are no more exact


class Border(NamedTuple):
    """The pixels of a map that have another class above, below, left or right of them."""

    column: NDArray[np.int64]  # [n], ascending
    row: NDArray[np.int64]  # [n], ascending within a column
    value: NDArray[np.uint8]  # [n]

    def of(self, value: int) -> "Border":
        """Those of one class."""
        chosen = self.value == value
        return Border(self.column[chosen], self.row[chosen], self.value[chosen])


def border(columns: NDArray[np.uint8], is_judged: NDArray[np.bool_]) -> Border:
    """Of a map that lies column by column [width, height]; neither the image's edge nor what is not judged has any."""
    found = np.zeros(columns.shape, bool)
    for one, other in (
        ((slice(1, None), slice(None)), (slice(None, -1), slice(None))),
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
    ):
        differ = (columns[one] != columns[other]) & is_judged[one] & is_judged[other]
        found[one] |= differ
        found[other] |= differ
    column, row = np.nonzero(found)
    return Border(column, row, columns[column, row])


def boundary_f1(true: Border, found: Border, height: int, width: int) -> float | None:
    """Of one class in one image, 0 to 1; None where neither has a border."""
    if not len(true.row) and not len(found.row):
        return None
    distance = max(TOLERANCE * math.hypot(height, width), LEAST_TOLERANCE)
    precision, recall = _share_near(found, true, distance), _share_near(true, found, distance)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_near(pixels: Border, others: Border, distance: float) -> float:
    """The share of pixels that have one of the others within a distance, in pixels; 0 where there are none of either.

    Column by column around each pixel, its own first: the others of a column are a stretch of one sorted list, and most
    pixels find one at once.
    """
    if not len(pixels.row) or not len(others.row):
        return 0.0
    reach = int(distance)
    stride = int(max(pixels.row.max(), others.row.max())) + 2 * reach + 2  # rows of two columns never come near
    sorted_others = others.column * stride + others.row
    left = pixels.column * stride + pixels.row  # of those that have found none
    for step in sorted(range(-reach, reach + 1), key=abs):
        half = math.isqrt(int(distance**2 - step**2))
        place = np.searchsorted(sorted_others, left + step * stride - half)
        next_other = sorted_others[np.minimum(place, len(sorted_others) - 1)]
        is_near = (next_other >= left + step * stride - half) & (next_other <= left + step * stride + half)
        left = left[~is_near]
        if not len(left):
            break
    return 1 - len(left) / len(pixels.row)
