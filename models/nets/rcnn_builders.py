"""torchvision's Faster and Mask R-CNN by name, untrained and with BatchNorms that can learn.

torchvision freezes BatchNorms and the first layers where a backbone is pretrained, which is wrong from scratch; here
what is frozen is decided by models.learning.transfer alone.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models import get_model, resnet18
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

_CHANNELS = 128  # of the small detectors' feature maps and heads: half of what torchvision's have
_REPRESENTATION = 512  # of one region, in the small detectors' box head


def build_rcnn(builder: str, num_classes: int) -> nn.Module:
    """The network in evaluation mode; `num_classes` is without the background."""
    if builder in _SMALL:
        return _SMALL[builder](num_classes + 1).eval()
    return get_model(builder, weights=None, weights_backbone=None, num_classes=num_classes + 1).eval()


def _small_faster_rcnn(num_outputs: int) -> nn.Module:
    network = FasterRCNN(_resnet18_fpn(), num_outputs, **_small_heads())
    network.roi_heads.box_predictor = FastRCNNPredictor(_REPRESENTATION, num_outputs)
    return network


def _small_mask_rcnn(num_outputs: int) -> nn.Module:
    mask_head = MaskRCNNHeads(_CHANNELS, (_CHANNELS,) * 4, dilation=1)
    network = MaskRCNN(_resnet18_fpn(), num_outputs, **_small_heads(), mask_head=mask_head)
    network.roi_heads.box_predictor = FastRCNNPredictor(_REPRESENTATION, num_outputs)
    network.roi_heads.mask_predictor = MaskRCNNPredictor(_CHANNELS, _CHANNELS, num_outputs)
    return network


def _resnet18_fpn() -> BackboneWithFPN:
    layers = {f"layer{number + 1}": str(number) for number in range(4)}
    return BackboneWithFPN(resnet18(weights=None), layers, [64, 128, 256, 512], _CHANNELS)


def _small_heads() -> dict[str, Any]:
    """For images of half the size: anchors of half the sides, and fewer regions."""
    return {
        "rpn_anchor_generator": AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5),
        "rpn_pre_nms_top_n_train": 1000,
        "rpn_pre_nms_top_n_test": 500,
        "rpn_post_nms_top_n_train": 500,
        "rpn_post_nms_top_n_test": 300,
        "rpn_batch_size_per_image": 128,
        "box_batch_size_per_image": 128,
        "box_head": TwoMLPHead(_CHANNELS * 7**2, _REPRESENTATION),
    }


_SMALL: dict[str, Callable[[int], nn.Module]] = {
    "fasterrcnn_resnet18_fpn": _small_faster_rcnn,
    "maskrcnn_resnet18_fpn": _small_mask_rcnn,
}
