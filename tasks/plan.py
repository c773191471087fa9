"""Planning: subtract from a listing what earlier plans already claim, and claim the rest in one whole file.

A plan is written with put-if-absent under the next number. Whoever loses that race has not seen the winner's claims, so
it subtracts again: two runs never claim the same image. The listing and the subtraction live in temporary files, so
that memory stays flat.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from models.records import LISTING_SCHEMA, PLAN_SCHEMA, Status
from tasks.table import METADATA_KEY, Table, parquet_options

FORMAT = 1  # of plans; readers of a later format can tell
RETRIED = (Status.UNREADABLE, Status.MISSING)  # a storage that was away shows as either
MEMORY_LIMIT = "512MB"  # DuckDB spills beyond it, and takes up to twice as much

# Images are told apart by 128 bits of name and version, so that tens of millions of claims fit into memory. That two of
# 10⁹ images share them has a chance of 10⁻²¹.
_DIGEST = "md5_number(image || chr(0) || fingerprint)"
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True, slots=True)
class Claim:
    """What a run asked for and what it got."""

    number: int | None  # of the plan written; None when nothing was left to claim
    listed: int  # distinct images of the listing
    new: int  # of these, claimed by no earlier plan
    planned: int  # claimed by this plan: less than new under a limit, more under retries


def claim(
    table: Table,
    listing: Iterator[pa.RecordBatch],
    *,
    model: str,
    source: str,
    settings: dict[str, Any],
    limit: int | None = None,
    shard_size: int | None = None,
    retry_unreadable: bool = False,
) -> Claim:
    """Claims the images of `listing` that no plan of this table claims yet for this model, and writes the plan.

    `listing` holds batches of LISTING_SCHEMA and is read once; what it raises is passed on. Raises StorageError when
    plans cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="pixelmill-plan-") as scratch:
        database = duckdb.connect(Path(scratch) / "plan.duckdb", config={"memory_limit": MEMORY_LIMIT})
        database.execute("SET preserve_insertion_order = false")
        listed = _load_listing(database, Path(scratch) / "listing.parquet", listing)
        while True:
            number = max(table.plan_numbers(), default=0) + 1
            new, planned = _subtract(database, table, model, listed, limit, retry_unreadable)
            if planned == 0:
                return Claim(None, listed, new, 0)
            size = shard_size or default_shard_size(planned)
            head = {
                "format": FORMAT,
                "table": table.name,
                "plan": number,
                "model": model,
                "task": str(table.task),
                "settings": settings,
                "source": source,
                "images": planned,
                "shards": -(-planned // size),
                "shard_size": size,
                "created_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            }
            file = Path(scratch) / f"{number}.plan"
            _write_plan(database, file, head, size)
            if table.storage.put_file_if_absent(table.plan_uri(number), file):
                return Claim(number, listed, new, planned)


def default_shard_size(num_images: int) -> int:
    """Small runs lose little to a Ctrl-C, large ones get files that query engines like."""
    if num_images < 8 * 1024:
        return max(64, num_images // 8)
    return min(4096, max(1024, num_images // 1024))


@contextmanager
def stream(
    database: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[None]:
    """Makes `batches` a table of the database that can be read once. What they raise is raised here as it was: DuckDB
    itself would wrap it, a Ctrl-C included, in an error of its own."""
    raised: list[BaseException] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except GeneratorExit:
            raise
        except BaseException as error:
            raised.append(error)
            raise

    database.register(name, pa.RecordBatchReader.from_batches(schema, watched()))
    try:
        yield
    except duckdb.Error:
        if raised:
            raise raised[0] from None
        raise
    finally:
        database.unregister(name)


def _load_listing(database: duckdb.DuckDBPyConnection, file: Path, listing: Iterator[pa.RecordBatch]) -> int:
    """Keeps the listing in a file, as the view `listing`; returns how many distinct images it holds.

    A file, since a table of so many names would take DuckDB five times as long to write, and most of its memory.
    """
    options: dict[str, Any] = {"compression": "lz4", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(file, LISTING_SCHEMA, **options) as writer:
        for rows in _gathered(listing, _ROWS_AT_ONCE):
            writer.write_table(rows)
    database.execute(f"CREATE VIEW listing AS SELECT *, {_DIGEST} AS digest FROM read_parquet('{file}')")
    row = database.execute("SELECT count(DISTINCT digest) FROM listing").fetchone()
    return int(row[0]) if row else 0


def _gathered(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of at least `size` rows; the last may be shorter."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(one.num_rows for one in waiting) >= size:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _subtract(
    database: duckdb.DuckDBPyConnection,
    table: Table,
    model: str,
    listed: int,
    limit: int | None,
    retry_unreadable: bool,
) -> tuple[int, int]:
    """Fills the table `plan` with the images to claim; returns how many are new, and how many it claims."""
    numbers = [head.number for head in table.heads(model)]
    columns = ["image", "fingerprint", "attempt"]
    schema = pa.schema([PLAN_SCHEMA.field(name) for name in columns])
    with stream(database, "claims", schema, table.plan_batches(numbers, columns)):
        source = "claims"
        if retry_unreadable:  # the claims are needed twice, a stream is read once
            database.execute("CREATE OR REPLACE TEMP TABLE all_claims AS FROM claims")
            source = "all_claims"
        database.execute(f"CREATE OR REPLACE TABLE claimed AS SELECT {_DIGEST} AS digest FROM {source}")
    # Only a list can name an image twice, and to look for that costs as much as the rest.
    once = "" if listed == _count(database, "listing") else "QUALIFY row_number() OVER (PARTITION BY digest) = 1"
    database.execute(
        "CREATE OR REPLACE TABLE plan AS SELECT image, fingerprint, bytes, 1::INTEGER AS attempt "
        f"FROM listing ANTI JOIN claimed USING (digest) {once}"
    )
    new = _count(database, "plan")
    if retry_unreadable:
        _add_retries(database, table, model)
    if limit is not None:
        database.execute(
            f"CREATE OR REPLACE TABLE plan AS FROM plan ORDER BY attempt, image, fingerprint LIMIT {int(limit)}"
        )
    return new, _count(database, "plan")


def _add_retries(database: duckdb.DuckDBPyConnection, table: Table, model: str) -> None:
    """Adds the listed images whose last claimed attempt ended without the image having been read."""
    columns = ["image", "fingerprint", "attempt", "status"]
    database.execute("CREATE OR REPLACE TEMP TABLE unread (image VARCHAR, fingerprint VARCHAR, attempt INTEGER)")
    folder = f"{table.uri}/parts/model={model}"
    for name in sorted(table.part_names(model)):
        database.register("rows", table.read_part(f"{folder}/{name}", columns))
        database.execute(
            "INSERT INTO unread SELECT image, fingerprint, attempt FROM rows WHERE status IN $1",
            [[*RETRIED]],
        )
    database.execute(
        "INSERT INTO plan SELECT image, fingerprint, bytes, attempt + 1 "
        "FROM (SELECT image, fingerprint, max(bytes) AS bytes FROM listing GROUP BY ALL) "
        "JOIN (SELECT image, fingerprint, max(attempt) AS attempt FROM all_claims GROUP BY ALL) "
        "USING (image, fingerprint) "
        "SEMI JOIN unread USING (image, fingerprint, attempt)"
    )


def _write_plan(database: duckdb.DuckDBPyConnection, file: Path, head: dict[str, Any], shard_size: int) -> None:
    """Writes the claimed images sorted by name, one row group per shard."""
    schema = PLAN_SCHEMA.with_metadata({METADATA_KEY: json.dumps(head).encode()})
    rows = database.execute(
        "SELECT image, fingerprint, bytes, attempt, $1 AS model FROM plan ORDER BY image, fingerprint", [head["model"]]
    ).to_arrow_reader(shard_size)
    with pq.ParquetWriter(file, schema, **parquet_options(schema)) as writer:
        for shard in _regroup(rows, shard_size):
            writer.write_table(shard.cast(schema), row_group_size=shard_size)


def _regroup(batches: pa.RecordBatchReader, size: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `size` rows; the last may be shorter."""
    waiting = batches.schema.empty_table()
    for batch in batches:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while waiting.num_rows >= size:
            yield waiting.slice(0, size).combine_chunks()
            waiting = waiting.slice(size)
    if waiting.num_rows:
        yield waiting.combine_chunks()


def _count(database: duckdb.DuckDBPyConnection, name: str) -> int:
    row = database.execute(f"SELECT count(*) FROM {name}").fetchone()
    return int(row[0]) if row else 0
