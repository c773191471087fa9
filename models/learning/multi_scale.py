"""Batches at another size in each step, so that a detector meets objects at many scales (Redmon and Farhadi, YOLO9000,
arXiv 1612.08242, section 2, "Multi-Scale Training")."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from models.learning.moved_objects import resized


def at_random_scale(
    images: Tensor,
    targets: Sequence[dict[str, Any]],
    multiple: int = 32,
    lowest: float = 2 / 3,
    highest: float = 4 / 3,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images uint8 [batch, height, width, 3] and their objects at a size between `lowest` and `highest` times theirs.

    The sides are multiples of `multiple` pixels. The size is drawn from torch's global generator, which `fit` seeds in
    each epoch, and all sizes are equally probable. targets: boxes_xyxy f32 [n, 4], and perhaps masks bool [n, height,
    width], beside what does not change.
    """
    height, width = images.shape[1:3]
    first = max(1, math.ceil(lowest * height / multiple))
    last = max(first, math.floor(highest * height / multiple))
    chosen = int(torch.randint(first, last + 1, ())) * multiple
    size_hw = chosen, max(1, round(width * chosen / height / multiple)) * multiple
    if size_hw == (height, width):
        return images, list(targets)
    smaller = F.resize(images.permute(0, 3, 1, 2), list(size_hw), antialias=True)  # [batch, 3, height, width]
    return smaller.permute(0, 2, 3, 1).contiguous(), [_scaled(target, (height, width), size_hw) for target in targets]


def _scaled(target: dict[str, Any], from_hw: tuple[int, int], size_hw: tuple[int, int]) -> dict[str, Any]:
    boxes = target["boxes_xyxy"]
    scaled = target | {"boxes_xyxy": boxes * boxes.new_tensor([size_hw[1] / from_hw[1], size_hw[0] / from_hw[0]] * 2)}
    return scaled | {"masks": resized(target["masks"], size_hw)} if "masks" in target else scaled
