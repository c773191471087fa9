"""COCO instances: JSON files with images, categories, and annotations that have boxes, polygons or run-length masks.

Boxes are x, y, width and height in pixels, counted from 0. Classes come in the order of the category ids, which may
have gaps; several ids with one name are one class. An id may be a number or text, and 7 and "7" are the same. The ids
of annotations play no role, so that files that somebody merged are read as they are.

JSON has no lines worth naming: `line` is the position of the entry in its array, counted from 1. Captions, keypoints
without boxes, panoptic maps and labels of whole images are not read.
"""

import json
import math
import posixpath
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from models.errors import UsageError
from models.imaging import masks
from tasks.datasets.label_files import ImageIndex, peek, split_named, stem_of
from tasks.datasets.labelled import Labelled, LabelledImage, LabelledRegion, Reject
from tasks.datasets.tree import Tree, open_annotations

SPLITS = ("train", "val", "test")

_OTHER_USE = re.compile(r"(captions|panoptic|stuff|image_info|person_keypoints|keypoints)_|.*\bpackage(-lock)?$")
_USUAL_NAME = re.compile(r"instances|coco|annotations?|labels?|train|val|test")
_KEY = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


def recognise(tree: Tree, annotations: str | None) -> str | None:
    """What was seen, where JSON files in COCO's form are there; else None. Reads the start of a few files at most."""
    with ExitStack() as stack:
        files = tree if annotations is None else stack.enter_context(open_annotations(tree, annotations))
        paths = _json_paths(files)
        for path in paths[:8]:
            if _KEY.search(peek(files, path).replace(b"\0", b"")):
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
        reader.read_files(_json_paths(files), chosen=annotations is not None)
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
                documents.append((path, _load(self.files, path)))
            except UsageError as error:
                problems.append((path, error))
        for path, problem in problems:
            if chosen or not documents or _USUAL_NAME.search(stem_of(path).lower()):
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
        labels = _labels(document, source)
        self.classes.update(dict.fromkeys(labels.values()))
        images = self._read_images(document, source, split, self._folders(path, hint))
        for number, annotation in enumerate(document["annotations"], 1):
            try:
                self.out.regions.append(_region(annotation, number, source, images, labels))
            except _Malformed as error:
                self._reject(source, number, error)
        for number, annotation in enumerate(document.get("ignored") or [], 1):  # coco_writer's, of no category
            try:
                self.out.regions.append(_region(annotation, number, source, images, None))
            except _Malformed as error:
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
                    raise _Malformed("malformed image entry", f"expected an object, got {_short(entry)}")
                key = _id(entry.get("id"), "malformed image entry")
                name = entry.get("file_name")
                if not isinstance(name, str) or not name or "\0" in name:
                    raise _Malformed("malformed image entry", f"file_name is {_short(name)}")
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
                    raise _Malformed("duplicate image id", f"{key} is {images[key][0]}, and {path} is not read")
                images[key] = (path, image)
                if path in self.entries:
                    raise _Malformed("image named twice", f"{path} is in {self.entries[path]}")
                self.entries[path] = source
                self.out.images.append(image)
            except _Malformed as error:
                self._reject(source, number, error)
        return images

    def _reject(self, source: str, number: int, error: "_Malformed") -> None:
        self.out.rejects.append(Reject("annotation", source, number, error.reason, error.detail))


class _Malformed(Exception):
    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def _json_paths(files: Tree) -> list[str]:
    """Files that may hold instances, those with a usual name first."""
    paths = [path for path in files.files if path.lower().endswith(".json")]
    if len(paths) > 1:
        paths = [path for path in paths if not _OTHER_USE.match(stem_of(path).lower())] or paths
    return sorted(paths, key=lambda path: (not _USUAL_NAME.search(stem_of(path).lower()), path))


