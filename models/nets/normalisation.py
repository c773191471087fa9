"""From uint8 images, as bulk inference has them, to the normalised floats that networks were trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 [batch, height, width, 3], 0…255 → f32 [batch, 3, height, width], (x/255 - mean) / std per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean_rgb: Sequence[float], std_rgb: Sequence[float]):
        super().__init__()
        mean, std = torch.tensor(mean_rgb, dtype=torch.float64), torch.tensor(std_rgb, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return images.permute(0, 3, 1, 2).float() * self.scale + self.shift
