"""The bulk path of one slot: shards in, parts out, with storage, decoding and the model busy at the same time.

    feed ──► read (threads) ──► decode + predict (one thread per core, whole batches) ──► commit
                                                                    └──► store (threads) ──┘

Every core takes a whole batch through decoding and through the model: no hand-over between the two, and neither has to
be guessed the right number of threads. On a GPU the same threads queue for the device, so that some decode while
another's batch runs. The queues are bounded by images and by bytes, and batches reach across shard borders, so that
memory does not grow and no core waits at a border. Models that make images have them encoded by the thread that
predicted, outside of the device, and stored by threads of their own, before the row that names them is settled.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from models.errors import Rejected, StorageError, TransientError
from models.imaging.encode import encode
from models.imaging.geometry import Geometry
from models.imaging.restore import composed
from models.records import ListedImage, Status, Task
from models.runtime.predictor import Predictor, one_line
from models.runtime.results import Finding, Translation, Written
from models.settings.fields import ImageFormat
from tasks.bounded_queue import BoundedQueue, Finished
from tasks.outputs import output_uri
from tasks.shard_rows import Outcome, ShardRows
from tasks.storage import Storage, open_storage
from tasks.table import Shard, Table
from tasks.tally import Tally

MAX_IMAGE_BYTES = 512 * 2**20
MAX_QUEUED_BYTES = 64 * 2**20
SHARDS_AT_ONCE = 3  # one being committed, one computed, one read ahead
PATIENCE_S = 0.01  # how long a half-filled batch waits for its next image before it runs as it is
OUTAGE_AFTER = 8  # images in a row that could not be read: the storage is at fault, not the images


class ImagePreparer(Protocol):
    """Bytes of an image → the model's input; one per thread."""

    def views(self, data: bytes, next_out: Callable[[], NDArray[np.uint8]]) -> Iterator[Geometry]:
        """Fills what `next_out` gives, [height, width, 3], once per view of the image. Raises Rejected."""
        ...


