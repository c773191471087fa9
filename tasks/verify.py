"""Verification: read every plan and every part of a table, and hold them against the promise of one row per claim."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from models.errors import StorageError
from models.records import PLAN_SCHEMA, Status, part_schema
from tasks.outputs import missing_outputs
from tasks.plan import stream
from tasks.storage import join, normalise
from tasks.table import PlanHead, Table

CLAIM = ("image", "fingerprint", "attempt")
_KNOWN_STATUS = {str(status) for status in Status}
_MOST_EXAMPLES = 3  # images named per problem


@dataclass
class Verification:
    """What was read, and everything that is not as it must be; the keys of `verify --json`."""

    table: str
    plans: int = 0
    parts: int = 0
    rows: int = 0
    claims: int = 0
    problems: list[str] = field(default_factory=list)


def verify(store: str, name: str) -> Verification:
    """Reads all plans and parts, checksums included. Open shards, damaged files and rows that no plan claims are
    problems.

    Raises NotFound for an unknown table and StorageError when the store does not answer.
    """
    table = Table(normalise(store), name)
    result = Verification(name)
    schema = part_schema(table.task)
    heads = table.heads()
    result.plans = len(heads)
    if [head.number for head in heads] != list(range(1, len(heads) + 1)):
        result.problems.append(f"plans are not numbered 1 to {len(heads)}: one was removed, or its claims are lost")
    for model in sorted({head.model for head in heads} | set(table.models())):
        of_model = [head for head in heads if head.model == model]
        result.claims += sum(shard.images for head in of_model for shard in head.shards)
        _check_claims(table, of_model, result)
        _check_parts(table, model, of_model, schema, result)
    return result


def _check_claims(table: Table, heads: list[PlanHead], result: Verification) -> None:
    """No two plans claim the same attempt at the same version of an image."""
    numbers = [head.number for head in heads]
    schema = pa.schema([PLAN_SCHEMA.field(name) for name in CLAIM])
    with tempfile.TemporaryDirectory(prefix="pixelmill-verify-") as scratch:
        database = duckdb.connect(Path(scratch) / "claims.duckdb", config={"memory_limit": "1GB"})
        try:
            with stream(database, "claims", schema, table.plan_batches(numbers, list(CLAIM))):
                doubled = database.execute(
                    "SELECT image, count(*) FROM claims GROUP BY image, fingerprint, attempt "
                    "HAVING count(*) > 1 ORDER BY image"
                ).fetchmany(_MOST_EXAMPLES)
        except (duckdb.Error, StorageError) as error:
            result.problems.append(f"plans of {heads[0].model if heads else table.name} cannot be read: {error}")
            return
    result.problems += [f"{image} is claimed {count} times" for image, count in doubled]


def _check_parts(table: Table, model: str, heads: list[PlanHead], schema: pa.Schema, result: Verification) -> None:
    """Every shard has one part with exactly its images, and there are no other parts."""
    present = table.part_names(model)
    shards = {shard.file_name: shard for head in heads for shard in head.shards}
    for name in sorted(present - shards.keys()):
        result.problems.append(f"parts/model={model}/{name} belongs to no plan")
    missing = sorted(shards.keys() - present)
    if missing:
        images = sum(shards[name].images for name in missing)
        result.problems.append(
            f"{len(missing)} of {len(shards)} shards of {model} are open ({images:,} images, first {missing[0]}): "
            "run the same predict command again"
        )
    for name in sorted(present & shards.keys()):
        uri = join(table.uri, "parts", f"model={model}", name)
        try:
            rows = table.read_part(uri)
            statistics = table.part_statistics(uri)
            claimed = table.shard_rows(shards[name])
        except StorageError as error:
            result.problems.append(str(error))
            continue
        except FileNotFoundError:
            result.problems.append(f"{uri} vanished while it was being read")
            continue
        result.parts += 1
        result.rows += rows.num_rows
        if "output" in rows.schema.names:
            result.problems += _check_outputs(table, model, name, rows)
        result.problems += [
            f"parts/model={model}/{name}: {problem}" for problem in _compare(rows, claimed, schema, statistics)
        ]


def _check_outputs(table: Table, model: str, name: str, rows: pa.Table) -> Iterator[str]:
    """Every row that is ok names an image that was made, and it is there."""
    outputs = [
        output
        for output, status in zip(rows.column("output").to_pylist(), rows.column("status").to_pylist(), strict=True)
        if status == Status.OK
    ]
    if unnamed := outputs.count(None):
        yield f"parts/model={model}/{name}: {unnamed} rows are ok and name no output"
    missing = missing_outputs(table, model, {output for output in outputs if output is not None})
    if missing:
        yield f"{len(missing)} images that parts/model={model}/{name} names are missing, the first: {missing[0]}"


def _compare(rows: pa.Table, claimed: pa.Table, schema: pa.Schema, statistics: dict) -> Iterator[str]:
    """What is wrong with the rows of one part, given the rows of its shard."""
    if not rows.schema.equals(schema):
        yield f"its columns are {rows.schema.names}, expected {schema.names}"
        return
    if rows.num_rows != claimed.num_rows:
        yield f"{rows.num_rows} rows for {claimed.num_rows} claimed images"
        return
    for name in CLAIM:
        if not rows.column(name).equals(claimed.column(name)):
            yield f"column {name} differs from the plan"
    status = rows.column("status").to_pylist()
    unknown = set(status) - _KNOWN_STATUS
    if unknown:
        yield f"unknown status {sorted(map(str, unknown))}"
    counted = {name: status.count(name) for name in set(status)}
    if counted != statistics.get("by_status"):
        yield f"its statistics count {statistics.get('by_status')}, its rows {counted}"
