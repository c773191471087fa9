"""The objects of images as what a detector learns from, and moved with their images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from models.dataset import rows_by_image
from models.errors import UsageError
from models.imaging import masks
from models.imaging.geometry import Geometry

_SIDES = ("x_min", "y_min", "x_max", "y_max")


@dataclass(frozen=True)
class Objects:
    """What one image shows."""

    boxes_xyxy: NDArray[np.float32]  # [n, 4], pixels of the oriented original
    labels: NDArray[np.int64]  # [n], indices into the classes; -1 for a region that has none
    ignored: NDArray[np.bool_]  # [n]: crowds and regions without a label; nothing is learned there
    difficult: NDArray[np.bool_]  # [n]: learned from, but findings there do not count
    masks: tuple[str | None, ...] | None = None  # n, COCO compressed RLE counts of the image's size


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str], with_masks: bool = False) -> list[Objects]:
    """The objects of each image, by row of `images`; an image may show none.

    with_masks: of an object that has no mask nobody can say which pixels it is made of, so it is to be ignored. Raises
    UsageError that names an image with an object of another class.
    """
    index = {name: number for number, name in enumerate(classes)}
    columns = {name: annotations.column(name).to_pylist() for name in (*_SIDES, "label", "crowd", "difficult", "mask")}
    found = []
    for image, of_image in rows_by_image(images, annotations).items():
        labels, crowd, difficult, mask = (
            [columns[name][row] for row in of_image] for name in ("label", "crowd", "difficult", "mask")
        )
        for label in labels:
            if label is not None and label not in index:
                raise UsageError(f"{image} has an object with the label {label!r}, which is not among the classes")
        boxes = [[columns[side][row] for side in _SIDES] for row in of_image]
        ignored = [
            bool(is_crowd) or label is None or (with_masks and counts is None)
            for label, is_crowd, counts in zip(labels, crowd, mask, strict=True)
        ]
        found.append(
            Objects(
                np.array(boxes, np.float32).reshape(-1, 4),
                np.array([-1 if label is None else index[label] for label in labels], np.int64),
                np.array(ignored, np.bool_),
                np.array(difficult, np.bool_),
                tuple(mask) if with_masks else None,
            )
        )
    return found


def placed(target: Objects, geometry: Geometry, size_hw: tuple[int, int]) -> dict[str, Any]:
    """The objects in an image that was letterboxed or stretched into an input of `size_hw`.

    boxes_xyxy f32 [n, 4] in its pixels and inside it, labels i64 [n], ignored and difficult bool [n]; where masks are
    learned also masks bool [n, height, width], empty for an object that has none.
    """
    scale = np.array([geometry.scale_x, geometry.scale_y] * 2)
    offset = np.array([geometry.offset_x, geometry.offset_y] * 2)
    size = np.array([geometry.width, geometry.height] * 2)
    boxes = np.clip(target.boxes_xyxy, 0, size) * scale + offset  # [n, 4]
    moved = {
        "boxes_xyxy": torch.from_numpy(boxes.astype(np.float32)),
        "labels": torch.from_numpy(target.labels),
        "ignored": torch.from_numpy(target.ignored),
        "difficult": torch.from_numpy(target.difficult),
    }
    if target.masks is None:
        return moved
    drawn = np.zeros((len(target.masks), *size_hw), np.bool_)
    for mask, counts, box in zip(drawn, target.masks, boxes, strict=True):
        if counts is not None:
            _draw(mask, counts, box, geometry)
    return {**moved, "masks": torch.from_numpy(drawn)}


def _draw(mask: NDArray[np.bool_], counts: str, box_xyxy: NDArray[np.float64], geometry: Geometry) -> None:
    """Sets the pixels of an empty mask [height, width] that are on in the original at their centre.

    Where all centres miss the object, the pixels that its box touches. Only the pixels around the object are looked at,
    so that the size of the original does not count.
    """
    if (extent := masks.box_xyxy(counts, geometry.height, geometry.width)) is None:
        return
    left, top, right, bottom = extent
    y, x = geometry.sources_yx((mask.shape[0], mask.shape[1]))
    rows, columns = slice(*np.searchsorted(y, (top, bottom))), slice(*np.searchsorted(x, (left, right)))
    ends = np.cumsum(masks.runs_of(counts, geometry.height, geometry.width))
    places = x[columns] * geometry.height + y[rows, None]  # [rows, columns], counted down the original's columns
    mask[rows, columns] = np.searchsorted(ends, places, side="right") % 2 == 1
    if not mask.any():
        limits = np.array([mask.shape[1], mask.shape[0]])
        first = np.minimum(box_xyxy[:2], limits - 1).astype(int)
        end = np.maximum(np.ceil(box_xyxy[2:]), first + 1).astype(int)
        mask[first[1] : end[1], first[0] : end[0]] = True
