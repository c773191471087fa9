"""The bulk path of one slot: whatever storage, images, engine and store do, it ends, and each image has one row."""

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from protocol_rounds import FakeEngine, Heard, Killed, card_of, in_time

from models.errors import ModelError, Rejected, StorageError, TransientError
from models.imaging.geometry import Geometry
from models.records import LISTING_SCHEMA, ListedImage, Status, Task
from models.runtime.engine import OutOfMemory
from models.runtime.predictor import Predictor
from tasks import pipeline as pipeline_module
from tasks.bounded_queue import BoundedQueue, Finished
from tasks.pipeline import OUTAGE_AFTER, Pipeline
from tasks.plan import claim
from tasks.storage_local import LocalStorage
from tasks.table import Shard, Table

CARD = card_of("aaaaaaaaaaaa")


class Colours:
    """A source whose images are their three colour values; each shows what the test put there."""

    def __init__(self, trouble: dict[str, BaseException] | None = None, is_away: bool = False):
        self.trouble = trouble or {}
        self.is_away = is_away
        self.read: Counter[str] = Counter()

    def read_image(self, image: ListedImage, max_bytes: int) -> bytes:
        self.read[image.image] += 1
        if image.image in self.trouble:
            raise self.trouble[image.image]
        return colour(image.image)

    def exists(self, uri: str) -> bool:
        if self.is_away and uri in self.trouble:
            raise TransientError(f"{uri}: no answer")
        return True


def colour(image: str) -> bytes:
    """Three values that tell images apart."""
    return random.Random(image).randbytes(3)


class ColourPreparer:
    """Fills the whole input with the image's colour."""

    def views(self, data: bytes, next_out: Callable[[], NDArray[np.uint8]]) -> Iterator[Geometry]:
        yield self.prepare(data, next_out())

    def prepare(self, data: bytes, out: NDArray[np.uint8]) -> Geometry:
        out[:] = np.frombuffer(data[:3], np.uint8)
        return Geometry(1, 1, 4.0, 4.0, 0.0, 0.0)


class TroubledEngine(FakeEngine):
    """Does to a batch what the test wants, before it answers."""

    def __init__(self, before: Callable[[NDArray[np.uint8]], None]):
        super().__init__()
        self._before = before

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray]:
        self._before(images)
        return super().run(images)


class Mill:
    """A table with claimed images, and what computes it."""

    def __init__(self, folder: Path):
        self.table = Table(str(folder), "t", LocalStorage())
        self.table.define(Task.CLASSIFY, {})
        self.heard = Heard()

    def claim(self, count: int, shard_size: int, prefix: str = "image") -> list[str]:
        """Plans so many images, and returns their names in the plan's order."""
        names = [f"{prefix}-{number:04d}" for number in range(count)]
        columns = {"image": names, "fingerprint": ["1"] * count, "bytes": [3] * count}
        listing = iter([pa.RecordBatch.from_pydict(columns, schema=LISTING_SCHEMA)])
        claim(self.table, listing, model=CARD.reference, source="/", settings={}, shard_size=shard_size)
        return names

    def run(
        self,
        source: Any = None,
        engine: Any = None,
        shards: Iterable[Shard] | None = None,
        is_waiting: bool = False,
        **options: Any,
    ) -> Pipeline:
        """Computes the open shards. Fails where the pipeline hangs, or leaves a thread behind.

        `is_waiting`: the one thread that asks for shards will be left waiting for one.
        """
        source = source or Colours()
        options = {"batch_size": 4, "workers": 2, "readers": 3, "make_preparer": ColourPreparer} | options
        pipeline = Pipeline(
            options.pop("table", self.table),
            Predictor(CARD, engine or FakeEngine(), top_k=3),
            options.pop("make_preparer"),
            self.heard,
            storage_of=lambda uri: source,
            **options,
        )
        before = set(threading.enumerate())
        try:
            in_time(lambda: pipeline.run(self.table.open_shards(CARD.reference) if shards is None else shards))
        finally:
            for thread in set(threading.enumerate()) - before:
                thread.join(0 if is_waiting else 20)
                assert is_waiting == thread.is_alive()
        return pipeline

    def rows(self) -> list[dict[str, Any]]:
        """All rows of all parts, less the time, by image."""
        uris = [
            f"{self.table.uri}/parts/model={CARD.reference}/{name}" for name in self.table.part_names(CARD.reference)
        ]
        rows = [row for uri in uris for row in self.table.read_part(uri).drop(["predicted_at"]).to_pylist()]
        return sorted(rows, key=lambda row: row["image"])

    def status(self) -> dict[str, str]:
        return {row["image"]: row["status"] for row in self.rows()}

    def open(self) -> list[Shard]:
        return self.table.open_shards(CARD.reference)


