"""Which images make up each update of the weights: a function of seed and epoch alone, whatever the threads do."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    groups: Sequence[int] | None = None,
    repeats: Sequence[float] | None = None,
) -> NDArray[np.int64]:
    """The images of one epoch [count], by index, in the order in which they are drawn.

    Each image comes once. With the group (the class, say) of each image, each group that has any comes equally often
    instead, give or take one: images of small groups are repeated, those of large ones take turns over the epochs. With
    the repeats of each image, it comes that much more often than one whose repeats are 1, on average over the epochs.
    """
    random = np.random.default_rng((seed, epoch))
    if repeats is not None:
        return random.permutation(_in_proportion(random, np.asarray(repeats, np.float64)))
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


def repeat_factors(labels_per_image: Sequence[Collection[Hashable]]) -> list[float]:
    """How much more often than others each image is to come, so that rare classes are seen more often: 1 or more.

    The repeat factor of Gupta et al., LVIS (arXiv 1908.03195, section 4.1, "Repeat factor sampling"): for a class that
    the share f of the images shows √(t / f), for an image the largest of its classes, for one without labels 1. Here t
    is the share of the commonest class, so that an image of a class a quarter as common comes twice as often, however
    many classes there are.
    """
    images_of = Counter(label for labels in labels_per_image for label in set(labels))
    most = max(images_of.values(), default=0)
    return [max((math.sqrt(most / images_of[label]) for label in labels), default=1.0) for labels in labels_per_image]


def _in_proportion(random: np.random.Generator, repeats: NDArray[np.float64]) -> NDArray[np.int64]:
    """As many images as there are, each so often, rounded up or down at random, as its share of all repeats says."""
    shuffled = random.permutation(len(repeats))
    ends = np.cumsum(repeats[shuffled]) / repeats.sum() * len(repeats)
    places = np.arange(len(repeats)) + random.random()
    return shuffled[np.searchsorted(ends, places).clip(max=len(repeats) - 1)]


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
