"""The objects of images as what a detector learns from, and moved with their images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from models.errors import UsageError
from models.imaging.geometry import Geometry


@dataclass(frozen=True)
class Objects:
    """What one image shows."""

    boxes_xyxy: NDArray[np.float32]  # [n, 4], pixels of the oriented original
    labels: NDArray[np.int64]  # [n], indices into the classes; 0 for a region that has none
    ignored: NDArray[np.bool_]  # [n]: crowds and regions without a label; findings there do not count


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str]) -> list[Objects]:
    """The objects of each image, by row of `images`; an image may show none.

    Raises UsageError that names an image with an object of another class.
    """
    index = {name: number for number, name in enumerate(classes)}
    rows: dict[str, list[tuple[list[float], int, bool]]] = {name: [] for name in images.column("image").to_pylist()}
    columns = ("image", "label", "x_min", "y_min", "x_max", "y_max", "crowd")
    for image, label, *box, crowd in zip(*(annotations.column(name).to_pylist() for name in columns), strict=True):
        if image not in rows:
            continue  # of another split
        if label is not None and label not in index:
            raise UsageError(f"{image} has an object with the label {label!r}, which is not among the classes")
        rows[image].append((box, index.get(label, 0), bool(crowd) or label is None))
    return [
        Objects(
            np.array([box for box, _, _ in found], np.float32).reshape(-1, 4),
            np.array([label for _, label, _ in found], np.int64),
            np.array([ignored for _, _, ignored in found], np.bool_),
        )
        for found in rows.values()
    ]


def placed(target: Objects, geometry: Geometry) -> dict[str, Any]:
    """The objects in an image that was letterboxed or stretched: boxes_xyxy f32 [n, 4] in its pixels and inside it,
    labels i64 [n], ignored bool [n]."""
    scale = np.array([geometry.scale_x, geometry.scale_y] * 2)
    offset = np.array([geometry.offset_x, geometry.offset_y] * 2)
    size = np.array([geometry.width, geometry.height] * 2)
    boxes = np.clip(target.boxes_xyxy, 0, size) * scale + offset  # [n, 4]
    return {
        "boxes_xyxy": torch.from_numpy(boxes.astype(np.float32)),
        "labels": torch.from_numpy(target.labels),
        "ignored": torch.from_numpy(target.ignored),
    }
