"""List a source: every image that is there, with its fingerprint, as a stream of record batches.

A source is a folder or bucket prefix, one image, or a list of image URIs (.txt, .csv or .parquet). A folder's files are
taken or ignored by their names alone; nothing is opened. What a list names is taken whatever it is, because each of
its lines must become a row.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import NotFound, UsageError
from models.records import LISTING_SCHEMA
from tasks.storage import FileState, Storage, join, local_path, normalise, open_storage

BATCH_ROWS = 16_384
LIST_EXTENSIONS = ("txt", "csv", "parquet")
LIST_COLUMNS = ("image", "uri", "url", "path")
_REQUESTS_AT_ONCE = 32  # HEAD requests for the lines of a list

# Also of formats that cannot be decoded here: such a file gets a row that says so.
# fmt: off
IMAGE_EXTENSIONS = frozenset((
    "apng", "arw", "avif", "avifs", "bmp", "bufr", "cr2", "cr3", "crw", "cur", "dcm", "dcr", "dds", "dib", "dng",
    "dpx", "emf", "eps", "erf", "exr", "fits", "gif", "grib", "hdr", "heic", "heics", "heif", "heifs", "hif", "icns",
    "ico", "iiq", "j2c", "j2k", "jfif", "jif", "jls", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jph", "jpm", "jpx",
    "jxl", "jxr", "kdc", "mef", "mos", "mpo", "mrw", "nef", "nrw", "orf", "pam", "pbm", "pcx", "pef", "pfm", "pgm",
    "pict", "pjp", "pjpeg", "png", "pnm", "ppm", "psb", "psd", "qoi", "raf", "ras", "raw", "rgb", "rgba", "rw2",
    "rwl", "sgi", "sr2", "srf", "srw", "svg", "svgz", "tga", "tif", "tiff", "wbmp", "wdp", "webp", "wmf", "x3f",
    "xbm", "xcf", "xpm",
))
# Of file managers, archives and network drives; compared in lower case.
_HIDDEN_NAMES = frozenset((
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "$recycle.bin", "__macosx",
    "system volume information",
))
# fmt: on


def ignore_reason(name: str, is_folder: bool) -> str | None:
    """Why a file or folder of this name is left out of a listing: "hidden", or "other" (a file that is no image)."""
    if name.startswith(".") or name.lower() in _HIDDEN_NAMES:
        return "hidden"
    if is_folder:
        return None
    _, dot, extension = name.rpartition(".")
    # Without an extension a file may well be an image: many archives name by number or hash.
    return "other" if dot and extension and extension.lower() not in IMAGE_EXTENSIONS else None


class Listing:
    """The images of one source. Iterate it once; `listed` and `ignored` count as it goes."""

    def __init__(
        self, source: str, states: Callable[[dict[str, int]], Iterator[FileState]], report: Callable[[int], None] | None
    ):
        self.source = source
        self.listed = 0
        self.ignored: dict[str, int] = {}  # by reason: hidden, other, link, special, unreadable_folder, blank
        self._states = states
        self._report = report

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Batches of LISTING_SCHEMA, at most BATCH_ROWS rows each. Raises NotFound at the end if there was none."""
        states = self._states(self.ignored)
        while rows := list(islice(states, BATCH_ROWS)):
            self.listed += len(rows)
            if self._report is not None:
                self._report(self.listed)
            yield pa.RecordBatch.from_arrays(
                [pa.array(column) for column in zip(*rows, strict=True)], schema=LISTING_SCHEMA
            )
        if not self.listed:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.ignored.items()))
            raise NotFound(f"no images in {self.source}" + (f" (ignored: {counts})" if counts else ""))


