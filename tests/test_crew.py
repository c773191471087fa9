"""Slots elsewhere as seen from here: whatever becomes of them, the store says what was done."""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import order
from flows.runners import choose, crew, remote_slot
from flows.runners.choose import crew_of
from flows.runners.cluster import check_answers, check_prefect_is_seen, told
from flows.runners.crew import work_elsewhere
from flows.runners.on_dask import places
from flows.runners.on_ray import _cpus, _room
from flows.runners.orders import SlotOrder
from flows.watch import Lines
from models.errors import PixelmillError, UsageError
from models.records import LISTING_SCHEMA, Task, part_schema
from models.settings.predict import PredictSettings
from tasks.arrivals import Arrivals
from tasks.plan import claim
from tasks.predict import Planned, summarise
from tasks.sight import check_sight
from tasks.table import Shard, Table

MODEL = "fake@0123456789ab"
SETTINGS = PredictSettings(source="/photos", model="fake", table="t", runner="ray", slots=2)


def planned_table(store: str, folder: str = "/photos") -> tuple[Table, Planned]:
    """A table with one plan of 4 shards of 2 images."""
    import pyarrow as pa

    table = Table(store, "t")
    table.define(Task.CLASSIFY, {})
    rows = [{"image": f"{folder}/{number}.jpg", "fingerprint": "1-1", "bytes": 1} for number in range(8)]
    listing = iter([pa.RecordBatch.from_pylist(rows, schema=LISTING_SCHEMA)])
    claim(table, listing, model=MODEL, source=folder, settings={}, shard_size=2)
    return table, Planned("t", MODEL, folder, 8, 8, 0, {}, 1, 4, 8)


def commit(table: Table, index: int, slot: int, run: str) -> None:
    """The part of one shard, as a slot of a run writes it."""
    statistics = {"run": run, "slot": slot, "by_status": {"ok": 2}, "stages": {"infer": 0.5}, "engine": "fake"}
    assert table.commit(MODEL, Shard(1, index, 2), part_schema(Task.CLASSIFY).empty_table(), statistics)


class FakeCrew:
    """Slots that do what a list says: each entry is one step (slot, shards to commit, how it ends or None)."""

    def __init__(self, table: Table, steps: list[tuple[int, list[int], Any]]):
        self.table = table
        self.steps = steps
        self.orders: list[SlotOrder] = []
        self.over: dict[int, Any] = {}
        self.is_dismissed = False

    def start(self, orders: list[SlotOrder]) -> None:
        self.orders = orders

    def ended(self) -> dict[int, Any]:
        if self.steps:
            slot, shards, end = self.steps.pop(0)
            for index in shards:
                commit(self.table, index, slot, self.orders[slot].run)
            if end is not None:
                self.over[slot] = None if end == "ends" else end
        return self.over

    def signs(self) -> Hashable:
        return len(self.steps)

    def dismiss(self) -> None:
        self.is_dismissed = True


DIED = PixelmillError("NodeDiedError: its node has died")


