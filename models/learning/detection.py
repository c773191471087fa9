"""How detectors learn: boxes as targets, the losses of their family, COCO's average precision."""

from collections.abc import Sequence

from torch import Tensor, nn

from models import catalog
from models.card import Card
from models.learning.average_precision import FoundObjects, Kind, TrueObjects, precisions
from models.learning.detection_augment import augmentation
from models.learning.multi_scale import at_random_scale
from models.learning.object_targets import placed, targets
from models.learning.operating_point import best_operating_point
from models.learning.recipe import Recipe
from models.nets.parts import Parts

__all__ = ["augmentation", "learner", "placed", "targets"]


def learner(network: nn.Module, parts: Parts, card: Card, recipe: Recipe) -> "DetectionLearner":
    """See models.learning.learner."""
    return DetectionLearner(network, parts, card, recipe.multi_scale)


class DetectionLearner:
    """A Learner. Targets are a list with a dict per image: boxes_xyxy f32 [n, 4] in pixels of the input, labels i64
    [n], ignored bool [n], difficult bool [n]; outputs are those of the ONNX contract, by name."""

    main_metric = "ap"

    def __init__(self, network: nn.Module, parts: Parts, card: Card, multi_scale: bool = False):
        self.network = network
        self.parts = parts
        self._card = card
        self._multi_scale = multi_scale

    def collate(self, targets: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A list: every image has a number of objects of its own."""
        return list(targets)

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Those of the family; of the batch at another size in each step, if scales are varied."""
        family = catalog.entry(self._card.architecture).family_module()
        if self._multi_scale:
            images, targets = at_random_scale(images, targets)
        return family.losses(self.network, images, targets)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """boxes_xyxy, scores, labels, batch_index, and masks where the family draws them."""
        family = catalog.entry(self._card.architecture).family_module()
        return family.reference(self.network, self._card)(images)

    def scores(self) -> "DetectionScores":
        """Average precision by boxes, and the best score to tell findings from."""
        return DetectionScores(len(self._card.labels))


class DetectionScores:
    """Adds up over a validation split; in pixels of the input. Objects marked difficult may be found or not."""

    kind: Kind = "bbox"
    prefix = ""

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._true: list[TrueObjects] = []
        self._found: list[FoundObjects] = []

    def update(self, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> None:
        """Takes one batch."""
        outputs = {name: value.detach().cpu() for name, value in outputs.items()}
        for number, target in enumerate(targets):
            rows = outputs["batch_index"] == number
            self._true.append(self.true_objects(target))
            self._found.append(self.found_objects({name: value[rows] for name, value in outputs.items()}, target))

    def true_objects(self, target: dict[str, Tensor]) -> TrueObjects:
        """Of one image."""
        boxes = target["boxes_xyxy"].cpu().numpy()
        return TrueObjects(
            boxes_xyxy=boxes,
            labels=target["labels"].cpu().numpy(),
            ignored=(target["ignored"] | target["difficult"]).cpu().numpy(),
            areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        )

    def found_objects(self, outputs: dict[str, Tensor], target: dict[str, Tensor]) -> FoundObjects:
        """In one image; its outputs alone."""
        return FoundObjects(
            outputs["boxes_xyxy"].float().numpy(), outputs["labels"].numpy(), outputs["scores"].float().numpy()
        )

    def compute(self) -> dict[str, float]:
        """ap, ap50 and ap75 (0…1), by masks with that prefix; f1 and the score that gives it. All but the score are 0
        where the split shows no object."""
        measured = precisions(self._true, self._found, self._num_classes, self.kind)
        best = best_operating_point(self._true, self._found, self._num_classes, self.kind)
        figures = {"ap": measured.ap(), "ap50": measured.ap(iou=0), "ap75": measured.ap(iou=5)}
        return {f"{self.prefix}{name}": value or 0.0 for name, value in figures.items()} | {
            "f1": best.f1,
            "score": best.score,
        }
