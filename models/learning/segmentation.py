"""How segmenters learn: maps from a data set's masks, cross entropy and Dice, mean IoU."""

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models import catalog
from models.card import Card
from models.imaging.geometry import Geometry
from models.learning.recipe import Recipe
from models.learning.segmentation_augment import augmentation
from models.learning.segmentation_regions import IGNORED, Regions, regions_of
from models.nets.classifiers import MEAN_RGB, STD_RGB
from models.nets.normalisation import Normalise
from models.nets.parts import Parts

__all__ = ["augmentation", "learner", "placed", "targets"]


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str]) -> list[Regions]:
    """The annotations of each image, by row of `images`; an image may have none, and is background then.

    Raises UsageError for what `regions_of` refuses.
    """
    return regions_of(images, annotations, classes)


def placed(target: Regions, geometry: Geometry, size_hw: tuple[int, int]) -> Tensor:
    """The map uint8 [rows, columns] as the image lies in the network's input, without the padding around it.

    Each pixel is what the original is at its centre, as each pixel of the original later gets what the map is at its
    own (models.imaging.mask_runs.segments_of_map): what is there and back again has moved nowhere.
    """
    drawn = target.drawn()  # [height, width]
    y, x = geometry.sources_yx(size_hw)
    return torch.from_numpy(drawn[y[:, None], x])


def learner(network: nn.Module, parts: Parts, card: Card, recipe: Recipe) -> "SegmentationLearner":
    """See models.learning.learner."""
    return SegmentationLearner(network, parts, card, recipe.label_smoothing)


class SegmentationLearner:
    """A Learner. Outputs are logits f32 [batch, 1 + classes, height, width], targets int64 [batch, height, width].

    The loss is the mean cross entropy of the pixels plus one less the Dice coefficient, as in nnU-Net (Isensee et al.,
    arXiv 1809.10486, section 2.2). In the Dice coefficient a small class counts as much as a large one, so that the
    cross entropy needs no weights.
    """

    main_metric = "miou"

    def __init__(self, network: nn.Module, parts: Parts, card: Card, label_smoothing: float = 0.0):
        self.network = network
        self.parts = parts
        self.label_smoothing = label_smoothing
        self._num_values = 1 + len(card.labels)
        self._architecture = card.architecture
        self._size_hw = card.input.height, card.input.width
        self._normalise = Normalise(MEAN_RGB, STD_RGB)

    def collate(self, targets: Sequence[Tensor]) -> Tensor:
        """[batch, height, width]; what a map lacks at the right and below is padding, and ignored."""
        maps = torch.full((len(targets), *self._size_hw), IGNORED, dtype=torch.int64)
        height, width = self._size_hw
        for map_, target in zip(maps, targets, strict=True):
            map_[: target.shape[0], : target.shape[1]] = target[:height, :width]
        return maps

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross entropy and Dice, and the weighted sum of both for an auxiliary head, where the network has one."""
        logits, auxiliary = self._logits(images)
        return self._losses(logits, targets) | {
            name: weight * torch.stack([*self._losses(aux, targets).values()]).sum()
            for name, (weight, aux) in auxiliary.items()
        }

    def outputs(self, images: Tensor) -> Tensor:
        """[batch, 1 + classes, height, width]"""
        return self._logits(images)[0].float()

    def scores(self) -> "SegmentationScores":
        """Mean IoU, the share of right pixels, and the mean cross entropy."""
        return SegmentationScores(self._num_values)

    def _logits(self, images: Tensor) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        family = catalog.entry(self._architecture).family_module()
        prepared = self._normalise.to(images.device)(images)  # [batch, 3, height, width]
        return family.training_logits(self.network(prepared))

    def _losses(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = logits.float()
        return {
            "cross_entropy": pixel_loss(logits, targets, self.label_smoothing),
            "dice": dice_loss(logits, targets),
        }


def pixel_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy of the pixels that are not ignored; 0 where all are.

    logits [batch, values, height, width], targets [batch, height, width].
    """
    total = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    return total / (targets != IGNORED).sum().clamp_min(1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - the Dice coefficient (Milletari et al., V-Net, arXiv 1606.04797), the mean over the classes that are there.

    Each coefficient is that of the whole batch, so that an image without the class is no special case; 0 where no class
    but the background is there. logits [batch, values, height, width], targets [batch, height, width].
    """
    judged = (targets != IGNORED)[:, None]  # [batch, 1, height, width]
    values = torch.arange(1, logits.shape[1], device=logits.device)  # [classes]
    is_class = targets[:, None] == values[:, None, None]  # [batch, classes, height, width]
    probabilities = logits.softmax(dim=1)[:, 1:] * judged  # [batch, classes, height, width]
    both, size = (probabilities * is_class).sum(dim=(0, 2, 3)), is_class.sum(dim=(0, 2, 3))  # [classes] each
    coefficients = 2 * both / (probabilities.sum(dim=(0, 2, 3)) + size).clamp_min(1)
    present = size > 0
    return ((1 - coefficients) * present).sum() / present.sum().clamp_min(1)


class SegmentationScores:
    """Adds up a confusion matrix over a validation split, in the pixels of the network's input."""

    def __init__(self, num_values: int):
        self._counts = torch.zeros(num_values, num_values, dtype=torch.int64)  # true × predicted
        self._loss = 0.0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs: logits [batch, 1 + classes, height, width]; targets: [batch, height, width]"""
        judged = targets != IGNORED
        pairs = targets[judged] * len(self._counts) + outputs.argmax(dim=1)[judged]
        self._counts += torch.bincount(pairs.cpu(), minlength=self._counts.numel()).view_as(self._counts)
        self._loss += float(cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum"))

    def compute(self) -> dict[str, float]:
        """miou and pixel_accuracy (0…1), and loss (nats); see models.learning.segmentation_metrics for the mean."""
        counts = self._counts.double()
        right, true = counts.diagonal(), counts.sum(dim=1)  # [values] each
        iou = right / (true + counts.sum(dim=0) - right).clamp_min(1)
        present, pixels = true > 0, max(float(counts.sum()), 1.0)
        miou = float(iou[present].mean()) if present.any() else 0.0
        return {"miou": miou, "pixel_accuracy": float(right.sum()) / pixels, "loss": self._loss / pixels}
