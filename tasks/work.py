"""One slot's share of the work: a child process computes the shards, this side hands them out and outlives the child.

A shard that fails is tried again after a pause, and left open in the end. When the process dies, the shards it had in
hand are computed once more with every image isolated, so that one poisonous image costs one row. A process that falls
silent is ended like a dead one.
"""

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from models.errors import ModelError, PixelmillError
from tasks.slot import SlotConfig
from tasks.table import Shard, Table

log = logging.getLogger("pixelmill")

SHARDS_AHEAD = 2  # given to a slot at once: one to compute, one to read ahead
PAUSES_S = (2.0, 10.0)  # before a failed shard is tried again
SILENCE_S = 600.0  # a slot that reports nothing for so long is ended
STARTS = 2  # times that a process may die before it has loaded the model

_taken: set[tuple[str, str, str, Shard]] = set()  # shards in hand of any slot of this process
_taken_lock = threading.Lock()
_stop = threading.Event()


class Stopped(PixelmillError):
    """The run was asked to end early; run the same command again to go on."""

    exit_code = 130


@dataclass(frozen=True)
class SlotProgress:
    """How far one slot is."""

    slot: int
    done: int  # images finished by this slot in this run
    total: int  # images open when the run began, for all slots
    rate: float  # images/s of this slot since its model was loaded
    by_status: dict[str, int]
    stages: dict[str, float]  # busy seconds, summed over threads: read, decode, infer, write; wait: idle cores


@dataclass
class SlotReport:
    """What one slot did."""

    slot: int
    shards: int = 0
    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)
    failed_shards: list[str] = field(default_factory=list)  # one line each
    seconds: float = 0.0
    working_seconds: float = 0.0  # of these, from the loaded model to the last part
    engine: str = ""


