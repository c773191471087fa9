"""What a generator is given in place of images: latent vectors and, where it is told them, classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.card import Card


@dataclass(frozen=True)
class Latents:
    """A batch for a generator; sliced, it is the batch of these images."""

    latent: NDArray[np.float32]  # [batch, latent_size]
    labels: NDArray[np.int64] | None  # [batch], indices into the card's labels; None: it is told no classes

    def __len__(self) -> int:
        return len(self.latent)

    def __getitem__(self, rows: slice) -> "Latents":
        return Latents(self.latent[rows], None if self.labels is None else self.labels[rows])

    @property
    def arrays(self) -> list[NDArray]:
        """The inputs of the graph, in their order."""
        return [self.latent] if self.labels is None else [self.latent, self.labels]

    @property
    def by_name(self) -> dict[str, NDArray]:
        """The inputs of the graph by their name in the ONNX contract."""
        return dict(zip(("latent", "labels"), self.arrays, strict=False))


def draw(
    card: Card, seed: int, numbers: Sequence[int], labels: Sequence[int] | None = None, truncation: float | None = None
) -> Latents:
    """The latents of the images with these numbers: each is a function of the seed and its own number alone.

    labels: of each image, an index into the card's; by default the classes in turn. truncation: values further from 0
    are drawn again, for images that are more usual and less varied (Brock et al., arXiv 1809.11096, section 3.1).
    """
    latent = np.stack([_one(card.latent_size, seed, number, truncation) for number in numbers])  # [n, latent_size]
    if not card.is_conditional:
        return Latents(latent, None)
    if labels is None:
        labels = [number % len(card.labels) for number in numbers]
    return Latents(latent, np.array(labels, np.int64))


def _one(size: int, seed: int, number: int, truncation: float | None) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, number])
    values = rng.standard_normal(size)
    if truncation is not None:
        while (beyond := np.abs(values) > truncation).any():
            values[beyond] = rng.standard_normal(int(beyond.sum()))
    return values.astype(np.float32)
