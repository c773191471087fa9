"""Two torch operators that detectors are exported with: their eager meaning, and their translation to ONNX.

torchvision's own non-maximum suppression and multi-level RoIAlign have outputs whose size depends on the data, in
Python loops over images; the exporter cannot follow. These two have static shapes, for any batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20
from torch import Tensor
from torchvision.ops import nms, roi_align

op: Any = opset20  # its types describe what a graph computes, not the nodes that are passed about here


@torch.library.custom_op("pixelmill::suppress", mutates_args=())
def suppress(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: the same scores, with zero where a box overlaps a better one too much.

    boxes_xyxy [groups, n, 4] f32, scores [groups, n] f32; groups (images, or images times classes) do not see each
    other. A box that scores zero or less neither stays nor suppresses.
    """
    kept = torch.zeros_like(scores)
    for group in range(len(scores)):
        candidates = torch.nonzero(scores[group] > 0).flatten()
        best = candidates[nms(boxes_xyxy[group, candidates], scores[group, candidates], iou_threshold)]
        kept[group, best] = scores[group, best]
    return kept


@suppress.register_fake
def _(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def _suppress_onnx(boxes_xyxy: Any, scores: Any, iou_threshold: float) -> Any:
    per_class = op.Unsqueeze(scores, op.Constant(value_ints=[1]))  # [groups, 1, n]
    most = op.Gather(op.Shape(scores), op.Constant(value_ints=[1]))
    chosen = op.NonMaxSuppression(  # [kept, 3]: group, class, box
        boxes_xyxy, per_class, most, op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[0.0])
    )
    where = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # [kept, 2]
    return op.ScatterND(op.ConstantOfShape(op.Shape(scores)), where, op.GatherND(scores, where))


@torch.library.custom_op("pixelmill::pool_regions", mutates_args=())
def pool_regions(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    image: Tensor,
    level: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
) -> Tensor:
    """RoIAlign of each box on the feature map of its own level → [n, channels, size, size].

    features: one [batch, channels, h, w] per level; boxes_xyxy [n, 4] in pixels of the input; image [n] and level [n]
    i64, the indices of each box; scales: pixels of the feature map per pixel of the input, by level.
    """
    rois = torch.cat([image.to(boxes_xyxy.dtype)[:, None], boxes_xyxy], dim=1)  # [n, 5]
    pooled = boxes_xyxy.new_zeros((len(rois), features[0].shape[1], size, size))
    for index, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        here = torch.nonzero(level == index).flatten()
        pooled[here] = roi_align(feature, rois[here], size, scale, sampling_ratio)
    return pooled


@pool_regions.register_fake
def _(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    image: Tensor,
    level: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
) -> Tensor:
    return boxes_xyxy.new_empty((boxes_xyxy.shape[0], features[0].shape[1], size, size))


def _pool_regions_onnx(
    features: Sequence[Any],
    boxes_xyxy: Any,
    image: Any,
    level: Any,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
) -> Any:
    rows, pooled = [], []
    for index, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        in_level = op.Equal(level, op.Constant(value_int=index))
        here = op.Reshape(op.NonZero(in_level), op.Constant(value_ints=[-1]))  # [n of this level]
        rows.append(here)
        pooled.append(
            op.RoiAlign(
                feature,
                op.Gather(boxes_xyxy, here),
                op.Gather(image, here),
                coordinate_transformation_mode="output_half_pixel",  # torchvision's aligned=False
                mode="avg",
                output_height=size,
                output_width=size,
                sampling_ratio=sampling_ratio,
                spatial_scale=scale,
            )
        )
    order = op.Concat(*rows, axis=0)  # [n]: the box that stands in each row of the concatenation
    count = op.Squeeze(op.Shape(order), op.Constant(value_ints=[0]))
    positions = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    row_of_box = op.ScatterElements(order, order, positions, axis=0)
    return op.Gather(op.Concat(*pooled, axis=0), row_of_box)


def translations() -> dict[Callable, Callable]:
    """How the exporter writes these operators in ONNX."""
    return {
        torch.ops.pixelmill.suppress.default: _suppress_onnx,
        torch.ops.pixelmill.pool_regions.default: _pool_regions_onnx,
    }
