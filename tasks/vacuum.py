"""Retention: what nothing names any more. Plans, parts, cards, aliases and what they name are never touched.

unfinished writes    files under temporary names, uploads in parts that were never completed
scratch folders      temporary files of killed commands, on this machine
unfinished versions  folders of models and data sets without the file that would commit them
trainings            checkpoints of trainings that nobody took up again, on this machine
old versions         of models, if asked for: beyond the newest, and named by no alias, no table and no other card
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.card import CARD_FILE
from models.dataset import DATASET_FILE
from models.progress import Report, Step, silent
from models.settings.vacuum import VacuumSettings
from tasks import registry
from tasks.storage import Storage, join, local_path, normalise, open_storage
from tasks.table import Table
from tasks.train import training_folder

log = logging.getLogger("pixelmill")

_VERSION = re.compile(r"[0-9a-f]{12}")
_TRAINING = re.compile(r"[0-9a-f]{24}")
_SCRATCH = re.compile(r"pixelmill-((plan|verify|query|export|evaluate|train|backfill|unpacked|fp16)-)?[a-z0-9_]{8}")
_REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)@([0-9a-f]{12})")

# A version is complete a moment after its last file is there; even a slow export of a large model takes minutes.
LEAST_AGE_OF_VERSIONS_S = 3600
# A command at work may not write into its folder for hours, as in a long epoch.
LEAST_AGE_OF_FOLDERS_S = 86400


@dataclass(frozen=True)
class Leftover:
    """One thing that may go."""

    kind: str  # "unfinished write", "scratch folder", "unfinished version", "training", "old version"
    uri: str
    bytes: int
    age_s: int
    remove: Callable[[], bool] = field(repr=False)  # looks once more, and is False where it is in use by now


@dataclass(frozen=True)
class Vacuumed:
    """What was found, and what became of it; the keys of `vacuum --json`."""

    store: str
    deleted: bool
    found: list[dict[str, str | int | bool]]  # kind, uri, bytes, age_s, removed
    bytes: int  # of all that was found


def vacuum(
    store: str, settings: VacuumSettings, report: Report = silent, clock: Callable[[], float] = time.time
) -> Vacuumed:
    """Shows what nothing names any more and is older than `settings.older_than`; with `settings.delete`, removes it.

    It may run beside anything else: a writer whose temporary file goes fails as if storage had, and is tried again.
    """
    store = normalise(store)
    found: list[dict[str, str | int | bool]] = []
    for leftover in _leftovers(store, settings, clock()):
        removed = settings.delete and leftover.remove()
        entry = {name: getattr(leftover, name) for name in ("kind", "uri", "bytes", "age_s")}
        found.append(entry | {"removed": removed})
        log.info("%s %s: %s", "removed" if removed else "found", leftover.kind, leftover.uri)
        report(Step("looking for what nothing names", len(found), None))
    return Vacuumed(store, settings.delete, found, sum(int(entry["bytes"]) for entry in found))


def _leftovers(store: str, settings: VacuumSettings, now: float) -> Iterator[Leftover]:
    storage = open_storage(store)
    yield from _unfinished_writes(storage, store, settings.older_than_s, now)
    yield from _unfinished_versions(storage, store, settings.older_than_s, now)
    yield from _folders("scratch folder", Path(tempfile.gettempdir()), _SCRATCH, settings.older_than_s, now)
    yield from _folders("training", training_folder(""), _TRAINING, settings.older_than_s, now)
    if settings.keep_versions is not None:
        yield from _old_versions(storage, store, settings.keep_versions, settings.older_than_s, now)


def _unfinished_writes(storage: Storage, store: str, older_than_s: float, now: float) -> Iterator[Leftover]:
    for each in list(storage.unfinished(store)):  # a listing is not changed while it is read

        def remove(each=each) -> bool:
            storage.discard(each)
            return True

        if now - each.modified_at >= older_than_s:
            yield Leftover("unfinished write", each.uri, each.bytes, int(now - each.modified_at), remove)


def _unfinished_versions(storage: Storage, store: str, older_than_s: float, now: float) -> Iterator[Leftover]:
    """Folders without card.json or dataset.json, which only a publication that was killed leaves."""
    older_than_s = max(older_than_s, LEAST_AGE_OF_VERSIONS_S)
    for kind, commit in (("models", CARD_FILE), ("datasets", DATASET_FILE)):
        for name in storage.names(join(store, kind)):
            for version in filter(_VERSION.fullmatch, storage.names(join(store, kind, name))):
                folder = join(store, kind, name, version)
                if storage.exists(join(folder, commit)):
                    continue
                files, size, age_s = _content(storage, folder, now)
                if files and age_s >= older_than_s:

                    def remove(folder=folder, commit=commit, files=files) -> bool:
                        return _remove_files(storage, folder, files, unless=join(folder, commit))

                    yield Leftover("unfinished version", folder, size, int(age_s), remove)


def _content(storage: Storage, folder: str, now: float) -> tuple[list[str], int, float]:
    """All files of a version, those in evaluations/ and samples/ too, their bytes, and the age of the youngest."""
    states = list(storage.walk(folder, recursive=True, ignore=lambda name, is_folder: None, ignored={}))
    times = [written for state in states if (written := storage.modified_at(state.uri)) is not None]
    return [state.uri for state in states], sum(s.bytes for s in states), now - max(times, default=now)


def _remove_files(storage: Storage, folder: str, files: list[str], unless: str | None = None) -> bool:
    """Removes files and the folder; False as soon as the file `unless` is there."""
    for uri in files:
        if unless is not None and storage.exists(unless):
            return False
        storage.remove(uri)
    if not folder.startswith("s3://"):
        for path, _, _ in os.walk(local_path(folder), topdown=False):
            with contextlib.suppress(OSError):  # something else is in it
                os.rmdir(path)
    return True


def _folders(kind: str, root: Path, name: re.Pattern[str], older_than_s: float, now: float) -> Iterator[Leftover]:
    """Local folders of our own below `root` in which nothing was written for so long."""
    older_than_s = max(older_than_s, LEAST_AGE_OF_FOLDERS_S)
    for folder in sorted(root.glob("*")) if root.is_dir() else ():
        if not (name.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()):
            continue
        try:
            states = [path.lstat() for path in (folder, *folder.rglob("*"))]
        except OSError:  # somebody is at work there
            continue
        age_s = now - max(state.st_mtime for state in states)
        if age_s >= older_than_s and states[0].st_uid == os.getuid():

            def remove(folder: Path = folder) -> bool:
                shutil.rmtree(folder, ignore_errors=True)
                return not folder.exists()

            yield Leftover(kind, str(folder), sum(state.st_size for state in states), int(age_s), remove)


def _old_versions(storage: Storage, store: str, keep: int, older_than_s: float, now: float) -> Iterator[Leftover]:
    older_than_s = max(older_than_s, LEAST_AGE_OF_VERSIONS_S)
    cards = [card for card in registry.list_models(store) if not card.is_variant]
    named = _named(storage, store)
    for name in sorted({card.name for card in cards}):
        versions = [card for card in cards if card.name == name]  # from old to new
        for card in versions[:-keep]:
            if card.reference in named:
                continue
            folder = registry.version_folder(store, card)
            files, size, age_s = _content(storage, folder, now)
            if age_s >= older_than_s:

                def remove(folder=folder, files=files, reference=card.reference) -> bool:
                    if reference in _named(storage, store):  # by a run or a promotion since
                        return False
                    # Without its card nobody can resolve it; if this is killed, the rest is an unfinished version.
                    return _remove_files(storage, folder, sorted(files, key=lambda uri: uri != join(folder, CARD_FILE)))

                yield Leftover("old version", folder, size, int(age_s), remove)


def _named(storage: Storage, store: str) -> set[str]:
    """Every NAME@VERSION that an alias, a plan, a part or the card of another version names, variants by their base."""
    named: set[str] = set()
    for table in storage.names(join(store, "tables")):
        of_table = Table(store, table, storage)
        named |= {_base(head.model) for head in of_table.heads()} | {_base(model) for model in of_table.models()}
    for card in registry.list_models(store):
        found = {f"{name}@{version}" for name, version in _REFERENCE.findall(card.to_json())}
        named |= found - {_base(card.reference)}
    for name in storage.names(join(store, "models")):
        named |= {_base(f"{name}@{version}") for version in registry.aliases(store, name).values()}
    return named


def _base(reference: str) -> str:
    """NAME@VERSION of NAME@VERSION.int8; a name may hold dots."""
    name, _, version = reference.partition("@")
    return f"{name}@{version.partition('.')[0]}"
