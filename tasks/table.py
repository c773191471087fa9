"""A table in the store: its plans are the claims, its parts are the commits, and what lies between is open work.

tables/NAME/table.json                                   the task and the settings that change results
tables/NAME/plans/00000001.parquet                       images claimed by one run; each row group is one shard
tables/NAME/parts/model=M@V/00000001-00017.parquet       the rows of shard 17 of plan 1
"""

import io
import json
import re
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import NotFound, StorageError, TableMismatch
from models.records import Task
from tasks.storage import Storage, join, open_storage

METADATA_KEY = b"pixelmill"
_GROUPS_AT_ONCE = 16  # of a plan: row groups read in one go, up to 65,536 images
_PIECES_AHEAD = 8
_PLAN_NAME = re.compile(r"(\d{8})\.parquet")
_PART_NAME = re.compile(r"(\d{8})-(\d{5,})\.parquet")


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """One row group of one plan: the images that are computed, written and retried as one."""

    plan: int  # from 1
    index: int  # from 0, the row group
    images: int

    @property
    def file_name(self) -> str:
        """The name of the part that commits this shard."""
        return f"{self.plan:08d}-{self.index:05d}.parquet"

    def __str__(self) -> str:
        return f"{self.plan}-{self.index}"


@dataclass(frozen=True, slots=True)
class PlanHead:
    """What the footer of a plan says, without its rows."""

    number: int
    model: str  # NAME@VERSION
    source: str
    created_at: str
    shards: tuple[Shard, ...]


