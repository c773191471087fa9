"""The figures of a segmenter: how far the classes of its pixels are the true ones, by area and by outline."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.learning.metrics import unknown_classes
from models.learning.segmentation_boundaries import border, boundary_f1
from models.learning.segmentation_regions import IGNORED, Regions, draw, regions_of
from models.records import Status

_BACKGROUND = "(background)"
_OTHER = "(another label)"
_NOT_OK = "(not predicted)"
_PIXELS_AT_ONCE = 2**20  # counting takes eight bytes for each


def measure(
    rows: pa.Table,  # image, status, segments
    images: pa.Table,  # image, width, height
    annotations: pa.Table,
    labels: Sequence[str],
    classes: Sequence[str],
    temperature: float | None,
    fit: bool,
    score: float,
) -> dict[str, Any]:
    """The figures of one split, plain JSON; see models.learning.metrics.Measure.

    In pixels of the oriented originals, all images together. Pixels that the data set leaves open are not judged:
    crowds, difficult objects, objects without a mask, regions without a label. Of an image without a prediction every
    pixel is wrong, and so is every pixel of a class that the model does not know. There is no temperature and no score.

    Keys: images, not_ok, miou (intersection over union, as in PASCAL VOC: the mean over the background and the classes
    that the split shows), mean_dice (likewise), pixel_accuracy, boundary_f1 (see segmentation_boundaries; the mean over
    the classes that the split shows, without the background, whose borders are theirs), per_class (background and class
    → iou, dice, precision, recall; image_iou: the mean of the IoU of single images that show the class or in which it
    was found, so that a large image counts no more than a small one; boundary_f1: its mean over the images that show a
    border of the class or in which one was found; and share: of the judged pixels), confusion (rows: true classes,
    columns: found ones, then other labels of the model and images without a prediction; counts of pixels),
    unknown_classes.
    """
    unknown = unknown_classes(labels, classes)
    value_of = {name: number for number, name in enumerate(classes, 1)}
    other, not_ok = len(classes) + 1, len(classes) + 2  # columns of the confusion
    counts = np.zeros((IGNORED + 1, not_ok + 1), np.int64)  # true × found pixels
    outlines: dict[int, list[float]] = {value: [] for value in value_of.values()}
    of_images = np.zeros((2, len(classes) + 1))  # by value: the sum of the IoU of images, and how many have one
    failed = 0
    for regions, segments in _pairs(rows, images, annotations, classes):
        true = np.ascontiguousarray(regions.drawn().T)  # [width, height]
        found = np.zeros_like(true)
        if segments is None:
            failed += 1
            of_image = np.zeros_like(counts)
            of_image[:, not_ok] = np.bincount(true.reshape(-1), minlength=len(counts))
        else:
            for segment in segments:
                draw(found, segment["mask"], value_of.get(segment["label"], other))
            of_image = _counted(true, found, counts.shape)
        counts += of_image
        right, either = _overlap(of_image[: len(classes) + 1])
        of_images += _shares(right, either), either > 0
        is_judged = true != IGNORED
        borders = border(true, is_judged), border(found, is_judged)
        for value in np.union1d(borders[0].value, borders[1].value).tolist():
            f1 = boundary_f1(borders[0].of(value), borders[1].of(value), regions.height, regions.width)
            if value in outlines and f1 is not None:
                outlines[value].append(f1)
    return {
        "images": images.num_rows,
        "not_ok": failed,
        **_figures(counts[: len(classes) + 1], of_images, outlines, classes),
        "unknown_classes": unknown,
    }


def per_class(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The IoU of the background and of each class that the split shows: what an export may not lose unseen."""
    return {name: figures["iou"] for name, figures in metrics["per_class"].items() if figures["share"]}


def _pairs(
    rows: pa.Table, images: pa.Table, annotations: pa.Table, classes: Sequence[str]
) -> Iterator[tuple[Regions, list[dict[str, Any]] | None]]:
    """What is true of each image, and the segments that were found; None where nothing was predicted."""
    row_of = {image: number for number, image in enumerate(rows.column("image").to_pylist())}
    statuses, segments = rows.column("status").to_pylist(), rows.column("segments")
    true = regions_of(images, annotations, classes, judge_difficult=False)
    for image, regions in zip(images.column("image").to_pylist(), true, strict=True):
        row = row_of.get(image)
        is_ok = row is not None and statuses[row] == Status.OK
        yield regions, segments[row].as_py() if is_ok else None


def _counted(true: NDArray[np.uint8], found: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.int64]:
    """The confusion of the pixels of two maps."""
    true, found = true.reshape(-1), found.reshape(-1)
    counts = np.zeros(shape[0] * shape[1], np.int64)
    for start in range(0, len(true), _PIXELS_AT_ONCE):
        pair = true[start : start + _PIXELS_AT_ONCE].astype(np.int64) * shape[1]
        pair += found[start : start + _PIXELS_AT_ONCE]
        counts += np.bincount(pair, minlength=counts.size)
    return counts.reshape(shape)


def _overlap(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels [1 + classes] that are and were found to be of a value, and those that either are or were."""
    right = np.diagonal(counts)
    return right, counts.sum(axis=1) + counts.sum(axis=0)[: len(counts)] - right


def _figures(
    counts: NDArray[np.int64],  # [1 + classes, 1 + classes + 2]
    of_images: NDArray[np.float64],  # [2, 1 + classes]
    outlines: Mapping[int, Sequence[float]],
    classes: Sequence[str],
) -> dict[str, Any]:
    names = [_BACKGROUND, *classes]
    right, either = _overlap(counts)
    true, found = counts.sum(axis=1), counts.sum(axis=0)[: len(names)]  # [1 + classes] each
    by_class = {
        "iou": _shares(right, either),
        "image_iou": _shares(*of_images),
        "dice": _shares(2 * right, true + found),
        "precision": _shares(right, found),
        "recall": _shares(right, true),
        "share": _shares(true, np.full(len(true), true.sum())),
    }
    present = true > 0
    boundary = [None, *(float(np.mean(outlines[k])) if outlines[k] else None for k in range(1, len(names)))]
    shown = [value for value, is_present in zip(boundary, present, strict=True) if is_present and value is not None]
    kept = [*range(len(names)), *(k for k in range(len(names), counts.shape[1]) if counts[:, k].any())]
    columns = [*names, _OTHER, _NOT_OK]
    return {
        "miou": float(by_class["iou"][present].mean()) if present.any() else 0.0,
        "mean_dice": float(by_class["dice"][present].mean()) if present.any() else 0.0,
        "pixel_accuracy": float(right.sum() / max(true.sum(), 1)),
        "boundary_f1": float(np.mean(shown)) if shown else None,
        "per_class": {
            name: {**{figure: float(values[k]) for figure, values in by_class.items()}, "boundary_f1": boundary[k]}
            for k, name in enumerate(names)
        },
        "confusion": {
            "rows": names,
            "columns": [columns[k] for k in kept],
            "counts": counts[:, kept].tolist(),
        },
    }


def _shares(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
