"""The mask branch of Mask R-CNN (He et al. 2017, section 3) on the objects that the two stages before it found."""

from typing import Any

import torch
from torch import Tensor

from models.nets.faster_rcnn_graph import FasterRcnnGraph
from models.runtime.detection_ops import pool_regions


class MaskRcnnGraph(FasterRcnnGraph):
    """images [batch, height, width, 3] uint8 → the outputs of FasterRcnnGraph, and masks f32 [n, 28, 28].

    A mask lies over its object's box; it is the probability that a place belongs to the object. An object whose mask is
    not finite has a score that is NaN.
    """

    def __init__(self, network: Any, height: int, width: int, score_floor: float):
        super().__init__(network, height, width, score_floor)
        self.mask_head, self.mask_predictor = network.roi_heads.mask_head, network.roi_heads.mask_predictor

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        features, (boxes, scores, labels, image) = self.found(images)
        pool = self.roi_heads[0].mask_roi_pool
        # One more region, so that the convolutions never meet a batch of none.
        boxes_and_one = torch.cat([boxes, boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]])])  # [n + 1, 4]
        image_and_zero = torch.cat([image, image.new_zeros(1)])
        regions = pool_regions(
            features,
            boxes_and_one,
            image_and_zero,
            self.level(boxes_and_one),
            self.scales,
            pool.output_size[0],
            pool.sampling_ratio,
        )  # [n + 1, channels, 14, 14]
        logits = self.mask_predictor(self.mask_head(regions))[:-1]  # [n, classes, 28, 28], the background first
        side = logits.shape[-1]
        of_label = (labels + 1)[:, None, None, None].expand(-1, 1, side, side)
        masks = logits.gather(1, of_label)[:, 0].sigmoid()  # [n, 28, 28]
        finite = masks.isfinite().flatten(1).all(dim=1)
        return boxes, torch.where(finite, scores, torch.nan), labels, image, masks
