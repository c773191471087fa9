"""torchvision's Faster and Mask R-CNN by name, untrained and with BatchNorms that can learn.

torchvision freezes BatchNorms and the first layers where a backbone is pretrained, which is wrong from scratch; here
what is frozen is decided by models.learning.transfer alone.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models import get_model, mobilenet_v2, resnet18
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

_CHANNELS = 128  # of the small detectors' feature maps and heads: half of what torchvision's have
_CHANNELS_MOBILENET = 64  # the same behind MobileNetV2; with 128 all but a fifth of the arithmetic would come after it
_REPRESENTATION = 512  # of one region, in the small detectors' box head


def build_rcnn(builder: str, num_classes: int) -> nn.Module:
    """The network in evaluation mode; `num_classes` is without the background."""
    if builder in _SMALL:
        return _SMALL[builder](num_classes + 1).eval()
    return get_model(builder, weights=None, weights_backbone=None, num_classes=num_classes + 1).eval()


def _small_faster_rcnn(num_outputs: int) -> nn.Module:
    network = FasterRCNN(_resnet18_fpn(), num_outputs, **_small_heads(_CHANNELS, _ONE_SIZE))
    network.roi_heads.box_predictor = FastRCNNPredictor(_REPRESENTATION, num_outputs)
    return network


def _small_mask_rcnn(num_outputs: int) -> nn.Module:
    return _mask_rcnn(_resnet18_fpn(), num_outputs, _CHANNELS, _ONE_SIZE)


def _mobilenet_mask_rcnn(num_outputs: int) -> nn.Module:
    return _mask_rcnn(_mobilenet_v2_fpn(), num_outputs, _CHANNELS_MOBILENET, _TWO_SIZES)


def _mask_rcnn(
    backbone: BackboneWithFPN, num_outputs: int, channels: int, sizes: tuple[tuple[int, ...], ...]
) -> nn.Module:
    mask_head = MaskRCNNHeads(channels, (channels,) * 4, dilation=1)
    network = MaskRCNN(backbone, num_outputs, **_small_heads(channels, sizes), mask_head=mask_head)
    network.roi_heads.box_predictor = FastRCNNPredictor(_REPRESENTATION, num_outputs)
    network.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_outputs)
    return network


def _resnet18_fpn() -> BackboneWithFPN:
    layers = {f"layer{number + 1}": str(number) for number in range(4)}
    return BackboneWithFPN(resnet18(weights=None), layers, [64, 128, 256, 512], _CHANNELS)


def _mobilenet_v2_fpn() -> BackboneWithFPN:
    """Of the maps at strides 4, 8, 16 and 32; the pyramid has BatchNorms, as what it is given is not rectified."""
    layers = {"3": "0", "6": "1", "13": "2", "17": "3"}
    return BackboneWithFPN(
        mobilenet_v2(weights=None).features,
        layers,
        [24, 32, 96, 320],
        _CHANNELS_MOBILENET,
        norm_layer=nn.BatchNorm2d,
    )


# Sides of anchors in pixels at strides 4 to 64. For images of half of torchvision's size the first ones are half of
# torchvision's; the second ones also match what is small, of some ten pixels, and what lies between two levels.
_ONE_SIZE = ((16,), (32,), (64,), (128,), (256,))
_TWO_SIZES = ((10, 16), (20, 32), (40, 64), (80, 128), (160, 256))


def _small_heads(channels: int, sizes: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Fewer regions to learn from than torchvision has, and more objects: its 100 are fewer than a microscope shows."""
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "rpn_pre_nms_top_n_train": 1000,
        "rpn_pre_nms_top_n_test": 500,
        "rpn_post_nms_top_n_train": 500,
        "rpn_post_nms_top_n_test": 500,
        "rpn_batch_size_per_image": 128,
        "box_batch_size_per_image": 128,
        "box_detections_per_img": 300,
        "box_head": TwoMLPHead(channels * 7**2, _REPRESENTATION),
    }


_SMALL: dict[str, Callable[[int], nn.Module]] = {
    "fasterrcnn_resnet18_fpn": _small_faster_rcnn,
    "maskrcnn_resnet18_fpn": _small_mask_rcnn,
    "maskrcnn_mobilenet_v2_fpn": _mobilenet_mask_rcnn,
}