@pytest.fixture
def mill(tmp_path: Path) -> Mill:
    return Mill(tmp_path)


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 7}, {"batch_size": 64, "workers": 1}], ids=str)
def test_rows_do_not_depend_on_the_batch(tmp_path: Path, options: dict[str, int]) -> None:
    one, other = Mill(tmp_path / "1"), Mill(tmp_path / "2")
    for mill, how in ((one, {"batch_size": 1, "workers": 1}), (other, options)):
        mill.claim(31, 10)
        mill.run(**how)
    assert one.rows() == other.rows()
    assert [row["status"] for row in one.rows()] == ["ok"] * 31


@pytest.mark.parametrize("order", [list, lambda shards: shards[::-1], lambda shards: shards[1::2] + shards[::2]])
def test_shards_in_any_order(mill: Mill, order: Callable[[list[Shard]], list[Shard]]) -> None:
    names = mill.claim(40, 4)
    shards = order(mill.open())
    mill.run(shards=shards)
    assert sorted(mill.heard.committed_shards) == sorted(shards)
    assert list(mill.status()) == names
    assert mill.open() == []


def test_no_shards(mill: Mill) -> None:
    assert mill.run(shards=[]).tally.images == 0


def test_a_part_that_is_there_stays(mill: Mill) -> None:
    mill.claim(3, 3)
    (shard,) = mill.open()
    mill.run(shards=[shard])
    first = Path(mill.table.part_uri(CARD.reference, shard)).read_bytes()
    mill.run(shards=[shard])
    assert Path(mill.table.part_uri(CARD.reference, shard)).read_bytes() == first
    assert mill.heard.committed_shards == [shard, shard], "losing the race is success"


def test_statistics_of_a_part(mill: Mill) -> None:
    names = mill.claim(5, 5)
    mill.run(Colours({names[0]: Rejected(Status.MISSING, "gone")}), statistics={"host": "here"})
    statistics = mill.table.part_statistics(mill.table.part_uri(CARD.reference, Shard(1, 0, 5)))
    assert statistics["by_status"] == {"missing": 1, "ok": 4}
    assert (statistics["host"], statistics["plan"], statistics["shard"]) == ("here", 1, 0)
    assert {"read", "decode", "infer"} <= statistics["stages"].keys()


def is_colour_of(name: str) -> Callable[[NDArray[np.uint8]], NDArray[np.bool_]]:
    return lambda images: (images[:, 0, 0] == np.frombuffer(colour(name), np.uint8)).all(-1)  # [batch]


def test_not_a_number(mill: Mill) -> None:
    names = mill.claim(9, 9)

    class Nan(FakeEngine):
        def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray]:
            outputs = super().run(images)
            outputs["probabilities"][is_colour_of(names[4])(images)] = np.nan
            return outputs

    mill.run(engine=Nan())
    assert mill.status() == dict.fromkeys(names, "ok") | {names[4]: "failed"}


def test_batches_that_do_not_fit_are_halved(mill: Mill) -> None:
    names = mill.claim(20, 10)

    def refuse(images: NDArray[np.uint8]) -> None:
        if len(images) > 2:
            raise OutOfMemory

    pipeline = mill.run(engine=TroubledEngine(refuse), batch_size=8)
    assert mill.status() == dict.fromkeys(names, "ok")
    assert pipeline.predictor.max_batch in (None, 2)


