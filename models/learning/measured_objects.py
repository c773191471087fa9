"""The objects of a data set and those of a table of predictions, image by image, as they are compared."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from models.dataset import rows_by_image
from models.learning.average_precision import FoundObjects, Kind, Mask, TrueObjects, xywh
from models.records import Status

_SIDES = ("x_min", "y_min", "x_max", "y_max")


def true_objects(images: pa.Table, annotations: pa.Table, classes: Sequence[str], kind: Kind) -> list[TrueObjects]:
    """What each image shows, by row of `images`, in pixels of the original; labels are indices into `classes`.

    Ignored are crowds, objects marked difficult, and regions without a label, whose label is -1; for masks (segm) also
    objects of which only the box is known.
    """
    index = {name: number for number, name in enumerate(classes)}
    rows_of = rows_by_image(images, annotations)
    boxes = np.array([annotations.column(side).to_pylist() for side in _SIDES], np.float64).T  # [annotations, 4]
    labels = np.array([-1 if label is None else index[label] for label in annotations.column("label").to_pylist()], int)
    crowd, difficult, area, counts = (
        annotations.column(name).to_pylist() for name in ("crowd", "difficult", "area", "mask")
    )
    ignored = (labels < 0) | np.array(crowd, bool) | np.array(difficult, bool)
    if kind == "segm":
        ignored |= np.array([mask is None for mask in counts], bool)
    areas = np.array(area, np.float64)
    found = []
    for size_hw, rows in zip(_sizes_hw(images), rows_of.values(), strict=True):
        masks: list[Mask] | None = None
        if kind == "segm":
            masks = [
                {"size": size_hw, "counts": counts[row]} if counts[row] is not None else _box_mask(boxes[row], size_hw)
                for row in rows
            ]
        found.append(TrueObjects(boxes[rows], labels[rows], ignored[rows], areas[rows], masks))
    return found


def found_objects(
    rows: pa.Table, images: pa.Table, classes: Sequence[str]
) -> tuple[list[FoundObjects], NDArray[np.bool_]]:
    """What was found in each image, by row of `images`, and which images were predicted [images].

    Labels are indices into `classes`; all others have the index behind the last. In an image that was not predicted
    nothing was found.
    """
    objects = rows.column("objects").combine_chunks()
    values, parents = pc.list_flatten(objects), pc.list_parent_indices(objects).to_numpy()
    boxes = np.stack([pc.struct_field(values, side).to_numpy() for side in _SIDES], axis=1)  # [findings, 4]
    scores = pc.struct_field(values, "score").to_numpy()
    known = pc.index_in(pc.struct_field(values, "label"), value_set=pa.array(classes, pa.string()))
    labels = known.fill_null(len(classes)).to_numpy().astype(np.int64)
    counts = pc.struct_field(values, "mask").to_pylist() if has_masks(rows) else None

    row_of = {image: row for row, image in enumerate(rows.column("image").to_pylist())}
    ends = np.searchsorted(parents, np.arange(rows.num_rows), side="right")
    statuses = rows.column("status").to_pylist()
    found, is_ok = [], np.zeros(images.num_rows, bool)
    for i, (image, size_hw) in enumerate(zip(images.column("image").to_pylist(), _sizes_hw(images), strict=True)):
        row = row_of.get(image)
        is_ok[i] = row is not None and statuses[row] == Status.OK
        here = slice(ends[row - 1] if row else 0, ends[row]) if is_ok[i] else slice(0, 0)
        masks = None if counts is None else [{"size": size_hw, "counts": mask} for mask in counts[here]]
        found.append(FoundObjects(boxes[here], labels[here], scores[here], masks))
    return found, is_ok


def has_masks(rows: pa.Table) -> bool:
    """Whether the findings of a table of predictions are drawn as masks."""
    return "mask" in {field.name for field in rows.schema.field("objects").type.value_type}


def _sizes_hw(images: pa.Table) -> list[list[int]]:
    return [list(size) for size in zip(*(images.column(name).to_pylist() for name in ("height", "width")), strict=True)]


def _box_mask(box_xyxy: NDArray[np.float64], size_hw: list[int]) -> Mask:
    return coco_mask.frPyObjects(xywh(box_xyxy), *size_hw)[0]
