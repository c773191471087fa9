"""Networks without weights, for trying things out: random, but the same in every run, and awake."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn


def build_untrained(build: "Callable[[], nn.Module]", seed: int = 0) -> "nn.Module":
    """What `build` gives when torch's random numbers start at `seed`; leaves torch's own state as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def measure_batch_norms(network: "nn.Module", forward: "Callable[[Tensor], object]", images: NDArray[np.uint8]) -> None:
    """Sets the statistics of every BatchNorm to those that `forward` meets on `images` [n, height, width, 3].

    As they are initialised, the signal fades from layer to layer, until every image gets the same answer.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average over the images
        norm.train()
    with torch.no_grad():
        forward(torch.from_numpy(images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
