"""What slots elsewhere have done, read off the store: each part says whose work it is and what is in it.

So a run knows what became of it whatever became of its slots, and shows progress without a way back from them.
"""

from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from models.errors import StorageError, TransientError
from tasks.slot_report import SlotProgress, SlotReport, add_seconds
from tasks.table import Table

READERS = 16  # on an object store a footer is a few round trips


class Arrivals:
    """The parts of one model that appear after it was made."""

    def __init__(self, table: Table, model: str, run: str, plans: Collection[int] | None = None):
        """`run`: what this run's slots note in their parts; `plans`: those whose shards it works on, by default all."""
        self._table = table
        self._model = model
        self._run = run
        open_shards = table.open_shards(model, plans)
        self._known = table.part_names(model)
        self._open = {shard.file_name for shard in open_shards}
        self._total = sum(shard.images for shard in open_shards)
        self._by_slot: defaultdict[int, SlotReport] = defaultdict(lambda: SlotReport(0))

    @property
    def is_complete(self) -> bool:
        """Whether every shard that was open has its part now, whoever wrote it."""
        return self._open <= self._known

    @property
    def parts(self) -> int:
        """How many there are now, old ones too."""
        return len(self._known)

    def look(self) -> None:
        """Reads what has been written since the last look. Raises StorageError."""
        new = sorted(self._table.part_names(self._model) - self._known)
        with ThreadPoolExecutor(READERS) as readers:
            for name, statistics in zip(new, readers.map(self._statistics, new), strict=True):
                self._known.add(name)
                if statistics.get("run") == self._run:  # another run's are in its counts
                    self._add(statistics)

    def _statistics(self, name: str) -> dict[str, Any]:
        try:
            return self._table.part_statistics(self._table.part_uri(self._model, name))
        except TransientError:
            raise
        except StorageError:  # damaged: `verify` says so
            return {}

    def _add(self, statistics: dict[str, Any]) -> None:
        report = self._by_slot[statistics["slot"]]
        report.slot = statistics["slot"]
        report.shards += 1
        report.rows += sum(statistics["by_status"].values())
        report.by_status.update(statistics["by_status"])
        report.stages = add_seconds([report.stages, statistics["stages"]])
        report.engine = statistics["engine"]

    def report(self, slot: int) -> SlotReport:
        """What one slot has written; its times are not known."""
        return self._by_slot.get(slot) or SlotReport(slot)

    def progress(self, slot: int, seconds: float) -> SlotProgress:
        """How far one slot is, `seconds` after it began."""
        report = self.report(slot)
        rate = report.rows / seconds if seconds else 0.0
        return SlotProgress(slot, report.rows, self._total, rate, dict(report.by_status), report.stages)
