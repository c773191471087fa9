"""What `--judge` names: a classifier of the store, ImageNet's weights, or the pixels."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from models import catalog
from models.errors import ModelError, UsageError
from models.records import Task
from tasks import registry
from tasks.demo import ARCHITECTURE, weights_file
from tasks.weights import apply_state, as_built, load_file, load_model, load_pretrained

if TYPE_CHECKING:
    from models.learning.judging import Judge

logger = logging.getLogger("pixelmill.judge")

IMAGENET, PIXELS = "imagenet", "pixels"
# Small images are enlarged to it. At 224 pixels a judge would take longer than the generator takes to learn.
_IMAGENET_SIDE = 96


def judge(name: str | None, store: str) -> "Judge":
    """What compares made images with real ones; None: imagenet if its weights can be had, else pixels.

    Raises UsageError for what is no classifier, NotFound, and ModelError where its weights cannot be had.
    """
    from models.learning.judging import PixelJudge

    if name == PIXELS:
        return PixelJudge()
    if name == IMAGENET:
        return _imagenet()
    if name is not None:
        return _of_store(name, store)
    try:
        found = _imagenet()
    except ModelError as error:
        logger.warning("made images are compared with real ones by their pixels alone: %s", error)
        return PixelJudge()
    logger.info(
        "made images are compared with real ones by ImageNet's %s; --judge takes a classifier of the store",
        ARCHITECTURE,
    )
    return found


def _imagenet() -> "Judge":
    from models.learning.judging import ClassifierJudge
    from models.nets import classifiers
    from models.nets.pretrained import pretrained
    from models.nets.untrained import build_untrained

    entry = catalog.entry(ARCHITECTURE)
    assert entry.weights is not None
    trained = pretrained(entry.builder, entry.weights)
    shipped = weights_file()
    state = load_file(Path(shipped)) if shipped else load_pretrained(trained, entry.builder)
    network = build_untrained(lambda: entry.build(len(trained.labels), _IMAGENET_SIDE))
    apply_state(network, as_built(entry, state), classifiers.IGNORED_PREFIXES, ARCHITECTURE)
    # Its thousand classes say nothing of other images.
    return ClassifierJudge(IMAGENET, network, classifiers.parts(network, entry.builder), _IMAGENET_SIDE, ())


def _of_store(reference: str, store: str) -> "Judge":
    from models.learning.judging import ClassifierJudge
    from models.nets import classifiers
    from models.nets.untrained import build_untrained

    try:
        card = registry.resolve(store, reference)
    except UsageError as error:
        raise UsageError(
            f"--judge {reference} is none: expected a classifier of the store, {IMAGENET} or {PIXELS} ({error})"
        ) from None
    if card.task != Task.CLASSIFY:
        raise UsageError(f"--judge {reference} is a model of task {card.task}: only a classifier can judge images")
    if card.architecture not in catalog.CATALOG:
        raise UsageError(
            f"--judge {reference} came as an ONNX file, which gives no features: use a classifier that was trained or "
            "imported here"
        )
    entry = catalog.entry(card.architecture)
    network = build_untrained(lambda: entry.build(len(card.labels), card.input.height))
    apply_state(network, load_model(store, card), classifiers.IGNORED_PREFIXES, card.architecture)
    parts = classifiers.parts(network, entry.builder)
    return ClassifierJudge(card.reference, network, parts, max(card.input.height, card.input.width), card.labels)
