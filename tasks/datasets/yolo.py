"""YOLO: a text file for each image, with a line for each object, and a data.yaml that names classes and splits.

    class x_centre y_centre width height     a box
    class x1 y1 x2 y2 x3 y3 …                a polygon

All numbers but the class are shares of the image's width and height. With kpt_shape in data.yaml the lines are boxes
followed by key points, which are not read. The text file lies in a folder labels/ that mirrors images/, or beside the
image. An image without one, or with an empty one, shows no object.

Without a data.yaml the names come from classes.txt, obj.names or the like, else they are the numbers themselves.
"""

import posixpath
import re
from contextlib import ExitStack

from models.errors import UsageError
from tasks.datasets.label_files import ImageIndex, decode_text, is_mask_folder, peek, read_ahead, split_named, stem_of
from tasks.datasets.labelled import Labelled, LabelledImage, LabelledRegion, Reject
from tasks.datasets.tree import Tree, open_annotations
from tasks.datasets.yolo_description import YAML_EXTENSIONS, Description, find_description

_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "names.txt", "class_names.txt", "_darknet.labels")
_NOT_LABELS = re.compile(r"readme|licen[cs]e|notes?|train|val|valid|test|requirements", re.I)
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|[-+]?(?:nan|inf(?:inity)?)", re.I)
_CLASS = re.compile(r"([0-9]{1,6})(?:\.0*)?")  # some tools write all columns as decimals


def recognise(tree: Tree, annotations: str | None) -> str | None:
    """What was seen, where a data.yaml or label files of numbers are there; else None. Reads a few short beginnings."""
    with ExitStack() as stack:
        files = tree if annotations is None else stack.enter_context(open_annotations(tree, annotations))
        description = find_description(tree, files, strict=False)
        if description is not None:
            return f"YOLO: {description.uri}"
        labels = _LabelFiles(tree, files)
        if not any(path.lower().endswith(".txt") for path in labels.files.files):
            return None
        found = (path for image in tree.images() if (path := labels.of(image)) and labels.files.files[path].bytes)
        for path, _ in zip(found, range(4), strict=False):
            lines = peek(labels.files, path, 4096).decode("utf-8", "replace").lstrip("\ufeff").splitlines()
            words = lines[0].split() if lines else []
            if len(words) >= 5 and all(map(_NUMBER.fullmatch, words)):
                return f"YOLO: label files such as {labels.files.uri(path)}"
    return None


def read(tree: Tree, annotations: str | None) -> Labelled:
    """All images and objects; a line that is no object is rejected with its number.

    `annotations` is a data.yaml, or a folder with the label files. Raises UsageError for a data.yaml that cannot be
    used or whose paths are not in the source, NotFound and StorageError.
    """
    with ExitStack() as stack:
        files = tree if annotations is None else stack.enter_context(open_annotations(tree, annotations))
        return _Reader(tree, files).read()


class _LabelFiles:
    """Finds the label file of an image: where the annotations named by hand lie, else in the usual places."""

    def __init__(self, tree: Tree, files: Tree):
        only_description = all(path.lower().endswith(YAML_EXTENSIONS) for path in files.files)
        self.apart = files is not tree and not only_description
        self.files = files if self.apart else tree

    def of(self, image: str) -> str | None:
        """The path in `files`; None where there is none."""
        return next((path for path in self._candidates(image) if path in self.files.files), None)

    def _candidates(self, image: str) -> list[str]:
        parts = image.split("/")
        name = f"{stem_of(image)}.txt"
        folders = parts[:-1]
        positions = reversed([index for index, part in enumerate(folders) if part.lower() == "images"])
        mirrored = [(*folders[:index], "labels", *folders[index + 1 :]) for index in positions]
        others = [tuple(folders), (*folders[:-1], "labels"), (*folders, "labels")]
        if self.apart:
            ends = [tuple(folders[start:]) for start in range(len(parts))]
            others += [folder for end in ends for folder in (end, ("labels", *end))]
        return ["/".join((*folder, name)) for folder in mirrored + others]


