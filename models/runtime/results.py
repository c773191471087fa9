"""What each task answers: the outputs its ONNX graph must have, their reading as findings, and the Arrow columns.

A new task is one more entry in `ANSWERS`, and its fields in models.records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.card import Card
from models.errors import Rejected, UsageError
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


class Instances(NamedTuple):
    """The objects of one image with their masks, best first."""

    labels: NDArray[np.int64]  # [k], indices into the card's labels
    scores: NDArray[np.float32]  # [k], 0 to 1
    boxes_xyxy: NDArray[np.float32]  # [k, 4], pixels of the oriented original, clipped to it
    areas: NDArray[np.float32]  # [k], pixels of the mask
    masks: list[str]  # k COCO counts, of the size of the oriented original


class Segments(NamedTuple):
    """The classes that one image shows, in the order of the card's labels; the background is none."""

    labels: NDArray[np.int64]  # [k], indices into the card's labels
    areas: NDArray[np.float32]  # [k], pixels
    masks: list[str]  # k COCO counts, of the size of the oriented original


class Embedding(NamedTuple):
    """Where one image lies among all others, and how unlike those of the training it is."""

    values: NDArray[np.float32]  # [d]
    anomaly: float  # higher is stranger; in the model's own unit


class Translation(NamedTuple):
    """What was made of the views of one image: of the whole, or of its tiles."""

    views: list[tuple[Geometry, NDArray[np.uint8]]]  # [h, w, 3] each, of the size of the model's input


class Written(NamedTuple):
    """A translation that lies in the store."""

    output: str  # URI


Finding = Classification | Detection | Instances | Segments | Embedding | Translation | Written
Outputs = Mapping[str, NDArray]  # by the name in the ONNX contract


class Output(NamedTuple):
    """One output that the graph of a task must have."""

    name: str
    onnx_type: str  # as ONNX Runtime writes it
    rank: int


@dataclass(frozen=True)
class Answer:
    """How one task speaks: graph outputs → findings."""

    outputs: tuple[Output, ...]
    # (outputs, geometries of the batch, card, score threshold, top_k) → one entry per image of the batch
    read: Callable[[Outputs, Sequence[Geometry], Card, float, int], "list[Finding | Rejected]"]


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
    scores, labels = outputs["scores"], outputs["labels"]  # [n] each
    findings: list[Finding | Rejected] = []
    for i, geometry in enumerate(geometries):
        rows = _objects_of(outputs, i, score)
        if isinstance(rows, Rejected):
            findings.append(rows)
            continue
        boxes = boxes_xyxy_to_original(boxes_xyxy[rows], geometry)
        has_area = _has_area(boxes)
        rows, boxes = rows[has_area], boxes[has_area]
        findings.append(Detection(labels[rows].astype(np.int64), scores[rows].astype(np.float32), boxes))
    return findings


def _objects_of(outputs: Outputs, image: int, score: float) -> NDArray[np.int64] | Rejected:
    """The rows of an image that score at least `score`, best first."""
    boxes_xyxy, scores, labels = outputs["boxes_xyxy"], outputs["scores"], outputs["labels"]
    rows = np.flatnonzero(outputs["batch_index"] == image)
    if not (np.isfinite(scores[rows]).all() and np.isfinite(boxes_xyxy[rows]).all()):
        return _not_finite("scores or boxes_xyxy")
    rows = rows[scores[rows] >= score]
    keys = (*boxes_xyxy[rows].T[::-1], labels[rows], -scores[rows])  # the last key leads
    return rows[np.lexsort(keys)]