def add_seconds(stages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Busy seconds by stage, summed."""
    total: dict[str, float] = {}
    for seconds in stages:
        for stage, busy in seconds.items():
            total[stage] = total.get(stage, 0.0) + busy
    return total


def stop() -> None:
    """Makes every slot of this process end soon; their uncommitted shards stay open."""
    _stop.set()


def cores() -> int:
    """The cores this process may use: its affinity, less a container's quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(available, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return available


class ShardQueue:
    """The open shards in the order of one slot: its own share first, then, from the far end, what others have not
    reached."""

    def __init__(self, table: Table, model: str, slot: int, slots: int):
        """`slot` counts from 0."""
        self._table = table
        self._model = model
        self._slot = slot
        self._slots = slots
        self._order = self._open()
        self._not_before: dict[Shard, float] = {}
        self._given_up: set[Shard] = set()

    def _open(self) -> list[Shard]:
        shards = sorted(self._table.open_shards(self._model))
        start = self._slot * len(shards) // self._slots
        end = (self._slot + 1) * len(shards) // self._slots
        return shards[start:end] + (shards[end:] + shards[:start])[::-1]

    def _key(self, shard: Shard) -> tuple[str, str, str, Shard]:
        return (self._table.store, self._table.name, self._model, shard)

    def take(self) -> Shard | None:
        """The next shard to compute; None when there is none to take now."""
        for shard in list(self._order):
            if time.monotonic() < self._not_before.get(shard, 0) or not self._reserve(shard):
                continue
            self._order.remove(shard)
            if not self._table.storage.exists(self._table.part_uri(self._model, shard)):
                return shard
            self.done(shard)
        return None

    def _reserve(self, shard: Shard) -> bool:
        """False while another slot of this process has the shard in hand."""
        with _taken_lock:
            free = self._key(shard) not in _taken
            _taken.add(self._key(shard))
        return free

    def done(self, shard: Shard) -> None:
        """The shard is committed, by whomever."""
        with _taken_lock:
            _taken.discard(self._key(shard))

    def put_back(self, shard: Shard, pause_s: float = 0.0) -> None:
        """The shard is open again; any slot may take it, this one only after a pause."""
        self._not_before[shard] = time.monotonic() + pause_s
        self._order.append(shard)
        self.done(shard)

    def give_up(self, shard: Shard) -> None:
        """The shard stays open, and this slot does not try it again."""
        self._given_up.add(shard)
        self.done(shard)

    def refill(self) -> None:
        """Looks again at what is open: shards of slots that died, and of other runs."""
        self._order = [shard for shard in self._open() if shard not in self._given_up]

    def is_pausing(self) -> bool:
        """Whether a shard that was put back is still to be tried."""
        return any(shard in self._not_before for shard in self._order)


class SlotProcess:
    """The child process of a slot, and the shards it has in hand."""

    def __init__(self) -> None:
        """Starts it; it imports what it will need, and waits to be configured."""
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.in_hand: list[Shard] = []
        self.is_ready = False
        self.predicting: tuple[Shard, int] | None = None  # the image that an isolated process works on
        self.progress: dict[str, Any] = {"images": 0, "by_status": {}, "stages": {}}
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tasks.slot"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def configure(self, config: SlotConfig) -> None:
        """Makes it load its model; then it takes shards."""
        self._send_line(json.dumps(asdict(config)) + "\n")

    def _receive(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def _send_line(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the end of its events says so
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def give(self, shard: Shard, poison: dict[int, str] | None = None) -> None:
        """Hands out one more shard."""
        self.in_hand.append(shard)
        key = [shard.plan, shard.index, shard.images]
        self._send_line(json.dumps({"shard": key, "poison": poison or {}}) + "\n")

    def finish(self) -> None:
        """No more shards will come."""
        self._send_line(json.dumps({"stop": True}) + "\n")

    def event(self, timeout_s: float) -> dict[str, Any] | None:
        """The next event; None when the process has ended. Raises queue.Empty when nothing came in time."""
        return self._events.get(timeout=timeout_s)

    def end(self) -> str:
        """Kills the process if it still runs, and says how it ended."""
        self._process.kill()
        code = self._process.wait()
        self._receiver.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


_warm: list[SlotProcess] = []


def warm_up(slots: int) -> None:
    """Starts processes for so many slots, so that their imports overlap with the listing. Undone by `cool_down`."""
    _warm.extend(SlotProcess() for _ in range(slots))


def cool_down() -> None:
    """Ends the processes that no slot has taken."""
    while _warm:
        _warm.pop().end()


def _warm_process() -> SlotProcess | None:
    with _taken_lock:
        return _warm.pop() if _warm else None


class Supervisor:
    """Runs the process of one slot, again and again if need be, until no shard is left that it can take."""

    def __init__(
        self,
        shards: ShardQueue,
        config: SlotConfig,
        report: SlotReport,
        on_progress: Callable[[SlotProgress], None],
        total: int,
    ):
        self._shards = shards
        self._config = config
        self._report = report
        self._on_progress = on_progress
        self._total = total
        self._failures: Counter[Shard] = Counter()
        self._suspects: list[Shard] = []  # in hand when a process died
        self._poison: dict[Shard, dict[int, str]] = {}
        self._false_starts = 0
        self._base = SlotProgress(report.slot, 0, total, 0.0, {}, {})  # what earlier processes of this slot did
        self._busy_since: float | None = None

    def run(self) -> None:
        """Works until nothing is left to take. Raises ModelError when the model cannot be loaded at all."""
        isolated = replace(self._config, isolated=True)
        while True:
            while self._run_process(self._config, self._next_shard, self._shards.is_pausing):
                pass
            if not self._suspects:
                return
            while self._suspects:
                self._run_process(isolated, self._next_suspect, lambda: False)

    def _next_shard(self) -> Shard | None:
        shard = self._shards.take()
        if shard is None:
            self._shards.refill()
            shard = self._shards.take()
        return shard

    def _next_suspect(self) -> Shard | None:
        return self._suspects.pop(0) if self._suspects else None

    def _run_process(
        self, config: SlotConfig, next_shard: Callable[[], Shard | None], is_pausing: Callable[[], bool]
    ) -> bool:
        """One process from start to end; False when it ended because nothing was left for it to take."""
        first = next_shard()
        if first is None and not is_pausing():
            return False
        process = _warm_process() or SlotProcess()
        process.configure(config)
        last_event = time.monotonic()
        finishing = False
        try:
            if first is not None:
                process.give(first, self._poison.get(first))
            while True:
                if _stop.is_set():
                    raise Stopped("stopped; run the same command again to go on")
                while not finishing and len(process.in_hand) < (1 if config.isolated else SHARDS_AHEAD):
                    shard = next_shard()
                    if shard is not None:
                        process.give(shard, self._poison.get(shard))
                        continue
                    if not process.in_hand and not is_pausing():
                        process.finish()
                        finishing = True
                    break
                try:
                    event = process.event(0.2)
                except queue.Empty:
                    if process.in_hand and time.monotonic() - last_event > SILENCE_S:
                        self._bury(process, f"nothing was heard of it for {SILENCE_S:.0f} s")
                        return True
                    continue
                last_event = time.monotonic()
                if event is None:
                    self._keep_progress(process)
                    if finishing and not process.in_hand:
                        return False
                    self._bury(process, None)
                    return True
                self._hear(process, event)
        finally:
            process.end()
            for shard in process.in_hand:
                self._shards.done(shard)

    def _hear(self, process: SlotProcess, event: dict[str, Any]) -> None:
        kind = event["event"]
        shard = Shard(*event["shard"]) if "shard" in event else None
        if kind == "ready":
            process.is_ready = True
            self._busy_since = self._busy_since or time.monotonic()
            self._report.engine = event["engine"]
        elif kind == "progress":
            process.progress = event
            self._on_progress(self._progress(process))
        elif kind == "predicting" and shard:
            process.predicting = (shard, event["index"])
        elif kind == "committed" and shard:
            process.in_hand.remove(shard)
            self._shards.done(shard)
            self._report.shards += 1
            self._report.rows += shard.images
            self._report.by_status.update(event["statistics"]["by_status"])
            self._report.working_seconds = time.monotonic() - (self._busy_since or time.monotonic())
        elif kind == "failed" and shard:
            process.in_hand.remove(shard)
            self._fail(shard, event["reason"])
        elif kind == "fatal":
            raise ModelError(event["reason"])

    def _fail(self, shard: Shard, reason: str) -> None:
        """Tries the shard again after a pause, or leaves it open."""
        self._failures[shard] += 1
        attempt = self._failures[shard]
        if attempt <= len(PAUSES_S):
            log.warning("shard %s failed, next try in %.0f s: %s", shard, PAUSES_S[attempt - 1], reason)
            self._shards.put_back(shard, PAUSES_S[attempt - 1])
        else:
            log.warning("shard %s stays open: %s", shard, reason)
            self._report.failed_shards.append(f"shard {shard}: {reason}")
            self._shards.give_up(shard)

    def _bury(self, process: SlotProcess, reason: str | None) -> None:
        """After a process died: what it had in hand is suspect."""
        reason = reason or f"its process ended with {process.end()}"
        log.warning("slot %d: %s", self._report.slot + 1, reason)
        if not process.is_ready:
            self._false_starts += 1
            if self._false_starts >= STARTS:
                raise ModelError(f"a slot cannot load {self._config.model}: {reason}")
            for shard in process.in_hand:
                self._shards.put_back(shard)
            process.in_hand.clear()
            return
        for shard in process.in_hand:
            if process.predicting and process.predicting[0] == shard:
                self._poison.setdefault(shard, {})[process.predicting[1]] = (
                    f"the model's process died on this image: {reason}"
                )
            else:
                self._failures[shard] += 1
            if self._failures[shard] <= len(PAUSES_S):
                self._suspects.append(shard)
            else:
                self._report.failed_shards.append(f"shard {shard}: {reason}")
                self._shards.give_up(shard)
        process.in_hand.clear()

    def _progress(self, process: SlotProcess) -> SlotProgress:
        now, base = process.progress, self._base
        done = base.done + now["images"]
        seconds = time.monotonic() - (self._busy_since or time.monotonic())
        return replace(
            base,
            done=done,
            rate=done / seconds if seconds else 0.0,
            by_status=dict(Counter(base.by_status) + Counter(now["by_status"])),
            stages=add_seconds([base.stages, now["stages"]]),
        )

    def _keep_progress(self, process: SlotProcess) -> None:
        self._base = self._progress(process)
        self._report.stages = self._base.stages


def work(
    store: str, config: SlotConfig, total: int, slot: int, slots: int, on_progress: Callable[[SlotProgress], None]
) -> SlotReport:
    """Drains the open shards of a table for one model, as slot `slot` (from 0) of `slots`; blocks until none is left to
    take.

    `total`: images open when the run began. Raises ModelError when the model cannot be loaded, Stopped after `stop()`.
    """
    start = time.monotonic()
    report = SlotReport(slot)
    shards = ShardQueue(Table(store, config.table), config.model, slot, slots)
    Supervisor(shards, config, report, on_progress, total).run()
    report.seconds = time.monotonic() - start
    return report