class _Reader:
    def __init__(self, tree: Tree, files: Tree):
        self.tree = tree
        self.index = ImageIndex(tree)
        self.labels = _LabelFiles(tree, files)
        self.description: Description | None = find_description(tree, files, strict=True)
        self.key_points = self.description is not None and self.description.has_key_points
        self.names = self.description.names if self.description is not None else None
        self.names = self.names or _names_beside(files) or (_names_beside(tree) if files is not tree else None)
        self.out = Labelled("yolo", "", has_boxes=True)
        self.notes: list[str] = []
        self.split_of: dict[str, str | None] = {}
        self.unreadable: dict[str, str] = {}  # image → its label file

    def read(self) -> Labelled:
        if self.description is not None and self.description.splits:
            for split, entries in self.description.splits.items():
                for entry in entries:
                    self._add_entry(self.description, split, entry)
            for image in self.index.left_over(self.split_of):
                detail = f"of {self.description.uri}"
                self.out.rejects.append(Reject("image", self.tree.uri(image), None, "in no split", detail))
        else:
            for image in self.index.paths:
                if not is_mask_folder(posixpath.dirname(image)) or self.labels.of(image):
                    self._add(image, split_named(image))
        owners = self._owners()
        for path, data in read_ahead(self.labels.files, owners):
            self._read_labels(path, data, owners[path])
        self._reject_orphans()
        return self._finish(len(owners))

    def _add(self, image: str, split: str | None, source: str = "", line: int | None = None) -> bool:
        if image in self.split_of:
            return False
        self.split_of[image] = split
        self.out.images.append(LabelledImage(image, split, source=source, line=line))
        return True

    def _add_entry(self, description: Description, split: str, entry: str) -> None:
        path = description.find(self.tree, split, entry)
        if path is None:
            self.notes.append(f"{split} names {entry!r}, which is not there")
        elif path in self.tree.files and path not in self.index:
            self._add_list(description, split, path)
        else:
            images = [path] if path in self.index else self.index.below(path)
            twice = sum(not self._add(image, split) for image in images)
            if twice:
                self.notes.append(f"{twice} images that {split} names too stay in the split that names them first")

    def _add_list(self, description: Description, split: str, path: str) -> None:
        source = self.tree.uri(path)
        try:
            text = decode_text(self.tree.read(path))
        except (ValueError, FileNotFoundError):
            raise UsageError(f"{source}: expected paths of images, a line each, but it is no text in UTF-8") from None
        folders = [posixpath.dirname(path), *description.folders, ""]
        for number, line in enumerate(text.splitlines(), 1):
            written = line.strip().replace("\\", "/")
            if not written:
                continue
            inside = description.inside(self.tree, written)
            if inside is None or all(_leaves(posixpath.join(folder, inside)) for folder in folders):
                self._reject(source, number, "outside the source", written[:200])
                continue
            image = self.index.find(inside, folders)
            if image is None:
                image = next(
                    posixpath.normpath(posixpath.join(folder, inside))
                    for folder in folders
                    if not _leaves(posixpath.join(folder, inside))
                )
            if not self._add(image, split, source, number):
                self._reject(source, number, "image named twice", f"{image} stays in {self.split_of[image]}")

    def _owners(self) -> dict[str, list[str]]:
        """Images by their label file: more than one where they differ in the extension only."""
        owners: dict[str, list[str]] = {}
        for image in self.split_of:
            path = self.labels.of(image)
            if path is not None:
                owners.setdefault(path, []).append(image)
        return owners

    def _read_labels(self, path: str, data: bytes | None, images: list[str]) -> None:
        source = self.labels.files.uri(path)
        try:
            text = decode_text(data if data is not None else b"")
        except ValueError as error:
            self._reject(source, None, "not a text file", str(error).split(":")[0])
            self.unreadable.update(dict.fromkeys(images, source))
            return
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            for image in images:
                try:
                    self.out.regions.append(self._region(line, image, source, number))
                except _Malformed as error:
                    self._reject(source, number, error.reason, error.detail)

    def _region(self, line: str, image: str, source: str, number: int) -> LabelledRegion:
        words = line.split()
        category = _CLASS.fullmatch(words[0])
        if category is None:
            raise _Malformed("malformed class", f"expected a whole number, got {words[0][:40]!r}")
        index = int(category[1])
        label = self.names.get(index) if self.names else str(index)
        if label is None:
            raise _Malformed("unknown label", f"class {index}, and the names go to {max(self.names or [0])}")
        wrong = next((word for word in words[1:] if not _NUMBER.fullmatch(word)), None)
        if wrong is not None:
            raise _Malformed("malformed line", f"expected numbers, got {wrong[:40]!r}")
        numbers = [float(word) for word in words[1:]]
        if self.key_points:
            numbers = numbers[:4]
        if len(numbers) == 4:
            x, y, width, height = numbers
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            return LabelledRegion(image, label, source, number, box, relative=True)
        if len(numbers) < 6 or len(numbers) % 2:
            detail = f"{len(numbers)} numbers after the class: a box has 4, a polygon 6 or more in pairs"
            raise _Malformed("malformed line", detail)
        return LabelledRegion(image, label, source, number, polygons=(tuple(numbers),), relative=True)

    def _reject_orphans(self) -> None:
        """Label files without image, in folders where label files lie."""
        files = self.labels.files
        owned = {path for image in (*self.index.paths, *self.split_of) if (path := self.labels.of(image))}
        folders = {posixpath.dirname(path) for path in owned}
        for path in files.files:
            name = posixpath.basename(path)
            if path in owned or not name.lower().endswith(".txt") or posixpath.dirname(path) not in folders:
                continue
            if name.lower() not in _NAME_FILES and not _NOT_LABELS.match(name):
                self._reject(files.uri(path), None, "missing image", f"no image has this name: {stem_of(path)}")

    def _finish(self, num_files: int) -> Labelled:
        out = self.out
        out.images = [image for image in out.images if image.path not in self.unreadable]
        for image, source in self.unreadable.items():
            out.rejects.append(Reject("image", self.tree.uri(image), None, "its annotations cannot be read", source))
        if self.names:
            out.classes = tuple(dict.fromkeys(self.names[index] for index in sorted(self.names)))
        else:
            used = {int(region.label) for region in out.regions if region.label is not None}
            out.classes = tuple(map(str, sorted(used)))
            self.notes.append("no names of classes: they are called by their numbers")
        out.has_masks = any(region.polygons is not None for region in out.regions)
        described = f"{self.description.uri}, " if self.description is not None else ""
        out.saw = "; ".join(
            [
                f"YOLO: {described}{num_files} label files, {len(out.images)} images, {len(out.regions)} objects",
                *self.notes,
            ]
        )
        return out

    def _reject(self, source: str, line: int | None, reason: str, detail: str) -> None:
        self.out.rejects.append(Reject("annotation", source, line, reason, detail))


class _Malformed(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def _names_beside(files: Tree) -> dict[int, str] | None:
    """Class names, one a line, from a file of a usual name, the one nearest to the root."""
    paths = [path for path in files.files if posixpath.basename(path).lower() in _NAME_FILES]
    for path in sorted(paths, key=lambda path: (path.count("/"), path)):
        try:
            lines = decode_text(files.read(path)).splitlines()
        except (ValueError, FileNotFoundError):
            raise UsageError(f"{files.uri(path)}: expected names of classes, a line each, in UTF-8") from None
        while lines and not lines[-1].strip():
            lines.pop()
        if lines:
            return {index: line.strip() or str(index) for index, line in enumerate(lines)}
    return None


def _leaves(path: str) -> bool:
    """Whether a path leads out of the folder it counts from."""
    return posixpath.normpath(path).split("/")[0] in ("..", "")
