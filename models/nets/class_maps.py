"""From a network that gives a logit for each class and pixel to the map of the best classes, for all segmenters."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.nets.classifiers import MEAN_RGB, STD_RGB
from models.nets.untrained import measure_batch_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

_LOGIT_SPREAD = 2.0  # standard deviation over the pixels, of an untrained network: most have a clear best class


def graph(network: "nn.Module", logits_of: "Callable[[Any], Tensor]") -> "nn.Module":
    """images [batch, height, width, 3] uint8 → class_map [batch, height, width] u8.

    logits_of: from what the network gives to its logits [batch, 1 + classes, height, width].
    """
    import torch
    from torch import nn

    from models.nets.normalisation import Normalise

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = Normalise(MEAN_RGB, STD_RGB)
            self.network = network

        def forward(self, images: "Tensor") -> "Tensor":
            logits = logits_of(self.network(self.normalise(images)))  # [batch, 1 + classes, height, width]
            return logits.argmax(dim=1).to(torch.uint8)

    return Segmenter().eval()


def reference(network: "nn.Module", logits_of: "Callable[[Any], Tensor]") -> "Callable[[Tensor], dict[str, Tensor]]":
    """The same by torchvision's own steps: scale to 0…1, normalise, network, the best class of each pixel."""
    import torch
    from torchvision.transforms.v2.functional import normalize

    def class_map(images: "Tensor") -> "dict[str, Tensor]":
        scaled = images.permute(0, 3, 1, 2).float() / 255  # [batch, 3, height, width]
        logits = logits_of(network(normalize(scaled, list(MEAN_RGB), list(STD_RGB))))
        return {"class_map": logits.max(dim=1).indices.to(torch.uint8)}

    return class_map


def wake(
    network: "nn.Module",
    logits_of: "Callable[[Any], Tensor]",
    last: Any,
    images: NDArray[np.uint8],
) -> None:
    """Makes an untrained network, which gives one class everywhere, tell regions of `images` apart.

    last: the convolution, with a bias, that gives the logits. images: [n, height, width, 3].
    """
    import torch

    from models.nets.normalisation import Normalise

    normalise = Normalise(MEAN_RGB, STD_RGB)
    measure_batch_norms(network, lambda batch: network(normalise(batch)), images)
    with torch.no_grad():
        logits = logits_of(network(normalise(torch.from_numpy(images))))  # [n, 1 + classes, height, width]
        mean, spread = logits.mean(dim=(0, 2, 3)), logits.std(dim=(0, 2, 3)).clamp_min(1e-12)
        factor = _LOGIT_SPREAD / spread
        last.weight.mul_(factor[:, None, None, None])
        last.bias.copy_((last.bias - mean) * factor)
