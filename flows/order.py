"""The order of predict, the same with Prefect's tasks as without: plan, then n slots at once, then the summary."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from flows.watch import Watch
from models.errors import PixelmillError
from models.settings import PredictSettings
from tasks import predict as tasks
from tasks.work import stop

log = logging.getLogger("pixelmill")


class Running(Protocol):
    """A slot at work; both concurrent.futures and Prefect have such futures."""

    def result(self) -> tasks.SlotReport:
        """Waits for the slot; raises what it raised."""


@dataclass(frozen=True)
class Steps:
    """How each step is carried out: called plainly, or as a Prefect task."""

    plan: Callable[[str, PredictSettings], tasks.Planned]
    start_work: Callable[[str, PredictSettings, tasks.Planned, int, int], Running]
    summarise: Callable[[str, PredictSettings, tasks.Planned, list[tasks.SlotReport], float], tasks.Summary]


def predict(store: str, settings: PredictSettings, steps: Steps) -> tasks.Summary:
    """Plans, lets the slots drain what is open, and sums up. A slot that fails leaves its shards to the others.

    Raises what planning raises, or the first slot's error when no slot could work at all. Ctrl-C ends the slots first.
    """
    start = time.monotonic()
    try:
        planned = steps.plan(store, settings)
        slots = min(settings.slots, planned.open_shards)
        running = [steps.start_work(store, settings, planned, slot, slots) for slot in range(slots)]
        reports, errors = [], []
        for slot in running:
            try:
                reports.append(slot.result())
            except PixelmillError as error:
                log.warning("a slot failed: %s", error)
                errors.append(error)
    except BaseException:
        stop()
        raise
    if errors and not reports:
        raise errors[0]
    return steps.summarise(store, settings, planned, reports, time.monotonic() - start)


def predict_directly(store: str, settings: PredictSettings, watch: Watch) -> tasks.Summary:
    """The same without Prefect: nothing is recorded."""
    with ThreadPoolExecutor(settings.slots, thread_name_prefix="slot") as threads:
        steps = Steps(
            plan=lambda store, settings: tasks.plan(store, settings, watch.listed),
            start_work=lambda *slot: threads.submit(tasks.work, *slot, watch.progress),
            summarise=tasks.summarise,
        )
        return predict(store, settings, steps)


def problem_of(summary: tasks.Summary) -> str:
    """One line when shards were left open, else nothing."""
    if not summary.open_shards:
        return ""
    reasons = "; ".join(summary.failures[:3]) or "another run may be working on them"
    return f"{summary.open_shards} shards of {summary.table} are still open, run the same command again: {reasons}"
