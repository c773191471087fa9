"""Slots that run elsewhere, looked after from here until the work is done or nobody is left to do it.

What they have done is read off the store, and so is whether all is done: a slot that dies, never starts or cannot
report costs its own work only. What the engine says of a slot decides no more than how long to wait for it.
"""

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Protocol

from flows.runners.orders import SlotOrder, our_version
from flows.watch import Seldom
from models.errors import PixelmillError, StorageError
from models.settings.predict import PredictSettings
from tasks.arrivals import Arrivals
from tasks.predict import Planned
from tasks.slot_report import SlotProgress, SlotReport
from tasks.storage import normalise
from tasks.table import Table

log = logging.getLogger("pixelmill")

POLL_S = 1.0  # between two questions to the engine
LOOK_S = 3.0  # between two looks at the store, or longer where they take long
START_S = 600.0  # until the first slot shows a sign of life: machines may have to be started
SILENCE_S = 900.0  # without any sign of life, after which slots are given up: longer than a slot's own patience
LAST_WORDS_S = 20.0  # for slots to end by themselves when nothing is open any more


class Crew(Protocol):
    """The slots of one run on one engine."""

    def start(self, orders: list[SlotOrder]) -> None:
        """Starts a slot for each order, and returns at once. Raises PixelmillError when the engine takes none."""

    def ended(self) -> dict[int, SlotReport | PixelmillError | None]:
        """The slots that have ended, with their report if it comes back, or what ended them."""

    def signs(self) -> Hashable:
        """Changes as long as a slot lives."""

    def dismiss(self) -> None:
        """Ends the slots that have not ended. Never raises."""


@dataclass(frozen=True)
class Ended:
    """A slot that is over; see `flows.order.Running`."""

    outcome: SlotReport | PixelmillError

    def result(self) -> SlotReport:
        """Its report; raises what ended it."""
        if isinstance(self.outcome, PixelmillError):
            raise self.outcome
        return self.outcome


def work_elsewhere(
    crew: Crew,
    store: str,
    settings: PredictSettings,
    planned: Planned,
    slots: int,
    run: str,
    hear: Callable[[SlotProgress], None],
) -> list[Ended]:
    """Lets a crew drain the open shards; returns when all slots have ended or nothing is to be expected of them.

    `run` names this run in its parts. An interruption ends the slots before it goes on.
    """
    if not slots:
        return []
    store = normalise(store)
    arrivals = Arrivals(Table(store, planned.table), planned.model, run, planned.plans)
    start = time.monotonic()
    try:
        crew.start([SlotOrder(store, settings, planned, slot, slots, run, our_version()) for slot in range(slots)])
        ended, problem = _wait(crew, arrivals, slots, hear)
    except BaseException:
        crew.dismiss()
        raise
    seconds = time.monotonic() - start
    return [_end(slot, ended.get(slot), slot in ended, arrivals, problem, seconds) for slot in range(slots)]


def _wait(
    crew: Crew, arrivals: Arrivals, slots: int, hear: Callable[[SlotProgress], None]
) -> tuple[dict[int, SlotReport | PixelmillError | None], str]:
    """How the slots ended; and for those that did not, what is said of them."""
    start = last_sign = time.monotonic()
    signs: Hashable = None
    has_begun = False
    next_look = 0.0
    complain = Seldom(60.0)
    while True:
        ended = crew.ended()
        now = time.monotonic()
        if now >= next_look or len(ended) == slots:
            try:
                arrivals.look()
            except StorageError as error:
                why = str(error)
                complain(lambda why=why: log.warning("the store does not answer: %s", why))  # type: ignore[misc]
            for slot in range(slots):
                hear(arrivals.progress(slot, now - start))
            next_look = time.monotonic() + max(LOOK_S, 20 * (time.monotonic() - now))
        if len(ended) == slots:
            return ended, ""
        new_signs = (crew.signs(), len(ended), arrivals.parts)
        if new_signs != signs:
            has_begun = has_begun or signs is not None
            signs, last_sign = new_signs, now
        patience = SILENCE_S if has_begun else START_S
        if arrivals.is_complete:
            patience = LAST_WORDS_S
        if now - last_sign > patience:
            crew.dismiss()
            late = f"it did not begin within {patience:.0f} s: is there room for it?"
            return crew.ended(), f"nothing was heard of it for {patience:.0f} s" if has_begun else late
        time.sleep(POLL_S)


def _end(
    slot: int,
    own: SlotReport | PixelmillError | None,
    has_ended: bool,
    arrivals: Arrivals,
    problem: str,
    seconds: float,
) -> Ended:
    """The counts are the store's; what only the slot knows is added where its report came back."""
    seen = replace(arrivals.report(slot), seconds=seconds, working_seconds=seconds)
    if isinstance(own, SlotReport):
        own = replace(own, shards=seen.shards, rows=seen.rows, by_status=seen.by_status)
        return Ended(own if own.engine else replace(own, engine=seen.engine))
    if own is None and (has_ended or arrivals.is_complete):
        return Ended(seen)
    error = own or PixelmillError(problem)
    if seen.rows or arrivals.is_complete:
        log.warning("slot %d: %s", slot + 1, error)
        return Ended(replace(seen, failed_shards=[f"slot {slot + 1}: {error}"]))
    return Ended(error)
