"""Training images varied at random, and yet the same in every run: an image depends on its seed and on nothing else.

torchvision's own random transforms draw from torch's one global generator, so that what an image becomes would depend
on the number of loader threads, and on where a training was resumed. Here every number is drawn from a generator of the
image's own, and torchvision carries out what was drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from models.imaging.geometry import ResizeRule
from models.settings.train import Augment

_MEAN_RGB = [124.0, 116.0, 104.0]  # of ImageNet: what a pixel is that nothing is known of


class Augmentation(Protocol):
    """Varies prepared images. May be called from any number of threads at once."""

    # Images are prepared by this rule before they are varied. It gives more pixels than the network takes, so that what
    # is cut out of them has the resolution that the network meets later.
    training_rule: ResizeRule

    def __call__(self, image: Tensor, target: Any, seed: int) -> tuple[Tensor, Any]:
        """uint8 [3, rows, columns] by `training_rule` → uint8 [3, height, width] for the network, and its target."""


@runtime_checkable
class Mixing(Augmentation, Protocol):
    """An Augmentation that makes one image of several. It is given images without the padding of a letterbox."""

    def partners(self, seed: int, count: int) -> list[int]:
        """Which of `count` other images are wanted beside the one of this seed, by number; perhaps none."""

    def __call__(
        self, image: Tensor, target: Any, seed: int, partners: Sequence[tuple[Tensor, Any]] = ()
    ) -> tuple[Tensor, Any]:
        """As that of Augmentation; partners: the images that were asked for, and their targets."""


@runtime_checkable
class Changing(Protocol):
    """An Augmentation that is another one in some epochs."""

    def at_epoch(self, epoch: int, epochs: int) -> Augmentation:
        """That of one of so many epochs, counted from 0; images are prepared for all of them by the same rule."""


def image_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one image in one epoch, 64 bits; `index` is its number in the data set, not its place in a batch."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Variation:
    """How much images are varied."""

    enlarge: float  # the training rule's pixels to a side, by those of the network's own rule before it crops
    min_area: float  # share of the prepared image that is cut out at least
    max_stretch: float  # of width against height and the reverse
    colour: float  # brightness, contrast and saturation are multiplied by up to 1 ± this
    operations: int  # how many of _OPERATIONS come after that
    erase: float  # share of images of which one rectangle is blanked


# At 224 of 256 pixels, as most weights want it: light cuts out 198 to 256 pixels, which become 224; strong cuts
# 143 to 320. An object keeps about the size that the network meets in use.
VARIATIONS: dict[Augment, Variation | None] = {
    "none": None,
    "light": Variation(enlarge=1.0, min_area=0.6, max_stretch=1.15, colour=0.2, operations=0, erase=0.0),
    "strong": Variation(enlarge=1.25, min_area=0.2, max_stretch=4 / 3, colour=0.4, operations=2, erase=0.25),
}


def augmentation(name: Augment, rule: ResizeRule, flip: bool = True) -> Augmentation:
    """The named variation of images whose target does not change with them, such as the class of the whole image.

    rule: of the network. flip: mirror half of the images; wrong where left and right differ, as in text. `none` gives
    what the network is given in use.
    """
    variation = VARIATIONS[name]
    return Unvaried(rule) if variation is None else Varied(rule, variation, flip)


class Unvaried:
    """The Augmentation that changes nothing."""

    def __init__(self, rule: ResizeRule):
        self.training_rule = rule

    def __call__(self, image: Tensor, target: Any, seed: int) -> tuple[Tensor, Any]:
        """See Augmentation."""
        return image, target


class Varied:
    """An Augmentation: a part of the image, perhaps mirrored, in other colours, and what else the variation wants."""

    def __init__(self, rule: ResizeRule, variation: Variation, flip: bool):
        self.training_rule = enlarged(rule, variation.enlarge)
        self._size_hw = [rule.height, rule.width]
        self._interpolation = InterpolationMode(rule.interpolation)
        self._variation = variation
        self._flip = flip

    def __call__(self, image: Tensor, target: Any, seed: int) -> tuple[Tensor, Any]:
        """See Augmentation."""
        drawn, variation = np.random.default_rng(seed), self._variation
        top, left, height, width = random_crop(
            drawn, image.shape[1], image.shape[2], variation.min_area, variation.max_stretch
        )
        image = F.resized_crop(
            image, top, left, height, width, self._size_hw, self._interpolation, antialias=True
        )  # [3, height, width]
        if self._flip and drawn.random() < 0.5:
            image = F.horizontal_flip(image)
        image = random_colours(drawn, image, variation.colour)
        for number in drawn.choice(len(_OPERATIONS), variation.operations, replace=False):
            image = _OPERATIONS[number](image, drawn.uniform(-1, 1))
        if drawn.random() < variation.erase:
            top, left, height, width = random_crop(drawn, image.shape[1], image.shape[2], 0.02, 2.0, max_area=0.2)
            image[:, top : top + height, left : left + width] = image.new_tensor(_MEAN_RGB)[:, None, None]
        return image, target


def enlarged(rule: ResizeRule, factor: float) -> ResizeRule:
    """The rule that keeps what `rule` crops away at the sides, at `factor` times its pixels to a side.

    A crop becomes the whole square (or rectangle) out of whose centre the rule cuts; other rules get the usual margin
    of one eighth.
    """
    side = max(rule.height, rule.width)
    factor *= rule.short_side / side if rule.mode == "crop" and rule.short_side else 8 / 7
    height, width = round(rule.height * factor), round(rule.width * factor)
    return replace(rule, height=height, width=width, short_side=max(height, width) if rule.mode == "crop" else None)


def random_crop(
    drawn: Generator, height: int, width: int, min_area: float, max_stretch: float, max_area: float = 1.0
) -> tuple[int, int, int, int]:
    """top, left, height and width, in pixels, of a part of an image with its proportions, more or less stretched."""
    side = math.sqrt(drawn.uniform(min_area, max_area))
    stretch = math.exp(drawn.uniform(-1, 1) * math.log(max_stretch) / 2)
    rows = min(max(round(height * side / stretch), 1), height)
    columns = min(max(round(width * side * stretch), 1), width)
    return int(drawn.integers(height - rows + 1)), int(drawn.integers(width - columns + 1)), rows, columns


def random_colours(drawn: Generator, image: Tensor, amount: float) -> Tensor:
    """Brightness, contrast and saturation of an image uint8 [3, rows, columns], each times up to 1 ± amount."""
    for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = adjust(image, 1 + amount * drawn.uniform(-1, 1))
    return image


# What RandAugment (Cubuk et al., arXiv 1909.13719) chooses from, without what makes other images of photographs
# (inverting, solarising) and what the crop does already. Each takes a magnitude from -1 to 1.
_OPERATIONS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda image, amount: F.rotate(image, 20 * amount, InterpolationMode.BILINEAR, fill=_MEAN_RGB),
    lambda image, amount: _sheared(image, 15 * amount, 0),
    lambda image, amount: _sheared(image, 0, 15 * amount),
    lambda image, amount: F.adjust_sharpness(image, 1 + 0.9 * amount),
    lambda image, amount: F.adjust_hue(image, 0.05 * amount),
    lambda image, amount: F.adjust_gamma(image, 1.5**amount),
    lambda image, amount: F.posterize(image, 6 + round(amount)),
    lambda image, amount: F.gaussian_blur(image, [5, 5], [0.3 + 0.7 * abs(amount)]),
    lambda image, amount: F.autocontrast(image),
    lambda image, amount: F.equalize(image),
)


def _sheared(image: Tensor, x_degrees: float, y_degrees: float) -> Tensor:
    return F.affine(
        image,
        angle=0,
        translate=[0, 0],
        scale=1,
        shear=[x_degrees, y_degrees],
        interpolation=InterpolationMode.BILINEAR,
        fill=_MEAN_RGB,
    )
