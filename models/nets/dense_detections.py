"""The end of detectors that give every class a score at every place: the best boxes, once each.

`Detections` is for the graph, in fixed shapes; `detections` is the same by torchvision's own steps, image by image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from models.runtime.detection_ops import suppress

MOST_CANDIDATES = 1000  # pairs of place and class per image that take part in the suppression
MOST_DETECTIONS = 300  # per image
_SMALLEST_OBJECT = 1e-2  # pixels


class Dense(NamedTuple):
    """What a detector says about all places of its images."""

    boxes_xyxy: Tensor  # f32 [batch, places, 4], pixels of the input, maybe beyond it
    scores: Tensor  # f32 [batch, places, classes], 0 to 1


class Detections(nn.Module):
    """boxes_xyxy [batch, places, 4], scores [batch, places, classes] → boxes_xyxy [n, 4], scores [n], labels [n],
    batch_index [n]. An image for which something is not finite gets one row whose score is NaN."""

    def __init__(self, height: int, width: int, score_floor: float, iou_threshold: float):
        super().__init__()
        self.height, self.width = height, width
        self.score_floor, self.iou_threshold = score_floor, iou_threshold

    def forward(self, boxes_xyxy: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        num_places, num_classes = scores.shape[1:]
        finite = boxes_xyxy.isfinite().flatten(1).all(dim=1) & scores.isfinite().flatten(1).all(dim=1)  # [batch]
        boxes_xyxy = torch.where(finite[:, None, None], boxes_xyxy, 0.0)
        x = boxes_xyxy[..., 0::2].clamp(0, self.width)
        y = boxes_xyxy[..., 1::2].clamp(0, self.height)
        boxes_xyxy = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)  # [batch, places, 4]
        large = ((boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]) >= _SMALLEST_OBJECT).all(dim=-1)  # [batch, places]
        candidate = (scores > self.score_floor) & large[:, :, None] & finite[:, None, None]
        scores = torch.where(candidate, scores, 0.0).flatten(1)  # [batch, places · classes]

        scores, chosen = scores.topk(min(MOST_CANDIDATES, num_places * num_classes), dim=1)  # [batch, k]
        places = chosen // num_classes
        labels = chosen - places * num_classes
        boxes_xyxy = boxes_xyxy.gather(1, places[:, :, None].expand(-1, -1, 4))  # [batch, k, 4]
        # Side by side, boxes of different classes do not meet.
        shift = labels.to(boxes_xyxy.dtype)[:, :, None] * (max(self.height, self.width) + 1)
        scores = suppress(boxes_xyxy + shift, scores, self.iou_threshold)

        best, order = scores.topk(min(MOST_DETECTIONS, scores.shape[1]), dim=1)  # [batch, d]
        first = torch.arange(best.shape[1], device=best.device) == 0  # [d]
        failed = ~finite[:, None] & first  # [batch, d]
        best = torch.where(failed, torch.nan, best)
        image, place = torch.nonzero((best > 0) | failed).unbind(dim=1)  # [n] each
        row = order[image, place]
        return boxes_xyxy[image, row], best[image, place], labels[image, row], image


def detections(dense: Dense, size_hw: tuple[int, int], score_floor: float, iou_threshold: float) -> dict[str, Tensor]:
    """The outputs of the ONNX contract by name, for images of that size."""
    rows: dict[str, list[Tensor]] = {name: [] for name in ("boxes_xyxy", "scores", "labels", "batch_index")}
    for number, (boxes_xyxy, scores) in enumerate(zip(*dense, strict=True)):
        boxes_xyxy = clip_boxes_to_image(boxes_xyxy, size_hw)
        large = ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) >= _SMALLEST_OBJECT).all(dim=1)
        place, label = torch.nonzero((scores > score_floor) & large[:, None]).unbind(dim=1)
        found, order = scores[place, label].sort(descending=True, stable=True)
        found, order = found[:MOST_CANDIDATES], order[:MOST_CANDIDATES]
        boxes_xyxy, label = boxes_xyxy[place[order]], label[order]
        kept = batched_nms(boxes_xyxy, found, label, iou_threshold)[:MOST_DETECTIONS]
        rows["boxes_xyxy"].append(boxes_xyxy[kept])
        rows["scores"].append(found[kept])
        rows["labels"].append(label[kept])
        rows["batch_index"].append(torch.full_like(label[kept], number))
    return {name: torch.cat(values) for name, values in rows.items()}
