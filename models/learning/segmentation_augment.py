"""Images and their maps of classes varied at random for segmenters; as deterministic as models.learning.augment.

A window is laid over the image, larger or smaller than what the network sees in use; what it shows is resized to the
network's input, and perhaps mirrored. The map follows by nearest pixels; colours change in the image alone.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from models.imaging.geometry import ResizeRule
from models.learning.augment import Augmentation, Unvaried, enlarged, random_colours
from models.learning.segmentation_regions import IGNORED
from models.settings.train import Augment


@dataclass(frozen=True)
class Variation:
    """How much images are varied."""

    enlarge: float  # the training rule's pixels to a side, by those that `enlarged` gives
    smallest: float  # the window's sides, by those of the training rule
    largest: float
    max_stretch: float  # of width against height and the reverse
    colour: float  # brightness, contrast and saturation are multiplied by up to 1 ± this


# By `enlarged` an image is prepared with 8/7 of the network's pixels to a side. So light shows things at .8 to 1.25
# times the size that they have in use, and strong at .7 to 2.5 times.
VARIATIONS: dict[Augment, Variation | None] = {
    "none": None,
    "light": Variation(enlarge=1.0, smallest=0.7, largest=1.1, max_stretch=1.15, colour=0.2),
    "strong": Variation(enlarge=1.25, smallest=0.4, largest=1.4, max_stretch=4 / 3, colour=0.4),
}


def augmentation(name: Augment, rule: ResizeRule, flip: bool = True) -> Augmentation:
    """The named variation of images whose targets are maps of classes; see models.learning.augment.

    rule: of the network. flip: mirror half of the images. `none` gives what the network is given in use.
    """
    variation = VARIATIONS[name]
    return Unvaried(rule) if variation is None else VariedMap(rule, variation, flip)


class VariedMap:
    """An Augmentation. The same seed gives the same image and map."""

    def __init__(self, rule: ResizeRule, variation: Variation, flip: bool):
        self.training_rule = enlarged(rule, variation.enlarge)
        self._rule = rule
        self._variation = variation
        self._flip = flip

    def __call__(self, image: Tensor, target: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """See Augmentation; target: the map uint8 [rows, columns] of the image without its padding.

        Where the window reaches out of the image it shows padding, which is ignored in the map [height, width].
        """
        drawn, variation, rule = np.random.default_rng(seed), self._variation, self._rule
        target = target[: image.shape[1], : image.shape[2]]
        share = drawn.uniform(variation.smallest, variation.largest)
        stretch = math.exp(drawn.uniform(-1, 1) * math.log(variation.max_stretch) / 2)
        y, out_y = _seen(drawn, target.shape[0], self.training_rule.height * share / stretch, rule.height)
        x, out_x = _seen(drawn, target.shape[1], self.training_rule.width * share * stretch, rule.width)
        size_hw = [out_y.stop - out_y.start, out_x.stop - out_x.start]

        piece = F.resize(image[:, y, x], size_hw, InterpolationMode(rule.interpolation), antialias=True)
        varied = image.new_tensor(rule.pad_rgb)[:, None, None].repeat(1, rule.height, rule.width)  # [3, height, width]
        varied[:, out_y, out_x] = random_colours(drawn, piece, variation.colour)
        varied_target = target.new_full((rule.height, rule.width), IGNORED)
        varied_target[out_y, out_x] = F.resize(target[None, y, x], size_hw, InterpolationMode.NEAREST_EXACT)[0]
        if self._flip and drawn.random() < 0.5:
            return varied.flip(-1), varied_target.flip(-1)
        return varied, varied_target


def _seen(drawn: np.random.Generator, size: int, window: float, out_size: int) -> tuple[slice, slice]:
    """Along one side: the pixels of an image of `size` that a window shows, and where these come to lie in the input.

    A window that is smaller than the image lies within it, and a larger one around it.
    """
    length = max(1, round(window))
    start = int(drawn.integers(min(0, size - length), max(0, size - length) + 1))
    scale = out_size / length
    first, last = max(0, start), min(size, start + length)
    out_first = min(round((first - start) * scale), out_size - 1)
    out_last = max(round((last - start) * scale), out_first + 1)
    return slice(first, last), slice(out_first, out_last)
