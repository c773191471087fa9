"""The exponential moving average of a network's weights (Polyak averaging), which often validates better than they."""

import torch
from torch import Tensor

from models.learning.state import State


class AveragedWeights:
    """Averages the tensors of a state, statistics of BatchNorm included; whole numbers are copied.

    Early on the decay is smaller, (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten.
    """

    def __init__(self, state: State, decay: float):
        self.decay = decay
        self.updates = 0
        self.average: State = {name: value.detach().clone() for name, value in state.items()}

    @torch.no_grad()
    def update(self, state: State) -> None:
        """Takes the weights after one update."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own: list[Tensor] = []
        new: list[Tensor] = []
        for name, value in state.items():
            if value.is_floating_point():
                own.append(self.average[name])
                new.append(value.detach())
            else:
                self.average[name].copy_(value)
        torch._foreach_lerp_(own, new, 1 - decay)
