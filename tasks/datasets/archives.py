"""Unpacking of archives that no one vouches for: nothing outside the folder, no links or devices, no bombs."""

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from models.errors import StorageError, UsageError
from models.progress import Report, Step, silent
from tasks.storage import open_storage

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")  # zst: Python 3.14 and later
ARCHIVE_EXTENSIONS = (".zip", *_TAR)

_BLOCK_BYTES = 1 << 20
_REPORT_EVERY = 100  # members


@dataclass(frozen=True)
class Caps:
    """How much an archive may become. What it claims of itself is not believed: what comes out is counted."""

    files: int = 20_000_000
    bytes: int = 2 * 2**40
    ratio: int = 200  # unpacked to packed; photographs have 1, masks and text 20
    ratio_from_bytes: int = 256 * 2**20  # less is harmless at any ratio


DEFAULT_CAPS = Caps()


class _Member(NamedTuple):
    """One entry of an archive that is a regular file or a folder."""

    name: str
    is_folder: bool
    content: IO[bytes] | None


def is_archive(uri: str) -> bool:
    """Whether the name is one of an archive."""
    return uri.lower().endswith(ARCHIVE_EXTENSIONS)


def unpack(uri: str, packed_bytes: int, folder: Path, caps: Caps = DEFAULT_CAPS, report: Report = silent) -> None:
    """Unpacks an archive into an empty local folder; an archive on S3 is read in place, piece by piece.

    Raises UsageError naming archive and member for what is damaged, encrypted, absolute, leads outside, is a link or a
    device, or occurs twice, and for more than the caps; StorageError where there is no room.
    """
    total = count = 0
    with _reading(uri) as members:
        for name, is_folder, content in members:
            parts = _checked_parts(uri, name)
            if not parts:
                continue
            target = folder.joinpath(*parts)
            count += 1
            if count > caps.files:
                raise UsageError(f"{uri}: more than {caps.files:,} members; unpack it yourself if that is meant")
            try:
                if is_folder or content is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    while block := content.read(_BLOCK_BYTES):
                        total += len(block)
                        _check_size(uri, name, total, packed_bytes, caps)
                        _write(file, block)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise UsageError(f"{uri}: {name!r} occurs twice in the archive") from None
            except UnicodeEncodeError:
                raise UsageError(f"{uri}: {name!r} cannot be a file name") from None
            except _NoRoom as error:
                raise StorageError(
                    f"cannot unpack {uri} into {folder.parent}: {error}; set TMPDIR to a folder with more room"
                ) from None
            except OSError as error:
                if error.errno is None:  # the decompressor's own
                    raise
                raise UsageError(f"{uri}: cannot unpack {name!r}: {os.strerror(error.errno)}") from None
            if count % _REPORT_EVERY == 0:
                report(Step("unpacking", count, None, f"{total / 2**20:,.0f} MiB"))


class _NoRoom(Exception):
    """The local disk does not take more."""


def _write(file: BinaryIO, block: bytes) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:
        raise _NoRoom(error.strerror) from None


def _check_size(uri: str, name: str, total: int, packed_bytes: int, caps: Caps) -> None:
    if total > caps.bytes:
        raise UsageError(f"{uri}: with {name!r} it is more than {caps.bytes / 2**30:,.2f} GiB unpacked")
    if total > max(caps.ratio_from_bytes, packed_bytes * caps.ratio):
        raise UsageError(
            f"{uri}: with {name!r} it becomes more than {caps.ratio} times its packed size, like a zip bomb; "
            "unpack it yourself if that is meant"
        )


def _checked_parts(uri: str, name: str) -> list[str]:
    """The names along the path of a member. Raises UsageError for one that would lead outside."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UsageError(f"{uri}: {name!r} leads outside the archive's own folder")
    return parts


@contextmanager
def _reading(uri: str) -> Iterator[Iterator[_Member]]:
    """The members of an archive, each to be read before the next; whatever a damaged one raises is a UsageError."""
    try:
        with open_storage(uri).open(uri) as file:
            yield _zip_members(uri, file) if uri.lower().endswith(".zip") else _tar_members(uri, file)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, NotImplementedError) as error:
        kind = "ZIP" if uri.lower().endswith(".zip") else "tar"
        what = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{uri}: not a {kind} archive that can be read here: {what}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UsageError(f"{uri}: the archive is damaged: {error}") from None
    except (ValueError, RuntimeError) as error:  # what parsers let escape
        raise UsageError(f"{uri}: the archive is damaged: {' '.join(str(error).split())}") from None


def _zip_members(uri: str, file: BinaryIO) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            # ZIP wants slashes; some programs of Windows write the other ones.
            name = info.orig_filename.replace("\\", "/") if info.create_system == 0 else info.orig_filename
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UsageError(f"{uri}: {name!r} is a link or a device, not a file")
            if info.flag_bits & 1:
                raise UsageError(f"{uri}: {name!r} is encrypted; unpack the archive yourself")
            if name.endswith("/"):
                yield _Member(name, True, None)
            else:
                with archive.open(info) as content:
                    yield _Member(name, False, content)


def _tar_members(uri: str, file: BinaryIO) -> Iterator[_Member]:
    with tarfile.open(fileobj=file, mode="r:*", errorlevel=1) as archive:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would remember all of them
            if not (info.isreg() or info.isdir()):
                raise UsageError(f"{uri}: {info.name!r} is a link or a device, not a file")
            _checked_parts(uri, info.name)  # before the filter, whose message names folders of this machine
            if info.isdir():
                yield _Member(info.name, True, None)
            else:
                yield _Member(info.name, False, archive.extractfile(tarfile.data_filter(info, ".")))
