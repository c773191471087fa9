"""Variational autoencoders: Kingma and Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114.

A decoder makes images x of short latent vectors z, an encoder says of an image which vectors may have made it: not one,
but a normal distribution with a mean and a variance for each number of z, q(z|x) = N(m(x), diag v(x)). Both learn
together by raising a bound below log p(x) (equation 3):

    log p(x) ≥ ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) ‖ p(z)),   p(z) = N(0, I)

The first term wants images back as they were, the second wants the vectors of all images together to look like standard
normal noise, so that noise decodes to images, too. The expectation is taken at one vector per image and step, drawn as
z = m + √v·ε with ε ~ N(0, I): so written (the reparameterisation, section 2.4), its gradient reaches m and v. The
second term has no need to be drawn (appendix B):

    KL = ½ Σ_j (m_j² + v_j - log v_j - 1)

β-VAE (Higgins et al., ICLR 2017, equation 4) weighs it: with β above 1 fewer numbers carry more of what varies by
itself, and images come back coarser.

What log p(x|z) is follows from what is assumed of a pixel around the decoder's answer y, 0 to 1 (`Likelihood`):

    gaussian:   x ~ N(y, s²)      log p = -(x - y)²/2s² - log s - ½ log 2π   one s for all pixels, which is learnt
    bernoulli:  x ~ Bernoulli(y)  log p = x log y + (1 - x) log(1 - y)       for ink: levels are nearly 0 or 1

Where s is learnt (Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, arXiv 2006.13202) it
becomes what the decoder leaves unexplained, and weighs the two terms by itself: β = 1 then suits images of any size and
contrast.

How strange an image is, is read from the same bound, with one thing mended. No data set fills the latent space as
N(0, I) does: there are gaps between its kinds of images, and a kind that was never seen falls into them. The p(z) under
which the bound of the training images is highest is what their own vectors make together, the aggregate posterior
(Hoffman and Johnson, ELBO surgery, 2016; Tomczak and Welling, arXiv 1705.07120, equation 6)

    q(z) = 1/N Σ_n q(z|x_n)

so it takes the place of p(z) when the training is over (`Aggregate`): the anomaly of x is -ELBO(x) under q(z).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.card import Card
from models.nets.normalisation import Normalise
from models.nets.parts import Parts
from models.settings.train import Observation

IGNORED_PREFIXES = ()
SIZED = True

LATENT_SIZE = 32
WIDTH = 32  # channels at the full size; doubled whenever the image is halved, up to
WIDEST = 256
SMALLEST = 4  # the sides of the last map are at least that, and less than twice as much
NORM_GROUPS = 8
COMPONENTS = 1024  # of the aggregate posterior
_LOG_NOTHING = -1e4  # the logarithm of a weight that is none; -∞ would be NaN where it is multiplied

_LOG_VARIANCES = (-12.0, 4.0)  # of q: beyond, the exponential overflows in half precision, or a number is never used
_LOG_SCALES = (-5.0, 2.0)  # of a pixel, s: .007 is two grey levels, where images of one colour would drive it to zero
_FIRST_LOG_SCALE = -1.0


class Terms(NamedTuple):
    """The bound of each image, by its terms."""

    reconstruction: Tensor  # [batch], -log p(x|z) in nats
    divergence: Tensor  # [batch, z], KL in nats, of each number of the latent vector
    squared_error: Tensor  # [batch], the mean of (x - y)² over the values of the image, which go from 0 to 1


class Posterior(nn.Module):
    """The encoder's last map [batch, channels, side, side] → mean and log v of q(z|x), [batch, z] each."""

    def __init__(self, channels: int, side: int, latent_size: int):
        super().__init__()
        self.project = nn.Linear(channels * side * side, 2 * latent_size)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        mean, log_variance = self.project(features.flatten(1)).float().chunk(2, dim=1)  # the bound wants 32 bits
        return mean, log_variance.clamp(*_LOG_VARIANCES)


class Decoder(nn.Module):
    """latent vectors [batch, z] → logits of the images [batch, 3, height, width]; their sigmoid is y."""

    def __init__(self, channels: list[int], side: int, latent_size: int):
        super().__init__()
        self.side = side
        self.project = nn.Linear(latent_size, channels[-1] * side * side)
        layers: list[nn.Module] = [nn.SiLU()]
        for deep, shallow in zip(channels[:0:-1], channels[-2::-1], strict=True):
            layers += [nn.ConvTranspose2d(deep, shallow, 4, stride=2, padding=1), *_normalised(shallow)]
        self.enlarge = nn.Sequential(*layers, nn.Conv2d(channels[0], 3, 3, padding=1))

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        return self.enlarge(self.project(latent).unflatten(1, (-1, self.side, self.side)))


