"""CycleGAN: Zhu et al., Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks.

Sections and equations are those of arXiv 1703.10593. Two sets of images, A and B, of which none of the one belongs to
any of the other. A generator G turns images of A into images of B, a second one, F, turns them back. Two discriminators
say of an image whether it is one of the set: D_B is to tell the images of B from what G makes, D_A those of A from what
F makes. They learn against each other by least squares (section 4, as in Mao et al., arXiv 1611.04076): each
discriminator lowers

    ½ E_b[(D_B(b) - 1)²] + ½ E_a[D_B(G(a))²]

and its generator lowers E_a[(D_B(G(a)) - 1)²]. That alone would be content with any image of B. What ties G(a) to a is
the cycle (equation 2): whoever goes there and back has moved nowhere,

    E_a[‖F(G(a)) - a‖₁] + E_b[‖G(F(b)) - b‖₁]

times 10. Where colours are to stay, the identity (section 5.2) helps: what is one of B already is left alone,

    E_b[‖G(b) - b‖₁] + E_a[‖F(a) - a‖₁]

times 5. Where they are to change it is in the way, so that it has to be asked for: white digits on black become black
ones on white within 90 updates without it (.93 of them are recognised), and with it not in 540 (.02).
models.learning.translation adds the losses up, and says in what order who learns.

The networks are those of the appendix: 7.2 for the generators, of which each normalises by its own image (instance
norm: Ulyanov et al., arXiv 1607.08022), so that an image's translation hangs on no other; and PatchGANs for the
discriminators (Isola et al., arXiv 1611.07004), which judge patches of an image by themselves and so never ask what the
image shows. The paper's images have 256 pixels to a side; smaller ones get fewer blocks, fewer channels and smaller
patches (`Size`). Its transposed convolutions of three by three pixels are here a doubling by repetition and a
convolution: they leave no pattern of squares (Odena et al., Deconvolution and Checkerboard Artifacts, 2016).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.card import Card
from models.nets.normalisation import Normalise
from models.nets.parts import Parts

SIZED = True
DISCRIMINATORS = ("discriminator_a", "discriminator_b")
GENERATORS = ("a_to_b", "b_to_a")
IGNORED_PREFIXES = tuple(f"{name}." for name in DISCRIMINATORS)  # they serve training alone

HALVINGS = 2  # of the image by a generator, before its blocks
_NARROWEST = 32  # channels of a discriminator's first layer at least
_HALF = (0.5, 0.5, 0.5)  # networks see levels from -1 to 1


class Size(NamedTuple):
    """What depends on the sides of the images."""

    blocks: int  # residual ones of a generator
    width: int  # channels at the full size
    patch_layers: int  # of a discriminator that halve: 3 judge patches of 70×70 pixels, 2 of 34×34, 1 of 16×16


# Images of at least so many pixels to a side; the last line is the paper's.
SIZES: dict[int, Size] = {
    16: Size(blocks=2, width=16, patch_layers=1),
    32: Size(blocks=3, width=24, patch_layers=1),
    64: Size(blocks=4, width=32, patch_layers=2),
    128: Size(blocks=6, width=64, patch_layers=3),
    256: Size(blocks=9, width=64, patch_layers=3),
}


def size_of(side: int) -> Size:
    """That of images whose shorter side has so many pixels."""
    fitting = [size for at_least, size in SIZES.items() if at_least <= side]
    return fitting[-1] if fitting else SIZES[min(SIZES)]


class ResidualBlock(nn.Module):
    """[batch, channels, height, width] → the same, what two convolutions make of it added to it (appendix 7.2)."""

    def __init__(self, width: int):
        super().__init__()
        self.convolve = nn.Sequential(
            *_convolution(width, width, 3), nn.ReLU(inplace=True), *_convolution(width, width, 3)
        )

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return features + self.convolve(features)


class Generator(nn.Sequential):
    """images [batch, 3, height, width], -1 to 1 → the same of the other set; sides are multiples of four."""

    def __init__(self, size: Size):
        width = size.width
        layers: list[nn.Module] = [*_convolution(3, width, 7), nn.ReLU(inplace=True)]
        for _ in range(HALVINGS):
            layers += [*_convolution(width, 2 * width, 3, stride=2), nn.ReLU(inplace=True)]
            width *= 2
        layers += [ResidualBlock(width) for _ in range(size.blocks)]
        for _ in range(HALVINGS):
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), *_convolution(width, width // 2, 3)]
            layers.append(nn.ReLU(inplace=True))
            width //= 2
        super().__init__(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())
        _initialise(self)


class Discriminator(nn.Sequential):
    """images [batch, 3, height, width], -1 to 1 → one judgement per patch [batch, 1, rows, columns]: 1 real, 0 made.

    Judgements are of all sizes, not squeezed between 0 and 1: least squares want them so.
    """

    def __init__(self, size: Size):
        width = max(_NARROWEST, size.width)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for number in range(size.patch_layers):
            stride = 2 if number + 1 < size.patch_layers else 1
            layers += [nn.Conv2d(width, 2 * width, 4, stride, padding=1, bias=False), nn.InstanceNorm2d(2 * width)]
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            width *= 2
        super().__init__(*layers, nn.Conv2d(width, 1, 4, padding=1))
        _initialise(self)


class CycleGan(nn.Module):
    """Both generators; for training the two discriminators beside them."""

    def __init__(self, size: Size, with_discriminators: bool = False):
        super().__init__()
        self.a_to_b = Generator(size)
        self.b_to_a = Generator(size)
        if with_discriminators:
            self.discriminator_a = Discriminator(size)
            self.discriminator_b = Discriminator(size)

    def forward(self, images: Tensor) -> Tensor:
        """A → B [batch, 3, height, width], -1 to 1."""
        return self.a_to_b(images)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    """A convolution of an image that goes on mirrored beyond its border, and the norm of that image and channel."""
    return (
        nn.ReflectionPad2d(kernel // 2),
        nn.Conv2d(inputs, outputs, kernel, stride, bias=False),
        nn.InstanceNorm2d(outputs),
    )


def _initialise(network: nn.Module) -> None:
    """Normal with a deviation of .02 (appendix 7.1)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def build(builder: str, num_classes: int, size: int) -> nn.Module:
    """Two untrained generators of images of so many pixels to a side."""
    return CycleGan(size_of(size)).eval()