def _has_area(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which boxes are left in the original; others lay in the padding."""
    return np.all(boxes_xyxy[:, 2:] > boxes_xyxy[:, :2], axis=1)


def read_instances(
    outputs: Outputs, geometries: Sequence[Geometry], card: Card, score: float, top_k: int
) -> "list[Finding | Rejected]":
    """As `read_detections`, with each object's mask [m, m] drawn into the original and coded."""
    from models.imaging.boxes import boxes_xyxy_to_original, whole_boxes_xyxy
    from models.imaging.mask_runs import paste_mask

    boxes_xyxy, masks = outputs["boxes_xyxy"], outputs["masks"]  # [n, 4], [n, m, m]
    scores, labels = outputs["scores"], outputs["labels"]  # [n] each
    findings: list[Finding | Rejected] = []
    for i, geometry in enumerate(geometries):
        rows = _objects_of(outputs, i, score)
        if isinstance(rows, Rejected):
            findings.append(rows)
            continue
        if not np.isfinite(masks[rows]).all():
            findings.append(_not_finite("masks"))
            continue
        rows = rows[_has_area(boxes_xyxy_to_original(boxes_xyxy[rows], geometry))]
        whole = whole_boxes_xyxy(boxes_xyxy[rows], geometry)
        drawn = [
            paste_mask(masks[row], box, geometry.height, geometry.width, geometry.shown_xyxy)
            for row, box in zip(rows, whole, strict=True)
        ]
        findings.append(
            Instances(
                labels[rows].astype(np.int64),
                scores[rows].astype(np.float32),
                boxes_xyxy_to_original(boxes_xyxy[rows], geometry),
                np.array([area for _, area in drawn], np.float32),
                [counts for counts, _ in drawn],
            )
        )
    return findings


def read_segments(
    outputs: Outputs, geometries: Sequence[Geometry], card: Card, score: float, top_k: int
) -> "list[Finding | Rejected]":
    """The classes of each image with their pixels in the original. There is no score, so no threshold applies."""
    from models.imaging.mask_runs import segments_of_map

    findings: list[Finding | Rejected] = []
    for class_map, geometry in zip(outputs["class_map"], geometries, strict=True):  # [h, w] each
        if class_map.max() > len(card.labels):
            reason = f"the model's output class_map has class {class_map.max()} of {len(card.labels)} for this image"
            findings.append(Rejected(Status.FAILED, reason))
            continue
        found = segments_of_map(class_map, geometry)
        findings.append(
            Segments(
                np.array([number - 1 for number, _, _ in found], np.int64),
                np.array([area for _, _, area in found], np.float32),
                [counts for _, counts, _ in found],
            )
        )
    return findings


def read_embeddings(
    outputs: Outputs, geometries: Sequence[Geometry], card: Card, score: float, top_k: int
) -> "list[Finding | Rejected]":
    """The vector of each image and its anomaly. There is no score, so no threshold applies."""
    vectors, anomalies = outputs["embedding"], outputs["anomaly"]  # [batch, d], [batch]
    finite = np.isfinite(vectors).all(axis=1) & np.isfinite(anomalies)  # [batch]
    return [
        Embedding(vectors[i].astype(np.float32), float(anomalies[i])) if finite[i] else _not_finite("embedding")
        for i in range(len(geometries))
    ]


def read_translations(
    outputs: Outputs, geometries: Sequence[Geometry], card: Card, score: float, top_k: int
) -> "list[Finding | Rejected]":
    """What was made of each view, in the size of the model's input: it is enlarged when all views are there."""
    made = zip(geometries, outputs["images_out"], strict=True)
    return [Translation([(geometry, image.copy())]) for geometry, image in made]


def read_nothing(
    outputs: Outputs, geometries: Sequence[Geometry], card: Card, score: float, top_k: int
) -> "list[Finding | Rejected]":
    """A generator is shown no images, so that it has nothing to say of any. Raises UsageError."""
    raise UsageError(f"{card.reference} makes images and is shown none: use `pixelmill generate {card.reference}`")


def _list_array(findings: Sequence, counts: list[int], values: pa.Array) -> pa.ListArray:
    """One list per image over `values`; null where the finding is None."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)  # [images + 1]
    missing = pa.array([finding is None for finding in findings], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=missing)


def _concatenated(arrays: list[NDArray], empty_shape: tuple[int, ...], dtype: type) -> NDArray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(empty_shape, dtype)


def _finding_column(task: Task, findings: Sequence, labels: Sequence[str]) -> pa.ListArray:
    """The one column of a task: a list of structs per image."""
    present = [finding for finding in findings if finding is not None]
    structs_type = RESULT_FIELDS[task][0].type.value_type
    indices = _concatenated([finding.labels for finding in present], (0,), np.int64)  # [rows]
    values: dict[str, pa.Array] = {"label": pa.array(labels, pa.string()).take(pa.array(indices))}
    names = {field.name for field in structs_type}
    if "score" in names:
        values["score"] = pa.array(_concatenated([finding.scores for finding in present], (0,), np.float32))
    if "x_min" in names:
        boxes = _concatenated([finding.boxes_xyxy for finding in present], (0, 4), np.float32)  # [rows, 4]
        for name, side in zip(("x_min", "y_min", "x_max", "y_max"), boxes.T, strict=True):
            values[name] = pa.array(np.ascontiguousarray(side))
    if "mask" in names:
        values["area"] = pa.array(_concatenated([finding.areas for finding in present], (0,), np.float32))
        values["mask"] = pa.array([counts for finding in present for counts in finding.masks], pa.string())
    structs = pa.StructArray.from_arrays([values[field.name] for field in structs_type], fields=list(structs_type))
    return _list_array(findings, [0 if f is None else len(f.labels) for f in findings], structs)


_OBJECTS = (
    Output("boxes_xyxy", "tensor(float)", 2),
    Output("scores", "tensor(float)", 1),
    Output("labels", "tensor(int64)", 1),
    Output("batch_index", "tensor(int64)", 1),
)

_IMAGES_OUT = (Output("images_out", "tensor(uint8)", 4),)

ANSWERS: dict[Task, Answer] = {
    Task.CLASSIFY: Answer(
        outputs=(Output("probabilities", "tensor(float)", 2),),
        read=read_classifications,
    ),
    Task.DETECT: Answer(outputs=_OBJECTS, read=read_detections),
    Task.INSTANCE: Answer(outputs=(*_OBJECTS, Output("masks", "tensor(float)", 3)), read=read_instances),
    Task.SEMANTIC: Answer(outputs=(Output("class_map", "tensor(uint8)", 3),), read=read_segments),
    Task.GENERATE: Answer(outputs=_IMAGES_OUT, read=read_nothing),
    Task.TRANSLATE: Answer(outputs=_IMAGES_OUT, read=read_translations),
    Task.EMBED: Answer(
        outputs=(Output("embedding", "tensor(float)", 2), Output("anomaly", "tensor(float)", 1)), read=read_embeddings
    ),
}


def result_columns(task: Task, findings: Sequence[Any], labels: Sequence[str]) -> dict[str, pa.Array]:
    """The Arrow columns of `RESULT_FIELDS[task]`, by name, one row per finding.

    An image without findings has an empty list; None (an image that is not `ok`) becomes null.
    """
    if task is Task.EMBED:
        return _embedding_columns(findings)
    if task is Task.TRANSLATE:
        return {"output": pa.array([None if f is None else f.output for f in findings], pa.string())}
    return {field.name: _finding_column(task, findings, labels) for field in RESULT_FIELDS[task]}


def _embedding_columns(findings: Sequence) -> dict[str, pa.Array]:
    present = [finding.values for finding in findings if finding is not None]
    values = pa.array(_concatenated(present, (0,), np.float32))
    counts = [0 if finding is None else len(finding.values) for finding in findings]
    return {
        "embedding": _list_array(findings, counts, values),
        "anomaly": pa.array([None if finding is None else finding.anomaly for finding in findings], pa.float32()),
    }