def test_an_image_that_the_engine_fails_on(mill: Mill) -> None:
    names = mill.claim(20, 10)

    def refuse(images: NDArray[np.uint8]) -> None:
        if is_colour_of(names[7])(images).any():
            raise RuntimeError("bad\nimage")

    mill.run(engine=TroubledEngine(refuse))
    assert mill.status() == dict.fromkeys(names, "ok") | {names[7]: "failed"}
    assert mill.rows()[7]["error"] == "the model failed on this image: bad image"


def dead_engine() -> TroubledEngine:
    """It answers twice, and then never again."""
    calls = itertools.count()

    def die(images: NDArray[np.uint8]) -> None:
        if next(calls) >= 2:
            raise RuntimeError("device lost")

    return TroubledEngine(die)


@pytest.mark.parametrize("shard_size", [4, 200], ids=["readers wait for shards", "readers wait for workers"])
def test_a_dead_engine_ends_the_pipeline(mill: Mill, shard_size: int) -> None:
    names = mill.claim(200, shard_size)
    with pytest.raises(ModelError, match="device lost"):
        mill.run(engine=dead_engine())
    assert set(mill.status().values()) <= {"ok"}
    mill.run()
    assert mill.status() == dict.fromkeys(names, "ok")


def test_a_dead_engine_ends_the_pipeline_while_it_waits_for_shards(mill: Mill) -> None:
    mill.claim(60, 20)
    released = threading.Event()

    def shards() -> Iterator[Shard]:
        yield from mill.open()[:1]
        released.wait()

    try:
        with pytest.raises(ModelError, match="device lost"):
            mill.run(engine=dead_engine(), shards=shards(), is_waiting=True)
    finally:
        released.set()


@pytest.mark.parametrize("where", ["source", "read", "prepare", "engine", "commit", "listener"])
def test_the_end_of_any_thread_ends_all(mill: Mill, where: str) -> None:
    mill.claim(240, 6 if where in ("source", "commit", "listener") else 80)
    calls = itertools.count()

    def die(*arguments: Any) -> Any:
        if next(calls) >= 7:
            raise Killed(where)

    def shards() -> Iterator[Shard]:
        for shard in mill.open():
            if where == "source":
                die()
            yield shard

    class Preparer(ColourPreparer):
        def prepare(self, data: bytes, out: NDArray[np.uint8]) -> Geometry:
            if where == "prepare":
                die()
            return super().prepare(data, out)

    source = Colours()
    if where == "read":
        source.read_image = lambda image, max_bytes: die() or colour(image.image)  # type: ignore[method-assign]
    engine = TroubledEngine(die if where == "engine" else lambda images: None)
    table = mill.table
    if where == "commit":
        table = Table(table.store, "t", LocalStorage())
        table.commit = lambda *arguments: die() or True  # type: ignore[method-assign]
    if where == "listener":
        mill.heard.committed = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        mill.run(source, engine, shards(), make_preparer=Preparer, table=table)


TRANSIENT = TransientError("no answer after 5 tries")


@pytest.mark.parametrize(
    ("is_away", "error"),
    [
        pytest.param(True, TRANSIENT, id="no answer to anything"),
        pytest.param(False, StorageError("the credentials have expired"), id="refused for good"),
    ],
)
def test_an_outage_is_no_property_of_images(mill: Mill, is_away: bool, error: StorageError) -> None:
    names = mill.claim(30, 10)
    pipeline = mill.run(Colours(dict.fromkeys(names[12:15], error), is_away))
    assert mill.open() == [Shard(1, 1, 10)]
    assert mill.status() == dict.fromkeys(names[:10] + names[20:], "ok")
    ((shard, reason),) = mill.heard.failures
    assert shard == Shard(1, 1, 10)
    assert str(error) in reason
    assert (pipeline.tally.images, +pipeline.tally.by_status) == (20, Counter(ok=20))
    mill.run()
    assert mill.status() == dict.fromkeys(names, "ok")


