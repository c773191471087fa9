"""Local files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from models.errors import StorageError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes at `path`, in place of what is there; a kill at any time leaves the old file or none.

    Raises StorageError where the disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, write)
    except Exception as error:
        # PyTorch's writer closes its archive after a write that failed, and complains of that instead.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise StorageError(
            f"cannot write {path}: {cause.strerror or cause}; free some space, "
            "or set PIXELMILL_TRAINING to a folder that has it"
        ) from None


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    number, name = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    try:
        with os.fdopen(number, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
