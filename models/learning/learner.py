"""What a task asks of a network that learns. A new task is one more module and one line in LEARNERS."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.nets.parts import Parts
from models.records import Task

if TYPE_CHECKING:
    from models.learning.loading import Batch
    from models.learning.recipe import Recipe

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
    main_metric: str  # decides which epoch is kept; higher is better, unless the learner says lower_is_better

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


class Updates(Protocol):
    """Makes the updates of a training, whatever number of optimizers it takes."""

    def update(self, batches: "Sequence[Batch]", rate: float, epoch: int, step: int) -> dict[str, float]:
        """Learns from the batches together, and returns the mean of each loss over their images.

        Raises NonFiniteLoss, and then the weights are of no use. `epoch` and `step` are for its message.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on but the weights: tensors, numbers, lists and dicts of these."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


@runtime_checkable
class AlternatingLearner(Learner, Protocol):
    """A Learner of several networks that learn against each other, so that one sum of losses is not enough.

    It learns on one device, and its `losses` are not called.
    """

    averaged: tuple[str, ...]  # the modules of the network whose weights are averaged, if weights are

    def updater(
        self,
        recipe: "Recipe",
        device: torch.device,
        cast: Callable[[], AbstractContextManager],
        names: Sequence[str],
    ) -> Updates:
        """New updates of the network, which is on the device; `names`: of the training images, for messages."""


@runtime_checkable
class Sampler(Protocol):
    """A Learner that can show after each epoch what it has learned."""

    def samples(self) -> NDArray[np.uint8]:
        """Images [n, height, width, 3], always from the same latents or images; in evaluation mode."""


@runtime_checkable
class Watcher(Protocol):
    """A Learner whose training can go wrong in ways that no loss shows."""

    def watch(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """What is to be said after the last epoch of the history, if anything."""


@runtime_checkable
class Scheduled(Protocol):
    """A Learner whose losses change in the course of a training."""

    def at(self, done: float) -> None:
        """To be called before each update: the share of all updates that are done, 0 to below 1."""


@runtime_checkable
class Finishing(Protocol):
    """A Learner that looks at training images once more when the best weights are in place."""

    num_finishing: int  # images that it looks at, at most

    def finish(self, batches: Iterable[Tensor]) -> None:
        """Images uint8 [batch, height, width, 3] of the whole training split, in evaluation mode."""


def lower_is_better(learner: Learner) -> bool:
    """Whether its main metric is a distance or an error."""
    return getattr(learner, "lower_is_better", False)
