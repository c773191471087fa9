"""Generative adversarial networks: Goodfellow et al., arXiv 1406.2661, and what made them work.

Two networks learn against each other. The generator G makes an image of random numbers z, the latent; the
discriminator D says of an image whether it is real. They play (equation 1 of the paper)

    min_G max_D  E[log D(x)] + E[log(1 - D(G(z)))]        x: real images, z: N(0, 1)

and at the end of the game G draws from the distribution of the real images. D gives logits s here, D = sigmoid(s).
While D wins, log(1 - D) has no slope; so G maximises log D(G(z)) instead, as section 3 of the paper advises (the
non-saturating loss). The losses are in models.learning.adversarial; this file holds three pairs of networks:

dcgan (Radford et al., arXiv 1511.06434). G: the latent becomes a map of 4×4 by a transposed convolution; each further
one (kernel 4, stride 2) doubles the sides and halves the channels, with BatchNorm and ReLU between, and tanh at the
end. D: the mirror image with strided convolutions, BatchNorm but in its first layer, and LeakyReLU of slope .2. No
pooling, no hidden linear layers. Weights start from N(0, .02), the scales of BatchNorms from N(1, .02).

wgan_gp (Arjovsky et al., arXiv 1701.07875; Gulrajani et al., arXiv 1704.00028). D becomes a critic, whose numbers are
no probabilities. Over all critics f of slope at most 1,

    W(real, made) = max_f  E[f(x)] - E[f(G(z))]

is the distance that earth would have to be moved to make one distribution the other; unlike the game's value it falls
while G gets nearer, even where both have no image in common. That the slope is at most 1 is seen to by a penalty at
points x̂ on the lines between real and made images (equation 3 of the second paper),

    λ E[(‖∇ f(x̂)‖₂ - 1)²]        λ = 10

or, as the first paper has it, by clipping all weights of f to [-c, c]. The penalty is one of each image by itself, so
that the critic must not mix the images of a batch: it has no BatchNorm.

conditional_gan (Mirza and Osindero, arXiv 1411.1784; Miyato and Koyama, arXiv 1802.05637). G is also told a class y:
the class's embedding, learned, stands beside the latent. D asks whether the image is real *and* of that class, by a
projection (equation 3 of the second paper, with φ the features of the image)

    s(x, y) = ⟨V_y, φ(x)⟩ + ψ(φ(x))

One part says how real the image is, the other how well it fits the V that belongs to the class. All else is DCGAN's.
The paper adds up the features over their map and bounds D's slope by spectral normalisation (arXiv 1802.05957); here φ
is the whole map of 4×4, because where a stroke is tells one class from another, and BatchNorm stays.

What differs from the papers: channels. DCGAN's first map has 1,024 channels at 64 pixels. Here the last map before the
image has 32, which doubles from there down to 4×4 and ends at 512: 128 at 32 pixels, which a CPU learns in minutes.
And the critic starts from weights that keep the scale of what passes, since no BatchNorm mends it.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.card import Card
from models.nets.parts import Parts
from models.nets.untrained import measure_batch_norms

IGNORED_PREFIXES = ()
SIZED = True

LATENT_SIZE = 100
_SMALLEST_MAP = 4  # pixels to a side
_CHANNELS, _MOST_CHANNELS = 32, 512
_EMBEDDING = 32  # numbers that a class becomes beside the latent


class Generator(nn.Module):
    """latent [batch, LATENT_SIZE], labels int64 [batch] → images [batch, 3, size, size], -1…1."""

    def __init__(self, num_classes: int, size: int):
        super().__init__()
        channels = _channels(size)[::-1]  # from 4×4 on
        self.embed = nn.Embedding(num_classes, _EMBEDDING) if num_classes else None
        inputs = LATENT_SIZE + (_EMBEDDING if num_classes else 0)
        layers: list[nn.Module] = [nn.ConvTranspose2d(inputs, channels[0], _SMALLEST_MAP, bias=False)]
        for before, after in pairwise(channels):
            layers += [nn.BatchNorm2d(before), nn.ReLU()]
            layers.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(channels[-1]), nn.ReLU()]
        layers += [nn.ConvTranspose2d(channels[-1], 3, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class; labels only where there are classes."""
        if self.embed is not None:
            latent = torch.cat([latent, self.embed(labels)], dim=1)
        return self.layers(latent[:, :, None, None])


