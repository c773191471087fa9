"""The figures of a classifier: accuracy, per class and overall, and how far its probabilities can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.learning.metrics import unknown_classes
from models.records import Status

CALIBRATION_BINS = 15
_TOP = 5
_SMALLEST_PROBABILITY = 1e-38  # of float32
_TEMPERATURES = (0.05, 20.0)
_FLAT = 1e-9  # a slope of the likelihood that rounding alone can make
_OTHER = "(another label)"
_NOT_OK = "(not predicted)"


def measure(
    rows: pa.Table,  # image, status, labels
    images: pa.Table,  # image, label
    annotations: pa.Table,
    labels: Sequence[str],
    classes: Sequence[str],
    temperature: float | None,
    fit: bool,
    score: float,
) -> dict[str, Any]:
    """The figures of one split, plain JSON; see models.learning.metrics.Measure.

    An image without a prediction counts as wrong, as does every image of a class that the model does not know.
    `temperature` T divides log-probabilities (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 9);
    fit: fit it on these rows instead. Calibration is measured on the other images. The score and the annotations are
    not looked at.

    Keys: images, not_ok, top1, top5 (null for five classes or fewer), macro (precision, recall, f1: means over the
    classes that have examples), per_class (class → precision, recall, f1, support), confusion (rows: true classes,
    columns: predicted ones, then other labels of the model and images without a prediction; counts), ece, temperature,
    ece_at_temperature, unknown_classes.
    """
    known = list(dict.fromkeys(labels))  # a model may have two outputs of one name
    unknown = unknown_classes(labels, classes)
    names = known + unknown
    index = {name: number for number, name in enumerate(names)}
    row_of = {image: number for number, image in enumerate(rows.column("image").to_pylist())}
    statuses, found = rows.column("status").to_pylist(), rows.column("labels").to_pylist()

    true = np.array([index[label] for label in images.column("label").to_pylist()], np.int64)  # [images]
    probabilities = np.zeros((len(true), len(names)))  # [images, names]
    is_ok = np.zeros(len(true), bool)
    for i, image in enumerate(images.column("image").to_pylist()):
        row = row_of.get(image)
        if row is not None and statuses[row] == Status.OK:
            is_ok[i] = True
            for entry in found[row]:
                probabilities[i, index[entry["label"]]] += entry["score"]
    is_ok &= np.isfinite(probabilities).all(axis=1)
    comparable = is_ok & (true < len(known))
    return {
        "images": len(true),
        "not_ok": int((~is_ok).sum()),
        **_accuracy(probabilities, true, is_ok, len(known)),
        **_by_class(probabilities, true, is_ok, names, list(classes)),
        **_calibration(probabilities[comparable, : len(known)], true[comparable], temperature, fit),
        "unknown_classes": unknown,
    }


def per_class(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The recall of each class that has examples: what an export may not lose unseen."""
    return {name: figures["recall"] for name, figures in metrics["per_class"].items() if figures["support"]}


def _accuracy(
    probabilities: NDArray[np.float64], true: NDArray[np.int64], is_ok: NDArray[np.bool_], num_known: int
) -> dict[str, float | None]:
    """Shares of all images. Of equal probabilities the lower index comes first, as in tables."""
    order = np.argsort(-probabilities, axis=1, kind="stable")  # [images, names]
    hits = (order == true[:, None]) & is_ok[:, None] & (np.take_along_axis(probabilities, order, axis=1) > 0)
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits[:, :_TOP].any(axis=1).mean()) if num_known > _TOP else None,
    }


def _by_class(
    probabilities: NDArray[np.float64],
    true: NDArray[np.int64],
    is_ok: NDArray[np.bool_],
    names: list[str],
    classes: list[str],
) -> dict[str, Any]:
    """Precision, recall and F1 by class; what is never predicted, or has no examples, has 0."""
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    place = {name: number for number, name in enumerate(classes)}
    column = np.array([place.get(name, len(classes)) for name in names])  # [names]
    predicted = np.where(is_ok, column[probabilities.argmax(axis=1)], len(classes) + 1)  # [images]
    counts = multiclass_confusion_matrix(
        torch.from_numpy(predicted), torch.from_numpy(column[true]), num_classes=len(classes) + 2
    ).numpy()[: len(classes)]  # [classes, classes + 2]
    correct, support = np.diagonal(counts), counts.sum(axis=1)  # [classes] each
    precision = _shares(correct, counts.sum(axis=0)[: len(classes)])
    recall = _shares(correct, support)
    f1 = _shares(2 * precision * recall, precision + recall)
    present = support > 0
    figures = {"precision": precision, "recall": recall, "f1": f1}
    kept = [*range(len(classes)), *(k for k in (len(classes), len(classes) + 1) if counts[:, k].any())]
    columns = [*classes, _OTHER, _NOT_OK]
    return {
        "macro": {name: float(values[present].mean()) for name, values in figures.items()},
        "per_class": {
            name: {**{figure: float(values[k]) for figure, values in figures.items()}, "support": int(support[k])}
            for k, name in enumerate(classes)
        },
        "confusion": {
            "rows": list(classes),
            "columns": [columns[k] for k in kept],
            "counts": counts[:, kept].tolist(),
        },
    }


def _shares(part: NDArray, whole: NDArray) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _calibration(
    probabilities: NDArray[np.float64],  # [images, names]
    true: NDArray[np.int64],  # [images]
    temperature: float | None,
    fit: bool,
) -> dict[str, float | None]:
    if not len(true):
        return {"ece": None, "temperature": temperature, "ece_at_temperature": None}
    if fit:
        temperature = fitted_temperature(probabilities, true)
    return {
        "ece": expected_calibration_error(probabilities, true),
        "temperature": temperature,
        "ece_at_temperature": None
        if temperature is None
        else expected_calibration_error(at_temperature(probabilities, temperature), true),
    }


def expected_calibration_error(probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> float:
    """The mean distance between confidence and accuracy over 15 equal bins, weighted by their images (Guo et al. 2017,
    eq. 3). probabilities [images, classes], true [images]."""
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    confidence = np.minimum(probabilities.max(axis=1), 1)  # float32 scores may add up to a trifle more
    is_right = probabilities.argmax(axis=1) == true
    return float(
        binary_calibration_error(
            torch.from_numpy(confidence), torch.from_numpy(is_right.astype(np.int64)), n_bins=CALIBRATION_BINS
        )
    )


def at_temperature(probabilities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """softmax(log p / T): what the network would have said, had its logits been divided by T. [images, classes]"""
    logs = np.log(np.maximum(probabilities, _SMALLEST_PROBABILITY)) / temperature
    powers = np.exp(logs - logs.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fitted_temperature(probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> float | None:
    """The temperature with the least negative log-likelihood, between 0.05 and 20. [images, classes], [images]

    That is a convex function of 1/T, so its slope, mean(E[log p] - log p of the true class), is brought to zero by
    bisection. None where it has no minimum in between: where every image is right (or as good as none is), all that
    could be learnt is ever more (or less) confidence.
    """
    logs = np.log(np.maximum(probabilities, _SMALLEST_PROBABILITY))  # [images, classes]
    of_true = np.take_along_axis(logs, true[:, None], axis=1)[:, 0].mean()

    def slope(inverse: float) -> float:
        return float((at_temperature(probabilities, 1 / inverse) * logs).sum(axis=1).mean() - of_true)

    low, high = 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0]
    if slope(low) > -_FLAT or slope(high) < _FLAT:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(2 / (low + high))
