"""torchvision's Faster R-CNN: build, and a graph that gives its eager results with static shapes and any batch."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.nets.untrained import measure_batch_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED_PREFIXES = ()

_LOGIT_SPREAD = 2.0  # standard deviation of an untrained detector's logits: some scores are high, none is saturated


def build(builder: str, num_classes: int) -> "nn.Module":
    """An untrained detector of `num_classes` kinds of objects; the background comes on top of these."""
    from torch import nn
    from torchvision.models import get_model

    network = get_model(builder, weights=None, weights_backbone=None, num_classes=num_classes + 1)
    if builder == "fasterrcnn_resnet50_fpn":
        # torchvision's COCO weights for it were trained with a BatchNorm without this term.
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    return network.eval()


def graph(network: Any, card: Card) -> "nn.Module":
    """images [batch, height, width, 3] uint8 → boxes_xyxy [n, 4], scores [n], labels [n], batch_index [n]."""
    from models.nets.faster_rcnn_graph import FasterRcnnGraph

    return FasterRcnnGraph(network, card.input.height, card.input.width, card.score_floor).eval()


def wake(network: Any, card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained detector find objects, of random kinds and sizes, in `images` [n, height, width, 3]."""
    import torch

    from models.nets.normalisation import Normalise

    normalise = Normalise(network.transform.image_mean, network.transform.image_std)
    measure_batch_norms(network.backbone, lambda batch: network.backbone(normalise(batch)), images)
    # As they are initialised, the heads give everything the same score.
    detect = reference(network, card)
    for layer in (network.rpn.head.cls_logits, network.roi_heads.box_predictor.cls_score):
        logits: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _layer, _inputs, output, seen=logits: seen.append(output.flatten()))
        with torch.no_grad():
            detect(torch.from_numpy(images))
            layer.weight.mul_(_LOGIT_SPREAD / torch.cat(logits).std())
        hook.remove()


def reference(network: Any, card: Card) -> "Callable[[Tensor], dict[str, Tensor]]":
    """torchvision's own eager detector on the same prepared images, its resizing left out."""
    import torch
    from torchvision.models.detection.image_list import ImageList

    network.roi_heads.score_thresh = card.score_floor
    network.roi_heads.box_roi_pool.scales = None  # else those of the first size it ever saw
    mean, std = (torch.tensor(x)[:, None, None] for x in (network.transform.image_mean, network.transform.image_std))

    def detections(images: "Tensor") -> "dict[str, Tensor]":
        scaled = images.permute(0, 3, 1, 2).float() / 255  # [batch, 3, height, width]
        sizes_hw = [tuple(images.shape[1:3])] * len(images)
        prepared = ImageList((scaled - mean) / std, sizes_hw)
        features = network.backbone(prepared.tensors)
        proposals, _ = network.rpn(prepared, features)
        found, _ = network.roi_heads(features, proposals, sizes_hw)
        counts = torch.tensor([len(f["scores"]) for f in found])
        return {
            "boxes_xyxy": torch.cat([f["boxes"] for f in found]),
            "scores": torch.cat([f["scores"] for f in found]),
            "labels": torch.cat([f["labels"] for f in found]) - 1,  # without the background
            "batch_index": torch.repeat_interleave(torch.arange(len(images)), counts),
        }

    return detections
