"""How generators learn: two networks in turn, a judge after each epoch, and a watch for the collapse.

An update is one step of the discriminator and, each `critic_steps`-th time, one of the generator. With s_x and s_z the
discriminator's logits for real and made images, they minimise

non-saturating  (Goodfellow et al., arXiv 1406.2661)   D: softplus(-s_x) + softplus(s_z)    G: softplus(-s_z)
Wasserstein     (Arjovsky et al., arXiv 1701.07875)    D: s_z - s_x                         G: -s_z

and a Wasserstein critic also the gradient penalty (models.nets.gan), or else its weights are clipped. Two time scales
(TTUR; Heusel et al., arXiv 1706.08500): the discriminator may learn at a rate of its own, so that neither runs away
from the other. Both use Adam with a first moment of .5 or 0: what the other network has learned meanwhile makes
momentum harmful. The generator that is kept is an average over the updates, as the last one alone is a matter of luck.

No loss says how good the images are. After each epoch the judge compares made images with those of the validation
split, and the epoch with the smallest Fréchet distance is kept. A generator collapses when it finds an image that
passes for real, and makes nothing else; then the images' distances to each other, and the classes that are among them,
fall away.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.card import Card
from models.errors import UsageError
from models.imaging.geometry import ResizeRule
from models.learning.augment import Unvaried
from models.learning.differentiable_augment import vary
from models.learning.generative_metrics import ENOUGH_IMAGES, UNKNOWN, Seen, compare
from models.learning.judging import Judge, PixelJudge, recognised
from models.learning.loading import Batch
from models.learning.recipe import Recipe
from models.learning.update import NonFiniteLoss
from models.nets.gan import Adversaries, from_uint8, to_uint8
from models.nets.parts import Parts
from models.settings.train import Augment

logger = logging.getLogger("pixelmill.train")

__all__ = ["augmentation", "learner", "targets"]

_JUDGED = 128, 512  # images that are made for the judge after each epoch: as many as are real, at least and at most
_BATCH = 128  # of images that are only made
_SHOWN, _COLUMNS = 64, 8  # images of a grid, and those in one row of it

# Below these shares of what the real images have, the made ones are taken for collapsed.
_LEAST_DIVERSITY, _LEAST_CLASSES = 0.4, 0.5


@dataclass(frozen=True)
class Method:
    """How one architecture learns, as its paper has it."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # loss, of the logits of real and of made images
    generator: Callable[[Tensor], Tensor]  # loss, of the logits of made images
    betas: tuple[float, float]
    is_critic: bool = False  # its slope is to be bounded by a penalty or by clipping


_NON_SATURATING = Method(
    lambda real, made: (softplus(-real) + softplus(made)).mean(),
    lambda made: softplus(-made).mean(),
    betas=(0.5, 0.999),
)
_WASSERSTEIN = Method(
    lambda real, made: (made - real).mean(),
    lambda made: -made.mean(),
    betas=(0.0, 0.9),
    is_critic=True,
)
METHODS: dict[str, Method] = {
    "dcgan": _NON_SATURATING,
    "wgan_gp": _WASSERSTEIN,
    "conditional_gan": _NON_SATURATING,
}


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str]) -> list[int]:
    """The index of each image's class by row of `images`; UNKNOWN where there are no classes to be told."""
    index = {name: number for number, name in enumerate(classes)}
    found = []
    for image, label in zip(images["image"].to_pylist(), images["label"].to_pylist(), strict=True):
        if classes and label not in index:
            wrong = "no label" if label is None else f"the label {label!r}, which is not among the classes"
            raise UsageError(
                f"a conditional generator learns from images with one label each, but {image} has {wrong}: "
                "ingest a folder with one folder of images per class"
            )
        found.append(index.get(label, UNKNOWN))
    return found


def augmentation(name: Augment, rule: ResizeRule, flip: bool = True) -> Unvaried:
    """None: what the generator is shown it learns to make, mirrored letters too. See differentiable_augment."""
    return Unvaried(rule)


def learner(
    network: nn.Module, parts: Parts, card: Card, recipe: Recipe, judge: Judge | None = None
) -> "AdversarialLearner":
    """See models.learning.learner; without a judge the pixels are compared."""
    return AdversarialLearner(network, parts, card, recipe, judge or PixelJudge())


