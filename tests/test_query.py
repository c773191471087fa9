"""SQL over a store: what each view holds, on local disk and on S3."""

import csv
import io
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.__main__ import main
from models.errors import NotFound, StorageError, UsageError
from models.records import LISTING_SCHEMA, Task, part_schema
from tasks import inventory, views
from tasks.plan import claim
from tasks.query import ask, export
from tasks.table import Shard, Table
from tests.conftest import SECRET

OLD, NEW = "net@0000000000aa", "net@0000000000bb"


def row(image: str, fingerprint: str = "1-1", status: str = "ok", attempt: int = 1, **result: Any) -> dict[str, Any]:
    """One row of a part."""
    return {
        "image": image,
        "fingerprint": fingerprint,
        "bytes": 1,
        "width": 640,
        "height": 480,
        "status": status,
        "predicted_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "attempt": attempt,
        **result,
    }


def labels(*names: str) -> list[dict[str, Any]]:
    return [{"label": name, "score": 0.5**place} for place, name in enumerate(names)]


def add(table: Table, rows: list[dict[str, Any]], model: str = OLD, shard_size: int = 100, commit: bool = True) -> int:
    """Plans these images and commits their rows; the number of the plan."""
    listing = [{key: each[key] for key in LISTING_SCHEMA.names} for each in rows]
    retry = any(each["attempt"] > 1 for each in rows)
    claimed = claim(
        table,
        iter([pa.RecordBatch.from_pylist(listing, schema=LISTING_SCHEMA)]),
        model=model,
        source="/photos",
        settings={},
        shard_size=shard_size,
        retry_unreadable=retry,
    )
    assert claimed.number is not None
    if commit:
        by_image = {each["image"]: each for each in rows}
        for shard in table.open_shards(model):
            if shard.plan == claimed.number:
                write(table, model, shard, by_image)
    return claimed.number


def write(table: Table, model: str, shard: Shard, by_image: dict[str, dict[str, Any]]) -> None:
    """The part of one shard."""
    images = table.shard_rows(shard).column("image").to_pylist()
    rows = pa.Table.from_pylist([by_image[image] for image in images], schema=part_schema(table.task))
    counts = {status: rows.column("status").to_pylist().count(status) for status in rows.column("status").to_pylist()}
    statistics = {
        "plan": shard.plan,
        "shard": shard.index,
        "model": model,
        "engine": "onnxruntime",
        "host": "mill",
        "by_status": counts,
        "stages": {"infer": 1.5},
        "seconds": 2.5,
    }
    assert table.commit(model, shard, rows, statistics)


def classified(root: str, name: str = "holiday") -> Table:
    table = Table(root, name)
    table.define(Task.CLASSIFY, {})
    return table


@pytest.fixture
def holiday(root) -> str:
    """A store with a table of three images: one changed, one tried again, and all of them by two models."""
    table = classified(root)
    add(table, [row("/a"), row("/b", status="unreadable"), row("/c", labels=labels("cat", "dog"))], shard_size=2)
    add(table, [row("/a", "2-2", labels=labels("cow"))])
    add(table, [row("/b", attempt=2, labels=labels("owl"))])
    add(table, [row("/a", "2-2", labels=labels("bull")), row("/b", labels=labels("owl"))], model=NEW)
    return root


