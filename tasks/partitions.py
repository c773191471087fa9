"""Find the partitions of a source: folders below it, by their names alone. No image is listed for it."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from models.errors import NotFound, UsageError
from models.partitions import Segment, date_of, parse_bound, parse_pattern, within
from models.settings.backfill import BackfillSettings, is_list
from tasks.listing import ignore_reason
from tasks.storage import join, normalise, open_storage

_REQUESTS_AT_ONCE = 16


def find_partitions(source: str, settings: BackfillSettings, store: str | None = None) -> list[str]:
    """The names of the folders that are meant, as paths below the source, sorted. Images are not listed for it.

    Raises NotFound when a pattern, or a line of a list, means no folder; UsageError for what lies within each other.
    """
    if not open_storage(source).is_folder(source):
        raise NotFound(f"{source} does not exist, or is no folder; a backfill needs the folder of its partitions")
    found: set[str] = set()
    for pattern, segments in _patterns(settings.partitions):
        names = [name for name in _matches(source, segments) if join(source, *name.split("/")) != store]
        if not names:
            there = ", ".join(_matches(source, [Segment("*")])[:5]) or "none"
            raise NotFound(f"no folder below {source} fits {pattern!r}; folders there: {there}")
        found.update(names)
    chosen = sorted(name for name in found if _is_between(name, settings))
    if not chosen:
        raise NotFound(f"none of {len(found)} partitions lies between {settings.from_ or '…'} and {settings.to or '…'}")
    for name in chosen:
        parents = [str(parent) for parent in PurePosixPath(name).parents]
        for outer in set(parents).intersection(chosen):
            raise UsageError(f"partition {name} lies within partition {outer}: name only one of them")
    return chosen


def _patterns(partitions: str) -> Iterator[tuple[str, tuple[Segment, ...]]]:
    """The pattern, or those of a list; blank lines and what follows # are left out."""
    if not is_list(partitions):
        yield partitions, parse_pattern(partitions)
        return
    uri = normalise(partitions)
    try:
        lines = open_storage(uri).read(uri).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise NotFound(f"{uri} does not exist; expected a file with one partition per line") from None
    except UnicodeDecodeError:
        raise UsageError(f"{uri} is not text in UTF-8; expected one partition per line") from None
    patterns = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    for number, pattern in patterns:
        try:
            if pattern:
                yield pattern, parse_pattern(pattern)
        except ValueError as error:
            raise UsageError(f"{uri}, line {number}: {error}") from None
    if not any(pattern for _, pattern in patterns):
        raise UsageError(f"{uri} names no partition; expected one per line")


def _matches(source: str, segments: Sequence[Segment]) -> list[str]:
    """The paths of the folders that fit, level by level."""
    names = [""]
    for segment in segments:
        names = [f"{name}/{below}".lstrip("/") for name in names for below in _below(source, name, segment)]
    return _only_folders(source, names)


def _below(source: str, name: str, segment: Segment) -> list[str]:
    if segment.is_literal:
        return [segment.text]
    folder = join(source, *name.split("/")) if name else source
    return [
        below for below in open_storage(source).names(folder) if segment.fits(below) and not ignore_reason(below, True)
    ]


def _only_folders(source: str, names: Iterable[str]) -> list[str]:
    storage = open_storage(source)
    names = list(names)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
        is_folder = threads.map(lambda name: storage.is_folder(join(source, *name.split("/"))), names)
        return [name for name, folder in zip(names, is_folder, strict=True) if folder]


def _is_between(name: str, settings: BackfillSettings) -> bool:
    first, last = (bound and parse_bound(bound) for bound in (settings.from_, settings.to))
    if not first and not last:
        return True
    date = date_of(name.split("/"))
    if date is None:
        raise UsageError(f"--from and --to need partitions with a date, like date=2026-01-15; {name} has none")
    return within(date, first or None, last or None)
