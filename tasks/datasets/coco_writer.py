"""A data set in COCO's form, as pycocotools, FiftyOne and CVAT read it."""

from typing import Any

import pyarrow as pa

from models.dataset import Dataset
from tasks.storage import join


def to_coco(dataset: Dataset, images: pa.Table, annotations: pa.Table, root: str | None = None) -> dict[str, Any]:
    """The whole data set as one document for `json.dump`.

    file_name is the image's URI from `root` (a URI) on, or the last part of the URI without one or where the image lies
    elsewhere. Category ids are the classes' indices plus 1. Segmentations are polygons where the source had such, else
    run-length masks; [] for a box only. What COCO has no word for stands in keys that its tools ignore and `coco.read`
    knows: the split of an image, difficult annotations, and under "ignored" the regions that belong to no category.
    """
    ids: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    entries: list[dict[str, Any]] = []
    for row in images.select(["image", "width", "height", "split"]).to_pylist():
        uri = row["image"]
        ids[uri] = len(entries) + 1
        sizes[uri] = (row["height"], row["width"])
        entry = {"id": ids[uri], "file_name": file_name(uri, root), "width": row["width"], "height": row["height"]}
        entries.append(entry if row["split"] is None else {**entry, "split": row["split"]})
    categories = {name: number for number, name in enumerate(dataset.classes, 1)}
    written: list[dict[str, Any]] = []
    ignored: list[dict[str, Any]] = []
    for batch in annotations.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            target = ignored if row["label"] is None else written
            annotation: dict[str, Any] = {"id": len(target) + 1, "image_id": ids[row["image"]]}
            if row["label"] is not None:
                annotation["category_id"] = categories[row["label"]]
            annotation |= {
                "bbox": [row["x_min"], row["y_min"], row["x_max"] - row["x_min"], row["y_max"] - row["y_min"]],
                "segmentation": _segmentation(row, sizes[row["image"]]),
                "area": row["area"],
                "iscrowd": int(row["crowd"]),
            }
            target.append({**annotation, "difficult": 1} if row["difficult"] else annotation)
    document: dict[str, Any] = {
        "info": {"description": dataset.reference, "version": dataset.version},
        "images": entries,
        "annotations": written,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }
    return {**document, "ignored": ignored} if ignored else document


def file_name(uri: str, root: str | None) -> str:
    """How a document names the image: from `root` (a URI) on, else by the last part of its URI."""
    inside = None if root is None else join(root, "")
    return uri.removeprefix(inside) if inside is not None and uri.startswith(inside) else uri.rpartition("/")[2]


def _segmentation(row: dict[str, Any], size_hw: tuple[int, int]) -> Any:
    if row["polygons"] is not None:
        return row["polygons"]
    return [] if row["mask"] is None else {"size": list(size_hw), "counts": row["mask"]}
