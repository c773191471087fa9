"""Measures translators, and what autoencoders give back: graphs whose answer is an image."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import DECODER_FILE, Card
from models.dataset import Dataset
from models.errors import UsageError
from models.progress import Report, Step, silent
from models.settings.fields import Device
from tasks import registry
from tasks.calibration import prepared_images
from tasks.datasets import datasets

if TYPE_CHECKING:
    from models.learning.judging import Judge

log = logging.getLogger("pixelmill")

_MOST = 2_000  # images that are looked at
_BATCH = 32


def measure_translator(
    card: Card,
    onnx_path: Path,
    store: str,
    dataset: Dataset,
    split: str,
    judge: "Judge",
    device: Device = "auto",
    report: Report = silent,
) -> dict[str, Any]:
    """How much like the images of its target data set those look that are made of a split's.

    The target's images are those of the same split, or of its training split where it has no such. Keys: those of
    models.learning.generative_metrics, frechet_before (the distance of the images as they were: what a translator that
    changes nothing would reach), frechet_halves (between two halves of the target's images: what a perfect one of half
    as many would reach), images, target, target_images, not_ok, judge, engine. Raises UsageError where there is too
    little to compare with, ModelError where the file cannot be run.
    """
    from models.learning.generative_metrics import ENOUGH_IMAGES, compare, frechet_distance, halves
    from models.runtime.engine import open_engine

    reference = card.training.get("target", {}).get("dataset")
    if reference is None:
        raise UsageError(f"{card.reference} was not trained here: there is no data set that its images should be like")
    target = datasets.resolve(store, reference)
    images, _ = prepared_images(store, dataset, split, card, _MOST)
    wanted, _ = prepared_images(store, target, split if target.splits.get(split) else "train", card, _MOST)
    if min(len(images), len(wanted)) < 2:
        raise UsageError(f"{dataset.reference} {split} or {target.reference} has one image: two or more are compared")
    if min(len(images), len(wanted)) < ENOUGH_IMAGES:
        log.warning("fewer than %d images on a side: the figures of a translator are mostly noise", ENOUGH_IMAGES)
    engine = open_engine(onnx_path, card, engine="onnxruntime", device=device)
    stage = f"measuring {split}"
    made = _in_batches(images, lambda batch: engine.run(batch)["images_out"], stage, report)
    real, before = judge.look(wanted), judge.look(images)
    return {
        **compare(real, judge.look(made)),
        "frechet_before": frechet_distance(real.features, before.features),
        "frechet_halves": halves(real.features),
        "images": len(images),
        "target": target.reference,
        "target_images": len(wanted),
        "not_ok": 0,
        "judge": judge.name,
        "engine": engine.name,
    }


def reconstruction_error(
    card: Card, onnx_path: Path, store: str, dataset: Dataset, split: str, report: Report = silent
) -> float | None:
    """The mean squared error, of values from 0 to 1, of images that are embedded by one graph and decoded by the other.

    None for a model that has no decoder.
    """
    from models.runtime.engine import open_engine
    from models.runtime.latents import Latents

    decoder_path = onnx_path.with_name(DECODER_FILE)
    if not decoder_path.is_file():
        if DECODER_FILE not in card.files:
            return None
        decoder_path = registry.fetch_model(store, card, DECODER_FILE)
    images, _ = prepared_images(store, dataset, split, card, _MOST)
    encoder = open_engine(onnx_path, card, engine="onnxruntime", device="cpu")
    decoder = open_engine(decoder_path, card.as_generator, engine="onnxruntime", device="cpu")

    def there_and_back(batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return decoder.run(Latents(encoder.run(batch)["embedding"], None))["images_out"]

    made = _in_batches(images, there_and_back, f"decoding {split}", report)
    return float(np.square((made.astype(np.float64) - images) / 255).mean())


def _in_batches(
    images: NDArray[np.uint8], work: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], stage: str, report: Report
) -> NDArray[np.uint8]:
    parts = []
    for start in range(0, len(images), _BATCH):
        report(Step(stage, start, len(images)))
        parts.append(work(images[start : start + _BATCH]))
    report(Step(stage, len(images), len(images)))
    return np.concatenate(parts)
