"""Boxes, from the model's input back to the image."""

import numpy as np
from numpy.typing import NDArray

from models.imaging.geometry import Geometry


def boxes_xyxy_to_original(boxes_xyxy: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """Boxes [n, 4] in pixels of the model's input → [n, 4] in pixels of the oriented original.

    They are clipped to what the input shows of it.
    """
    if len(boxes_xyxy) == 0:
        return np.empty((0, 4), np.float32)
    x_min, y_min, x_max, y_max = geometry.shown_xyxy
    boxes = np.clip(whole_boxes_xyxy(boxes_xyxy, geometry), [x_min, y_min] * 2, [x_max, y_max] * 2)
    return boxes.astype(np.float32)


def whole_boxes_xyxy(boxes_xyxy: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float64]:
    """The same [n, 4], not clipped: a mask that is relative to its box is stretched over the whole of it."""
    offset = np.array([geometry.offset_x, geometry.offset_y] * 2)
    scale = np.array([geometry.scale_x, geometry.scale_y] * 2)
    return (np.asarray(boxes_xyxy, np.float64) - offset) / scale  # in double: 1/scale may be large
