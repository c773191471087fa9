"""The two stages of Faster R-CNN (Ren et al. 2015) around torchvision's trained modules, in fixed shapes.

Only the last step, which drops the empty places, has a size of its own. Each image is treated as if it were alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from models.nets.normalisation import Normalise
from models.runtime.detection_ops import pool_regions, suppress

_SMALLEST_OBJECT = 1e-2  # pixels; as in torchvision's RoIHeads


class FasterRcnnGraph(nn.Module):
    """images [batch, height, width, 3] uint8 → boxes_xyxy [n, 4], scores [n], labels [n], batch_index [n].

    An image for which the network's outputs are not finite gets one row whose score is NaN.
    """

    def __init__(self, network: Any, height: int, width: int, score_floor: float):
        super().__init__()
        self.backbone, self.rpn_head = network.backbone, network.rpn.head
        self.box_head, self.box_predictor = network.roi_heads.box_head, network.roi_heads.box_predictor
        self.rpn, self.roi_heads = [network.rpn], [network.roi_heads]  # in lists: their settings, not their modules
        self.normalise = Normalise(network.transform.image_mean, network.transform.image_std)
        self.height, self.width, self.score_floor = height, width, score_floor
        with torch.no_grad():
            features = self.backbone(torch.zeros(1, 3, height, width))
        maps = list(features.values())
        images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
        sizes = [
            feature.shape[2] * feature.shape[3] * count
            for feature, count in zip(maps, network.rpn.anchor_generator.num_anchors_per_location(), strict=True)
        ]
        anchors = network.rpn.anchor_generator(images, maps)[0].split(sizes)
        for level, of_level in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", of_level, persistent=False)  # [anchors of the level, 4]
        self.pooled = [name for name in features if name in network.roi_heads.box_roi_pool.featmap_names]
        self.scales = [2.0 ** round(_log2(features[name].shape[2] / height)) for name in self.pooled]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return self.found(images)[1]

    def found(self, images: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The feature maps that regions are pooled from, and the outputs."""
        features = self.backbone(self.normalise(images))
        proposals, valid, finite = self._propose(list(features.values()))  # [batch, p, 4], [batch, p], [batch]
        pooled = [features[name] for name in self.pooled]
        return pooled, self._detect(pooled, proposals, valid, finite)

    def _propose(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The best boxes that may hold an object, whether each place is taken, and whether each image is finite."""
        rpn = self.rpn[0]
        objectness, deltas = self.rpn_head(features)
        boxes_of_levels, scores_of_levels, finite_levels = [], [], []
        for level, (score_map, delta_map) in enumerate(zip(objectness, deltas, strict=True)):
            # Anchors vary fastest, then columns, then rows.
            logits = score_map.permute(0, 2, 3, 1).flatten(1)  # [batch, anchors]
            rows, columns = delta_map.shape[2:]
            codes = delta_map.reshape(-1, delta_map.shape[1] // 4, 4, rows, columns)
            codes = codes.permute(0, 3, 4, 1, 2).flatten(1, 3)  # [batch, anchors, 4]
            finite_levels.append((logits.isfinite() & codes.isfinite().all(dim=2)).all(dim=1))
            logits, chosen = logits.topk(min(rpn.pre_nms_top_n(), logits.shape[1]), dim=1)  # [batch, k]
            codes = codes.gather(1, chosen[:, :, None].expand(-1, -1, 4))
            boxes = _decode(codes, getattr(self, f"anchors_{level}")[chosen], rpn.box_coder)
            boxes = self._clip(boxes)  # [batch, k, 4]
            scores = logits.sigmoid()
            scores = torch.where(_large(boxes, rpn.min_size) & (scores >= rpn.score_thresh), scores, 0.0)
            boxes_of_levels.append(boxes)
            scores_of_levels.append(suppress(boxes, scores, rpn.nms_thresh))
        scores = torch.cat(scores_of_levels, dim=1)  # [batch, k of all levels]
        best, chosen = scores.topk(min(rpn.post_nms_top_n(), scores.shape[1]), dim=1)  # [batch, p]
        boxes = torch.cat(boxes_of_levels, dim=1).gather(1, chosen[:, :, None].expand(-1, -1, 4))
        return boxes, best > 0, torch.stack(finite_levels).all(dim=0)

    def _detect(
        self, features: list[Tensor], proposals: Tensor, valid: Tensor, finite: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classifies and refines the proposals, and keeps the best of those that overlap, class by class."""
        heads = self.roi_heads[0]
        num_proposals = proposals.shape[1]
        flat = proposals.reshape(-1, 4)  # [batch · p, 4]
        image = torch.arange(proposals.shape[0])[:, None].expand(-1, num_proposals).reshape(-1)
        pool = heads.box_roi_pool
        regions = pool_regions(
            features, flat, image, self.level(flat), self.scales, pool.output_size[0], pool.sampling_ratio
        )  # [batch · p, channels, size, size]
        logits, codes = self.box_predictor(self.box_head(regions))  # [batch · p, classes], [batch · p, classes · 4]
        num_classes = logits.shape[1]
        finite = finite & (logits.isfinite().all(dim=1) & codes.isfinite().all(dim=1)).reshape(-1, num_proposals).all(1)

        boxes = _decode(codes.reshape(-1, num_classes, 4), flat[:, None, :], heads.box_coder)
        boxes = self._clip(boxes).reshape(-1, num_proposals, num_classes, 4)
        scores = logits.softmax(dim=1).reshape(-1, num_proposals, num_classes)
        boxes = boxes[:, :, 1:].permute(0, 2, 1, 3)  # [batch, objects' classes, p, 4]: the first class is background
        scores = scores[:, :, 1:].permute(0, 2, 1)  # [batch, objects' classes, p]
        candidate = (scores > self.score_floor) & valid[:, None, :] & _large(boxes, _SMALLEST_OBJECT)
        scores = torch.where(candidate, scores, 0.0)
        scores = suppress(boxes.flatten(0, 1), scores.flatten(0, 1), heads.nms_thresh)  # [batch · classes, p]

        places = (num_classes - 1) * num_proposals
        best, chosen = scores.reshape(-1, places).topk(min(heads.detections_per_img, places), dim=1)  # [batch, d]
        boxes = boxes.reshape(-1, places, 4).gather(1, chosen[:, :, None].expand(-1, -1, 4))
        labels = chosen // num_proposals
        first = torch.arange(best.shape[1]) == 0  # [d]
        failed = ~finite[:, None] & first  # [batch, d]
        best = torch.where(finite[:, None], best, torch.where(failed, torch.nan, 0.0))
        image, place = torch.nonzero((best > 0) | failed).unbind(dim=1)  # [n] each
        return boxes[image, place], best[image, place], labels[image, place], image

    def level(self, boxes_xyxy: Tensor) -> Tensor:
        """The feature map for each box by its size: equation 1 of Feature Pyramid Networks (Lin et al. 2017)."""
        pool = self.roi_heads[0].box_roi_pool
        lowest, highest = (-_log2(scale) for scale in (self.scales[0], self.scales[-1]))
        side = ((boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])).sqrt()
        level = torch.floor(pool.canonical_level + torch.log2(side / pool.canonical_scale) + 1e-6)
        return (level.clamp(lowest, highest) - lowest).to(torch.int64)

    def _clip(self, boxes_xyxy: Tensor) -> Tensor:
        """Inside the input; NaN becomes zero, since RoIAlign takes no NaN."""
        boxes_xyxy = torch.where(boxes_xyxy.isnan(), 0.0, boxes_xyxy)
        x = boxes_xyxy[..., 0::2].clamp(0, self.width)
        y = boxes_xyxy[..., 1::2].clamp(0, self.height)
        return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def _log2(value: float) -> float:
    return torch.tensor(value).log2().item()


def _large(boxes_xyxy: Tensor, smallest: float) -> Tensor:
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return (sides >= smallest).all(dim=-1)


def _decode(codes: Tensor, anchors_xyxy: Tensor, coder: Any) -> Tensor:
    """The inverse of the box encoding of Faster R-CNN (equation 2): codes [..., 4] = dx, dy, dw, dh."""
    sizes = anchors_xyxy[..., 2:] - anchors_xyxy[..., :2]
    centres = anchors_xyxy[..., :2] + 0.5 * sizes
    weights = torch.tensor(coder.weights, dtype=codes.dtype)
    codes = codes / weights
    half = 0.5 * torch.exp(codes[..., 2:].clamp(max=coder.bbox_xform_clip)) * sizes
    centres = codes[..., :2] * sizes + centres
    return torch.cat([centres - half, centres + half], dim=-1)