class Aggregate(nn.Module):
    """The mixture of q(z|x) over training images, COMPONENTS of them at most; N(0, I) as long as it is not `filled`."""

    means: Tensor
    log_variances: Tensor
    log_weights: Tensor

    def __init__(self, latent_size: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(COMPONENTS, latent_size))
        self.register_buffer("log_variances", torch.zeros(COMPONENTS, latent_size))
        self.register_buffer("log_weights", torch.full((COMPONENTS,), _LOG_NOTHING))
        self.log_weights[0] = 0.0

    @torch.no_grad()
    def fill(self, means: Tensor, log_variances: Tensor) -> None:
        """Takes over q(z|x) of up to COMPONENTS images, [n, z] each."""
        count = len(means)
        self.means.zero_()[:count] = means
        self.log_variances.zero_()[:count] = log_variances
        self.log_weights.fill_(_LOG_NOTHING)[:count] = -math.log(count)

    def forward(self, latent: Tensor) -> Tensor:
        """log q(z) - log N(z; 0, I) of latent vectors [batch, z] → [batch]."""
        squares = (latent[:, None] - self.means).square() * (-self.log_variances).exp()  # [batch, components, z]
        logs = self.log_weights - (squares + self.log_variances).sum(dim=2) / 2  # [batch, components]
        highest = logs.amax(dim=1, keepdim=True)
        together = highest[:, 0] + (logs - highest).exp().sum(dim=1).log()
        return together + latent.square().sum(dim=1) / 2  # what both densities share is left out


class Likelihood(nn.Module):
    """-log p(x|z): what is assumed of pixels, and how β weighs KL. They travel with the weights, as anomalies do."""

    is_bernoulli: Tensor
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_LOG_SCALE))  # log s
        self.register_buffer("is_bernoulli", torch.tensor(False))
        self.register_buffer("beta", torch.tensor(1.0))

    @property
    def scale(self) -> Tensor:
        """s, of the gaussian."""
        return self.log_scale.clamp(*_LOG_SCALES).exp()

    @property
    def observation(self) -> Observation:
        """What is assumed of pixels."""
        return "bernoulli" if self.is_bernoulli else "gaussian"

    def assume(self, observation: Observation, beta: float) -> None:
        """Sets what follows from the settings of a training."""
        self.is_bernoulli.fill_(observation == "bernoulli")
        self.beta.fill_(beta)

    def forward(self, logits: Tensor, images: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        """Of images [batch, 3, height, width], 0 to 1: -log p(x|z) [batch], and the mean squared error [batch]."""
        squared = (logits.sigmoid() - images).square().flatten(1)  # [batch, values]
        if observation == "bernoulli":
            of_values = binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1)
        else:
            scale = self.scale
            of_values = squared / (2 * scale.square()) + scale.log() + math.log(2 * math.pi) / 2
        return of_values.sum(dim=1), squared.mean(dim=1)


