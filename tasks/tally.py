"""The counts of a running pipeline."""

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from models.records import Status


@dataclass
class Tally:
    """Images by status and busy seconds by stage; written by many threads, read by another to show progress."""

    images: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # busy, by stage, all threads
    lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, status: Status) -> None:
        with self.lock:
            self.images += 1
            self.by_status[str(status)] += 1

    def forget(self, by_status: Mapping[str, int]) -> None:
        """The images of a failed shard are open again."""
        with self.lock:
            self.images -= sum(by_status.values())
            self.by_status.subtract(by_status)

    def spend(self, stage: str, seconds: float) -> None:
        with self.lock:
            self.seconds[stage] += seconds
