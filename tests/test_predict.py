"""Bulk prediction end to end: real files, a real slot process, a real ONNX model, a local store."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.errors import NotFound, TableMismatch, UsageError
from models.settings.predict import PredictSettings
from tasks import predict, slot_process
from tasks.storage import open_storage
from tasks.table import Table
from tasks.verify import verify
from tests.odd_images import odd_images
from tests.tiny_models import LABELS, publish_classifier, publish_detector

ROOT = Path(__file__).parent.parent
CHANGES_NOTHING = 1e-6  # of a score, between batch sizes: the order of sums in a convolution


class Mill:
    """A store with a tiny model, and a folder of photographs."""

    def __init__(self, folder: Path, store: str = ""):
        self.folder = folder
        self.store = store or str(folder / "mill")
        self.photos = folder / "photos"
        self.photos.mkdir()
        publish_classifier(self.store, folder)

    def add(self, count: int, first: int = 0) -> None:
        """Small JPEGs, each of another colour."""
        for number in range(first, first + count):
            pixels = np.random.default_rng(number).integers(0, 255, (5, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((70, 50)).save(self.photos / f"{number:04d}.jpg")

    def predict(self, table: str = "t", model: str = "tiny", **settings) -> predict.Summary:
        """Plan, work, summarise."""
        chosen = PredictSettings(source=str(self.photos), model=model, table=table, **settings)
        planned = predict.plan(self.store, chosen)
        reports = [predict.work(self.store, chosen, planned)] if planned.open_shards else []
        return predict.summarise(self.store, chosen, planned, reports, 1.0)

    def rows(self, table: str = "t") -> list[dict]:
        """All rows of all parts, by image and attempt, as any Parquet reader sees them."""
        parts = f"{self.store}/tables/{table}/parts/**/*.parquet"
        found = duckdb.sql(f"FROM read_parquet('{parts}', hive_partitioning = true) ORDER BY image, predicted_at")
        return found.to_arrow_table().to_pylist()

    def problems(self, table: str = "t") -> list[str]:
        return verify(self.store, table).problems

    def files(self) -> dict[str, int]:
        """Every file of the store with its time of change."""
        return {str(path): path.stat().st_mtime_ns for path in Path(self.store).rglob("*") if path.is_file()}


@pytest.fixture
def mill(tmp_path) -> Mill:
    return Mill(tmp_path)


def test_every_odd_file_is_one_row_or_counted_as_ignored(mill):
    expected = {}
    for number, odd in enumerate(odd_images()):
        path = mill.photos / f"{number:03d} {Path(odd.name).name}"
        path = path if path.suffix else path.with_suffix(".jpg")
        path.write_bytes(odd.data)
        expected[str(path)] = str(odd.status)
    readable = next(odd.data for odd in odd_images() if odd.status == "ok")
    for name in ("with\nnewline.jpg", "emoji 🎞.jpg", "a::b.jpg", "[1].jpg", "%41.jpg"):
        (mill.photos / name).write_bytes(readable)
        expected[str(mill.photos / name)] = "ok"
    not_utf8 = os.fsencode(mill.photos) + b"/\xff.jpg"
    Path(os.fsdecode(not_utf8)).write_bytes(readable)
    expected["file://" + str(mill.photos) + "/%FF.jpg"] = "ok"
    (mill.photos / ".hidden.jpg").write_bytes(readable)
    (mill.photos / "loop").symlink_to(mill.photos)
    (mill.photos / "notes.txt").write_text("no image")
    os.mkfifo(mill.photos / "fifo.jpg")

    summary = mill.predict()

    rows = mill.rows()
    assert {row["image"]: row["status"] for row in rows} == expected
    assert len(rows) == len(expected) == summary.listed == summary.rows
    assert summary.ignored == {"hidden": 1, "link": 1, "special": 1, "other": 1}
    assert all((row["labels"] is None) == (row["status"] != "ok") for row in rows)
    assert all(bool(row["error"]) == (row["status"] != "ok") for row in rows)
    assert all(row["width"] and row["height"] for row in rows if row["status"] == "ok")
    assert mill.problems() == []


def test_a_completed_run_repeated_writes_nothing(mill):
    mill.add(10)
    assert mill.predict().rows == 10
    before = mill.files()
    again = mill.predict()
    assert (again.rows, again.planned, again.skipped, again.shards) == (0, 0, 10, 0)
    assert mill.files() == before


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_answers_do_not_depend_on_the_batch_size(mill, batch_size):
    mill.add(40)
    mill.predict("reference", batch_size=8)
    mill.predict("other", batch_size=batch_size)
    for one, other in zip(mill.rows("reference"), mill.rows("other"), strict=True):
        assert [label["label"] for label in one["labels"]] == [label["label"] for label in other["labels"]]
        scores = [[label["score"] for label in row["labels"]] for row in (one, other)]
        assert np.abs(np.subtract(*scores)).max() <= CHANGES_NOTHING


def test_labels_are_the_best_first_and_a_table_keeps_top_k(mill):
    mill.add(3)
    mill.predict(top_k=2)
    for row in mill.rows():
        labels = row["labels"]
        assert len(labels) == 2
        assert labels[0]["score"] >= labels[1]["score"]
        assert {label["label"] for label in labels} <= set(LABELS)
    with pytest.raises(TableMismatch, match=r"--top-k 2 there, 5 now"):
        mill.predict()


def test_boxes_are_in_pixels_of_the_oriented_original(mill):
    publish_detector(mill.store, mill.folder)
    turned = Image.Exif()
    turned[274] = 6  # stored lying, shown upright
    Image.new("RGB", (64, 32), "white").save(mill.photos / "light.jpg")
    Image.new("RGB", (64, 32), "white").save(mill.photos / "turned.jpg", exif=turned)
    Image.new("RGB", (64, 32), "black").save(mill.photos / "dark.jpg")
    mill.predict(model="tiny_detector")
    rows = {Path(row["image"]).stem: row for row in mill.rows()}
    assert rows["dark"]["objects"] == []
    assert rows["dark"]["status"] == "ok"
    (found,) = rows["light"]["objects"]
    # 64×32 is scaled by half into 32×32, so boxes come back doubled.
    assert (found["x_min"], found["y_min"], found["x_max"], found["y_max"]) == (16, 8, 48, 24)
    assert found["label"] == "light"
    assert (rows["turned"]["width"], rows["turned"]["height"]) == (32, 64)


def test_a_low_score_is_dropped_and_only_detectors_have_a_threshold(mill):
    publish_detector(mill.store, mill.folder)
    Image.new("RGB", (32, 32), (200, 200, 200)).save(mill.photos / "light.png")
    mill.predict(model="tiny_detector", score=0.9)
    assert mill.rows()[0]["objects"] == []
    with pytest.raises(TableMismatch, match=r"--score 0.9 there"):
        mill.predict(model="tiny_detector")
    with pytest.raises(TableMismatch, match="task detect, this model's task is classify"):
        mill.predict(model="tiny")
    with pytest.raises(UsageError, match="--score does not apply"):
        mill.predict("other", model="tiny", score=0.5)


def test_a_refused_run_makes_no_table(mill):
    """Else its settings would be the table's for ever."""
    publish_detector(mill.store, mill.folder, score_floor=0.2)
    with pytest.raises(UsageError, match=r"score 0\.1 is too low"):
        mill.predict(model="tiny_detector", score=0.1)
    with pytest.raises(NotFound, match="no images"):
        mill.predict(top_k=2)
    mill.add(1)
    assert mill.predict(top_k=3).rows == 1


