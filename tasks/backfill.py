"""What a backfill finds out: what each partition holds, what of it is done, and how long the rest takes.

It is read off the source, plans and parts, never off Prefect.
"""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from models.errors import NotFound
from models.progress import Report, Step
from models.records import LISTING_SCHEMA
from models.settings.backfill import BackfillSettings
from tasks import registry
from tasks.listing import list_source
from tasks.partitions import find_partitions
from tasks.past_rate import past_rate
from tasks.plan import MEMORY_LIMIT, stream
from tasks.storage import join, normalise
from tasks.table import Table

_SURVEY_SCHEMA = LISTING_SCHEMA.insert(0, pa.field("partition", pa.int32()))
_CLAIM_SCHEMA = pa.schema(
    [("image", pa.string()), ("fingerprint", pa.string()), ("is_first", pa.bool_()), ("is_open", pa.bool_())]
)


@dataclass(frozen=True)
class Partition:
    """One folder below the source, and what of it is in the table for one model."""

    name: str  # below the source
    uri: str
    images: int
    bytes: int
    new: int  # claimed by no plan
    open: int  # claimed, and not predicted yet

    @property
    def left(self) -> int:
        """Images without a row."""
        return self.new + self.open


@dataclass(frozen=True)
class Survey:
    """What there is to do."""

    table: str
    model: str  # NAME@VERSION
    source: str
    partitions: list[Partition]
    images_per_second: float | None  # of the table's own past; None when it has none

    @property
    def seconds(self) -> float | None:
        """How long the rest takes at that rate."""
        left = sum(partition.left for partition in self.partitions)
        return left / self.images_per_second if self.images_per_second else None


def survey(store: str, settings: BackfillSettings, report: Report) -> Survey:
    """Finds the partitions, lists their images, and subtracts what the table has of them.

    Raises NotFound when there is no such partition, UsageError for partitions without a date where one is asked for.
    """
    store = normalise(store)
    model = registry.check_exported(registry.resolve(store, settings.model)).reference
    source = normalise(settings.source)
    names = find_partitions(source, settings, store)
    table = Table(store, settings.table)
    counted = _count(table, model, source, names, settings.recursive, store, report)
    return Survey(settings.table, model, source, counted, past_rate(table, model))


def _count(
    table: Table, model: str, source: str, names: Sequence[str], recursive: bool, store: str, report: Report
) -> list[Partition]:
    """Images and bytes of each partition, and how many of them are new or open, in one pass over all claims."""
    uris = [join(source, *name.split("/")) for name in names]
    with tempfile.TemporaryDirectory(prefix="pixelmill-backfill-") as scratch:
        database = duckdb.connect(Path(scratch) / "survey.duckdb", config={"memory_limit": MEMORY_LIMIT})
        database.execute("SET preserve_insertion_order = false")
        with stream(database, "batches", _SURVEY_SCHEMA, _listed(uris, recursive, store, report)):
            database.execute("CREATE TABLE listing AS FROM batches")
        with stream(database, "claims", _CLAIM_SCHEMA, _claims(table, model)):
            rows = database.execute(
                "SELECT partition, count(*), sum(bytes), sum(claimed), sum(open) FROM ("
                "  SELECT partition, any_value(bytes) AS bytes, count(*) FILTER (is_first) AS claimed, "
                "  count(*) FILTER (is_open) AS open FROM listing LEFT JOIN claims USING (image, fingerprint) "
                "  GROUP BY partition, image, fingerprint) GROUP BY partition"
            ).fetchall()
    counts = {
        partition: (images, size, images - claimed, is_open) for partition, images, size, claimed, is_open in rows
    }
    return [
        Partition(name, uri, *map(int, counts.get(index, (0, 0, 0, 0))))
        for index, (name, uri) in enumerate(zip(names, uris, strict=True))
    ]


def _listed(uris: Sequence[str], recursive: bool, store: str, report: Report) -> Iterator[pa.RecordBatch]:
    """The images of all partitions, with the index of each; a partition without images has none."""
    for index, uri in enumerate(uris):
        report(Step("listing partitions", index, len(uris)))
        try:
            for batch in list_source(f"{uri}/", recursive=recursive, exclude=store):
                yield batch.add_column(0, _SURVEY_SCHEMA.field(0), pa.array([index] * batch.num_rows, pa.int32()))
        except NotFound:  # an empty folder is nothing to predict, and no mistake
            continue
    report(Step("listing partitions", len(uris), len(uris)))


def _claims(table: Table, model: str) -> Iterator[pa.RecordBatch]:
    """All that is claimed for a model, and whether it is still to be predicted."""
    open_shards = set(table.open_shards(model))
    columns = ["image", "fingerprint", "attempt"]
    for head in table.heads(model):
        if not open_shards.isdisjoint(head.shards):
            for shard in head.shards:
                for batch in table.shard_rows(shard).select(columns).to_batches():
                    yield _claim(batch, shard in open_shards)
            continue
        for batch in table.plan_batches([head.number], columns):
            yield _claim(batch, False)


def _claim(batch: pa.RecordBatch, is_open: bool) -> pa.RecordBatch:
    first = pa.array([attempt == 1 for attempt in batch.column("attempt").to_pylist()], pa.bool_())
    columns = [batch.column("image"), batch.column("fingerprint"), first, pa.array([is_open] * len(first), pa.bool_())]
    return pa.RecordBatch.from_arrays(columns, schema=_CLAIM_SCHEMA)


@dataclass(frozen=True)
class Done:
    """How far the claims from one source are, as plans and parts say."""

    rows: int = 0  # of committed shards
    open_shards: int = 0
    plans: int = 0


def done_of(table: Table, model: str, sources: Collection[str]) -> dict[str, Done]:
    """How far each source is; only footers and names are read."""
    done = dict.fromkeys(sources, Done())
    heads = [head for head in table.heads(model) if head.source in done]
    present = table.part_names(model) if heads else set()
    for head in heads:
        committed = [shard for shard in head.shards if shard.file_name in present]
        before = done[head.source]
        done[head.source] = Done(
            before.rows + sum(shard.images for shard in committed),
            before.open_shards + len(head.shards) - len(committed),
            before.plans + 1,
        )
    return done