def build_for_training(builder: str, num_classes: int, size: int) -> nn.Module:
    """The same with discriminators."""
    return CycleGan(size_of(size), with_discriminators=True).eval()


def parts(network: nn.Module, builder: str) -> Parts:
    """Everything learns at the full rate: there is no backbone."""
    return Parts(tuple(name for name, _ in network.named_children()), ())


def levels(images: Tensor) -> Tensor:
    """From what a generator gives, -1 to 1, to levels: [batch, 3, height, width] → uint8 [batch, height, width, 3]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def normaliser() -> Normalise:
    """uint8 [batch, height, width, 3] → [batch, 3, height, width], -1 to 1."""
    return Normalise(_HALF, _HALF)


def graph(network: nn.Module, card: Card) -> nn.Module:
    """images [batch, height, width, 3] uint8 of A → images_out [batch, height, width, 3] u8 of B, of the same size."""

    assert isinstance(network, CycleGan)
    a_to_b: Generator = network.a_to_b

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = normaliser()
            self.a_to_b = a_to_b

        def forward(self, images: Tensor) -> Tensor:
            return levels(self.a_to_b(self.normalise(images)))

    return Translator().eval()


def reference(network: nn.Module, card: Card) -> Callable[[Tensor], dict[str, Tensor]]:
    """The same by torchvision's own steps: scale to 0…1, normalise, translate, and back."""
    from torchvision.transforms.v2.functional import normalize

    def images_out(images: Tensor) -> dict[str, Tensor]:
        scaled = images.permute(0, 3, 1, 2).float() / 255  # [batch, 3, height, width]
        translated = network(normalize(scaled, list(_HALF), list(_HALF)))
        shown = (translated / 2 + 0.5).clamp(0, 1) * 255
        return {"images_out": shown.round().to(torch.uint8).permute(0, 2, 3, 1)}

    return images_out


def wake(network: nn.Module, card: Card, images: NDArray[np.uint8]) -> None:
    """Nothing to do: each norm brings an image's own statistics, and no signal fades."""
