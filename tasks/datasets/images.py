"""Every image of a source, opened once: what it is, whether it can be used, what it looks like; copied if asked for."""

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Rejected
from models.imaging.header import sniff
from models.imaging.perceptual_hash import SIDE, THUMBNAIL_RULE, signature
from models.imaging.prepare import Limits, Preparer
from models.records import ListedImage
from tasks.datasets.labelled import LabelledImage, Reject
from tasks.datasets.tree import Tree
from tasks.storage import join, open_storage

MAX_IMAGE_BYTES = 512 * 2**20
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif"}
_READERS_OF_S3 = 16  # threads per core wait for the network


@dataclass(frozen=True, slots=True)
class Seen:
    """What opening an image told."""

    sha256: str
    bytes: int
    width: int  # after EXIF orientation
    height: int
    format: str
    signature: NDArray[np.void]  # SIGNATURE: for finding copies of it


@dataclass
class Kept:
    """One image that becomes a row."""

    image: LabelledImage
    seen: Seen
    uri: str
    group: int = -1  # images with the same number are copies of each other
    split: str = ""
    annotations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def labels(self) -> set[str]:
        """All that is in it."""
        of_regions = {row["label"] for row in self.annotations}
        return (of_regions | {self.image.label}) - {None}  # type: ignore[return-value]


def see_images(
    tree: Tree, images: Iterable[LabelledImage], *, max_pixels: int, copies: str | None, threads: int
) -> Iterator[tuple[LabelledImage, Seen | Reject]]:
    """Opens each image, several at once; results in the order given. At no time are more held than are being read.

    `copies`: the folder that usable images are copied to, by content. Raises StorageError, TransientError.
    """
    if tree.root.startswith("s3://") or (copies or "").startswith("s3://"):
        threads = min(64, threads * _READERS_OF_S3)
    eyes = _Eyes(tree, max_pixels, copies)
    waiting: deque[tuple[LabelledImage, Future[Seen | Reject]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ingest") as pool:
        try:
            for image in images:
                waiting.append((image, pool.submit(eyes.see, image)))
                if len(waiting) >= 2 * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def copy_name(sha256: str, format_name: str, number: int = 1) -> tuple[str, str]:
    """Folder and name of a copy; the second and later images of the same content get copies of their own."""
    suffix = f"-{number}" if number > 1 else ""
    return sha256[:2], f"{sha256}{suffix}.{EXTENSIONS[format_name]}"


def put_copy(uri: str, data: bytes) -> None:
    """Writes a copy, unless it is there: its name says its content."""
    storage = open_storage(uri)
    if not storage.exists(uri):
        storage.put_if_absent(uri, data)


class _Eyes:
    """Opens images in any thread."""

    def __init__(self, tree: Tree, max_pixels: int, copies: str | None):
        self._tree = tree
        self._limits = Limits(max_pixels=max_pixels)
        self._copies = copies
        self._of_thread = threading.local()

    def see(self, image: LabelledImage) -> Seen | Reject:
        state = self._tree.files[image.path]
        try:
            data = open_storage(state.uri).read_image(ListedImage(*state), MAX_IMAGE_BYTES)
            seen = self._look(data)
        except Rejected as rejected:
            return Reject("image", self._tree.uri(image.path), None, str(rejected.status), rejected.reason)
        if image.width and image.height and (image.width, image.height) != (seen.width, seen.height):
            return Reject(
                "image",
                self._tree.uri(image.path),
                None,
                "other size than annotated",
                f"{seen.width}×{seen.height} upright, its annotations are for {image.width}×{image.height}",
            )
        if self._copies is not None:
            put_copy(join(self._copies, *copy_name(seen.sha256, seen.format)), data)
        return seen

    def _look(self, data: bytes) -> Seen:
        if not hasattr(self._of_thread, "preparer"):
            self._of_thread.preparer = Preparer(THUMBNAIL_RULE, self._limits)
        thumbnail = np.empty((SIDE, SIDE, 3), np.uint8)
        geometry = self._of_thread.preparer.prepare(data, thumbnail)
        return Seen(
            hashlib.sha256(data).hexdigest(),
            len(data),
            geometry.width,
            geometry.height,
            sniff(data),
            signature(thumbnail),
        )