@pytest.mark.parametrize(
    ("steps", "rows", "failures", "open_shards", "is_dismissed"),
    [
        pytest.param([(0, [0, 1], "ends"), (1, [2, 3], "ends")], [4, 4], 0, 0, False, id="both work"),
        pytest.param([(0, [0], None), (0, [1, 2, 3], "ends"), (1, [], "ends")], [8, 0], 0, 0, False, id="one is late"),
        pytest.param([(1, [3], DIED), (0, [0, 1, 2], "ends")], [6, 2], 1, 0, False, id="one dies, the other helps"),
        pytest.param([(1, [3], None), (0, [0, 1, 2], "ends")], [6, 2], 0, 0, True, id="one is dead and nobody knows"),
        pytest.param([(0, [0, 1, 2, 3], "ends")], [8, 0], 0, 0, True, id="one never begins"),
        pytest.param([(0, [0], DIED), (1, [3], DIED)], [2, 2], 2, 2, False, id="both die"),
    ],
)
def test_the_store_says_what_slots_have_done(tmp_path, monkeypatch, steps, rows, failures, open_shards, is_dismissed):
    monkeypatch.setattr(crew, "POLL_S", 0.01)
    monkeypatch.setattr(crew, "LAST_WORDS_S", 0.2)
    table, planned = planned_table(str(tmp_path))
    fake = FakeCrew(table, list(steps))
    heard = []
    ended = work_elsewhere(fake, str(tmp_path), SETTINGS, planned, 2, "our run", heard.append)
    reports = [slot.result() for slot in ended]
    assert [report.rows for report in reports] == rows
    assert [report.slot for report in reports] == [0, 1]
    assert sum(progress.done for progress in {progress.slot: progress for progress in heard}.values()) == sum(rows)
    summary = summarise(str(tmp_path), SETTINGS, planned, reports, 1.0)
    assert (len(summary.failures), summary.open_shards) == (failures, open_shards)
    assert (summary.rows, summary.by_status, summary.engine) == (sum(rows), {"ok": sum(rows)}, "fake")
    assert summary.limit == "not known"  # parts do not tell how long cores waited
    assert fake.is_dismissed == is_dismissed


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        pytest.param([], "did not begin within 0 s: is there room", id="nobody begins"),
        pytest.param([(0, [], None), (0, [], None)], "nothing was heard of it for 0 s", id="nobody goes on"),
        pytest.param([(0, [], DIED), (1, [], DIED)], "its node has died", id="both die at once"),
    ],
)
def test_slots_that_did_nothing_fail_in_one_line(tmp_path, monkeypatch, steps, complaint):
    for name, seconds in {"POLL_S": 0.01, "START_S": 0.2, "SILENCE_S": 0.2}.items():
        monkeypatch.setattr(crew, name, seconds)
    table, planned = planned_table(str(tmp_path))
    fake = FakeCrew(table, list(steps))
    for slot in work_elsewhere(fake, str(tmp_path), SETTINGS, planned, 2, "our run", lambda progress: None):
        with pytest.raises(PixelmillError, match=complaint):
            slot.result()