def test_a_bucket_is_predicted_like_a_folder(tmp_path, bucket):
    mill = Mill(tmp_path, f"s3://{bucket}/mill")
    mill.add(12)
    for path in mill.photos.iterdir():
        open_storage(mill.store).put_if_absent(f"s3://{bucket}/photos/{path.name}", path.read_bytes())
    mill.photos = f"s3://{bucket}/photos"
    summary = mill.predict(shard_size=5)
    assert (summary.by_status, summary.shards) == ({"ok": 12}, 3)
    assert (mill.predict().rows, mill.problems()) == (0, [])


def test_images_that_vanish_or_change_after_the_plan(mill):
    mill.add(4)
    settings = PredictSettings(source=str(mill.photos), model="tiny", table="t")
    planned = predict.plan(mill.store, settings)
    (mill.photos / "0001.jpg").unlink()
    os.utime(mill.photos / "0002.jpg", ns=(1, 1))
    predict.work(mill.store, settings, planned)
    reasons = {Path(row["image"]).stem: (row["status"], row["error"]) for row in mill.rows()}
    assert reasons["0001"] == ("missing", "gone since it was listed")
    assert reasons["0002"][0] == "missing"
    assert "changed" in reasons["0002"][1]
    again = mill.predict()
    assert (again.planned, again.by_status) == (1, {"ok": 1})
    assert [row["status"] for row in mill.rows() if row["image"].endswith("0002.jpg")] == ["missing", "ok"]
    assert mill.problems() == []


def test_what_was_missing_is_claimed_again_on_request(mill):
    mill.add(3)
    settings = PredictSettings(source=str(mill.photos), model="tiny", table="t")
    planned = predict.plan(mill.store, settings)
    (mill.photos / "0001.jpg").rename(mill.folder / "away")
    predict.work(mill.store, settings, planned)
    (mill.folder / "away").rename(mill.photos / "0001.jpg")
    assert mill.predict().planned == 0
    again = mill.predict(retry_unreadable=True)
    assert (again.planned, again.by_status) == (1, {"ok": 1})
    attempts = [(row["status"], row["attempt"]) for row in mill.rows() if row["image"].endswith("0001.jpg")]
    assert attempts == [("missing", 1), ("ok", 2)]
    assert mill.predict(retry_unreadable=True).planned == 0
    assert mill.problems() == []