def rows(store: str, sql: str) -> list[tuple[Any, ...]]:
    return ask(store, sql).rows


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        pytest.param("select count(*) from holiday_all", [(7,)], id="every row"),
        pytest.param(
            f"select image, fingerprint, attempt, status from holiday where model = '{OLD}' order by image",
            [("/a", "2-2", 1, "ok"), ("/b", "1-1", 2, "ok"), ("/c", "1-1", 1, "ok")],
            id="newest row per image",
        ),
        pytest.param("select model, count(*) from holiday group by 1 order by 1", [(OLD, 3), (NEW, 2)], id="by model"),
        pytest.param(
            f"select image, rank, label, score from holiday_labels where model = '{OLD}' order by all",
            [("/a", 1, "cow", 1.0), ("/b", 1, "owl", 1.0), ("/c", 1, "cat", 1.0), ("/c", 2, "dog", 0.5)],
            id="one row per label",
        ),
        pytest.param(
            "select plan, model, source, images, shards, open_shards from runs order by plan",
            [
                (1, OLD, "/photos", 3, 2, 0),
                (2, OLD, "/photos", 1, 1, 0),
                (3, OLD, "/photos", 1, 1, 0),
                (4, NEW, "/photos", 2, 1, 0),
            ],
            id="runs",
        ),
        pytest.param(
            "select model, plan, shard, by_status['unreadable'], stages['infer'], seconds, engine, host from shards "
            "where \"table\" = 'holiday' order by plan, shard limit 2",
            [(OLD, 1, 0, 1, 1.5, 2.5, "onnxruntime", "mill"), (OLD, 1, 1, None, 1.5, 2.5, "onnxruntime", "mill")],
            id="shards",
        ),
        pytest.param("select count(*) from models", [(0,)], id="models"),
        pytest.param("SELECT COUNT(*) FROM Holiday", [(5,)], id="names in any case"),
        pytest.param(
            "select count(*) from holiday join holiday_all using (image, model) join holiday_labels using (image)",
            [(14,)],
            id="several views",
        ),
        pytest.param("create table t as select 1 as x; select x + 1 from t", [(2,)], id="several statements"),
        pytest.param("select predicted_at from holiday limit 1", [("2026-01-02T03:04:05+00:00",)], id="time in UTC"),
    ],
)
def test_views(holiday, sql, expected):
    assert rows(holiday, sql) == expected


def test_newest_is_what_the_later_plan_saw_even_when_its_part_came_first(root):
    table = classified(root)
    add(table, [row("/a", "1-1")], commit=False)
    add(table, [row("/a", "2-2")])
    late = row("/a", "1-1", status="missing") | {"predicted_at": datetime(2027, 1, 1, tzinfo=UTC)}
    write(table, OLD, table.open_shards(OLD)[0], {"/a": late})
    assert rows(root, "select fingerprint, status from holiday") == [("2-2", "ok")]


def test_objects(root):
    table = Table(root, "street")
    table.define(Task.DETECT, {})
    box = {"label": "car", "score": 0.75, "x_min": 1.0, "y_min": 2.0, "x_max": 3.0, "y_max": 4.5}
    add(table, [row("/a", objects=[box, box | {"label": "bus"}]), row("/b", objects=[]), row("/c", status="corrupt")])
    sql = "select image, rank, label, score, x_min, y_max, width from street_objects order by rank"
    assert rows(root, sql) == [("/a", 1, "car", 0.75, 1.0, 4.5, 640), ("/a", 2, "bus", 0.75, 1.0, 4.5, 640)]
    with pytest.raises(NotFound, match="street_labels"):
        ask(root, "from street_labels")


def test_a_table_without_parts_is_empty_with_its_columns(root):
    table = classified(root)
    for commit in (False, None):
        if commit is False:
            add(table, [row("/a")], commit=False)
        for view in ("holiday", "holiday_all"):
            answer = ask(root, f"from {view}")
            assert (answer.columns, answer.rows) == ([*part_schema(Task.CLASSIFY).names, "model"], [])
        assert ask(root, "from holiday_labels").columns[-2:] == ["label", "score"]


def test_models_of_the_store(tmp_path):
    from tests.tiny_models import publish_classifier, publish_detector

    store = str(tmp_path / "mill")
    publish_classifier(store, tmp_path)
    publish_detector(store, tmp_path)
    sql = "select name, model, task, len(labels), bytes > 1000, created_at > '2026' from models order by name"
    assert rows(store, sql) == [
        ("tiny", "tiny@000000000000", "classify", 5, True, True),
        ("tiny_detector", "tiny_detector@dddddddddddd", "detect", 5, False, True),
    ]


@pytest.mark.parametrize("folder", ["it's", "[1] *?", "x=1", "100% ☕"])
def test_a_store_in_an_odd_folder(tmp_path, folder):
    store = str(tmp_path / folder)
    add(classified(store), [row("/a", labels=labels("cat"))])
    add(classified(store), [row("/b")])
    assert rows(store, "select image, model from holiday order by image") == [("/a", OLD), ("/b", OLD)]
    assert len(ask(store, "from holiday").columns) == len(part_schema(Task.CLASSIFY)) + 1
    assert rows(store, 'select "table", count(*) from shards group by 1') == [("holiday", 2)]


