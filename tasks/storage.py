"""Storage: whole files at URIs, on local disk and on S3, behind the same few methods.

A URI is written as it stands in tables, and each file has exactly one:
  /photos/a b.jpg          an absolute local path, literally
  file:///photos/%FF.jpg   a local path whose bytes are not UTF-8, percent-escaped
  s3://bucket/key          an object; the key literally
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes

from models.errors import UsageError
from models.records import ListedImage

SUPPORTED = "a local path, file:///path or s3://bucket/prefix"

# Files under such names are being written; they are no part of a store until they are linked to their final name.
TEMPORARY_PREFIX = ".pixelmill-"

_BLOCK_BYTES = 1 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_Result = TypeVar("_Result")


def normalise(uri: str, *, folder: str | None = None) -> str:
    """The one URI of what a person typed: absolute, without a trailing slash.

    A relative path counts from `folder` (a URI) and is taken literally; without `folder` it counts from the working
    directory, and a leading ~ is the home directory. Raises UsageError for other schemes and for what names nothing.
    """
    if "\0" in uri or not uri:
        raise UsageError(f"expected {SUPPORTED}, got {uri!r}")
    scheme = _SCHEME.match(uri)
    if scheme is None and folder is not None and not uri.startswith("/"):
        return normalise(_below(folder, uri))
    if scheme is None:
        return local_uri(os.path.abspath(uri if folder is not None else os.path.expanduser(uri)))
    if scheme.group() == "s3://":
        bucket, key = split_s3(uri)
        if not bucket or local_uri(uri) != uri:
            raise UsageError(f"expected s3://bucket/prefix in UTF-8, got {uri!r}")
        return f"s3://{bucket}/{key}".rstrip("/")
    if scheme.group() == "file://":
        path = local_path("file://" + uri.removeprefix("file://").removeprefix("localhost"))
        if path.startswith("/"):
            return local_uri(os.path.abspath(path))
        raise UsageError(f"expected file:///path, got {uri!r}: another host's files cannot be read")
    raise UsageError(f"expected {SUPPORTED}, got {uri!r}: {scheme.group()} is not supported")


def _below(folder: str, relative: str) -> str:
    """A relative path resolved against a folder. Keys know no "." and "..", so on S3 they are resolved here."""
    if not folder.startswith("s3://"):
        return join(folder, relative)
    bucket, key = split_s3(folder)
    parts = key.split("/") if key else []
    for part in relative.split("/"):
        if part == "..":
            del parts[-1:]
        elif part != ".":
            parts.append(part)
    return join(f"s3://{bucket}", *parts)


def local_uri(path: str) -> str:
    """The URI of an absolute local path, which may carry Python's surrogates for bytes that are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(path))
    return path


def local_path(uri: str) -> str:
    """The path to open for a local URI; the inverse of `local_uri`."""
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))) if uri.startswith("file://") else uri


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI; the key is "" for the bucket itself."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def join(uri: str, *names: str) -> str:
    """The URI of a file below a folder."""
    if uri.startswith("s3://"):
        return "/".join((uri.rstrip("/"), *names))
    return local_uri(os.path.join(local_path(uri), *names))


def same_content(ours: BinaryIO, theirs: BinaryIO) -> bool:
    """Whether two open files hold the same bytes; neither is held in memory as a whole."""
    while block := ours.read(_BLOCK_BYTES):
        if theirs.read(len(block)) != block:
            return False
    return not theirs.read(1)


class FileState(NamedTuple):
    """One regular file as a listing sees it."""

    uri: str
    fingerprint: str  # ETag on object stores, "size-mtime_ns" on local disk
    bytes: int


class Unfinished(NamedTuple):
    """What a writer that was killed left behind; no reader has ever seen it."""

    uri: str
    bytes: int
    modified_at: float  # seconds since 1970, by the storage's clock
    upload: str = ""  # the identity of an upload in parts, which is no file yet


# Says why a file or folder of this name is left out (is_folder is the second argument), or None to keep it.
Ignore = Callable[[str, bool], str | None]


