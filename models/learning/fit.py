"""The training loop: epochs of updates, a validation after each, the best epoch kept, and a kill at any time survived.

What is learned follows from the recipe and the samples alone. The order of the images and how each is varied are
functions of seed and epoch, so that neither the number of threads nor a restart changes them.
"""

import contextlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.errors import PixelmillError, UsageError
from models.learning import transfer
from models.learning.averaging import AveragedWeights
from models.learning.checkpoint import load_checkpoint, save_checkpoint
from models.learning.distributed import from_first, together
from models.learning.feature_cache import FeatureBatches
from models.learning.learner import (
    AlternatingLearner,
    Finishing,
    HeadLearner,
    Learner,
    Sampler,
    Scheduled,
    Updates,
    Watcher,
    lower_is_better,
)
from models.learning.loading import Batch, ImageBatches, Part
from models.learning.precision import autocast
from models.learning.rates import STEPS, steepest, sweep
from models.learning.recipe import VIEWS, Recipe
from models.learning.samples import Samples, memory_budget
from models.learning.schedule import rate_factor
from models.learning.state import State, copied, load_state, state_of
from models.learning.update import Losses, NonFiniteLoss, Updater
from models.progress import Report, Step, silent
from models.settings.train import Mode

logger = logging.getLogger("pixelmill.train")

Row = dict[str, Any]
OnSamples = Callable[[int, NDArray[np.uint8]], None]  # images [n, height, width, 3]


@dataclass(frozen=True)
class Fitted:
    """What came of a training; the learner's network holds the weights of the best epoch."""

    history: list[Row]  # one row per epoch; see `history.to_arrow`
    best_epoch: int  # counted from 1
    metrics: dict[str, float]  # of the validation split in the best epoch
    lr: float  # the peak rate, given or found
    resumed_after: int  # epochs that an earlier run had finished


@dataclass(frozen=True)
class Place:
    """Where a training runs; nothing in here changes what it gives."""

    devices: Sequence[str] = ("cpu",)  # one process each
    threads: int = 1  # that prepare images
    folder: Path | None = None  # for what a later run goes on from; None: it is not kept
    resume: bool = True
    memory_bytes: int | None = None  # for images or features; None: a quarter of what is free