def _load(files: Tree, path: str) -> dict[str, Any]:
    uri = files.uri(path)
    expected = "expected COCO's JSON, an object with the arrays images, annotations and categories"
    try:
        document = json.loads(files.read(path))
    except FileNotFoundError:
        raise UsageError(f"{uri} has gone since it was listed: try again") from None
    except RecursionError:
        raise UsageError(f"{uri}: {expected}, but it is nested too deep to be that") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{uri}: {expected}, but line {error.lineno} is no JSON: {error.msg}") from None
    except ValueError as error:  # bytes that are no text, or a number of thousands of digits
        raise UsageError(f"{uri}: {expected}, but it cannot be read: {str(error).split(';')[0]}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{uri}: {expected}, got {_short(document)}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            got = _short(document[key]) if key in document else "no such key"
            raise UsageError(f"{uri}: {expected}, got for {key} {got}")
    return document


def _labels(document: dict[str, Any], source: str) -> dict[str, str]:
    """Class by category id, in the order of the ids."""
    names: dict[str, str] = {}
    order: list[tuple[Any, ...]] = []
    for number, category in enumerate(document["categories"], 1):
        try:
            if not isinstance(category, dict):
                raise _Malformed(f"expected an object, got {_short(category)}")
            key = _id(category.get("id"), "the id")
            name = category.get("name")
            if not isinstance(name, str) or not name.strip():
                raise _Malformed(f"the name is {_short(name)}")
        except _Malformed as error:
            said = f"{error.reason} {error.detail}".strip()
            raise UsageError(f"{source}: category {number} needs an id and a name: {said}") from None
        if names.setdefault(key, name.strip()) != name.strip():
            raise UsageError(
                f"{source}: the category id {key} is both {names[key]!r} and {name.strip()!r}: give each its own id"
            )
        order.append((0, int(key), "") if re.fullmatch(r"-?[0-9]{1,18}", key) else (1, 0, key))
    ordered = sorted(zip(order, map(_key_of, document["categories"]), strict=True))
    return {key: names[key] for _, key in ordered}


def _key_of(category: dict[str, Any]) -> str:
    return _id(category["id"], "")


def _region(
    annotation: Any,
    number: int,
    source: str,
    images: dict[str, tuple[str, LabelledImage]],
    labels: dict[str, str] | None,
) -> LabelledRegion:
    if not isinstance(annotation, dict):
        raise _Malformed("malformed annotation", f"expected an object, got {_short(annotation)}")
    image = images.get(_id(annotation.get("image_id"), "unknown image"))
    if image is None:
        raise _Malformed("unknown image", f"image_id {_short(annotation['image_id'])}")
    label = None
    if labels is not None:
        label = labels.get(_id(annotation.get("category_id"), "unknown label"))
        if label is None:
            raise _Malformed("unknown label", f"category_id {_short(annotation['category_id'])}")
    polygons, rle, size_hw = _segmentation(annotation.get("segmentation"), image[1])
    box = _box(annotation.get("bbox"))
    if box is None and polygons is None and rle is None:
        raise _Malformed("no box and no mask")
    area = annotation.get("area")
    if area is not None and not _is_number(area):
        raise _Malformed("malformed area", _short(area))
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
        raise _Malformed("malformed box", f"expected [x, y, width, height], got {_short(bbox)}")
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
            raise _Malformed("malformed polygon", f"expected lists of numbers in a list, got {_short(segmentation)}")
        return tuple(tuple(map(_float, polygon)) for polygon in segmentation), None, None
    if not isinstance(segmentation, dict):
        raise _Malformed("malformed segmentation", f"expected polygons or runs, got {_short(segmentation)}")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int for side in size):
        raise _Malformed("corrupt mask", f"expected the size [height, width], got {_short(size)}")
    if None not in (image.width, image.height) and size != [image.height, image.width]:
        detail = f"{_short(size[1])}×{_short(size[0])}, the image {image.width}×{image.height}"
        raise _Malformed("mask of another size", detail)
    height, width = size
    try:
        if isinstance(counts, list):
            return None, masks.encode_runs(counts, height, width), (height, width)
        if isinstance(counts, str):
            masks.runs_of(counts, height, width)
            return None, counts, (height, width)
    except ValueError as error:
        raise _Malformed("corrupt mask", str(error)) from None
    raise _Malformed("corrupt mask", f"expected counts as text or a list, got {_short(counts)}")


def _flag(annotation: dict[str, Any], key: str) -> bool:
    value = annotation.get(key, 0)
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    raise _Malformed(f"malformed {key}", f"expected 0 or 1, got {_short(value)}")


def _id(value: Any, reason: str) -> str:
    """Text for an id: 7, 7.0 as some tables write it, and "7" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise _Malformed(reason, f"expected a number or text, got {_short(value)}")
    try:
        return str(value)
    except ValueError:  # thousands of digits
        raise _Malformed(reason, "a number of thousands of digits") from None


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


def _short(value: Any) -> str:
    """The value as JSON, its beginning only; nothing large is written out for it."""
    pieces: list[str] = []
    length = 0
    try:
        for piece in _pieces(value):
            pieces.append(piece)
            length += len(piece)
            if length > 60:
                return "".join(pieces)[:60] + "…"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return "".join(pieces)


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield json.dumps(value[:80], ensure_ascii=False)
    else:
        yield from json.JSONEncoder(ensure_ascii=False).iterencode(value)
