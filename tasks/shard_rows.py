"""The rows of one shard while they are computed: they arrive in any order, and leave as one Arrow table in the plan's
order."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa

from models.records import ListedImage, Status, Task, part_schema
from models.runtime.results import result_columns
from tasks.table import Shard


class Outcome(NamedTuple):
    """What became of one image."""

    status: Status
    error: str | None = None
    sha256: str | None = None
    num_bytes: int | None = None
    width: int | None = None
    height: int | None = None
    finding: Any = None


class ShardRows:
    """Collects one Outcome per image of a shard. Thread-safe."""

    def __init__(self, shard: Shard, plan_rows: pa.Table):
        self.shard = shard
        self.images = [
            ListedImage(*row)
            for row in zip(
                *(plan_rows.column(name).to_pylist() for name in ("image", "fingerprint", "bytes")), strict=True
            )
        ]
        self.failure: str | None = None  # set when the shard as a whole cannot be finished now
        self.started = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)  # busy, by stage
        self._plan_rows = plan_rows
        self._outcomes: list[Outcome | None] = [None] * len(self.images)
        self._predicted_at: list[datetime | None] = [None] * len(self.images)
        self._waiting = len(self.images)
        self._lock = threading.Lock()

    def settle(self, index: int, outcome: Outcome) -> bool:
        """Notes the outcome of image `index`; True when it was the last one to wait for."""
        self._outcomes[index] = outcome
        self._predicted_at[index] = datetime.now(UTC)
        return self.drop(1)

    def drop(self, num_images: int) -> bool:
        """Stops waiting for images of a failed shard; True when none is left to wait for."""
        with self._lock:
            self._waiting -= num_images
            return self._waiting == 0

    def fail(self, reason: str) -> None:
        """The shard stays open; the first reason is kept."""
        with self._lock:
            self.failure = self.failure or reason

    def spend(self, stage: str, seconds: float) -> None:
        """Adds busy time to a stage."""
        with self._lock:
            self.seconds[stage] += seconds

    def by_status(self) -> dict[str, int]:
        """How many images ended in each status so far."""
        return dict(Counter(str(outcome.status) for outcome in self._outcomes if outcome is not None))

    def to_arrow(self, task: Task, labels: Sequence[str]) -> pa.Table:
        """All rows, in the columns of `part_schema(task)`. Every image must have been settled."""
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        if len(outcomes) != len(self.images):
            raise AssertionError(f"shard {self.shard}: {len(self.images) - len(outcomes)} images without an outcome")
        schema = part_schema(task)
        columns = {name: self._plan_rows.column(name) for name in ("image", "fingerprint", "attempt")}
        columns |= {
            "sha256": [outcome.sha256 for outcome in outcomes],
            "bytes": [outcome.num_bytes for outcome in outcomes],
            "width": [outcome.width for outcome in outcomes],
            "height": [outcome.height for outcome in outcomes],
            "status": [str(outcome.status) for outcome in outcomes],
            "error": [outcome.error for outcome in outcomes],
            **result_columns(task, [outcome.finding for outcome in outcomes], labels),
            "predicted_at": self._predicted_at,
        }
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)
