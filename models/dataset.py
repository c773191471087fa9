"""The nouns of a data set: its description and the Arrow schemas of its files."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from models.records import Task

DATASET_FILE = "dataset.json"
IMAGES_FILE = "images.parquet"
ANNOTATIONS_FILE = "annotations.parquet"
REJECTS_FILE = "rejects.parquet"

IMAGES_SCHEMA = pa.schema(
    [
        ("image", pa.string()),  # URI
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),  # after EXIF orientation
        ("height", pa.int32()),
        ("format", pa.string()),  # JPEG, PNG …
        ("split", pa.string()),  # train, val or test
        ("label", pa.string()),  # of the whole image; null where the source labels none
        ("duplicate_group", pa.int64()),  # images that are identical or nearly so share a number; null: it is alone
    ]
)

ANNOTATIONS_SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("label", pa.string()),  # null: a region to be ignored
        ("x_min", pa.float64()),  # pixels of the oriented original
        ("y_min", pa.float64()),
        ("x_max", pa.float64()),
        ("y_max", pa.float64()),
        ("mask", pa.string()),  # COCO compressed RLE counts, of the size of the image; null: a box only
        ("polygons", pa.list_(pa.list_(pa.float64()))),  # as the source had them, x and y in turn; null: it had none
        ("area", pa.float64()),  # pixels: as the source says, else of the mask, else of the box
        ("crowd", pa.bool_()),
        ("difficult", pa.bool_()),
    ]
)

REJECTS_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # image or annotation
        ("source", pa.string()),  # URI of the file that is at fault
        ("line", pa.int64()),  # counted from 1; null where the file has no lines
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


# What the images of a data set must have to say what a model of a task should answer.
NEEDED: dict[Task, tuple[str, ...]] = {
    Task.CLASSIFY: ("labels",),
    Task.DETECT: ("boxes",),
    Task.INSTANCE: ("boxes", "masks"),  # without boxes a mask holds all that is of its class
    Task.SEMANTIC: ("masks",),
    Task.GENERATE: (),  # a conditional generator needs labels
    Task.TRANSLATE: (),
    Task.EMBED: (),
}


@dataclass(frozen=True)
class Dataset:
    """One version of one data set; dataset.json."""

    name: str
    version: str  # first 12 hex digits of the SHA-256 over the sorted rows of images and annotations, and the classes
    source: str
    format: str
    classes: tuple[str, ...]  # by index; in the order of the source where it has one, else sorted
    has_labels: bool  # images have labels: it can train classifiers
    has_boxes: bool
    has_masks: bool
    listed: int  # image files that the source has; = images + rejected images
    images: int
    annotations: int
    rejected: int  # images and annotations
    splits: dict[str, int] = field(default_factory=dict)  # images by split
    split_given: bool = False  # by the source
    shares: dict[str, float] = field(default_factory=dict)  # asked for
    seed: int = 0
    saw: str = ""  # what gave the format away, for people
    # SHA-256 over the settings and the states of all files of the source: as long as it is the same, nothing is new.
    source_state: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)  # of generated images: model, seed, classes, manifest
    summary: dict[str, Any] = field(default_factory=dict)  # for people: balance, sizes, duplicates, leaks, rejects
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # file name → sha256, bytes
    created_at: str = ""  # ISO 8601, UTC

    @property
    def reference(self) -> str:
        """`NAME@VERSION`."""
        return f"{self.name}@{self.version}"

    def lacks(self, task: Task) -> list[str]:
        """What of NEEDED its images do not have."""
        return [what for what in NEEDED[task] if not getattr(self, f"has_{what}")]

    def to_json(self) -> str:
        """The description as text, keys in the order of the fields."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Dataset":
        """Reads what `to_json` wrote; ignores keys it does not know. Raises KeyError, TypeError or ValueError."""
        raw = json.loads(text)
        known = {key: raw[key] for key in cls.__dataclass_fields__ if key in raw}
        known["classes"] = tuple(known["classes"])
        return cls(**known)


def rows_by_image(images: pa.Table, annotations: pa.Table) -> dict[str, list[int]]:
    """The rows of `annotations` that belong to each image, in the order of `images`; those of others are left out."""
    rows: dict[str, list[int]] = {image: [] for image in images.column("image").to_pylist()}
    for row, image in enumerate(annotations.column("image").to_pylist()):
        if image in rows:
            rows[image].append(row)
    return rows


def version_of(classes: tuple[str, ...], images: pa.Table, annotations: pa.Table) -> str:
    """The version that follows from the content. Both tables must be in their final order.

    Rows are hashed as values, so that a newer Parquet writer makes no new version.
    """
    digest = hashlib.sha256(json.dumps(classes, ensure_ascii=False).encode())
    for table in (images, annotations):
        for batch in table.combine_chunks().to_batches(max_chunksize=4096):
            digest.update(json.dumps(batch.to_pylist(), ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()[:12]
