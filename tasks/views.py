"""The views that SQL finds in a store. Only those that the query could name are made: a store may hold many tables.

T            the newest row per image and model
T_all        every row; an image that changed, or was tried again, has several
T_labels     one row per label of T, T_objects one row per object, T_segments one row per class found
D_images     the images of the newest version of the data set D; D_annotations, D_rejects likewise
models       one row per version of a model
datasets     one row per version of a data set
runs         one row per plan of any table: who claimed what, and what is still open
shards       one row per part of any table: who computed it, how fast, with which counts
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

import duckdb
import pyarrow as pa

from models.dataset import ANNOTATIONS_FILE, IMAGES_FILE, REJECTS_FILE
from models.errors import UsageError
from models.records import RESULT_FIELDS, part_schema
from tasks import registry
from tasks.datasets import datasets
from tasks.storage import join, local_path, open_storage
from tasks.table import Table

# The views of a data set, by the suffix of their names.
OF_DATASET = {"images": IMAGES_FILE, "annotations": ANNOTATIONS_FILE, "rejects": REJECTS_FILE}

# The columns that hold findings, lists of structs; each is unrolled by the view of that suffix.
FINDINGS = list(
    dict.fromkeys(
        field.name
        for fields in RESULT_FIELDS.values()
        for field in fields
        if pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type)
    )
)

MODELS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("name", "version", "model", "task", "architecture", "precision")),
        ("labels", pa.list_(pa.string())),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("bytes", pa.int64()),
        ("created_at", pa.string()),
    ]
)
DATASETS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("name", "version", "dataset", "format")),
        ("classes", pa.list_(pa.string())),
        *((name, pa.int64()) for name in ("images", "annotations", "rejected", "train", "val", "test", "bytes")),
        ("source", pa.string()),
        ("created_at", pa.string()),
    ]
)
RUNS_SCHEMA = pa.schema(
    [
        ("table", pa.string()),
        ("plan", pa.int64()),
        ("model", pa.string()),
        ("source", pa.string()),
        ("images", pa.int64()),
        ("shards", pa.int64()),
        ("open_shards", pa.int64()),
        ("created_at", pa.string()),
    ]
)

Make = Callable[[duckdb.DuckDBPyConnection, str], None]


@dataclass(frozen=True)
class Part:
    """One file of a table."""

    plan: int
    path: str  # as DuckDB reads it, glob characters escaped


class Views:
    """What SQL can name in one store."""

    def __init__(self, store: str):
        """`store` as `normalise` writes it. Asks it for the names of its tables and data sets, nothing else."""
        self.store = store
        self.tables = open_storage(store).names(join(store, "tables"))
        self.datasets = datasets.dataset_names(store)
        self.of_store: dict[str, Make] = {
            "models": self._models,
            "datasets": self._datasets,
            "runs": self._runs,
            "shards": self._shards,
        }
        self._makers = dict(self.of_store)
        by_name: dict[str, list[str]] = {}
        for dataset in self.datasets:
            by_name.setdefault(sql_name(dataset), []).append(dataset)
        for name, alike in by_name.items():
            for suffix, file in OF_DATASET.items():
                if name in alike or len(alike) == 1:  # its own name comes first
                    make = partial(self._of_dataset, name if name in alike else alike[0], file)
                else:
                    make = partial(_ambiguous, [f"the data set {dataset}" for dataset in sorted(alike)])
                self._makers[f"{name}_{suffix}"] = make
        for table in self.tables:
            for column in FINDINGS:
                self._makers[f"{table}_{column}"] = partial(self._findings, table, column)
            self._makers[f"{table}_all"] = partial(self._all, table)
        for table in self.tables:  # a table of its own name hides what another table would offer under it
            self._makers[table] = partial(self._newest, table)

    def create(self, connection: duckdb.DuckDBPyConnection, sql: str) -> None:
        """Makes the views whose names stand in the SQL, anywhere. Raises UsageError where one could be several.

        SQL knows no case: of names that differ by it alone, the one that is written just so is meant.
        """
        words = set(re.findall(r"\w+", sql))
        lowered = {word.lower() for word in words}
        wanted: dict[str, list[str]] = {}
        for name in self._makers:
            if name.lower() in lowered:
                wanted.setdefault(name.lower(), []).append(name)
        for names in wanted.values():
            meant = [name for name in names if name in words] if len(names) > 1 else names
            if len(meant) != 1:
                _ambiguous(names, connection, (meant or names)[0])
            self._makers[meant[0]](connection, meant[0])

    def rows(self, connection: duckdb.DuckDBPyConnection, table: str) -> tuple[str, bool]:
        """A query for all rows with `model` and `plan`, and whether an image may occur twice for a model."""
        files = Table(self.store, table)
        schema = part_schema(files.task)
        parts = {model: list(self._parts(files, model)) for model in files.models()}
        selects = []
        for model, of_model in parts.items():
            paths = ", ".join(quoted(part.path) for part in of_model)
            if of_model:
                plan = r"CAST(regexp_extract(filename, '(\d+)-\d+\.parquet$', 1) AS INTEGER)"
                columns = ", ".join(schema.names)
                rows = f"read_parquet([{paths}], hive_partitioning = false)"
                selects.append(f"SELECT {columns}, {quoted(unquote(model))} AS model, {plan} AS plan FROM {rows}")
        if not selects:
            none = f"{table} without rows"
            connection.register(none, schema.append(pa.field("model", pa.string())).empty_table())
            selects.append(f'SELECT *, 0 AS plan FROM "{none}"')
        is_repeated = any(len({part.plan for part in of_model}) > 1 for of_model in parts.values())
        return " UNION ALL ".join(selects), is_repeated

    def _parts(self, table: Table, model: str) -> Iterator[Part]:
        for name in sorted(table.part_names(model)):
            path = _path(join(table.uri, "parts", f"model={model}", name))
            yield Part(int(name.partition("-")[0]), path)

    def _all(self, table: str, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        rows, _ = self.rows(connection, table)
        connection.execute(f'CREATE VIEW "{name}" AS SELECT * EXCLUDE (plan) FROM ({rows})')

    def _newest(self, table: str, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        connection.execute(f'CREATE VIEW "{name}" AS {self._newest_rows(connection, table)}')

    def _newest_rows(self, connection: duckdb.DuckDBPyConnection, table: str) -> str:
        rows, is_repeated = self.rows(connection, table)
        # The later plan saw the newer version; the time of prediction says less, an old shard may be computed last.
        newest = "QUALIFY row_number() OVER (PARTITION BY image, model ORDER BY plan DESC) = 1" if is_repeated else ""
        return f"SELECT * EXCLUDE (plan) FROM (SELECT * FROM ({rows}) {newest})"

    def _findings(self, table: str, column: str, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        if column not in part_schema(Table(self.store, table).task).names:
            return
        rows = self._newest_rows(connection, table)
        connection.execute(
            f'CREATE VIEW "{name}" AS SELECT image, model, width, height, generate_subscripts({column}, 1) AS rank, '
            f"unnest({column}, recursive := true) FROM ({rows})"
        )

    def _of_dataset(self, dataset: str, file: str, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        versions = datasets.list_datasets(self.store, dataset)
        if versions:
            path = _path(datasets.file_uri(self.store, versions[-1], file))
            connection.execute(f'CREATE VIEW "{name}" AS SELECT * FROM read_parquet({quoted(path)})')

    def _datasets(self, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        rows = [
            {
                "name": dataset.name,
                "version": dataset.version,
                "dataset": dataset.reference,
                "format": dataset.format,
                "classes": list(dataset.classes),
                "images": dataset.images,
                "annotations": dataset.annotations,
                "rejected": dataset.rejected,
                **{split: dataset.splits.get(split, 0) for split in ("train", "val", "test")},
                "bytes": sum(file["bytes"] for file in dataset.files.values()),
                "source": dataset.source,
                "created_at": dataset.created_at,
            }
            for dataset in datasets.list_datasets(self.store)
        ]
        connection.register(name, pa.Table.from_pylist(rows, schema=DATASETS_SCHEMA))

    def _models(self, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        cards = [
            {
                "name": card.name,
                "version": card.version,
                "model": card.reference,
                "task": str(card.task),
                "architecture": card.architecture,
                "precision": card.precision,
                "labels": list(card.labels),
                "source": card.source,
                "licence": card.licence,
                "bytes": sum(file["bytes"] for file in card.files.values()),
                "created_at": card.created_at,
            }
            for card in registry.list_models(self.store)
        ]
        connection.register(name, pa.Table.from_pylist(cards, schema=MODELS_SCHEMA))

    def _runs(self, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        runs = []
        for table in (Table(self.store, table) for table in self.tables):
            heads = table.heads()
            done = {model: table.part_names(model) for model in {head.model for head in heads}}
            runs += [
                {
                    "table": table.name,
                    "plan": head.number,
                    "model": head.model,
                    "source": head.source,
                    "images": sum(shard.images for shard in head.shards),
                    "shards": len(head.shards),
                    "open_shards": sum(shard.file_name not in done[head.model] for shard in head.shards),
                    "created_at": head.created_at,
                }
                for head in heads
            ]
        connection.register(name, pa.Table.from_pylist(runs, schema=RUNS_SCHEMA))

    def _shards(self, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        paths = [
            part.path
            for table in (Table(self.store, table) for table in self.tables)
            for model in table.models()
            for part in self._parts(table, model)
        ]
        connection.execute("CREATE TABLE part_statistics (file VARCHAR, statistics JSON)")
        if paths:
            files = ", ".join(map(quoted, paths))
            connection.execute(
                "INSERT INTO part_statistics SELECT file_name, decode(value)::JSON "
                f"FROM parquet_kv_metadata([{files}]) WHERE decode(key) = 'pixelmill'"
            )
        connection.execute(
            f"""CREATE VIEW "{name}" AS SELECT
                regexp_extract(file, 'tables/([^/]+)/parts/[^/]+/[^/]+$', 1) AS "table",
                statistics->>'model' AS model,
                CAST(statistics->>'plan' AS BIGINT) AS plan,
                CAST(statistics->>'shard' AS BIGINT) AS shard,
                statistics->>'engine' AS engine,
                statistics->>'host' AS host,
                CAST(statistics->>'seconds' AS DOUBLE) AS seconds,
                CAST(statistics->'by_status' AS MAP(VARCHAR, BIGINT)) AS by_status,
                CAST(statistics->'stages' AS MAP(VARCHAR, DOUBLE)) AS stages
            FROM part_statistics"""
        )


def sql_name(dataset: str) -> str:
    """The name of a data set as SQL can have it unquoted."""
    return re.sub(r"\W", "_", dataset)


def _ambiguous(meanings: list[str], connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """The maker of a view that SQL could not tell from another one."""
    raise UsageError(f"{name} could be {' or '.join(meanings)}, and SQL cannot tell: give all but one another name")


def _path(uri: str) -> str:
    """As DuckDB reads it: glob characters escaped."""
    return re.sub(r"([*?\[])", r"[\1]", uri if uri.startswith("s3://") else local_path(uri))


def quoted(text: str) -> str:
    """An SQL string literal."""
    return "'" + text.replace("'", "''") + "'"
