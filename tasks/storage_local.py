"""Local disk: whole files through temporary names, hard links and fsync."""

import errno
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from models.errors import Rejected, StorageError, TransientError
from models.records import ListedImage, Status
from tasks.storage import (
    TEMPORARY_PREFIX,
    FileState,
    Ignore,
    Storage,
    Unfinished,
    local_path,
    local_uri,
    same_content,
)

logger = logging.getLogger("pixelmill.storage")

_READ_ONLY = os.O_RDONLY | os.O_CLOEXEC
# A FIFO must not block the reader, and a link must not lead it out of the source.
_READ_IMAGE = _READ_ONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_ABSENT = (FileNotFoundError, NotADirectoryError)
# These tell of this process or of a network file system, not of the file.
_TRANSIENT = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EAGAIN,
}


def _failure(action: str, path: str, error: OSError) -> StorageError:
    """One line for an operating system error."""
    kind = TransientError if error.errno in _TRANSIENT else StorageError
    advice = "; free some space and run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return kind(f"cannot {action} {local_uri(path)}: {os.strerror(error.errno) if error.errno else error}{advice}")


def fingerprint(status: os.stat_result) -> str:
    """`size-mtime_ns`: what tells one version of a local file from another."""
    return f"{status.st_size}-{status.st_mtime_ns}"


