"""How fast a table was filled in the past, read off the footers of its parts."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from models.errors import StorageError
from tasks.table import PlanHead, Table

_PARTS_LOOKED_AT = 256
_REQUESTS_AT_ONCE = 16


def past_rate(table: Table, model: str) -> float | None:
    """Images per second while anything was at work, of the newest parts; of other models when this one has none."""
    if not table.exists():
        return None
    return _rate(table, table.heads(model)) or _rate(table, table.heads())


def _rate(table: Table, heads: Sequence[PlanHead]) -> float | None:
    present = {name: table.part_names(name) for name in {head.model for head in heads}}
    newest = [
        table.part_uri(head.model, shard)
        for head in sorted(heads, key=lambda head: head.number, reverse=True)
        for shard in reversed(head.shards)
        if shard.file_name in present[head.model]
    ][:_PARTS_LOOKED_AT]

    def times_of(uri: str) -> tuple[int, datetime, datetime] | None:
        try:
            return table.part_times(uri)
        except (StorageError, FileNotFoundError):  # a damaged part is for verify to name
            return None

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
        times = [found for found in threads.map(times_of, newest) if found is not None]
    seconds = covered_seconds((first, last) for _, first, last in times)
    return sum(rows for rows, _, _ in times) / seconds if seconds else None


def covered_seconds(spans: Iterable[tuple[datetime, datetime]]) -> float:
    """How long any of the spans lasted: pauses between runs do not count, nor does time twice that slots shared."""
    seconds, end = 0.0, None
    for first, last in sorted(spans):
        start = first if end is None else max(first, end)
        seconds += max(0.0, (last - start).total_seconds())
        end = last if end is None else max(end, last)
    return seconds
