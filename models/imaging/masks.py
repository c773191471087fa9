"""Masks in COCO's run-length code: how many pixels are off, then on, then off …, down each column, left to right.

"Counts" is the compressed text of these runs, as pycocotools reads and writes it. pycocotools trusts what it is given:
wrong runs crash the process and wild polygons take gigabytes. So everything is checked here before it gets there.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

MOST_PIXELS = 2**31 - 1  # pycocotools counts in 32 bits
MOST_OUTLINE_PIXELS = 4_000_000  # of all polygons of one mask; drawing them takes about 200 bytes for each

_FIRST, _LAST = ord("0"), ord("o")  # a character of counts carries 6 bits: 5 of the number, and whether it goes on
_LONGEST_NUMBER = 7  # characters; 35 bits hold every difference of two counts


def encode(mask: NDArray[np.bool_]) -> str:
    """Counts of a mask [height, width]."""
    return str(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii"))


def counts_of(runs: NDArray[np.int64]) -> str:
    """Counts of runs, off first; the runs are right by construction, and only the first may be zero."""
    numbers = runs.astype(np.int64)
    numbers[3:] -= runs[1:-2]  # from the fourth on, the difference to the run before the last
    lengths = np.ones(len(numbers), np.int64)  # characters
    for length in range(1, _LONGEST_NUMBER):
        most = 1 << 5 * length - 1  # what 5 bits a character hold, with a sign
        longer = (numbers < -most) | (numbers >= most)
        if not longer.any():
            break
        lengths += longer
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    code = np.repeat(numbers, lengths) >> 5 * position & 0x1F
    code[position < np.repeat(lengths, lengths) - 1] |= 0x20
    return (code + _FIRST).astype(np.uint8).tobytes().decode("ascii")


def decode(counts: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask [height, width]. Raises ValueError where the counts are not those of a mask of this size."""
    runs = runs_of(counts, height, width)
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # [width × height]
    return columns.reshape(width, height).T


def runs_of(counts: str, height: int, width: int) -> NDArray[np.int64]:
    """The runs, off first. Raises ValueError, in a few words, where they are not those of a mask of this size."""
    _check_size(height, width)
    try:
        code = np.frombuffer(counts.encode("ascii"), np.uint8)
    except UnicodeEncodeError:
        raise ValueError("the counts hold characters that they cannot have") from None
    if not len(code):
        raise ValueError("the counts are empty")
    if code.min() < _FIRST or code.max() > _LAST:
        raise ValueError("the counts hold characters that they cannot have")
    bits = code.astype(np.int64) - _FIRST
    ends = np.flatnonzero(bits & 0x20 == 0)  # last characters of numbers
    if not len(ends) or ends[-1] != len(bits) - 1:
        raise ValueError("the counts are cut off")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise ValueError("a run is longer than any image")
    position = np.arange(len(bits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((bits & 0x1F) << 5 * position, starts)
    numbers -= np.where(bits[ends] & 0x10, np.int64(1) << 5 * lengths, 0)  # the sign
    runs = numbers.copy()  # from the fourth on, each number is the difference to the run before the last
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    if runs.min() < 0:
        raise ValueError("a run is negative")
    if runs.max() > MOST_PIXELS or runs.sum() != height * width:
        raise ValueError(f"the runs do not add up to {width}×{height} pixels")
    return runs


def encode_runs(runs: Sequence[object], height: int, width: int) -> str:
    """Counts of uncompressed runs, off first. Raises ValueError where they are not those of a mask of this size."""
    _check_size(height, width)
    whole: list[int] = []
    for run in runs:
        if isinstance(run, bool) or not isinstance(run, int):
            raise ValueError("a run is not a whole number")
        if run < 0:
            raise ValueError("a run is negative")
        whole.append(run)
    if sum(whole) != height * width:
        raise ValueError(f"the runs do not add up to {width}×{height} pixels")
    return str(coco_mask.frPyObjects({"counts": whole, "size": [height, width]}, height, width)["counts"].decode())


def encode_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> str:
    """Counts of the union of polygons, each with x and y in turn, in pixels.

    A pixel is on where pycocotools' drawing says so: it may be none at all. Raises ValueError for fewer than three
    points, an odd count, coordinates further outside than the image is large, and an outline that would fill memory.
    """
    _check_size(height, width)
    if not polygons:
        raise ValueError("no polygon")
    outline = 0.0
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon has three points or more, each x and y")
        points = np.asarray(polygon, np.float64).reshape(-1, 2)  # [points, 2]
        size = np.array([width, height])
        if not ((points >= -size) & (points <= 2 * size)).all():  # false for NaN as well
            raise ValueError("a point lies far outside the image")
        outline += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)
    if outline > MOST_OUTLINE_PIXELS:
        raise ValueError(f"the outline has {outline:.0f} pixels, and {MOST_OUTLINE_PIXELS} are allowed")
    drawn = coco_mask.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width)
    return str(coco_mask.merge(drawn)["counts"].decode())


def area(counts: str, height: int, width: int) -> int:
    """Pixels that are on. Raises ValueError as `runs_of`."""
    return int(runs_of(counts, height, width)[1::2].sum())


def box_xyxy(counts: str, height: int, width: int) -> tuple[int, int, int, int] | None:
    """The smallest box around the pixels that are on, x_max and y_max just behind them; None where none is.

    Raises ValueError as `runs_of`.
    """
    runs = runs_of(counts, height, width)
    ends = np.cumsum(runs)[1::2]
    starts = ends - runs[1::2]
    drawn = starts < ends
    if not drawn.any():
        return None
    starts, last = starts[drawn], ends[drawn] - 1
    if (starts // height != last // height).any():  # such a run goes through the bottom of its column
        y_min, y_max = 0, height
    else:
        y_min, y_max = int((starts % height).min()), int((last % height).max()) + 1
    return int(starts[0] // height), y_min, int(last[-1] // height) + 1, y_max


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise ValueError(f"a mask has between 1 and {MOST_PIXELS} pixels")