class Storage(ABC):
    """Whole files only: no reader ever sees a part of one, and none is changed in place.

    Every method takes URIs as `normalise` writes them, may be called from any thread, and raises StorageError
    (TransientError where a later try may succeed) with one line that names the URI and never holds a credential.
    A storage does not travel between processes: pass URIs and call `open_storage` where they are used.
    """

    @abstractmethod
    def read(self, uri: str) -> bytes:
        """The whole file. Raises FileNotFoundError when there is none."""

    @abstractmethod
    def exists(self, uri: str) -> bool:
        """Whether a file (not a folder) is there."""

    @abstractmethod
    def names(self, uri: str) -> list[str]:
        """The names of files and folders directly below a folder, sorted, never from a cache; [] when it is absent."""

    @abstractmethod
    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Writes a file unless one is there.

        True: the file now holds exactly `data`, whoever wrote it. False: it holds something else.
        """

    @abstractmethod
    def put_file_if_absent(self, uri: str, path: Path) -> bool:
        """`put_if_absent` with the content of a local file of any size, which is never held in memory as a whole."""

    @abstractmethod
    def replace(self, uri: str, data: bytes) -> None:
        """Writes a file in place of the one that is there, if any; readers see the old or the new one whole."""

    @abstractmethod
    def remove(self, uri: str) -> None:
        """Removes a file; one that is not there is no error."""

    @abstractmethod
    def modified_at(self, uri: str) -> float | None:
        """When a file was written, in seconds since 1970 by the storage's clock; None when it is not there."""

    @abstractmethod
    def fetch(self, uri: str) -> AbstractContextManager[Path]:
        """A local file with this content while the context lasts. Raises FileNotFoundError."""

    @abstractmethod
    def open(self, uri: str) -> BinaryIO:
        """A seekable reader of a file that never changes; it gets only what is asked for. Raises FileNotFoundError."""

    @abstractmethod
    def read_image(self, image: ListedImage, max_bytes: int) -> bytes:
        """The bytes of exactly the version that was listed; b"" for an empty file.

        Raises Rejected for what concerns this image alone: MISSING (gone, or changed since it was listed), UNREADABLE,
        TOO_LARGE (more than `max_bytes`). Raises TransientError when storage did not answer after retries: the caller
        decides whether that is an outage or this image's fault.
        """

    @abstractmethod
    def state(self, uri: str) -> FileState | None:
        """The regular file at a URI; None when there is none, it is a link, folder or device, or it may not be seen."""

    @abstractmethod
    def is_folder(self, uri: str) -> bool:
        """Whether a folder is there; on S3, whether any key lies below it."""

    @abstractmethod
    def walk(
        self, uri: str, *, recursive: bool, ignore: Ignore, ignored: dict[str, int], exclude: str | None = None
    ) -> Iterator[FileState]:
        """Streams the regular files below a folder in no particular order, links not followed.

        What `ignore` gives a reason for is counted in `ignored` by that reason, as are links ("link"), devices and
        FIFOs ("special") and folders that cannot be read ("unreadable_folder"). The folder `exclude` is passed over.
        """

    @abstractmethod
    def unfinished(self, uri: str) -> Iterator[Unfinished]:
        """What killed writers, or those still at work, left below a folder: files under temporary names, uploads."""

    @abstractmethod
    def discard(self, unfinished: Unfinished) -> None:
        """Removes it; what is gone already is no error. A writer still at work on it fails as if storage had."""

    def step(self, name: str) -> None:  # noqa: B027 - empty on purpose: only tests override it
        """Called before and after each effect ("link:before", "link:after"), so that a test can fail or die there."""

    def perform(self, name: str, effect: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Runs one effect between its two steps."""
        self.step(f"{name}:before")
        result = effect(*args, **kwargs)
        self.step(f"{name}:after")
        return result

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a storage holds connections and credentials: pass URIs and call open_storage where they are used"
        )


# The storages of this process by scheme. Connections and their threads do not survive a fork.
OPENED: dict[str, Storage] = {}
os.register_at_fork(after_in_child=OPENED.clear)


def open_storage(uri: str) -> Storage:
    """The storage that holds a URI: one per scheme and process, opened when first needed."""
    scheme = "s3" if uri.startswith("s3://") else "local"
    if scheme not in OPENED:
        if scheme == "s3":
            from tasks.storage_s3 import S3Storage

            OPENED.setdefault(scheme, S3Storage())
        else:
            from tasks.storage_local import LocalStorage

            OPENED.setdefault(scheme, LocalStorage())
    return OPENED[scheme]
