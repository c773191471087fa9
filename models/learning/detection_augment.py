"""Images varied for detectors: a part of the image at another scale, mirrored, in other colours; the boxes follow."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from models.imaging.geometry import ResizeRule
from models.learning.augment import (
    VARIATIONS,
    Augmentation,
    Unvaried,
    Variation,
    enlarged,
    random_colours,
    random_crop,
)
from models.settings.train import Augment

_LEAST_VISIBLE = 0.25  # share of an object's box; of one that the cut leaves less of, nobody can say what it is


def augmentation(name: Augment, rule: ResizeRule, flip: bool = True) -> Augmentation:
    """The named variation of images whose targets are dicts of boxes; see models.learning.augment.

    rule: of the network. flip: mirror half of the images. `none` gives what the network is given in use.
    """
    variation = VARIATIONS[name]
    return Unvaried(rule) if variation is None else VariedObjects(rule, variation, flip)


class VariedObjects:
    """An Augmentation. The same seed gives the same image and boxes."""

    def __init__(self, rule: ResizeRule, variation: Variation, flip: bool):
        self.training_rule = enlarged(rule, variation.enlarge)
        self._size_hw = (rule.height, rule.width)
        self._interpolation = InterpolationMode(rule.interpolation)
        self._variation = variation
        self._flip = flip

    def __call__(self, image: Tensor, target: dict[str, Any], seed: int) -> tuple[Tensor, dict[str, Any]]:
        """See Augmentation; target: boxes_xyxy [n, 4] in pixels of `image`, labels [n], ignored [n]."""
        drawn, variation = np.random.default_rng(seed), self._variation
        cut = random_crop(drawn, image.shape[1], image.shape[2], variation.min_area, variation.max_stretch)
        image = F.resized_crop(image, *cut, list(self._size_hw), self._interpolation, antialias=True)
        target = cut_out(target, *cut, self._size_hw)
        if self._flip and drawn.random() < 0.5:
            image, target = F.horizontal_flip(image), mirrored(target, self._size_hw[1])
        return random_colours(drawn, image, variation.colour), target


def cut_out(
    target: dict[str, Any], top: int, left: int, height: int, width: int, size_hw: tuple[int, int]
) -> dict[str, Any]:
    """The objects of a part of an image that is resized to `size_hw`, without those of which little is left."""
    boxes = target["boxes_xyxy"]  # [n, 4]
    inside = boxes - boxes.new_tensor([left, top, left, top])
    inside = inside.minimum(inside.new_tensor([width, height, width, height])).clamp(min=0)
    least = torch.where(target["ignored"], 0.0, _LEAST_VISIBLE * _areas(boxes))
    kept = (_areas(inside) > 0) & (_areas(inside) >= least)
    scale = inside.new_tensor([size_hw[1] / width, size_hw[0] / height] * 2)
    return {**{name: value[kept] for name, value in target.items()}, "boxes_xyxy": inside[kept] * scale}


def mirrored(target: dict[str, Any], width: int) -> dict[str, Any]:
    """The objects of an image that is `width` wide, with left and right exchanged."""
    x_min, y_min, x_max, y_max = target["boxes_xyxy"].unbind(dim=1)
    return {**target, "boxes_xyxy": torch.stack([width - x_max, y_min, width - x_min, y_max], dim=1)}


def _areas(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1)
