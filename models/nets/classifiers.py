"""torchvision's image classifiers: build, and the graph from uint8 images to probabilities."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.nets.untrained import measure_batch_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

# What a builder needs beyond the number of classes. Both Inceptions were trained on inputs scaled in another way, which
# `transform_input` undoes; their auxiliary heads only serve training.
_OPTIONS: dict[str, dict] = {
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": False},
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": False},
}
# Parameters that weights files may hold for parts which are not built.
IGNORED_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")

# Of all pretrained weights of torchvision.
MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)


def build(builder: str, num_classes: int) -> "nn.Module":
    """An untrained network that gives logits [batch, num_classes]."""
    from torchvision.models import get_model

    return get_model(builder, weights=None, num_classes=num_classes, **_OPTIONS.get(builder, {})).eval()


def graph(network: "nn.Module", card: Card) -> "nn.Module":
    """images [batch, height, width, 3] uint8 → probabilities [batch, classes] f32."""
    from torch import nn

    from models.nets.normalisation import Normalise

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = Normalise(MEAN_RGB, STD_RGB)
            self.network = network

        def forward(self, images: "Tensor") -> "Tensor":
            logits = self.network(self.normalise(images))  # [batch, classes]
            return logits.softmax(dim=1)

    return Classifier().eval()


def wake(network: "nn.Module", card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained network respond to `images` [n, height, width, 3]."""
    measure_batch_norms(network, graph(network, card), images)


def reference(network: "nn.Module", card: Card) -> "Callable[[Tensor], dict[str, Tensor]]":
    """The same by torchvision's own steps: scale to 0…1, normalise, network, softmax."""
    from torchvision.transforms.v2.functional import normalize

    def probabilities(images: "Tensor") -> "dict[str, Tensor]":
        scaled = images.permute(0, 3, 1, 2).float() / 255  # [batch, 3, height, width]
        return {"probabilities": network(normalize(scaled, list(MEAN_RGB), list(STD_RGB))).softmax(dim=1)}

    return probabilities
