"""From batches of prepared images to findings, whatever a batch or an image does to the engine."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.errors import ModelError, Rejected
from models.imaging.geometry import Geometry
from models.records import Status
from models.runtime.engine import Engine, OutOfMemory
from models.runtime.merging import merge_views
from models.runtime.results import ANSWERS, Finding


class Predictor:
    """One model, ready to predict; `predict` may be called by `engine.concurrency` threads at once."""

    def __init__(self, card: Card, engine: Engine, *, score: float | None = None, top_k: int = 5):
        """`score`: findings below it are dropped, by default the card's own threshold; `top_k`: labels kept per image.

        Raises UsageError if the model's graph already drops findings that `score` asks for.
        """
        self.card = card
        self.engine = engine
        self.score = card.threshold(score)
        self.top_k = top_k
        self.max_batch: int | None = None  # images per call that fit in memory; None until a batch did not
        self._lock = threading.Lock()

    def predict(
        self,
        images: NDArray[np.uint8],  # [n, height, width, 3]
        geometries: Sequence[Geometry],  # n
    ) -> list[Finding | Rejected]:
        """What the model finds in each image or tile, in order; Rejected for one that it fails on alone.

        A batch that the engine cannot run is halved until each half runs; one that ran out of memory also lowers
        `max_batch` for later calls. Raises ModelError if the engine cannot run any image any more.
        """
        found: list[Finding | Rejected] = []
        while len(found) < len(geometries):
            start = len(found)
            stop = len(geometries) if self.max_batch is None else start + self.max_batch
            found += self._predict_batch(images[start:stop], geometries[start:stop])
        return found

    def merge(self, views: Sequence[tuple[Geometry, Finding | Rejected]]) -> Finding | Rejected:
        """The one answer for an image of which the model saw these views."""
        return merge_views(self.card.task, views)

    def _predict_batch(self, images: NDArray[np.uint8], geometries: Sequence[Geometry]) -> list[Finding | Rejected]:
        count = len(geometries)
        try:
            outputs = self.engine.run(images)
            return ANSWERS[self.card.task].read(outputs, geometries, self.card, self.score, self.top_k)
        except Exception as error:  # an engine raises what it likes; the image, not the run, is at fault
            if count == 1:
                self._check_engine(images.shape[1:], error)
                return [Rejected(Status.FAILED, f"the model failed on this image: {one_line(error)}")]
            half = count // 2
            if isinstance(error, OutOfMemory):
                with self._lock:
                    self.max_batch = half if self.max_batch is None else min(self.max_batch, half)
        return self._predict_batch(images[:half], geometries[:half]) + self._predict_batch(
            images[half:], geometries[half:]
        )

    def _check_engine(self, shape: tuple[int, ...], error: Exception) -> None:
        """A blank image must still run: else a lost device would turn every image that is left into a failed row."""
        try:
            self.engine.run(np.zeros((1, *shape), np.uint8))
        except Exception as blank_error:
            raise ModelError(
                f"{self.engine.name} can no longer run {self.card.reference}, not even on one blank image: "
                f"{one_line(blank_error)}"
            ) from error


def one_line(error: BaseException) -> str:
    """The error's text without line breaks, at most 300 characters: it becomes a cell of a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