def fit(
    learner: Learner,
    train: Samples,
    val: Samples,
    recipe: Recipe,
    place: Place = Place(),
    report: Report = silent,
    on_epoch: Callable[[Row], None] = lambda row: None,
    on_samples: OnSamples = lambda epoch, images: None,
) -> Fitted:
    """Trains the learner's network, which has its starting weights, and leaves those of the best epoch in it.

    `on_samples` gets what a Sampler shows after each epoch, counted from 1, before that epoch counts as finished: who
    keeps it has it of every epoch, whenever the training is killed.

    Raises UndecodableImage, NonFiniteLoss, NoRate, UsageError, and what the samples' `read` raises.
    """
    for samples, split in ((train, "train"), (val, "val")):
        if not len(samples):
            raise UsageError(f"the split {split} has no images")
    if recipe.balance and train.groups is None and train.repeats is None:
        raise UsageError("--balance needs images or objects with labels")
    devices = place.devices
    if recipe.mode == "features" and len(devices) > 1:
        devices = devices[:1]  # a head alone is trained in seconds
    if isinstance(learner, AlternatingLearner) and len(devices) > 1:
        logger.info("networks that learn against each other do so on one device: %s", devices[0])
        devices = devices[:1]
    place = replace(place, devices=tuple(devices), threads=max(1, place.threads // len(devices)))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
    return together(place.devices, _fit, (learner, train, val, recipe, place), (report, on_epoch, on_samples))


def _fit(
    device: torch.device,
    part: Part,
    learner: Learner,
    train: Samples,
    val: Samples,
    recipe: Recipe,
    place: Place,
    report: Report = silent,
    on_epoch: Callable[[Row], None] = lambda row: None,
    on_samples: OnSamples = lambda epoch, images: None,
) -> Fitted:
    try:
        with _deterministic(device), contextlib.ExitStack() as stack:
            hearing = report, on_epoch, on_samples
            return _Training(device, part, learner, train, val, recipe, place, *hearing, stack).run()
    except torch.OutOfMemoryError:
        raise PixelmillError(
            f"{device} has too little memory for batches of {recipe.batch_size}: try a smaller --batch-size, "
            "with a larger --accumulate for the same updates, or a smaller --image-size"
        ) from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError("a BatchNorm cannot learn from one image alone: --batch-size must be 2 or more") from None


class _Training:
    """One process of a training."""

    def __init__(
        self,
        device: torch.device,
        part: Part,
        learner: Learner,
        train: Samples,
        val: Samples,
        recipe: Recipe,
        place: Place,
        report: Report,
        on_epoch: Callable[[Row], None],
        on_samples: OnSamples,
        stack: contextlib.ExitStack,
    ):
        self.device, self.part, self.learner, self.recipe, self.place = device, part, learner, recipe, place
        self.report, self.on_epoch, self.on_samples = report, on_epoch, on_samples
        self.sign = -1 if lower_is_better(learner) else 1
        # Images arrive in this order of memory, in which convolutions are faster on CPUs, too.
        self.network = learner.network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Two networks that learn against each other change too fast for BatchNorms that keep old statistics.
        is_whole = isinstance(learner, AlternatingLearner) and recipe.mode == "finetune"
        self.transfer_mode: Mode = "scratch" if is_whole else recipe.mode
        transfer.prepare(self.network, learner.parts, self.transfer_mode)
        if part.ranks > 1 and device.type == "cuda":
            self.network = learner.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)

        budget = memory_budget(0.25 / part.ranks) if place.memory_bytes is None else place.memory_bytes
        share = len(train) / (len(train) + len(val))
        budgets = int(budget * share), int(budget * (1 - share))
        self.train: ImageBatches | FeatureBatches
        self.val: ImageBatches | FeatureBatches
        images = [
            ImageBatches(learner, samples, device, recipe.seed, place.threads, room, recipe.epochs)
            for samples, room in zip((train, val), budgets, strict=True)
        ]
        for batches in images:
            stack.callback(batches.close)
        self.train, self.val = images
        head = learner if recipe.mode == "features" and isinstance(learner, HeadLearner) else None
        if head is not None:
            self.train, self.val = (
                FeatureBatches(
                    head, batches, views, place.folder, room, self._cast, report, f"features of {split} images"
                )
                for batches, views, room, split in zip(
                    images, (VIEWS[recipe.augment], 1), budgets, ("training", "validation"), strict=True
                )
            )

        groups = transfer.parameter_groups(
            self.network, learner.parts, recipe.mode, 1.0, recipe.backbone_lr_factor, recipe.weight_decay
        )
        # A frozen backbone stays as it is, and need not be kept.
        self.kept = learner.parts.head + learner.parts.neck if recipe.mode == "features" else None
        self.groups = [{**group, "factor": group["lr"]} for group in groups]
        self.losses = Losses(self.network, learner.losses if head is None else head.head_losses)
        self.outputs_of = learner.outputs if head is None else head.head_outputs
        self.names = train.names
        self.updater = self._updater()
        self.average = AveragedWeights(self._averaged(), recipe.ema) if recipe.ema else None
        self.lr = 0.0 if recipe.lr == "auto" else recipe.lr
        self.history: list[Row] = []
        self.best: State = {}
        self.best_epoch = self.stale_epochs = self.finished = 0

    def run(self) -> Fitted:
        """All epochs that an earlier run has not finished."""
        resumed_after = self._go_on()
        if not self.lr:
            self.lr = self._find_rate()
        for epoch in range(self.finished, self.recipe.epochs):
            if self._is_over():
                break
            row = self._epoch(epoch)
            row = from_first(self._validated(row) if self.part.rank == 0 else row, self.part)
            self._take(row)
            if self.part.rank == 0:
                self._save()
                self.on_epoch(row)
        if self.part.rank == 0:
            load_state(self.network, self.best)
            self.network.eval()
            if isinstance(self.learner, Finishing):
                self._finish(self.learner)
        metrics = {
            name.removeprefix("val_"): value
            for name, value in self.history[self.best_epoch - 1].items()
            if name.startswith("val_")
        }
        return Fitted(self.history, self.best_epoch, metrics, self.lr, resumed_after)

    def _finish(self, learner: Finishing) -> None:
        """Shows a learner images from all over the training split, varied as they were in training."""
        assert isinstance(self.train, ImageBatches)
        count = min(len(self.names), learner.num_finishing)
        chosen = np.linspace(0, len(self.names) - 1, count).astype(np.int64)
        size = self.recipe.batch_size
        batches = [chosen[start : start + size] for start in range(0, count, size)]
        with torch.no_grad(), self._cast():
            learner.finish(batch.inputs for batch in self.train.view(0, batches))

    def _epoch(self, epoch: int) -> Row:
        """One pass over the training images."""
        recipe, part = self.recipe, self.part
        parts, unfreeze_epochs = self.learner.parts, recipe.unfreeze_epochs
        changed = transfer.set_trainable(self.network, parts, self.transfer_mode, epoch, unfreeze_epochs)
        self.network.train()
        if part.ranks > 1 and (changed or not self._single.is_shared):
            self._single.share()
        torch.manual_seed(_mixed(recipe.seed, epoch, part.rank))  # dropout, and what else the network draws
        per_epoch = self._updates_per_epoch()
        steps, warmup = per_epoch * recipe.epochs, round(per_epoch * recipe.warmup_epochs)
        began = time.perf_counter()
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}  # images by loss: of networks that alternate not each learns in every update
        images, rate = 0, 0.0
        stage = f"epoch {epoch + 1} of {recipe.epochs}"
        self.report(Step(stage, 0, per_epoch, self._told(None)))
        for step, batches in enumerate(self._updates(epoch)):
            rate = self.lr * rate_factor(epoch * per_epoch + step, steps, warmup)
            if isinstance(self.learner, Scheduled):
                self.learner.at((epoch * per_epoch + step) / steps)
            losses = self.updater.update(batches, rate, epoch + 1, step + 1)
            if self.average is not None:
                self.average.update(self._averaged())
            size = sum(len(batch.indices) for batch in batches)
            images += size
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value * size
                counts[name] = counts.get(name, 0) + size
            means = {name: value / counts[name] for name, value in sums.items()}
            self.report(Step(stage, step + 1, per_epoch, self._told(means)))
        seconds = time.perf_counter() - began
        row: Row = {"epoch": epoch + 1, "lr": rate}
        if not isinstance(self.learner, AlternatingLearner):
            row["train_loss"] = sum(means.values())
        row |= {f"train_{name}": value for name, value in means.items()} if len(means) > 1 else {}
        return row | {"seconds": seconds, "images_per_second": images * part.ranks / seconds}

    def _validated(self, row: Row) -> Row:
        """The row with the metrics of the validation split, by the weights that would be kept."""
        with self._with_average():
            metrics = self._scores()
            if isinstance(self.learner, Sampler):
                with torch.no_grad():
                    self.on_samples(row["epoch"], self.learner.samples())
        return row | {f"val_{name}": value for name, value in metrics.items()}

    def _scores(self) -> dict[str, float]:
        self.network.eval()
        scores = self.learner.scores()
        with torch.no_grad():
            for batch in self.val.plain(self.recipe.batch_size):
                with self._cast():
                    outputs = self.outputs_of(batch.inputs)
                scores.update(outputs, batch.targets)
        return scores.compute()

    def _take(self, row: Row) -> None:
        """Notes a finished epoch, and keeps its weights if they are the best: of equally good ones the last."""
        main = f"val_{self.learner.main_metric}"
        best = self.sign * self.history[self.best_epoch - 1][main] if self.best_epoch else -math.inf
        value = self.sign * row[main]
        self.history.append(row)
        self.finished = row["epoch"]
        if not self.best_epoch or value >= best or math.isnan(best):
            self.best_epoch = self.finished
            if self.part.rank == 0:
                averaged = {} if self.average is None else self.average.average
                self.best = copied(self._state() | averaged, "cpu")
        improved = value > best or self.finished == 1
        self.stale_epochs = 0 if improved else self.stale_epochs + 1
        if self.part.rank == 0 and isinstance(self.learner, Watcher) and (said := self.learner.watch(self.history)):
            logger.warning("epoch %d: %s", self.finished, said)

    def _is_over(self) -> bool:
        return bool(self.recipe.patience) and self.stale_epochs >= self.recipe.patience

    def _go_on(self) -> int:
        """Takes up what an earlier run has saved; returns how many epochs it had finished."""
        saved = load_checkpoint(self.place.folder) if self.place.folder is not None and self.place.resume else None
        if saved is None:
            return 0
        load_state(self.network, saved["state"])
        self.updater.load_state_dict(saved["updater"])
        if self.average is not None:
            self.average.updates = saved["averaged_updates"]
            for name, value in saved["average"].items():
                self.average.average[name].copy_(value)
        self.lr, self.history, self.best = saved["lr"], saved["history"], saved["best"]
        self.best_epoch, self.stale_epochs = saved["best_epoch"], saved["stale_epochs"]
        self.finished = saved["finished"]
        if self.part.rank == 0:
            logger.info("going on after epoch %d of %d", self.finished, self.recipe.epochs)
        return self.finished

    def _save(self) -> None:
        if self.place.folder is None:
            return
        save_checkpoint(
            self.place.folder,
            {
                "state": self._state(),
                "updater": self.updater.state_dict(),
                "average": self.average.average if self.average is not None else {},
                "averaged_updates": self.average.updates if self.average is not None else 0,
                "lr": self.lr,
                "history": self.history,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "stale_epochs": self.stale_epochs,
                "finished": self.finished,
            },
        )

    def _find_rate(self) -> float:
        """The peak rate by a range test; the network is as before afterwards, and random numbers start anew anyway."""
        before = copied(state_of(self.network))
        transfer.set_trainable(self.network, self.learner.parts, self.recipe.mode, self.recipe.unfreeze_epochs, 0)
        self.network.train()
        if self.part.ranks > 1:
            self._single.share()
        torch.manual_seed(_mixed(self.recipe.seed, 0, self.part.rank))
        stream = (batches for epoch in count() for batches in self._updates(epoch))
        tried: list[tuple[float, float]] = []

        def train(rate: float) -> float | None:
            self.report(Step("looking for a learning rate", len(tried), STEPS))
            try:
                return sum(self.updater.update(next(stream), rate, 0, len(tried) + 1).values())
            except NonFiniteLoss:
                return None

        with contextlib.closing(stream):
            tried += sweep(train)
        self.network.zero_grad(set_to_none=True)
        self.updater = self._updater()
        load_state(self.network, before)
        lr = steepest(tried)
        if self.part.rank == 0:
            logger.info("--lr auto: %.2g, where the loss fell fastest", lr)
        return lr

    def _updates(self, epoch: int) -> Iterator[list[Batch]]:
        recipe = self.recipe
        return self.train.training(epoch, recipe.batch_size, recipe.accumulate, recipe.balance, self.part)

    def _updates_per_epoch(self) -> int:
        per_update = self.recipe.batch_size * self.recipe.accumulate * self.part.ranks
        return -(-len(self.names) // per_update)

    def _updater(self) -> Updates:
        if isinstance(self.learner, AlternatingLearner):
            return self.learner.updater(self.recipe, self.device, self._cast, self.names)
        groups = [dict(group) for group in self.groups]
        return Updater(self.losses, groups, self.recipe, self.device, self._cast, self.names)

    @property
    def _single(self) -> Updater:
        """The updater of what learns on several devices: one optimizer, one sum of losses."""
        assert isinstance(self.updater, Updater)
        return self.updater

    def _cast(self) -> contextlib.AbstractContextManager:
        return autocast(self.recipe.precision, self.device)

    def _state(self) -> State:
        return state_of(self.network, self.kept)

    def _averaged(self) -> State:
        """What weights are averaged of: all that is kept, or of networks that learn against each other one side."""
        if isinstance(self.learner, AlternatingLearner):
            return state_of(self.network, self.learner.averaged)
        return self._state()

    @contextlib.contextmanager
    def _with_average(self) -> Iterator[None]:
        """The averaged weights in the network, if weights are averaged; then its own again."""
        if self.average is None:
            yield
            return
        own = copied(self._averaged())
        load_state(self.network, self.average.average)
        try:
            yield
        finally:
            load_state(self.network, own)

    def _told(self, losses: dict[str, float] | None) -> str:
        """What is worth seeing beside the bar: the sum of the losses, or each loss of networks that alternate."""
        if losses is None:
            said = []
        elif isinstance(self.learner, AlternatingLearner):
            said = [f"{name} {value:.3g}" for name, value in losses.items()]
        else:
            said = [f"loss {sum(losses.values()):.3g}"]
        if self.history:
            value = self.history[-1][f"val_{self.learner.main_metric}"]
            said.append(f"{self.learner.main_metric} {value:.3f}")
        return " · ".join(said)


def _mixed(seed: int, epoch: int, rank: int) -> int:
    """A seed for torch."""
    return (seed * 1_000_003 + epoch * 1_009 + rank) % 2**63


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """The same numbers in every run, where torch can; and torch's own settings afterwards as they were before."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    devices = [device] if device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warned)
            torch.backends.cudnn.benchmark = benchmark
            torch.set_num_threads(threads)
