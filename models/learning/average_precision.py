"""COCO's average precision and recall of boxes, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SIZES = ("all", "small", "medium", "large")  # less than 32² pixels, less than 96², and more
_MOST_FOUND = 2  # the place of 100 findings per image among COCO's 1, 10 and 100


class TrueObjects(NamedTuple):
    """What one image shows."""

    boxes_xyxy: NDArray[np.floating]  # [n, 4], pixels
    labels: NDArray[np.integer]  # [n]; -1: a region to be ignored for every class
    ignored: NDArray[np.bool_]  # [n]
    areas: NDArray[np.floating]  # [n], pixels


class FoundObjects(NamedTuple):
    """What a detector finds in one image."""

    boxes_xyxy: NDArray[np.floating]  # [n, 4], pixels
    labels: NDArray[np.integer]  # [n]
    scores: NDArray[np.floating]  # [n]


@dataclass(frozen=True)
class Precisions:
    """Precision where recall reaches a level, and the recall reached; -1 where a class has no object of a size."""

    precision: NDArray[np.float64]  # [IoU .5 … .95, recall 0 … 1 in 101 steps, classes, sizes]
    recall: NDArray[np.float64]  # [IoU .5 … .95, classes, sizes]

    def ap(self, iou: int | slice = slice(None), label: int | slice = slice(None), size: str = "all") -> float | None:
        """The mean precision; None where there is nothing to find. iou: place of a threshold, 0 for .5, 5 for .75."""
        return _mean(self.precision[iou, :, label, _SIZES.index(size)])

    def ar(self, label: int | slice = slice(None), size: str = "all") -> float | None:
        """The mean recall with up to 100 findings per image; None where there is nothing to find."""
        return _mean(self.recall[:, label, _SIZES.index(size)])


def precisions(true: Sequence[TrueObjects], found: Sequence[FoundObjects], num_classes: int) -> Precisions:
    """Compares what was found with what is there, image by image, by the rules of COCO."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    for image, of_image in enumerate(true):
        boxes = _xywh(of_image.boxes_xyxy)
        for row, label in enumerate(of_image.labels):
            for category in range(num_classes) if label < 0 else (int(label),):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": category,
                        "bbox": boxes[row],
                        "area": float(of_image.areas[row]),
                        "iscrowd": int(of_image.ignored[row] or label < 0),
                    }
                )
    findings = [
        {"image_id": image, "category_id": int(label), "bbox": box, "score": float(score)}
        for image, of_image in enumerate(found)
        for box, label, score in zip(_xywh(of_image.boxes_xyxy), of_image.labels, of_image.scores, strict=True)
    ]
    shape = 10, 101, num_classes, len(_SIZES)
    if not annotations:
        return Precisions(np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0))
    if not findings:  # which it refuses to read
        present = np.array(
            [[_has(annotations, category, size) for size in _SIZES] for category in range(num_classes)]
        )  # [classes, sizes]
        return Precisions(
            np.broadcast_to(np.where(present, 0.0, -1.0), shape).copy(),
            np.broadcast_to(np.where(present, 0.0, -1.0), (shape[0], *shape[2:])).copy(),
        )
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image in range(len(true))],
        "categories": [{"id": number, "name": str(number)} for number in range(num_classes)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how long each step took
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(findings), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return Precisions(
        evaluation.eval["precision"][..., _MOST_FOUND].reshape(shape),
        evaluation.eval["recall"][..., _MOST_FOUND].reshape(shape[0], *shape[2:]),
    )


_AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


def _has(annotations: Sequence[dict[str, Any]], category: int, size: str) -> bool:
    low, high = _AREAS[size]
    return any(
        one["category_id"] == category and not one["iscrowd"] and low <= one["area"] <= high for one in annotations
    )


def _xywh(boxes_xyxy: NDArray[np.floating]) -> list[list[float]]:
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def _mean(values: NDArray[np.float64]) -> float | None:
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else None
