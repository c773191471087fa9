"""How far two runs of a model may differ, by task: PyTorch and the graph, a graph alone and in a batch.

A new task is one more entry in `COMPARISONS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.records import Task
from models.runtime.results import Outputs

_MATCHED = ("rows", "labels", "scores", "boxes_xyxy")

# Log-probabilities are compared down to here; below, rounding is all there is.
_SMALLEST_PROBABILITY = 1e-6
# A changed best label counts where PyTorch preferred it to the second by more than this.
_CLEAR_MARGIN = 0.01
# Probabilities that vary less over the images are the same answer for all of them.
_SAME_ANSWER = 1e-6


@dataclass(frozen=True)
class Comparison:
    """How the outputs of one task are compared, and how far they may differ, by the precision of the engine."""

    # (expected, actual, tolerance, card) → how many findings were compared, and the largest differences by name
    differences: Callable[[Outputs, Outputs, Mapping[str, float], Card], tuple[int, dict[str, float]]]
    tolerance: dict[str, dict[str, float]]


def compare_probabilities(
    expected: Outputs, actual: Outputs, tolerance: Mapping[str, float], card: Card
) -> tuple[int, dict[str, float]]:
    """`top_label` is the share of images whose best label changed although it was clear."""
    want, got = expected["probabilities"], actual["probabilities"]  # [batch, classes]
    shown = want > _SMALLEST_PROBABILITY
    logs = np.abs(np.log(np.where(shown, want, 1)) - np.log(np.where(shown, np.maximum(got, 1e-30), 1)))
    best_two = np.sort(want, axis=1)[:, -2:]
    clear = (best_two[:, -1] - best_two[:, 0] > _CLEAR_MARGIN) | (want.shape[1] == 1)
    changed = clear & (want.argmax(axis=1) != got.argmax(axis=1))
    differ = float(np.ptp(want, axis=0).max()) > _SAME_ANSWER  # else the network is asleep, and nothing was compared
    return len(want) if differ else 0, {
        "probabilities": float(np.abs(want - got).max()),
        "log_probabilities": float(logs.max()),
        "top_label": float(changed.mean()),
    }


def compare_detections(
    expected: Outputs, actual: Outputs, tolerance: Mapping[str, float], card: Card
) -> tuple[int, dict[str, float]]:
    """As sets: equal scores come in any order. `unmatched` is the share of boxes without a counterpart.

    A box may lack one if its score is, within the tolerance, the lowest that is reported.
    """
    compared, _, largest = _match(expected, actual, tolerance, card)
    return compared, largest


def compare_instances(
    expected: Outputs, actual: Outputs, tolerance: Mapping[str, float], card: Card
) -> tuple[int, dict[str, float]]:
    """As `compare_detections`, and the masks of the boxes that match, mask by mask.

    `masks` is the largest mean difference of one mask, `mask_pixels` the largest share of one mask's pixels that passed
    a half.
    """
    compared, pairs, largest = _match(expected, actual, tolerance, card)
    want, got = (outputs["masks"][list(rows)] for outputs, rows in ((expected, pairs[0]), (actual, pairs[1])))
    changed = (want > 0.5) != (got > 0.5)  # [matched, m, m]
    largest["masks"] = float(np.abs(want - got).mean(axis=(1, 2)).max(initial=0.0))
    largest["mask_pixels"] = float(changed.mean(axis=(1, 2)).max(initial=0.0))
    return compared, largest


def compare_class_maps(
    expected: Outputs, actual: Outputs, tolerance: Mapping[str, float], card: Card
) -> tuple[int, dict[str, float]]:
    """`pixels` is the largest share of one image's pixels whose class changed; two classes may tie in some."""
    want, got = expected["class_map"], actual["class_map"]  # [batch, h, w]
    differ = bool((want != want[0, 0, 0]).any())  # else the network is asleep, and nothing was compared
    return len(want) if differ else 0, {"pixels": float((want != got).mean(axis=(1, 2)).max())}


def compare_images(
    expected: Outputs, actual: Outputs, tolerance: Mapping[str, float], card: Card
) -> tuple[int, dict[str, float]]:
    """`levels` is the largest difference of any value, in grey levels of 255; `mean_level` that of one image's mean."""
    want, got = (outputs["images_out"].astype(np.int16) for outputs in (expected, actual))  # [batch, h, w, 3]
    differ = bool((want != want[:1]).any())  # else the network is asleep, and nothing was compared
    levels = np.abs(want - got)
    return len(want) if differ else 0, {
        "levels": float(levels.max()),
        "mean_level": float(levels.mean(axis=(1, 2, 3)).max()),
    }


def compare_embeddings(
    expected: Outputs, actual: Outputs, tolerance: Mapping[str, float], card: Card
) -> tuple[int, dict[str, float]]:
    """`embedding` is the largest distance of a vector from its counterpart, as a share of the vectors' spread over
    the images; `anomaly` likewise."""
    want, got = expected["embedding"], actual["embedding"]  # [batch, d]
    spread = float(np.sqrt(((want - want.mean(axis=0)) ** 2).sum(axis=1).mean()))
    differ = spread > _SAME_ANSWER  # else the network is asleep, and nothing was compared
    distance = np.sqrt(((want - got) ** 2).sum(axis=1)).max()
    scale = max(float(expected["anomaly"].std()), 1e-3 * float(np.abs(expected["anomaly"]).max()), _SAME_ANSWER)
    return len(want) if differ else 0, {
        "embedding": float(distance) / max(spread, _SAME_ANSWER),
        "anomaly": float(np.abs(expected["anomaly"] - actual["anomaly"]).max()) / scale,
    }


