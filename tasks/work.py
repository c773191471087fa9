"""One slot's share of the work: a child process computes the shards, this side hands them out and outlives the child.

A shard that fails is tried again after a pause, and left open in the end. When the process dies, the shards it had in
hand are computed once more with every image isolated, so that one poisonous image costs one row. A process that falls
silent is ended like a dead one.
"""

import logging
import os
import queue
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.errors import ModelError, PixelmillError, StorageError
from tasks.shard_queue import ShardQueue
from tasks.slot import SlotConfig
from tasks.slot_process import SlotProcess, cool_down, take_warm
from tasks.slot_report import SlotProgress, SlotReport, add_seconds
from tasks.table import Shard, Table

log = logging.getLogger("pixelmill")

SHARDS_AHEAD = 2  # given to a slot at once: one to compute, one to read ahead
PAUSES_S = (2.0, 10.0, 30.0)  # before a failed shard, or a store that does not answer, is tried again
SILENCE_S = 600.0  # a slot that reports nothing for so long is ended
STRIKES = 2  # shards given up in a row, after which the slot does not try the rest
STARTS = 2  # times that a process may die before it has loaded the model


class Stopped(PixelmillError):
    """The run was asked to end early; run the same command again to go on."""

    exit_code = 130


def cores() -> int:
    """The cores this process may use: its affinity, less a container's quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(available, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return available


class Supervisor:
    """Runs the process of one slot, again and again if need be, until no shard is left that it can take."""

    def __init__(
        self,
        shards: ShardQueue,
        config: SlotConfig,
        report: SlotReport,
        on_progress: Callable[[SlotProgress], None],
        total: int,
        is_wanted: Callable[[], bool] = lambda: True,
    ):
        self._shards = shards
        self._config = config
        self._report = report
        self._on_progress = on_progress
        self._is_wanted = is_wanted
        self._failures: Counter[Shard] = Counter()
        self._suspects: list[Shard] = []  # in hand when a process died
        self._poison: dict[Shard, dict[int, str]] = {}
        self._false_starts = 0
        self._strikes = 0  # shards given up since the last commit
        self._outages = 0  # times in a row that the store did not answer
        self._ask_again_at = 0.0
        self._is_giving_up = False
        self._is_stopped = False
        self._base = SlotProgress(report.slot, 0, total, 0.0, {}, {})  # what earlier processes of this slot did
        self._busy_since: float | None = None

    def stop(self) -> None:
        """Ends `run` soon, from another thread; it raises Stopped."""
        self._is_stopped = True

    def run(self) -> None:
        """Works until nothing is left to take. Raises ModelError when the model cannot be loaded at all."""
        isolated = replace(self._config, isolated=True)
        while True:
            while self._run_process(self._config, self._next_shard, self._is_pausing):
                pass
            if not self._suspects or self._is_giving_up:
                return
            while self._suspects and not self._is_giving_up:
                self._run_process(isolated, self._next_suspect, lambda: False)

    def _next_shard(self, is_idle: bool) -> Shard | None:
        """The next shard, or None; a store that does not answer is asked again after a pause, and in the end raises."""
        if time.monotonic() < self._ask_again_at:
            return None
        try:
            shard = self._shards.take()
            if shard is None and is_idle:
                self._shards.refill()
                shard = self._shards.take()
        except StorageError as error:
            if self._outages == len(PAUSES_S):
                raise
            log.warning("the store does not answer, next try in %.0f s: %s", PAUSES_S[self._outages], error)
            self._ask_again_at = time.monotonic() + PAUSES_S[self._outages]
            self._outages += 1
            return None
        self._outages = 0
        return shard

    def _is_pausing(self) -> bool:
        return self._outages > 0 or self._shards.is_pausing()

    def _next_suspect(self, is_idle: bool) -> Shard | None:
        return self._suspects.pop(0) if self._suspects else None

    def _run_process(
        self, config: SlotConfig, next_shard: Callable[[bool], Shard | None], is_pausing: Callable[[], bool]
    ) -> bool:
        """One process from start to end; False when it ended because nothing was left for it to take."""
        first = None if self._is_giving_up else next_shard(True)
        if first is None and (self._is_giving_up or not is_pausing()):
            return False
        process = take_warm()
        process.configure(config)
        last_event = time.monotonic()
        finishing = False
        try:
            if first is not None:
                process.give(first, self._poison.get(first))
            while True:
                if self._is_giving_up:
                    return False
                if self._is_stopped or not self._is_wanted():
                    raise Stopped("stopped; run the same command again to go on")
                while not finishing and len(process.in_hand) < (1 if config.isolated else SHARDS_AHEAD):
                    shard = next_shard(not process.in_hand)
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
                    if finishing and not process.in_hand:
                        return False
                    self._bury(process, None)
                    return True
                self._hear(process, event)
        finally:
            process.end()
            self._keep_progress(process)
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
            self._strikes = 0
            self._report.shards += 1
            self._report.rows += sum(event["statistics"]["by_status"].values())
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
            self._strikes += 1
            if self._strikes >= STRIKES:
                self._report.failed_shards.append("the storage seems to be away: the other open shards were not tried")
                self._is_giving_up = True

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
        """What the process had not committed when it ended is open again."""
        self._report.stages = add_seconds([self._base.stages, process.progress["stages"]])
        self._base = replace(
            self._base,
            done=self._report.rows,
            by_status=dict(self._report.by_status),
            stages=self._report.stages,
        )


_at_work: set[Supervisor] = set()


def stop() -> None:
    """Makes every slot of this process end soon; their uncommitted shards stay open."""
    for supervisor in list(_at_work):
        supervisor.stop()
    cool_down()


def work(
    config: SlotConfig,
    plan: int | None,
    total: int,
    slot: int,
    slots: int,
    on_progress: Callable[[SlotProgress], None],
    plans: Collection[int] | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> SlotReport:
    """Drains the open shards of a table for one model, as slot `slot` (from 0) of `slots`; blocks until it is done.

    `plan`: the plan that this run has written, if any; `total`: images open when it began; `plans`: those whose shards
    it may take, by default all; `is_wanted` is asked several times a second. Raises ModelError when the model cannot be
    loaded, Stopped after `stop()` or when it is not wanted any more.
    """
    start = time.monotonic()
    report = SlotReport(slot)
    shards = ShardQueue(Table(config.store, config.table), config.model, plan, slot, slots, plans)
    supervisor = Supervisor(shards, config, report, on_progress, total, is_wanted)
    _at_work.add(supervisor)
    try:
        supervisor.run()
    finally:
        _at_work.discard(supervisor)
    report.seconds = time.monotonic() - start
    if report.rows:
        report.stages.setdefault("wait", 0.0)  # it never had to
    return report
