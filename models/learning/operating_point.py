"""The score from which on findings are worth telling."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.card import Card
from models.learning.average_precision import FoundObjects, Kind, TrueObjects
from models.learning.matching import IGNORED, match


@dataclass(frozen=True)
class OperatingPoint:
    """What a detector is worth when findings below a score are dropped; all classes together."""

    score: float
    f1: float
    precision: float
    recall: float


def best_operating_point(
    true: Sequence[TrueObjects], found: Sequence[FoundObjects], num_classes: int, kind: Kind = "bbox"
) -> OperatingPoint:
    """The score with the highest F1 = 2 · precision · recall / (precision + recall) at an overlap of one half.

    It lies in the middle between the lowest score that is kept and the highest that is dropped. Findings of other
    labels than the `num_classes` first do not count. Where no finding is right no score is best: then it is the one
    that cards have from the start, and the rest is 0.
    """
    num_objects = sum(int((~of_image.ignored & (of_image.labels >= 0)).sum()) for of_image in true)
    scores, is_right = [np.empty(0)], [np.empty(0, bool)]
    for of_image, in_image in zip(true, found, strict=True):
        matched = match(of_image, in_image, kind)
        counts = (matched != IGNORED) & (in_image.labels < num_classes)
        scores.append(in_image.scores[counts].astype(np.float64))
        is_right.append(matched[counts] >= 0)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    score, right = np.concatenate(scores)[order], np.concatenate(is_right)[order].cumsum()
    last = np.flatnonzero(np.diff(score, append=-np.inf))  # of each score: equal ones are kept or dropped together
    if not right[-1:].any():
        return OperatingPoint(Card.score, 0.0, 0.0, 0.0)
    f1 = 2 * right[last] / (last + 1 + num_objects)
    best = int(f1.argmax())
    kept = int(last[best])
    lowest, dropped = score[kept], score[kept + 1] if kept + 1 < len(score) else score[kept]
    return OperatingPoint(
        score=float((lowest + dropped) / 2),
        f1=float(f1[best]),
        precision=float(right[kept] / (kept + 1)),
        recall=float(right[kept] / num_objects),
    )
