"""What the annotations of a data set say of each pixel: 0 the background, k the k-th class, 255 that nobody knows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.dataset import rows_by_image
from models.errors import UsageError
from models.imaging import masks

IGNORED = 255
MOST_CLASSES = 254

_COLUMNS = ("label", "mask", "crowd", "difficult", "x_min", "y_min", "x_max", "y_max")


@dataclass(frozen=True, slots=True)
class Region:
    """One annotation, as far as its pixels are concerned."""

    value: int  # of its pixels
    mask: str | None  # COCO compressed RLE counts, of the size of the image
    box_xyxy: tuple[float, float, float, float]  # where there is no mask


@dataclass(frozen=True, slots=True)
class Regions:
    """The annotations of one image; later ones lie over earlier ones."""

    height: int  # pixels of the oriented original
    width: int
    regions: tuple[Region, ...]

    def drawn(self) -> NDArray[np.uint8]:
        """The map [height, width] of pixels that are background, a class, or not to be judged."""
        columns = np.zeros((self.width, self.height), np.uint8)
        for region in self.regions:
            if region.mask is not None:
                draw(columns, region.mask, region.value)
            else:
                x_min, y_min, x_max, y_max = (max(side, 0.0) for side in region.box_xyxy)
                columns[int(x_min) : math.ceil(x_max), int(y_min) : math.ceil(y_max)] = region.value
        return columns.T


def draw(columns: NDArray[np.uint8], counts: str, value: int) -> None:
    """Gives the pixels of a mask, in COCO's counts, a value in a map that lies column by column [width, height].

    The work grows with the runs of the mask, not with the image. Raises ValueError where the counts are not those of a
    mask of this size.
    """
    width, height = columns.shape
    flat = columns.reshape(-1)
    ends = np.cumsum(masks.runs_of(counts, height, width)).tolist()
    for start, end in zip(ends[0::2], ends[1::2], strict=False):
        flat[start:end] = value


def regions_of(
    images: pa.Table, annotations: pa.Table, classes: Sequence[str], judge_difficult: bool = True
) -> list[Regions]:
    """By row of `images`, whose columns are those of models.dataset; `classes` in the order of the map's values.

    Crowds, and objects of which only the box is known, are not judged where nothing else says what is there; regions
    without a label never are, nor are difficult ones unless judge_difficult. Raises UsageError for more classes than a
    map can hold, and for an image with another class.
    """
    if len(classes) > MOST_CLASSES:
        raise UsageError(f"a map of classes holds {MOST_CLASSES} classes at most, got {len(classes)}")
    value_of = {name: number for number, name in enumerate(classes, 1)}
    rows = rows_by_image(images, annotations)
    columns = [annotations.column(name).to_pylist() for name in _COLUMNS]
    found = []
    for image, height, width in zip(
        *(images.column(name).to_pylist() for name in ("image", "height", "width")), strict=True
    ):
        below, known, above = [], [], []
        for row in rows[image]:
            label, mask, crowd, difficult, *box = (column[row] for column in columns)
            if label is not None and label not in value_of:
                raise UsageError(f"{image} has a region with the label {label!r}, which is not among the classes")
            if label is None or (difficult and not judge_difficult):
                above.append(Region(IGNORED, mask, tuple(box)))
            elif crowd or mask is None:
                below.append(Region(IGNORED, mask, tuple(box)))
            else:
                known.append(Region(value_of[label], mask, tuple(box)))
        found.append(Regions(height, width, (*below, *known, *above)))
    return found
