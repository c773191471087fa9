"""Splits follow from content: near their shares in every class, whatever the names, and steady when images come."""

import hashlib
import random
from collections import Counter

import pytest

from models.splits import Group, assign

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def groups_of(count: int, stratum: str | None = "cat", images: int = 1, first: int = 0) -> list[Group]:
    """Groups with keys as of real images."""
    keys = (hashlib.sha256(f"{stratum} {number}".encode()).hexdigest() for number in range(first, first + count))
    return [Group(key, images, stratum) for key in keys]


def counts(groups: list[Group], splits: list[str]) -> Counter:
    """Images by split."""
    found: Counter = Counter()
    for group, split in zip(groups, splits, strict=True):
        found[split] += group.images
    return found


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize(
    ("per_class", "classes", "shares"),
    [
        pytest.param(0, 1, SHARES, id="nothing"),
        pytest.param(1, 1, SHARES, id="one image"),
        pytest.param(1, 50, SHARES, id="one image in each of 50 classes"),
        pytest.param(3, 4, SHARES, id="three"),
        pytest.param(10, 10, SHARES, id="ten"),
        pytest.param(15, 5, SHARES, id="fifteen"),
        pytest.param(20, 3, {"train": 0.7, "test": 0.3}, id="twenty in two splits"),
        pytest.param(100, 5, SHARES, id="a hundred"),
        pytest.param(2000, 2, SHARES, id="two thousand"),
        pytest.param(12, 2, {"train": 1.0}, id="one split"),
        pytest.param(30, 2, {"train": 0.34, "val": 0.33, "test": 0.33}, id="thirds"),
    ],
)
def test_every_class_is_near_its_shares(per_class, classes, shares, seed):
    groups = [group for number in range(classes) for group in groups_of(per_class, f"class {number}")]
    splits = assign(groups, shares, seed)
    for stratum in {group.stratum for group in groups}:
        members = [index for index, group in enumerate(groups) if group.stratum == stratum]
        found = counts([groups[index] for index in members], [splits[index] for index in members])
        for split, share in shares.items():
            assert abs(found[split] - share * per_class) < max(1, 0.1 * share * per_class) + 1e-6
    found = counts(groups, splits)
    for split, share in shares.items():  # all classes together as well, so that no split stays empty
        assert abs(found[split] - share * len(groups)) < max(1, 0.1 * share * len(groups)) + 1e-6


def test_neither_order_nor_company_matters():
    groups = groups_of(40, "cat") + groups_of(40, "dog") + groups_of(2000, "owl")
    splits = dict(zip((group.key for group in groups), assign(groups, SHARES, 0), strict=True))
    shuffled = random.Random(1).sample(groups, len(groups))
    assert dict(zip((group.key for group in shuffled), assign(shuffled, SHARES, 0), strict=True)) == splits
    cats = [group for group in groups if group.stratum == "cat"]
    assert assign(cats, SHARES, 0) == [splits[group.key] for group in cats]


def test_the_seed_matters():
    groups = groups_of(200)
    assert assign(groups, SHARES, 0) == assign(groups, SHARES, 0) != assign(groups, SHARES, 1)


def test_added_images_move_few_even_where_nobody_remembers():
    before, added = groups_of(1000), groups_of(300, first=1000)
    first, second = assign(before, SHARES, 0), assign(before + added, SHARES, 0)
    assert sum(old != new for old, new in zip(first, second, strict=False)) <= 10


@pytest.mark.parametrize("added", [1, 5, 50])
def test_placed_groups_stay_and_new_ones_restore_the_shares(added):
    before = groups_of(20)
    placed = [
        Group(group.key, 1, group.stratum, split)
        for group, split in zip(before, assign(before, SHARES, 0), strict=True)
    ]
    groups = placed + groups_of(added, first=20)
    splits = assign(groups, SHARES, 0)
    assert splits[:20] == [group.placed for group in placed]
    found = counts(groups, splits)
    for split, share in SHARES.items():
        assert abs(found[split] - share * len(groups)) < max(1, 0.1 * share * len(groups)) + 1e-6


def test_what_is_placed_stays_however_lopsided():
    groups = [Group(group.key, 1, "cat", "test") for group in groups_of(10)]
    assert set(assign(groups, SHARES, 0)) == {"test"}


def test_a_split_without_a_share_may_hold_what_is_placed():
    groups = [Group("a", 1, "cat", "val"), *groups_of(9)]
    assert assign(groups, {"train": 1.0}, 0)[0] == "val"


def test_large_groups_stay_whole_and_the_others_make_up_for_them():
    groups = [*groups_of(1, images=30), *groups_of(70, first=1)]
    found = counts(groups, assign(groups, SHARES, 0))
    assert sum(found.values()) == 100
    assert found == {"train": 80, "val": 10, "test": 10}


def test_images_without_a_class_are_split_too():
    found = counts(groups := groups_of(50, None), assign(groups, SHARES, 0))
    assert found == {"train": 40, "val": 5, "test": 5}
