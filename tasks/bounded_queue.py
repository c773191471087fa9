"""A queue between threads that is bounded by items and by bytes, and that can be finished or abandoned."""

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Finished(Exception):
    """No item is left and none will come, or the queue was abandoned."""


class BoundedQueue(Generic[Item]):
    """First in, first out. An item larger than `max_bytes` still passes, alone."""

    def __init__(self, max_items: int, max_bytes: int | None = None):
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._items: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self._finished = False
        self._abandoned = False
        lock = threading.Lock()
        self._room = threading.Condition(lock)
        self._arrival = threading.Condition(lock)

    def put(self, item: Item, num_bytes: int = 0) -> None:
        """Waits for room. Raises Finished when the queue was abandoned."""
        with self._room:
            while not self._abandoned and self._items and self._is_full(num_bytes):
                self._room.wait()
            if self._abandoned:
                raise Finished
            self._items.append((item, num_bytes))
            self._bytes += num_bytes
            self._arrival.notify()

    def _is_full(self, num_bytes: int) -> bool:
        too_many = len(self._items) >= self._max_items
        return too_many or (self._max_bytes is not None and self._bytes + num_bytes > self._max_bytes)

    def get(self, timeout_s: float | None = None) -> Item | None:
        """The next item; None when none came within `timeout_s`. Raises Finished at the end."""
        with self._arrival:
            while not self._items and not self._finished and not self._abandoned:
                if not self._arrival.wait(timeout_s):
                    return None
            if self._abandoned or not self._items:
                raise Finished
            item, num_bytes = self._items.popleft()
            self._bytes -= num_bytes
            self._room.notify_all()
            return item

    def finish(self) -> None:
        """No more items will be put; those inside can still be taken."""
        with self._arrival:
            self._finished = True
            self._arrival.notify_all()

    def abandon(self) -> None:
        """Drops all items and wakes everyone who waits."""
        with self._arrival:
            self._abandoned = True
            self._items.clear()
            self._arrival.notify_all()
            self._room.notify_all()
