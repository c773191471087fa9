"""COCO's average precision and recall of boxes and masks, by faster-coco-eval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["bbox", "segm"]
Mask = Mapping[str, Any]  # COCO's compressed RLE: {"size": [height, width], "counts": …}

SIZES = ("all", "small", "medium", "large")  # up to 32² pixels, up to 96², and more
RECALLS = np.linspace(0, 1, 101)
_MOST_FOUND = 100  # findings of a class that count in one image


class TrueObjects(NamedTuple):
    """What one image shows."""

    boxes_xyxy: NDArray[np.floating]  # [n, 4], pixels
    labels: NDArray[np.integer]  # [n]; -1: a region to be ignored for every class
    ignored: NDArray[np.bool_]  # [n]: crowds and the like, which may be found or not, and more than once
    areas: NDArray[np.floating]  # [n], pixels; they decide which size an object is of
    masks: Sequence[Mask] | None = None  # n, all of the image's size


class FoundObjects(NamedTuple):
    """What a detector finds in one image."""

    boxes_xyxy: NDArray[np.floating]  # [n, 4], pixels
    labels: NDArray[np.integer]  # [n]
    scores: NDArray[np.floating]  # [n]
    masks: Sequence[Mask] | None = None  # n, all of the image's size


@dataclass(frozen=True)
class Precisions:
    """Precision where recall reaches a level, and the recall reached; -1 where a class has no object of a size."""

    precision: NDArray[np.float64]  # [IoU .5 … .95, RECALLS, classes, SIZES]
    recall: NDArray[np.float64]  # [IoU .5 … .95, classes, SIZES]
    most_found: int = _MOST_FOUND

    def ap(self, iou: int | slice = slice(None), label: int | slice = slice(None), size: str = "all") -> float | None:
        """The mean precision; None where there is nothing to find. iou: place of a threshold, 0 for .5, 5 for .75."""
        return _mean(self.precision[iou, :, label, SIZES.index(size)])

    def ar(self, label: int | slice = slice(None), size: str = "all") -> float | None:
        """The mean recall with up to `most_found` findings; None where there is nothing to find."""
        return _mean(self.recall[:, label, SIZES.index(size)])


def precisions(
    true: Sequence[TrueObjects], found: Sequence[FoundObjects], num_classes: int, kind: Kind = "bbox"
) -> Precisions:
    """Compares what was found with what is there, image by image, by the rules of COCO.

    kind: by the overlap of boxes, or of masks. COCO counts the 100 best findings of a class in an image; where an image
    shows more objects than that, as many count.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    annotations = _annotations(true, num_classes, kind)
    if not annotations:
        shape = (10, len(RECALLS), num_classes, len(SIZES))
        return Precisions(np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0))
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image, "height": 0, "width": 0} for image in range(len(true))],  # each mask brings its size
        "categories": [{"id": number, "name": str(number)} for number in range(num_classes)],
        "annotations": annotations,
    }
    truth.createIndex()
    evaluation = COCOeval_faster(truth, truth.loadRes(_findings(found, kind)), kind)
    most_found = max(_MOST_FOUND, *(_most_of_a_class(of_image) for of_image in true))
    evaluation.params.maxDets = [most_found]
    evaluation.evaluate()
    evaluation.accumulate()
    return Precisions(evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0], most_found)


def xywh(boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float64]:
    """Boxes [n, 4] as COCO writes them: the upper left corner and the size."""
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _annotations(true: Sequence[TrueObjects], num_classes: int, kind: Kind) -> list[dict[str, Any]]:
    """The objects as COCO writes them; a region without a label is one of every class."""
    annotations: list[dict[str, Any]] = []
    for image, of_image in enumerate(true):
        boxes, masks = xywh(of_image.boxes_xyxy).tolist(), of_image.masks or ()
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
                        **({"segmentation": masks[row]} if kind == "segm" else {}),
                    }
                )
    return annotations


def _findings(found: Sequence[FoundObjects], kind: Kind) -> list[dict[str, Any]]:
    key = "bbox" if kind == "bbox" else "segmentation"
    return [
        {"image_id": image, "category_id": int(label), "score": float(score), key: place}
        for image, of_image in enumerate(found)
        for label, score, place in zip(
            of_image.labels,
            of_image.scores,
            xywh(of_image.boxes_xyxy).tolist() if kind == "bbox" else of_image.masks or (),
            strict=True,
        )
    ]


def _most_of_a_class(of_image: TrueObjects) -> int:
    counted = of_image.labels[~of_image.ignored & (of_image.labels >= 0)]
    return int(np.bincount(counted).max(initial=0))


def _mean(values: NDArray[np.float64]) -> float | None:
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else None
