"""The supervisor of a slot: the order of shards, and what it does when its process fails, dies or falls silent."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from models.errors import ModelError
from models.records import LISTING_SCHEMA, Task
from tasks import shard_queue, slot_process, work
from tasks.plan import claim
from tasks.shard_queue import ShardQueue
from tasks.slot import SlotConfig
from tasks.table import Table
from tasks.work import Stopped

MODEL = "fake@0123456789ab"
FAKE_SLOT = Path(__file__).with_name("fake_slot.py")


def planned_table(folder: Path, images: int, shard_size: int = 3) -> Table:
    """A table with one plan over images that nobody will read."""
    table = Table(str(folder / "mill"), "t")
    table.define(Task.CLASSIFY, {})
    rows = [{"image": f"/{number:03d}.jpg", "fingerprint": "1-1", "bytes": 1} for number in range(images)]
    listing = iter([pa.RecordBatch.from_pylist(rows, schema=LISTING_SCHEMA)])
    claim(table, listing, model=MODEL, source="/", settings={}, shard_size=shard_size)
    return table


def indices(queue: ShardQueue) -> list[int]:
    taken = []
    while shard := queue.take():
        taken.append(shard.index)
        queue.done(shard)
    return taken


@pytest.mark.parametrize(
    ("slot", "slots", "order"),
    [
        pytest.param(0, 1, [0, 1, 2, 3, 4, 5], id="one slot"),
        pytest.param(0, 2, [0, 1, 2, 5, 4, 3], id="first of two: its half, then from the far end"),
        pytest.param(1, 2, [3, 4, 5, 2, 1, 0], id="second of two"),
        pytest.param(1, 3, [2, 3, 1, 0, 5, 4], id="middle of three"),
        pytest.param(7, 8, [5, 4, 3, 2, 1, 0], id="more slots than shards"),
    ],
)
def test_order_of_shards(tmp_path, slot, slots, order):
    assert indices(ShardQueue(planned_table(tmp_path, 18), MODEL, 1, slot, slots)) == order


def test_slots_of_one_process_never_hold_the_same_shard(tmp_path):
    table = planned_table(tmp_path, 18)
    queues = [ShardQueue(table, MODEL, 1, slot, 2) for slot in range(2)]
    taken = [queue.take() for _ in range(3) for queue in queues]
    assert sorted(shard.index for shard in taken) == [0, 1, 2, 3, 4, 5]
    assert [queue.take() for queue in queues] == [None, None]
    queues[0].put_back(taken[0], 0.0)
    queues[1].refill()
    assert queues[1].take() == taken[0]
    for shard in taken:
        queues[0].done(shard)


def test_a_run_without_a_plan_of_its_own_starts_where_the_other_run_is_not(tmp_path, monkeypatch):
    table = planned_table(tmp_path, 18)
    monkeypatch.setattr(shard_queue.random, "randrange", lambda count: count - 2)
    assert indices(ShardQueue(table, MODEL, None, 0, 1)) == [4, 5, 0, 1, 2, 3]
    monkeypatch.undo()
    starts = {indices(ShardQueue(table, MODEL, None, 0, 1))[0] for _ in range(100)}
    assert starts == {0, 1, 2, 3, 4, 5}


def test_a_shard_that_another_run_committed_is_not_taken(tmp_path):
    table = planned_table(tmp_path, 9)
    queue = ShardQueue(table, MODEL, 1, 0, 1)
    table.storage.put_if_absent(table.part_uri(MODEL, table.open_shards(MODEL)[1]), b"x")
    assert indices(queue) == [0, 2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs one slot with a misbehaving process over 4 shards of 3 images; short pauses."""
    table = planned_table(tmp_path, 12)
    monkeypatch.setattr(work, "PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(work, "SILENCE_S", 1.0)

    def run_slot(behaviour: str, **more):
        command = [sys.executable, str(FAKE_SLOT), behaviour, str(tmp_path)]
        monkeypatch.setattr(slot_process, "SLOT_COMMAND", command)
        config = SlotConfig(table.store, "t", MODEL, "auto", "auto", 1, None, None, 5, 100)
        progress = []
        report = work.work(config, 1, 12, 0, 1, progress.append, **more)
        return report, [shard.index for shard in table.open_shards(MODEL)], progress

    run_slot.table = table
    run_slot.processes = lambda kind: len(list(tmp_path.glob(f"started-*-{kind}")))
    return run_slot


@pytest.mark.parametrize(
    ("behaviour", "by_status", "open_shards", "failures", "processes"),
    [
        pytest.param("behaves", {"ok": 12}, [], 0, (1, 0), id="behaves"),
        pytest.param("fails once", {"ok": 12}, [], 0, (1, 0), id="every shard fails once"),
        pytest.param("shard 0 fails", {"ok": 9}, [0], 1, (1, 0), id="one shard always fails"),
        pytest.param("shard 1 kills", {"ok": 12}, [], 0, (2, 1), id="one shard kills its process"),
        pytest.param("image 2 of shard 1 kills", {"ok": 11, "failed": 1}, [], 0, (2, 2), id="one image kills"),
        pytest.param("falls silent once", {"ok": 12}, [], 0, (2, 1), id="falls silent"),
    ],
)
def test_every_shard_ends_in_rows_or_in_the_report(run, behaviour, by_status, open_shards, failures, processes):
    report, still_open, progress = run(behaviour)
    assert dict(report.by_status) == by_status
    assert still_open == open_shards
    assert len(report.failed_shards) == failures
    assert report.rows == sum(by_status.values())
    assert progress[-1].total == 12
    assert progress[-1].done == report.rows
    assert run.processes("plain") == processes[0]
    assert run.processes("isolated") == processes[1]


def test_the_image_that_kills_is_named_to_the_next_process(run):
    run("image 2 of shard 1 kills")
    shard = [shard for head in run.table.heads() for shard in head.shards][1]
    poison = json.loads(run.table.storage.read(run.table.part_uri(MODEL, shard)))
    assert list(poison) == ["2"]
    assert "signal 9" in poison["2"]


def test_a_storage_that_stays_away_ends_the_slot_early(run):
    report, still_open, _ = run("all fail")
    assert still_open == [0, 1, 2, 3]
    assert len(report.failed_shards) == work.STRIKES + 1
    assert "not tried" in report.failed_shards[-1]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("dies at start", "cannot load fake@0123456789ab: .*signal 9"), ("cannot load", "model.onnx is damaged")],
)
def test_a_model_that_cannot_be_loaded_is_one_error(run, behaviour, message):
    with pytest.raises(ModelError, match=message):
        run(behaviour)


def test_a_slot_that_is_not_wanted_any_more_ends(run):
    with pytest.raises(Stopped):
        run("sleeps", is_wanted=lambda: not run.processes("plain"))


def test_stop_ends_the_slot_and_its_process(run):
    errors = []

    def run_until_stopped():
        try:
            run("sleeps")
        except Stopped as error:
            errors.append(error)

    thread = threading.Thread(target=run_until_stopped)
    thread.start()
    while not run.processes("plain"):
        time.sleep(0.01)
    work.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(run.table.store) not in listed
    assert f"{FAKE_SLOT} sleeps" not in listed