def test_many_unread_images_in_a_row_are_an_outage(mill: Mill) -> None:
    names = mill.claim(40, 20)
    mill.run(Colours(dict.fromkeys(names[:20], TRANSIENT)), readers=1)
    assert mill.open() == [Shard(1, 0, 20)]
    assert mill.status() == dict.fromkeys(names[20:], "ok")


def test_few_unread_images_are_unreadable(mill: Mill) -> None:
    names = mill.claim(40, 20)
    some = names[3 : 3 + OUTAGE_AFTER - 1] + names[30:31]
    mill.run(Colours(dict.fromkeys(some, TRANSIENT)), readers=1)
    assert mill.status() == dict.fromkeys(names, "ok") | dict.fromkeys(some, "unreadable")
    assert mill.heard.failures == []


@pytest.mark.parametrize("status", [Status.MISSING, Status.UNREADABLE, Status.TOO_LARGE])
def test_many_rejected_images_are_no_outage(mill: Mill, status: Status) -> None:
    names = mill.claim(20, 5)
    mill.run(Colours({name: Rejected(status, "so it is") for name in names}))
    assert mill.status() == dict.fromkeys(names, str(status))
    assert {row["error"] for row in mill.rows()} == {"so it is"}


def test_a_part_that_cannot_be_written(mill: Mill) -> None:
    names = mill.claim(20, 5)

    class FullDisk(LocalStorage):
        def put_if_absent(self, uri: str, data: bytes) -> bool:
            if uri.endswith("-00002.parquet"):
                raise StorageError("no space left")
            return super().put_if_absent(uri, data)

    pipeline = mill.run(table=Table(mill.table.store, "t", FullDisk()))
    assert mill.open() == [Shard(1, 2, 5)]
    assert mill.heard.failures == [(Shard(1, 2, 5), "no space left")]
    assert pipeline.tally.images == 15
    mill.run()
    assert mill.status() == dict.fromkeys(names, "ok")


@pytest.mark.parametrize("is_gone", [False, True], ids=["damaged", "gone"])
def test_a_plan_that_cannot_be_read(mill: Mill, is_gone: bool) -> None:
    mill.claim(20, 4)
    names = mill.claim(5, 5, prefix="later")
    shards = mill.open()
    plan = Path(mill.table.plan_uri(1))
    data = bytearray(plan.read_bytes())
    data[60] ^= 0xFF
    plan.unlink() if is_gone else plan.write_bytes(data)
    mill.run(shards=shards)
    failed = [shard for shard, _ in mill.heard.failures]
    assert failed == (shards[:5] if is_gone else shards[:1])
    assert mill.status().items() >= dict.fromkeys(names, "ok").items()


def test_poison_is_neither_read_nor_predicted(mill: Mill) -> None:
    names = mill.claim(10, 5)
    source, engine = Colours(), FakeEngine()
    mill.run(source, engine, poison={Shard(1, 1, 5): {2: "it killed a process", 4: "so did this"}})
    poisoned = {names[7]: "failed", names[9]: "failed"}
    assert mill.status() == dict.fromkeys(names, "ok") | poisoned
    assert mill.rows()[7]["error"] == "it killed a process"
    assert not poisoned.keys() & source.read.keys()
    assert engine.images == 8


def test_images_are_announced_before_they_are_predicted(mill: Mill) -> None:
    mill.claim(10, 5)

    def check(images: NDArray[np.uint8]) -> None:
        assert len(mill.heard.announced) >= engine.images + len(images)

    engine = TroubledEngine(check)
    mill.run(engine=engine, announce=True, batch_size=1)
    assert sorted(mill.heard.announced) == [
        (shard, index) for shard in (Shard(1, 0, 5), Shard(1, 1, 5)) for index in range(5)
    ]