class Table:
    """Reads and writes the files of one table. Safe for any number of processes on any number of machines."""

    def __init__(self, store: str, name: str, storage: Storage | None = None):
        self.store = store
        self.name = name
        self.uri = join(store, "tables", name)
        self.storage = storage or open_storage(store)
        self._definition: dict[str, Any] | None = None
        self._heads: dict[int, PlanHead] = {}  # plans never change, so what was read once stays true

    @property
    def definition(self) -> dict[str, Any]:
        """`table.json`: `task` and `settings`. Raises NotFound when the table has not been made."""
        if self._definition is None:
            self._definition = self._read_definition()
        return self._definition

    def _read_definition(self) -> dict[str, Any]:
        try:
            return json.loads(self.storage.read(join(self.uri, "table.json")))
        except FileNotFoundError:
            known = ", ".join(sorted(self.storage.names(join(self.store, "tables")))) or "none yet"
            raise NotFound(f"no table {self.name!r} in {self.store}; tables there: {known}") from None

    @property
    def task(self) -> Task:
        """The task that all models of this table share."""
        return Task(self.definition["task"])

    def define(self, task: Task, settings: dict[str, Any]) -> None:
        """Makes the table for this task with these settings; of one that is there, checks them as `check` does."""
        text = json.dumps({"table": self.name, "task": str(task), "settings": settings}, indent=2, sort_keys=True)
        if not self.exists():
            self.storage.put_if_absent(join(self.uri, "table.json"), text.encode())
        self.check(task, settings)

    def exists(self) -> bool:
        """Whether the table has been made."""
        return self.storage.exists(join(self.uri, "table.json"))

    def check(self, task: Task, settings: dict[str, Any]) -> None:
        """Raises TableMismatch if the table was made for another task or with other settings."""
        found = self.definition
        if found["task"] != task:
            raise TableMismatch(
                f"table {self.name!r} holds results of task {found['task']}, this model's task is {task}: "
                "name another table"
            )
        differing = [
            f"--{key.replace('_', '-')} {found['settings'].get(key)} there, {settings.get(key)} now"
            for key in sorted(settings.keys() | found["settings"].keys())
            if found["settings"].get(key) != settings.get(key)
        ]
        if differing:
            raise TableMismatch(
                f"table {self.name!r} was written with other settings ({'; '.join(differing)}): "
                "use the same settings, or name another table"
            )

    def plan_numbers(self) -> list[int]:
        """The numbers of all plans, ascending."""
        names = map(_PLAN_NAME.fullmatch, self.storage.names(join(self.uri, "plans")))
        return sorted(int(match[1]) for match in names if match)

    def plan_uri(self, number: int) -> str:
        """Where plan `number` lies."""
        return join(self.uri, "plans", f"{number:08d}.parquet")

    def heads(self, model: str | None = None) -> list[PlanHead]:
        """The heads of all plans, or of those for one model (`NAME@VERSION`), by number."""
        numbers = self.plan_numbers()
        unread = [number for number in numbers if number not in self._heads]
        with ThreadPoolExecutor(min(16, len(unread) or 1)) as readers:  # on S3 a footer is a few round trips
            for head in readers.map(self._read_head, unread):
                self._heads[head.number] = head
        heads = [self._heads[number] for number in numbers]
        return [head for head in heads if model in (None, head.model)]

    def _read_head(self, number: int) -> PlanHead:
        with self._parquet(self.plan_uri(number)) as file:
            head = _own_metadata(file, self.plan_uri(number))
            rows = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        shards = tuple(Shard(number, index, count) for index, count in enumerate(rows))
        return PlanHead(number, head["model"], head["source"], head["created_at"], shards)

    def shard_rows(self, shard: Shard) -> pa.Table:
        """The images of one shard, in the columns of PLAN_SCHEMA; reads only its row group."""
        with self._parquet(self.plan_uri(shard.plan)) as file:
            return file.read_row_group(shard.index)

    def plan_batches(self, numbers: list[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of several plans, streamed; some plans are read ahead, since on S3 each is a few round trips."""
        heads = {head.number: head for head in self.heads()}
        pieces = (
            (number, range(start, min(start + _GROUPS_AT_ONCE, len(heads[number].shards))))
            for number in numbers
            for start in range(0, len(heads[number].shards), _GROUPS_AT_ONCE)
        )

        def read(piece: tuple[int, range]) -> pa.Table:
            number, groups = piece
            with self._parquet(self.plan_uri(number)) as file:
                return file.read_row_groups(list(groups), columns=columns, use_threads=False)

        with ThreadPoolExecutor(_PIECES_AHEAD) as readers:
            ahead = deque(readers.submit(read, piece) for piece in islice(pieces, _PIECES_AHEAD))
            while ahead:
                rows = ahead.popleft().result()
                ahead.extend(readers.submit(read, piece) for piece in islice(pieces, 1))
                yield from rows.to_batches()

    def part_uri(self, model: str, shard: Shard | str) -> str:
        """Where the part of a shard, or the part of this file name, lies."""
        name = shard if isinstance(shard, str) else shard.file_name
        return join(self.uri, "parts", f"model={model}", name)

    def part_names(self, model: str) -> set[str]:
        """The file names of all parts of one model."""
        names = self.storage.names(join(self.uri, "parts", f"model={model}"))
        return {name for name in names if _PART_NAME.fullmatch(name)}

    def models(self) -> list[str]:
        """All models (`NAME@VERSION`) that have parts."""
        folders = self.storage.names(join(self.uri, "parts"))
        return sorted(folder.removeprefix("model=") for folder in folders if folder.startswith("model="))

    def open_shards(self, model: str, plans: Collection[int] | None = None) -> list[Shard]:
        """The shards of all plans for this model, or of these plans, that have no part yet: plan minus parts."""
        heads = [head for head in self.heads(model) if plans is None or head.number in plans]
        done = self.part_names(model)
        return [shard for head in heads for shard in head.shards if shard.file_name not in done]

    def read_part(self, uri: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of one part; page checksums are verified. Raises StorageError naming a damaged file."""
        with self._parquet(uri) as file:
            return file.read(columns=columns)

    def part_statistics(self, uri: str) -> dict[str, Any]:
        """What the slot noted about one part: counts by status, seconds by stage, engine, host. Raises StorageError."""
        with self._parquet(uri) as file:
            return _own_metadata(file, uri)

    def part_times(self, uri: str) -> tuple[int, datetime, datetime] | None:
        """Rows of one part, and from when to when its slot was at work on it, read off the footer; None if it does not
        say. Raises StorageError.
        """
        with self._parquet(uri) as file:
            seconds = _own_metadata(file, uri).get("seconds")
            paths = [file.schema.column(index).path for index in range(len(file.schema))]
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            if seconds is None or "predicted_at" not in paths:
                return None
            found = [group.column(paths.index("predicted_at")).statistics for group in groups]
            ends = [one.max for one in found if one is not None and one.has_min_max]
            return (file.metadata.num_rows, max(ends) - timedelta(seconds=seconds), max(ends)) if ends else None

    def commit(self, model: str, shard: Shard, rows: pa.Table, statistics: dict[str, Any]) -> bool:
        """Publishes the part of a shard, whole; False when another slot had published it first."""
        metadata = {METADATA_KEY: json.dumps(statistics).encode()}
        data = write_parquet(rows.replace_schema_metadata(metadata))
        return self.storage.put_if_absent(self.part_uri(model, shard), data)

    @contextmanager
    def _parquet(self, uri: str) -> Iterator[pq.ParquetFile]:
        try:
            with self.storage.open(uri) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
                yield file
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:  # Arrow raises OSError itself for a wrong checksum
            raise StorageError(f"{uri} is damaged: {' '.join(str(error).split())}") from error


def _own_metadata(file: pq.ParquetFile, uri: str) -> dict[str, Any]:
    try:
        return json.loads((file.metadata.metadata or {})[METADATA_KEY])
    except (KeyError, ValueError):
        raise StorageError(
            f"{uri} was not written by pixelmill: it has no {METADATA_KEY.decode()!r} metadata"
        ) from None


# Floats split by byte are 41 % smaller and written twice as fast; sorted names share their prefixes.
ENCODINGS = {
    "image": "DELTA_BYTE_ARRAY",
    "fingerprint": "DELTA_LENGTH_BYTE_ARRAY",
    "sha256": "DELTA_LENGTH_BYTE_ARRAY",
    "objects.list.element.mask": "DELTA_LENGTH_BYTE_ARRAY",
    "segments.list.element.mask": "DELTA_LENGTH_BYTE_ARRAY",
}


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How all Parquet files of a table are written: zstd, page checksums, an encoding that fits each column."""
    leaves = list(_leaves("", schema))
    encodings = {path: "BYTE_STREAM_SPLIT" for path, kind in leaves if pa.types.is_floating(kind)}
    encodings |= {path: ENCODINGS[path] for path, _ in leaves if path in ENCODINGS}
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        "use_dictionary": [path for path, kind in leaves if path not in encodings and pa.types.is_string(kind)],
        "column_encoding": encodings,
    }


def _leaves(prefix: str, fields: Any) -> Iterator[tuple[str, pa.DataType]]:
    for field in fields:
        path = f"{prefix}{field.name}"
        if pa.types.is_struct(field.type):
            yield from _leaves(f"{path}.", field.type)
        elif pa.types.is_list(field.type):
            yield from _leaves(f"{path}.list.", [field.type.value_field.with_name("element")])
        else:
            yield path, field.type


def write_parquet(rows: pa.Table) -> bytes:
    """A complete Parquet file in memory."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, **parquet_options(rows.schema))
    return buffer.getvalue()
