"""A labelled source as a tree of files, wherever it lies: a folder, a bucket prefix, or an archive that is unpacked."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote_from_bytes

from models.errors import NotFound, UsageError
from models.progress import Report, silent
from tasks.datasets.archives import ARCHIVE_EXTENSIONS, DEFAULT_CAPS, Caps, is_archive, unpack
from tasks.listing import ignore_reason
from tasks.storage import FileState, join, local_path, local_uri, normalise, open_storage


class Tree:
    """The regular files below one folder, by their paths. Links are not followed, hidden files are passed over."""

    def __init__(self, root: str, files: dict[str, FileState], ignored: dict[str, int], *, name: str | None = None):
        """`name` is what people know the root as, where it is another: the archive that was unpacked there."""
        self.root = root
        self.files = files  # path below the root, with slashes → its state; sorted by path
        self.ignored = ignored  # files and folders left out, by reason: hidden, link, special, unreadable_folder
        self.name = name or root

    @property
    def is_archive(self) -> bool:
        """Whether the files lie in a scratch folder that is about to go."""
        return self.name != self.root

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError where the tree has none of this path, StorageError."""
        if path not in self.files:
            raise FileNotFoundError(path)
        uri = self.files[path].uri
        return open_storage(uri).read(uri)

    def uri(self, path: str) -> str:
        """The URI to show of a file, there or not: that of a member of an archive goes on from the archive's."""
        return self.files[path].uri if path in self.files and not self.is_archive else join(self.name, path)

    def images(self) -> list[str]:
        """The paths that may be images by their names, sorted. A file without extension is one only among its like."""
        names = {path: path.rpartition("/")[2] for path in self.files}
        with_extension = [path for path, name in names.items() if "." in name and ignore_reason(name, False) is None]
        return with_extension or [path for path, name in names.items() if "." not in name]

    def below(self, folder: str) -> "Tree":
        """The same files seen from a folder of the tree; from "" the whole."""
        prefix = f"{folder}/" if folder else ""
        files = {path.removeprefix(prefix): state for path, state in self.files.items() if path.startswith(prefix)}
        name = join(self.name, folder) if folder else self.name
        return Tree(join(self.root, folder) if folder else self.root, files, self.ignored, name=name)


def archive_state(source: str) -> FileState | None:
    """The state of the file, if the source that a person typed is an archive."""
    uri = normalise(source)
    return open_storage(uri).state(uri) if is_archive(uri) and not source.endswith("/") else None


@contextmanager
def open_tree(
    source: str, *, exclude: str | None = None, caps: Caps = DEFAULT_CAPS, report: Report = silent
) -> Iterator[Tree]:
    """The tree of a source that a person typed, while the context lasts; an archive is unpacked for as long.

    `exclude` is a folder below the source, such as the store, that is passed over. Raises NotFound, StorageError, and
    UsageError for what is neither, and for an archive that is damaged, reaches outside itself or is beyond its caps.
    """
    typed_folder = source.endswith("/")
    source = normalise(source)
    storage = open_storage(source)
    state = None if typed_folder else storage.state(source)
    if state is not None:
        if not is_archive(source):
            known = ", ".join(ARCHIVE_EXTENSIONS)
            raise UsageError(f"expected a folder, a bucket prefix or an archive ({known}), got the file {source}")
        with tempfile.TemporaryDirectory(prefix="pixelmill-unpacked-") as scratch:
            unpack(source, state.bytes, Path(scratch), caps, report)
            yield _walk(local_uri(scratch), name=source)
    elif storage.is_folder(source):
        yield _walk(source, exclude=normalise(exclude) if exclude else None)
    elif not source.startswith("s3://") and os.path.lexists(local_path(source)):
        raise UsageError(f"{source} is neither a folder nor a regular file (links to archives are not followed)")
    else:
        raise NotFound(f"{source} does not exist; expected a folder, a bucket prefix or an archive")


@contextmanager
def open_annotations(tree: Tree, annotations: str) -> Iterator[Tree]:
    """The annotation files that a person named: a file or folder of the tree by its path in it, or any by its URI.

    A single file is a tree of one file, whose root is its folder. Raises NotFound, UsageError, StorageError.
    """
    path = annotations.strip("/")
    inside = tree.name.rstrip("/") + "/"
    for uri in (annotations, normalise(annotations)):
        if uri.startswith(inside):
            path = uri.removeprefix(inside).strip("/")
    if path in tree.files:
        folder, _, file = path.rpartition("/")
        around = tree.below(folder)
        yield Tree(around.root, {file: around.files[file]}, {}, name=around.name)
        return
    if any(other.startswith(f"{path}/") for other in tree.files):
        yield tree.below(path)
        return
    uri = normalise(annotations)
    storage = open_storage(uri)
    state = storage.state(uri)
    if state is not None and not is_archive(uri):
        yield Tree(_folder_of(uri), {uri.rpartition("/")[2]: state}, {})
        return
    try:
        with open_tree(annotations) as other:
            yield other
    except NotFound:
        raise NotFound(f"no annotations {annotations!r}: neither in {tree.name} nor at {uri}") from None


def _folder_of(uri: str) -> str:
    folder = uri.rpartition("/")[0]
    return folder if folder not in ("", "file://") else "/"


def _walk(root: str, *, name: str | None = None, exclude: str | None = None) -> Tree:
    ignored: dict[str, int] = {}
    states = open_storage(root).walk(root, recursive=True, ignore=_ignore_hidden, ignored=ignored, exclude=exclude)
    files: dict[str, FileState] = {}
    for state in states:
        path = _path_below(root, state.uri)
        while path in files:  # an escaped name that another file bears literally
            path += "%"
        files[path] = state
    return Tree(root, dict(sorted(files.items())), ignored, name=name)


def _ignore_hidden(name: str, is_folder: bool) -> str | None:
    return "hidden" if ignore_reason(name, is_folder) == "hidden" else None


def _path_below(root: str, uri: str) -> str:
    """The path below the root; names that are not UTF-8 are percent-escaped, each for itself."""
    if uri.startswith("s3://"):
        return uri.removeprefix(root.rstrip("/") + "/")
    names = os.path.relpath(local_path(uri), local_path(root)).split("/")
    return "/".join(map(_escaped, names))


def _escaped(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        return quote_from_bytes(os.fsencode(name))
    return name
