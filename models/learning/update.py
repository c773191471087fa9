"""One update of the weights: losses, gradients of several batches, clipping, optimizer."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.errors import PixelmillError
from models.learning.loading import Batch
from models.learning.recipe import Recipe

_NAMED = 5  # images that the message names


class NonFiniteLoss(PixelmillError):
    """The loss or its gradient became infinite or NaN; `images` are the URIs of what was being learned."""

    def __init__(self, epoch: int, step: int, what: str, images: Sequence[str]):
        more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
        super().__init__(
            f"epoch {epoch}, step {step}: {what} is not finite for the images {', '.join(images[:_NAMED])}{more}; "
            "try a lower --lr, --clip-norm 1 or --precision fp32, and look at these images and their labels"
        )
        self.epoch, self.step, self.images = epoch, step, tuple(images)


class Losses(nn.Module):
    """A learner's losses as a module, so that torch can share its gradients between processes."""

    def __init__(self, network: nn.Module, losses: Callable[[Tensor, Any], dict[str, Tensor]]):
        super().__init__()
        self.network = network
        self._losses = losses

    def forward(self, inputs: Tensor, targets: Any) -> dict[str, Tensor]:
        """Losses by name."""
        return self._losses(inputs, targets)


class Updater:
    """Makes updates with one optimizer. Every group of it has `factor`, its share of the rate."""

    def __init__(
        self,
        losses: Losses,
        groups: Sequence[dict[str, Any]],
        recipe: Recipe,
        device: torch.device,
        cast: Callable[[], AbstractContextManager],
        names: Sequence[str],
    ):
        self._losses, self._recipe, self._device, self._cast, self._names = losses, recipe, device, cast, names
        self._shared: DistributedDataParallel | None = None
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups)
        else:
            self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")

    @property
    def is_shared(self) -> bool:
        """Whether gradients are averaged over processes."""
        return self._shared is not None

    def share(self) -> None:
        """Averages gradients over processes from now on; to be called again when other parameters learn."""
        self._shared = DistributedDataParallel(
            self._losses, device_ids=[self._device] if self._device.type == "cuda" else None
        )

    def update(self, batches: Sequence[Batch], rate: float, epoch: int, step: int) -> dict[str, float]:
        """Learns from the batches together, and returns the mean of each loss over their images.

        Raises NonFiniteLoss, and then the weights are of no use. `epoch` and `step` are for its message.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        images = sum(len(batch.indices) for batch in batches)
        means: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            share = len(batch.indices) / images
            with self._unsynchronised(last=number == len(batches)):
                with self._cast():
                    losses = (self._shared or self._losses)(batch.inputs, batch.targets)
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
                self.scaler.scale(total * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, torch.zeros((), device=self._device)) + loss.detach().float() * share
        self.scaler.unscale_(self.optimizer)
        learning = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self._recipe.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(learning, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        values = torch.stack([*means.values(), norm])
        if self._shared is not None:
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        *found, gradient = values.tolist()
        named = dict(zip(means, found, strict=True))
        wrong = [name for name, value in named.items() if not _finite(value)]
        # Scaled fp16 gradients overflow now and then; the scaler leaves these updates out.
        if not wrong and not _finite(gradient) and not self.scaler.is_enabled():
            wrong = ["gradient"]
        if wrong:
            raise NonFiniteLoss(epoch, step, wrong[0], [self._names[i] for batch in batches for i in batch.indices])
        return named

    def state_dict(self) -> dict[str, Any]:
        """See models.learning.learner.Updates."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See models.learning.learner.Updates."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _unsynchronised(self, last: bool) -> AbstractContextManager:
        return contextlib.nullcontext() if self._shared is None or last else self._shared.no_sync()


def _finite(value: float) -> bool:
    return value - value == 0
