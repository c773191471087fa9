"""Which images of a data set are copies of each other, and into which split each group of them goes."""

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from models.imaging.perceptual_hash import SIGNATURE
from models.near_duplicates import Groups, near_duplicates
from models.progress import Report, Step
from models.settings.ingest import SPLITS
from models.splits import Group, assign
from tasks.datasets import datasets
from tasks.datasets.images import Kept


def group_copies(kept: list[Kept], report: Report) -> int:
    """Numbers the groups of images that are identical or nearly so; returns how many are near another, not identical.

    The number is that of the group's first image.
    """
    groups = Groups(len(kept))
    first: dict[str, int] = {}
    for index, each in enumerate(kept):
        groups.join(first.setdefault(each.seen.sha256, index), index)
    distinct = list(first.values())
    signatures = np.array([kept[index].seen.signature for index in distinct], SIGNATURE)
    near: set[int] = set()

    def on_progress(done: int, total: int) -> None:
        report(Step("looking for copies", done, total))

    for left, right in near_duplicates(signatures, on_progress):
        groups.join(distinct[left], distinct[right])
        near |= {left, right}
    for index, each in enumerate(kept):
        each.group = groups.root(index)
    return len(near)


def earlier_splits(store: str, name: str, shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Where earlier versions with the same shares and seed put each image, by SHA-256; the newest has the last word."""
    placed: dict[str, str] = {}
    for dataset in datasets.list_datasets(store, name):
        if not dataset.split_given and dataset.shares == dict(shares) and dataset.seed == seed:
            rows = datasets.read_images(store, dataset)
            placed |= zip(rows["sha256"].to_pylist(), rows["split"].to_pylist(), strict=True)
    return placed


def place(kept: list[Kept], shares: Mapping[str, float], seed: int, earlier: Mapping[str, str]) -> int:
    """Gives every image its split; returns how many left the one that an earlier version had given them.

    A split that the source gives stays; copies without one follow. So do copies that an earlier version had apart.
    """
    groups: dict[int, list[Kept]] = defaultdict(list)
    for each in kept:
        groups[each.group].append(each)
    rarity = Counter(label for each in kept for label in each.labels)
    open_groups, open_members = [], []
    for members in groups.values():
        free = [each for each in members if each.image.split is None]
        for each in members:
            each.split = each.image.split or ""
        if free:
            given = Counter(each.image.split for each in members if each.image.split is not None)
            known = given or Counter(earlier[each.seen.sha256] for each in members if each.seen.sha256 in earlier)
            placed = min(known, key=lambda split: (-known[split], SPLITS.index(split))) if known else None
            labels = set().union(*(each.labels for each in members))
            stratum = min(labels, key=lambda label: (rarity[label], label)) if labels else None
            key = min(each.seen.sha256 for each in members)
            open_groups.append(Group(key, len(free), stratum, placed))
            open_members.append(free)
    for split, free in zip(assign(open_groups, shares, seed), open_members, strict=True):
        for each in free:
            each.split = split
    return sum(earlier.get(each.seen.sha256, each.split) != each.split for each in kept)
