"""torchvision's Faster R-CNN: build, learn, and a graph that gives its eager results in static shapes."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.nets.parts import Parts
from models.nets.untrained import measure_batch_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED_PREFIXES = ()

_LOGIT_SPREAD = 2.0  # standard deviation of an untrained detector's logits: some scores are high, none is saturated
_EPS = 1e-5  # of every BatchNorm here
_EPS_MOBILENET = 1e-3  # of MobileNetV3, as torchvision trained it on ImageNet

# The layers that classes decide the shape of; the same for all networks that torchvision builds of Faster R-CNN.
_PREDICTORS = ("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")
_NECK = (
    "backbone.fpn",
    "rpn.head",
    "roi_heads.box_head",
    "roi_heads.mask_head",
    "roi_heads.mask_predictor.conv5_mask",
)
_RESNET_STAGES: tuple[tuple[str, ...], ...] = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
# By how many blocks the backbone has: MobileNetV3 17, MobileNetV2 18.
_MOBILENET_STAGE_STARTS = {17: (0, 2, 4, 7, 13), 18: (0, 2, 4, 7, 14)}


def build(builder: str, num_classes: int) -> "nn.Module":
    """An untrained detector of `num_classes` kinds of objects; the background comes on top of these."""
    from models.nets.rcnn_builders import build_rcnn

    return build_rcnn(builder, num_classes)


def build_for_training(builder: str, num_classes: int) -> "nn.Module":
    """The same: nothing of it serves training alone."""
    return build(builder, num_classes)


def parts(network: Any, builder: str) -> Parts:
    """Head: the predictors, whose shape the classes decide. Neck: feature pyramid, RPN and the heads before the
    predictors, so that the backbone of a classifier can stay frozen and its detector learns all the same."""
    built = {name for name, _ in network.named_modules()}
    children = [name for name, _ in network.backbone.body.named_children()]
    if "layer1" in children:
        stages = _RESNET_STAGES
    else:
        starts = _MOBILENET_STAGE_STARTS[len(children)]
        stops = (*starts[1:], len(children))
        stages = tuple(tuple(children[start:stop]) for start, stop in zip(starts, stops, strict=True))
    return Parts(
        head=tuple(name for name in _PREDICTORS if name in built),
        stages=tuple(tuple(f"backbone.body.{name}" for name in stage if name in children) for stage in stages),
        neck=tuple(name for name in _NECK if name in built),
    )


def backbone_state(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The state dict of a classifier (ResNet, MobileNetV2 or V3) as that of a detector's backbone, without the
    pyramid."""
    if "fc.weight" in state or "layer1.0.conv1.weight" in state:
        return {f"backbone.body.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    of_body = {
        f"backbone.body.{name.removeprefix('features.')}": value
        for name, value in state.items()
        if name.startswith("features.")
    }
    if "features.1.conv.0.0.weight" in state:  # MobileNetV2, whose last convolution serves the classifier alone
        return {name: value for name, value in of_body.items() if not name.startswith("backbone.body.18.")}
    # torchvision's detectors have other BatchNorms than MobileNetV3; with this they answer the same.
    return {
        name: value + (_EPS_MOBILENET - _EPS) if name.endswith("running_var") else value
        for name, value in of_body.items()
    }


