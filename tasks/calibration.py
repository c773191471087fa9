"""Images of a data set as a network sees them: to calibrate a quantised graph on, and to compare graphs on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.card import Card
from models.dataset import Dataset
from models.errors import Rejected, UsageError
from models.imaging.prepare import Limits, Preparer
from tasks.datasets import datasets
from tasks.storage import open_storage

_READERS = 8


def prepared_images(
    store: str, dataset: Dataset, split: str, card: Card, count: int
) -> tuple[NDArray[np.uint8], list[str]]:
    """At most `count` images of a split [n, height, width, 3], prepared by the card's rule, and their URIs.

    Always the same ones, and a fair sample: the first by the SHA-256 of their content. Raises UsageError where the
    split has none that can be read.
    """
    rows = datasets.read_images(store, dataset, split)
    rows = rows.take(pa.array(np.argsort(np.array(rows.column("sha256").to_pylist(), object), kind="stable")))
    images = np.empty((min(count, rows.num_rows), card.input.height, card.input.width, 3), np.uint8)
    limits = Limits(max_pixels=max((w * h for w, h in _sizes(rows)), default=1))
    preparer = Preparer(card.input, limits)
    names: list[str] = []
    for uri, data in _contents(rows.column("image").to_pylist()):
        if len(names) == len(images):
            break
        try:
            preparer.prepare(data, images[len(names)])
        except Rejected:
            continue
        names.append(uri)
    if not names:
        raise UsageError(f"{dataset.reference} has no image in its split {split} that can be read")
    return images[: len(names)], names


def _sizes(rows: pa.Table) -> Iterator[tuple[int, int]]:
    yield from zip(rows.column("width").to_pylist(), rows.column("height").to_pylist(), strict=True)


def _contents(uris: list[str]) -> Iterator[tuple[str, bytes]]:
    """The files that are there, in order, read a few ahead."""

    def read(uri: str) -> tuple[str, bytes] | None:
        try:
            return uri, open_storage(uri).read(uri)
        except FileNotFoundError:
            return None

    waiting = iter(uris)
    with ThreadPoolExecutor(_READERS) as pool:
        while block := list(islice(waiting, 4 * _READERS)):
            yield from filter(None, pool.map(read, block))
