"""COCO instances: JSON files with images, categories, and annotations that have boxes, polygons or run-length masks.

Boxes are x, y, width and height in pixels, counted from 0. Classes come in the order of the category ids, which may
have gaps; several ids with one name are one class. An id may be a number or text, and 7 and "7" are the same. The ids
of annotations play no role, so that files that somebody merged are read as they are.

JSON has no lines worth naming: `line` is the position of the entry in its array, counted from 1. Captions, keypoints
without boxes, panoptic maps and labels of whole images are not read.
"""

import math
import posixpath
import re
from contextlib import ExitStack
from typing import Any

from models.errors import UsageError
from models.imaging import masks
from tasks.datasets.coco_document import Malformed, has_usual_name, id_of, json_paths, labels_of, load, short
from tasks.datasets.label_files import ImageIndex, is_text, peek, split_named
from tasks.datasets.labelled import Labelled, LabelledImage, LabelledRegion, Reject
from tasks.datasets.tree import Tree, open_annotations

SPLITS = ("train", "val", "test")

_ARRAY = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')
_INSIDE = re.compile(rb'"(file_name|image_id|bbox|segmentation)"\s*:')


def recognise(tree: Tree, annotations: str | None) -> str | None:
    """What was seen, where JSON files in COCO's form are there; else None. Reads the start of a few files at most."""
    with ExitStack() as stack:
        files = tree if annotations is None else stack.enter_context(open_annotations(tree, annotations))
        paths = json_paths(files)
        for path in paths[:8]:
            start = peek(files, path).replace(b"\0", b"")
            if _ARRAY.search(start) and _INSIDE.search(start):
                return f"COCO: {len(paths)} JSON file{'s' * (len(paths) > 1)}, such as {files.uri(path)}"
    return None


def read(tree: Tree, annotations: str | None) -> Labelled:
    """All images and regions, one split for each file where several files name splits.

    Images without annotations are kept, images that no file names are rejected. Raises UsageError where no file is in
    COCO's form, or one that should be cannot be read; NotFound and StorageError.
    """
    with ExitStack() as stack:
        files = tree if annotations is None else stack.enter_context(open_annotations(tree, annotations))
        reader = _Reader(tree, files)
        reader.read_files(json_paths(files), chosen=annotations is not None)
        return reader.finish()


class _Reader:
    def __init__(self, tree: Tree, files: Tree):
        self.tree = tree
        self.files = files
        inside = tree.name.rstrip("/") + "/"
        self.below = files.name.removeprefix(inside).strip("/") if files.name.startswith(inside) else ""
        self.index = ImageIndex(tree)
        self.out = Labelled("coco", "")
        self.classes: dict[str, None] = {}  # an ordered set
        self.entries: dict[str, str] = {}  # image → URI of the file that names it
        self.num_files = 0

    def read_files(self, paths: list[str], *, chosen: bool) -> None:
        documents, problems = [], []
        for path in paths:
            try:
                documents.append((path, load(self.files, path)))
            except UsageError as error:
                problems.append((path, error))
        for path, problem in problems:
            if chosen or not documents or has_usual_name(path):
                raise problem
        if not documents:
            raise UsageError(f"expected COCO's JSON in {self.files.name}, found no file: name one with --annotations")
        names = [split_named(path) for path, _ in documents]
        several = len(documents) > 1 and all(names)
        for (path, document), name in zip(documents, names, strict=True):
            self._read_document(path, document, name if several else None, name)
            self.num_files += 1

    def finish(self) -> Labelled:
        for image in self.index.left_over(self.entries):
            self.out.rejects.append(Reject("image", self.tree.uri(image), None, "not in the annotations"))
        out = self.out
        out.classes = tuple(self.classes)
        out.has_boxes = bool(out.regions)
        out.has_masks = any(region.polygons is not None or region.rle is not None for region in out.regions)
        plural = "s" * (self.num_files > 1)
        out.saw = (
            f"COCO: {self.num_files} annotation file{plural}, {len(out.images)} images, {len(out.regions)} annotations"
        )
        return out

    def _read_document(self, path: str, document: dict[str, Any], split: str | None, hint: str | None) -> None:
        source = self.files.uri(path)
        labels = labels_of(document, source)
        self.classes.update(dict.fromkeys(labels.values()))
        images = self._read_images(document, source, split, self._folders(path, hint))
        for number, annotation in enumerate(document["annotations"], 1):
            try:
                self.out.regions.append(_region(annotation, number, source, images, labels))
            except Malformed as error:
                self._reject(source, number, error)
        for number, annotation in enumerate(document.get("ignored") or [], 1):  # coco_writer's, of no category
            try:
                self.out.regions.append(_region(annotation, number, source, images, None))
            except Malformed as error:
                self._reject(source, number, error)

    def _folders(self, path: str, hint: str | None) -> list[str]:
        """Where the images of a file may lie, the likeliest folder first."""
        own = posixpath.join(self.below, posixpath.dirname(path))
        usual = [own, "", "images", posixpath.join(own, "images"), posixpath.join(posixpath.dirname(own), "images")]
        of_split = [folder for folder in self.index.folders if hint and split_named(folder) == hint]
        return list(dict.fromkeys([own, *of_split, *usual]))

    def _read_images(
        self, document: dict[str, Any], source: str, split: str | None, folders: list[str]
    ) -> dict[str, tuple[str, LabelledImage]]:
        """Path and entry by id."""
        images: dict[str, tuple[str, LabelledImage]] = {}
        for number, entry in enumerate(document["images"], 1):
            try:
                if not isinstance(entry, dict):
                    raise Malformed("malformed image entry", f"expected an object, got {short(entry)}")
                key = id_of(entry.get("id"), "malformed image entry")
                name = entry.get("file_name")
                if not is_text(name):
                    raise Malformed("malformed image entry", f"file_name is {short(name)}")
                path = self.index.find(name, folders) or _missing(name, folders[0])
                own = entry.get("split")  # coco_writer's
                image = LabelledImage(
                    path,
                    split or (own if own in SPLITS else None),
                    None,
                    _size(entry.get("width")),
                    _size(entry.get("height")),
                    source,
                    number,
                )
                if key in images and images[key][0] != path:
                    raise Malformed("duplicate image id", f"{short(key)} is {images[key][0]}, and {path} is not read")
                images[key] = (path, image)
                if path in self.entries:
                    raise Malformed("image named twice", f"{path} is in {self.entries[path]}")
                self.entries[path] = source
                self.out.images.append(image)
            except Malformed as error:
                self._reject(source, number, error)
        return images

    def _reject(self, source: str, number: int, error: "Malformed") -> None:
        self.out.rejects.append(Reject("annotation", source, number, error.reason, error.detail))