def test_an_interruption_ends_the_slots(tmp_path, monkeypatch):
    table, planned = planned_table(str(tmp_path))
    fake = FakeCrew(table, [])

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(crew.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        work_elsewhere(fake, str(tmp_path), SETTINGS, planned, 2, "our run", lambda progress: None)
    assert fake.is_dismissed


def test_nothing_open_starts_nothing(tmp_path):
    table, planned = planned_table(str(tmp_path))
    fake = FakeCrew(table, [])
    assert work_elsewhere(fake, str(tmp_path), SETTINGS, planned, 0, "our run", lambda progress: None) == []
    assert fake.orders == []


def test_what_travels_are_names_and_numbers(tmp_path, monkeypatch):
    import json

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setattr(crew, "POLL_S", 0.01)
    table, planned = planned_table(str(tmp_path))
    fake = FakeCrew(table, [(0, [], "ends"), (1, [], "ends")])
    monkeypatch.chdir(tmp_path)
    work_elsewhere(fake, ".", SETTINGS, planned, 2, "our run", lambda progress: None)
    sent = json.dumps(fake.orders[1].parameters())
    assert "hunter2" not in sent
    assert SlotOrder.of(json.loads(sent)) == fake.orders[1]
    assert fake.orders[1].store == str(tmp_path)  # the working directory is another one elsewhere


def test_the_work_of_other_runs_is_not_counted(tmp_path):
    table, _ = planned_table(str(tmp_path))
    commit(table, 0, 0, "before")
    arrivals = Arrivals(table, MODEL, "our run")
    commit(table, 1, 0, "our run")
    commit(table, 2, 0, "another")
    arrivals.look()
    assert (arrivals.report(0).rows, arrivals.parts, arrivals.is_complete) == (2, 3, False)
    commit(table, 3, 1, "another")
    arrivals.look()
    assert (arrivals.report(0).rows, arrivals.report(1).rows, arrivals.is_complete) == (2, 0, True)


# --- what a machine checks before it works


def order_for(store: str, planned: Planned, version: str = "") -> SlotOrder:
    return SlotOrder(store, SETTINGS, planned, 0, 1, "our run", version)


def test_a_store_that_is_not_seen_is_one_line(tmp_path):
    complaint = (
        f"{os.uname().nodename} does not see table t in {tmp_path}/other: a store of several machines is a bucket"
    )
    with pytest.raises(PixelmillError, match=complaint):
        check_sight(Table(f"{tmp_path}/other", "t"), MODEL)


@pytest.mark.parametrize("is_there", [False, True])
def test_images_that_are_not_seen_are_not_called_missing(tmp_path, is_there):
    photos = tmp_path / "photos"
    photos.mkdir()
    if is_there:
        Path(photos, "1.jpg").touch()
    table, _ = planned_table(str(tmp_path / "mill"), str(photos))
    if is_there:
        check_sight(table, MODEL)
        return
    with pytest.raises(PixelmillError, match=r"does not see .*/photos/0.jpg nor other images of table t: images for"):
        check_sight(table, MODEL)


def test_images_of_a_bucket_are_seen_from_everywhere(tmp_path):
    table, _ = planned_table(str(tmp_path / "mill"), "s3://bucket/photos")
    check_sight(table, MODEL)


def test_another_version_is_one_line(monkeypatch):
    monkeypatch.setattr(remote_slot, "our_version", lambda: "2.0")
    remote_slot.check_version("2.0")
    remote_slot.check_version("")
    with pytest.raises(PixelmillError, match=r"has pixelmill 2.0, the run was started by 1.0: install the same"):
        remote_slot.check_version("1.0")


# --- mistakes


def test_an_engine_that_is_not_installed_is_one_line(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'prefect_ray'", name="prefect_ray")

    monkeypatch.setattr(choose, "import_module", missing)
    with pytest.raises(UsageError, match="--runner ray needs prefect-ray: pip install prefect-ray"), crew_of(SETTINGS):
        pass


@pytest.mark.parametrize("runner", ["ray", "dask"])
@pytest.mark.parametrize(
    ("cluster", "complaint"),
    [("127.0.0.1:9", "the cluster at 127.0.0.1:9 does not answer: "), ("nowhere", "expected a host and a port")],
)
def test_a_cluster_that_does_not_answer_is_one_line(runner, cluster, complaint):
    settings = SETTINGS.model_copy(update={"runner": runner, "cluster": cluster})
    with pytest.raises(PixelmillError, match=complaint), crew_of(settings):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:9"])
def test_addresses_are_read_as_engines_write_them(address):
    with pytest.raises(PixelmillError, match="Connection refused"):
        check_answers(address)


@pytest.mark.parametrize(
    ("url", "nodes", "complains"),
    [
        pytest.param("http://127.0.0.1:4200/api", {"10.0.0.1"}, False, id="the cluster is this machine"),
        pytest.param("http://127.0.0.1:4200/api", {"127.0.0.1", "10.0.0.1"}, False, id="by both names"),
        pytest.param("http://127.0.0.1:4200/api", {"10.0.0.1", "10.0.0.2"}, True, id="another machine, our loopback"),
        pytest.param("http://10.0.0.1:4200/api", {"10.0.0.1", "10.0.0.2"}, False, id="a server that all reach"),
    ],
)
def test_slots_elsewhere_need_a_server_that_they_reach(url, nodes, complains):
    with temporary_settings({PREFECT_API_URL: url}):
        if not complains:
            check_prefect_is_seen(nodes, "10.0.0.1")
            return
        with pytest.raises(PixelmillError, match=r"slots on 10.0.0.2 cannot reach the Prefect server of this machine"):
            check_prefect_is_seen(nodes, "10.0.0.1")


def test_other_runners_need_prefect(tmp_path):
    with pytest.raises(UsageError, match="--runner ray hands slots out through Prefect: leave --direct out"):
        order.predict_directly(str(tmp_path), SETTINGS, Lines())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("", "RuntimeError: it ended", id="nothing"),
        pytest.param("it is down\nsee logs", "RuntimeError: it is down see logs", id="several lines"),
        pytest.param(
            "Mismatched versions\n\n+------+---+---+\n| dask | 1 | 2 |\n+------+---+---+",
            "RuntimeError: Mismatched versions | dask | 1 | 2 |",
            id="table",
        ),
        pytest.param(
            "Failed:\nTraceback\n  File x\nOSError: full\n", "RuntimeError: Failed: OSError: full", id="traceback"
        ),
        pytest.param(
            "System error\nModuleNotFoundError: No module named 'flows'\nmore",
            "a machine of the cluster lacks a package (ModuleNotFoundError: No module named 'flows'): "
            "install the same pixelmill there, extras too",
            id="no pixelmill",
        ),
    ],
)
def test_errors_of_an_engine_are_one_line(text, line):
    assert told(RuntimeError(text)) == line


