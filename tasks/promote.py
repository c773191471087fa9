"""Promotion: which version NAME@production stands for."""

import logging
from dataclasses import dataclass

from models.card import Card
from models.dataset import Dataset
from models.errors import NotFound, UsageError
from models.learning.metrics import LOWER_IS_BETTER, MAIN_METRIC
from models.progress import Report, silent
from models.settings.export import EvaluateSettings
from tasks import registry
from tasks.evaluate import evaluate

log = logging.getLogger("pixelmill")

PRODUCTION = "production"


@dataclass(frozen=True)
class Promotion:
    """What became of a candidate."""

    promoted: bool
    reason: str
    metric: str  # the main one of the task
    candidate: float | None  # its value; None where it was not measured
    current: float | None  # that of NAME@production before
    previous: str | None  # its reference; None where none was promoted


def promote(store: str, reference: str) -> Card:
    """Lets NAME@production stand for this version or variant. Raises NotFound, and ModelError if it has no graph."""
    card = registry.check_exported(registry.resolve(store, reference))
    registry.set_alias(store, card, PRODUCTION)
    log.info("%s@%s is %s", card.name, PRODUCTION, card.reference)
    return card


def promote_if_better(
    store: str, card: Card, dataset: Dataset, split: str = "test", report: Report = silent
) -> Promotion:
    """Promotes a published version if it is not worse than the promoted one on the same split, or is the first.

    Raises ModelError where one of them cannot be run.
    """
    metric = MAIN_METRIC[card.task]

    def value(reference: str) -> float | None:
        # Of generators: figures of two judges do not compare.
        judge = card.training.get("judge")
        settings = EvaluateSettings(model=reference, dataset=dataset.reference, split=split, judge=judge)
        return evaluate(store, settings, report).metrics[metric]

    def ended(promoted: bool, reason: str, current: float | None, previous: str | None) -> Promotion:
        if promoted:
            promote(store, card.reference)
        log.info("%s %s: %s", card.reference, "is promoted" if promoted else "is not promoted", reason)
        return Promotion(promoted, reason, metric, candidate, current, previous)

    candidate = value(card.reference) if dataset.splits.get(split) else None
    try:
        previous = registry.resolve(store, f"{card.name}@{PRODUCTION}")
    except NotFound:
        return ended(True, "no version was promoted yet", None, None)
    if previous.version == card.version:
        return ended(False, "it is the promoted version already", candidate, previous.reference)
    if candidate is None:
        lacks = f"shows nothing in its split {split}" if dataset.splits.get(split) else f"has no split {split}"
        return ended(False, f"{dataset.reference} {lacks} to compare on", None, previous.reference)
    try:
        current = value(previous.reference)
    except UsageError as error:  # another task, or no class in common: nothing says that the new one is as good
        return ended(False, f"{previous.reference} cannot be compared: {error}", None, previous.reference)
    assert current is not None  # what the candidate was measured on shows something to the other one as well
    figures = f"{metric} {candidate:.4f} against {current:.4f} of {previous.reference} on {dataset.reference} {split}"
    is_as_good = candidate <= current if metric in LOWER_IS_BETTER else candidate >= current
    return ended(is_as_good, figures, current, previous.reference)
