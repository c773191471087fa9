"""The store: may it be listed, written, read and deleted in, does put-if-absent hold, and what time is it there?"""

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from models.errors import StorageError
from tasks.doctor.finding import Finding, ok, problem, warning
from tasks.storage import TEMPORARY_PREFIX, Storage, join, normalise, open_storage

ROUNDS = 3  # of a race; a server that looks first and writes then is found out in the first, as a rule
WRITERS = 4
SKEW_WARNING_S = 5.0
SKEW_PROBLEM_S = 300.0  # S3 itself refuses requests that are 15 minutes off

_ACCESS = "grant ListBucket, GetObject, PutObject and DeleteObject on it, or for a folder write permission"
_TIME_SERVER = "let both follow a time server (timedatectl set-ntp true): the newest version is found by its time"
_CONDITIONAL = (
    "use storage that honours If-None-Match on PUT, as S3 does; without it two runs may claim the same images, "
    "and a part may be overwritten"
)


def check_store(store: str) -> list[Finding]:
    """All checks of the store; the first that fails is the last. What is written is removed again."""
    uri = normalise(store)
    storage = open_storage(uri)
    try:
        folder, is_new = _existing_folder(storage, uri)
    except StorageError as error:
        return [_refused("store", str(error))]
    probe = join(folder, f"{TEMPORARY_PREFIX}doctor-{uuid.uuid4().hex}")
    findings: list[Finding] = []
    try:
        findings.append(_access(storage, uri, folder, probe, is_new))
        findings.append(_clock(storage, probe))
        findings.append(_put_if_absent(storage, probe))
    except StorageError as error:
        findings.append(_refused(("store", "clock", "put-if-absent")[len(findings)], str(error)))
    finally:
        left = _remove(storage, probe)
    if left is not None and findings[0].state == "ok":  # else it was said already
        findings.append(problem("store", left, _ACCESS))
    return findings


def _refused(check: str, said: str) -> Finding:
    """What storage said, with what mends it where it does not say so itself."""
    if "RequestTimeTooSkewed" in said:
        return problem("clock", said, _TIME_SERVER)
    return problem(check, said, "" if "; " in said else _ACCESS)


def _existing_folder(storage: Storage, uri: str) -> tuple[str, bool]:
    """The folder to try: the store's, or where there is none yet the one that it will be made in.

    Raises StorageError when a file stands there.
    """
    folder = uri
    if not uri.startswith("s3://"):
        while not storage.is_folder(folder) and os.path.dirname(folder) != folder:
            if storage.exists(folder):
                raise StorageError(f"{folder} is a file, and a store is a folder; move it, or name another store")
            folder = os.path.dirname(folder)
    return folder, folder != uri


def _access(storage: Storage, uri: str, folder: str, probe: str, is_new: bool) -> Finding:
    storage.names(folder)
    content = os.urandom(1024)
    storage.put_if_absent(probe, content)
    if storage.read(probe) != content:
        return problem("store", f"{uri}: what was written is not what is read back", "use other storage")
    found = f"{uri} is not there yet, and can be made" if is_new else f"{uri} can be listed, written, read, deleted in"
    return ok("store", found)


def _clock(storage: Storage, probe: str) -> Finding:
    storage.replace(probe, b"what time is it?")
    now = time.time()
    modified_at = storage.modified_at(probe)
    if modified_at is None:
        return problem("clock", "a file just written is not there", "use storage that is consistent")
    skew = abs(now - modified_at)
    said = f"this machine and the store differ by {skew:,.0f} s"
    if skew < SKEW_WARNING_S:
        return ok("clock", said)
    return problem("clock", said, _TIME_SERVER) if skew > SKEW_PROBLEM_S else warning("clock", said, _TIME_SERVER)


def _put_if_absent(storage: Storage, probe: str) -> Finding:
    """Writers that race, each with other content: exactly one may win, and what it wrote must stay."""
    if storage.put_if_absent(probe, b"it is there already") or storage.read(probe) == b"it is there already":
        return problem("put-if-absent", "a file that was there was overwritten", _CONDITIONAL)
    for _ in range(ROUNDS):
        storage.remove(probe)
        contents = [os.urandom(64) for _ in range(WRITERS)]
        barrier = threading.Barrier(WRITERS)

        def write(content: bytes, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return storage.put_if_absent(probe, content)

        with ThreadPoolExecutor(WRITERS) as writers:
            won = list(writers.map(write, contents))
        if won.count(True) != 1 or storage.read(probe) != contents[won.index(True)]:
            said = f"{won.count(True)} of {WRITERS} writers that raced were told that they had won"
            return problem("put-if-absent", said, _CONDITIONAL)
    return ok("put-if-absent", f"holds: one of {WRITERS} writers won, {ROUNDS} times")


def _remove(storage: Storage, probe: str) -> str | None:
    """Takes the probe away; why it could not be, if so."""
    try:
        storage.remove(probe)
    except StorageError as error:
        return str(error)
    return None
