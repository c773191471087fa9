"""How translators learn from two sets of images that do not belong together: CycleGAN's losses, and who learns when.

models.nets.cyclegan says what the losses are. In each step first both generators learn, by what the discriminators say
of their images and by the cycles; then both discriminators do, by real images and by made ones. What one side learns
from must not move the other: the discriminators' weights have no gradients while the generators learn, and the made
images are cut off from who made them before the discriminators see them.

The discriminators are not shown what was made last, but images out of a buffer of those made lately (section 4 of the
paper, after Shrivastava et al., arXiv 1612.07828): so a generator cannot win by going round in circles.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from models.card import Card
from models.imaging.geometry import ResizeRule
from models.learning.augment import Augmentation, Unvaried, Variation, Varied
from models.learning.generative_metrics import compare
from models.learning.judging import Judge, PixelJudge
from models.learning.loading import Batch
from models.learning.recipe import Recipe
from models.learning.update import NonFiniteLoss
from models.nets import cyclegan
from models.nets.parts import Parts
from models.settings.train import Augment

BUFFER = 50  # images of each kind, as in the paper
SHOWN = 8  # images in each row of a grid
_JUDGED = 2048  # validation images of each kind that a judge looks at, at most
# Adam remembers gradients for a shorter time than usual: what the other side does changes (section 7.1: .5).
_BETAS = (0.5, 0.999)
_COLLAPSED = 0.1  # diversity: nearly the same image for all

# Images keep their colours, which are what is translated; light is the paper's own.
_VARIATIONS: dict[Augment, Variation] = {
    "light": Variation(enlarge=1.0, min_area=0.77, max_stretch=1.0, colour=0.0, operations=0, erase=0.0),
    "strong": Variation(enlarge=1.25, min_area=0.4, max_stretch=1.15, colour=0.0, operations=0, erase=0.0),
}


def targets(images: pa.Table, annotations: pa.Table, classes: Sequence[str]) -> list[None]:
    """Nothing, for each row of `images`: what stands beside an image is chance."""
    return [None] * images.num_rows


def augmentation(name: Augment, rule: ResizeRule, flip: bool = True) -> Augmentation:
    """A part of the image, perhaps mirrored. light: 7/8 of its sides, as the paper does."""
    return Unvaried(rule) if name == "none" else Varied(rule, _VARIATIONS[name], flip)


def learner(
    network: nn.Module, parts: Parts, card: Card, recipe: Recipe, judge: Judge | None = None
) -> "TranslationLearner":
    """See models.learning.learner."""
    return TranslationLearner(network, parts, recipe, judge or PixelJudge())


class Translated(NamedTuple):
    """Images of A [batch, 3, height, width], -1 to 1, what they became in B, and what became of that in A again."""

    images: Tensor
    made: Tensor
    back: Tensor


class TranslationLearner:
    """An AlternatingLearner. Targets are the images of B that stand beside those of A, both uint8."""

    # A generator that changes nothing has the best of all cycles: what decides is how much like B its images are.
    main_metric = "frechet"
    lower_is_better = True
    averaged = cyclegan.GENERATORS

    def __init__(self, network: nn.Module, parts: Parts, recipe: Recipe, judge: Judge):
        assert isinstance(network, cyclegan.CycleGan)
        self.network: nn.Module = network
        self.pair = network
        self.parts = parts
        self.judge = judge
        self.cycle_weight, self.identity_weight = recipe.cycle_weight, recipe.identity_weight
        self._normalise = cyclegan.normaliser()
        self._shown: Tensor | None = None  # images of A of the validation split

    def updater(
        self, recipe: Recipe, device: torch.device, cast: Callable[[], AbstractContextManager], names: Sequence[str]
    ) -> "TranslationUpdates":
        """See AlternatingLearner."""
        return TranslationUpdates(self, recipe, device, cast, names)

    def collate(self, targets: Sequence[Tensor]) -> Tensor:
        """uint8 [batch, height, width, 3]"""
        return torch.stack(list(targets)).contiguous()

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Not called: see AlternatingLearner."""
        raise NotImplementedError("generators and discriminators have losses of their own")

    def outputs(self, images: Tensor) -> Translated:
        """What becomes of images of A."""
        return self.translated(images, self.pair.a_to_b, self.pair.b_to_a)

    def translated(self, images: Tensor, there: nn.Module, back: nn.Module) -> Translated:
        """images uint8 [batch, height, width, 3]"""
        prepared = self.prepared(images)
        made = there(prepared)
        return Translated(prepared, made, back(made))

    def prepared(self, images: Tensor) -> Tensor:
        """uint8 [batch, height, width, 3] → [batch, 3, height, width], -1 to 1."""
        return self._normalise.to(images.device)(images)

    def scores(self) -> "TranslationScores":
        """How far cycles and identities are off, and how much like B what is made of A looks to the judge."""
        return TranslationScores(self)

    def keep(self, images: Tensor) -> None:
        """Notes the first images of A of the validation split, for `samples`."""
        if self._shown is None:  # where there are fewer, some are shown again: a row of a grid is always full
            self._shown = images[torch.arange(SHOWN) % len(images)]

    def samples(self) -> NDArray[np.uint8]:
        """Rows of A, B(A) and A(B(A)): [24, height, width, 3]."""
        assert self._shown is not None  # a validation comes first
        rows = self.outputs(self._shown)
        return torch.cat([cyclegan.levels(row.float()) for row in rows]).cpu().numpy()

    def watch(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """What is to be said of the last epoch."""
        diversity = history[-1].get("val_diversity")
        if diversity is not None and diversity < _COLLAPSED:
            return "collapse: nearly the same image is made of every one; try a lower --lr or a higher --cycle-weight"
        return None


class TranslationScores:
    """Adds up over pairs of a validation split. Errors are of values from 0 to 1."""

    def __init__(self, learner: TranslationLearner):
        self._learner = learner
        self._count = 0
        self._sums = dict.fromkeys(("cycle_l1_a", "cycle_l1_b", "identity_l1"), 0.0)
        self._made: list[NDArray[np.uint8]] = []
        self._real: list[NDArray[np.uint8]] = []

    def update(self, outputs: Translated, targets: Tensor) -> None:
        """outputs: of images of A; targets: images of B, uint8 [batch, height, width, 3]"""
        learner, pair = self._learner, self._learner.pair
        of_b = learner.translated(targets, pair.b_to_a, pair.a_to_b)
        same_b, same_a = pair.a_to_b(of_b.images), pair.b_to_a(outputs.images)
        count = len(targets)
        for name, one, other in (
            ("cycle_l1_a", outputs.back, outputs.images),
            ("cycle_l1_b", of_b.back, of_b.images),
            ("identity_l1", torch.cat([same_a, same_b]), torch.cat([outputs.images, of_b.images])),
        ):
            self._sums[name] += float(l1_loss(one.float(), other)) / 2 * count  # levels are from -1 to 1
        learner.keep(cyclegan.levels(outputs.images))
        if self._count < _JUDGED:
            self._made.append(cyclegan.levels(outputs.made.float()).cpu().numpy())
            self._real.append(targets.cpu().numpy())
        self._count += count

    def compute(self) -> dict[str, float]:
        """frechet, kid, precision, recall, coverage and diversity of what is made of A against B, as the judge sees it
        (models.learning.generative_metrics); cycle_l1 of both directions and of each; identity_l1."""
        means = {name: total / self._count for name, total in self._sums.items()}
        means["cycle_l1"] = (means["cycle_l1_a"] + means["cycle_l1_b"]) / 2
        judge, made, real = self._learner.judge, np.concatenate(self._made), np.concatenate(self._real)
        device = next(self._learner.network.parameters()).device
        seen = judge.look(real, device), judge.look(made, device)
        if len(made) < 2:  # one image has no spread: what is left of the distance is that of the means
            return {"frechet": float(np.square(seen[0].features - seen[1].features).sum())} | means
        return compare(*seen) | means


class ImageBuffer:
    """Images made lately [3, height, width]: half of those that are asked for are older ones."""

    def __init__(self, size: int = BUFFER):
        self.size = size
        self.images: list[Tensor] = []

    def exchanged(self, images: Tensor) -> Tensor:
        """Takes in images [batch, 3, height, width] and gives as many: itself, or an older one whose place it takes.

        What is drawn is drawn from torch's generator for the CPU.
        """
        given = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
                given.append(image)
            elif torch.rand(()) < 0.5:
                place = int(torch.randint(self.size, ()))
                given.append(self.images[place])
                self.images[place] = image.clone()
            else:
                given.append(image)
        return torch.stack(given)


class TranslationUpdates:
    """Updates of models.learning.learner: generators first, then discriminators."""

    def __init__(
        self,
        learner: TranslationLearner,
        recipe: Recipe,
        device: torch.device,
        cast: Callable[[], AbstractContextManager],
        names: Sequence[str],
    ):
        self._learner, self._recipe, self._device, self._cast, self._names = learner, recipe, device, cast, names
        network = learner.network
        self._generators = [network.get_submodule(name) for name in cyclegan.GENERATORS]
        self._discriminators = [network.get_submodule(name) for name in cyclegan.DISCRIMINATORS]
        self.optimizers = [
            torch.optim.Adam(
                [p for module in modules for p in module.parameters()],
                betas=_BETAS,
            )
            for modules in (self._generators, self._discriminators)
        ]
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.buffers = {"a": ImageBuffer(BUFFER), "b": ImageBuffer(BUFFER)}

    def update(self, batches: Sequence[Batch], rate: float, epoch: int, step: int) -> dict[str, float]:
        """See models.learning.learner.Updates."""
        images = sum(len(batch.indices) for batch in batches)
        means: dict[str, Tensor] = {}
        made: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # real and made images of A, and of B

        def add(losses: dict[str, Tensor], share: float) -> None:
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            self.scaler.scale(total * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, torch.zeros((), device=self._device)) + loss.detach().float() * share

        by_generators, by_discriminators = self.optimizers
        self._learning(self._generators, self._discriminators)
        for batch in batches:
            with self._cast():
                losses, both = self.generator_losses(batch.inputs, batch.targets)
            made.append(both)
            add(losses, len(batch.indices) / images)
        norms = [self._step(by_generators, rate)]
        self._learning(self._discriminators, self._generators)
        for batch, both in zip(batches, made, strict=True):
            with self._cast():
                losses = self.discriminator_losses(*both)
            add(losses, len(batch.indices) / images)
        norms.append(self._step(by_discriminators, rate))
        self.scaler.update()
        for module in (*self._generators, *self._discriminators):
            module.requires_grad_(True)

        values = torch.stack([*means.values(), *norms]).tolist()
        named, norms_found = dict(zip(means, values, strict=False)), values[len(means) :]
        wrong = [name for name, value in named.items() if not math.isfinite(value)]
        # Scaled fp16 gradients overflow now and then; the scaler leaves these updates out.
        if not wrong and not self.scaler.is_enabled() and not all(map(math.isfinite, norms_found)):
            wrong = ["gradient"]
        if wrong:
            raise NonFiniteLoss(epoch, step, wrong[0], [self._names[i] for batch in batches for i in batch.indices])
        return named

    def generator_losses(
        self, images_a: Tensor, images_b: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of images uint8 [batch, height, width, 3]; and the real and made images of A, and of B, without gradients."""
        learner, (a_to_b, b_to_a) = self._learner, self._generators
        judge_a, judge_b = self._discriminators
        a, b = learner.prepared(images_a), learner.prepared(images_b)  # [batch, 3, height, width]
        if learner.identity_weight:
            # Each image is normalised by itself, so that one call for both kinds gives what two would.
            made_b, same_b = a_to_b(torch.cat([a, b])).chunk(2)
            made_a, same_a = b_to_a(torch.cat([b, a])).chunk(2)
        else:
            made_b, made_a = a_to_b(a), b_to_a(b)
        judged_a, judged_b = judge_a(made_a).float(), judge_b(made_b).float()
        losses = {
            "adversarial": _against(judged_b, 1.0) + _against(judged_a, 1.0),
            "cycle": learner.cycle_weight * (_distance(b_to_a(made_b), a) + _distance(a_to_b(made_a), b)),
        }
        if learner.identity_weight:
            losses["identity"] = learner.identity_weight * (_distance(same_a, a) + _distance(same_b, b))
        return losses, (a, made_a.detach().float(), b, made_b.detach().float())

    def discriminator_losses(self, a: Tensor, made_a: Tensor, b: Tensor, made_b: Tensor) -> dict[str, Tensor]:
        """Of real and made images [batch, 3, height, width]; of the made ones their likes out of the buffer."""
        total = torch.zeros((), device=a.device)
        for judge, buffer, real, made in zip(
            self._discriminators, self.buffers.values(), (a, b), (made_a, made_b), strict=True
        ):
            judged = judge(torch.cat([real, buffer.exchanged(made)])).float()
            of_real, of_made = judged.chunk(2)
            total = total + (_against(of_real, 1.0) + _against(of_made, 0.0)) / 2
        return {"discriminators": total}

    def state_dict(self) -> dict[str, Any]:
        """See models.learning.learner.Updates: the optimizers, the scaler, and the images in the buffers."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "buffers": {name: list(buffer.images) for name, buffer in self.buffers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See models.learning.learner.Updates."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        for name, buffer in self.buffers.items():
            buffer.images = [image.to(self._device) for image in state["buffers"][name]]

    def _learning(self, these: Sequence[nn.Module], others: Sequence[nn.Module]) -> None:
        """Lets some modules have gradients, and the others none."""
        for modules, learn in ((these, True), (others, False)):
            for module in modules:
                module.requires_grad_(learn)

    def _step(self, optimizer: torch.optim.Optimizer, rate: float) -> Tensor:
        """One step by the gradients that are there; they are gone afterwards. Returns their norm."""
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(optimizer)
        learning = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(learning, self._recipe.clip_norm or float("inf"))
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return norm


def _against(judged: Tensor, wanted: float) -> Tensor:
    """The mean square of what judgements [batch, 1, rows, columns] lack of what is wanted."""
    return mse_loss(judged, torch.full_like(judged, wanted))


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return l1_loss(one.float(), other)
