"""What a run tells of itself while it works: images listed, how far each slot is, how far any other stage is."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from models.progress import Step

if TYPE_CHECKING:
    from tasks.slot_report import SlotProgress

log = logging.getLogger("pixelmill")


class Watch(Protocol):
    """Hears of the progress of a run, from any thread."""

    def listed(self, images: int) -> None:
        """So many images have been listed so far."""

    def progress(self, progress: "SlotProgress") -> None:
        """How far one slot is."""

    def step(self, step: Step) -> None:
        """How far one stage of any other work is."""


class Overall:
    """Adds up what the slots report."""

    def __init__(self) -> None:
        self.slots: dict[int, SlotProgress] = {}

    def add(self, progress: "SlotProgress") -> None:
        """Takes the latest report of one slot."""
        self.slots = self.slots | {progress.slot: progress}  # a new dict: readers are in other threads

    @property
    def done(self) -> int:
        """Images finished in this run."""
        return sum(slot.done for slot in self.slots.values())

    @property
    def total(self) -> int:
        """Images that were open when the run began."""
        return max((slot.total for slot in self.slots.values()), default=0)

    @property
    def rate(self) -> float:
        """Images per second of all slots together."""
        return sum(slot.rate for slot in self.slots.values())

    @property
    def by_status(self) -> Counter[str]:
        """Images finished in this run, by status."""
        return sum((Counter(slot.by_status) for slot in self.slots.values()), Counter())

    def __str__(self) -> str:
        return describe(self.done, self.total, self.rate, self.by_status)


def describe_step(step: Step) -> str:
    """One line: what, how far, and what else is worth seeing."""
    of = f" of {step.total:,}" if step.total is not None else ""
    return " · ".join(filter(None, (f"{step.stage}: {step.done:,}{of}", step.text)))


def describe(done: int, total: int, rate: float, by_status: Counter[str] | dict[str, int]) -> str:
    """One line: how far, how fast, how long still, and what is not ok."""
    parts = [f"{done:,} of {total:,} images"]
    if rate:
        left = timedelta(seconds=round(max(0, total - done) / rate))
        parts += [f"{rate:,.1f} images/s", f"{left} left"]
    parts += [f"{count:,} {status}" for status, count in sorted(by_status.items()) if status != "ok"]
    return " · ".join(parts)


class Lines:
    """A watch that logs a quiet line now and then: for files, pipes and Prefect's logs."""

    def __init__(self, every_s: float = 10.0):
        self._overall = Overall()
        self._seldom = Seldom(every_s)

    def listed(self, images: int) -> None:
        """Logs the number of images listed."""
        self._seldom(lambda: log.info("listed %s images", f"{images:,}"))

    def progress(self, progress: "SlotProgress") -> None:
        """Logs how far all slots are."""
        self._overall.add(progress)
        self._seldom(lambda: log.info("%s", self._overall))

    def step(self, step: Step) -> None:
        """Logs how far the stage is."""
        self._seldom(lambda: log.info("%s", describe_step(step)))


class Seldom:
    """Calls a function at most every so many seconds, and not in the first so many after it was first asked to."""

    def __init__(self, every_s: float):
        self._every_s = every_s
        self._next: float | None = None

    def __call__(self, function: Callable[[], None]) -> None:
        now = time.monotonic()
        if self._next is not None and now >= self._next:
            function()
            self._next = None
        self._next = self._next or now + self._every_s
