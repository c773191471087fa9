"""Which finding is which object of an image, by the rules of COCO at one overlap."""

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from models.learning.average_precision import FoundObjects, Kind, TrueObjects, xywh

IOU = 0.5  # the least overlap of a finding with its object

NOTHING = -1  # a finding where nothing is
IGNORED = -2  # a finding that counts neither way: what it shows is to be ignored


def match(true: TrueObjects, found: FoundObjects, kind: Kind = "bbox", *, across: bool = False) -> NDArray[np.int64]:
    """For each finding the row of its object, or NOTHING or IGNORED [found].

    The surest finding chooses first, the object of its class that it overlaps most; so that what a finding is does not
    depend on those that are less sure. across: findings and objects that are left over then find each other in the same
    way whatever their classes.
    """
    matched = np.full(len(found.labels), NOTHING)
    if not len(found.labels) or not len(true.labels):
        return matched
    overlaps = _overlaps(true, found, kind)  # [found, true]
    ignored = true.ignored | (true.labels < 0)
    same = (found.labels[:, None] == true.labels) | (true.labels < 0)
    order = np.argsort(-found.scores, kind="stable")
    free = ~ignored
    _choose(np.where(same, overlaps, 0.0), order, free, matched)
    in_ignored = (overlaps >= IOU) & same & ignored
    matched[(matched == NOTHING) & in_ignored.any(axis=1)] = IGNORED
    if across:
        _choose(overlaps, order, free, matched)
    return matched


def _choose(
    overlaps: NDArray[np.float64],  # [found, true]
    order: NDArray[np.int64],  # of the findings
    free: NDArray[np.bool_],  # [true]; changed
    matched: NDArray[np.int64],  # [found]; changed where it is NOTHING
) -> None:
    for row in order[(overlaps.max(axis=1) >= IOU)[order] & (matched == NOTHING)[order]]:
        choice = np.where(free, overlaps[row], 0.0)
        best = int(choice.argmax())
        if choice[best] >= IOU:
            matched[row], free[best] = best, False


def _overlaps(true: TrueObjects, found: FoundObjects, kind: Kind) -> NDArray[np.float64]:
    """Intersection over union [found, true]; with crowds, over the finding."""
    crowds = (true.ignored | (true.labels < 0)).astype(np.uint8)
    if kind == "bbox":
        return coco_mask.iou(xywh(found.boxes_xyxy), xywh(true.boxes_xyxy), crowds)
    return coco_mask.iou(list(found.masks or ()), list(true.masks or ()), crowds)
