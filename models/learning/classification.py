"""How classifiers learn: targets from a data set's labels, cross entropy, top-1 and top-5."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from models.card import Card
from models.errors import UsageError
from models.learning.augment import augmentation
from models.learning.recipe import Recipe
from models.nets import classifiers
from models.nets.normalisation import Normalise
from models.nets.parts import Parts

__all__ = ["augmentation", "learner", "targets"]  # an image keeps its class however it is varied


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str]) -> list[int]:
    """The index of each image's class, by row of `images`. Raises UsageError that names an image that has none."""
    index = {name: number for number, name in enumerate(classes)}
    found = []
    for image, label in zip(images["image"].to_pylist(), images["label"].to_pylist(), strict=True):
        if label not in index:
            wrong = "no label" if label is None else f"the label {label!r}, which is not among the classes"
            raise UsageError(
                f"a classifier learns from images with one label each, but {image} has {wrong}: "
                "ingest a folder with one folder of images per class"
            )
        found.append(index[label])
    return found


def learner(network: nn.Module, parts: Parts, card: Card, recipe: Recipe) -> "Classification":
    """See models.learning.learner."""
    return Classification(network, parts, len(card.labels), recipe.label_smoothing)


class Classification:
    """A Learner. Outputs are logits f32 [batch, classes], targets int64 [batch]."""

    main_metric = "top1"

    def __init__(self, network: nn.Module, parts: Parts, num_classes: int, label_smoothing: float):
        self.network = network
        self.parts = parts
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        # The loop may put a wrapper in place of `network`, with other names inside.
        self._network = network
        self._head = classifiers.head(network, parts)
        self._normalise = Normalise(classifiers.MEAN_RGB, classifiers.STD_RGB)

    def collate(self, targets: Sequence[int]) -> Tensor:
        """[batch]"""
        return torch.tensor(targets, dtype=torch.int64)

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross entropy with smoothed labels; of the auxiliary heads too, where the network has them."""
        logits, auxiliary = classifiers.training_logits(self.network(self._prepared(images)))
        return self._losses(logits, targets) | {
            name: weight * self._cross_entropy(aux, targets) for name, (weight, aux) in auxiliary.items()
        }

    def outputs(self, images: Tensor) -> Tensor:
        """[batch, classes]"""
        return classifiers.training_logits(self.network(self._prepared(images)))[0].float()

    def features(self, images: Tensor) -> Tensor:
        """What the head is given [batch, channels]."""
        return classifiers.features(self._network, self.parts, self._prepared(images))

    def head_losses(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """As `losses`, without the auxiliary heads: what they are given is not what the head is given."""
        return self._losses(self._head(features), targets)

    def head_outputs(self, features: Tensor) -> Tensor:
        """[batch, classes]"""
        return self._head(features).float()

    def scores(self) -> "ClassificationScores":
        """Top-1, top-5 where there are more than five classes, and the mean cross entropy."""
        return ClassificationScores(self.num_classes)

    def _prepared(self, images: Tensor) -> Tensor:
        return self._normalise.to(images.device)(images)  # [batch, 3, height, width]

    def _losses(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"cross_entropy": self._cross_entropy(logits, targets)}

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)


class ClassificationScores:
    """Adds up over a validation split; `loss` is without label smoothing, so that it compares between trainings."""

    def __init__(self, num_classes: int):
        # Of several processes only one validates, so that none may wait for others.
        options: dict[str, Any] = {"average": "micro", "sync_on_compute": False}
        self._metrics: dict[str, Any] = {"top1": MulticlassAccuracy(num_classes, **options)}
        if num_classes > 5:
            self._metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, **options)
        self._loss = MeanMetric(sync_on_compute=False)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs: logits [batch, classes]; targets: [batch]"""
        outputs, targets = outputs.detach().float().cpu(), targets.cpu()
        for metric in self._metrics.values():
            metric.update(outputs, targets)
        self._loss.update(cross_entropy(outputs, targets, reduction="none"))

    def compute(self) -> dict[str, float]:
        """top1, top5 (0…1) and loss (nats)."""
        found = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        return found | {"loss": float(self._loss.compute())}
