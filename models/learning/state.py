"""The state of a network as tensors by name, or of those of its modules that learn."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def state_of(network: nn.Module, modules: Sequence[str] | None = None) -> State:
    """The network's own tensors, not copies: of all modules, or of those of these names and what is in them."""
    state = network.state_dict()
    if modules is None:
        return dict(state)
    prefixes = tuple(f"{name}." for name in modules)
    return {name: value for name, value in state.items() if name.startswith(prefixes)}


def copied(state: State, device: str | torch.device | None = None) -> State:
    """The same values in memory of their own."""
    return {
        name: value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


@torch.no_grad()
def load_state(network: nn.Module, state: State) -> None:
    """Writes the values into the network's own tensors."""
    own = network.state_dict()
    for name, value in state.items():
        own[name].copy_(value)