class Vae(nn.Module):
    """Encoder and decoder of square images of `size` pixels to a side, a multiple of 16."""

    def __init__(self, size: int, latent_size: int):
        super().__init__()
        halvings = int(math.log2(size // SMALLEST))
        side = size // 2**halvings
        channels = [min(WIDTH * 2**level, max(WIDEST, WIDTH)) for level in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1), nn.SiLU()]
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), *_normalised(after)]
        self.encoder = nn.Sequential(*layers)
        self.posterior = Posterior(channels[-1], side, latent_size)
        self.decoder = Decoder(channels, side, latent_size)
        self.likelihood = Likelihood()
        self.aggregate = Aggregate(latent_size)
        self.latent_size = latent_size

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [batch, 3, height, width], 0 to 1 → mean and log v of q(z|x), [batch, z] each."""
        return self.posterior(self.encoder(2 * images - 1))

    def forward(self, images: Tensor, observation: Observation, noise: Tensor | None = None) -> tuple[Tensor, Terms]:
        """images [batch, 3, height, width], 0 to 1 → the mean of q(z|x) [batch, z] and the terms of the bound.

        noise: ε [batch, z]; without it the vector is the mean.
        """
        mean, log_variance = self.encode(images)
        variance = log_variance.exp()
        latent = mean if noise is None else mean + variance.sqrt() * noise
        reconstruction, squared_error = self.likelihood(self.decoder(latent), images, observation)
        divergence = (mean.square() + variance - log_variance - 1) / 2
        return mean, Terms(reconstruction, divergence, squared_error)


def _normalised(channels: int) -> tuple[nn.Module, ...]:
    """A norm of each image by itself, so that an image is the same in training and in use, and a nonlinearity."""
    return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels), nn.SiLU()


def build(builder: str, num_classes: int, size: int, latent_size: int = LATENT_SIZE) -> nn.Module:
    """An untrained network of images of so many pixels to a side; it knows no classes."""
    return Vae(size, latent_size).eval()


build_for_training = build  # nothing of it serves training alone


def parts(network: nn.Module, builder: str) -> Parts:
    """The encoder's convolutions are the backbone: what is seen in images may be known already.

    What is behind them learns in every mode: where in the latent space an image lies, and what is decoded there.
    """
    assert isinstance(network, Vae)
    convolutions = [name for name, module in network.encoder.named_children() if list(module.parameters())]
    stages = [
        ("encoder.0",),
        *((f"encoder.{a}", f"encoder.{b}") for a, b in zip(convolutions[1::2], convolutions[2::2], strict=True)),
    ]
    return Parts(("posterior", "decoder", "likelihood", "aggregate"), tuple(stages))


def normaliser() -> Normalise:
    """uint8 [batch, height, width, 3] → [batch, 3, height, width], 0 to 1."""
    return Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def levels(logits: Tensor) -> Tensor:
    """From what the decoder gives to levels: [batch, 3, height, width] → uint8 [batch, height, width, 3]."""
    return (logits.sigmoid() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def negative_elbo(terms: Terms, beta: Tensor | float, values: int) -> Tensor:
    """Of each image [batch], in nats per value; an image has so many values."""
    return (terms.reconstruction + beta * terms.divergence.sum(dim=1)) / values


def graph(network: nn.Module, card: Card) -> nn.Module:
    """images [batch, height, width, 3] uint8 → embedding [batch, z] f32, anomaly [batch] f32.

    The embedding is the mean of q(z|x). The anomaly is -ELBO(x) in nats per value of the image, with β as in training,
    under the aggregate posterior, and with expectations taken at the mean: nothing is drawn.
    """
    assert isinstance(network, Vae)
    autoencoder: Vae = network

    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = normaliser()
            self.network = autoencoder
            self.observation = autoencoder.likelihood.observation

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            embedding, terms = self.network(self.normalise(images), self.observation)
            beta, values = self.network.likelihood.beta, images[0].numel()
            gained = beta * self.network.aggregate(embedding) / values  # by q(z) in place of N(0, I)
            return embedding, negative_elbo(terms, beta, values) - gained

    return Embedder().eval()


def decoder_graph(network: nn.Module, card: Card) -> nn.Module:
    """latent [batch, z] f32 → images_out [batch, height, width, 3] u8."""
    assert isinstance(network, Vae)
    decoder: Decoder = network.decoder

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, latent: Tensor) -> Tensor:
            return levels(self.decoder(latent))

    return Generator().eval()


def reference(network: nn.Module, card: Card) -> Callable[[Tensor], dict[str, Tensor]]:
    """The same by torch's own distributions."""
    from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

    assert isinstance(network, Vae)

    def embedded(images: Tensor) -> dict[str, Tensor]:
        scaled = images.permute(0, 3, 1, 2).float() / 255  # [batch, 3, height, width]
        mean, log_variance = network.encode(scaled)
        logits, likelihood, aggregate = network.decoder(mean), network.likelihood, network.aggregate
        if likelihood.observation == "bernoulli":
            found = Bernoulli(logits=logits, validate_args=False).log_prob(scaled)
        else:
            found = Normal(logits.sigmoid(), likelihood.scale).log_prob(scaled)
        standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
        divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), standard).sum(dim=1)  # [batch]
        kinds = Independent(Normal(aggregate.means, (aggregate.log_variances / 2).exp()), 1)
        mixture = MixtureSameFamily(Categorical(logits=aggregate.log_weights), kinds)
        divergence = divergence + standard.log_prob(mean).sum(dim=1) - mixture.log_prob(mean)
        bound = found.flatten(1).sum(dim=1) - likelihood.beta * divergence
        return {"embedding": mean, "anomaly": -bound / images[0].numel()}

    return embedded


def decoder_reference(network: nn.Module, card: Card) -> Callable[..., dict[str, Tensor]]:
    """As the graph of the decoder: a function of latent vectors [batch, z]."""

    def images_out(latent: Tensor) -> dict[str, Tensor]:
        shown = torch.sigmoid(network.get_submodule("decoder")(latent))  # [batch, 3, height, width]
        return {"images_out": (255 * shown.permute(0, 2, 3, 1)).round().to(torch.uint8)}

    return images_out


def wake(network: nn.Module, card: Card, images: NDArray[np.uint8]) -> None:
    """Spreads the means of an untrained network over `images` [n, height, width, 3] as those of a trained one are."""
    assert isinstance(network, Vae)
    project = network.posterior.project
    with torch.no_grad():
        mean, _ = network.encode(normaliser()(torch.from_numpy(images)))
        factor = 1 / mean.std(dim=0).clamp_min(1e-6)  # [z]
        project.weight[: len(factor)] *= factor[:, None]
        project.bias[: len(factor)] = (project.bias[: len(factor)] - mean.mean(dim=0)) * factor
