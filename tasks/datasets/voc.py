"""Pascal VOC: an XML file for each image, with its boxes.

Numbers are kept as they stand in the files. The original devkit counts pixels from 1 and includes the last one, so a
box over a whole image is (1, 1, width, height); most other tools that write this format count from 0. The files do not
say which they mean, and so a box may begin one pixel late, as it does in nearly every tool that reads them. A box that
is as wide as nothing in these numbers (x_min = x_max) is refused, though the devkit would call it one pixel.

Splits come from ImageSets/Main/{train,val,test}.txt (trainval.txt counts as train where neither of the two is there),
else from folders of that name. Masks (SegmentationClass) are the format `masks`.
"""

import posixpath
from contextlib import ExitStack
from typing import Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from models.errors import UsageError
from tasks.datasets.label_files import ImageIndex, decode_text, peek, read_ahead, split_named, stem_of
from tasks.datasets.labelled import Labelled, LabelledImage, LabelledRegion, Reject
from tasks.datasets.tree import Tree, open_annotations

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_LISTS = ("train", "val", "test")
_FLAGS = {"": False, "0": False, "1": True, "false": False, "true": True}


def recognise(tree: Tree, annotations: str | None) -> str | None:
    """What was seen, where XML files with VOC's root element are there; else None. Reads the start of one file."""
    with ExitStack() as stack:
        files = tree if annotations is None else stack.enter_context(open_annotations(tree, annotations))
        paths = _xml_paths(files)
        if paths and b"<annotation" in _plain(peek(files, paths[0])):
            return f"Pascal VOC: {len(paths)} XML files, the first {files.uri(paths[0])}"
    return None


def read(tree: Tree, annotations: str | None) -> Labelled:
    """All images and boxes. An XML file that cannot be read costs its image; an image without one is rejected.

    Raises UsageError where there is no XML file, NotFound and StorageError.
    """
    with ExitStack() as stack:
        files = tree if annotations is None else stack.enter_context(open_annotations(tree, annotations))
        return _Reader(tree, files).read()


class _Reader:
    def __init__(self, tree: Tree, files: Tree):
        self.tree = tree
        self.files = files
        self.index = ImageIndex(tree)
        self.out = Labelled("voc", "", has_boxes=True)
        self.used: dict[str, str] = {}  # image → the XML file that names it

    def read(self) -> Labelled:
        paths = _xml_paths(self.files)
        if not paths:
            raise UsageError(f"expected VOC's XML files in {self.files.name}, found none: name them with --annotations")
        splits = self._splits(paths)
        for path, data in read_ahead(self.files, paths):
            self._read_file(path, data, splits)
        for image in self.index.left_over(self.used):
            self.out.rejects.append(Reject("image", self.tree.uri(image), None, "no annotation file"))
        self.out.saw = (
            f"Pascal VOC: {len(paths)} XML files, {len(self.out.images)} images, {len(self.out.regions)} boxes"
        )
        return self.out

    def _read_file(self, path: str, data: bytes | None, splits: dict[str, str] | None) -> None:
        source = self.files.uri(path)
        try:
            root, lines = _parse(data)
        except _Malformed as error:
            self._reject(source, error.line, "malformed XML", str(error))
            root, lines = Element("annotation"), []
            image = self._image_of(path, root)
            if image is not None and self.used.setdefault(image, source) == source:
                self.out.rejects.append(
                    Reject("image", self.tree.uri(image), None, "its annotations cannot be read", source)
                )
            return
        image = self._image_of(path, root) or self._expected(path, root)
        if self.used.setdefault(image, source) != source:
            self._reject(source, None, "image named twice", f"{image} has {self.used[image]}")
            return
        split = split_named(image) if splits is None else splits.get(stem_of(path))
        width, height = (_size(root, side) for side in ("width", "height"))
        self.out.images.append(LabelledImage(image, split, None, width, height, source))
        for element, line in zip(root.findall("object"), lines, strict=True):
            try:
                self.out.regions.append(_region(element, image, source, line))
            except _Malformed as error:
                self._reject(source, line, error.reason, str(error))

    def _image_of(self, path: str, root: Element) -> str | None:
        """The image: by the XML file's own name, for the name inside is often from before a renaming; else by that."""
        folder = posixpath.dirname(path)
        beside = posixpath.dirname(folder)
        folders = [posixpath.join(beside, "JPEGImages"), folder, posixpath.join(beside, "images"), beside]
        inside = posixpath.basename(_text(root, "filename").replace("\\", "/"))
        found = self.index.of_stem(stem_of(path))
        near = [image for each in folders for image in found if posixpath.dirname(image) == each]
        candidates = near or (found if len(found) == 1 else [])
        if candidates:
            return next((image for image in candidates if posixpath.basename(image) == inside), candidates[0])
        return self.index.find(inside, folders) if inside else None

    def _expected(self, path: str, root: Element) -> str:
        """Where the image would be, were it there."""
        name = posixpath.basename(_text(root, "filename").replace("\\", "/")) or f"{stem_of(path)}.jpg"
        folder = posixpath.dirname(path)
        if posixpath.basename(folder).lower() == "annotations":
            folder = posixpath.join(posixpath.dirname(folder), "JPEGImages")
        return posixpath.join(folder, name)

    def _splits(self, paths: list[str]) -> dict[str, str] | None:
        """Split by stem, from the lists; None where there are none."""
        lists = {path: stem_of(path) for path in self.tree.files if path.lower().endswith(".txt") and _is_list(path)}
        if not {"train", "val"} & set(lists.values()):
            lists = {path: "train" if name == "trainval" else name for path, name in lists.items()}
        lists = {path: name for path, name in lists.items() if name in _LISTS}
        if not lists:
            return None
        known = {stem_of(path) for path in (*paths, *self.index.paths)}
        splits: dict[str, str] = {}
        for path in sorted(lists, key=lambda path: (_LISTS.index(lists[path]), path)):
            source, split = self.tree.uri(path), lists[path]
            try:
                text = decode_text(self.tree.read(path))
            except (ValueError, FileNotFoundError):
                raise UsageError(f"expected names of images in {source}, but it is no text in UTF-8") from None
            for number, line in enumerate(text.splitlines(), 1):
                words = line.split()
                if not words:
                    continue
                if words[0] not in known:
                    self._reject(source, number, "missing image", words[0])
                elif splits.setdefault(words[0], split) != split:
                    self._reject(source, number, "in two splits", f"{words[0]} stays in {splits[words[0]]}")
        return splits

    def _reject(self, source: str, line: int | None, reason: str, detail: str) -> None:
        self.out.rejects.append(Reject("annotation", source, line, reason, detail))