class Discriminator(nn.Module):
    """images [batch, 3, size, size], -1…1 → logits [batch]: the higher, the more real.

    `has_norms`: BatchNorms but in the first layer; a critic has none. With classes it is a projection discriminator.
    """

    def __init__(self, num_classes: int, size: int, has_norms: bool):
        super().__init__()
        channels = _channels(size)  # from the image on
        self.blocks = nn.ModuleList()
        for level, (before, after) in enumerate(pairwise((3, *channels))):
            has_norm = has_norms and level > 0
            layers: list[nn.Module] = [
                nn.Conv2d(before, after, 4, stride=2, padding=1, bias=not has_norm),
                *([nn.BatchNorm2d(after)] if has_norm else []),
                nn.LeakyReLU(0.2),
            ]
            self.blocks.append(nn.Sequential(*layers))
        self.judge = nn.Conv2d(channels[-1], 1, _SMALLEST_MAP)  # sees the whole map
        self.project = nn.Conv2d(channels[-1], num_classes, _SMALLEST_MAP, bias=False) if num_classes else None
        _initialise(self)
        if not has_norms:
            _keep_scale(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class; labels int64 [batch] only where there are classes."""
        features = images
        for block in self.blocks:
            features = block(features)  # [batch, channels, 4, 4] at last
        logits = self.judge(features).flatten()
        if self.project is not None:
            assert labels is not None
            of_classes = self.project(features).flatten(1)  # [batch, classes]
            logits = logits + of_classes.gather(1, labels[:, None])[:, 0]
        return logits


class Adversaries(nn.Module):
    """The pair; only the generator is exported, but what learns on from it needs both."""

    latent_size = LATENT_SIZE

    def __init__(self, num_classes: int, size: int, has_norms: bool):
        super().__init__()
        self.generator = Generator(num_classes, size)
        self.discriminator = Discriminator(num_classes, size, has_norms)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """As the generator."""
        return self.generator(latent, labels)


def _channels(size: int) -> list[int]:
    """Of each map between the image and 4×4, from the image on."""
    return [min(_CHANNELS << level, _MOST_CHANNELS) for level in range(int(math.log2(size // _SMALLEST_MAP)))]


def _initialise(network: nn.Module) -> None:
    """As DCGAN's section 3 has it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)


def _keep_scale(network: nn.Module) -> None:
    """He et al., arXiv 1502.01852: without a BatchNorm, weights of .02 let the signal fade from layer to layer."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.2)


def build(builder: str, num_classes: int, size: int) -> Adversaries:
    """An untrained pair for images of `size` pixels to a side, a power of two; num_classes 0: it knows none."""
    return Adversaries(num_classes, size, has_norms=builder != "wgan_gp").eval()


build_for_training = build  # all of it is published: who learns on from it needs the discriminator, too


def parts(network: nn.Module, builder: str) -> Parts:
    """The stages are the discriminator's blocks but the last: they are what FreezeD freezes.

    Mo et al., arXiv 2002.10964: on few images the early layers of a trained discriminator are best left as they are,
    its last ones learn, and so does the whole generator. What stands for the classes is the head.
    """
    assert isinstance(network, Adversaries)
    has_classes = network.generator.embed is not None
    *early, last = (f"discriminator.blocks.{number}" for number in range(len(network.discriminator.blocks)))
    return Parts(
        head=("generator.embed", "discriminator.project") if has_classes else (),
        stages=tuple((name,) for name in early),
        neck=("generator.layers", last, "discriminator.judge"),
    )


class _Graph(nn.Module):
    """latent f32 [batch, z], and labels int64 [batch] where there are classes → images_out u8 [batch, h, w, 3]."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        return to_uint8(self.generator(latent, labels))


def to_uint8(images: Tensor) -> Tensor:
    """-1…1 [batch, 3, height, width] → uint8 [batch, height, width, 3], as files hold it."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 [batch, height, width, 3] → -1…1 [batch, 3, height, width], as the networks have it."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def graph(network: nn.Module, card: Card) -> nn.Module:
    """The generator alone, with whole grey levels at the end."""
    assert isinstance(network, Adversaries)
    return _Graph(network.generator).eval()


def wake(network: nn.Module, card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained generator give images that depend on the latent; `images` only say how many."""
    assert isinstance(network, Adversaries)
    generator, number = network.generator, max(len(images), 16)
    drawn = torch.Generator().manual_seed(0)
    latent = torch.randn(number, LATENT_SIZE, generator=drawn)
    labels = torch.arange(number) % len(card.labels) if card.labels else None
    measure_batch_norms(generator, lambda _: generator(latent, labels), images)
    with torch.no_grad():
        last = generator.layers[-2]
        assert isinstance(last, nn.ConvTranspose2d)
        spread = generator.layers[:-1](_first(generator, latent, labels)).std()
        last.weight /= spread.clamp_min(1e-6)


def _first(generator: Generator, latent: Tensor, labels: Tensor | None) -> Tensor:
    """What the layers are given."""
    if generator.embed is not None:
        latent = torch.cat([latent, generator.embed(labels)], dim=1)
    return latent[:, :, None, None]


def reference(network: nn.Module, card: Card) -> Callable[..., dict[str, Tensor]]:
    """The same from latent and labels, by plain steps: the generator, then each value to its nearest grey level."""
    assert isinstance(network, Adversaries)

    def answer(latent: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            images = network.generator(latent, labels)  # [batch, 3, h, w]
        levels = torch.clamp(torch.floor(images * 127.5 + 128.0), 0, 255)
        return {"images_out": levels.to(torch.uint8).movedim(1, 3)}

    return answer
