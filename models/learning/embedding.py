"""How variational autoencoders learn: the evidence bound, whose second term is let in slowly, and a watch on collapse.

models.nets.vae says what the terms are. A decoder that knows nothing yet gains nothing from the latent vector, and the
cheapest thing to do with it is to make it say nothing: KL falls to 0, and may stay there (posterior collapse; Bowman et
al., arXiv 1511.06349, section 3). So KL counts from nothing to β over the first part of the training, and after each
epoch every number of the vector is looked at: one whose mean is nearly the same for all images carries nothing (Burda
et al., arXiv 1509.00519, section 5.2).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.card import Card
from models.learning.augment import augmentation
from models.learning.recipe import Recipe
from models.nets import vae
from models.nets.parts import Parts

__all__ = ["augmentation", "learner", "targets"]  # nothing but the image itself is to be found in it

ACTIVE_VARIANCE = 0.01  # of a number's mean over the images: Burda et al.
SHOWN = 8  # images in each row of a grid


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str]) -> list[None]:
    """Nothing, for each row of `images`: an autoencoder learns from the image alone."""
    return [None] * images.num_rows


def learner(network: nn.Module, parts: Parts, card: Card, recipe: Recipe) -> "EmbeddingLearner":
    """See models.learning.learner."""
    return EmbeddingLearner(network, parts, recipe)


class Embedded(NamedTuple):
    """What is learnt of the images of a batch by the vector that each most likely came from."""

    mean: Tensor  # [batch, z]
    terms: vae.Terms
    images: Tensor  # uint8 [batch, height, width, 3]


class EmbeddingLearner:
    """A Learner. Targets are None: what is to come out is what goes in."""

    main_metric = "elbo"
    num_finishing = vae.COMPONENTS

    def __init__(self, network: nn.Module, parts: Parts, recipe: Recipe):
        assert isinstance(network, vae.Vae)
        self.network: nn.Module = network
        self.parts = parts
        # The loop may put a wrapper in place of `network`.
        self._network = network
        self.beta = recipe.beta
        self.divergence: list[float] = []  # [z], of the last validation
        self._observation, self._warmup, self._epochs = recipe.observation, recipe.kl_warmup, recipe.epochs
        network.likelihood.assume(recipe.observation, recipe.beta)
        self._normalise = vae.normaliser()
        self._share_of_divergence = 1.0
        self._shown: Tensor | None = None  # images of the validation split

    def at(self, done: float) -> None:
        """See models.learning.learner.Scheduled: how much KL counts follows from how far the training is, no more."""
        self._share_of_divergence = min(1.0, done / self._warmup) if self._warmup else 1.0

    def finish(self, batches: Iterable[Tensor]) -> None:
        """See models.learning.learner.Finishing: the aggregate posterior is that of the weights that are kept."""
        found = [self._network.encode(self._normalise.to(images.device)(images)) for images in batches]
        means, log_variances = (torch.cat(parts).float() for parts in zip(*found, strict=True))
        self._network.aggregate.fill(means, log_variances)

    def collate(self, targets: Sequence[None]) -> None:
        """Nothing."""

    def losses(self, images: Tensor, targets: None) -> dict[str, Tensor]:
        """The two terms of -ELBO in nats per value of the image, so that rates suit images of any size.

        KL is weighed by β and by what the warm-up lets through.
        """
        values = images[0].numel()
        scaled = self._normalise.to(images.device)(images)  # [batch, 3, height, width]
        noise = torch.randn(len(images), self._network.latent_size, device=images.device)
        _, terms = self.network(scaled, self._observation, noise)
        weight = self.beta * self._share_of_divergence / values
        # A parameter that has no part in a loss cannot be shared between devices; s has none in a bernoulli.
        unused = 0 * self._network.likelihood.log_scale
        return {
            "reconstruction": terms.reconstruction.mean() / values + unused,
            "kl": weight * terms.divergence.sum(dim=1).mean(),
        }

    def outputs(self, images: Tensor) -> Embedded:
        """By the mean of each image's distribution, as the exported graph does."""
        scaled = self._normalise.to(images.device)(images)
        mean, terms = self.network(scaled, self._observation)
        return Embedded(mean, terms, images)

    def scores(self) -> "EmbeddingScores":
        """The bound and its terms, the error of what comes back, and how many numbers carry something."""
        return EmbeddingScores(self)

    def keep(self, images: Tensor) -> None:
        """Notes the first images of the validation split, for `samples`."""
        if self._shown is None:  # where there are fewer, some are shown again: a row of a grid is always full
            self._shown = images[torch.arange(SHOWN) % len(images)]

    def samples(self) -> NDArray[np.uint8]:
        """Images of the validation split over what the decoder makes of their means: [2n, height, width, 3]."""
        assert self._shown is not None  # a validation comes first
        scaled = self._normalise.to(self._shown.device)(self._shown)
        mean, _ = self._network.encode(scaled)
        made = vae.levels(self._network.decoder(mean))
        return torch.cat([self._shown, made]).cpu().numpy()

    def watch(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """What is to be said of the last epoch: numbers of the vector that carry nothing, once KL counts in full."""
        if self._share_of_divergence < 1:
            return None
        active, size = int(history[-1]["val_active_units"]), self._network.latent_size
        if not active:
            return (
                "posterior collapse: no number of the latent vector says anything of the image, and every image comes "
                "back the same; try a lower --beta or a longer --kl-warmup"
            )
        if active < size and len(history) == self._epochs:
            return (
                f"{size - active} of the {size} numbers of the latent vector carry nothing, --latent-size {active} "
                f"would do as well; KL of each in nats: {' '.join(f'{value:.2f}' for value in self.divergence)}"
            )
        return None


class EmbeddingScores:
    """Adds up over a validation split."""

    def __init__(self, learner: EmbeddingLearner):
        self._learner = learner
        self._count = self._bound = self._reconstruction = self._squared_error = 0.0
        self._divergence = self._mean = self._square = torch.zeros(())  # [z] once a batch has come

    def update(self, outputs: Embedded, targets: None) -> None:
        """Takes what `outputs` gave of one batch."""
        mean, terms = outputs.mean.double().cpu(), vae.Terms(*(term.double().cpu() for term in outputs.terms))
        values = outputs.images[0].numel()
        self._learner.keep(outputs.images)
        self._count += len(mean)
        self._bound -= float(vae.negative_elbo(terms, self._learner.beta, values).sum())
        self._reconstruction += float(terms.reconstruction.sum()) / values
        self._squared_error += float(terms.squared_error.sum())
        self._divergence = self._divergence + terms.divergence.sum(dim=0)
        self._mean, self._square = self._mean + mean.sum(dim=0), self._square + mean.square().sum(dim=0)

    def compute(self) -> dict[str, float]:
        """elbo and reconstruction (its first term, negative) in nats per value of an image, kl in nats per image, mse
        of values that go from 0 to 1, and active_units, of the latent vector's numbers.

        elbo has the β of the training. A number is active where its mean varies over the images by more than
        ACTIVE_VARIANCE; of a single image, where its KL is more than that.
        """
        count = self._count
        divergence = self._divergence / count  # [z]
        variance = self._square / count - (self._mean / count).square()
        active = (variance if count > 1 else divergence) > ACTIVE_VARIANCE
        self._learner.divergence = divergence.tolist()
        return {
            "elbo": self._bound / count,
            "reconstruction": self._reconstruction / count,
            "kl": float(divergence.sum()),
            "mse": self._squared_error / count,
            "active_units": float(active.sum()),
        }
