"""From what a network says of pixels straight to the runs of COCO's code: no mask of the original's size is ever made.

A photograph of 24 megapixels with a hundred objects would need 2.4 GB of masks; their runs are some kilobytes, and the
work grows with the outline of an object instead of its area.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.imaging.geometry import Geometry, Rectangle
from models.imaging.masks import counts_of, runs_of


def paste_mask(
    mask: NDArray[np.float32],
    box_xyxy: NDArray[np.float64],
    height: int,
    width: int,
    shown_xyxy: Rectangle | None = None,
) -> tuple[str, int]:
    """COCO counts and area of the mask [m, m] of an object, stretched over its box in an image of this size.

    box_xyxy, in pixels, may reach out of the image, or of the part of it that was shown; what does is cut off. A pixel
    is on where the mask, interpolated bilinearly at the pixel's centre and zero outside the box, is over a half: as in
    torchvision's paste_masks_in_image, without its rounding of the box to whole pixels. Down a column of pixels the
    mask is linear between its own rows, so that the rows where it passes a half are found by a division.
    """
    m = len(mask)
    x_min, y_min, x_max, y_max = (float(side) for side in box_xyxy)
    shown_left, shown_top, shown_right, shown_bottom = shown_xyxy or (0, 0, width, height)
    first, last = _centres_inside(x_min, x_max, shown_left, shown_right)
    if last <= first or y_max <= y_min:
        return counts_of(np.array([height * width])), 0
    framed = np.zeros((m + 2, m + 2))
    framed[1:-1, 1:-1] = mask
    at = (np.arange(first, last) + 0.5 - x_min) * (m / (x_max - x_min)) + 0.5  # columns of the framed mask
    left = np.clip(at.astype(np.int64), 0, m)
    share = at - left
    values = framed.T[left] * (1 - share)[:, None] + framed.T[left + 1] * share[:, None]  # [columns, m + 2]
    is_on = values > 0.5
    column, node = np.nonzero(is_on[:, 1:] != is_on[:, :-1])  # down each column: on, off, on, off …
    above, below = values[column, node], values[column, node + 1]
    passes = node + (0.5 - above) / (below - above)  # rows of the framed mask
    rows = (passes - 0.5) * ((y_max - y_min) / m) + y_min - 0.5  # rows of the image, whole at a pixel's centre
    starts = np.clip(np.floor(rows[0::2]) + 1, shown_top, shown_bottom).astype(np.int64)
    ends = np.clip(np.ceil(rows[1::2]), shown_top, shown_bottom).astype(np.int64)
    before = (column[0::2] + first) * height
    return _encoded(before + starts, before + ends, height, width)


def segments_of_map(
    class_map: NDArray[np.uint8],  # [h, w] at the model's input; 0 is background
    geometry: Geometry,
) -> list[tuple[int, str, int]]:
    """(class, COCO counts, area) of every class but the background that the original image shows.

    Each pixel of the oriented original has the class of the pixel of the map that its centre falls into; where the
    input shows no such place, because a crop has cut it off, it is background. So are, of a tile, the pixels that are
    nearer to the centre of another tile.
    """
    height, width = geometry.height, geometry.width
    h, w = class_map.shape
    map_column = np.floor((np.arange(width) + 0.5) * geometry.scale_x + geometry.offset_x).astype(np.int64)
    map_row = np.floor((np.arange(height) + 0.5) * geometry.scale_y + geometry.offset_y).astype(np.int64)
    left, upper, right, lower = geometry.cell_xyxy
    map_column[:left] = map_column[right:] = -1
    # Of the original, at or behind the top of each map row.
    first_row = np.clip(np.searchsorted(map_row, np.arange(h + 1)), upper, lower)
    columns = np.ascontiguousarray(class_map.T)  # [w, h]
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    # Stretches of one class down the columns of the map.
    stretch_column = np.concatenate([np.arange(w), column])
    stretch_top = np.concatenate([np.zeros(w, np.int64), row + 1])
    order = np.lexsort((stretch_top, stretch_column))
    stretch_column, stretch_top = stretch_column[order], stretch_top[order]
    stretch_class = columns[stretch_column, stretch_top]
    is_last = np.append(stretch_column[1:] != stretch_column[:-1], True)
    stretch_bottom = np.where(is_last, h, np.append(stretch_top[1:], h))
    top, bottom = first_row[stretch_top], first_row[stretch_bottom]
    shown = np.flatnonzero((map_column >= 0) & (map_column < w))
    found = []
    for number in np.unique(stretch_class):
        if number == 0:
            continue
        of_class = np.flatnonzero((stretch_class == number) & (top < bottom))
        begin = np.searchsorted(stretch_column[of_class], np.arange(w + 1))  # of each map column, in of_class
        first, count = begin[map_column[shown]], np.diff(begin)[map_column[shown]]  # per column of the original
        total = int(count.sum())
        if total == 0:
            continue
        within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
        stretch = of_class[np.repeat(first, count) + within]
        before = np.repeat(shown, count) * height
        counts, area = _encoded(before + top[stretch], before + bottom[stretch], height, width)
        found.append((int(number), counts, area))
    return found


def united(counts: Sequence[str], height: int, width: int) -> tuple[str, int]:
    """Counts and area of the union of masks of one size. Raises ValueError as `masks.runs_of`."""
    edges = [np.cumsum(runs_of(one, height, width)) for one in counts]
    starts = np.concatenate([one[0:-1:2] for one in edges])
    ends = np.concatenate([one[1::2] for one in edges])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    return _encoded(np.maximum(starts, np.append(0, ends[:-1])), ends, height, width)


def _centres_inside(low: float, high: float, first: int, end: int) -> tuple[int, int]:
    """The pixels from `first` to before `end`, first and behind the last, whose centres lie between two coordinates."""
    return max(int(np.ceil(low - 0.5)), first), min(int(np.floor(high - 0.5)) + 1, end)


def _encoded(starts: NDArray[np.int64], ends: NDArray[np.int64], height: int, width: int) -> tuple[str, int]:
    """Counts and area of runs of pixels that are on, numbered down the columns, in order; some empty, some touching."""
    drawn = starts < ends
    starts, ends = starts[drawn], ends[drawn]
    apart = starts[1:] > ends[:-1]
    starts = starts[np.concatenate(([True], apart))] if len(starts) else starts
    ends = ends[np.concatenate((apart, [True]))] if len(ends) else ends
    edges = np.empty(2 * len(starts) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, starts, ends, height * width
    runs = np.diff(edges)
    if runs[-1] == 0:
        runs = runs[:-1]
    return counts_of(runs), int((ends - starts).sum())
