"""The learning-rate range test: Cyclical Learning Rates for Training Neural Networks, section 3.3 (Smith 2017)."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from models.errors import PixelmillError

LOWEST, HIGHEST = 1e-5, 1.0
STEPS = 100
_DIVERGED = 4.0  # times the lowest running mean of the loss
_WINDOW = 15  # steps; one batch is easier than another


class NoRate(PixelmillError):
    """The loss fell at no rate."""


def sweep(train: Callable[[float], float | None], steps: int = STEPS) -> Iterator[tuple[float, float]]:
    """Trains with rates that grow from LOWEST to HIGHEST by the same factor, until the loss explodes.

    `train` makes one update at a rate and returns the loss, or None where it is not finite. Yields each rate and loss.
    """
    mean: float | None = None
    lowest = math.inf
    for step in range(steps):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1))
        loss = train(rate)
        if loss is None:
            return
        yield rate, loss
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        lowest = min(lowest, mean)
        if mean > _DIVERGED * lowest:
            return


def steepest(tried: Sequence[tuple[float, float]]) -> float:
    """The rate at which the smoothed loss falls fastest, before it is lowest. Raises NoRate where it never falls."""
    half = _WINDOW // 2
    if len(tried) > _WINDOW:
        rates, losses = np.asarray(tried).T
        weights = np.concatenate([np.arange(1, half + 2), np.arange(half, 0, -1)]).astype(float)  # a triangle
        smoothed = np.convolve(np.pad(losses, half, mode="edge"), weights / weights.sum(), "valid")  # [tried]
        lowest = int(smoothed.argmin())
        if lowest >= half:
            return float(rates[np.gradient(smoothed)[: lowest + 1].argmin()])
    raise NoRate("--lr auto found no rate at which the loss falls: give a number, e.g. --lr 0.001")
