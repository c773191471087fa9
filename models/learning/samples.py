"""The images and targets of one split, and their pixels, decoded once where memory allows."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Rejected, UsageError
from models.imaging.geometry import Geometry, ResizeRule
from models.imaging.prepare import Limits, Preparer
from models.learning.augment import Augmentation, Mixing
from models.learning.order import epoch_order

NEIGHBOURS = 64  # images of an epoch before each one, among which those are that it may be mixed with


@dataclass(frozen=True)
class Samples:
    """One split. It travels between processes, and so must `read`."""

    names: Sequence[str]  # URIs, for people
    targets: Sequence[Any]
    read: Callable[[int], bytes]  # the image file by index, from any thread
    rule: ResizeRule  # of the network's input, which is also that of validation
    augmentation: Augmentation | None = None
    groups: Sequence[int] | None = None  # the class of each image, to draw all equally often
    repeats: Sequence[float] | None = None  # where images show several classes: see models.learning.order
    # A target moved with its image by a resize, into an input of that height and width.
    placed: Callable[[Any, Geometry, tuple[int, int]], Any] | None = None
    limits: Limits | None = None
    # Images of another data set, one of which is shown beside each of these, as the pair's target: which one is chance.
    beside: "Samples | None" = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def prepared_rule(self) -> ResizeRule:
        """How images are resized before they are varied."""
        return self.augmentation.training_rule if self.augmentation is not None else self.rule

    def order(self, seed: int, epoch: int, balance: bool) -> NDArray[np.int64]:
        """The images of one epoch, by index; balance: rare classes more often."""
        return epoch_order(len(self), seed, epoch, *((self.groups, self.repeats) if balance else ()))

    def order_beside(self, seed: int, epoch: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What stands beside the images of one epoch: `count` indices of `beside`, and how often each was shown before.

        Every image of `beside` is shown before one is shown again, over the bounds of epochs.
        """
        assert self.beside is not None
        places = np.arange(epoch * count, (epoch + 1) * count)
        rounds, places = np.divmod(places, len(self.beside))
        orders = {number: self.beside.order(seed + 1, number, False) for number in np.unique(rounds).tolist()}
        return np.array([orders[k][i] for k, i in zip(rounds.tolist(), places.tolist(), strict=True)], np.int64), rounds


class UndecodableImage(UsageError):
    """An image of the data set that could be decoded once, and cannot be now."""


_Prepared = tuple[NDArray[np.uint8], Geometry]


class PreparedImages:
    """Pixels by index, from memory where they fit into `budget_bytes`, else decoded again. Thread-safe."""

    def __init__(self, samples: Samples, budget_bytes: int):
        self.samples = samples
        rule = samples.prepared_rule
        self._shape = (rule.height, rule.width, 3)
        self._room = max(0, budget_bytes // (rule.height * rule.width * 3))  # images that may be kept
        # Where not all can be kept, some of the room is for those that the next images may be mixed with.
        is_mixing = self._room < len(samples) and isinstance(samples.augmentation, Mixing)
        self._recent_room = min(self._room, 3 * NEIGHBOURS) if is_mixing else 0
        self._room -= self._recent_room
        self._kept: dict[int, _Prepared] = {}
        self._recent: OrderedDict[int, _Prepared] = OrderedDict()
        self._turn = threading.Lock()
        self._of_thread = threading.local()

    def get(self, index: int, padded: bool = True) -> tuple[NDArray[np.uint8], Any]:
        """Pixels [height, width, 3] by `prepared_rule`, not to be changed, and the target as it lies in them.

        padded: with the padding of a letterbox. Raises UndecodableImage that names the image, and whatever `read`
        raises.
        """
        pixels, geometry = self._kept.get(index) or self._seen_lately(index) or self._prepared(index)
        self._keep(index, (pixels, geometry))
        target, placed = self.samples.targets[index], self.samples.placed
        if placed is not None:
            # Placed anew each time: masks of objects take many times the memory of their image.
            target = placed(target, geometry, self._shape[:2])
        if not padded:
            rows, columns = map(len, geometry.sources_yx(self._shape[:2]))
            pixels = pixels[:rows, :columns]
        return pixels, target

    def _seen_lately(self, index: int) -> _Prepared | None:
        with self._turn:
            return self._recent.get(index)

    def _keep(self, index: int, prepared: _Prepared) -> None:
        with self._turn:
            if index in self._kept:
                return
            if len(self._kept) < self._room:
                self._kept[index] = prepared
                return
            self._recent[index] = prepared
            self._recent.move_to_end(index)
            while len(self._recent) > self._recent_room:
                self._recent.popitem(last=False)

    def _prepared(self, index: int) -> _Prepared:
        samples = self.samples
        if not hasattr(self._of_thread, "preparer"):
            self._of_thread.preparer = Preparer(samples.prepared_rule, samples.limits)
        pixels = np.empty(self._shape, np.uint8)
        try:
            return pixels, self._of_thread.preparer.prepare(samples.read(index), pixels)
        except Rejected as rejected:
            raise UndecodableImage(
                f"{samples.names[index]} can no longer be decoded ({rejected.status}: {rejected.reason}): "
                "ingest the data set again"
            ) from None


def memory_budget(share: float) -> int:
    """Bytes: a share of the memory that is free now, as far as the system tells, else of all there is."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # a container may have less than its machine
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        pass
    return max(0, int(free * share))
