"""How good made images are: distances between two samples of features, and what is shared by the two.

A judge (models.learning.judging) turns images into features; everything here is about two samples of them, the real
one X [n, d] and the made one Y [m, d]. Figures compare only where judge and numbers of images are the same.

frechet    Heusel et al., arXiv 1706.08500, equation 6: both samples are taken for normal distributions, between which
           the Fréchet distance is |μ_x - μ_y|² + tr(C_x + C_y - 2 (C_x C_y)^½). Biased upwards with few images.
kid        Bińkowski et al., arXiv 1801.01401: the squared maximum mean discrepancy by the kernel (x·y/d + 1)³,
           unbiased, so that it may fall below 0.
precision  Kynkäänniemi et al., arXiv 1904.06991: the share of made images on the manifold of the real ones, which is
recall     all that is nearer to a real image than that one's third neighbour; recall: the same the other way round.
coverage   Naeem et al., arXiv 2002.09797: the share of real images that have a made one nearer than their fifth
           neighbour among the real ones.
diversity  the mean distance of two made images, by that of two real ones: 0 where all are the same image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]  # [images, d]

ENOUGH_IMAGES = 100  # with fewer, every figure is mostly noise
UNKNOWN = -1

_MANIFOLD_NEIGHBOUR, _COVERAGE_NEIGHBOUR = 3, 5
# A class counts as covered where it is among the made images at least so often, by how often it is among the real ones.
_COVERED = 0.1


@dataclass(frozen=True)
class Seen:
    """A sample of images as a judge sees it."""

    features: Features
    classes: NDArray[np.int64]  # [images]; UNKNOWN where nobody knows


def compare(real: Seen, made: Seen, asked: NDArray[np.int64] | None = None) -> dict[str, float]:
    """The figures by name; of classes only where they are known. `asked`: the class that each made image was to be.

    Needs two images of each. Features that are not finite make all figures infinite, but those that are best high 0.
    """
    known = (real.classes != UNKNOWN).any() and (made.classes != UNKNOWN).any()
    of_classes: dict[str, float] = {}
    if known:
        of_classes["class_coverage"] = class_coverage(real.classes, made.classes)
        if asked is not None:
            of_classes["accuracy"] = float((made.classes == asked).mean())
    if not np.isfinite(made.features).all():
        return {"frechet": np.inf, "kid": np.inf} | dict.fromkeys(
            ("precision", "recall", "coverage", "diversity", *of_classes), 0.0
        )
    spread = mean_distance(real.features)
    return {
        "frechet": frechet_distance(real.features, made.features),
        "kid": kernel_distance(real.features, made.features),
        "precision": within(made.features, real.features),
        "recall": within(real.features, made.features),
        "coverage": coverage(real.features, made.features),
        "diversity": mean_distance(made.features) / spread if spread else 0.0,
    } | of_classes


def frechet_distance(x: Features, y: Features) -> float:
    """Between the normal distributions with the means and covariances of two samples of at least two rows.

    With A and B the centred samples, divided by the roots of n - 1 and m - 1, the covariances are AᵀA and BᵀB. The
    eigenvalues of their product but the zeros are those of (ABᵀ)(ABᵀ)ᵀ, so that the trace of its root is the sum of the
    singular values of ABᵀ: no root of a matrix, and nothing to go wrong where there are fewer images than features.
    """
    a, b = (_factor(sample) for sample in (x, y))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    apart = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return max(0.0, float(apart + np.square(a).sum() + np.square(b).sum() - 2 * shared))


def _factor(sample: Features) -> Features:
    """A matrix of at most d rows whose AᵀA is the covariance."""
    centred = (sample - sample.mean(axis=0)) / np.sqrt(len(sample) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(sample) > sample.shape[1] else centred


def kernel_distance(x: Features, y: Features) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy; equation 4 of the paper."""

    def kernel(left: Features, right: Features) -> Features:
        return (left @ right.T / left.shape[1] + 1) ** 3

    def among(sample: Features) -> float:
        values, count = kernel(sample, sample), len(sample)
        return float((values.sum() - np.trace(values)) / (count * (count - 1)))

    return among(x) + among(y) - 2 * float(kernel(x, y).mean())


def within(points: Features, sample: Features) -> float:
    """The share of points on the manifold of a sample; see precision and recall above."""
    radii = _neighbour_distances(sample, _MANIFOLD_NEIGHBOUR)  # [sample]
    return float((_distances(points, sample) <= radii).any(axis=1).mean())


def coverage(real: Features, made: Features) -> float:
    """The share of real images near which something was made; see above."""
    radii = _neighbour_distances(real, _COVERAGE_NEIGHBOUR)  # [real]
    return float((_distances(real, made).min(axis=1) <= radii).mean())


def mean_distance(sample: Features) -> float:
    """Of two different members of a sample."""
    count = len(sample)
    return float(_distances(sample, sample).sum() / (count * (count - 1)))


def class_coverage(real: NDArray[np.int64], made: NDArray[np.int64]) -> float:
    """The share of the real images' classes that are not missing, or nearly so, among the made ones."""
    classes, counts = np.unique(real[real != UNKNOWN], return_counts=True)
    if not len(classes):
        return 0.0
    shares = counts / len(real)
    return float(np.mean([(made == c).mean() >= _COVERED * share for c, share in zip(classes, shares, strict=True)]))


def nearest_classes(features: Features, real: Seen) -> NDArray[np.int64]:
    """Of each image the class of the real image that is most like it: a recogniser where there is no classifier."""
    if not np.isfinite(features).all():
        return np.full(len(features), UNKNOWN, np.int64)
    return real.classes[_distances(features, real.features).argmin(axis=1)]


def halves(real: Features, seed: int = 0) -> float:
    """The Fréchet distance between two random halves of the real images: what a perfect generator would still have."""
    order = np.random.default_rng(seed).permutation(len(real))
    middle = len(order) // 2
    if middle < 2:
        return float("nan")
    return frechet_distance(real[order[:middle]], real[order[middle:]])


def per_class(metrics: Mapping[str, Any]) -> dict[str, float]:
    """See models.learning.metrics: how many of the images of each class are recognised as it."""
    return {name: figures["accuracy"] for name, figures in metrics.get("per_class", {}).items()}


def class_rows(
    made: NDArray[np.int64], asked: NDArray[np.int64], labels: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """By class: how many images were made of it, and which share is recognised as it."""
    rows: dict[str, dict[str, float | int]] = {}
    for number, name in enumerate(labels):
        of_class = asked == number
        if of_class.any():
            rows[name] = {"images": int(of_class.sum()), "accuracy": float((made[of_class] == number).mean())}
    return rows


def _distances(x: Features, y: Features) -> Features:
    """Euclidean [rows of x, rows of y]."""
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    distances = np.sqrt(np.maximum(squares, 0))
    if x is y:
        np.fill_diagonal(distances, 0)  # rounding makes it something
    return distances


def _neighbour_distances(sample: Features, neighbour: int) -> Features:
    """How far the so-manieth neighbour of each member is, or its farthest where there are fewer."""
    distances = np.sort(_distances(sample, sample), axis=1)  # the first is the member itself
    return distances[:, min(neighbour, len(sample) - 1)]
