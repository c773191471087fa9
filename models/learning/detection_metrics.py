"""The figures of detectors, by boxes, and of those that draw masks by masks as well."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.learning.average_precision import RECALLS, SIZES, FoundObjects, Kind, Precisions, TrueObjects, precisions
from models.learning.matching import IOU, NOTHING, match
from models.learning.measured_objects import found_objects, has_masks, true_objects
from models.learning.metrics import unknown_classes
from models.learning.operating_point import best_operating_point

_CURVE_STEP = 5  # of the 101 recalls: 21 points show the shape of a curve
_DIGITS = 4  # of a curve
_BACKGROUND = "(background)"
_OTHER = "(another label)"


def measure(
    rows: pa.Table,  # image, status, objects
    images: pa.Table,  # image, width, height
    annotations: pa.Table,
    labels: Sequence[str],
    classes: Sequence[str],
    temperature: float | None,
    fit: bool,
    score: float,
) -> dict[str, Any]:
    """The figures of one split, plain JSON; see models.learning.metrics.Measure.

    In pixels of the original images. Nothing was found in an image without a prediction, nor of a class that the model
    does not know; findings of labels that the data set does not have are no mistakes, unless they take an object's
    place. Crowds, objects marked difficult and regions without a label count neither way; nor does, where masks are
    compared, an object that has none. The temperature is not looked at.

    Keys: images, not_ok, objects (that count); ap, ap50, ap75, ap_small, ap_medium, ap_large, ar, ar_small, ar_medium,
    ar_large: COCO's, by boxes, of all findings, means over the classes that have objects; mask_ap and so on: the same
    by masks, where findings have them; max_found (findings of a class that count in one image). At an overlap of one
    half, of masks where there are any: at_score (precision, recall, f1 of the findings from `score` on, all classes
    together), operating_point (the same at the score with the best f1; null unless fit), per_class (class → ap, ap50,
    mask_ap, mask_ap50, precision, recall, f1, support), confusion (rows: true classes, then background; columns: found
    classes, other labels of the model where they take an object's place, and background, which is what was missed;
    counts), pr_curve (recalls; class → the precision at each); unknown_classes. Null stands where there is nothing to
    find.
    """
    unknown = unknown_classes(labels, classes)
    found, is_ok = found_objects(rows, images, classes)
    kind: Kind = "segm" if has_masks(rows) else "bbox"
    true = true_objects(images, annotations, classes, kind)
    boxes = precisions(true_objects(images, annotations, classes, "bbox"), found, len(classes))
    measured = {"": boxes}
    if kind == "segm":
        measured["mask_"] = precisions(true, found, len(classes), kind)
    counts = confusion(true, found, len(classes), score, kind)
    return {
        "images": images.num_rows,
        "not_ok": int((~is_ok).sum()),
        "objects": int(counts[:-1].sum()),
        **{name: value for prefix, each in measured.items() for name, value in _of_all(each, prefix).items()},
        "max_found": boxes.most_found,
        "at_score": {"score": score, **_of_all_classes(counts)},
        "operating_point": asdict(best_operating_point(true, found, len(classes), kind)) if fit else None,
        "per_class": _by_class(measured, counts, classes),
        "confusion": _shown(counts, classes),
        "pr_curve": _curves(list(measured.values())[-1], classes),
        "unknown_classes": unknown,
    }


def per_class(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The average precision of each class that has objects, by masks where there are any: what an export may not lose
    unseen."""
    name = "mask_ap" if "mask_ap" in metrics else "ap"
    return {label: each[name] for label, each in metrics["per_class"].items() if each[name] is not None}


def confusion(
    true: Sequence[TrueObjects], found: Sequence[FoundObjects], num_classes: int, score: float, kind: Kind = "bbox"
) -> NDArray[np.int64]:
    """Counts of objects and findings [classes + 1, classes + 2]: rows are the true classes, then the background;
    columns the found ones, then all other labels, then the background.

    On the diagonal are the objects that were found as what they are, in the last column those that were missed, in the
    last row findings where nothing is.
    """
    counts = np.zeros((num_classes + 1, num_classes + 2), np.int64)
    for of_image, in_image in zip(true, found, strict=True):
        in_image = _from(in_image, score)
        matched = match(of_image, in_image, kind, across=True)
        is_missed = ~of_image.ignored
        for row, label in zip(matched.tolist(), in_image.labels.tolist(), strict=True):
            if row >= 0:
                is_missed[row] = False
                counts[of_image.labels[row], min(label, num_classes)] += 1
            elif row == NOTHING and label < num_classes:  # of others the data set does not say where they are
                counts[-1, label] += 1
        for label in of_image.labels[is_missed].tolist():
            counts[label, -1] += 1
    return counts


def _from(found: FoundObjects, score: float) -> FoundObjects:
    rows = np.flatnonzero(found.scores >= score)
    masks = None if found.masks is None else [found.masks[row] for row in rows.tolist()]
    return FoundObjects(found.boxes_xyxy[rows], found.labels[rows], found.scores[rows], masks)


def _of_all(measured: Precisions, prefix: str) -> dict[str, float | None]:
    figures = {"ap": measured.ap(), "ap50": measured.ap(iou=0), "ap75": measured.ap(iou=5)}
    figures |= {f"ap_{size}": measured.ap(size=size) for size in SIZES[1:]}
    figures |= {"ar": measured.ar()} | {f"ar_{size}": measured.ar(size=size) for size in SIZES[1:]}
    return {f"{prefix}{name}": value for name, value in figures.items()}


def _rates(right: int, found: int, support: int) -> dict[str, float]:
    """What is never found, or is not there, has 0."""
    return {
        "precision": right / max(found, 1),
        "recall": right / max(support, 1),
        "f1": 2 * right / max(found + support, 1),
    }


def _of_all_classes(counts: NDArray[np.int64]) -> dict[str, float]:
    return _rates(int(np.diagonal(counts[:-1]).sum()), int(counts[:, :-2].sum()), int(counts[:-1].sum()))


def _by_class(
    measured: Mapping[str, Precisions], counts: NDArray[np.int64], classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    figures: dict[str, dict[str, float | None]] = {}
    for k, name in enumerate(classes):
        support = int(counts[k].sum())
        figures[name] = {
            **{f"{prefix}ap": each.ap(label=k) for prefix, each in measured.items()},
            **{f"{prefix}ap50": each.ap(iou=0, label=k) for prefix, each in measured.items()},
            **_rates(int(counts[k, k]), int(counts[:, k].sum()), support),
            "support": support,
        }
    return figures


def _shown(counts: NDArray[np.int64], classes: Sequence[str]) -> dict[str, Any]:
    columns = [*classes, _OTHER, _BACKGROUND]
    kept = [k for k, name in enumerate(columns) if name != _OTHER or counts[:, k].any()]
    return {
        "rows": [*classes, _BACKGROUND],
        "columns": [columns[k] for k in kept],
        "counts": counts[:, kept].tolist(),
    }


def _curves(measured: Precisions, classes: Sequence[str]) -> dict[str, Any]:
    precision = measured.precision[0, ::_CURVE_STEP, :, 0]  # [recalls, classes]
    return {
        "iou": IOU,
        "recall": RECALLS[::_CURVE_STEP].round(2).tolist(),
        "precision": {
            name: precision[:, k].round(_DIGITS).tolist() for k, name in enumerate(classes) if precision[0, k] > -1
        },
    }
