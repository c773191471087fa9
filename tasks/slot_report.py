"""What a slot tells of itself: how far it is while it works, and what it has done at the end."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SlotProgress:
    """How far one slot is."""

    slot: int
    done: int  # images finished by this slot in this run
    total: int  # images open when the run began, for all slots
    rate: float  # images/s of this slot since its model was loaded
    by_status: dict[str, int]
    stages: dict[str, float]  # busy seconds, summed over threads: read, decode, infer, write; wait: idle cores


@dataclass
class SlotReport:
    """What one slot did."""

    slot: int
    shards: int = 0
    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)
    failed_shards: list[str] = field(default_factory=list)  # one line each
    seconds: float = 0.0
    working_seconds: float = 0.0  # of these, from the loaded model to the last part
    engine: str = ""


def add_seconds(stages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Busy seconds by stage, summed."""
    total: dict[str, float] = {}
    for seconds in stages:
        for stage, busy in seconds.items():
            total[stage] = total.get(stage, 0.0) + busy
    return total
