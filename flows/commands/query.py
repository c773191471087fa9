"""`pixelmill query`: SQL over the store."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from flows.commands.command import Outcome, command
from models.errors import UsageError
from models.settings.fields import StoreSettings

MOST_ROWS = 100  # shown to people
LONGEST_CELL = 60  # characters


@command("query")
def query(
    store: StoreSettings,
    sql: str,
    *,
    form: Annotated[Literal["table", "csv", "json", "parquet"], Parameter(name="--format")] = "table",
    out: Path | None = None,
) -> Outcome:
    """Ask the tables with SQL.

    For example:

        pixelmill query "select labels[1].label, count(*) from holiday group by 1"
        pixelmill query "select label, avg(score) from holiday_objects group by 1"
        pixelmill query "from holiday where status <> 'ok'" --out bad.csv

    Each table T is there as T (newest row per image and model), T_all (every row),
    T_labels, T_objects or T_segments (one row per finding); also: models, runs, shards.
    The SQL is DuckDB's.

    Args:
        sql: One or more statements; the rows of the last one are the answer.
        form: How the rows leave: a table for people, or all of them as CSV, JSON (an array of objects) or Parquet.
        out: Write the rows to this file instead of stdout.
    """
    from tasks import query as task

    if out is not None and form == "table":
        form = _form_of(out)
    if form == "table":
        return Outcome(lambda: _result(store.store, sql), lambda: _show(store.store, sql))
    if out is None:
        return Outcome(lambda: _result(store.store, sql), lambda: _print(store.store, sql, form))
    if not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: {out.parent} is no folder")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        task.export(store.store, sql, form, unfinished)
        unfinished.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return Outcome(lambda: {"out": str(out)}, lambda: print(f"wrote {out}"))


def _form_of(out: Path) -> Literal["csv", "json", "parquet"]:
    match out.suffix:
        case ".csv":
            return "csv"
        case ".json":
            return "json"
        case ".parquet":
            return "parquet"
    raise UsageError(f"--out {out}: expected a name that ends in .csv, .json or .parquet, or --format with one of them")


def _result(store: str, sql: str) -> dict[str, Any]:
    from tasks.query import ask

    answer = ask(store, sql)
    return {"columns": answer.columns, "rows": answer.rows}


def _show(store: str, sql: str) -> None:
    from flows.console import print_table
    from tasks.query import ask

    answer = ask(store, sql, MOST_ROWS)
    numbers = [
        column
        for place, column in enumerate(answer.columns)
        if answer.rows and all(type(row[place]) in (int, float, type(None)) for row in answer.rows)
    ]
    print_table(answer.columns, answer.rows, right=numbers, cell=LONGEST_CELL)
    more = f"; the first {MOST_ROWS} are shown, --format csv gives all" if answer.total > MOST_ROWS else ""
    print(f"{answer.total:,} {'row' if answer.total == 1 else 'rows'}{more}")


def _print(store: str, sql: str, form: Literal["csv", "json", "parquet"]) -> None:
    from tasks.query import export

    with tempfile.TemporaryDirectory(prefix="pixelmill-query-") as folder:
        file = Path(folder, "rows")
        export(store, sql, form, file)
        with file.open("rb") as rows:
            sys.stdout.flush()
            shutil.copyfileobj(rows, sys.stdout.buffer)
