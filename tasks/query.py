"""SQL over a store, in an in-memory DuckDB that reads its Parquet files; it writes only where the SQL says COPY."""

import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import duckdb

from models.errors import NotFound, PixelmillError, StorageError, UsageError
from tasks.storage import normalise
from tasks.views import FINDINGS, OF_DATASET, Views, quoted, sql_name

Form = Literal["csv", "json", "parquet"]

BATCH_ROWS = 2048
_COPY_OPTIONS: dict[Form, str] = {
    "csv": "FORMAT csv, HEADER",
    "json": "FORMAT json, ARRAY",
    "parquet": "FORMAT parquet, COMPRESSION zstd",
}


@dataclass(frozen=True)
class Answer:
    """The rows of a query."""

    columns: list[str]
    rows: list[tuple[Any, ...]]  # plain Python values; the first `limit` of them
    total: int


@contextmanager
def database(store: str, sql: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with the views that the SQL names. Errors of DuckDB become UsageError or StorageError, in one line."""
    views = Views(normalise(store))
    with tempfile.TemporaryDirectory(prefix="pixelmill-query-") as scratch:
        connection = duckdb.connect(
            ":memory:",
            config={
                "autoinstall_known_extensions": "false",  # nothing is ever downloaded
                "allow_unredacted_secrets": "false",
                "temp_directory": scratch,
            },
        )
        try:
            connection.execute("SET TimeZone = 'UTC'")
            if "s3://" in views.store or "s3://" in sql:
                enable_s3(connection)
            views.create(connection, sql)
            yield connection
        except duckdb.Error as error:
            raise _in_one_line(error, views) from None
        finally:
            connection.close()


def ask(store: str, sql: str, limit: int | None = None) -> Answer:
    """Runs the SQL and returns the first `limit` rows of its last statement, and how many there are in all."""
    with database(store, sql) as connection:
        if not connection.extract_statements(sql):
            raise UsageError("no SQL was given")
        reader = connection.execute(sql).to_arrow_reader(BATCH_ROWS)
        rows: list[tuple[Any, ...]] = []
        total = 0
        for batch in reader:
            total += batch.num_rows
            wanted = batch.num_rows if limit is None else min(batch.num_rows, limit - len(rows))
            if wanted > 0:
                columns = [
                    [plain(value) for value in column.to_pylist(maps_as_pydicts="lossy")]
                    for column in batch.slice(0, wanted).columns
                ]
                rows += zip(*columns, strict=True)
        return Answer(reader.schema.names, rows, total)


def export(store: str, sql: str, form: Form, file: Path) -> None:
    """Writes the rows of a SELECT into a file that does not exist yet: CSV with a header, a JSON array, or Parquet."""
    with database(store, sql) as connection:
        statements = connection.extract_statements(sql)
        if not statements or statements[-1].type != duckdb.StatementType.SELECT:
            raise UsageError(f"writing {form} needs a SELECT at the end of the SQL")
        for statement in statements[:-1]:
            connection.execute(statement)
        connection.sql(statements[-1].query).create_view("pixelmill_rows")
        connection.execute(f"COPY (FROM pixelmill_rows) TO {quoted(str(file))} ({_COPY_OPTIONS[form]})")


def enable_s3(connection: duckdb.DuckDBPyConnection) -> None:
    """Lets a database read S3 as the rest of the program does: same endpoint, region and credentials."""
    import botocore.session
    import duckdb_extension_httpfs

    extension = (
        Path(duckdb_extension_httpfs.__file__).parent / f"extensions/v{duckdb.__version__}/httpfs.duckdb_extension"
    )
    if not extension.exists():
        raise PixelmillError(
            f"reading S3 needs duckdb-extension-httpfs {duckdb.__version__}, the version of DuckDB: "
            f"pip install duckdb-extension-httpfs=={duckdb.__version__}"
        )
    connection.execute(f"LOAD {quoted(str(extension))}")
    session = botocore.session.get_session()
    client = session.create_client("s3", region_name=os.environ.get("AWS_REGION"))
    options = {"REGION": client.meta.region_name}
    scheme, _, host = client.meta.endpoint_url.partition("://")
    if not host.endswith(".amazonaws.com"):
        options |= {"ENDPOINT": host, "URL_STYLE": "path", "USE_SSL": "false" if scheme == "http" else "true"}
    credentials = session.get_credentials()
    if credentials is not None:
        frozen = credentials.get_frozen_credentials()
        options |= {"KEY_ID": frozen.access_key, "SECRET": frozen.secret_key}
        if frozen.token:
            options["SESSION_TOKEN"] = frozen.token
    settings = ", ".join(f"{name} {quoted(value)}" for name, value in options.items() if value)
    try:
        connection.execute(f"CREATE SECRET store (TYPE s3, {settings})")
    except duckdb.Error:  # its message repeats the statement
        raise StorageError("DuckDB does not take the S3 settings of the environment") from None


def plain(value: Any) -> Any:
    """The value in the types that JSON has; NaN and infinity become None, times ISO 8601."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _in_one_line(error: duckdb.Error, views: Views) -> PixelmillError:
    text = str(error).partition("\n\nLINE ")[0]
    message = " ".join(text.split())
    unknown = re.search(r"Table with name (\S+) does not exist", message)
    if unknown:
        tables = ", ".join(views.tables) or "none yet"
        sets = ", ".join(dict.fromkeys(map(sql_name, views.datasets))) or "none yet"
        findings = " or ".join(f"T_{column}" for column in FINDINGS)
        others = ", ".join(views.of_store)
        return NotFound(
            f"no table or view {unknown[1]!r} in {views.store}; tables there: {tables}; "
            f"each table T is also there as T_all and, by its task, {findings}; data sets: {sets}, "
            f"each D as {' or '.join(f'D_{suffix}' for suffix in OF_DATASET)}; other views: {others}"
        )
    if isinstance(error, duckdb.HTTPException) or "Could not connect to server" in message:
        return StorageError(message)
    return UsageError(message)
