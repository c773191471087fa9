"""Which images make up each update of the weights: a function of seed and epoch alone, whatever the threads do."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def epoch_order(count: int, seed: int, epoch: int, groups: Sequence[int] | None = None) -> NDArray[np.int64]:
    """The images of one epoch [count], by index, in the order in which they are drawn.

    Without `groups` each image comes once. With the group (the class, say) of each image, each group that has any comes
    equally often, give or take one: images of small groups are repeated, those of large ones take turns over the
    epochs.
    """
    random = np.random.default_rng((seed, epoch))
    if groups is None:
        return random.permutation(count)
    group_of = np.asarray(groups)
    present = np.unique(group_of)
    share, rest = divmod(count, len(present))
    extra = set(random.permutation(len(present))[:rest].tolist())
    drawn = []
    for number, group in enumerate(present):
        members = np.flatnonzero(group_of == group)
        wanted = share + (number in extra)
        rounds = [random.permutation(members) for _ in range(-(-wanted // len(members)))]
        drawn.append(np.concatenate([members[:0], *rounds])[:wanted])
    return random.permutation(np.concatenate(drawn))


def updates(
    order: NDArray[np.int64], batch_size: int, accumulate: int = 1, rank: int = 0, ranks: int = 1
) -> list[list[NDArray[np.int64]]]:
    """The positions in `order` that process `rank` of `ranks` works on: for each update of the weights, its batches.

    Batches are evenly filled instead of leaving a small last one, which would spoil the statistics of a BatchNorm; all
    processes get equally many images, for which the first ones are repeated if need be.
    """
    count = -(-len(order) // ranks)  # of this process
    per_update = batch_size * accumulate
    steps = -(-count // per_update)
    cuts = [count * step // steps for step in range(steps + 1)]
    result = []
    for start, end in pairwise(cuts):
        own = (np.arange(start, end) * ranks + rank) % len(order)
        result.append(np.array_split(own, -(-len(own) // batch_size)))
    return result
