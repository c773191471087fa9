"""Batches of images, prepared and varied by threads ahead of the network."""

import contextlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.learning.augment import Augmentation, Changing, Mixing, image_seed
from models.learning.learner import Learner
from models.learning.order import updates
from models.learning.samples import NEIGHBOURS, PreparedImages, Samples, UndecodableImage

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


class _Wanted(NamedTuple):
    """One image of a batch, by index, and how it is varied."""

    image: int
    seed: int = 0
    partners: Sequence[int] = ()  # indices of the images that it is mixed with
    beside: int = -1  # index of the image of the other data set that is its target
    beside_seed: int = 0


class ImageBatches:
    """The batches of a split as images, in a training of so many epochs. Close it to end its threads."""

    def __init__(
        self,
        learner: Learner,
        samples: Samples,
        device: torch.device,
        seed: int,
        threads: int,
        budget_bytes: int,
        epochs: int = 1,
    ):
        self.learner, self.samples, self.device, self.seed, self.epochs = learner, samples, device, seed, epochs
        beside = samples.beside
        share = len(samples) / (len(samples) + len(beside)) if beside is not None else 1.0
        self._images = PreparedImages(samples, int(budget_bytes * share))
        self._beside = PreparedImages(beside, int(budget_bytes * (1 - share))) if beside is not None else None
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
        order = self.samples.order(self.seed, epoch, balance)
        augmentation = self.samples.augmentation
        if isinstance(augmentation, Changing):
            augmentation = augmentation.at_epoch(epoch, self.epochs)
        variations = np.zeros(len(order), np.uint64)
        times: Counter[int] = Counter()
        for position, index in enumerate(order.tolist()):
            # What balancing draws again is varied again.
            variations[position] = image_seed(self.seed, epoch, index + times[index] * len(self.samples))
            times[index] += 1
        beside = self._beside_of(epoch, len(order))

        def wanted(position: int) -> _Wanted:
            seed = int(variations[position])
            if beside is not None:
                return _Wanted(int(order[position]), seed, (), *beside[position])
            if not isinstance(augmentation, Mixing):
                return _Wanted(int(order[position]), seed)
            # Those that were drawn just before are as random as any, and still in memory where not all images fit.
            numbers = augmentation.partners(seed, min(len(order), NEIGHBOURS))
            partners = [int(order[(position - 1 - number) % len(order)]) for number in numbers]
            return _Wanted(int(order[position]), seed, partners)

        plan = updates(order, batch_size, accumulate, part.rank, part.ranks)
        batches = ([wanted(position) for position in positions.tolist()] for update in plan for positions in update)
        stream = self._stream(batches, augmentation)
        with contextlib.closing(stream):
            for update in plan:
                yield [next(stream) for _ in update]

    def view(self, view: int, indices: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """Given images, varied for the `view`-th time, in the order of `indices` (one array per batch)."""
        seeds = ([_Wanted(index, image_seed(self.seed, view, index)) for index in batch.tolist()] for batch in indices)
        return self._stream(seeds, self.samples.augmentation)

    def plain(self, batch_size: int) -> Generator[Batch]:
        """All images in order, not varied; beside them those of the other data set in order, again and again."""
        count = len(self.samples)
        others = len(self.samples.beside) if self.samples.beside is not None else 0
        return self._stream(
            (
                [
                    _Wanted(index, beside=index % others if others else -1)
                    for index in range(start, min(start + batch_size, count))
                ]
                for start in range(0, count, batch_size)
            ),
            None,
        )

    def _beside_of(self, epoch: int, count: int) -> list[tuple[int, int]] | None:
        """The index of what stands beside each image of an epoch, and the seed by which it is varied."""
        if self.samples.beside is None:
            return None
        indices, rounds = self.samples.order_beside(self.seed, epoch, count)
        # Images of the one data set are not varied as those of the other of the same number are.
        return [
            (index, image_seed(self.seed + 1, number, index))
            for index, number in zip(indices.tolist(), rounds.tolist(), strict=True)
        ]

    def _stream(self, batches: Iterable[Sequence[_Wanted]], augmentation: Augmentation | None) -> Generator[Batch]:
        waiting: deque[tuple[NDArray[np.int64], list[Future]]] = deque()
        try:
            for batch in batches:
                futures = [self._pool.submit(self._sample, wanted, augmentation) for wanted in batch]
                waiting.append((np.array([wanted.image for wanted in batch]), futures))
                if len(waiting) > _BATCHES_AHEAD:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _sample(self, wanted: _Wanted, augmentation: Augmentation | None) -> tuple[Tensor, Any]:
        if isinstance(augmentation, Mixing):
            (image, target), *partners = (self._image(index, False) for index in (wanted.image, *wanted.partners))
            image, target = augmentation(image, target, wanted.seed, partners)
        else:
            image, target = self._image(wanted.image, True)
            if augmentation is not None:
                image, target = augmentation(image, target, wanted.seed)
            if self._beside is not None:
                other = torch.from_numpy(self._beside.get(wanted.beside)[0]).permute(2, 0, 1)  # [3, rows, columns]
                if augmentation is not None:
                    other, _ = augmentation(other, None, wanted.beside_seed)
                target = other.permute(1, 2, 0)
        return image.permute(1, 2, 0), target  # [height, width, 3]

    def _image(self, index: int, padded: bool) -> tuple[Tensor, Any]:
        """Prepared, [3, rows, columns], and its target."""
        pixels, target = self._images.get(index, padded)
        return torch.from_numpy(pixels).permute(2, 0, 1), target

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
