"""A slot: the process that has one model loaded and works through the shards it is told to.

It speaks JSON lines. On stdin: first a SlotConfig, then `{"shard": [plan, index, images], "poison": {index: reason}}`
per shard, at last `{"stop": true}`. On stdout: events, each with a key `event` (ready, predicting, progress, committed,
failed, fatal). When stdin ends without `stop`, the supervisor has died, and the slot ends at once: what it had not
committed stays open.
"""

import functools
import importlib
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from models.settings.fields import Device, ImageFormat
from models.settings.fields import Engine as EngineName

PROGRESS_EVERY_S = 0.25
LOCAL_READERS = 2
REMOTE_READERS = 16  # an object store answers in tens of milliseconds, so many requests are kept under way
SUPERVISOR_DIED = 3  # exit code


@dataclass(frozen=True)
class SlotConfig:
    """What a slot needs to know; names and numbers only, no credentials."""

    store: str
    table: str
    model: str  # NAME@VERSION
    engine: EngineName
    device: Device
    threads: int  # cores that this slot may keep busy
    batch_size: int | None
    score: float | None
    top_k: int
    max_pixels: int
    tile: int | None = None  # pixels
    overlap: float = 0.0  # of tiles
    image_format: ImageFormat = "png"  # of what a translator makes
    isolated: bool = False  # one image at a time, each decoded in a child process with limits
    remote_source: bool = False
    run: str = ""  # noted in every part, with the slot: whose work it was
    slot: int = 0  # from 0


class Events:
    """Writes events as JSON lines. Thread-safe; it is the pipeline's listener."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields})
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()

    def predicting(self, shard: Any, index: int) -> None:
        self.send("predicting", shard=_key(shard), index=index)

    def committed(self, shard: Any, statistics: Mapping[str, Any]) -> None:
        self.send("committed", shard=_key(shard), statistics=dict(statistics))

    def failed(self, shard: Any, reason: str) -> None:
        self.send("failed", shard=_key(shard), reason=reason)


def _key(shard: Any) -> list[int]:
    return [shard.plan, shard.index, shard.images]


def main() -> int:
    """The process: reads its work from stdin until told to stop. Exit code 0, or 1 after a `fatal` event."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    events = Events(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # nothing that a library prints may fall between the events
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from models.errors import PixelmillError

    _import_ahead()
    first = sys.stdin.readline()
    if not first:
        return SUPERVISOR_DIED
    try:
        run(SlotConfig(**json.loads(first)), events, sys.stdin)
    except PixelmillError as error:
        events.send("fatal", reason=str(error))
        return 1
    except Exception as error:
        events.send("fatal", reason=f"{type(error).__name__}: {error}")
        raise
    return 0


def _import_ahead() -> None:
    """What `run` imports and its first images need, while the supervisor is still planning."""
    for name in ("onnxruntime", "tasks.pipeline", "tasks.registry", "models.imaging.prepare"):
        importlib.import_module(name)
    importlib.import_module("models.runtime.openvino").cpu_precisions()  # loads it, if it is installed


def run(config: SlotConfig, events: Events, commands: TextIO) -> None:
    """Loads the model and computes the shards named in `commands`."""
    from models.imaging.prepare import Limits, Preparer
    from models.imaging.tiles import Tiling
    from models.records import Task
    from models.runtime.engine import open_engine
    from models.runtime.predictor import Predictor
    from tasks import registry
    from tasks.pipeline import Pipeline
    from tasks.table import Shard, Table

    card = registry.resolve(config.store, config.model)
    threads = 1 if config.isolated else config.threads
    engine = open_engine(
        registry.fetch_model(config.store, card), card, engine=config.engine, device=config.device, threads=threads
    )
    predictor = Predictor(card, engine, score=config.score, top_k=config.top_k)
    limits = Limits(max_pixels=config.max_pixels)
    tiling = None
    if config.tile is not None:  # objects may be larger than a tile; maps and images are sharper in tiles
        and_whole = card.task not in (Task.SEMANTIC, Task.TRANSLATE)
        tiling = Tiling(config.tile, config.overlap, and_whole)
    preparer: type = Preparer
    if config.isolated:
        from tasks.isolation import IsolatedPreparer

        preparer = IsolatedPreparer
    poison: dict[Shard, dict[int, str]] = {}

    def shards() -> Iterator[Shard]:
        for command in _listen(commands):
            shard = Shard(*command["shard"])
            poison[shard] = {int(index): reason for index, reason in command.get("poison", {}).items()}
            yield shard

    pipeline = Pipeline(
        Table(config.store, config.table),
        predictor,
        functools.partial(preparer, card.input, limits, tiling),
        events,
        batch_size=1 if config.isolated else config.batch_size or default_batch_size(card.task, engine.device),
        workers=threads if engine.device == "cpu" else threads + engine.concurrency,
        readers=REMOTE_READERS if config.remote_source else LOCAL_READERS,
        statistics={"host": os.uname().nodename, "run": config.run, "slot": config.slot},
        poison=poison,
        announce=config.isolated,
        image_format=config.image_format,
    )
    events.send("ready", engine=engine.name)
    finished = threading.Event()
    progress = threading.Thread(target=_report_progress, args=(pipeline.tally, events, finished), daemon=True)
    progress.start()
    try:
        pipeline.run(shards())
    finally:
        finished.set()
        progress.join()
        engine.close()


def _listen(commands: TextIO) -> Iterator[dict[str, Any]]:
    """The commands up to `stop`, read by a thread, which notices the death of the supervisor in mid-shard."""
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def receive() -> None:
        for line in commands:
            command = json.loads(line)
            inbox.put(command)
            if command.get("stop"):
                return
        os._exit(SUPERVISOR_DIED)

    threading.Thread(target=receive, daemon=True).start()
    while not (command := inbox.get()).get("stop"):
        yield command


def default_batch_size(task: str, device: str) -> int:
    """What fills the device: on cores 8 was fastest for MobileNetV2, and 1 to 4 alike for Faster R-CNN.

    The figures for GPUs are a guess.
    """
    if device == "cpu":
        return 8 if task == "classify" else 2
    return 64 if task == "classify" else 8


def _report_progress(tally: Any, events: Events, finished: threading.Event) -> None:
    last: dict[str, Any] = {}
    while True:
        ended = finished.wait(PROGRESS_EVERY_S)
        with tally.lock:
            now = {"images": tally.images, "by_status": dict(tally.by_status), "stages": dict(tally.seconds)}
        if now != last:
            events.send("progress", **now)
            last = now
        if ended:
            return


if __name__ == "__main__":
    os._exit(main())  # native threads of an engine must not hold up the end