def list_source(
    uri: str, *, recursive: bool = True, report: Callable[[int], None] | None = None, exclude: str | None = None
) -> Listing:
    """Lists a source, typed by a person. Nothing is listed before the result is iterated.

    `report` gets the number of images so far, after each batch. `exclude` is a folder below the source, such as the
    store, that is passed over. Raises NotFound when there is nothing of that name, UsageError when it is nothing that
    can be listed.
    """
    typed_folder = uri.endswith("/")
    uri = normalise(uri)
    storage = open_storage(uri)
    exclude = normalise(exclude) if exclude else None
    state = None if typed_folder else storage.state(uri)
    if state is not None:
        extension = PurePosixPath(uri).suffix.lower().removeprefix(".")
        if extension in LIST_EXTENSIONS:
            return Listing(uri, lambda ignored: _listed_states(_list_rows(storage, uri, extension, ignored)), report)
        if ignore_reason(uri.rpartition("/")[2], False) == "other":
            known = ", ".join(f".{extension}" for extension in LIST_EXTENSIONS)
            raise UsageError(f"expected a folder, an image or a list ({known}), got {uri}")
        return Listing(uri, lambda ignored: iter([state]), report)
    if storage.is_folder(uri):
        return Listing(
            uri,
            lambda ignored: storage.walk(
                uri, recursive=recursive, ignore=ignore_reason, ignored=ignored, exclude=exclude
            ),
            report,
        )
    if not uri.startswith("s3://") and os.path.lexists(local_path(uri)):
        raise UsageError(
            f"{uri} is neither a folder nor a regular file (links to files are not followed: name the file itself)"
        )
    raise NotFound(f"{uri} does not exist; expected a folder, an image or a list of images")


def _listed_states(uris: Iterable[str]) -> Iterator[FileState]:
    """The state of each listed URI, in order; one with fingerprint "" for what is not a readable regular file."""

    def state_of(uri: str) -> FileState:
        return open_storage(uri).state(uri) or FileState(uri, "", 0)

    uris = iter(uris)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        while block := list(islice(uris, BATCH_ROWS)):
            # Threads hide a network's latency, but cost more than a local stat.
            remote = any(uri.startswith("s3://") for uri in block)
            yield from pool.map(state_of, block) if remote else map(state_of, block)


def _list_rows(storage: Storage, uri: str, extension: str, ignored: dict[str, int]) -> Iterator[str]:
    """The URIs of a list file, relative ones resolved against its folder; blank ones are counted, not returned."""
    folder = join(uri, "..") if not uri.startswith("s3://") else uri.rpartition("/")[0]
    read = {"txt": _text_lines, "csv": _csv_cells, "parquet": _parquet_values}[extension]
    with storage.fetch(uri) as path:
        for number, value in read(path, uri):
            if not value:
                ignored["blank"] = ignored.get("blank", 0) + 1
                continue
            try:
                yield normalise(value, folder=folder)
            except UsageError as error:
                raise UsageError(f"{uri}, row {number}: {error}") from None


def _text_lines(path: Path, uri: str) -> Iterator[tuple[int, str]]:
    # Surrogates keep the bytes of local names that are not UTF-8.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n")


def _csv_cells(path: Path, uri: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        first = next(rows, None)
        if first is None:
            return
        column = _column([name.strip().lower() for name in first])
        # Without a header that we know, the first row is data if it names an image.
        data: Iterable[list[str]] = rows
        if column is None and (first[0].startswith(("/", "s3://", "file://")) or _has_image_extension(first[0])):
            data = chain([first], rows)
        try:
            for row in data:
                yield rows.line_num, row[column or 0] if len(row) > (column or 0) else ""
        except csv.Error as error:
            raise UsageError(f"{uri}, row {rows.line_num}: not CSV: {error}") from None


def _parquet_values(path: Path, uri: str) -> Iterator[tuple[int, str]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            name = names[_column([name.lower() for name in names]) or 0]
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=[name]):
                for value in batch.column(0).cast(pa.string()).to_pylist():
                    number += 1
                    yield number, value or ""
    except (pa.ArrowException, IndexError) as error:
        raise UsageError(
            f"{uri}: expected Parquet with a text column of image URIs: {str(error).splitlines()[0]}"
        ) from None


def _column(names: list[str]) -> int | None:
    return next((names.index(known) for known in LIST_COLUMNS if known in names), None)


def _has_image_extension(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
