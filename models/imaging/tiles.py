"""A large image in overlapping tiles, so that a model sees small objects at a size it knows.

Source: Akyon, Altinuc, Temizel, "Slicing Aided Hyper Inference and Fine-tuning for Small Object Detection",
arXiv 2202.06934, which looks at the whole image as well.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from models.imaging.geometry import Tile


@dataclass(frozen=True, slots=True)
class Tiling:
    """How images are cut.

    side: of a tile, in pixels of the oriented original. overlap: of neighbouring tiles, as a share of the side, at
    least. and_whole: whether the model also looks at the whole image, for what is larger than a tile.
    """

    side: int
    overlap: float
    and_whole: bool


def tiles_of(height: int, width: int, tiling: Tiling) -> list[Tile]:
    """The tiles of an image, row by row; none where the image is no larger than one.

    All have the same size and are spread evenly, so that their overlap is what was asked for, or a little more.
    """
    if max(height, width) <= tiling.side:
        return []
    columns, rows = _spread(width, tiling), _spread(height, tiling)
    return [
        Tile((left, top, right, bottom), (cell_left, cell_top, cell_right, cell_bottom))
        for top, bottom, cell_top, cell_bottom in rows
        for left, right, cell_left, cell_right in columns
    ]


def _spread(size: int, tiling: Tiling) -> list[tuple[int, int, int, int]]:
    """Along one side of the image: start and end of each tile, and of the pixels whose nearest centre is the tile's."""
    side = min(tiling.side, size)
    step = max(1, int(tiling.side * (1 - tiling.overlap)))
    count = 1 + ceil((size - side) / step)
    starts = [round(index * (size - side) / max(1, count - 1)) for index in range(count)]
    # The middle between two centres: half way through what the two tiles share.
    borders = [0, *((first + side + second) // 2 for first, second in pairwise(starts)), size]
    return [(start, start + side, borders[index], borders[index + 1]) for index, start in enumerate(starts)]
