"""What each task answers: the outputs its ONNX graph must have, their reading as findings, and the Arrow columns.

A new task is one more entry in `ANSWERS`, and its fields in models.records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.card import Card
from models.errors import Rejected
from models.imaging.geometry import Geometry
from models.records import RESULT_FIELDS, Status, Task


class Classification(NamedTuple):
    """The best labels of one image, best first; of equal scores the lower index comes first."""

    labels: NDArray[np.int64]  # [k], indices into the card's labels
    scores: NDArray[np.float32]  # [k], 0 to 1


class Detection(NamedTuple):
    """The objects of one image, best first."""

    labels: NDArray[np.int64]  # [k], indices into the card's labels
    scores: NDArray[np.float32]  # [k], 0 to 1
    boxes_xyxy: NDArray[np.float32]  # [k, 4], pixels of the oriented original, clipped to it


Finding = Classification | Detection
Outputs = Mapping[str, NDArray]  # by the name in the ONNX contract


class Output(NamedTuple):
    """One output that the graph of a task must have."""

    name: str
    onnx_type: str  # as ONNX Runtime writes it
    rank: int


@dataclass(frozen=True)
class Answer:
    """How one task speaks: graph outputs → findings → Arrow columns."""

    outputs: tuple[Output, ...]
    # (outputs, geometries of the batch, card, score threshold, top_k) → one entry per image of the batch
    read: Callable[[Outputs, Sequence[Geometry], Card, float, int], "list[Finding | Rejected]"]
    # (findings, None where an image has none to give; label names) → one array per field of the task, in their order
    columns: Callable[[Sequence, Sequence[str]], list[pa.Array]]


def _not_finite(name: str) -> Rejected:
    return Rejected(Status.FAILED, f"the model's output {name} holds NaN or infinity for this image")


def read_classifications(
    outputs: Outputs, geometries: Sequence[Geometry], card: Card, score: float, top_k: int
) -> "list[Finding | Rejected]":
    """The `top_k` best labels of each image. The threshold does not apply: a classifier always has a best label."""
    probabilities = outputs["probabilities"]  # [batch, classes]
    top_k = min(top_k, probabilities.shape[1])
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]  # [batch, top_k]
    scores = np.take_along_axis(probabilities, order, axis=1)
    finite = np.isfinite(probabilities).all(axis=1)  # [batch]
    return [
        Classification(order[i].astype(np.int64), scores[i].astype(np.float32))
        if finite[i]
        else _not_finite("probabilities")
        for i in range(len(geometries))
    ]


def read_detections(
    outputs: Outputs, geometries: Sequence[Geometry], card: Card, score: float, top_k: int
) -> "list[Finding | Rejected]":
    """The objects of each image that score at least `score`; equal scores are ordered by label, then by box."""
    from models.imaging.boxes import boxes_xyxy_to_original

    boxes_xyxy = outputs["boxes_xyxy"]  # [n, 4], pixels of the model's input
    scores, labels, batch_index = outputs["scores"], outputs["labels"], outputs["batch_index"]  # [n] each
    finite = np.isfinite(scores) & np.isfinite(boxes_xyxy).all(axis=1)
    findings: list[Finding | Rejected] = []
    for i, geometry in enumerate(geometries):
        of_image = batch_index == i
        if not finite[of_image].all():
            findings.append(_not_finite("scores or boxes_xyxy"))
            continue
        rows = np.flatnonzero(of_image & (scores >= score))
        keys = (*boxes_xyxy[rows].T[::-1], labels[rows], -scores[rows])  # the last key leads
        rows = rows[np.lexsort(keys)]
        boxes = boxes_xyxy_to_original(boxes_xyxy[rows], geometry)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # else it lay in the padding
        rows, boxes = rows[has_area], boxes[has_area]
        findings.append(
            Detection(labels[rows].astype(np.int64), scores[rows].astype(np.float32), boxes.astype(np.float32))
        )
    return findings


def _list_array(findings: Sequence, counts: list[int], structs: pa.StructArray) -> pa.ListArray:
    """One list per image over the rows of `structs`; null where the finding is None."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)  # [images + 1]
    missing = pa.array([finding is None for finding in findings], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), structs, mask=missing)


def _concatenated(arrays: list[NDArray], empty_shape: tuple[int, ...], dtype: type) -> NDArray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(empty_shape, dtype)


def label_columns(findings: Sequence[Classification | None], labels: Sequence[str]) -> list[pa.Array]:
    """The column `labels`."""
    present = [finding for finding in findings if finding is not None]
    indices = _concatenated([finding.labels for finding in present], (0,), np.int64)  # [rows]
    scores = _concatenated([finding.scores for finding in present], (0,), np.float32)  # [rows]
    names = pa.array(labels, pa.string()).take(pa.array(indices))
    fields = list(RESULT_FIELDS[Task.CLASSIFY][0].type.value_type)
    structs = pa.StructArray.from_arrays([names, pa.array(scores)], fields=fields)
    return [_list_array(findings, [0 if f is None else len(f.scores) for f in findings], structs)]


def object_columns(findings: Sequence[Detection | None], labels: Sequence[str]) -> list[pa.Array]:
    """The column `objects`."""
    present = [finding for finding in findings if finding is not None]
    indices = _concatenated([finding.labels for finding in present], (0,), np.int64)  # [rows]
    scores = _concatenated([finding.scores for finding in present], (0,), np.float32)  # [rows]
    boxes = _concatenated([finding.boxes_xyxy for finding in present], (0, 4), np.float32)  # [rows, 4]
    names = pa.array(labels, pa.string()).take(pa.array(indices))
    sides = [pa.array(np.ascontiguousarray(side)) for side in boxes.T]
    fields = list(RESULT_FIELDS[Task.DETECT][0].type.value_type)
    structs = pa.StructArray.from_arrays([names, pa.array(scores), *sides], fields=fields)
    return [_list_array(findings, [0 if f is None else len(f.scores) for f in findings], structs)]


ANSWERS: dict[Task, Answer] = {
    Task.CLASSIFY: Answer(
        outputs=(Output("probabilities", "tensor(float)", 2),),
        read=read_classifications,
        columns=label_columns,
    ),
    Task.DETECT: Answer(
        outputs=(
            Output("boxes_xyxy", "tensor(float)", 2),
            Output("scores", "tensor(float)", 1),
            Output("labels", "tensor(int64)", 1),
            Output("batch_index", "tensor(int64)", 1),
        ),
        read=read_detections,
        columns=object_columns,
    ),
}


def result_columns(task: Task, findings: Sequence[Finding | None], labels: Sequence[str]) -> dict[str, pa.Array]:
    """The Arrow columns of `RESULT_FIELDS[task]`, by name, one row per finding.

    An image without findings has an empty list; None (an image that is not `ok`) becomes null.
    """
    arrays = ANSWERS[task].columns(findings, labels)
    return {field.name: array for field, array in zip(RESULT_FIELDS[task], arrays, strict=True)}
