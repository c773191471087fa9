"""Which images of a set are copies of each other, without comparing all with all.

Copies have the same hash but for a few bits near to either value. So each word of it is looked up in a sorted list, as
it is and with up to two of its doubtful bits turned (multi-probe: Lv et al., "Multi-probe LSH", VLDB 2007); what is
found there, at about the same position, is compared. The time grows as n·log n.
"""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from models.imaging.perceptual_hash import BANDS, DOUBTFUL, LEAST_DETAIL, are_copies, reach

_MOST_PER_PROBE = 128  # neighbours by position: where thousands share a word, copies still chain up
_PAIRS_AT_ONCE = 16_384
_QUERIES_AT_ONCE = 65_536

_TURNED = [(), *combinations(range(DOUBTFUL), 1), *combinations(range(DOUBTFUL), 2)]


class Groups:
    """A partition of 0 … n-1 that is made coarser pair by pair (union-find with path halving)."""

    def __init__(self, count: int):
        self._parents = list(range(count))

    def join(self, left: int, right: int) -> None:
        """Puts two into one group."""
        left, right = self.root(left), self.root(right)
        self._parents[max(left, right)] = min(left, right)

    def root(self, member: int) -> int:
        """The smallest member of its group."""
        parents = self._parents
        while parents[member] != member:
            parents[member] = parents[parents[member]]
            member = parents[member]
        return member


def near_duplicates(
    signatures: NDArray[np.void], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[int, int]]:
    """Pairs of indices into `signatures` (SIGNATURE [n]) that are copies, enough to connect all copies of an image."""
    able = np.flatnonzero(signatures["detail"] >= LEAST_DETAIL)
    total = BANDS * len(_TURNED)
    for band in range(BANDS):
        # One number for word and position, so that one search finds the range of both.
        keys = _key(signatures["words"][able, band], signatures["position"][able])
        order = np.argsort(keys, kind="stable")
        keys, members = keys[order], able[order]
        for probe, turned in enumerate(_TURNED):
            for start in range(0, len(members), _QUERIES_AT_ONCE):
                asking = members[start : start + _QUERIES_AT_ONCE]
                for left, right in _candidates(signatures, asking, band, turned, keys, members):
                    same = are_copies(signatures[left], signatures[right])
                    yield from zip(left[same].tolist(), right[same].tolist(), strict=True)
            on_progress(band * len(_TURNED) + probe + 1, total)


def _candidates(
    signatures: NDArray[np.void],
    asking: NDArray[np.int64],
    band: int,
    turned: tuple[int, ...],
    keys: NDArray[np.float64],
    members: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of an image that asks, and one found under its word with the `turned` doubtful bits; in pieces."""
    queries = signatures[asking]
    words = queries["words"][:, band]
    for each in turned:
        words = words ^ (np.uint32(1) << queries["doubtful"][:, band, each].astype(np.uint32))
    distance = reach(queries)
    first = np.searchsorted(keys, _key(words, queries["position"] - distance), "left")
    last = np.searchsorted(keys, _key(words, queries["position"] + distance), "right")
    if not turned:  # each pair is found from both sides: look only upwards from oneself
        middle = np.searchsorted(keys, _key(words, queries["position"]), "left")
        first = np.maximum(first, middle)
    counts = np.minimum(last - first, _MOST_PER_PROBE)
    for start, stop in _pieces(counts):
        some = counts[start:stop]
        left = np.repeat(asking[start:stop], some)
        offsets = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
        right = members[np.repeat(first[start:stop], some) + offsets]
        apart = left != right
        if apart.any():
            yield left[apart], right[apart]


def _pieces(counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of queries with about _PAIRS_AT_ONCE pairs each."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, "right")))
        if ends[stop - 1] > done:
            yield start, stop
        start = stop


def _key(words: NDArray[np.uint32], positions: NDArray[np.floating]) -> NDArray[np.float64]:
    """Sorts by word, then by position, which is between -1 and 1 and may be overshot by less than 1."""
    return words.astype(np.float64) * 4 + positions
