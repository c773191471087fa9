"""How good a model is: the figures of each task, and where they stand in its card.

card.metrics = {
    "dataset": "NAME@VERSION",   what it was measured on
    "val": {…}, "test": {…},     the figures of a split, as `measure` of the task gives them
    "temperature": 1.3,          of classifiers: fitted on the validation split; null where it could not be
    "gate": {…},                 of variants only: the exact model and the variant side by side, see tasks.export
}
The figures of a split are plain JSON: the main metric under its name in MAIN_METRIC, "images", "not_ok", "engine", and
what the task has to add. A new task is one more module, and one line in MEASURES and MAIN_METRIC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import pyarrow as pa

from models.card import Card
from models.errors import ModelError, UsageError
from models.records import Task

# Task → its module of models.learning with the functions `measure` (a Measure), and
#   per_class(metrics) → the figure of each class that the gate of an export shows, by the name of the class
MEASURES: dict[Task, str] = {
    Task.CLASSIFY: "classification_metrics",
    Task.DETECT: "detection_metrics",
    Task.INSTANCE: "detection_metrics",
    Task.SEMANTIC: "segmentation_metrics",
    Task.EMBED: "embedding_metrics",
    # Without `measure`: tasks.evaluate_generator and .evaluate_translator compare samples, no rows.
    Task.GENERATE: "generative_metrics",
    Task.TRANSLATE: "generative_metrics",
}

# Decides what is promoted and what an export may lose; 0 to 1 (elbo: nats per value of an image) and
# higher is better, unless it is in LOWER_IS_BETTER.
MAIN_METRIC: dict[Task, str] = {
    Task.CLASSIFY: "top1",
    Task.DETECT: "ap",
    Task.INSTANCE: "mask_ap",
    Task.SEMANTIC: "miou",
    Task.EMBED: "elbo",
    Task.GENERATE: "frechet",
    Task.TRANSLATE: "frechet",
}
LOWER_IS_BETTER = frozenset({"frechet"})


class Measure(Protocol):
    """Compares the rows of predicted images with what the data set says of them."""

    def __call__(
        self,
        rows: pa.Table,
        images: pa.Table,
        annotations: pa.Table,
        labels: Sequence[str],
        classes: Sequence[str],
        temperature: float | None,
        fit: bool,
        score: float,
    ) -> dict[str, Any]:
        """The figures of one split.

        `rows`: image, status and the task's result column, one row per image of `images` (IMAGES_SCHEMA) in any order;
        of an image that has another status than ok nothing was found. `annotations` (ANNOTATIONS_SCHEMA): those of
        these images. `labels`: the model's, of one without labels those of its training images; `classes`: the data
        set's. `temperature`, `score`: those of the model's
        card; findings below the score are among the rows. `fit`: these images may also say which temperature or score
        is best. Raises UsageError where labels and classes have none in common.
        """


def task_module(task: Task) -> Any:
    """The module with `measure` and `per_class`.

    Raises UsageError for a task that cannot be measured, ModelError where a package is missing.
    """
    if task not in MEASURES:
        raise UsageError(f"models of task {task} cannot be measured; those of task {', '.join(MEASURES)} can")
    for package in ("torchmetrics", "faster_coco_eval"):
        if find_spec(package) is None:
            raise ModelError(f"measuring a model needs {package}: pip install 'pixelmill[train]'")
    return import_module(f"models.learning.{MEASURES[task]}")


def unknown_classes(labels: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The classes of a data set that a model with these labels does not know. Raises UsageError if it knows none."""
    known = set(labels)
    unknown = [name for name in classes if name not in known]
    if len(unknown) == len(classes):
        raise UsageError(
            f"the model and the data set have no class in common: the model knows {_some(list(dict.fromkeys(labels)))},"
            f" the data set has {_some(list(classes))}"
        )
    return unknown


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} … ({len(names)})"


@dataclass(frozen=True)
class MainMetric:
    """The one figure that stands for a model."""

    name: str
    value: float
    split: str


def main_metric(card: Card) -> MainMetric | None:
    """Of the test split, else of the validation split; None if the card has neither."""
    name = MAIN_METRIC.get(card.task, "")
    for split in ("test", "val"):
        measured: Mapping[str, Any] = card.metrics.get(split, {})
        if measured.get(name) is not None:
            return MainMetric(name, float(measured[name]), split)
    return None