def _match(
    expected: Outputs, actual: Outputs, tolerance: Mapping[str, float], card: Card
) -> tuple[int, tuple[list[int], list[int]], dict[str, float]]:
    """How many objects were compared, the rows of those that match on each side, and the largest differences."""
    pairs: tuple[list[int], list[int]] = ([], [])
    compared, unmatched = 0, 0
    largest = {"scores": 0.0, "boxes_xyxy": 0.0}
    for image in np.union1d(expected["batch_index"], actual["batch_index"]):
        want, got = _of_image(expected, image), _of_image(actual, image)
        left = list(range(len(got["scores"])))
        compared += len(want["scores"])
        missing = []  # scores of boxes without a counterpart, of either side
        for row, label, score, box in zip(*(want[name] for name in _MATCHED), strict=True):
            near = [
                (float(np.abs(got["boxes_xyxy"][k] - box).max()), k)
                for k in left
                if got["labels"][k] == label and abs(got["scores"][k] - score) <= tolerance["scores"]
            ]
            distance, k = min(near, default=(math.inf, -1))
            if distance > tolerance["boxes_xyxy"]:
                missing.append(score)
                continue
            left.remove(k)
            pairs[0].append(row)
            pairs[1].append(got["rows"][k])
            largest["boxes_xyxy"] = max(largest["boxes_xyxy"], distance)
            largest["scores"] = max(largest["scores"], float(abs(got["scores"][k] - score)))
        missing += [got["scores"][k] for k in left]
        lowest = card.score_floor
        if len(want["scores"]) == len(got["scores"]) > 0:  # both may be full: then the cut is at the last score
            lowest = max(want["scores"].min(), got["scores"].min())
        unmatched += sum(1 for score in missing if not score <= lowest + tolerance["scores"])
    return compared, pairs, {**largest, "unmatched": unmatched / max(compared, 1)}


_BOX_TOLERANCE = {
    "fp32": {"scores": 1e-3, "boxes_xyxy": 0.1, "unmatched": 0.01},
    "bf16": {"scores": 0.05, "boxes_xyxy": 4.0, "unmatched": 0.05},
    "fp16": {"scores": 0.02, "boxes_xyxy": 2.0, "unmatched": 0.02},
    "int8": {"scores": 0.1, "boxes_xyxy": 8.0, "unmatched": 0.1},
}

_IMAGE_TOLERANCE = {
    "fp32": {"levels": 1.0, "mean_level": 0.01},
    "bf16": {"levels": 16.0, "mean_level": 1.0},
    "fp16": {"levels": 8.0, "mean_level": 0.5},
    "int8": {"levels": 64.0, "mean_level": 4.0},
}

COMPARISONS: dict[Task, Comparison] = {
    Task.CLASSIFY: Comparison(
        compare_probabilities,
        {
            "fp32": {"probabilities": 1e-4, "log_probabilities": 0.01, "top_label": 0.0},
            "bf16": {"probabilities": 0.05, "log_probabilities": 1.0, "top_label": 0.0},
            "fp16": {"probabilities": 0.02, "log_probabilities": 0.5, "top_label": 0.0},
            "int8": {"probabilities": 0.1, "log_probabilities": 2.0, "top_label": 0.0},
        },
    ),
    Task.DETECT: Comparison(compare_detections, _BOX_TOLERANCE),
    Task.INSTANCE: Comparison(
        compare_instances,
        {
            precision: {**_BOX_TOLERANCE[precision], "masks": mean, "mask_pixels": share}
            for precision, mean, share in (
                ("fp32", 1e-3, 0.01),
                ("bf16", 0.05, 0.1),
                ("fp16", 0.02, 0.05),
                ("int8", 0.1, 0.2),
            )
        },
    ),
    Task.SEMANTIC: Comparison(
        compare_class_maps,
        {"fp32": {"pixels": 1e-3}, "bf16": {"pixels": 0.02}, "fp16": {"pixels": 0.01}, "int8": {"pixels": 0.05}},
    ),
    Task.GENERATE: Comparison(compare_images, _IMAGE_TOLERANCE),
    Task.TRANSLATE: Comparison(compare_images, _IMAGE_TOLERANCE),
    Task.EMBED: Comparison(
        compare_embeddings,
        {
            "fp32": {"embedding": 1e-3, "anomaly": 1e-3},
            "bf16": {"embedding": 0.05, "anomaly": 0.1},
            "fp16": {"embedding": 0.02, "anomaly": 0.05},
            "int8": {"embedding": 0.2, "anomaly": 0.3},
        },
    ),
}


def _of_image(outputs: Outputs, image: int) -> dict[str, NDArray]:
    rows = np.flatnonzero(outputs["batch_index"] == image)
    return {"rows": rows, **{name: outputs[name][rows] for name in _MATCHED[1:]}}
