"""What a frozen backbone makes of the images, computed once, so that epochs of the head cost next to nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.errors import UsageError
from models.learning.learner import HeadLearner
from models.learning.loading import Batch, ImageBatches, Part, to_device
from models.learning.order import updates
from models.learning.whole_files import write_whole
from models.progress import Report, Step

BLOCK_IMAGES = 512  # in one file; a killed run computes at most so many again
BATCH_IMAGES = 64


class FeatureBatches:
    """The batches of a split as features: the counterpart of ImageBatches for training a head.

    The features of each view, that is of each variation of all images, lie in memory if they fit into `budget_bytes`,
    else in files. Targets must be those of whole images, which no variation moves.
    """

    def __init__(
        self,
        learner: HeadLearner,
        images: ImageBatches,
        views: int,
        folder: Path | None,
        budget_bytes: int,
        cast: Callable[[], AbstractContextManager],
        report: Report,
        stage: str,
    ):
        self.learner, self.samples, self.device, self.seed = learner, images.samples, images.device, images.seed
        self._budget, self._folder, self._cast = budget_bytes, folder, cast
        count = len(self.samples)
        blocks = [np.arange(start, min(start + BLOCK_IMAGES, count)) for start in range(0, count, BLOCK_IMAGES)]
        self._views: list[Tensor | list[NDArray]] = []
        for view in range(views):
            computed: list[NDArray] = []
            for number, indices in enumerate(blocks):

                def tell(done: int, before: int = view * count + int(indices[0])) -> None:
                    report(Step(stage, before + done, views * count))

                computed.append(self._block(images, view, number, indices, tell))
            self._views.append(self._joined(computed, views * count))

    def training(
        self, epoch: int, batch_size: int, accumulate: int, balance: bool, part: Part
    ) -> Iterator[list[Batch]]:
        """As that of ImageBatches; the views take turns over the epochs."""
        order = self.samples.order(self.seed, epoch, balance)
        for update in updates(order, batch_size, accumulate, part.rank, part.ranks):
            yield [self._batch(epoch % len(self._views), order[positions]) for positions in update]

    def plain(self, batch_size: int) -> Iterator[Batch]:
        """All images in order, in the first view."""
        for start in range(0, len(self.samples), batch_size):
            yield self._batch(0, np.arange(start, min(start + batch_size, len(self.samples))))

    def close(self) -> None:
        """Holds nothing open."""

    def _batch(self, view: int, indices: NDArray[np.int64]) -> Batch:
        features = self._views[view]
        if isinstance(features, Tensor):
            inputs = features[torch.from_numpy(indices).to(features.device)]
        else:
            rows = [features[index // BLOCK_IMAGES][index % BLOCK_IMAGES] for index in indices]
            inputs = torch.from_numpy(np.stack(rows)).to(self.device)
        targets = self.learner.collate([self.samples.targets[index] for index in indices])
        return Batch(indices, inputs, to_device(targets, self.device))

    def _block(
        self, images: ImageBatches, view: int, number: int, indices: NDArray[np.int64], tell: Callable[[int], None]
    ) -> NDArray:
        """The features [images of the block, …] f32, from the file of an earlier run where there is one."""
        path = None
        if self._folder is not None:
            kind = "plain" if self.samples.augmentation is None else "varied"
            path = self._folder / f"features-{kind}-{view}-{number:05d}.npy"
            try:
                return np.load(path, mmap_mode="r")
            except (OSError, ValueError):
                pass
        parts: list[NDArray] = []
        tell(0)
        batches = np.array_split(indices, -(-len(indices) // BATCH_IMAGES))
        self.learner.network.eval()
        for batch in images.view(view, batches):
            with torch.no_grad(), self._cast():
                features = self.learner.features(batch.inputs)
            parts.append(features.float().cpu().numpy())
            tell(sum(map(len, parts)))
        block = np.concatenate(parts)
        if not np.isfinite(block).all():
            broken = indices[~np.isfinite(block.reshape(len(block), -1)).all(axis=1)]
            raise UsageError(
                f"the backbone's outputs are not finite for {self.samples.names[broken[0]]}: "
                "are the weights damaged, or --precision too low?"
            )
        if path is None:
            return block
        write_whole(path, lambda file: np.save(file, block))
        return np.load(path, mmap_mode="r")

    def _joined(self, blocks: list[NDArray], images: int) -> Tensor | list[NDArray]:
        per_image = blocks[0][0].nbytes
        if per_image * images > self._budget:
            return blocks
        return torch.from_numpy(np.concatenate(blocks)).to(self.device)