class Listener(Protocol):
    """Hears what happens; called from several threads."""

    def committed(self, shard: Shard, statistics: Mapping[str, Any]) -> None: ...
    def failed(self, shard: Shard, reason: str) -> None: ...
    def predicting(self, shard: Shard, index: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image on its way; `outcome` holds what reading it showed."""

    rows: ShardRows
    index: int
    data: bytes
    outcome: Outcome  # without a status of its own yet


class Made(NamedTuple):
    """An image file that the row of an item waits for."""

    item: Item
    outcome: Outcome  # once the file is stored
    uri: str
    data: bytes


@dataclass(slots=True)
class Seen:
    """An image between its decoding and its row. The model sees it whole or in tiles, perhaps in several batches."""

    item: Item
    findings: list[tuple[Geometry, Finding | Rejected]]
    views: int = 0  # decoded so far
    is_decoded: bool = False  # no view will follow
    is_settled: bool = False


class Pipeline:
    """Computes shards of one table with one loaded model."""

    def __init__(
        self,
        table: Table,
        predictor: Predictor,
        make_preparer: Callable[[], ImagePreparer],
        listener: Listener,
        *,
        batch_size: int,
        workers: int,
        readers: int,
        storage_of: Callable[[str], Storage] = open_storage,
        statistics: Mapping[str, Any] | None = None,
        poison: Mapping[Shard, Mapping[int, str]] | None = None,
        announce: bool = False,
        image_format: ImageFormat = "png",
    ):
        """`statistics` go into every part.

        `poison`: images that killed a process before, by shard and index, with the reason. `announce`: tell the
        listener each image before it is predicted, so that one that kills the process is known. `image_format`: of
        what a translator makes.
        """
        self.table = table
        self.predictor = predictor
        self.tally = Tally()
        self._make_preparer = make_preparer
        self._listener = listener
        self._batch_size = batch_size
        self._workers = workers
        self._readers = readers
        self._storers = readers if predictor.card.task is Task.TRANSLATE else 0
        self._storage_of = storage_of
        self._statistics = dict(statistics or {})
        self._poison = poison or {}
        self._announce = announce
        self._image_format = image_format
        self._model = predictor.card.reference
        self._device = threading.Semaphore(predictor.engine.concurrency)
        self._room_for_shards = threading.Semaphore(SHARDS_AT_ONCE)
        self._to_read: BoundedQueue[tuple[ShardRows, int]] = BoundedQueue(4 * readers)
        self._to_predict: BoundedQueue[Item] = BoundedQueue(2 * workers * batch_size, MAX_QUEUED_BYTES)
        self._to_store: BoundedQueue[Made] = BoundedQueue(4 * readers, MAX_QUEUED_BYTES)
        self._to_commit: BoundedQueue[ShardRows] = BoundedQueue(SHARDS_AT_ONCE)
        self._misses = 0  # images in a row that the storage did not give
        self._error: BaseException | None = None

    def run(self, shards: Iterable[Shard]) -> None:
        """Computes and commits `shards`, taken one by one as there is room; one that fails is reported and left open.

        Raises what ended the pipeline as a whole: ModelError when the engine is lost.
        """
        feeders = [threading.Thread(target=self._guard, args=(self._feed, shards), daemon=True)]
        readers = [threading.Thread(target=self._guard, args=(self._read,)) for _ in range(self._readers)]
        workers = [threading.Thread(target=self._guard, args=(self._work,)) for _ in range(self._workers)]
        storers = [threading.Thread(target=self._guard, args=(self._store,)) for _ in range(self._storers)]
        committers = [threading.Thread(target=self._guard, args=(self._commit,))]
        for thread in feeders + readers + workers + storers + committers:
            thread.start()
        for threads, queue_after in (
            (feeders, self._to_read),
            (readers, self._to_predict),
            (workers, self._to_store),
            (storers, self._to_commit),
            (committers, None),
        ):
            for thread in threads:
                while thread.is_alive() and not (thread in feeders and self._error):
                    thread.join(0.2)
            if queue_after is not None:
                queue_after.finish()
        if self._error is not None:
            raise self._error

    def _guard(self, target: Callable[..., None], *args: Any) -> None:
        try:
            target(*args)
        except Finished:
            pass
        except BaseException as error:  # whatever ends one thread ends all, and is raised by run
            self._error = self._error or error
            for queue in (self._to_read, self._to_predict, self._to_store, self._to_commit):
                queue.abandon()
            self._room_for_shards.release()

    @contextmanager
    def _busy(self, stage: str, rows: ShardRows) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spend(stage, rows, time.perf_counter() - start)

    def _spend(self, stage: str, rows: ShardRows, seconds: float) -> None:
        rows.spend(stage, seconds)
        self.tally.spend(stage, seconds)

    def _feed(self, shards: Iterable[Shard]) -> None:
        for shard in shards:
            self._room_for_shards.acquire()
            if self._error is not None:
                return
            try:
                rows = ShardRows(shard, self.table.shard_rows(shard))
            except (StorageError, FileNotFoundError) as error:
                self._room_for_shards.release()
                self._listener.failed(shard, str(error))
                continue
            for index in range(len(rows.images)):
                self._to_read.put((rows, index))

    def _read(self) -> None:
        while True:
            entry = self._to_read.get()
            if entry is None:
                continue
            rows, index = entry
            if rows.failure:
                self._drop(rows)
                continue
            poison = self._poison.get(rows.shard, {}).get(index)
            if poison:
                self._settle(rows, index, Outcome(Status.FAILED, poison))
                continue
            with self._busy("read", rows):
                item = self._read_image(rows, index)
            if item is not None:
                self._to_predict.put(item, len(item.data))

    def _read_image(self, rows: ShardRows, index: int) -> Item | None:
        """The image's bytes; None when its outcome is settled already, or its shard has failed."""
        image = rows.images[index]
        storage = self._storage_of(image.image)
        try:
            data = storage.read_image(image, MAX_IMAGE_BYTES)
        except Rejected as rejection:
            self._misses = 0
            self._settle(rows, index, Outcome(rejection.status, rejection.reason))
            return None
        except StorageError as error:
            self._misses += 1
            lasting = not isinstance(error, TransientError)  # credentials, say: they concern more than this image
            if lasting or self._misses >= OUTAGE_AFTER or self._is_away(storage, image):
                rows.fail(f"the storage of {image.image} does not answer: {error}")
                self._drop(rows)
            else:
                self._settle(rows, index, Outcome(Status.UNREADABLE, str(error)))
            return None
        self._misses = 0
        digest = hashlib.sha256(data).hexdigest()
        return Item(rows, index, data, Outcome(Status.OK, sha256=digest, num_bytes=len(data)))

    def _is_away(self, storage: Storage, image: ListedImage) -> bool:
        """Whether the storage as a whole is down: then it is no property of the image, and no row may say so."""
        try:
            storage.exists(image.image)
        except StorageError:
            return True
        return False

    def _work(self) -> None:
        preparer = self._make_preparer()
        rule = self.predictor.card.input
        images = np.empty((self._batch_size, rule.height, rule.width, 3), np.uint8)
        for batch in self._batches(preparer, images):
            self._predict(batch, images[: len(batch)])

    def _batches(self, preparer: ImagePreparer, images: NDArray[np.uint8]) -> Iterator[list[tuple[Seen, Geometry]]]:
        """Decodes waiting images into `images` [batch, height, width, 3]; a batch is short if none waits.

        An image of many tiles reaches over several batches, of which one may begin with the end of another image.
        """
        batch: list[tuple[Seen, Geometry]] = []
        while True:
            start = time.perf_counter()
            try:
                item = self._to_predict.get(PATIENCE_S if batch else None)
            except Finished:
                if batch:
                    yield batch
                return
            if self.tally.images:  # before the first image is through, the wait is for the start, not for storage
                self.tally.spend("wait", time.perf_counter() - start)
            if item is None:
                yield batch
                batch.clear()
                continue
            if item.rows.failure:
                self._drop(item.rows)
                continue
            seen = Seen(item, [])
            for geometry in self._views(preparer, seen, lambda: images[len(batch)]):
                batch.append((seen, geometry))
                if len(batch) >= min(self._batch_size, self.predictor.max_batch or self._batch_size):
                    yield batch
                    batch.clear()

    def _views(
        self, preparer: ImagePreparer, seen: Seen, next_out: Callable[[], NDArray[np.uint8]]
    ) -> Iterator[Geometry]:
        """The views of one image; what goes wrong with them is its row."""
        item = seen.item
        views = preparer.views(item.data, next_out)
        while True:
            try:
                with self._busy("decode", item.rows):
                    geometry = next(views, None)
            except Rejected as rejection:
                self._refuse(seen, rejection.status, rejection.reason)
                return
            except Exception as error:  # decoders raise what they like, MemoryError too; it costs one row, not the run
                reason = f"the decoder failed: {type(error).__name__}: {one_line(error)}"
                self._refuse(seen, Status.CORRUPT, reason)
                return
            if geometry is None:
                break
            seen.views += 1
            yield geometry
        seen.is_decoded = True
        self._conclude(seen)

    def _refuse(self, seen: Seen, status: Status, reason: str) -> None:
        seen.is_settled = True
        self._settle(seen.item.rows, seen.item.index, seen.item.outcome._replace(status=status, error=reason))

    def _predict(self, batch: list[tuple[Seen, Geometry]], images: NDArray[np.uint8]) -> None:
        if self._announce:
            for seen, _ in batch:
                self._listener.predicting(seen.item.rows.shard, seen.item.index)
        with self._device:
            start = time.perf_counter()
            findings = self.predictor.predict(images, [geometry for _, geometry in batch])
            share = (time.perf_counter() - start) / len(batch)
        for (seen, geometry), finding in zip(batch, findings, strict=True):
            self._spend("infer", seen.item.rows, share)
            seen.findings.append((geometry, finding))
            self._conclude(seen)

    def _conclude(self, seen: Seen) -> None:
        """Settles the row of an image once all of its views are decoded and predicted."""
        if seen.is_settled or not seen.is_decoded or len(seen.findings) < seen.views:
            return
        seen.is_settled = True
        with self._busy("infer", seen.item.rows):
            finding = self.predictor.merge(seen.findings)
        geometry, _ = seen.findings[0]
        outcome = seen.item.outcome._replace(width=geometry.width, height=geometry.height)
        if isinstance(finding, Rejected):
            outcome = outcome._replace(status=finding.status, error=finding.reason)
        elif isinstance(finding, Translation):
            self._encode(seen.item, outcome, finding)
            return
        else:
            outcome = outcome._replace(finding=finding)
        self._settle(seen.item.rows, seen.item.index, outcome)

    def _encode(self, item: Item, outcome: Outcome, translation: Translation) -> None:
        """Hands the file on to be stored; an image that cannot be made is its row."""
        image = item.rows.images[item.index]
        try:
            with self._busy("encode", item.rows):
                pixels = composed(translation.views, self.predictor.card.input.interpolation)
                data = encode(pixels, self._image_format)
        except Rejected as rejection:
            self._settle(item.rows, item.index, outcome._replace(status=rejection.status, error=rejection.reason))
            return
        except Exception as error:  # MemoryError too; it costs one row, not the run
            reason = f"its translation cannot be written: {type(error).__name__}: {one_line(error)}"
            self._settle(item.rows, item.index, outcome._replace(status=Status.FAILED, error=reason))
            return
        uri = output_uri(self.table, self._model, image, self._image_format)
        self._to_store.put(Made(item, outcome._replace(finding=Written(uri)), uri, data), len(data))

    def _store(self) -> None:
        while True:
            made = self._to_store.get()
            if made is None:
                continue
            rows = made.item.rows
            if rows.failure:
                self._drop(rows)
                continue
            try:
                with self._busy("store", rows):  # of two slots the first one's file stays; another engine's may differ
                    self.table.storage.put_if_absent(made.uri, made.data)
            except StorageError as error:
                rows.fail(str(error))
                self._drop(rows)
                continue
            self._settle(rows, made.item.index, made.outcome)

    def _settle(self, rows: ShardRows, index: int, outcome: Outcome) -> None:
        self.tally.settle(outcome.status)
        if rows.settle(index, outcome):
            self._to_commit.put(rows)

    def _drop(self, rows: ShardRows) -> None:
        if rows.drop(1):
            self._to_commit.put(rows)

    def _commit(self) -> None:
        while True:
            rows = self._to_commit.get()
            if rows is None:
                continue
            try:
                if rows.failure is None:
                    with self._busy("write", rows):
                        self._publish(rows)
            except StorageError as error:
                rows.fail(str(error))
            if rows.failure is not None:
                self.tally.forget(rows.by_status())
                self._listener.failed(rows.shard, rows.failure)
            self._room_for_shards.release()

    def _publish(self, rows: ShardRows) -> None:
        card = self.predictor.card
        statistics = {
            **self._statistics,
            "plan": rows.shard.plan,
            "shard": rows.shard.index,
            "model": self._model,
            "engine": self.predictor.engine.name,
            "by_status": rows.by_status(),
            "stages": {stage: round(seconds, 3) for stage, seconds in rows.seconds.items()},
            "seconds": round(time.perf_counter() - rows.started, 3),
        }
        is_ours = self.table.commit(self._model, rows.shard, rows.to_arrow(card.task, card.labels), statistics)
        # Rows that another slot had published first are in its count.
        self._listener.committed(rows.shard, statistics if is_ours else statistics | {"by_status": {}})
