"""What the readers of labelled formats share: text as people save it, images found by name, names of splits."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeGuard

from tasks.datasets.folder import SPLIT_FOLDERS
from tasks.datasets.tree import Tree
from tasks.storage import open_storage

_READS_AT_ONCE = 16
_READ_AHEAD = 256  # files held in memory

# "train" in instances_train2017.json, but not in "training_data" or "constrain".
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_FOLDERS)})(?![a-z])")

# Folders whose pictures say something about other pictures, and are no images of the data set themselves.
_MASK_FOLDER = re.compile(
    r"(masks?|labels?|annotations?|annots?|seg|segmentations?.*|panoptic.*|stuff.*|depth.*|gt|.*_masks?)"
)


def split_named(path: str) -> str | None:
    """The split that a file's or folder's path names, from its last part on upwards; None: it names none."""
    for part in reversed(path.lower().split("/")):
        words = set(_SPLIT_WORD.findall(part))
        if len(words) == 1:
            return SPLIT_FOLDERS[words.pop()]
    return None


def is_mask_folder(folder: str) -> bool:
    """Whether a part of the folder's path is a usual name for masks and the like."""
    return any(_MASK_FOLDER.fullmatch(part.lower()) for part in folder.split("/"))


def stem_of(path: str) -> str:
    """The name without folder and extension."""
    return posixpath.splitext(posixpath.basename(path))[0]


def decode_text(data: bytes) -> str:
    """Text in UTF-8 or, where a byte order mark says so, UTF-16. Raises ValueError for all else."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # what Windows PowerShell's > writes
        return data.decode("utf-16")
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds zero bytes, so it is no text")
    return text


def is_text(value: object) -> TypeGuard[str]:
    """Whether this is text that files and tables can hold; escapes in JSON and YAML can make other."""
    try:
        return isinstance(value, str) and bool(value.encode()) and "\0" not in value
    except UnicodeEncodeError:
        return False


def peek(tree: Tree, path: str, size: int = 65536) -> bytes:
    """The first bytes of a file, without reading it whole; b"" where it has gone."""
    uri = tree.files[path].uri
    try:
        with open_storage(uri).open(uri) as file:
            return file.read(size)
    except FileNotFoundError:
        return b""


def read_ahead(tree: Tree, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Many small files in the order given, several read at once; None for one that has gone since it was listed."""
    rest = iter(paths)
    with ThreadPoolExecutor(_READS_AT_ONCE) as readers:
        while batch := list(islice(rest, _READ_AHEAD)):
            yield from zip(batch, readers.map(lambda path: _read(tree, path), batch), strict=True)


def _read(tree: Tree, path: str) -> bytes | None:
    try:
        return tree.read(path)
    except FileNotFoundError:
        return None


class ImageIndex:
    """The image files of a tree, to be found by what annotations call them."""

    def __init__(self, tree: Tree):
        self.paths = tree.images()
        self.folders = sorted({posixpath.dirname(path) for path in self.paths})
        self._known = set(self.paths)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for path in self.paths:
            self._by_name[posixpath.basename(path)].append(path)
            self._by_stem[stem_of(path)].append(path)

    def find(self, name: str, folders: Iterable[str]) -> str | None:
        """The image of a file name: below the first of these folders that has it, else the only one so called."""
        for written in dict.fromkeys((name, name.replace("\\", "/"))):
            for folder in folders:
                path = posixpath.normpath(posixpath.join(folder, written.lstrip("/")))
                if path in self._known:
                    return path
            alike = self._by_name.get(posixpath.basename(written), [])
            alike = [path for path in alike if not is_mask_folder(posixpath.dirname(path))] or alike
            if len(alike) == 1:
                return alike[0]
        return None

    def of_stem(self, stem: str) -> list[str]:
        """The images that have this name, whatever their folder and extension."""
        return self._by_stem.get(stem, [])

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def below(self, folder: str) -> list[str]:
        """The images in a folder and in those below it; of "" all."""
        return [path for path in self.paths if not folder or path.startswith(f"{folder}/")]

    def left_over(self, used: Collection[str]) -> list[str]:
        """The images that nothing names. Folders of masks are left aside, unless one of their images is named."""
        named = {posixpath.dirname(path) for path in used}
        return [
            path
            for path in self.paths
            if path not in used and (posixpath.dirname(path) in named or not is_mask_folder(posixpath.dirname(path)))
        ]
