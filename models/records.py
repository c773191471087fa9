"""The nouns of pixelmill and the Arrow schemas of its files: listing, plan and part."""

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class Task(StrEnum):
    """What a model answers; it decides the result columns of a table."""

    CLASSIFY = "classify"
    DETECT = "detect"
    INSTANCE = "instance"
    SEMANTIC = "semantic"
    GENERATE = "generate"  # images from latent vectors; no table holds what it answers
    TRANSLATE = "translate"  # an image into another of the same size
    EMBED = "embed"


class Status(StrEnum):
    """What became of one image."""

    OK = "ok"
    EMPTY = "empty"  # zero bytes
    UNSUPPORTED = "unsupported"  # not an image format on the allow-list
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    MISSING = "missing"  # gone, or changed, since it was listed
    UNREADABLE = "unreadable"  # storage or permission error after retries
    FAILED = "failed"  # the model failed on this image alone


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One image as the listing saw it."""

    image: str  # URI; bytes that are not UTF-8 are percent-escaped
    fingerprint: str  # ETag on object stores, "size-mtime_ns" on local disk
    bytes: int


LISTING_SCHEMA = pa.schema([("image", pa.string()), ("fingerprint", pa.string()), ("bytes", pa.int64())])

# `attempt` is 1, or more where --retry-unreadable claimed the same version of an image again.
PLAN_SCHEMA = LISTING_SCHEMA.append(pa.field("attempt", pa.int32())).append(pa.field("model", pa.string()))

_LABEL = [("label", pa.string()), ("score", pa.float32())]
_BOX = [(name, pa.float32()) for name in ("x_min", "y_min", "x_max", "y_max")]
_MASK = [("area", pa.float32()), ("mask", pa.string())]  # pixels that are on; COCO compressed RLE counts

# The result columns of each task; boxes and masks are in pixels of the oriented original image, `height` by `width`.
RESULT_FIELDS: dict[Task, list[pa.Field]] = {
    Task.CLASSIFY: [pa.field("labels", pa.list_(pa.struct(_LABEL)))],
    Task.DETECT: [pa.field("objects", pa.list_(pa.struct(_LABEL + _BOX)))],
    Task.INSTANCE: [pa.field("objects", pa.list_(pa.struct(_LABEL + _BOX + _MASK)))],
    Task.SEMANTIC: [pa.field("segments", pa.list_(pa.struct(_LABEL[:1] + _MASK)))],
    Task.GENERATE: [],
    Task.TRANSLATE: [pa.field("output", pa.string())],  # URI of the image made
    Task.EMBED: [pa.field("embedding", pa.list_(pa.float32())), pa.field("anomaly", pa.float32())],
}


def part_schema(task: Task) -> pa.Schema:
    """The columns of a part; `model` is not among them, it comes from the path (a hive partition)."""
    return pa.schema(
        [
            pa.field("image", pa.string()),
            pa.field("fingerprint", pa.string()),
            pa.field("sha256", pa.string()),
            pa.field("bytes", pa.int64()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("status", pa.string()),
            pa.field("error", pa.string()),
            *RESULT_FIELDS[task],
            pa.field("predicted_at", pa.timestamp("us", tz="UTC")),
            pa.field("attempt", pa.int32()),
        ]
    )
