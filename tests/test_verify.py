"""`verify` finds what is wrong with a table, whatever it is, and reads on."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protocol_rounds import FIRST, SECOND, LocalWorld, card_of, predict

from models.errors import NotFound, StorageError
from tasks.table import Shard, Table, write_parquet
from tasks.verify import Verification, verify

MODEL = card_of(FIRST).reference


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two plans and six parts."""
    folder = tmp_path_factory.mktemp("finished")
    world = LocalWorld(folder / "source", folder / "store")
    world.fill(random.Random(1))
    predict(world)
    predict(world, version=SECOND)
    return folder / "store"


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def part(store: Path) -> Path:
    return store / "tables/t/parts" / f"model={MODEL}" / "00000001-00001.parquet"


def plan(store: Path, number: int = 1) -> Path:
    return store / f"tables/t/plans/{number:08d}.parquet"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The same file with other rows; its metadata is kept."""
    rows = pq.read_table(path, partitioning=None)
    path.write_bytes(write_parquet(change(rows).replace_schema_metadata(pq.read_metadata(path).metadata)))


def with_column(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        index = rows.schema.get_field_index(name)
        values = rows.column(name).to_pylist()
        column = pa.array([value, *values[1:]], rows.schema.field(name).type)
        return rows.set_column(index, rows.schema.field(name), column)

    return change


def foreign(path: Path) -> None:
    duckdb.sql(f"COPY (FROM read_parquet('{path}', hive_partitioning = false)) TO '{path}.new' (FORMAT parquet)")
    Path(f"{path}.new").replace(path)


def claimed_twice(store: Path) -> None:
    """A third plan with the claims of the first."""
    rows = pq.read_table(plan(store))
    metadata = pq.read_metadata(plan(store)).metadata
    plan(store, 3).write_bytes(write_parquet(rows.replace_schema_metadata(metadata)))
    source = part(store)
    table = Table(str(store), "t")
    claimed = [
        pq.read_table(source.with_name(f"00000001-{shard:05d}.parquet"), partitioning=None) for shard in range(3)
    ]
    merged = pa.concat_tables(claimed)
    statistics = {"by_status": {row["values"]: row["counts"] for row in merged["status"].value_counts().to_pylist()}}
    assert table.commit(MODEL, Shard(3, 0, 12), merged, statistics)


def test_nothing_is_wrong(store: Path) -> None:
    assert verify(str(store), "t") == Verification("t", plans=2, parts=6, rows=24, claims=24)


@pytest.mark.parametrize(
    ("damage", "problems", "parts"),
    [
        pytest.param(
            lambda store: part(store).unlink(), [r"1 of 3 shards of fake@a+ are open \(4 images"], 5, id="gone"
        ),
        pytest.param(lambda store: flip(part(store), 30), ["is damaged"], 5, id="flipped byte"),
        pytest.param(lambda store: part(store).write_bytes(b""), ["is damaged"], 5, id="empty part"),
        pytest.param(lambda store: foreign(part(store)), ["was not written by pixelmill"], 5, id="foreign part"),
        pytest.param(
            lambda store: rewrite(part(store), lambda rows: rows.slice(1)), ["3 rows for 4 claimed"], 6, id="row lost"
        ),
        pytest.param(
            lambda store: rewrite(part(store), with_column("image", "other.png")), ["column image"], 6, id="other image"
        ),
        pytest.param(
            lambda store: rewrite(part(store), with_column("fingerprint", "0")), ["fingerprint"], 6, id="other version"
        ),
        pytest.param(lambda store: rewrite(part(store), with_column("attempt", 2)), ["attempt"], 6, id="other attempt"),
        pytest.param(
            lambda store: rewrite(part(store), with_column("status", "fine")),
            ["unknown status", "statistics count"],
            6,
            id="other status",
        ),
        pytest.param(
            lambda store: rewrite(part(store), lambda rows: rows.drop(["sha256"])), ["its columns"], 6, id="column lost"
        ),
        pytest.param(
            lambda store: shutil.copy(part(store), part(store).with_name("00000009-00000.parquet")),
            ["belongs to no plan"],
            6,
            id="part without a plan",
        ),
        pytest.param(claimed_twice, ["is claimed 2 times"] * 3, 7, id="claimed twice"),
        pytest.param(
            lambda store: plan(store).unlink(), ["not numbered", *["belongs to no plan"] * 3], 3, id="plan gone"
        ),
    ],
)
def test_problems(store: Path, damage: Callable[[Path], None], problems: list[str], parts: int) -> None:
    damage(store)
    found = verify(str(store), "t")
    assert len(found.problems) == len(problems), found.problems
    for text, pattern in zip(found.problems, problems, strict=True):
        assert re.search(pattern, text)
        assert "\n" not in text
    assert found.parts == parts


@pytest.mark.parametrize(
    "damage",
    [lambda path: flip(path, -8), lambda path: path.write_bytes(b"PAR1"), foreign],
    ids=["bad", "cut", "foreign"],
)
def test_a_plan_that_cannot_be_read_is_named(store: Path, damage: Callable[[Path], None]) -> None:
    damage(plan(store))
    with pytest.raises(StorageError, match=r"plans/00000001\.parquet") as raised:
        verify(str(store), "t")
    assert "\n" not in str(raised.value)


def test_rows_of_a_plan_that_cannot_be_read_are_named(store: Path) -> None:
    flip(plan(store), 30)
    problems = verify(str(store), "t").problems
    assert problems
    assert all("00000001.parquet is damaged" in problem for problem in problems)


def test_unknown_table(store: Path) -> None:
    with pytest.raises(NotFound, match=r"no table 'other' in .*; tables there: t"):
        verify(str(store), "other")
