"""Which split an image belongs to: decided by its content, so that names, order and additions do not matter.

Each group of near-identical images gets a number between 0 and 1 from a hash of its content and the seed, and the
shares cut that interval: [0, .8) train, [.8, .9) val, [.9, 1) test. Large classes come out near their shares by
themselves. Of small ones, and of small data sets, the groups nearest to a cut are moved over it until they do.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

_TOLERANCE = 0.1  # of what a split should have, but at least one image


@dataclass(frozen=True, slots=True)
class Group:
    """Images that must stay together."""

    key: str  # says what they are, whatever their names: the smallest SHA-256 among them
    images: int
    stratum: str | None = None  # the class to balance them in; the rarest, where they have several
    placed: str | None = None  # the split that they are in already, and stay in


def assign(groups: Sequence[Group], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each group. `shares` are of images, by split; they add up to 1.

    In each stratum, and in all, every split has less than one image, or 10 %, more or less than its share, as far as
    the sizes of the groups and those that are placed allow it.
    """
    assignment = _Assignment(groups, shares, seed)
    strata: dict[str | None, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        strata[group.stratum].append(index)
    balances = {stratum: _Balance(assignment, members) for stratum, members in strata.items()}
    for stratum, members in strata.items():
        assignment.level(members, balances[stratum])
    if len(strata) > 1:
        assignment.level(range(len(groups)), _Balance(assignment, range(len(groups))), balances)
    return assignment.splits


class _Assignment:
    """The split of each group, first by its number alone."""

    def __init__(self, groups: Sequence[Group], shares: Mapping[str, float], seed: int):
        self.groups = groups
        self.shares = shares
        ends = list(accumulate(shares.values()))
        self._intervals = dict(zip(shares, zip([0.0, *ends], ends, strict=False), strict=True))
        self._numbers = [_number(group.key, seed) for group in groups]
        self._moved: set[int] = set()
        self.splits = [
            group.placed or self._split_at(number) for group, number in zip(groups, self._numbers, strict=True)
        ]

    def _split_at(self, number: float) -> str:
        return next((name for name, (_, end) in self._intervals.items() if number < end), list(self.shares)[-1])

    def level(
        self, members: Iterable[int], balance: "_Balance", of_strata: Mapping[str | None, "_Balance"] | None = None
    ) -> None:
        """Moves groups between splits until they are near their shares, or none can be moved to the better.

        `of_strata`: the balances that must stay as good as they are.
        """
        free = [index for index in members if self.groups[index].placed is None and index not in self._moved]
        nearest: dict[tuple[str, str], Iterator[int]] = {}
        while not balance.is_level:
            by_surplus = sorted(balance.surplus, key=lambda name: -balance.surplus[name])
            pairs = [(donor, receiver) for donor in by_surplus for receiver in reversed(by_surplus)]
            for donor, receiver in pairs:
                if not balance.gains(1, donor, receiver):
                    continue
                if (donor, receiver) not in nearest:
                    nearest[donor, receiver] = iter(self._by_distance(free, donor, receiver))
                index = next(nearest[donor, receiver], None)
                while index is not None and not self._may_move(index, donor, receiver, balance, of_strata):
                    index = next(nearest[donor, receiver], None)
                if index is not None:
                    break
            else:
                return
            self._moved.add(index)
            self.splits[index] = receiver
            for each in (balance, *([of_strata[self.groups[index].stratum]] if of_strata else [])):
                each.move(self.groups[index].images, donor, receiver)

    def _by_distance(self, free: Iterable[int], donor: str, receiver: str) -> list[int]:
        """The groups of one split, those first whose number is nearest to the interval of the other."""
        start, end = self._intervals[receiver]
        return sorted(
            (index for index in free if self.splits[index] == donor),
            key=lambda index: (max(start - self._numbers[index], self._numbers[index] - end), self.groups[index].key),
        )

    def _may_move(
        self,
        index: int,
        donor: str,
        receiver: str,
        balance: "_Balance",
        of_strata: Mapping[str | None, "_Balance"] | None,
    ) -> bool:
        group = self.groups[index]
        return (
            index not in self._moved
            and balance.gains(group.images, donor, receiver)
            and (of_strata is None or of_strata[group.stratum].allows(group.images, donor, receiver))
        )


class _Balance:
    """How many images each split has more (or fewer) than its share."""

    def __init__(self, assignment: _Assignment, members: Iterable[int]):
        counts = dict.fromkeys(assignment.shares, 0)
        for index in members:
            split = assignment.splits[index]
            counts[split] = counts.get(split, 0) + assignment.groups[index].images
        total = sum(counts.values())
        shares = {name: assignment.shares.get(name, 0.0) for name in counts}
        self.surplus = {name: counts[name] - share * total for name, share in shares.items()}
        self._tolerance = {name: max(1.0, _TOLERANCE * share * total) - 1e-9 for name, share in shares.items()}

    @property
    def is_level(self) -> bool:
        """Whether every split is within its tolerance."""
        return all(abs(surplus) < self._tolerance[name] for name, surplus in self.surplus.items())

    def gains(self, images: int, donor: str, receiver: str) -> bool:
        """Whether the move helps: one of the two is beyond its tolerance, and both together come nearer to level."""
        beyond = self.surplus[donor] >= self._tolerance[donor] or -self.surplus[receiver] >= self._tolerance[receiver]
        return beyond and images < self.surplus[donor] - self.surplus[receiver]

    def allows(self, images: int, donor: str, receiver: str) -> bool:
        """Whether both are within their tolerance after a move."""
        return (
            self.surplus[donor] - images > -self._tolerance[donor]
            and self.surplus[receiver] + images < self._tolerance[receiver]
        )

    def move(self, images: int, donor: str, receiver: str) -> None:
        """Takes note of a move."""
        self.surplus[donor] -= images
        self.surplus[receiver] += images


def _number(key: str, seed: int) -> float:
    """Where a group lies between 0 and 1."""
    return int(hashlib.sha256(f"{seed} {key}".encode()).hexdigest()[:13], 16) / 16**13
