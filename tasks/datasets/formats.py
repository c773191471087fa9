"""The formats in which labels are written: which reader knows which, and which one a source is in."""

import importlib
import logging
from typing import Protocol

from models.errors import UsageError
from tasks.datasets.labelled import Labelled
from tasks.datasets.tree import Tree

logger = logging.getLogger("pixelmill.datasets")

# Format → the module that reads it. In this order they are asked: the first ones need files that only they have.
READERS: dict[str, str] = {
    "coco": "tasks.datasets.coco",
    "yolo": "tasks.datasets.yolo",
    "voc": "tasks.datasets.voc",
    "masks": "tasks.datasets.masks",
    "folder": "tasks.datasets.folder",
}

_LOOKED_FOR = (
    "coco (a JSON file with images, annotations and categories), yolo (a data.yaml, or a label file of numbers per "
    "image), voc (an XML file per image), masks (a mask image per image), folder (one folder per class, or images)"
)


class Reader(Protocol):
    """What the module of a format offers."""

    def recognise(self, tree: Tree, annotations: str | None) -> str | None:
        """What it saw, for people, where the source is in its format; else None. Opens few files, and small ones."""

    def read(self, tree: Tree, annotations: str | None) -> Labelled:
        """Everything the source says. Raises UsageError where a file that all depends on cannot be used."""


def reader(format_name: str) -> Reader:
    """The reader of a format. Raises UsageError for an unknown one."""
    if format_name not in READERS:
        raise UsageError(f"no format {format_name!r}; the formats are: {', '.join(READERS)}")
    return importlib.import_module(READERS[format_name])  # type: ignore[return-value]


def recognise(tree: Tree, annotations: str | None = None) -> str:
    """The format of a source; logs what gave it away. Raises UsageError that lists what was looked for."""
    for name in READERS:
        saw = reader(name).recognise(tree, annotations)
        if saw:
            logger.info("%s looks like %s: %s", tree.name, name, saw)
            return name
    where = f" with --annotations {annotations}" if annotations else ""
    found = _extensions(tree)
    raise UsageError(
        f"{tree.name}{where}: no format that is known here. Looked for {_LOOKED_FOR}; found {found}. "
        "Name the format with --format, or the labels with --annotations"
    )


def _extensions(tree: Tree) -> str:
    """Which kinds of files the tree has, most first."""
    counts: dict[str, int] = {}
    for path in tree.files:
        name = path.rpartition("/")[2]
        extension = f".{name.rpartition('.')[2].lower()}" if "." in name else "without extension"
        counts[extension] = counts.get(extension, 0) + 1
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return ", ".join(f"{count:,} {extension}" for extension, count in most) or "no files"
