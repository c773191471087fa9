"""Measures generators: what their graph makes, compared with the images of a split by a judge."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.dataset import Dataset
from models.errors import UsageError
from models.progress import Report, Step, silent
from models.settings.fields import Device
from tasks.calibration import prepared_images
from tasks.datasets import datasets

if TYPE_CHECKING:
    from models.learning.judging import Judge

log = logging.getLogger("pixelmill")

# As many images are made as there are real ones to compare with, at least and at most.
_LEAST, _MOST = 100, 5_000
_BATCH = 64
_SEED = 0


def measure_generator(
    card: Card,
    onnx_path: Path,
    store: str,
    dataset: Dataset,
    split: str,
    judge: "Judge",
    device: Device = "auto",
    report: Report = silent,
) -> dict[str, Any]:
    """The figures of one split; see models.learning.generative_metrics.

    A conditional generator makes each class as often as the split shows it. `frechet_halves` is the distance between
    two halves of the real images: what a perfect generator of half as many images would reach. Raises UsageError
    where there is too little to compare with, ModelError where the file cannot be run.
    """
    from models.learning.generative_metrics import ENOUGH_IMAGES, UNKNOWN, Seen, class_rows, compare, halves
    from models.learning.judging import recognised

    images, names = prepared_images(store, dataset, split, card, _MOST)
    if len(images) < 2:
        raise UsageError(f"{dataset.reference} {split} has one image: a generator is compared with two or more")
    if len(images) < ENOUGH_IMAGES:
        log.warning(
            "%s %s has %d images: with fewer than %d the figures of a generator are mostly noise",
            dataset.reference,
            split,
            len(images),
            ENOUGH_IMAGES,
        )
    labels = np.full(len(images), UNKNOWN, np.int64)
    if card.is_conditional:
        labels = _labels_of(names, card, store, dataset, split)
        if (labels == UNKNOWN).all():
            raise UsageError(f"{dataset.reference} {split} shows none of the classes that {card.reference} makes")
    count = max(len(images), _LEAST)
    known = labels[labels != UNKNOWN]
    asked = np.resize(known, count) if card.is_conditional else None  # it repeats them
    stage = f"measuring {split}"
    report(Step(stage, 0, count))
    made, engine = _made(card, onnx_path, count, asked, device, lambda done: report(Step(stage, done, count)))
    looked = judge.look(images)
    real = Seen(looked.features, labels if card.is_conditional else looked.classes)
    seen = recognised(judge.look(made), judge, card.labels, real)
    figures: dict[str, Any] = compare(real, seen, asked)
    figures |= {
        "frechet_halves": halves(real.features),
        "images": len(images),
        "made": count,
        "not_ok": 0,
        "judge": judge.name,
        "engine": engine,
    }
    if asked is not None:
        figures["per_class"] = class_rows(seen.classes, asked, card.labels)
    return figures


def _labels_of(names: list[str], card: Card, store: str, dataset: Dataset, split: str) -> NDArray[np.int64]:
    rows = datasets.read_images(store, dataset, split)
    label_of = dict(zip(rows.column("image").to_pylist(), rows.column("label").to_pylist(), strict=True))
    index = {name: number for number, name in enumerate(card.labels)}
    return np.array([index.get(label_of[name], -1) for name in names], np.int64)


def _made(
    card: Card, onnx_path: Path, count: int, asked: NDArray[np.int64] | None, device: Device, tell: Any
) -> tuple[NDArray[np.uint8], str]:
    """Images [count, height, width, 3] of latents that are always the same, and the engine that made them."""
    from models.runtime.engine import open_engine
    from models.runtime.latents import draw

    engine = open_engine(onnx_path, card, engine="onnxruntime", device=device)
    batches = []
    for start in range(0, count, _BATCH):
        numbers = range(start, min(start + _BATCH, count))
        labels = None if asked is None else [int(asked[number]) for number in numbers]
        batches.append(engine.run(draw(card, _SEED, numbers, labels))["images_out"])
        tell(numbers.stop)
    return np.concatenate(batches), engine.name
