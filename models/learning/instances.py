"""How detectors that draw masks learn: as detectors, with the masks of their objects."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from models.card import Card
from models.imaging.mask_runs import paste_mask
from models.imaging.masks import encode
from models.learning import object_targets
from models.learning.average_precision import FoundObjects, Mask, TrueObjects
from models.learning.detection import DetectionLearner, DetectionScores
from models.learning.detection_augment import augmentation
from models.learning.object_targets import Objects, placed
from models.learning.recipe import Recipe
from models.nets.parts import Parts

__all__ = ["augmentation", "learner", "placed", "targets"]


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str]) -> list[Objects]:
    """See models.learning.object_targets; with masks."""
    return object_targets.targets(images, annotations, classes, with_masks=True)


def learner(network: nn.Module, parts: Parts, card: Card, recipe: Recipe) -> "InstanceLearner":
    """See models.learning.learner."""
    return InstanceLearner(network, parts, card, recipe.multi_scale)


class InstanceLearner(DetectionLearner):
    """A Learner as for detection; targets also have masks bool [n, height, width]."""

    main_metric = "mask_ap"

    def scores(self) -> "InstanceScores":
        """Average precision by masks."""
        return InstanceScores(len(self._card.labels))


class InstanceScores(DetectionScores):
    """Average precision by masks, in pixels of the input."""

    kind = "segm"
    prefix = "mask_"

    def true_objects(self, target: dict[str, Tensor]) -> TrueObjects:
        """Of one image, with masks."""
        masks = target["masks"].cpu().numpy()  # [n, height, width]
        areas = masks.sum(axis=(1, 2)).astype(np.float64)
        coded = [_mask(encode(mask), mask.shape) for mask in masks]
        return super().true_objects(target)._replace(areas=areas, masks=coded)

    def found_objects(self, outputs: dict[str, Tensor], target: dict[str, Tensor]) -> FoundObjects:
        """In one image, each mask drawn into its box."""
        size_hw = target["masks"].shape[1:]
        found = super().found_objects(outputs, target)
        drawn = zip(outputs["masks"].float().numpy(), found.boxes_xyxy.astype(np.float64), strict=True)
        return found._replace(masks=[_mask(paste_mask(mask, box, *size_hw)[0], size_hw) for mask, box in drawn])


def _mask(counts: str, size_hw: Sequence[int]) -> Mask:
    return {"size": list(size_hw), "counts": counts}
