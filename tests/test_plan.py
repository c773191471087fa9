"""What a run claims, given what is listed and what earlier plans claim already."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protocol_rounds import in_time

from models.errors import StorageError, TableMismatch, TransientError
from models.records import LISTING_SCHEMA, Task, part_schema
from tasks.plan import Claim, claim, default_shard_size
from tasks.storage_local import LocalStorage
from tasks.table import Shard, Table

SETTINGS = {"top_k": 5}
MODEL, OTHER = "fake@aaaaaaaaaaaa", "fake@bbbbbbbbbbbb"
Image = tuple[str, str]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(str(tmp_path), "t", LocalStorage())
    table.define(Task.CLASSIFY, SETTINGS)
    return table


def batches(images: list[Image]) -> Iterator[pa.RecordBatch]:
    """A listing in batches of two, of images given as name and fingerprint."""
    for start in range(0, len(images), 2):
        rows = [(name, version, 10) for name, version in images[start : start + 2]]
        yield pa.RecordBatch.from_arrays(
            [pa.array(column) for column in zip(*rows, strict=True)], schema=LISTING_SCHEMA
        )


def images(names: str, version: str = "1") -> list[Image]:
    return [(name, version) for name in names]


def claim_of(table: Table, listed: list[Image], **options: Any) -> Claim:
    model = options.pop("model", MODEL)
    return in_time(lambda: claim(table, batches(listed), model=model, source="/photos", settings=SETTINGS, **options))


def plan_rows(table: Table, number: int) -> list[tuple[str, str, int]]:
    columns = ["image", "fingerprint", "attempt"]
    return [
        (row["image"], row["fingerprint"], row["attempt"])
        for batch in table.plan_batches([number], columns)
        for row in batch.to_pylist()
    ]


def names_of(table: Table, number: int | None) -> str:
    return "".join(name for name, _, _ in plan_rows(table, number)) if number else ""


def commit(table: Table, shard: Shard, status: dict[str, str], model: str = MODEL) -> None:
    """Publishes a part in which each image has the status given, or ok."""
    claimed = table.shard_rows(shard)
    columns = {name: claimed.column(name) for name in ("image", "fingerprint", "attempt")}
    columns["status"] = pa.array([status.get(name, "ok") for name in claimed.column("image").to_pylist()])
    schema = part_schema(Task.CLASSIFY)
    nothing = {name: pa.nulls(claimed.num_rows, schema.field(name).type) for name in schema.names}
    assert table.commit(model, shard, pa.table(nothing | columns, schema=schema), {})


@pytest.mark.parametrize(
    ("before", "listed", "options", "expected", "claimed"),
    [
        pytest.param("", [], {}, Claim(None, 0, 0, 0), "", id="empty listing"),
        pytest.param("", images("cab"), {}, Claim(1, 3, 3, 3), "abc", id="first run"),
        pytest.param("", images("abab"), {}, Claim(1, 2, 2, 2), "ab", id="listed twice"),
        pytest.param("abc", images("abc"), {}, Claim(None, 3, 0, 0), "", id="all claimed already"),
        pytest.param("abc", [], {}, Claim(None, 0, 0, 0), "", id="all images gone"),
        pytest.param("ab", images("abcd"), {}, Claim(2, 4, 2, 2), "cd", id="some claimed already"),
        pytest.param("ab", images("a") + images("b", "2"), {}, Claim(2, 2, 1, 1), "b", id="changed image"),
        pytest.param("", images("a") + images("a", "2"), {}, Claim(1, 2, 2, 2), "aa", id="changed while listed"),
        pytest.param("ab", images("ab"), {"model": OTHER}, Claim(2, 2, 2, 2), "ab", id="another model"),
        pytest.param("", images("dcba"), {"limit": 3}, Claim(1, 4, 4, 3), "abc", id="limit"),
        pytest.param("ab", images("abcd"), {"limit": 1}, Claim(2, 4, 2, 1), "c", id="limit counts new images"),
        pytest.param("", images("ab"), {"limit": 9}, Claim(1, 2, 2, 2), "ab", id="limit beyond the listing"),
        pytest.param("ab", images("abc"), {"retry_unreadable": True}, Claim(2, 3, 1, 1), "c", id="open is no failure"),
        pytest.param("", [("é\n'\"", "")], {}, Claim(1, 1, 1, 1), "é\n'\"", id="odd name, no fingerprint"),
    ],
)
def test_claim(
    table: Table, before: str, listed: list[Image], options: dict[str, Any], expected: Claim, claimed: str
) -> None:
    if before:
        claim_of(table, images(before))
    assert claim_of(table, listed, **options) == expected
    assert names_of(table, expected.number) == claimed


@pytest.mark.parametrize("retry_unreadable", [False, True])
def test_claiming_again_writes_nothing(table: Table, retry_unreadable: bool) -> None:
    for name in "abc":
        claim_of(table, images(name))
    assert claim_of(table, images("abc"), retry_unreadable=retry_unreadable) == Claim(None, 3, 0, 0)
    assert table.plan_numbers() == [1, 2, 3]


@pytest.mark.parametrize(
    ("count", "shard_size", "sizes"),
    [
        pytest.param(1, 4, [1], id="less than one"),
        pytest.param(4, 4, [4], id="exactly one"),
        pytest.param(9, 4, [4, 4, 1], id="a short last one"),
        pytest.param(3, 1, [1, 1, 1], id="one image each"),
        pytest.param(3000, 2500, [2500, 500], id="more than one DuckDB vector"),
    ],
)
def test_shards(table: Table, count: int, shard_size: int, sizes: list[int]) -> None:
    listed = [(f"{number:05d}", "1") for number in range(count)]
    claim_of(table, listed[::-1], shard_size=shard_size)
    shards = table.open_shards(MODEL)
    assert shards == [Shard(1, index, size) for index, size in enumerate(sizes)]
    in_order = [row for shard in shards for row in table.shard_rows(shard).column("image").to_pylist()]
    assert in_order == [name for name, _ in listed]


@pytest.mark.parametrize(
    ("num_images", "shard_size"),
    [
        (1, 64),
        (64, 64),
        (1_000, 125),
        (8_191, 1_023),
        (8_192, 1_024),
        (10**6, 1_024),
        (2 * 10**6, 1_953),
        (10**7, 4_096),
        (10**8, 4_096),
    ],
)
def test_default_shard_size(num_images: int, shard_size: int) -> None:
    assert default_shard_size(num_images) == shard_size


def test_head_tells_where_a_plan_comes_from(table: Table) -> None:
    claim_of(table, images("abc"), shard_size=2)
    claim_of(table, images("abc"), model=OTHER)
    (first, second) = table.heads()
    assert (first.number, first.model, first.source, first.shards) == (
        1,
        MODEL,
        "/photos",
        (Shard(1, 0, 2), Shard(1, 1, 1)),
    )
    assert table.heads(OTHER) == [second]


def test_retries(table: Table) -> None:
    """Unreadable and missing images are claimed again, one attempt at a time, until they are read."""
    listed = images("abcdef")
    claim_of(table, listed, shard_size=4)
    commit(table, Shard(1, 0, 4), {"a": "unreadable", "b": "missing", "c": "corrupt"})
    assert claim_of(table, listed) == Claim(None, 6, 0, 0)

    retry = claim_of(table, listed, retry_unreadable=True)
    assert (retry, plan_rows(table, 2)) == (Claim(2, 6, 0, 2), [("a", "1", 2), ("b", "1", 2)])
    assert claim_of(table, listed, retry_unreadable=True).number is None, "a retry that is open is not claimed again"

    commit(table, Shard(2, 0, 2), {"a": "unreadable"})
    commit(table, Shard(1, 1, 2), {"f": "unreadable"})
    retry = claim_of(table, images("acdefg") + images("b", "2"), retry_unreadable=True)
    assert retry == Claim(3, 7, 2, 4)
    assert plan_rows(table, 3) == [("a", "1", 3), ("b", "2", 1), ("f", "1", 2), ("g", "1", 1)]


def test_retries_concern_one_model(table: Table) -> None:
    claim_of(table, images("a"))
    commit(table, Shard(1, 0, 1), {"a": "unreadable"})
    claim_of(table, images("a"), model=OTHER)
    commit(table, Shard(2, 0, 1), {}, OTHER)
    assert claim_of(table, images("a"), model=OTHER, retry_unreadable=True).number is None
    assert claim_of(table, images("a"), retry_unreadable=True) == Claim(3, 1, 0, 1)


def test_new_images_come_before_retries_under_a_limit(table: Table) -> None:
    claim_of(table, images("ab"))
    commit(table, Shard(1, 0, 2), {"a": "unreadable", "b": "unreadable"})
    assert claim_of(table, images("abcd"), retry_unreadable=True, limit=3) == Claim(2, 4, 2, 3)
    assert plan_rows(table, 2) == [("a", "1", 2), ("c", "1", 1), ("d", "1", 1)]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        pytest.param(Task.DETECT, SETTINGS, "task classify, this model's task is detect: name another", id="task"),
        pytest.param(Task.CLASSIFY, {"top_k": 3}, "--top-k 5 there, 3 now", id="value"),
        pytest.param(Task.CLASSIFY, {}, "--top-k 5 there, None now", id="setting gone"),
        pytest.param(Task.CLASSIFY, {"top_k": 5, "max_pixels": 9}, "--max-pixels None there, 9 now", id="new setting"),
    ],
)
def test_another_table_is_needed(table: Table, task: Task, settings: dict[str, Any], message: str) -> None:
    again = Table(table.store, table.name, LocalStorage())
    with pytest.raises(TableMismatch, match=message) as raised:
        again.define(task, settings)
    assert "\n" not in str(raised.value)


def test_the_same_table_is_found_again(table: Table) -> None:
    again = Table(table.store, table.name, LocalStorage())
    again.define(Task.CLASSIFY, dict(SETTINGS))
    assert (again.task, again.definition) == (Task.CLASSIFY, table.definition)


class Overtaken(LocalStorage):
    """Lets other runs write their plans just before ours."""

    def __init__(self, others: list[list[Image]]):
        self.others = others

    def put_file_if_absent(self, uri: str, path: Path) -> bool:
        if self.others:
            claim_of(Table(uri.partition("/tables/")[0], "t", LocalStorage()), self.others.pop(0))
        return super().put_file_if_absent(uri, path)


@pytest.mark.parametrize(
    ("others", "expected", "claimed"),
    [
        pytest.param([images("bx")], Claim(2, 3, 2, 2), "ac", id="some"),
        pytest.param([images("abc")], Claim(None, 3, 0, 0), "", id="everything"),
        pytest.param([images("xy")], Claim(2, 3, 3, 3), "abc", id="nothing of ours"),
        pytest.param([images("a"), images("b"), images("z")], Claim(4, 3, 1, 1), "c", id="again and again"),
    ],
)
def test_the_winner_of_a_plan_race_is_subtracted(
    table: Table, others: list[list[Image]], expected: Claim, claimed: str
) -> None:
    ours = Table(table.store, table.name, Overtaken(list(others)))
    assert claim_of(ours, images("abc")) == expected
    assert names_of(table, expected.number) == claimed


def test_many_runs_at_once_claim_each_image_once(table: Table) -> None:
    names = [f"{number:03d}" for number in range(200)]
    start = threading.Barrier(6)

    def run(offset: int) -> None:
        start.wait()
        listed = [(name, "1") for name in names[offset : offset + 120]]
        claim_of(Table(table.store, table.name, LocalStorage()), listed)

    threads = [threading.Thread(target=run, args=(offset,), daemon=True) for offset in (0, 0, 40, 40, 80, 80)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    claimed = [row[0] for number in table.plan_numbers() for row in plan_rows(table, number)]
    assert sorted(claimed) == names


def test_a_long_listing_is_streamed(table: Table) -> None:
    """Of 10⁵ images no more than a few batches are in memory at a time, and the listing is consumed once."""
    pulled = most = 0
    before = pa.total_allocated_bytes()

    def long_listing() -> Iterator[pa.RecordBatch]:
        nonlocal pulled, most
        for start in range(0, 100_000, 200):
            numbers = [f"/photos/{number:06d}.jpg" for number in range(start, start + 200)]
            yield pa.RecordBatch.from_pydict(
                {"image": numbers, "fingerprint": ["1-1"] * 200, "bytes": [1] * 200}, schema=LISTING_SCHEMA
            )
            pulled += 200
            most = max(most, pa.total_allocated_bytes() - before)

    claimed = in_time(
        lambda: claim(table, long_listing(), model=MODEL, source="/photos", settings=SETTINGS), seconds=40
    )
    assert (claimed.planned, pulled) == (100_000, 100_000)
    assert most < 2 * 2**20, "all at once would be some 4 MB"
    assert len(table.open_shards(MODEL)) == 98


@pytest.mark.parametrize("error", [TransientError("no answer"), KeyboardInterrupt(), StorageError("refused")], ids=repr)
def test_an_error_while_listing_is_raised_as_it_is(table: Table, error: BaseException) -> None:
    def listing() -> Iterator[pa.RecordBatch]:
        yield from itertools.islice(batches(images("abcd")), 1)
        raise error

    with pytest.raises(type(error)) as raised:
        in_time(lambda: claim(table, listing(), model=MODEL, source="/photos", settings=SETTINGS))
    assert raised.value is error
    assert table.plan_numbers() == []


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: flip(path, 60), id="a flipped byte in a page"),
        pytest.param(lambda path: flip(path, -8), id="a wrong length of the footer"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-20]), id="cut short"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    ],
)
def test_a_damaged_plan_claims_nothing_silently(table: Table, damage: Any) -> None:
    claim_of(table, [(f"{number:04d}", str(number * 7919)) for number in range(500)])
    damage(Path(table.plan_uri(1)))
    with pytest.raises(StorageError, match=r"00000001\.parquet is damaged") as raised:
        claim_of(Table(table.store, "t", LocalStorage()), images("a"))
    assert "\n" not in str(raised.value)


def test_a_change_that_only_the_checksum_shows(table: Table) -> None:
    """Some flipped bits decompress to other names without complaint."""
    claim_of(table, [(f"{number:04d}", str(number * 7919)) for number in range(500)])
    path = Path(table.plan_uri(1))
    data, rows = path.read_bytes(), pq.read_table(path)
    for offset in range(100, len(data)):
        flip(path, offset)
        try:
            if not pq.read_table(path).equals(rows):
                break
        except (OSError, pa.ArrowException):
            pass
        path.write_bytes(data)
    else:
        pytest.fail("no such byte in this plan")
    with pytest.raises(StorageError, match=r"00000001\.parquet is damaged: .* checksum"):
        claim_of(table, images("a"))