class LocalStorage(Storage):
    """The file system of this machine, network mounts included."""

    def read(self, uri: str) -> bytes:
        path = local_path(uri)
        try:
            return self.perform("read", Path(path).read_bytes)
        except _ABSENT:
            raise FileNotFoundError(uri) from None
        except OSError as error:
            raise _failure("read", path, error) from None

    def exists(self, uri: str) -> bool:
        return stat.S_ISREG(self._mode(uri))

    def is_folder(self, uri: str) -> bool:
        return stat.S_ISDIR(self._mode(uri))

    def _mode(self, uri: str) -> int:
        path = local_path(uri)
        try:
            return self.perform("stat", os.stat, path).st_mode
        except _ABSENT:
            return 0
        except OSError as error:
            raise _failure("look at", path, error) from None

    def names(self, uri: str) -> list[str]:
        path = local_path(uri)
        try:
            found = self.perform("list", os.listdir, path)
        except _ABSENT:
            return []
        except OSError as error:
            raise _failure("list", path, error) from None
        return sorted(name for name in found if not name.startswith(TEMPORARY_PREFIX))

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        path = local_path(uri)

        def same() -> bool:
            return self.read(uri) == data

        return self._put(path, lambda file: file.write(data), same)

    def put_file_if_absent(self, uri: str, path: Path) -> bool:
        target = local_path(uri)

        def copy(file: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file)

        def same() -> bool:
            try:
                with path.open("rb") as ours, open(target, "rb") as theirs:
                    return self.perform("compare", same_content, ours, theirs)
            except OSError as error:
                raise _failure("read", target, error) from None

        return self._put(target, copy, same)

    def _put(self, path: str, write: Callable[[BinaryIO], object], same: Callable[[], bool]) -> bool:
        """Links a complete file to its final name; the link is the one atomic step, and only one writer gets it."""
        with self._temporary(path, write) as temporary:
            try:
                self.perform("link", os.link, temporary, path)
                won = True
            except FileExistsError:
                won = False
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    folder = local_uri(os.path.dirname(path))
                    raise StorageError(
                        f"the file system of {folder} has no hard links, which a store needs: choose another place"
                    ) from None
                raise _failure("write", path, error) from None
            # Also after a lost race: its winner may have died before it made the name durable.
            self._sync_folder(os.path.dirname(path))
        return won or same()

    def replace(self, uri: str, data: bytes) -> None:
        path = local_path(uri)
        with self._temporary(path, lambda file: file.write(data)) as temporary:
            try:
                self.perform("rename", os.replace, temporary, path)
            except OSError as error:
                raise _failure("write", path, error) from None
            self._sync_folder(os.path.dirname(path))

    @contextmanager
    def _temporary(self, path: str, write: Callable[[BinaryIO], object]) -> Iterator[str]:
        """A complete and durable file beside its final name; whatever happens, it is gone afterwards."""
        folder = os.path.dirname(path)
        temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            try:
                self._make_folder(folder)
                descriptor = self.perform("create", os.open, temporary, _CREATE, 0o666)
                with open(descriptor, "wb") as file:
                    self.perform("write", write, file)
                    file.flush()
                    self.perform("fsync", os.fsync, descriptor)
            except OSError as error:
                raise _failure("write", path, error) from None
            yield temporary
        finally:
            try:
                self.perform("unlink", os.unlink, temporary)
            except FileNotFoundError:
                pass  # it was never created, or renamed
            except OSError as error:
                logger.warning("cannot remove %s: %s", temporary, error.strerror)

    def _make_folder(self, folder: str) -> None:
        """Makes a folder and those above it, each durable before anything is put inside."""
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for folder in reversed(missing):
            self.perform("mkdir", os.makedirs, folder, exist_ok=True)
            self._sync_folder(os.path.dirname(folder))

    def _sync_folder(self, folder: str) -> None:
        def sync() -> None:
            descriptor = os.open(folder, _READ_ONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                # Some network file systems cannot sync a folder, and write names through anyway.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
            finally:
                os.close(descriptor)

        try:
            self.perform("fsync folder", sync)
        except OSError as error:
            raise _failure("write", folder, error) from None

    def remove(self, uri: str) -> None:
        path = local_path(uri)
        try:
            self.perform("remove", os.unlink, path)
        except _ABSENT:
            pass
        except OSError as error:
            raise _failure("remove", path, error) from None

    def modified_at(self, uri: str) -> float | None:
        path = local_path(uri)
        try:
            return self.perform("stat", os.lstat, path).st_mtime
        except _ABSENT:
            return None
        except OSError as error:
            raise _failure("look at", path, error) from None

    @contextmanager
    def fetch(self, uri: str) -> Iterator[Path]:
        if not self.exists(uri):
            raise FileNotFoundError(uri)
        yield Path(local_path(uri))

    def open(self, uri: str) -> BinaryIO:
        path = local_path(uri)
        try:
            return self.perform("open", lambda: open(path, "rb"))
        except _ABSENT:
            raise FileNotFoundError(uri) from None
        except OSError as error:
            raise _failure("read", path, error) from None

    def read_image(self, image: ListedImage, max_bytes: int) -> bytes:
        try:
            return self.perform("read image", self._read_listed, image, max_bytes)
        except _ABSENT:
            reason = "gone since it was listed" if image.fingerprint else "not there when it was listed"
            raise Rejected(Status.MISSING, reason) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Rejected(Status.MISSING, "a link, not a regular file") from None
            if error.errno in _TRANSIENT:
                raise _failure("read", local_path(image.image), error) from None
            raise Rejected(Status.UNREADABLE, os.strerror(error.errno or errno.EIO)) from None

    @staticmethod
    def _read_listed(image: ListedImage, max_bytes: int) -> bytes:
        descriptor = os.open(local_path(image.image), _READ_IMAGE)
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise Rejected(Status.MISSING, "not a regular file")
            if fingerprint(before) != image.fingerprint:
                raise Rejected(Status.MISSING, "changed since it was listed")
            if before.st_size > max_bytes:
                raise Rejected(Status.TOO_LARGE, f"{before.st_size} bytes, more than {max_bytes}")
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                data = file.read(before.st_size) or b""
                while len(data) < before.st_size and (more := file.read(before.st_size - len(data))):
                    data += more
            if fingerprint(os.fstat(descriptor)) != image.fingerprint or len(data) != before.st_size:
                raise Rejected(Status.MISSING, "changed since it was listed")
            return data
        finally:
            os.close(descriptor)

    def state(self, uri: str) -> FileState | None:
        try:
            status = self.perform("stat", os.lstat, local_path(uri))
        except (OSError, ValueError):
            return None
        return FileState(uri, fingerprint(status), status.st_size) if stat.S_ISREG(status.st_mode) else None

    def walk(
        self, uri: str, *, recursive: bool, ignore: Ignore, ignored: dict[str, int], exclude: str | None = None
    ) -> Iterator[FileState]:
        excluded = self._identity(exclude) if exclude else None
        # A stack of paths, not of open folders: depth costs neither descriptors nor Python's recursion.
        folders = [local_path(uri)]
        while folders:
            folder = folders.pop()
            try:
                with self.perform("scan", os.scandir, folder) as entries:
                    for entry in entries:
                        is_folder = entry.is_dir(follow_symlinks=False)
                        if reason := ignore(entry.name, is_folder):
                            ignored[reason] = ignored.get(reason, 0) + 1
                        elif is_folder:
                            if recursive and not self._is(entry, excluded):
                                folders.append(entry.path)
                        elif entry.is_file(follow_symlinks=False):
                            try:
                                status = entry.stat(follow_symlinks=False)
                            except FileNotFoundError:
                                continue  # gone in between
                            yield FileState(local_uri(entry.path), fingerprint(status), status.st_size)
                        else:
                            reason = "link" if entry.is_symlink() else "special"
                            ignored[reason] = ignored.get(reason, 0) + 1
            except FileNotFoundError:
                continue  # the folder is gone in between
            except OSError as error:
                ignored["unreadable_folder"] = ignored.get("unreadable_folder", 0) + 1
                logger.warning(
                    "passed over %s: cannot be read: %s", local_uri(folder), os.strerror(error.errno or errno.EIO)
                )

    def unfinished(self, uri: str) -> Iterator[Unfinished]:
        def all_but_temporaries(name: str, is_folder: bool) -> str | None:
            return None if is_folder or name.startswith(TEMPORARY_PREFIX) else "whole"

        for state in self.walk(uri, recursive=True, ignore=all_but_temporaries, ignored={}):
            modified_at = self.modified_at(state.uri)
            if modified_at is not None:
                yield Unfinished(state.uri, state.bytes, modified_at)

    def discard(self, unfinished: Unfinished) -> None:
        self.remove(unfinished.uri)

    @staticmethod
    def _identity(uri: str) -> tuple[int, int] | None:
        """Device and inode, because one folder may have several paths; None when it is not there."""
        try:
            status = os.stat(local_path(uri))
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _is(self, entry: os.DirEntry[str], identity: tuple[int, int] | None) -> bool:
        # The inode comes with the entry; only where it agrees is another call needed.
        return (
            identity is not None and entry.inode() == identity[1] and self._identity(local_uri(entry.path)) == identity
        )