def _region(
    annotation: Any,
    number: int,
    source: str,
    images: dict[str, tuple[str, LabelledImage]],
    labels: dict[str, str] | None,
) -> LabelledRegion:
    if not isinstance(annotation, dict):
        raise Malformed("malformed annotation", f"expected an object, got {short(annotation)}")
    image = images.get(id_of(annotation.get("image_id"), "unknown image"))
    if image is None:
        raise Malformed("unknown image", f"image_id {short(annotation['image_id'])}")
    label = None
    if labels is not None:
        label = labels.get(id_of(annotation.get("category_id"), "unknown label"))
        if label is None:
            raise Malformed("unknown label", f"category_id {short(annotation['category_id'])}")
    polygons, rle, size_hw = _segmentation(annotation.get("segmentation"), image[1])
    box = _box(annotation.get("bbox"))
    if box is None and polygons is None and rle is None:
        raise Malformed("no box and no mask")
    area = annotation.get("area")
    if area is not None and not _is_number(area):
        raise Malformed("malformed area", short(area))
    return LabelledRegion(
        image[0],
        label,
        source,
        number,
        box,
        polygons,
        rle=rle,
        rle_size_hw=size_hw,
        area=None if area is None else _float(area),
        crowd=_flag(annotation, "iscrowd"),
        difficult=_flag(annotation, "difficult"),
    )


def _box(bbox: Any) -> tuple[float, float, float, float] | None:
    if bbox is None or bbox == []:
        return None
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise Malformed("malformed box", f"expected [x, y, width, height], got {short(bbox)}")
    x, y, width, height = map(_float, bbox)
    return (x, y, x + width, y + height)


def _segmentation(
    segmentation: Any, image: LabelledImage
) -> tuple[tuple[tuple[float, ...], ...] | None, str | None, tuple[int, int] | None]:
    """Polygons, or counts and the size of their mask; none of them where there is no segmentation."""
    if segmentation is None or segmentation == []:
        return None, None, None
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) and all(map(_is_number, polygon)) for polygon in segmentation):
            raise Malformed("malformed polygon", f"expected lists of numbers in a list, got {short(segmentation)}")
        return tuple(tuple(map(_float, polygon)) for polygon in segmentation), None, None
    if not isinstance(segmentation, dict):
        raise Malformed("malformed segmentation", f"expected polygons or runs, got {short(segmentation)}")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int for side in size):
        raise Malformed("corrupt mask", f"expected the size [height, width], got {short(size)}")
    if None not in (image.width, image.height) and size != [image.height, image.width]:
        detail = f"{short(size[1])}×{short(size[0])}, the image {image.width}×{image.height}"
        raise Malformed("mask of another size", detail)
    height, width = size
    try:
        if isinstance(counts, list):
            return None, masks.encode_runs(counts, height, width), (height, width)
        if isinstance(counts, str):
            masks.runs_of(counts, height, width)
            return None, counts, (height, width)
    except ValueError as error:
        raise Malformed("corrupt mask", str(error)) from None
    raise Malformed("corrupt mask", f"expected counts as text or a list, got {short(counts)}")


def _flag(annotation: dict[str, Any], key: str) -> bool:
    value = annotation.get(key, 0)
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    raise Malformed(f"malformed {key}", f"expected 0 or 1, got {short(value)}")


def _size(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**31 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _missing(name: str, folder: str) -> str:
    """The path that an image would have, for the reject that says it is missing."""
    path = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/").lstrip("/")))
    return re.sub(r"^(\.\./)+", "", path)