# --- where slots go


@pytest.mark.parametrize(
    ("slots", "chosen"),
    [
        pytest.param(1, ["a1"], id="one"),
        pytest.param(2, ["a1", "b1"], id="one each"),
        pytest.param(3, ["a1", "b1", "b2"], id="the larger machine gets more"),
        pytest.param(4, ["a1", "b1", "b2", "b3"], id="each worker one"),
        pytest.param(5, ["a1", "b1", "b2", "b3", "b1"], id="more slots than workers"),
    ],
)
def test_slots_are_spread_over_the_machines_of_dask(slots, chosen):
    workers = {name: {"host": name[0], "nthreads": 2 if name == "b1" else 1} for name in ("a1", "b1", "b2", "b3")}
    assert places(workers, slots) == chosen


SMALL, LARGE, NO_GPU = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 8.0}


@pytest.mark.parametrize(
    ("slots", "gpus", "nodes", "cpus"),
    [
        pytest.param(1, 0, [NO_GPU], 8, id="all of the only machine"),
        pytest.param(2, 0, [NO_GPU, NO_GPU], 8, id="one each"),
        pytest.param(3, 0, [NO_GPU, NO_GPU], 4, id="two fit where a third must"),
        pytest.param(3, 1, [SMALL, LARGE], 4, id="a GPU each, as many cores as the small machine has"),
        pytest.param(2, 1, [SMALL, LARGE, NO_GPU], 8, id="both GPUs of the large machine"),
        pytest.param(16, 0, [NO_GPU], 0.5, id="more slots than cores"),
        pytest.param(2, 1, [NO_GPU], 1, id="no GPU yet: a machine may come"),
        pytest.param(2, 0, [], 1, id="no machine yet"),
    ],
)
def test_cores_for_each_slot_of_ray(slots, gpus, nodes, cpus):
    assert _cpus(slots, gpus, nodes) == cpus


def test_room():
    assert _room(4, 0, [SMALL, LARGE, NO_GPU]) == 7
    assert _room(4, 1, [SMALL, LARGE, NO_GPU]) == 3
    assert _room(1, 0.5, [SMALL]) == 2


def test_settings_that_need_a_cluster():
    with pytest.raises(ValueError, match="it needs --runner ray or --runner dask"):
        replace_settings(runner="local", cluster="host:1")
    with pytest.raises(ValueError, match="it needs --runner ray or --runner dask"):
        replace_settings(runner="pool:a", gpus_per_slot=1)
    with pytest.raises(ValueError, match="credentials"):
        replace_settings(runner="ray", cluster="ray://me:secret@host:1")
    with pytest.raises(ValueError, match="String should match pattern"):
        replace_settings(runner="slurm")


def replace_settings(**values: Any) -> PredictSettings:
    return PredictSettings(source="/photos", model="m", table="t", **values)
