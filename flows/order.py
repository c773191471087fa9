"""The order of predict, the same with Prefect's tasks as without: plan, then n slots at once, then the summary.

The same wherever the slots run, too: here, on a cluster, or on a work pool.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from flows.watch import Watch
from models.errors import PixelmillError, UsageError
from models.settings.predict import PredictSettings
from tasks import predict as steps_of
from tasks.predict import Planned, Summary
from tasks.slot_process import cool_down, warm_up
from tasks.slot_report import SlotReport
from tasks.work import stop

log = logging.getLogger("pixelmill")


class Incomplete(PixelmillError):
    """The run ended and shards are still open: they failed, or other runs are working on them."""

    def __init__(self, summary: Summary):
        reasons = "; ".join(summary.failures[:3]) or "another run may be working on them"
        open_shards = f"{summary.open_shards} shards of {summary.table} are still open"
        super().__init__(f"{open_shards}, run the same command again: {reasons}")
        self.summary = summary


class Running(Protocol):
    """A slot at work, or one elsewhere that has ended: a future of concurrent.futures or of Prefect, or like one."""

    def result(self) -> SlotReport:
        """Waits for the slot; raises what it raised."""


StartWork = Callable[[str, PredictSettings, Planned, int], Sequence[Running]]  # so many slots


@dataclass(frozen=True)
class Steps:
    """How each step is carried out: called plainly, or as a Prefect task."""

    plan: Callable[[str, PredictSettings], Planned]
    start_work: StartWork
    summarise: Callable[[str, PredictSettings, Planned, list[SlotReport], float], Summary]


def predict(store: str, settings: PredictSettings, steps: Steps) -> Summary:
    """Plans, lets the slots drain what is open, and sums up. A slot that fails leaves its shards to the others.

    Raises Incomplete when shards are left open, else what planning raised, or the first slot's error when no slot could
    work at all. An interruption ends the slots before it goes on.
    """
    start = time.monotonic()
    if settings.runner == "local":
        warm_up(settings.slots)
    try:
        planned = steps.plan(store, settings)
        slots = min(settings.slots, planned.open_shards)
        running = steps.start_work(store, settings, planned, slots)
        reports: list[SlotReport] = []
        errors: list[PixelmillError] = []
        for slot in running:
            try:
                reports.append(slot.result())
            except PixelmillError as error:
                log.warning("a slot failed: %s", error)
                errors.append(error)
    except BaseException:
        stop()
        raise
    finally:
        cool_down()
    if errors and not reports:
        raise errors[0]
    summary = steps.summarise(store, settings, planned, reports, time.monotonic() - start)
    if summary.open_shards:
        raise Incomplete(summary)
    return summary


def predict_directly(store: str, settings: PredictSettings, watch: Watch) -> Summary:
    """The same without Prefect: nothing is recorded, and all slots are of this machine."""
    if settings.runner != "local":
        raise UsageError(f"--runner {settings.runner} hands slots out through Prefect: leave --direct out")
    with ThreadPoolExecutor(settings.slots, thread_name_prefix="slot") as threads:
        steps = Steps(
            plan=lambda store, settings: steps_of.plan(store, settings, watch.listed),
            start_work=lambda store, settings, planned, slots: [
                threads.submit(steps_of.work, store, settings, planned, slot, slots, watch.progress)
                for slot in range(slots)
            ],
            summarise=steps_of.summarise,
        )
        return predict(store, settings, steps)
