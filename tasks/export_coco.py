"""Findings and data sets as COCO files, for pycocotools, FiftyOne, CVAT and whatever else reads them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from models.errors import NotFound, UsageError
from models.records import Task
from tasks import registry
from tasks.datasets import datasets
from tasks.datasets.coco_writer import file_name, to_coco
from tasks.query import BATCH_ROWS, database
from tasks.storage import join, normalise, open_storage
from tasks.table import Table

_DIGITS = 4  # of a pixel; boxes are 32-bit


@dataclass(frozen=True)
class Exported:
    """What was written."""

    source: str  # NAME@VERSION of the data set, or the table
    model: str | None  # NAME@VERSION whose findings they are; None for a data set
    out: str
    images: int
    annotations: int
    categories: int


def export_coco(store: str, source: str, out: Path, *, model: str | None = None, results: bool = False) -> Exported:
    """Writes the newest objects of a table, or the labels of a data set, into one file, whole or not at all.

    The file is a COCO document with images, categories and annotations; those of a table have a score as well, and
    images that could not be read are left out. Image ids count from 1 in the order of the URIs, category ids are the
    positions of the labels plus 1. results: only the list of annotations. Raises UsageError, NotFound.
    """
    store = normalise(store)
    tables = open_storage(store).names(join(store, "tables"))
    if source in tables:
        write, done = _of_table(store, Table(store, source), out, model, results)
    else:
        if model is not None or results:
            raise UsageError(f"--model and --results belong to tables, and {source!r} is none of {store}")
        write, done = _of_dataset(store, source, tables, out)
    if not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: {out.parent} is no folder")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(write)
        unfinished.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return Exported(**done)


def _of_dataset(store: str, source: str, tables: list[str], out: Path) -> tuple[Iterator[str], dict[str, Any]]:
    try:
        dataset = datasets.resolve(store, source)
    except NotFound as error:
        known = ", ".join(sorted(tables)) or "none yet"
        raise NotFound(f"no table {source!r} in {store} (tables there: {known}), and {error}") from None
    document = to_coco(
        dataset, datasets.read_images(store, dataset), datasets.read_annotations(store, dataset), dataset.source
    )
    done = {
        "source": dataset.reference,
        "model": None,
        "out": str(out),
        **{key: len(document[key]) for key in ("images", "annotations", "categories")},
    }
    return json.JSONEncoder(ensure_ascii=False, allow_nan=False).iterencode(document), done


def _of_table(
    store: str, table: Table, out: Path, model: str | None, results: bool
) -> tuple[Iterator[str], dict[str, Any]]:
    if table.task not in (Task.DETECT, Task.INSTANCE):
        raise UsageError(
            f"table {table.name!r} holds results of task {table.task}; export-coco takes those of "
            f"{Task.DETECT} and {Task.INSTANCE}"
        )
    chosen = _model_of(store, table, model)
    labels = registry.resolve(store, chosen).labels
    categories = {label: number for number, label in reversed(list(enumerate(labels, 1)))}  # of equal names the first
    sources = sorted({head.source for head in table.heads(chosen)}, key=len, reverse=True)
    done: dict[str, Any] = {
        "source": table.name,
        "model": chosen,
        "out": str(out),
        "images": 0,
        "annotations": 0,
        "categories": len(labels),
    }

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        with database(store, table.name) as connection:
            yield from enumerate(_rows(connection, table.name, chosen), 1)

    def images() -> Iterator[dict[str, Any]]:
        for number, row in rows():
            done["images"] = number
            root = next((source for source in sources if row["image"].startswith(join(source, ""))), None)
            name = file_name(row["image"], root)
            yield {"id": number, "file_name": name, "width": row["width"], "height": row["height"]}

    def annotations() -> Iterator[dict[str, Any]]:
        for number, row in rows():
            done["images"] = number
            for found in row["objects"]:
                done["annotations"] += 1
                yield _annotation(done["annotations"], number, found, row, categories)

    def text() -> Iterator[str]:
        if results:
            yield from _array(annotations())
            return
        info = {"description": f"{table.name}, found by {chosen}"}
        named = [{"id": number, "name": label} for number, label in enumerate(labels, 1)]
        yield f'{{"info": {_json(info)}, "categories": {_json(named)}, "images": '
        yield from _array(images())
        yield ', "annotations": '
        yield from _array(annotations())
        yield "}"

    return text(), done


def _model_of(store: str, table: Table, model: str | None) -> str:
    """The one model whose findings are meant."""
    there = sorted({head.model for head in table.heads()})
    if model is None and len(there) == 1:
        return there[0]
    if model is None:
        raise UsageError(
            f"table {table.name!r} holds findings of {len(there)} models; name one with --model: "
            f"{', '.join(there) or 'none yet'}"
        )
    chosen = model if model in there else registry.resolve(store, model).reference
    if chosen not in there:
        raise NotFound(
            f"table {table.name!r} holds nothing of {chosen}; models there: {', '.join(there) or 'none yet'}"
        )
    return chosen


def _rows(connection: duckdb.DuckDBPyConnection, table: str, model: str) -> Iterator[dict[str, Any]]:
    found = connection.execute(
        f"SELECT image, width, height, objects FROM \"{table}\" WHERE model = ? AND status = 'ok' ORDER BY image",
        [model],
    )
    for batch in found.to_arrow_reader(BATCH_ROWS):
        yield from batch.to_pylist()


def _annotation(
    number: int, image: int, found: dict[str, Any], row: dict[str, Any], categories: dict[str, int]
) -> dict[str, Any]:
    x_min, y_min = found["x_min"], found["y_min"]
    width, height = found["x_max"] - x_min, found["y_max"] - y_min
    annotation: dict[str, Any] = {
        "id": number,
        "image_id": image,
        "category_id": categories[found["label"]],
        "bbox": [round(side, _DIGITS) for side in (x_min, y_min, width, height)],
        "area": round(found.get("area", width * height), _DIGITS),
        "iscrowd": 0,
        "score": found["score"],
    }
    if "mask" in found:
        annotation["segmentation"] = {"size": [row["height"], row["width"]], "counts": found["mask"]}
    return annotation


def _array(items: Iterator[dict[str, Any]]) -> Iterator[str]:
    """A JSON array, an item a line, never held as a whole."""
    between = "[\n"
    for item in items:
        yield between + _json(item)
        between = ",\n"
    yield "[]" if between == "[\n" else "\n]"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