def test_a_limit_claims_so_many_and_the_next_run_goes_on(mill):
    mill.add(10)
    assert [mill.predict(limit=4).rows for _ in range(4)] == [4, 4, 2, 0]
    assert mill.problems() == []


def test_open_shards_of_an_older_plan_are_done_by_the_next_run(mill):
    mill.add(12)
    settings = PredictSettings(source=str(mill.photos), model="tiny", table="t", shard_size=5)
    predict.plan(mill.store, settings)
    assert "3 of 3 shards" in mill.problems()[0]
    mill.add(2, first=12)
    summary = mill.predict()
    assert (summary.planned, summary.rows, summary.open_shards) == (2, 14, 0)
    assert mill.problems() == []


def test_two_models_share_a_table(mill):
    mill.add(5)
    publish_classifier(mill.store, mill.folder, name="second", seed=7)
    mill.predict()
    mill.predict(model="second")
    assert len(mill.rows()) == 10
    assert {row["model"] for row in mill.rows()} == {"tiny@000000000000", "second@000000000007"}
    assert mill.problems() == []


def test_every_part_says_how_it_was_made(mill):
    mill.add(5)
    mill.predict(shard_size=3)
    table = Table(mill.store, "t")
    for shard, images in zip(table.heads()[0].shards, (3, 2), strict=True):
        statistics = table.part_statistics(table.part_uri("tiny@000000000000", shard))
        assert statistics["by_status"] == {"ok": images}
        assert set(statistics["stages"]) == {"read", "decode", "infer"}
        assert statistics["host"] == os.uname().nodename


POISONED_SLOT = """
import os, signal, sys
from models.imaging.prepare import Preparer
prepare = Preparer.prepare
def deadly(self, data, out):
    if b"POISON" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    return prepare(self, data, out)
Preparer.prepare = deadly
if "isolation" in sys.argv:
    sys.argv.remove("isolation")
    from tasks.isolation import serve
    serve()
else:
    from tasks import isolation, slot
    isolation.COMMAND = (sys.executable, __file__, "isolation")
    os._exit(slot.main())
"""


def test_an_image_that_kills_its_decoder_costs_one_row(mill, monkeypatch, tmp_path):
    mill.add(9)
    poison = io.BytesIO()
    Image.new("RGB", (9, 9)).save(poison, "JPEG", comment=b"POISON")
    (mill.photos / "0004.jpg").write_bytes(poison.getvalue())
    script = tmp_path / "poisoned_slot.py"
    script.write_text(POISONED_SLOT)
    monkeypatch.setattr(slot_process, "SLOT_COMMAND", [sys.executable, str(script)])
    summary = mill.predict(shard_size=3)
    assert summary.by_status == {"ok": 8, "corrupt": 1}
    assert "signal 11" in mill.rows()[4]["error"]
    assert mill.problems() == []


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(mill):
    """Real runs in real processes, killed again and again; then they complete, and nothing is lost or doubled."""
    mill.add(64)
    for number in range(64, 3200):
        os.link(mill.photos / f"{number % 64:04d}.jpg", mill.photos / f"{number:04d}.jpg")
    command = [
        sys.executable, "-m", "flows", "predict", str(mill.photos), "--model", "tiny", "--store", mill.store,
        "--shard-size", "50", "--batch-size", "1", "--direct", "--json", "--table",
    ]  # fmt: skip

    def num_parts(table: str) -> int:
        return len(list(Path(mill.store, "tables", table, "parts").rglob("*.parquet")))

    start = time.monotonic()
    subprocess.run([*command, "rehearsal", "--limit", "50"], cwd=ROOT, check=True, capture_output=True)
    shortest_run_s = time.monotonic() - start
    rng = random.Random(20)
    tables, at_work, kills = ["t0"], 0, 0
    while kills < 20 or at_work <= 2:
        assert kills < 100, "the kills met no run at work"
        kills += 1
        before = num_parts(tables[-1])
        run = subprocess.Popen([*command, tables[-1]], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # On a machine that got busier since the rehearsal, runs that begin to work are waited for longer and longer.
        time.sleep(rng.uniform(0.3, 1.5) * shortest_run_s * (1 if at_work > 2 else 1 + kills / 20))
        run.send_signal(signal.SIGKILL)
        run.wait()
        at_work += num_parts(tables[-1]) > before
        if num_parts(tables[-1]) == 64:
            tables.append(f"t{len(tables)}")
    for table in tables:
        subprocess.run([*command, table], cwd=ROOT, check=True, capture_output=True)
        verification = verify(mill.store, table)
        assert (verification.problems, verification.rows) == ([], 3200)
        rows = pq.ParquetDataset(f"{mill.store}/tables/{table}/parts").read(["image"]).column("image").to_pylist()
        assert len(set(rows)) == len(rows) == 3200
