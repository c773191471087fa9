"""What a task asks of a network that learns. A new task is one more module and one line in LEARNERS."""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from models.nets.parts import Parts
from models.records import Task

# Task → the module of models.learning with its functions:
#   targets(images, annotations, classes) → one target per row of `images` (Arrow tables of models.dataset)
#   placed(target, geometry, size_hw) → the target in an input of that size; where it moves with its image
#   augmentation(name, rule, flip) → see models.learning.augment; of detectors also with `mosaic`
#   learner(network, parts, card, recipe) → a Learner
LEARNERS: dict[Task, str] = {
    Task.CLASSIFY: "classification",
    Task.DETECT: "detection",
    Task.INSTANCE: "instances",
    Task.SEMANTIC: "segmentation",
    Task.GENERATE: "adversarial",
    Task.TRANSLATE: "translation",
    Task.EMBED: "embedding",
}


def task_module(task: Task) -> ModuleType:
    """The functions of a task."""
    return import_module(f"models.learning.{LEARNERS[task]}")


class Scores(Protocol):
    """Adds up the metrics of a validation split."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Takes one batch."""

    def compute(self) -> dict[str, float]:
        """Metric by name."""


class Learner(Protocol):
    """A network with its losses and metrics. Images are uint8 [batch, height, width, 3], on the network's device."""

    network: nn.Module
    parts: Parts
    main_metric: str  # decides which epoch is kept; higher is better

    def collate(self, targets: Sequence[Any]) -> Any:
        """The targets of a batch as tensors."""

    def losses(self, images: Tensor, targets: Any) -> dict[str, Tensor]:
        """Losses by name, to be added up; the network is in training mode where it learns."""

    def outputs(self, images: Tensor) -> Any:
        """What the network answers, in evaluation mode."""

    def scores(self) -> Scores:
        """New, empty metrics."""


@runtime_checkable
class HeadLearner(Learner, Protocol):
    """A Learner whose head is given so little of an image that it can be computed once and kept."""

    def features(self, images: Tensor) -> Tensor:
        """What the head is given [batch, …]."""

    def head_losses(self, features: Tensor, targets: Any) -> dict[str, Tensor]:
        """The same as `losses`, from what `features` gave."""

    def head_outputs(self, features: Tensor) -> Any:
        """The same as `outputs`, from what `features` gave."""