class _Malformed(Exception):
    def __init__(self, detail: str, line: int | None = None, reason: str = ""):
        super().__init__(detail)
        self.line = line
        self.reason = reason


class _Objects(TreeBuilder):
    """Builds the tree, and notes on which line each object of the image begins."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.lines: list[int] = []
        self.parser: Any = None

    def start(self, tag: Any, attrs: Any, /) -> Any:
        if self.depth == 1 and tag == "object":
            self.lines.append(self.parser.CurrentLineNumber)
        self.depth += 1
        return super().start(tag, attrs)

    def end(self, tag: Any, /) -> Any:
        self.depth -= 1
        return super().end(tag)


def _parse(data: bytes | None) -> tuple[Element, list[int]]:
    if data is None:
        raise _Malformed("it has gone since it was listed")
    builder = _Objects()
    parser: Any = DefusedXMLParser(target=builder, forbid_dtd=True)
    builder.parser = parser.parser
    try:
        parser.feed(data)
        root = parser.close()
    except ParseError as error:
        raise _Malformed(str(error), error.position[0]) from None
    except DefusedXmlException as error:
        raise _Malformed(f"it declares a document type or entities ({type(error).__name__})") from None
    except (ValueError, LookupError) as error:  # an encoding that the parser does not know
        raise _Malformed(" ".join(str(error).split())) from None
    if root.tag != "annotation":
        raise _Malformed(f"expected the root element annotation, got {root.tag[:80]}")
    return root, builder.lines


def _region(element: Element, image: str, source: str, line: int) -> LabelledRegion:
    name = _text(element, "name")
    if not name:
        raise _Malformed("the object has no name", reason="no label")
    box = element.find("bndbox")
    if box is None:
        raise _Malformed("the object has no bndbox", reason="no box and no mask")
    sides = []
    for side in _SIDES:
        text = _text(box, side)
        try:
            sides.append(float(text))
        except ValueError:
            raise _Malformed(f"{side} is {text[:40]!r}", reason="malformed box") from None
    difficult = _FLAGS.get(_text(element, "difficult").lower())
    if difficult is None:
        raise _Malformed(f"{_text(element, 'difficult')[:40]!r}, not 0 or 1", reason="malformed difficult")
    x_min, y_min, x_max, y_max = sides
    return LabelledRegion(image, name, source, line, (x_min, y_min, x_max, y_max), difficult=difficult)


def _text(element: Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _size(root: Element, side: str) -> int | None:
    """Pixels; None where the file says none, or zero as some tools do."""
    text = root.findtext(f"size/{side}") or ""
    try:
        return int(text) or None
    except ValueError:
        return None


def _plain(start: bytes) -> bytes:
    return start.replace(b"\0", b"")  # UTF-16, as far as the tag's name goes


def _xml_paths(files: Tree) -> list[str]:
    """Those in folders called Annotations, where there are such; else all."""
    paths = [path for path in files.files if path.lower().endswith(".xml")]
    return [path for path in paths if posixpath.basename(posixpath.dirname(path)).lower() == "annotations"] or paths


def _is_list(path: str) -> bool:
    parts = path.split("/")
    return parts[-3:-1] == ["ImageSets", "Main"] and stem_of(path) in (*_LISTS, "trainval")
