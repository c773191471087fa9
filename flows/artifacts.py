"""What Prefect's pages show of a run: a progress bar per slot or step, updated in place, and tables at the end.

Artifacts are for people. When the server does not take one, the run goes on.
"""

import base64
import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType

from flows.figures import class_rows, confusion_rows, single_figures
from flows.watch import Seldom, describe, describe_step
from models.progress import Step
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


class _Bar:
    """A progress artifact, made with its first update."""

    def __init__(self, key: str, title: str):
        self._key = artifact_key(key)
        self._title = title
        self._id: UUID | None = None

    @_forgiving
    def put(self, percent: float, text: str) -> None:
        """Shows the share that is done, 0 to 100, and a line of text."""
        description = f"{self._title}: {text}"
        if self._id is None:
            self._id = cast(UUID, create_progress_artifact(percent, key=self._key, description=description))
        else:
            update_progress_artifact(self._id, min(100.0, percent), description)


class SlotArtifact:
    """The progress bar of one slot: its share of all images that were open."""

    def __init__(self, table: str, slot: int, slots: int):
        self._bar = _Bar(f"{table}-slot-{slot + 1}", f"slot {slot + 1} of {slots}, {table}")
        self._seldom = Seldom(UPDATE_EVERY_S)
        self._bar.put(0.0, "loading the model")

    def hear(self, progress: SlotProgress) -> None:
        """Shows how far the slot is, every few seconds."""
        text = describe(progress.done, progress.total, progress.rate, progress.by_status)
        self._seldom(lambda: self._bar.put(100 * progress.done / max(1, progress.total), text))

    def finish(self, report: SlotReport) -> None:
        """Shows what the slot did. The bar is full: others may have done what it did not."""
        rate = report.rows / report.seconds if report.seconds else 0.0
        self._bar.put(
            100.0, f"{report.rows:,} images in {report.shards} shards, {rate:,.1f} images/s on {report.engine}"
        )


@_forgiving
def slot_updates(flow_runs: Sequence[UUID | str]) -> tuple[Any, ...]:
    """When the progress bars of these flow runs were last changed; None when the server does not say."""
    bars = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(str(run)) for run in flow_runs]),
        type=ArtifactFilterType(any_=["progress"]),
    )
    with get_client(sync_client=True) as client:
        return tuple(sorted((str(bar.id), bar.updated) for bar in client.read_artifacts(artifact_filter=bars)))


class StepArtifact:
    """The progress bar of one step; each of its stages fills it anew."""

    def __init__(self, name: str):
        self._bar = _Bar(f"{name}-progress", name)
        self._seldom = Seldom(UPDATE_EVERY_S)

    def hear(self, step: Step) -> None:
        """Shows how far the step is, every few seconds."""
        self._seldom(lambda: self._bar.put(100 * step.done / (step.total or max(1, step.done)), describe_step(step)))

    def finish(self) -> None:
        """Fills the bar."""
        self._bar.put(100.0, "done")


class TableArtifact:
    """A table that grows: made with its first rows, then updated in place."""

    def __init__(self, key: str, title: str):
        self._key = artifact_key(key)
        self._title = title
        self._id: UUID | None = None

    @_forgiving
    def put(self, rows: list[dict[str, Any]]) -> None:
        """Shows these rows, which have the same keys."""
        if self._id is None:
            self._id = cast(UUID, create_table_artifact(table=rows, key=self._key, description=self._title))
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._id, ArtifactUpdate(data=json.dumps(rows)))


class ImageArtifact:
    """A picture that changes: made with the first one, then updated in place."""

    def __init__(self, key: str, title: str):
        self._key = artifact_key(key)
        self._title = title
        self._id: UUID | None = None

    @_forgiving
    def put(self, png: bytes, text: str) -> None:
        """Shows the picture, which travels within its own address, so that no page needs to reach the store."""
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        description = f"{self._title}, {text}"
        if self._id is None:
            self._id = cast(UUID, create_image_artifact(url, key=self._key, description=description))
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._id, ArtifactUpdate(data=url, description=description))


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
    put_facts(f"{summary.table}-summary", f"{summary.table} ← {summary.model}", counts)


def put_facts(key: str, title: str, facts: dict[str, Any]) -> None:
    """A table of two columns: what, and its value."""
    TableArtifact(key, title).put([{"what": what, "value": value} for what, value in facts.items()])


def put_metrics(key: str, title: str, metrics: dict[str, Any]) -> None:
    """The single figures among metrics, each by its path: "val top1"; of one split also a table of its classes, and one
    of what was taken for what."""
    put_facts(key, title, single_figures(metrics))
    for what, rows in (("classes", class_rows(metrics)), ("confusion", confusion_rows(metrics))):
        if rows:
            TableArtifact(f"{key}-{what}", f"{title}: {what}").put(rows)


def artifact_key(text: str) -> str:
    """The text in the only characters that a key may have: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
