"""DiffAugment: Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training, arXiv 2006.10738.

On a small data set the discriminator soon knows the real images by heart, and what it says no longer helps. Variations
of the real images alone would be learned by the generator as well: colours that no image has, shapes at the edge. So
real and made images are both varied, before D sees them, when D learns and when G learns, T being drawn anew each time:

    L_D = f_D(-D(T(x))) + f_D(D(T(G(z))))        L_G = f_G(-D(T(G(z))))

G learns through T, hence every step of it has a gradient. What is drawn is drawn from torch's generator.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.settings.train import Augment

_TRANSLATION = 1 / 8  # of the side, at most
_CUTOUT = 1 / 2  # of the side


def vary(images: Tensor, how: Augment) -> Tensor:
    """images [batch, 3, height, width], -1…1, each varied by itself. light: moved and cut out; strong: colours, too.

    Colours are `strong`, because a data set of few colours, such as ink on paper, loses more by them than it gains.
    """
    if how == "none":
        return images
    if how == "strong":
        images = colours(images)
    return cutout(translation(images))


def colours(images: Tensor) -> Tensor:
    """Brightness by up to half a unit of -1…1, then saturation times 0…2 and contrast times .5…1.5."""
    images = images + _uniform(images, -0.5, 0.5)
    grey = images.mean(dim=1, keepdim=True)  # [batch, 1, height, width]
    images = (images - grey) * _uniform(images, 0, 2) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * _uniform(images, 0.5, 1.5) + mean


def translation(images: Tensor) -> Tensor:
    """Moved by up to an eighth of the sides; what comes in is 0, the middle grey."""
    batch, _, height, width = images.shape
    most_y, most_x = round(height * _TRANSLATION), round(width * _TRANSLATION)
    y = torch.arange(height, device=images.device) + _whole(images, 0, 2 * most_y)[:, None]  # [batch, height]
    x = torch.arange(width, device=images.device) + _whole(images, 0, 2 * most_x)[:, None]  # [batch, width]
    rows = torch.arange(batch, device=images.device)[:, None, None]
    padded = pad(images, (most_x, most_x, most_y, most_y)).permute(0, 2, 3, 1)  # [batch, height+, width+, 3]
    return padded[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor) -> Tensor:
    """A square of half the sides is 0, the middle grey; it may lie partly outside."""
    height, width = images.shape[2:]
    size_y, size_x = round(height * _CUTOUT), round(width * _CUTOUT)
    top = _whole(images, -(size_y // 2), height - size_y // 2)[:, None]  # [batch, 1]
    left = _whole(images, -(size_x // 2), width - size_x // 2)[:, None]
    y = torch.arange(height, device=images.device)  # [height]
    x = torch.arange(width, device=images.device)  # [width]
    inside_y, inside_x = (y >= top) & (y < top + size_y), (x >= left) & (x < left + size_x)
    return images * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    """One number per image."""
    drawn = torch.rand(len(images), 1, 1, 1, device=images.device)
    return drawn * (high - low) + low


def _whole(images: Tensor, low: int, high: int) -> Tensor:
    """One whole number per image [batch], low to high."""
    return torch.randint(low, high + 1, (len(images),), device=images.device)
