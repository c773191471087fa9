"""Batches of images, prepared and varied by threads ahead of the network."""

import contextlib
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.learning.augment import image_seed
from models.learning.learner import Learner
from models.learning.order import epoch_order, updates
from models.learning.samples import PreparedImages, Samples, UndecodableImage

_BATCHES_AHEAD = 3
_NAMED = 3  # images that one error names


class Batch(NamedTuple):
    """What the network, or its head, works on at once."""

    indices: NDArray[np.int64]  # of the samples
    inputs: Tensor  # uint8 [batch, height, width, 3], or features [batch, …]; on the network's device
    targets: Any


class Part(NamedTuple):
    """The share of the images that one process trains on."""

    rank: int = 0
    ranks: int = 1


class ImageBatches:
    """The batches of a split as images. Close it to end its threads."""

    def __init__(
        self, learner: Learner, samples: Samples, device: torch.device, seed: int, threads: int, budget_bytes: int
    ):
        self.learner, self.samples, self.device, self.seed = learner, samples, device, seed
        self._images = PreparedImages(samples, budget_bytes)
        torch.get_num_threads()  # the caller's own number is settled before the pool's threads set theirs
        # Each image is small: a pool of single threads is faster than threads that share one image.
        self._pool = ThreadPoolExecutor(threads, "images", initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        """Ends the threads, without waiting for what nobody wants any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def training(
        self, epoch: int, batch_size: int, accumulate: int, balance: bool, part: Part
    ) -> Iterator[list[Batch]]:
        """The updates of one epoch, each a list of batches whose gradients add up."""
        groups = self.samples.groups if balance else None
        order = epoch_order(len(self.samples), self.seed, epoch, groups)
        variations = np.zeros(len(order), np.uint64)
        times: Counter[int] = Counter()
        for position, index in enumerate(order.tolist()):
            # What balancing draws again is varied again.
            variations[position] = image_seed(self.seed, epoch, index + times[index] * len(self.samples))
            times[index] += 1
        plan = updates(order, batch_size, accumulate, part.rank, part.ranks)
        batches = [positions for update in plan for positions in update]
        stream = self._stream([order[batch] for batch in batches], [variations[batch] for batch in batches])
        with contextlib.closing(stream):
            for update in plan:
                yield [next(stream) for _ in update]

    def view(self, view: int, indices: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """Given images, varied for the `view`-th time, in the order of `indices` (one array per batch)."""
        seeds = [[image_seed(self.seed, view, int(index)) for index in batch] for batch in indices]
        return self._stream(indices, seeds)

    def plain(self, batch_size: int) -> Generator[Batch]:
        """All images in order, not varied."""
        starts = range(0, len(self.samples), batch_size)
        return self._stream([np.arange(start, min(start + batch_size, len(self.samples))) for start in starts], None)

    def _stream(
        self, indices: Sequence[NDArray[np.int64]], seeds: Sequence[Sequence[int] | NDArray[np.uint64]] | None
    ) -> Generator[Batch]:
        waiting: deque[tuple[NDArray[np.int64], list[Future]]] = deque()
        try:
            for number, batch in enumerate(indices):
                of_batch: Any = seeds[number] if seeds is not None else [None] * len(batch)
                futures = [
                    self._pool.submit(self._sample, int(index), seed)
                    for index, seed in zip(batch, of_batch, strict=True)
                ]
                waiting.append((batch, futures))
                if len(waiting) > _BATCHES_AHEAD:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _sample(self, index: int, seed: int | None) -> tuple[Tensor, Any]:
        pixels, target = self._images.get(index)
        image = torch.from_numpy(pixels)  # [height, width, 3]
        if seed is None or self.samples.augmentation is None:
            return image, target
        varied, target = self.samples.augmentation(image.permute(2, 0, 1), target, int(seed))
        return varied.permute(1, 2, 0), target

    def _batch(self, indices: NDArray[np.int64], futures: Sequence[Future]) -> Batch:
        undecodable = [e for future in futures if isinstance(e := future.exception(), UndecodableImage)]
        if len(undecodable) > 1:
            more = len(undecodable) - _NAMED
            named = "; ".join(str(e).partition(" can no longer")[0] for e in undecodable[:_NAMED])
            raise UndecodableImage(
                f"{len(undecodable)} images can no longer be decoded: {named}"
                f"{f' and {more} more' if more > 0 else ''}: ingest the data set again"
            )
        images, targets = zip(*(future.result() for future in futures), strict=True)
        inputs = torch.stack(images).contiguous()  # [batch, height, width, 3]
        if self.device.type == "cuda":
            inputs = inputs.pin_memory().to(self.device, non_blocking=True)
        return Batch(indices, inputs, to_device(self.learner.collate(targets), self.device))


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dicts, moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
