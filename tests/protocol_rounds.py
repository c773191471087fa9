"""Rounds of the table protocol: a world of images that change, runs that die at any step, and what holds after each.

The checks read the store's files themselves: nothing of `tasks` is asked whether `tasks` did right.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from models.card import Card
from models.errors import Rejected, TransientError
from models.imaging.geometry import ResizeRule
from models.imaging.prepare import Preparer
from models.records import LISTING_SCHEMA, ListedImage, Status, Task, part_schema
from models.runtime.predictor import Predictor
from tasks.pipeline import Pipeline
from tasks.plan import Claim, claim
from tasks.storage import TEMPORARY_PREFIX, Storage
from tasks.storage_local import LocalStorage, fingerprint
from tasks.table import METADATA_KEY, Shard, Table
from tasks.verify import verify

TABLE = "t"
SETTINGS = {"top_k": 2}
FIRST, SECOND = "aaaaaaaaaaaa", "bbbbbbbbbbbb"  # two versions of one model
MOST_STEPS = 5_000  # of one run; one that takes more goes round in circles
WRITES = ("create", "write", "link", "mkdir", "rename", "put_object", "upload", "complete", "copy", "delete")
_Result = TypeVar("_Result")


class Violation(AssertionError):
    """The promise of the table does not hold."""


class Killed(BaseException):
    """The process died at this step. No code may catch it and go on."""


def in_time(function: Callable[[], _Result], seconds: float = 20.0) -> _Result:
    """What `function` returns or raises. A deadlock becomes a Violation that shows where every thread stands."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.extend((True, function()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        stacks = ("".join(traceback.format_stack(frame)) for frame in sys._current_frames().values())
        raise Violation(f"did not end within {seconds:.0f} s\n" + "\n".join(stacks))
    if not outcome[0]:
        raise outcome[1]
    return outcome[1]


class Life:
    """The steps of one process, and one of them at which something happens: it dies there, unless told otherwise.

    A dead process gets no further in any of its threads.
    """

    def __init__(
        self, at: int | None = None, event: Callable[[], None] | None = None, jitter: random.Random | None = None
    ):
        self.steps: list[str] = []
        self.is_over = False
        self.has_met = False
        self._at = at
        self._event = event or self.end
        self._jitter = jitter
        self._lock = threading.Lock()

    def end(self) -> None:
        self.is_over = True

    def step(self, name: str) -> None:
        with self._lock:
            self.steps.append(name)
            count = len(self.steps)
            pause_s = self._jitter.choice((0, 0, 0, 0.0005)) if self._jitter else 0
        if count == self._at:
            self._event()
        if self.is_over:
            raise Killed(name)
        if count > MOST_STEPS:
            raise Violation(f"more than {MOST_STEPS} steps, the last ones {self.steps[-8:]}")
        if pause_s:
            time.sleep(pause_s)

    def writes(self) -> list[str]:
        """The steps that reached for the disk."""
        return [name for name in self.steps if name.startswith(WRITES)]


class Mortal(Storage):
    """Mixed into a storage: what one process sees of it that may die at any step, and whose images may fail it."""

    def __init__(self, life: Life | None = None, world: "World | None" = None):
        super().__init__()
        self.life = life or Life()
        self._world = world

    def step(self, name: str) -> None:
        self.life.step(name)

    def read_image(self, image: ListedImage, max_bytes: int) -> bytes:
        if self._world is not None:
            self._world.before_read(image)
        return super().read_image(image, max_bytes)  # type: ignore[safe-super]

    def put_file_if_absent(self, uri: str, path: Path) -> bool:
        if self._world is not None and not self.life.has_met:
            self.life.has_met = True
            self._world.meet()
        return super().put_file_if_absent(uri, path)  # type: ignore[safe-super]


