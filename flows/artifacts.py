"""What Prefect's pages show of a run: a progress bar per slot, updated in place, and a table at the end.

Artifacts are for people. When the server does not take one, the run goes on.
"""

import functools
import logging
import re
from collections.abc import Callable
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact

from flows.watch import Seldom, describe
from tasks.predict import Summary
from tasks.slot_report import SlotProgress, SlotReport

log = logging.getLogger("pixelmill")

UPDATE_EVERY_S = 3.0  # each update is a request to the server


def _forgiving(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def tried(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            log.debug("Prefect did not take an artifact: %s", error)
            return None

    return tried


class SlotArtifact:
    """The progress bar of one slot: its share of all images that were open."""

    def __init__(self, table: str, slot: int, slots: int):
        self._key = artifact_key(f"{table}-slot-{slot + 1}")
        self._title = f"slot {slot + 1} of {slots}, {table}"
        self._id: UUID | None = None
        self._seldom = Seldom(UPDATE_EVERY_S)
        self._put(0.0, "loading the model")

    def hear(self, progress: SlotProgress) -> None:
        """Shows how far the slot is, every few seconds."""
        text = describe(progress.done, progress.total, progress.rate, progress.by_status)
        self._seldom(lambda: self._put(100 * progress.done / max(1, progress.total), text))

    def finish(self, report: SlotReport) -> None:
        """Shows what the slot did. The bar is full: others may have done what it did not."""
        rate = report.rows / report.seconds if report.seconds else 0.0
        self._put(100.0, f"{report.rows:,} images in {report.shards} shards, {rate:,.1f} images/s on {report.engine}")

    @_forgiving
    def _put(self, percent: float, text: str) -> None:
        description = f"{self._title}: {text}"
        if self._id is None:
            self._id = cast(UUID, create_progress_artifact(percent, key=self._key, description=description))
        else:
            update_progress_artifact(self._id, min(100.0, percent), description)


@_forgiving
def put_summary(summary: Summary) -> None:
    """The table at the end of a run: counts, rates, stages."""
    counts = {
        "listed": summary.listed,
        "new": summary.planned,
        "claimed before": summary.skipped,
        **{f"ignored: {reason}": count for reason, count in summary.ignored.items()},
        "rows written": summary.rows,
        **{f"status: {status}": count for status, count in sorted(summary.by_status.items())},
        "shards written": summary.shards,
        "shards still open": summary.open_shards,
        "seconds": summary.seconds,
        "images per second": summary.images_per_second,
        **{f"busy seconds: {stage}": seconds for stage, seconds in summary.stages.items()},
        "limit": summary.limit,
        "engine": summary.engine,
    }
    table = [{"what": what, "value": value} for what, value in counts.items()]
    title = f"{summary.table} ← {summary.model}"
    create_table_artifact(table=table, key=artifact_key(f"{summary.table}-summary"), description=title)


def artifact_key(text: str) -> str:
    """The text in the only characters that a key may have: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
