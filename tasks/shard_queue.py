"""The open shards of a table, in the order in which one of several slots should take them."""

import random
import threading
import time
from collections.abc import Collection

from tasks.table import Shard, Table

_taken: set[tuple[str, str, str, Shard]] = set()  # shards in hand of any slot of this process
_taken_lock = threading.Lock()


class ShardQueue:
    """The open shards in the order of one slot: its share of the run's own plan, the other slots' shares from the far
    end, then older plans from a random place on, since another run may be going through those from the first.
    """

    def __init__(
        self,
        table: Table,
        model: str,
        plan: int | None,
        slot: int,
        slots: int,
        plans: Collection[int] | None = None,
    ):
        """`plan`: the one that this run has written, if any; `slot` counts from 0; `plans`: leave all others alone."""
        self._table = table
        self._model = model
        self._plan = plan
        self._plans = plans
        self._slot = slot
        self._slots = slots
        self._order = self._open()
        self._not_before: dict[Shard, float] = {}
        self._given_up: set[Shard] = set()

    def _open(self) -> list[Shard]:
        shards = sorted(self._table.open_shards(self._model, self._plans))
        own = [shard for shard in shards if shard.plan == self._plan]
        start = self._slot * len(own) // self._slots
        end = (self._slot + 1) * len(own) // self._slots
        others = [shard for shard in shards if shard.plan != self._plan]
        first = random.randrange(len(others)) if others else 0
        return own[start:end] + (own[end:] + own[:start])[::-1] + others[first:] + others[:first]

    def _key(self, shard: Shard) -> tuple[str, str, str, Shard]:
        return (self._table.store, self._table.name, self._model, shard)

    def take(self) -> Shard | None:
        """The next shard to compute; None when there is none to take now."""
        for shard in list(self._order):
            if time.monotonic() < self._not_before.get(shard, 0) or not self._reserve(shard):
                continue
            try:
                is_open = not self._table.storage.exists(self._table.part_uri(self._model, shard))
            except BaseException:
                self.done(shard)
                raise
            self._order.remove(shard)
            if is_open:
                return shard
            self.done(shard)
        return None

    def _reserve(self, shard: Shard) -> bool:
        """False while another slot of this process has the shard in hand."""
        with _taken_lock:
            free = self._key(shard) not in _taken
            _taken.add(self._key(shard))
        return free

    def done(self, shard: Shard) -> None:
        """The shard is committed, by whomever."""
        with _taken_lock:
            _taken.discard(self._key(shard))

    def put_back(self, shard: Shard, pause_s: float = 0.0) -> None:
        """The shard is open again; any slot may take it, this one only after a pause."""
        self._not_before[shard] = time.monotonic() + pause_s
        self._order.append(shard)
        self.done(shard)

    def give_up(self, shard: Shard) -> None:
        """The shard stays open, and this slot does not try it again."""
        self._given_up.add(shard)
        self.done(shard)

    def refill(self) -> None:
        """Looks again at what is open: shards of slots that died, and of other runs."""
        self._order = [shard for shard in self._open() if shard not in self._given_up]

    def is_pausing(self) -> bool:
        """Whether a shard that was put back is still to be tried."""
        return any(shard in self._not_before for shard in self._order)
