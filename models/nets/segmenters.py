"""torchvision's FCN and DeepLabv3: build them, name their parts, and the graph from uint8 images to a map of classes.

FCN: Long et al., Fully Convolutional Networks for Semantic Segmentation, arXiv 1411.4038. DeepLabv3: Chen et al.,
Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv 1706.05587. Output 0 is the background, and k the
k-th label of the card.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.nets import class_maps
from models.nets.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor, nn

# The auxiliary head on the third stage serves training alone.
IGNORED_PREFIXES = ("aux_classifier.",)

_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
_AUXILIARY_WEIGHT = 0.5  # as torchvision's published weights were trained


def build(builder: str, num_classes: int) -> "nn.Module":
    """An untrained network that gives {"out": logits [batch, 1 + num_classes, height, width]}."""
    from torchvision.models import get_model

    return get_model(builder, weights=None, weights_backbone=None, num_classes=1 + num_classes, aux_loss=False).eval()


def build_for_training(builder: str, num_classes: int) -> "nn.Module":
    """The same with its auxiliary head, whose logits are in what it gives under "aux"."""
    from torchvision.models import get_model

    return get_model(builder, weights=None, weights_backbone=None, num_classes=1 + num_classes, aux_loss=True).eval()


def parts(network: "nn.Module", builder: str) -> Parts:
    """The last layers are the head; what comes before them behind the ResNet is the neck."""
    head, neck = [], []
    for name in ("classifier", "aux_classifier"):
        if getattr(network, name, None) is not None:
            *before, last = [f"{name}.{layer}" for layer, _ in network.get_submodule(name).named_children()]
            head.append(last)
            neck += before
    stages = tuple(tuple(f"backbone.{module}" for module in stage) for stage in _STAGES)
    return Parts(tuple(head), stages, tuple(neck))


def backbone_state(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The parameters of an ImageNet classifier under the names that they have here, without its last layer."""
    return {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}


def training_logits(outputs: Any) -> "tuple[Tensor, dict[str, tuple[float, Tensor]]]":
    """The logits [batch, 1 + classes, height, width], and by name the weight and the logits of the auxiliary head."""
    auxiliary = {"auxiliary": (_AUXILIARY_WEIGHT, outputs["aux"])} if "aux" in outputs else {}
    return outputs["out"], auxiliary


def graph(network: "nn.Module", card: Card) -> "nn.Module":
    """images [batch, height, width, 3] uint8 → class_map [batch, height, width] u8."""
    return class_maps.graph(network, lambda outputs: outputs["out"])


def wake(network: "nn.Module", card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained network tell regions of `images` [n, height, width, 3] apart."""
    class_maps.wake(network, lambda outputs: outputs["out"], network.get_submodule("classifier.4"), images)


def reference(network: "nn.Module", card: Card) -> "Callable[[Tensor], dict[str, Tensor]]":
    """The same by torchvision's own steps: scale to 0…1, normalise, network, the best class of each pixel."""
    return class_maps.reference(network, lambda outputs: outputs["out"])
