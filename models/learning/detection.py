"""How detectors learn: boxes as targets, the losses of their family, COCO's average precision."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models import catalog
from models.card import Card
from models.learning.average_precision import FoundObjects, TrueObjects, precisions
from models.learning.detection_augment import augmentation
from models.learning.object_targets import placed, targets
from models.learning.recipe import Recipe
from models.nets.parts import Parts

__all__ = ["augmentation", "learner", "placed", "targets"]


def learner(network: nn.Module, parts: Parts, card: Card, recipe: Recipe) -> "DetectionLearner":
    """See models.learning.learner."""
    return DetectionLearner(network, parts, card)


class DetectionLearner:
    """A Learner. Targets are a list with a dict per image: boxes_xyxy f32 [n, 4] in pixels of the input, labels i64
    [n], ignored bool [n]; outputs are those of the ONNX contract, by name."""

    main_metric = "ap"

    def __init__(self, network: nn.Module, parts: Parts, card: Card):
        self.network = network
        self.parts = parts
        self._card = card

    def collate(self, targets: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A list: every image has a number of objects of its own."""
        return list(targets)

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Those of the family."""
        family = catalog.entry(self._card.architecture).family_module()
        return family.losses(self.network, images, targets)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """boxes_xyxy, scores, labels, batch_index."""
        family = catalog.entry(self._card.architecture).family_module()
        return family.reference(self.network, self._card)(images)

    def features(self, images: Tensor) -> None:
        """There is no head to train by itself."""

    def head_losses(self, features: Tensor, targets: Any) -> dict[str, Tensor]:
        """Not asked for: there are no features."""
        raise NotImplementedError

    def head_outputs(self, features: Tensor) -> Any:
        """Not asked for: there are no features."""
        raise NotImplementedError

    def scores(self) -> "DetectionScores":
        """Average precision, over IoU .5 to .95, at .5 and at .75."""
        return DetectionScores(len(self._card.labels))


class DetectionScores:
    """Adds up over a validation split; in pixels of the input."""

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._true: list[TrueObjects] = []
        self._found: list[FoundObjects] = []

    def update(self, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> None:
        """Takes one batch."""
        found = {name: value.detach().cpu() for name, value in outputs.items()}
        for number, target in enumerate(targets):
            boxes = target["boxes_xyxy"].cpu().numpy()
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            self._true.append(
                TrueObjects(boxes, target["labels"].cpu().numpy(), target["ignored"].cpu().numpy(), areas)
            )
            rows = found["batch_index"] == number
            self._found.append(
                FoundObjects(
                    found["boxes_xyxy"][rows].float().numpy(),
                    found["labels"][rows].numpy(),
                    found["scores"][rows].float().numpy(),
                )
            )

    def compute(self) -> dict[str, float]:
        """ap, ap50 and ap75 (0…1); 0 where the split shows no object."""
        measured = precisions(self._true, self._found, self._num_classes)
        return {"ap": measured.ap() or 0.0, "ap50": measured.ap(iou=0) or 0.0, "ap75": measured.ap(iou=5) or 0.0}