def test_a_table_of_its_own_name_comes_first(tmp_path):
    store = str(tmp_path)
    add(classified(store), [row("/a", labels=labels("cat"))])
    add(classified(store, "holiday_labels"), [row("/x")])
    add(classified(store, "models"), [row("/y")])
    assert rows(store, "select image from holiday_labels union all select image from models") == [("/x",), ("/y",)]


def test_names_that_differ_by_case_alone(tmp_path):
    store = str(tmp_path)
    add(classified(store, "holiday"), [row("/small")])
    add(classified(store, "Holiday"), [row("/large")])
    assert rows(store, "select image from holiday") == [("/small",)]
    assert rows(store, "select image from Holiday_all") == [("/large",)]
    for sql in ("from HOLIDAY", "from holiday join Holiday using (model)"):
        with pytest.raises(UsageError, match=r"(H|h)oliday could be .*oliday, and SQL cannot tell"):
            rows(store, sql)


def test_only_what_the_sql_names_is_read(tmp_path, monkeypatch):
    store = str(tmp_path)
    for name in ("holiday", "other"):
        add(classified(store, name), [row("/a")])
    opened = []

    class Watched(Table):
        def __init__(self, store, name, storage=None):
            opened.append(name)
            super().__init__(store, name, storage)

    monkeypatch.setattr(views, "Table", Watched)
    ask(store, "select 1")
    assert opened == []
    ask(store, "from holiday")
    assert set(opened) == {"holiday"}


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        pytest.param(
            "from nowhere", "no table or view 'nowhere' in .*; tables there: holiday; each table T", id="table"
        ),
        pytest.param("select nothing from holiday", 'Referenced column "nothing" not found', id="column"),
        pytest.param("selec 1", 'Parser Error: syntax error at or near "selec"', id="syntax"),
        pytest.param("select 1/'x'", "Could not convert string 'x'", id="conversion"),
        pytest.param("from 'gone.parquet'", "No files found", id="file"),
        pytest.param("", "no SQL", id="nothing"),
        pytest.param("-- a comment", "no SQL", id="a comment"),
    ],
)
def test_a_mistake_in_sql_is_one_line(tmp_path, sql, message):
    add(classified(str(tmp_path)), [row("/a")])
    with pytest.raises(UsageError, match=message) as caught:
        ask(str(tmp_path), sql)
    assert "\n" not in str(caught.value)


def test_the_store_is_not_written(holiday):
    def files() -> list[str]:
        found = views.open_storage(holiday).walk(
            holiday, recursive=True, ignore=lambda name, is_folder: None, ignored={}
        )
        return sorted(f"{file.uri} {file.fingerprint}" for file in found)

    before = files()
    ask(holiday, "create table x as from holiday; insert into x from holiday; from x")
    with pytest.raises(UsageError):
        ask(holiday, "insert into holiday from holiday")
    assert files() == before


def test_nothing_is_left_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask(str(tmp_path / "mill"), "set memory_limit = '50MB'; select count(distinct range) from range(3000000)")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_export(tmp_path, form):
    store, file = str(tmp_path / "mill"), tmp_path / "rows"
    add(classified(store), [row("/a,b\n☕", labels=labels("cat", 'a "dog"'))])
    export(store, "select image, labels, bytes from holiday; -- that is all", form, file)
    image = "/a,b\n☕"
    if form == "csv":
        [found] = csv.DictReader(io.StringIO(file.read_text()))
        assert (found["image"], found["bytes"]) == (image, "1")
        assert "cat" in found["labels"]
    elif form == "json":
        assert json.loads(file.read_text()) == [{"image": image, "labels": labels("cat", 'a "dog"'), "bytes": 1}]
    else:
        assert pq.read_table(file).to_pylist() == [{"image": image, "labels": labels("cat", 'a "dog"'), "bytes": 1}]


def test_export_needs_a_select(tmp_path):
    with pytest.raises(UsageError, match="writing csv needs a SELECT"):
        export(str(tmp_path), "create table x as select 1", "csv", tmp_path / "rows")


def test_values_that_json_has_not(tmp_path):
    sql = (
        "select 'nan'::float, 'inf'::double, 1.50::decimal(4,2), 'ab'::blob, date '2026-01-02', map {'a': 1}, "
        "{'t': timestamp '2026-01-02 03:04:05'}, 170141183460469231731687303715884105727::hugeint, interval 3 days"
    )
    [values] = rows(str(tmp_path), sql)
    assert values[:7] == (None, None, 1.5, "6162", "2026-01-02", {"a": 1}, {"t": "2026-01-02T03:04:05"})
    json.dumps(values, allow_nan=False)