class MortalLocal(Mortal, LocalStorage):
    """Local disk, where a process may also die half-way through a write."""

    def perform(self, name: str, effect: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name != "write":
            self.step(f"{name}:before")
            result = effect(*args, **kwargs)
            try:
                self.step(f"{name}:after")
            except Killed:  # the end of a process closes its files
                if name == "create":
                    os.close(result)
                elif hasattr(result, "close"):
                    result.close()
                raise
            return result
        (file,) = args
        whole = io.BytesIO()
        effect(whole)
        self.step("write:before")
        self.write_slowly(file, whole.getvalue())
        return None

    def write_slowly(self, file: Any, data: bytes) -> None:
        """Two halves, with a step after each."""
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            file.write(half)
            file.flush()
            self.step("write:half")


class FakeEngine:
    """A pure function of the pixels and the version, which counts what it is asked."""

    name = "fake"
    device = "cpu"
    concurrency = 2

    def __init__(self, version: str = FIRST):
        self.images = 0
        self._weights = np.array([[5, 1, 2], [1, 4, 1], [2, 1, 3]], np.float32) + (version == SECOND)
        self._lock = threading.Lock()

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        with self._lock:
            self.images += len(images)
        colours = images.reshape(len(images), -1, 3).mean(1, dtype=np.float64) + 1  # [batch, 3]
        raw = colours @ self._weights
        return {"probabilities": (raw / raw.sum(1, keepdims=True)).astype(np.float32)}

    def close(self) -> None:
        pass


@functools.cache
def card_of(version: str) -> Card:
    """The card of one version of the fake model."""
    return Card("fake", version, Task.CLASSIFY, "fake", ("red", "green", "blue"), ResizeRule("stretch", 4, 4))


@functools.cache
def truth(data: bytes, version: str) -> tuple[str, list[dict[str, Any]] | None]:
    """Status and labels of an image, computed alone."""
    card = card_of(version)
    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    try:
        geometry = Preparer(card.input).prepare(data, pixels[0])
    except Rejected as rejection:
        return str(rejection.status), None
    (finding,) = Predictor(card, FakeEngine(version), top_k=2).predict(pixels, [geometry])
    return "ok", [
        {"label": card.labels[index], "score": float(score)}
        for index, score in zip(finding.labels, finding.scores, strict=True)
    ]


def picture(rng: random.Random) -> bytes:
    """A tiny PNG that no other call gives."""
    pixels = np.frombuffer(rng.randbytes(5 * 6 * 3), np.uint8).reshape(5, 6, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def odd_file(rng: random.Random) -> bytes:
    """What is not an image, or not a whole one."""
    return rng.choice([b"", b"hello %d" % rng.randrange(10**6), picture(rng)[:60]])


class World(ABC):
    """A source of images, a store, and the memory of all that ever was in either."""

    def __init__(self, source: str, store: str):
        self.source = source
        self.store = store
        self.history: dict[tuple[str, str], bytes] = {}  # image and fingerprint → content
        self.gone: set[tuple[str, str]] = set()  # versions that were changed or removed
        self.refused: set[tuple[str, str]] = set()  # versions that storage did not give at some time
        self.mishaps: dict[str, str] = {}  # what happens when an image is read for the next time
        self.barrier: threading.Barrier | None = None  # where two runs meet before they write their plans
        self._seen: dict[str, bytes] = {}

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Makes or changes an image."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Takes an image away."""

    @abstractmethod
    def rename(self, name: str, new: str) -> None:
        """The same content, under another name."""

    @abstractmethod
    def names(self) -> list[str]:
        """The images there are now."""

    @abstractmethod
    def version(self, name: str) -> tuple[str, str]:
        """URI and fingerprint of an image."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """All that lies in the store, by its path there."""

    @abstractmethod
    def stamps(self) -> dict[str, Any]:
        """When each file of the store was written."""

    @abstractmethod
    def storage(self, life: Life | None = None) -> Storage:
        """What one process sees."""

    def fill(self, rng: random.Random, count: int = 12) -> None:
        """The first images; three of them are none."""
        for index in range(count - 3):
            self.put(f"{index:02d}.png", picture(rng))
        for name, data in (("empty.png", b""), ("text.png", b"not an image"), ("torn.png", picture(rng)[:60])):
            self.put(name, data)

    def before_read(self, image: ListedImage) -> None:
        """Lets the mishap of an image happen, once."""
        mishap = self.mishaps.pop(image.image, None)
        if mishap is None:
            return
        name = image.image.rpartition("/")[2]
        if mishap == "vanishes" and name in self.names():
            self.remove(name)
        elif mishap == "changes":
            self.put(name, picture(random.Random(image.fingerprint)))
        elif mishap == "is refused":
            self.refused.add((image.image, image.fingerprint))
            raise Rejected(Status.UNREADABLE, "made so by the test")
        elif mishap == "gets no answer":
            self.refused.add((image.image, image.fingerprint))
            raise TransientError("made so by the test")

    def meet(self) -> None:
        """Waits for the other run, unless it has ended."""
        if self.barrier is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.barrier.wait(5)

    def remember(self, files: dict[str, bytes]) -> None:
        """Holds the files of the store against what was there before: none may change or go."""
        for name, data in self._seen.items():
            if files.get(name) != data:
                raise Violation(f"{name} was {'changed' if name in files else 'removed'} after it was published")
        self._seen = {name: data for name, data in files.items() if not _is_temporary(name)}


class LocalWorld(World):
    """A folder of images and a store on local disk."""

    _clock = itertools.count(1)

    def __init__(self, source: Path, store: Path, make_storage: Callable[[Life, World], Storage] = MortalLocal):
        super().__init__(str(source), str(store))
        self._make_storage = make_storage
        source.mkdir(exist_ok=True)

    def put(self, name: str, data: bytes) -> None:
        draft = Path(f"{self.source}.draft-{threading.get_ident()}")  # beside the source: no listing sees it
        draft.write_bytes(data)
        stamp = 1_700_000_000_000_000_000 + next(self._clock)
        os.utime(draft, ns=(stamp, stamp))
        path = Path(self.source, name)
        self.history[str(path), fingerprint(draft.stat())] = data
        if path.exists():
            self.gone.add(self.version(name))
        draft.replace(path)

    def remove(self, name: str) -> None:
        self.gone.add(self.version(name))
        Path(self.source, name).unlink()

    def rename(self, name: str, new: str) -> None:
        """The same file, with its time, under another name."""
        path = Path(self.source, name)
        self.history[str(path.with_name(new)), fingerprint(path.stat())] = self.history[self.version(name)]
        self.gone.add(self.version(name))
        path.rename(path.with_name(new))

    def names(self) -> list[str]:
        return sorted(os.listdir(self.source))

    def version(self, name: str) -> tuple[str, str]:
        path = Path(self.source, name)
        return str(path), fingerprint(path.stat())

    def _paths(self) -> Iterator[Path]:
        return (path for path in Path(self.store).rglob("*") if path.is_file())

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.store)): path.read_bytes() for path in self._paths()}

    def stamps(self) -> dict[str, Any]:
        return {str(path): path.stat().st_mtime_ns for path in self._paths()}

    def storage(self, life: Life | None = None) -> Storage:
        return self._make_storage(life or Life(), self)


@dataclass
class Ran:
    """What one run did."""

    claimed: Claim
    images: int  # that the engine saw
    failed: list[str]
    writes: list[str]


@dataclass
class Heard:
    """A listener that keeps what it hears."""

    committed_shards: list[Shard] = field(default_factory=list)
    failures: list[tuple[Shard, str]] = field(default_factory=list)
    announced: list[tuple[Shard, int]] = field(default_factory=list)

    def committed(self, shard: Shard, statistics: Any) -> None:
        self.committed_shards.append(shard)

    def failed(self, shard: Shard, reason: str) -> None:
        self.failures.append((shard, reason))

    def predicting(self, shard: Shard, index: int) -> None:
        self.announced.append((shard, index))


def list_images(world: World, storage: Storage) -> Iterator[pa.RecordBatch]:
    """The listing of the source, in small batches."""
    walk = storage.walk(world.source, recursive=True, ignore=lambda name, is_folder: None, ignored={})
    while states := list(itertools.islice(walk, 5)):
        columns = [pa.array(values) for values in zip(*states, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA)


def predict(
    world: World,
    life: Life | None = None,
    *,
    version: str = FIRST,
    shard_size: int = 4,
    limit: int | None = None,
    retry_unreadable: bool = False,
    make_table: Callable[..., Table] = Table,
) -> Ran:
    """One run, as one process would do it: list, define, plan, work."""
    life = life or Life()
    storage = world.storage(life)
    table = make_table(world.store, TABLE, storage)
    card = card_of(version)
    engine = FakeEngine(version)
    heard = Heard()

    def run() -> Ran:
        table.define(Task.CLASSIFY, SETTINGS)
        claimed = claim(
            table,
            list_images(world, storage),
            model=card.reference,
            source=world.source,
            settings=SETTINGS,
            limit=limit,
            shard_size=shard_size,
            retry_unreadable=retry_unreadable,
        )
        pipeline = Pipeline(
            table,
            Predictor(card, engine, top_k=2),
            lambda: Preparer(card.input),
            heard,
            batch_size=3,
            workers=2,
            readers=2,
            storage_of=lambda uri: storage,
        )
        pipeline.run(table.open_shards(card.reference))
        return Ran(claimed, engine.images, [reason for _, reason in heard.failures], life.writes())

    return in_time(run)


_FILE = re.compile(
    r"tables/t/(table\.json|plans/(?P<plan>\d{8})\.parquet"
    r"|parts/model=(?P<model>[^/]+)/(?P<of>\d{8})-(?P<shard>\d{5})\.parquet)"
)


def _is_temporary(name: str) -> bool:
    return os.path.basename(name).startswith(TEMPORARY_PREFIX) and not name.endswith(".parquet")


def _is_definition(data: bytes) -> bool:
    try:
        return json.loads(data)["settings"] == SETTINGS
    except ValueError:
        return False


def _whole(name: str, data: bytes) -> pq.ParquetFile:
    """The Parquet file, every page of which has been read and its checksum compared."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        file.read()
        return file
    except (pa.ArrowException, OSError) as error:
        raise Violation(f"a reader sees {name} torn ({len(data)} bytes): {error}") from error


Row = dict[str, Any]
Key = tuple[str, str, str, int]  # model, image, fingerprint, attempt


def check_disk(world: World) -> dict[Key, Row]:
    """What must hold at every instant, whoever is alive; returns the rows of all parts."""
    files = world.files()
    world.remember(files)
    plans: dict[int, pq.ParquetFile] = {}
    parts: dict[tuple[str, int, int], pq.ParquetFile] = {}
    for name, data in sorted(files.items()):
        match = _FILE.fullmatch(name)
        if match is None:
            if not _is_temporary(name):
                raise Violation(f"{name} has no business in a store")
        elif match["plan"]:
            plans[int(match["plan"])] = _whole(name, data)
        elif match["model"]:
            parts[match["model"], int(match["of"]), int(match["shard"])] = _whole(name, data)
        elif not _is_definition(data):
            raise Violation(f"a reader sees {name} torn: {data!r}")
    if sorted(plans) != list(range(1, len(plans) + 1)):
        raise Violation(f"plans {sorted(plans)} leave a gap")
    claims = _check_claims(plans)
    rows = _check_parts(world, plans, parts)
    for model, image, version, attempt in claims:
        before = rows.get((model, image, version, attempt - 1), {}).get("status")
        if attempt > 1 and before not in ("unreadable", "missing"):
            raise Violation(f"attempt {attempt} at {image} was claimed after one that ended as {before}")
    return rows


def _check_claims(plans: dict[int, pq.ParquetFile]) -> Counter[Key]:
    claims: Counter[Key] = Counter()
    attempts: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for file in plans.values():
        for row in file.read().to_pylist():
            claims[row["model"], row["image"], row["fingerprint"], row["attempt"]] += 1
            attempts[row["model"], row["image"], row["fingerprint"]].append(row["attempt"])
    twice = [key for key, count in claims.items() if count > 1]
    if twice:
        raise Violation(f"claimed more than once: {twice[:3]}")
    for key, numbers in attempts.items():
        if sorted(numbers) != list(range(1, len(numbers) + 1)):
            raise Violation(f"attempts {numbers} at {key}")
    return claims


def _check_parts(
    world: World, plans: dict[int, pq.ParquetFile], parts: dict[tuple[str, int, int], pq.ParquetFile]
) -> dict[Key, Row]:
    rows: dict[Key, Row] = {}
    for (model, plan, shard), file in parts.items():
        name = f"part {model} {plan}-{shard}"
        if plan not in plans or shard >= plans[plan].num_row_groups:
            raise Violation(f"{name} belongs to no plan")
        claimed = plans[plan].read_row_group(shard).to_pylist()
        part = file.read()
        if not part.schema.equals(part_schema(Task.CLASSIFY)):
            raise Violation(f"{name} has the columns {part.schema}")
        found = part.to_pylist()
        if [(model, *_version(row)) for row in found] != [(row["model"], *_version(row)) for row in claimed]:
            raise Violation(f"{name} holds {len(found)} rows for {len(claimed)} claimed images, or others")
        statistics = json.loads(file.metadata.metadata[METADATA_KEY])
        if Counter(row["status"] for row in found) != Counter(statistics["by_status"]):
            raise Violation(f"{name} counts {statistics['by_status']}")
        for row in found:
            _check_row(world, row, model.partition("@")[2])
            rows[model, *_version(row)] = row
    return rows


def _version(row: Row) -> tuple[str, str, int]:
    return row["image"], row["fingerprint"], row["attempt"]


def _check_row(world: World, row: Row, version: str) -> None:
    """A row tells the truth about the version of the image it names, or that it could not be read."""
    key = (row["image"], row["fingerprint"])
    data = world.history[key]
    if row["status"] in ("unreadable", "missing"):
        if key not in (world.gone if row["status"] == "missing" else world.refused):
            raise Violation(f"{row['image']} is {row['status']}, although nothing was wrong with it: {row['error']}")
        return
    wanted = *truth(data, version), hashlib.sha256(data).hexdigest(), len(data)
    if (row["status"], row["labels"], row["sha256"], row["bytes"]) != wanted:
        raise Violation(f"{row['image']} became {row}, expected {wanted}")


def check_complete(world: World, *versions: str) -> dict[Key, Row]:
    """What must hold once a healthy run has ended: every listed image has its row, and `verify` agrees."""
    rows = check_disk(world)
    problems = verify(world.store, TABLE).problems
    if problems:
        raise Violation(f"verify finds {problems}")
    done = {(model, image, version) for model, image, version, _ in rows}
    for version, name in itertools.product(versions, world.names()):
        if (card_of(version).reference, *world.version(name)) not in done:
            raise Violation(f"{name} has no row for {version}")
    return rows


def check_quiet(world: World, **run: Any) -> None:
    """A completed run that is repeated does no inference and writes nothing."""
    before = world.stamps()
    ran = predict(world, **run)
    if ran.images or ran.writes or ran.failed or ran.claimed.number or world.stamps() != before:
        raise Violation(f"a repeated run did {ran}")


def results(rows: dict[Key, Row]) -> dict[Key, Row]:
    """The rows, less what two runs may differ in."""
    return {key: {name: value for name, value in row.items() if name != "predicted_at"} for key, row in rows.items()}


Worlds = Callable[[int], World]  # makes equal worlds, by number


def kill_everywhere(worlds: Worlds, steps: Iterable[int], **run: Any) -> int:
    """Kills a run at each of `steps`, up to its last, and lets a healthy one go on; returns the number of kills."""
    version = run.get("version", FIRST)
    undisturbed = worlds(0)
    predict(undisturbed, **run)
    wanted = results(check_complete(undisturbed, version))

    def kill(at: int) -> bool:
        world, life = worlds(at), Life(at)
        try:
            with contextlib.suppress(Killed):
                predict(world, life, **run)
            if not life.is_over:
                return False
            check_disk(world)
            predict(world, **run)
            if results(check_complete(world, version)) != wanted:
                raise Violation("the rows differ from those of an undisturbed run")
            check_quiet(world, **run)
        except Violation as violation:
            violation.add_note(f"after a kill at step {at}, {life.steps[at - 1 : at]}")
            raise
        return True

    return _count_until_false(kill, steps)


def interrupt_everywhere(worlds: Worlds, steps: Iterable[int], **run: Any) -> int:
    """At each of `steps` of a run, another one starts and ends; returns the number of such encounters."""

    def interrupt(at: int) -> bool:
        world = worlds(at)

        def other() -> None:
            predict(world, **run)
            check_disk(world)

        life = Life(at, other)
        try:
            predict(world, life, **run)
            if len(life.steps) < at:
                return False
            check_complete(world, run.get("version", FIRST))
            check_quiet(world, **run)
        except Violation as violation:
            violation.add_note(f"another run came and went at step {at}, {life.steps[at - 1 : at]}")
            raise
        return True

    return _count_until_false(interrupt, steps)


def _count_until_false(meets: Callable[[int], bool], steps: Iterable[int]) -> int:
    """Tries the steps two at a time, and counts the hits before the first miss."""
    count = 0
    remaining = iter(steps)
    with ThreadPoolExecutor(2) as pool:
        while pair := list(itertools.islice(remaining, 2)):
            hits = list(pool.map(meets, pair))
            count += sum(hits)
            if not all(hits):
                break
    return count


def race(world: World, runs: list[tuple[Life, dict[str, Any]]]) -> None:
    """Runs in one thread each, which meet before they write their plans. Some may die; other errors are raised."""
    world.barrier = threading.Barrier(len(runs))
    errors: list[BaseException] = []

    def call(life: Life, run: dict[str, Any]) -> None:
        try:
            predict(world, life, **run)
        except Killed:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            world.barrier.abort()

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.barrier = None
    if errors:
        raise errors[0]


def random_round(world: World, rng: random.Random, **more: Any) -> None:
    """The source changes, two runs race, either of which may die, and healthy ones end what they left."""
    _change(world, rng)
    runs = []
    for _ in range(2):
        life = Life(rng.choice((None, rng.randrange(1, 160))), jitter=random.Random(rng.random()))
        run = {
            "version": rng.choice((FIRST, FIRST, SECOND)),
            "shard_size": rng.choice((1, 2, 3, 5, 50)),
            "limit": rng.choice((None, None, 1, 4)),
            "retry_unreadable": rng.random() < 0.5,
        }
        runs.append((life, run | more))
    try:
        race(world, runs)
        check_disk(world)
        world.mishaps.clear()
        for version in (FIRST, SECOND):
            predict(world, version=version, retry_unreadable=True, **more)
        rows = check_complete(world, FIRST, SECOND)
        _check_last_attempts(world, rows)
        check_quiet(world, version=rng.choice((FIRST, SECOND)), retry_unreadable=rng.random() < 0.5, **more)
    except Violation as violation:
        ends = [(run, life.steps[-1:] if life.is_over else "lived") for life, run in runs]
        violation.add_note(f"two runs raced, and ended so: {ends}")
        raise


def _change(world: World, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 4)):
        names = world.names()
        name, new = rng.choice(names), f"{rng.randrange(10**6)}.png"
        change = rng.choice(("add", "add", "change", "change", "remove", "rename"))
        if change == "add":
            world.put(new, rng.choice((picture, picture, odd_file))(rng))
        elif change == "change":
            world.put(name, rng.choice((picture, odd_file))(rng))
        elif change == "remove" and len(names) > 8:
            world.remove(name)
        elif change == "rename":
            world.rename(name, new)
    mishaps = ("vanishes", "changes", "is refused", "gets no answer")
    for name in rng.sample(world.names(), rng.randrange(4)):
        world.mishaps[world.version(name)[0]] = rng.choice(mishaps)


def _check_last_attempts(world: World, rows: dict[Key, Row]) -> None:
    """Nothing that can be read now is still unreadable or missing after --retry-unreadable."""
    last: dict[tuple[str, str, str], Row] = {}
    for (model, image, version, _), row in sorted(rows.items(), key=lambda item: item[0][3]):
        last[model, image, version] = row
    for version, name in itertools.product((FIRST, SECOND), world.names()):
        row = last[card_of(version).reference, *world.version(name)]
        if row["status"] in ("unreadable", "missing"):
            raise Violation(f"{name} is still {row['status']} for {version}")