def published_state(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """What a file of torchvision's holds, for the detectors as they are built here; own states stay as they are.

    Old files have other names. Those of ResNet-50 count no batches: their BatchNorms were frozen, and had no epsilon,
    which no network can learn with; the weights of the norms make up for it.
    """
    named = {_todays_name(name): value for name, value in state.items()}
    if "backbone.body.layer4.2.conv3.weight" not in named or "backbone.body.bn1.num_batches_tracked" in named:
        return named
    for name in [name for name in named if name.endswith("running_var")]:
        weight = name.removesuffix("running_var") + "weight"
        variance = named[name].clamp(min=1e-30).double()
        named[weight] = (named[weight] * ((variance + _EPS) / variance).sqrt()).to(named[weight].dtype)
    return named


def _todays_name(name: str) -> str:
    if found := re.fullmatch(r"rpn\.head\.conv\.(weight|bias)", name):
        return f"rpn.head.conv.0.0.{found[1]}"
    if found := re.fullmatch(r"roi_heads\.mask_head\.mask_fcn([1-4])\.(weight|bias)", name):
        return f"roi_heads.mask_head.{int(found[1]) - 1}.0.{found[2]}"
    return name


def losses(network: Any, images: "Tensor", targets: "Sequence[dict[str, Tensor]]") -> "dict[str, Tensor]":
    """See models.nets.rcnn_losses."""
    from models.nets.rcnn_losses import rcnn_losses

    return rcnn_losses(network, images, targets)


def graph(network: Any, card: Card) -> "nn.Module":
    """images [batch, height, width, 3] uint8 → boxes_xyxy [n, 4], scores [n], labels [n], batch_index [n]."""
    from models.nets.faster_rcnn_graph import FasterRcnnGraph

    return FasterRcnnGraph(network, card.input.height, card.input.width, card.score_floor).eval()


def wake(network: Any, card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained detector find objects, of random kinds, sizes and masks, in `images` [n, height, width, 3]."""
    import torch

    from models.nets.normalisation import Normalise

    normalise = Normalise(network.transform.image_mean, network.transform.image_std)
    measure_batch_norms(network.backbone, lambda batch: network.backbone(normalise(batch)), images)
    # As they are initialised, the heads give everything the same score.
    detect = reference(network, card)
    heads = network.roi_heads
    layers = [network.rpn.head.cls_logits, heads.box_predictor.cls_score]
    if heads.has_mask():
        layers.append(heads.mask_predictor.mask_fcn_logits)
    for layer in layers:
        logits: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _layer, _inputs, output, seen=logits: seen.append(output.flatten()))
        with torch.no_grad():
            detect(torch.from_numpy(images))
            layer.weight.mul_(_LOGIT_SPREAD / torch.cat(logits).std())
        hook.remove()


def reference(network: Any, card: Card) -> "Callable[[Tensor], dict[str, Tensor]]":
    """torchvision's own eager detector on the same prepared images, its resizing left out.

    Under autocast only the backbone is in half precision: boxes are not.
    """
    import torch
    from torchvision.models.detection.image_list import ImageList

    from models.nets.rcnn_losses import forget_scales

    network.roi_heads.score_thresh = card.score_floor
    mean, std = (torch.tensor(x)[:, None, None] for x in (network.transform.image_mean, network.transform.image_std))

    def detections(images: "Tensor") -> "dict[str, Tensor]":
        forget_scales(network)
        scaled = images.permute(0, 3, 1, 2).float() / 255  # [batch, 3, height, width]
        sizes_hw = [tuple(images.shape[1:3])] * len(images)
        prepared = ImageList((scaled - mean.to(images.device)) / std.to(images.device), sizes_hw)
        features = network.backbone(prepared.tensors)
        with torch.autocast(images.device.type, enabled=False):
            features = {name: feature.float() for name, feature in features.items()}
            proposals, _ = network.rpn(prepared, features)
            found, _ = network.roi_heads(features, proposals, sizes_hw)
        counts = torch.tensor([len(f["scores"]) for f in found], device=images.device)
        outputs = {
            "boxes_xyxy": torch.cat([f["boxes"] for f in found]),
            "scores": torch.cat([f["scores"] for f in found]),
            "labels": torch.cat([f["labels"] for f in found]) - 1,  # without the background
            "batch_index": torch.repeat_interleave(torch.arange(len(images), device=images.device), counts),
        }
        if network.roi_heads.has_mask():
            outputs["masks"] = torch.cat([f["masks"] for f in found])[:, 0]  # [n, 28, 28]
        return outputs

    return detections
