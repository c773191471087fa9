"""The losses of Faster and Mask R-CNN by torchvision's own modules, on images that are prepared already.

torchvision knows no regions to be ignored, such as crowds. Here an anchor or a proposal that lies in one for the most
part, and on no object, is no example of the background.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_area, box_iou

from models.nets.normalisation import Normalise

_MOST_IGNORED = 0.5  # share of a box's own area in one ignored region
_SMALLEST_SIDE = 1e-2  # pixels; as in torchvision's RoIHeads


def rcnn_losses(network: Any, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """images uint8 [batch, height, width, 3]; per image boxes_xyxy [n, 4] in its pixels, labels [n] from 0 on, ignored
    [n], and for Mask R-CNN masks [n, height, width] → losses by name: loss_objectness, loss_rpn_box_reg,
    loss_classifier, loss_box_reg, and loss_mask."""
    normalise = Normalise(network.transform.image_mean, network.transform.image_std).to(images.device)
    prepared = ImageList(normalise(images), [(images.shape[1], images.shape[2])] * len(images))
    objects, ignored_xyxy = zip(*(_divided(target, images.device) for target in targets), strict=True)
    features = network.backbone(prepared.tensors)
    proposals, losses = _rpn(network.rpn, prepared, features, objects, ignored_xyxy)
    enough = network.roi_heads.proposal_matcher.high_threshold
    proposals = [
        boxes[_is_on(boxes, of_image["boxes"], enough) | ~_is_inside(boxes, regions)]
        for boxes, of_image, regions in zip(proposals, objects, ignored_xyxy, strict=True)
    ]
    forget_scales(network)
    is_empty = not any(len(boxes) + len(of_image["boxes"]) for boxes, of_image in zip(proposals, objects, strict=True))
    if is_empty:  # the mean over no example would be NaN; one that counts for nothing gives every weight a gradient
        whole = torch.tensor([[0, 0, images.shape[2], images.shape[1]]], dtype=torch.float32, device=images.device)
        proposals = [whole] * len(images)
    _, of_heads = network.roi_heads(features, proposals, prepared.image_sizes, list(objects))
    return losses | {name: loss * 0 if is_empty else loss for name, loss in of_heads.items()}


def forget_scales(network: Any) -> None:
    """torchvision keeps the scales of the feature maps that it met with the first size of images."""
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        if pool is not None:
            pool.scales = None


def _divided(target: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The objects as torchvision wants them, its background being label 0; and the ignored regions [k, 4]."""
    boxes = target["boxes_xyxy"].to(device, torch.float32).reshape(-1, 4)
    ignored = target["ignored"].to(device)
    chosen = ~ignored & ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST_SIDE).all(dim=1)
    objects = {"boxes": boxes[chosen], "labels": target["labels"].to(device)[chosen].to(torch.int64) + 1}
    if "masks" in target:
        objects["masks"] = target["masks"].to(device)[chosen]
    return objects, boxes[ignored]


def _rpn(
    rpn: Any,
    images: ImageList,
    features: dict[str, Tensor],
    objects: Sequence[dict[str, Tensor]],
    ignored_xyxy: Sequence[Tensor],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The forward pass of torchvision's RPN in training, but for the ignored anchors; and in f32, where boxes are
    decoded: half precision knows no half pixels beyond some hundred."""
    maps = list(features.values())
    logits_maps, codes_maps = rpn.head(maps)
    anchors = rpn.anchor_generator(images, maps)  # [anchors, 4] per image
    anchors = [of_image.float() for of_image in anchors]
    counts = [logits.shape[1:].numel() for logits in logits_maps]
    logits, codes = concat_box_prediction_layers(
        [logits.float() for logits in logits_maps], [codes.float() for codes in codes_maps]
    )  # [batch · anchors, 1], [batch · anchors, 4]
    boxes = rpn.box_coder.decode(codes.detach(), anchors).reshape(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(boxes, logits, images.image_sizes, counts)
    labels, matched = rpn.assign_targets_to_anchors(anchors, objects)
    for of_image, label, regions in zip(anchors, labels, ignored_xyxy, strict=True):
        label[(label == 0) & _is_inside(of_image, regions)] = -1  # torchvision draws neither 0 nor 1 from these
    loss_objectness, loss_box = rpn.compute_loss(logits, codes, labels, rpn.box_coder.encode(matched, anchors))
    return proposals, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}


def _is_on(boxes_xyxy: Tensor, objects_xyxy: Tensor, iou: float) -> Tensor:
    """Which of the boxes [n, 4] are examples of an object → bool [n]."""
    if not len(objects_xyxy):
        return boxes_xyxy.new_zeros(len(boxes_xyxy), dtype=torch.bool)
    return box_iou(boxes_xyxy, objects_xyxy).amax(dim=1) >= iou


def _is_inside(boxes_xyxy: Tensor, regions_xyxy: Tensor) -> Tensor:
    """Which of the boxes [n, 4] lie in one of the regions [k, 4] for the most part → bool [n]."""
    if not len(regions_xyxy):
        return boxes_xyxy.new_zeros(len(boxes_xyxy), dtype=torch.bool)
    top_left = torch.maximum(boxes_xyxy[:, None, :2], regions_xyxy[:, :2])  # [n, k, 2]
    sides = (torch.minimum(boxes_xyxy[:, None, 2:], regions_xyxy[:, 2:]) - top_left).clamp(min=0)
    return sides.prod(dim=2).amax(dim=1) > _MOST_IGNORED * box_area(boxes_xyxy)
