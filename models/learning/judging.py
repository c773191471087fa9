"""What looks at images to say how alike two samples are: a classifier's features, or the pixels themselves.

Fréchet distances and their like are distances between features, so that a figure without its judge says nothing. A
classifier that was trained on the same kind of image is the best judge; ImageNet's features are the usual one of
photographs; pixels serve where there is nothing else, and see little more than colours and coarse shapes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.learning.generative_metrics import UNKNOWN, Seen, nearest_classes
from models.nets import classifiers
from models.nets.normalisation import Normalise
from models.nets.parts import Parts

_BATCH = 64
_CPU = torch.device("cpu")
_PIXEL_SIDE = 8  # to which pixels are averaged: 192 numbers per image


class Judge(Protocol):
    """Looks at images."""

    name: str  # as `--judge` takes it
    labels: tuple[str, ...]  # the classes that it tells apart, and that mean something here; () for none

    def look(self, images: NDArray[np.uint8], device: torch.device = _CPU) -> Seen:
        """images [n, height, width, 3] → their features, and classes by index into `labels`."""


class PixelJudge:
    """A Judge: the image, averaged down to 8×8 pixels of 0 to 1."""

    name = "pixels"
    labels: tuple[str, ...] = ()

    def look(self, images: NDArray[np.uint8], device: torch.device = _CPU) -> Seen:
        """See Judge."""
        floats = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
        small = nn.functional.adaptive_avg_pool2d(floats, _PIXEL_SIDE)  # [n, 3, 8, 8]
        return Seen(small.flatten(1).numpy(), np.full(len(images), UNKNOWN, np.int64))


class ClassifierJudge:
    """A Judge: what the head of a classifier is given, and what it answers.

    Images are resized to the classifier's input as a whole, whatever its own rule crops: real ones and made ones look
    the same to it. `side`: in pixels.
    """

    def __init__(self, name: str, network: nn.Module, parts: Parts, side: int, labels: Sequence[str]):
        self.name = name
        self.labels = tuple(labels)
        self._network = network.eval().requires_grad_(False)
        self._parts, self._side = parts, side
        self._head = classifiers.head(network, parts)
        self._normalise = Normalise(classifiers.MEAN_RGB, classifiers.STD_RGB)

    @torch.no_grad()
    def look(self, images: NDArray[np.uint8], device: torch.device = _CPU) -> Seen:
        """See Judge."""
        self._network.to(device)
        self._normalise.to(device)
        seen = [
            self._batch(torch.from_numpy(images[at : at + _BATCH]).to(device)) for at in range(0, len(images), _BATCH)
        ]
        features, classes = (torch.cat(column).cpu().numpy() for column in zip(*seen, strict=True))
        known = classes.astype(np.int64) if self.labels else np.full(len(images), UNKNOWN, np.int64)
        return Seen(features.astype(np.float64), known)

    def _batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self._normalise(images)  # [batch, 3, height, width]
        if pixels.shape[2:] != (self._side, self._side):
            pixels = interpolate(pixels, (self._side, self._side), mode="bilinear", antialias=True)
        features: Any = classifiers.features(self._network, self._parts, pixels)
        return features.flatten(1).float(), self._head(features).argmax(dim=1)


def recognised(made: Seen, judge: Judge, labels: Sequence[str], real: Seen) -> Seen:
    """The made images with the classes that they are taken for, by index into a generator's `labels`.

    A judge that tells all of these apart is asked; else each image is what the real image is that it is most like. A
    generator without labels keeps the judge's own classes, and so must `real`.
    """
    if not labels:
        return made
    index = {name: number for number, name in enumerate(labels)}
    if index.keys() <= set(judge.labels):
        ours = np.array([index.get(name, UNKNOWN) for name in judge.labels], np.int64)
        return Seen(made.features, ours[made.classes])
    return Seen(made.features, nearest_classes(made.features, real))
