"""The learning rate over the steps of a training."""

import math


def rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak rate at step `step` (from 0) of `steps`: a linear rise, then half a cosine down to 0.

    The rise takes at most half of the steps, so that a short training comes to rest too. The fall is equation 5 of SGDR
    (Loshchilov & Hutter 2017) without restarts.
    """
    warmup_steps = min(warmup_steps, steps // 2)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