def test_readers_do_not_run_ahead_of_a_slow_engine(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    size, queued, readers, workers, batch_size = 100, 1_000, 4, 2, 5
    monkeypatch.setattr(pipeline_module, "MAX_QUEUED_BYTES", queued)
    mill.claim(300, 100)
    in_flight: list[int] = []

    class Large(Colours):
        def read_image(self, image: ListedImage, max_bytes: int) -> bytes:
            data = super().read_image(image, max_bytes).ljust(size)
            in_flight.append((self.read.total() - engine.images) * size)
            return data

    engine = TroubledEngine(lambda images: time.sleep(0.002))
    mill.run(Large(), engine, readers=readers, workers=workers, batch_size=batch_size)
    assert len(mill.rows()) == 300
    assert max(in_flight) <= queued + readers * size + workers * batch_size * size


def test_the_device_is_shared_as_the_engine_allows(mill: Mill) -> None:
    mill.claim(60, 20)
    inside: list[int] = []
    most = 0

    def count(images: NDArray[np.uint8]) -> None:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        time.sleep(0.001)
        inside.pop()

    engine = TroubledEngine(count)
    engine.concurrency = 1
    mill.run(engine=engine, workers=4)
    assert most == 1


# The queue between the threads.


def test_a_queue_hands_out_what_came_first_and_then_ends() -> None:
    queue: BoundedQueue[int] = BoundedQueue(3)
    for item in range(3):
        queue.put(item)
    queue.finish()
    assert [queue.get() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Finished):
        queue.get()


def test_a_queue_without_items_is_not_waited_for_longer_than_asked() -> None:
    assert in_time(lambda: BoundedQueue[int](1).get(0.001)) is None


@pytest.mark.parametrize(
    ("max_items", "sizes"),
    [
        pytest.param(2, [1, 1, 1], id="too many items"),
        pytest.param(9, [6, 5], id="too many bytes"),
        pytest.param(9, [5, 5, 5], id="no room before another leaves"),
        pytest.param(9, [100, 1], id="beside a giant"),
        pytest.param(9, [1, 100], id="a giant beside another"),
    ],
)
def test_a_full_queue_makes_wait(max_items: int, sizes: list[int]) -> None:
    queue: BoundedQueue[int] = BoundedQueue(max_items, 10)
    *first, last = sizes
    for size in first:
        in_time(lambda size=size: queue.put(size, size))
    is_in = threading.Event()
    waiting = threading.Thread(target=lambda: (queue.put(last, last), is_in.set()), daemon=True)
    waiting.start()
    assert not is_in.wait(0.02)
    assert queue.get() == first[0]
    assert is_in.wait(20)


@pytest.mark.parametrize(
    "call", [lambda queue: queue.put(2), lambda queue: (queue.get(), queue.get())], ids=["put", "get"]
)
def test_an_abandoned_queue_wakes_who_waits(call: Callable[[BoundedQueue[int]], Any]) -> None:
    queue: BoundedQueue[int] = BoundedQueue(1)
    queue.put(1)
    ended = threading.Event()

    def wait() -> None:
        try:
            call(queue)
        except Finished:
            ended.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not ended.wait(0.02)
    queue.abandon()
    assert ended.wait(20)


def test_rows_that_another_slot_published_first_are_not_counted(mill: Mill) -> None:
    mill.claim(6, 3)
    shards = mill.open()
    counts = []
    mill.heard.committed = lambda shard, statistics: counts.append(statistics["by_status"])  # type: ignore[method-assign]
    mill.run(shards=shards[:1])
    mill.run(shards=shards, workers=1)
    assert sorted(counts, key=str) == [{"ok": 3}, {"ok": 3}, {}]
    assert len(mill.rows()) == 6


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), ValueError("a\nb")], ids=repr)
def test_whatever_a_decoder_raises_costs_one_row(mill: Mill, error: Exception) -> None:
    names = mill.claim(5, 5)

    class Raising(ColourPreparer):
        def prepare(self, data: bytes, out: NDArray[np.uint8]) -> Geometry:
            if data == colour(names[2]):
                raise error
            return super().prepare(data, out)

    mill.run(make_preparer=Raising)
    assert mill.status() == {name: "corrupt" if name == names[2] else "ok" for name in names}
    reason = mill.rows()[2]["error"]
    assert type(error).__name__ in reason
    assert "\n" not in reason