def test_limit_and_total(tmp_path):
    answer = ask(str(tmp_path), "select range from range(10000)", limit=3)
    assert (answer.rows, answer.total) == ([(0,), (1,), (2,)], 10_000)


# --- the command


def test_what_people_see(holiday, capsys):
    sql = "select image, repeat('x', 100) as long, 1234567 as number from holiday_all order by image limit 1"
    assert main(["query", sql, "--store", holiday]) == 0
    out = capsys.readouterr().out
    assert "1,234,567 │" in out
    assert "x" * 59 + "…" in out
    assert out.endswith("1 row\n")


def test_many_rows_are_cut_for_people_and_counted(tmp_path, capsys):
    assert main(["query", "select range as n from range(2500)", "--store", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "│ 99 │" in out
    assert "│ 100" not in out
    assert out.endswith("2,500 rows; the first 100 are shown, --format csv gives all\n")


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.parquet"])
def test_out_is_written_whole_or_not_at_all(tmp_path, capsys, name):
    out = tmp_path / "out" / name
    out.parent.mkdir()
    out.write_text("what was there")
    arguments = ["--store", str(tmp_path / "mill"), "--out", str(out)]
    assert main(["query", "select 1 as n from range(100000) where 1 / (range - 99999) is null", *arguments]) == 0
    assert out.read_text(errors="replace") != "what was there"
    out.write_text("what was there")
    assert main(["query", "select error('stop') from range(100000) where range > 99998", *arguments]) == 2
    assert out.read_text() == "what was there"
    assert os.listdir(out.parent) == [name]


def test_csv_to_stdout(tmp_path, capfdbinary):
    assert main(["query", "select 'é' as x", "--format", "csv", "--store", str(tmp_path)]) == 0
    assert capfdbinary.readouterr().out == "x\né\n".encode()


# --- S3


def test_secrets_are_in_no_answer_and_no_error(bucket):
    store = f"s3://{bucket}/mill"
    add(classified(store), [row("/a")])
    said = str(rows(store, "from duckdb_secrets()"))
    with pytest.raises(UsageError) as refused:
        ask(store, f"from holiday, 's3://{bucket}/other/*.parquet'")
    with pytest.raises(UsageError) as wrong:
        ask(store, "from duckdb_secrets(redact := false)")
    for text in (said, str(refused.value), str(wrong.value)):
        assert SECRET not in text


def test_a_storage_that_is_away_is_a_storage_error(aws_environment, tmp_path):
    aws_environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="Could not connect to server") as refused:
        ask(str(tmp_path), "set http_retries = 0; from 's3://bucket/x.parquet'")
    assert SECRET not in str(refused.value)


def test_a_local_store_and_sql_over_a_bucket(bucket, tmp_path):
    add(classified(f"s3://{bucket}/mill"), [row("/a")])
    sql = f"select image from read_parquet('s3://{bucket}/mill/tables/holiday/parts/**/*.parquet')"
    assert rows(str(tmp_path), sql) == [("/a",)]


# --- inventory


def test_inventory(holiday, tmp_path):
    table = classified(holiday)
    add(table, [row("/d"), row("/e")], shard_size=1, commit=False)
    add(classified(holiday, "empty"), [row("/x")], commit=False)
    found = {entry.name: entry for entry in inventory.list_tables(holiday)}
    assert [(name, t.images, t.plans, t.open_shards, t.models) for name, t in found.items()] == [
        ("empty", 1, 1, 1, [OLD]),
        ("holiday", 9, 5, 2, [OLD, NEW]),
    ]
    assert found["holiday"].bytes > found["empty"].bytes > 0
    assert found["holiday"].task == "classify"
    assert found["holiday"].created_at[:4] == str(datetime.now(UTC).year)
    assert inventory.list_models(holiday) == []
    assert inventory.list_datasets(holiday) == []


def test_aliases_are_listed(tmp_path):
    from tests.tiny_models import publish_classifier

    store = str(tmp_path / "mill")
    card = publish_classifier(store, tmp_path)
    (Path(store) / "models" / "tiny" / "aliases.json").write_text(json.dumps({"production": card.version}))
    assert [(model.version, model.aliases) for model in inventory.list_models(store)] == [
        (card.version, ["production"])
    ]