class AdversarialLearner:
    """An AlternatingLearner. Outputs are the real images themselves, targets int64 [batch]: classes, or UNKNOWN."""

    main_metric = "frechet"
    lower_is_better = True
    averaged = ("generator",)

    def __init__(self, network: nn.Module, parts: Parts, card: Card, recipe: Recipe, judge: Judge):
        assert isinstance(network, Adversaries)
        self.network: nn.Module = network
        self.parts = parts
        self.method = METHODS[card.architecture]
        self.judge = judge
        self._pair = network
        self._classes = len(card.labels)
        self._labels = card.labels
        self._recipe = recipe
        self._real: Seen | None = None  # the validation images, which are always the same

    def collate(self, targets: Sequence[int]) -> Tensor:
        """[batch]"""
        return torch.tensor(targets, dtype=torch.int64)

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Of both networks as they are, for freshly drawn latents; an update takes them one after the other."""
        return {
            "discriminator": self.discriminator_loss(images, targets),
            "generator": self.generator_loss(len(images), targets),
        }

    def discriminator_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The method's, for as many made images of the same classes; without the penalty."""
        labels = self._labels_of(targets)
        with torch.no_grad():
            made = self._pair.generator(self._latents(len(images), images.device), labels)
        return self.method.discriminator(self._judged(from_uint8(images), labels), self._judged(made, labels))

    def generator_loss(self, count: int, targets: Tensor) -> Tensor:
        """The method's, for images of the classes of the targets."""
        labels = self._labels_of(targets)
        return self.method.generator(
            self._judged(self._pair.generator(self._latents(count, targets.device), labels), labels)
        )

    def penalty(self, images: Tensor, targets: Tensor) -> Tensor:
        """How far the critic's slope is from 1 between real and made images: E[(‖∇‖ - 1)²], in fp32."""
        labels = self._labels_of(targets)
        with torch.no_grad():
            made = self._pair.generator(self._latents(len(images), images.device), labels)
        real = vary(from_uint8(images), self._recipe.augment)
        made = vary(made.float(), self._recipe.augment)
        share = torch.rand(len(images), 1, 1, 1, device=images.device)
        between = (share * real + (1 - share) * made).requires_grad_()
        with torch.autocast(images.device.type, enabled=False):
            logits = self._pair.discriminator(between, labels)
        (slope,) = torch.autograd.grad(logits.sum(), between, create_graph=True)  # [batch, 3, height, width]
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()

    def updater(
        self,
        recipe: Recipe,
        device: torch.device,
        cast: Callable[[], AbstractContextManager],
        names: Sequence[str],
    ) -> "AdversarialUpdates":
        """See models.learning.learner.AlternatingLearner."""
        return AdversarialUpdates(self, self._pair, recipe, device, cast, names)

    def outputs(self, images: Tensor) -> Tensor:
        """The images, as the judge is to compare with them."""
        return images

    def scores(self) -> "GenerativeScores":
        """What the judge says."""
        return GenerativeScores(self)

    def samples(self) -> NDArray[np.uint8]:
        """[64, height, width, 3] from latents that are always the same, eight in a row; of classes one in each row."""
        labels = np.arange(_SHOWN) // _COLUMNS % self._classes if self._classes else None
        return self.made(_SHOWN, labels)

    @torch.no_grad()
    def made(self, count: int, labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """Images [count, height, width, 3] of the first latents of the seed."""
        self._pair.eval()
        device = next(self._pair.parameters()).device
        drawn = torch.Generator().manual_seed(self._recipe.seed)
        latents = torch.randn(count, self._pair.latent_size, generator=drawn).to(device)
        asked = None if labels is None else torch.from_numpy(labels).to(device)
        batches = [
            to_uint8(self._pair(latents[at : at + _BATCH], None if asked is None else asked[at : at + _BATCH]))
            for at in range(0, count, _BATCH)
        ]
        return torch.cat(batches).cpu().numpy()

    def compared(self, images: Sequence[NDArray[np.uint8]], targets: NDArray[np.int64]) -> dict[str, float]:
        """The figures of made images beside the validation images; these are looked at only once."""
        device = next(self._pair.parameters()).device
        if self._real is None:
            seen = self.judge.look(np.concatenate(images), device)
            self._real = Seen(seen.features, targets if self._classes else seen.classes)
            if (count := len(targets)) < ENOUGH_IMAGES:
                logger.warning("%d images to compare with are few: all figures of an epoch are mostly noise", count)
        real = self._real
        count = min(max(len(real.features), _JUDGED[0]), _JUDGED[1])
        asked = None
        if self._classes:  # as often as they are among the real ones
            asked = real.classes[np.arange(count) % len(real.classes)]
        made = recognised(self.judge.look(self.made(count, asked), device), self.judge, self._labels, real)
        return compare(real, made, asked)

    def watch(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """See models.learning.learner.Watcher: said when it happens, and once at half time if it never went well."""
        *before, now = (_collapsed(row) for row in history)
        if now is None or (before and before[-1] is not None and not self._is_half_time(len(history))):
            return None
        if any(reason is None for reason in before):
            best = min(history, key=lambda row: row["val_frechet"])
            return f"the generator has collapsed: {now}; of the epochs so far, epoch {best['epoch']} is kept"
        if self._is_half_time(len(history)):
            return f"the generator makes nearly always the same: {now}; try another --seed, --lr or --batch-size"
        return None

    def _is_half_time(self, epochs: int) -> bool:
        return epochs == max(1, self._recipe.epochs // 2)

    def _latents(self, count: int, device: torch.device) -> Tensor:
        return torch.randn(count, self._pair.latent_size, device=device)

    def _judged(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Logits f32 [batch] of images -1…1, varied."""
        return self._pair.discriminator(vary(images, self._recipe.augment), labels).float()

    def _labels_of(self, targets: Tensor) -> Tensor | None:
        return targets if self._classes else None


def _collapsed(row: Mapping[str, Any]) -> str | None:
    """Why an epoch's images are taken for collapsed, if they are."""
    if (diversity := row["val_diversity"]) < _LEAST_DIVERSITY:
        return f"two images differ by {diversity:.0%} of what real ones do"
    if (classes := row.get("val_class_coverage", 1.0)) < _LEAST_CLASSES:
        return f"{classes:.0%} of the classes are among the images"
    return None


class AdversarialUpdates:
    """The Updates of a pair: two optimizers, and how often the discriminator has learned."""

    def __init__(
        self,
        learner: AdversarialLearner,
        pair: Adversaries,
        recipe: Recipe,
        device: torch.device,
        cast: Callable[[], AbstractContextManager],
        names: Sequence[str],
    ):
        self._learner, self._pair, self._recipe, self._cast, self._names = learner, pair, recipe, cast, names
        self._device = device
        self._steps = 0
        # What FreezeD freezes has no gradients now, and never has.
        self._learning = {
            side: [p for p in module.parameters() if p.requires_grad]
            for side, module in (("discriminator", pair.discriminator), ("generator", pair.generator))
        }
        betas = learner.method.betas
        self._optimizers = {side: torch.optim.Adam(learning, betas=betas) for side, learning in self._learning.items()}
        is_fp16 = recipe.precision == "fp16"
        self._scalers = {side: torch.amp.GradScaler(device.type, enabled=is_fp16) for side in self._learning}
        self._factors = {"discriminator": recipe.critic_lr_factor, "generator": 1.0}

    def update(self, batches: Sequence[Batch], rate: float, epoch: int, step: int) -> dict[str, float]:
        """See models.learning.learner.Updates; the generator's loss is only there where it learned."""
        self._steps += 1
        means = self._step("discriminator", batches, rate, self._discriminator_losses)
        if self._recipe.clip_weights and self._learner.method.is_critic:
            with torch.no_grad():
                for parameter in self._learning["discriminator"]:
                    parameter.clamp_(-self._recipe.clip_weights, self._recipe.clip_weights)
        if self._steps % self._recipe.critic_steps == 0:
            with _frozen(self._learning["discriminator"]):
                means |= self._step("generator", batches, rate, self._generator_losses)
        # All at once: a GPU is waited for where its numbers are asked for.
        found: dict[str, float] = dict(zip(means, torch.stack([*means.values()]).tolist(), strict=True))
        for name, value in found.items():
            if not np.isfinite(value):
                images = [self._names[i] for batch in batches for i in batch.indices]
                raise NonFiniteLoss(epoch, step, f"the {name} loss", images)
        return found

    def state_dict(self) -> dict[str, Any]:
        """See models.learning.learner.Updates."""
        return {
            "steps": self._steps,
            "optimizers": {side: optimizer.state_dict() for side, optimizer in self._optimizers.items()},
            "scalers": {side: scaler.state_dict() for side, scaler in self._scalers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See models.learning.learner.Updates."""
        self._steps = state["steps"]
        for side, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][side])
            self._scalers[side].load_state_dict(state["scalers"][side])

    def _discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        with self._cast():
            losses = {"discriminator": self._learner.discriminator_loss(batch.inputs, batch.targets)}
        if self._recipe.penalty and self._learner.method.is_critic:
            losses["penalty"] = self._recipe.penalty * self._learner.penalty(batch.inputs, batch.targets)
        return losses

    def _generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        with self._cast():
            return {"generator": self._learner.generator_loss(len(batch.indices), batch.targets)}

    def _step(
        self, side: str, batches: Sequence[Batch], rate: float, losses_of: Callable[[Batch], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """One step of one optimizer, by the gradients of all batches; the means of its losses."""
        optimizer, scaler = self._optimizers[side], self._scalers[side]
        for group in optimizer.param_groups:
            group["lr"] = rate * self._factors[side]
        optimizer.zero_grad(set_to_none=True)
        images = sum(len(batch.indices) for batch in batches)
        means: dict[str, Tensor] = {}
        for batch in batches:
            share = len(batch.indices) / images
            losses = losses_of(batch)
            scaler.scale(torch.stack([loss.float() for loss in losses.values()]).sum() * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, torch.zeros((), device=self._device)) + loss.detach().float() * share
        scaler.unscale_(optimizer)
        if self._recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._learning[side], self._recipe.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        return means


@contextlib.contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Without gradients meanwhile: the generator learns through the discriminator, which costs less so."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class GenerativeScores:
    """Collects the validation images; of these the learner remembers the features."""

    def __init__(self, learner: AdversarialLearner):
        self._learner = learner
        self._images: list[NDArray[np.uint8]] = []
        self._targets: list[NDArray[np.int64]] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs: real images uint8 [batch, height, width, 3]; targets: [batch]"""
        self._images.append(outputs.cpu().numpy())
        self._targets.append(targets.cpu().numpy())

    def compute(self) -> dict[str, float]:
        """See models.learning.generative_metrics."""
        return self._learner.compared(self._images, np.concatenate(self._targets))
