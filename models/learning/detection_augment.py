"""Images varied for detectors: a part at another scale, several in one, mirrored, in other colours; objects follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from models.imaging.geometry import ResizeRule
from models.learning.augment import VARIATIONS, Augmentation, Unvaried, enlarged, random_colours, random_crop
from models.learning.augment import Variation as WholeVariation
from models.learning.mosaic import Shown, mixed_up, mosaic, random_warp, warp
from models.learning.moved_objects import Objects, cut_out, mirrored
from models.settings.train import Augment

__all__ = ["augmentation", "cut_out", "mirrored"]

_CLOSING = 0.15  # share of the epochs, the last ones, in which each image is seen by itself, as in use


@dataclass(frozen=True)
class Variation:
    """How much images of objects are varied beyond what is varied of any image."""

    warped: float  # share of images
    degrees: float  # by which these are turned at most
    shear: float  # degrees, along both sides, at most
    mosaics: float  # share of images that become part of a mosaic, where mosaics are made
    scales: tuple[float, float]  # at which a mosaic shows images, by the size that they have in use
    mixed: float  # share of images that are mixed with another one, where mosaics are made


# The box of a turned object is the frame of its turned box, and so too large, by some tenth at 5 degrees.
OF_OBJECTS: dict[Augment, Variation] = {
    "light": Variation(warped=0.0, degrees=0.0, shear=0.0, mosaics=0.5, scales=(0.6, 1.2), mixed=0.0),
    "strong": Variation(warped=0.5, degrees=5.0, shear=2.0, mosaics=0.8, scales=(0.4, 1.4), mixed=0.15),
}


def augmentation(name: Augment, rule: ResizeRule, flip: bool = True, mosaic: bool = False) -> Augmentation:
    """The named variation of images of objects (models.learning.moved_objects); see models.learning.augment.

    rule: of the network. flip: mirror half of the images. mosaic: show several images in one, until shortly before the
    end; the light variation does so with half of the images, the strong one with most, and mixes some. `none` gives
    what the network is given in use.
    """
    variation = VARIATIONS[name]
    if variation is None:
        return Unvaried(rule)
    alone = VariedObjects(rule, variation, OF_OBJECTS[name], flip)
    return MixedObjects(alone) if mosaic else alone


class VariedObjects:
    """An Augmentation: a part of one image, perhaps mirrored and warped, in other colours."""

    def __init__(self, rule: ResizeRule, variation: WholeVariation, of_objects: Variation, flip: bool):
        self.training_rule = enlarged(rule, variation.enlarge)
        self.rule, self.of_objects = rule, of_objects
        self._variation, self._flip = variation, flip

    def __call__(self, image: Tensor, target: Objects, seed: int) -> tuple[Tensor, Objects]:
        """See Augmentation; target: the objects in pixels of `image`."""
        drawn = np.random.default_rng(seed)
        return self.finished(drawn, self.part(drawn, image, target))

    def part(self, drawn: Generator, image: Tensor, target: Objects) -> Shown:
        """A part of an image by the training rule, in the size of the network's input."""
        variation, size_hw = self._variation, (self.rule.height, self.rule.width)
        cut = random_crop(drawn, image.shape[1], image.shape[2], variation.min_area, variation.max_stretch)
        part = F.resized_crop(image, *cut, list(size_hw), InterpolationMode(self.rule.interpolation), antialias=True)
        return Shown(part, cut_out(target, *cut, size_hw))

    def finished(self, drawn: Generator, shown: Shown) -> Shown:
        """What does not depend on how many images are seen."""
        image, target = shown
        if self._flip and drawn.random() < 0.5:
            image, target = F.horizontal_flip(image), mirrored(target, self.rule.width)
        if drawn.random() < self.of_objects.warped:
            matrix = random_warp(
                drawn, self.of_objects.degrees, self.of_objects.shear, (self.rule.height, self.rule.width)
            )
            image, target = warp(Shown(image, target), matrix, self.rule.pad_rgb)
        return Shown(random_colours(drawn, image, self._variation.colour), target)


class MixedObjects:
    """A Mixing and Changing Augmentation: some images are seen in a mosaic with three others, some mixed with another
    one, and the rest as VariedObjects shows them; all are in the last epochs."""

    def __init__(self, alone: VariedObjects):
        self.training_rule = alone.training_rule
        self._alone = alone
        self._enlarged = alone.training_rule.height / alone.rule.height

    def partners(self, seed: int, count: int) -> list[int]:
        """See Mixing: three for a mosaic, and one to be mixed with."""
        is_mosaic, is_mixed = self._drawn(np.random.default_rng(seed))
        return np.random.default_rng((seed, 1)).integers(count, size=3 * is_mosaic + is_mixed).tolist()

    def at_epoch(self, epoch: int, epochs: int) -> Augmentation:
        """See Changing. The last of several epochs is always without mosaics."""
        closing = max(1, round(_CLOSING * epochs)) if epochs > 1 else 0
        return self if epoch < epochs - closing else self._alone

    def __call__(
        self, image: Tensor, target: Objects, seed: int, partners: Sequence[tuple[Tensor, Objects]] = ()
    ) -> tuple[Tensor, Objects]:
        """See Mixing; targets: the objects in pixels of their image."""
        drawn = np.random.default_rng(seed)
        is_mosaic, is_mixed = self._drawn(drawn)
        shown = self._seen(drawn, [Shown(image, target), *(Shown(*partner) for partner in partners[: 3 * is_mosaic])])
        if is_mixed:
            shown = mixed_up(drawn, shown, self._seen(drawn, [Shown(*partners[-1])]))
        return self._alone.finished(drawn, shown)

    def _drawn(self, drawn: Generator) -> tuple[bool, bool]:
        """Whether an image is seen in a mosaic, and whether it is mixed with another one."""
        return drawn.random() < self._alone.of_objects.mosaics, drawn.random() < self._alone.of_objects.mixed

    def _seen(self, drawn: Generator, images: Sequence[Shown]) -> Shown:
        """One image or four, in the size of the network's input."""
        if len(images) > 1:
            return mosaic(drawn, images, self._alone.rule, self._enlarged, self._alone.of_objects.scales)
        ((image, target),) = images
        return self._alone.part(drawn, _padded(image, self.training_rule), target)


def _padded(image: Tensor, rule: ResizeRule) -> Tensor:
    """An image without padding [3, rows, columns] as the rule gives it [3, height, width]."""
    if image.shape[1:] == (rule.height, rule.width):
        return image
    canvas = image.new_empty((rule.height, rule.width, 3)).permute(2, 0, 1)  # as images lie in memory
    canvas[:] = canvas.new_tensor(rule.pad_rgb)[:, None, None]
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas
