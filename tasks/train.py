"""Training: from a data set in the store to a model in the store.

A training is known by its key: the data set, the weights it starts from, and all settings that change the result. While
it runs, what the next run would go on from lies in a local folder of that name; a model that has the key is finished.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models import catalog
from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.dataset import Dataset
from models.errors import ModelError, UsageError
from models.imaging.prepare import Limits
from models.progress import Report, Step, silent
from models.records import Task
from models.settings.export import ExportSettings
from models.settings.train import TrainSettings
from tasks import registry
from tasks.datasets import datasets
from tasks.judge import judge
from tasks.photographs import encode_png
from tasks.storage import normalise
from tasks.table import write_parquet
from tasks.training_images import (
    TrainingImages,
    image_files,
    labels_of_objects,
    training_annotations,
    training_images,
    with_extra_data,
)
from tasks.work import cores

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from models.learning.fit import Fitted
    from models.learning.judging import Judge
    from models.learning.recipe import Recipe
    from models.learning.samples import Augmentation, Samples
    from models.nets.parts import Parts

logger = logging.getLogger("pixelmill.train")

HISTORY_FILE = "history.parquet"
SAMPLES_FOLDER = "samples"  # epoch-0001.png …: what a model that makes images made after each epoch
FOLDER_VARIABLE = "PIXELMILL_TRAINING"
_PARITY_IMAGES = 8


@dataclass(frozen=True)
class Trained:
    """What a training made, or found made; the keys of `train --json`."""

    model: str  # NAME@VERSION
    metrics: dict[str, Any]  # of the card; where nothing was exported, those of the last validation under `val`
    epochs: int  # trained, those before an interruption included
    best_epoch: int  # that was kept
    seconds: float  # of this run
    new: bool  # False: a model with this key was there, and nothing was trained
    promoted: bool | None  # None: it was not asked for


@dataclass(frozen=True)
class _Target:
    """The data set whose images those of the other one are to look like."""

    dataset: Dataset
    images: TrainingImages

    def record(self) -> dict[str, Any]:
        """What the card says of it."""
        rows = {"train": self.images.train.num_rows, "val": self.images.val.num_rows}
        return {"dataset": self.dataset.reference, "images": rows}


@dataclass(frozen=True)
class _Plan:
    """All that is decided before the first step."""

    dataset: Dataset
    extra: tuple[Dataset, ...]  # whose training images are among those of `images`
    images: TrainingImages
    card: Card  # without weights
    network: "nn.Module"  # with the weights to start from
    parts: "Parts"
    recipe: "Recipe"
    devices: tuple[str, ...]
    start: str  # where the weights come from
    key: str
    judge: "Judge | None"  # of models that make images
    target: _Target | None = None  # of models that translate


def train(
    store: str,
    settings: TrainSettings,
    report: Report = silent,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    on_samples: Callable[[int, bytes], None] = lambda epoch, png: None,
) -> Trained:
    """Trains, exports, measures and publishes a model; the same again finds it, and after a kill goes on.

    `on_epoch` gets the curves' row of each epoch, and `on_samples` what a model that makes images made after it. Raises
    UsageError for what cannot be learned, NonFiniteLoss, ModelError and ParityError; then nothing is published.
    """
    store = normalise(store)
    if settings.promote_if_better and not settings.export:
        raise UsageError("--promote-if-better compares exported models: leave out --no-export")
    began = time.perf_counter()
    try:
        plan = _plan(store, settings, report)
        card, new = _find(store, settings, plan, report), False
        if card is None:
            card, new = _train(store, settings, plan, report, on_epoch, on_samples)
        else:
            logger.info("%s was trained so before: nothing to do", card.reference)
    except ModuleNotFoundError as error:
        raise ModelError(f"training needs {error.name}: pip install 'pixelmill[train]'") from None
    promoted = None
    if settings.promote_if_better:
        from tasks.promote import promote_if_better

        promoted = promote_if_better(store, card, plan.dataset, report=report).promoted
    return Trained(
        model=card.reference,
        metrics=card.metrics or {"val": card.training["validation"]},
        epochs=card.training["epochs"],
        best_epoch=card.training["best_epoch"],
        seconds=round(time.perf_counter() - began, 3),
        new=new,
        promoted=promoted,
    )


def training_folder(key: str) -> Path:
    """Where a training keeps what it would go on from: below PIXELMILL_TRAINING, else below the user's cache folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen, key)
    return registry.cache_folder().parent / "training" / key


def _plan(store: str, settings: TrainSettings, report: Report) -> _Plan:
    """Resolves every name, and refuses what cannot be learned, before anything costs time."""
    dataset = datasets.resolve(store, settings.dataset)
    entry = catalog.entry(settings.model)
    target = _target(store, settings, entry, dataset)
    images = training_images(store, dataset, entry.task, entry.is_conditional)
    images, extra = with_extra_data(store, images, dataset, settings.extra_data, entry.task, entry.is_conditional)

    from models.learning.precision import arithmetic
    from models.learning.recipe import resolve
    from models.nets.untrained import build_untrained
    from tasks.weights import apply_start, starting_state

    devices = _devices(settings)
    recipe = resolve(settings)
    report(Step(f"building {settings.model}", 0, None))
    family = entry.family_module()
    labels = dataset.classes if entry.knows_classes else ()
    start = starting_state(settings.weights, settings.model, recipe.mode, store, settings.image_size)
    size = start.input.height
    latent_size = settings.latent_size or start.latent_size
    network = build_untrained(lambda: entry.build_for_training(len(labels), size, latent_size), seed=settings.seed)
    parts = family.parts(network, entry.builder)
    if not apply_start(network, start, parts, family.IGNORED_PREFIXES, labels, settings.model) and labels:
        logger.info("the head of %s answers the same classes, and learns on", start.source)

    recipe = replace(recipe, precision=arithmetic(settings.precision, devices[0], recipe.mode, network))
    card = Card(
        name=settings.name,
        version="",
        task=entry.task,
        architecture=settings.model,
        labels=labels,
        input=start.input,
        score_floor=entry.score_floor,
        latent_size=getattr(network, "latent_size", 0),
        source=f"{start.source}, {recipe.mode} on {dataset.reference}",
        licence=start.licence,
    )
    judged_by = judge(settings.judge, store) if entry.task in (Task.GENERATE, Task.TRANSLATE) else None
    decisive = {
        "dataset": dataset.reference,
        **({} if target is None else {"target": target.dataset.reference}),
        "architecture": settings.model,
        "input": asdict(start.input),
        "start": _digest(network.state_dict()),
        "recipe": asdict(recipe),
        "devices": [device.partition(":")[0] for device in devices],
    }
    if extra:
        decisive["extra_data"] = [each.reference for each in extra]
    if judged_by is not None:  # it decides which epoch is kept
        decisive["judge"] = judged_by.name
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]
    return _Plan(dataset, extra, images, card, network, parts, recipe, devices, start.source, key, judged_by, target)


def _target(store: str, settings: TrainSettings, entry: catalog.Entry, dataset: Dataset) -> _Target | None:
    """What `--target` names. Raises UsageError where it is missing, or means nothing."""
    if not entry.has_target:
        if settings.target is not None:
            raise UsageError(
                f"--target means nothing to models that {entry.task}, such as {settings.model}: leave it out"
            )
        return None
    if settings.target is None:
        raise UsageError(
            f"{settings.model} learns to make images of one data set look like those of another: "
            "say which with --target NAME"
        )
    target = datasets.resolve(store, settings.target)
    if target.reference == dataset.reference:
        raise UsageError(f"--target {settings.target} is the data set itself: there is nothing to translate into")
    return _Target(target, training_images(store, target, entry.task))


def _find(store: str, settings: TrainSettings, plan: _Plan, report: Report) -> Card | None:
    """The model of this name that has the plan's key, exported if that is wanted."""
    for card in reversed(registry.list_models(store, settings.name)):
        if card.training.get("key") == plan.key and not card.is_variant:
            break
    else:
        return None
    if settings.export and not card.is_exported:
        from tasks.export import export

        export(store, ExportSettings(model=card.reference), report)
        return registry.resolve(store, card.reference)
    return card


def _train(
    store: str,
    settings: TrainSettings,
    plan: _Plan,
    report: Report,
    on_epoch: Callable[[dict[str, Any]], None],
    on_samples: Callable[[int, bytes], None],
) -> tuple[Card, bool]:
    """The published card, and whether it is a new version."""
    from models.learning.fit import Place, fit
    from models.learning.learner import task_module
    from models.learning.sample_grid import grid
    from models.learning.whole_files import write_whole

    task = task_module(plan.card.task)
    of_generators = {} if plan.judge is None else {"judge": plan.judge}
    learner = task.learner(plan.network, plan.parts, plan.card, plan.recipe, **of_generators)
    of_detectors = {"mosaic": True} if plan.recipe.mosaic else {}
    augmentation = task.augmentation(plan.recipe.augment, plan.card.input, plan.recipe.flip, **of_detectors)
    folder = training_folder(plan.key)
    if not settings.resume:
        shutil.rmtree(folder, ignore_errors=True)
    num_classes = len(plan.card.labels)
    logger.info(
        "%s learns%s from %d images of %s, validated on %d; %s, %s",
        settings.model,
        f" {num_classes} class{'' if num_classes == 1 else 'es'}" if num_classes else "",
        plan.images.train.num_rows,
        plan.dataset.reference,
        plan.images.val.num_rows,
        plan.start,
        " and ".join(plan.devices),
    )
    annotations = training_annotations(store, [plan.dataset, *plan.extra])
    val = _samples(plan, plan.dataset, plan.images.val, annotations, None)
    training = _samples(plan, plan.dataset, plan.images.train, annotations, augmentation)
    if (target := plan.target) is not None:
        of_target = datasets.read_annotations(store, target.dataset)
        val = replace(val, beside=_samples(plan, target.dataset, target.images.val, of_target, None))
        beside = _samples(plan, target.dataset, target.images.train, of_target, augmentation)
        training = replace(training, beside=beside)

    def keep_samples(epoch: int, images: NDArray[np.uint8]) -> None:
        png = encode_png(grid(images))
        write_whole(folder / SAMPLES_FOLDER / f"epoch-{epoch:04d}.png", lambda file: file.write(png))
        on_samples(epoch, png)

    fitted = fit(
        learner,
        training,
        val,
        plan.recipe,
        Place(devices=plan.devices, threads=cores(), folder=folder),
        report,
        on_epoch,
        keep_samples,
    )
    card = replace(plan.card, score=_best_score(plan.card, fitted), training=_record(plan, fitted))
    published = _publish(store, settings, plan, card, learner.network.state_dict(), fitted, val, folder, report)
    shutil.rmtree(folder, ignore_errors=True)
    return published


def _best_score(card: Card, fitted: "Fitted") -> float:
    """The score that gives a detector the best F1 on the validation images; other models keep the card's."""
    best = fitted.metrics.get("score")
    return card.score if best is None else max(round(best, 3), card.score_floor)


def _publish(
    store: str,
    settings: TrainSettings,
    plan: _Plan,
    card: Card,
    state: "dict[str, Tensor]",
    fitted: "Fitted",
    val: "Samples",
    folder: Path,
    report: Report,
) -> tuple[Card, bool]:
    from safetensors.torch import save_file

    from models.learning.history import to_arrow
    from tasks.weights import apply_state

    entry = catalog.entry(card.architecture)
    family = entry.family_module()
    # What only served training is left behind.
    network = entry.build(len(card.labels), card.input.height, card.latent_size)
    apply_state(
        network, {name: value.cpu().contiguous() for name, value in state.items()}, family.IGNORED_PREFIXES, "itself"
    )
    network.eval()
    with tempfile.TemporaryDirectory(prefix="pixelmill-train-") as scratch:
        paths = {name: Path(scratch, name) for name in (WEIGHTS_FILE, HISTORY_FILE)}
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, paths[WEIGHTS_FILE])
        paths[HISTORY_FILE].write_bytes(write_parquet(to_arrow(fitted.history)))
        paths |= {f"{SAMPLES_FOLDER}/{path.name}": path for path in sorted(folder.glob(f"{SAMPLES_FOLDER}/*.png"))}
        card = replace(card, weights_sha256=registry.sha256_of(paths[WEIGHTS_FILE])).with_version()
        if (existing := registry.find_version(store, card.name, card.version)) is not None:
            logger.info("%s is already in the store: other settings led to the same weights", existing.reference)
            return existing, False
        if settings.export:
            card, graphs = _export(store, plan.dataset, card, network, val, Path(scratch), report)
            paths |= graphs
        return registry.publish(store, card, paths), True


def _export(
    store: str,
    dataset: Dataset,
    card: Card,
    network: "nn.Module",
    val: "Samples",
    folder: Path,
    report: Report,
) -> tuple[Card, dict[str, Path]]:
    """Writes the graphs, and returns the card with what was compared and measured, and the files by name."""
    from models.runtime.publishable import export_graphs
    from tasks.evaluate import measure_all

    family = catalog.entry(card.architecture).family_module()
    images, names = _real_images(val)
    report(Step(f"exporting {card.reference}, and comparing it with PyTorch", 0, None))
    graphs, parity = export_graphs(network, family, card, images, names, folder)
    card = replace(card, parity=parity)
    return replace(card, metrics=measure_all(card, graphs[ONNX_FILE], store, dataset, report)), graphs


def _real_images(samples: "Samples") -> tuple[NDArray[np.uint8], list[str]]:
    """Images that a training was validated on, as the network takes them, and photographs where these are few."""
    from models.imaging.prepare import Preparer
    from models.runtime.parity import MIN_IMAGES
    from tasks.photographs import prepared_photographs

    rule = samples.rule
    count = min(len(samples), _PARITY_IMAGES)
    images = np.empty((count, rule.height, rule.width, 3), np.uint8)
    preparer = Preparer(rule, samples.limits)
    for index in range(count):
        preparer.prepare(samples.read(index), images[index])
    names = list(samples.names[:count])
    if (lacking := MIN_IMAGES - count) > 0:
        photographs, photograph_names = prepared_photographs(rule, lacking)
        return np.concatenate([images, photographs]), names + photograph_names
    return images, names


def _samples(
    plan: _Plan,
    dataset: Dataset,
    images: "pa.Table",
    annotations: "pa.Table",
    augmentation: "Augmentation | None",
) -> "Samples":
    from models.learning.learner import task_module
    from models.learning.order import repeat_factors
    from models.learning.samples import Samples

    task = task_module(plan.card.task)
    labels = images.column("label").to_pylist()
    is_classified = plan.card.task == Task.CLASSIFY or plan.card.is_conditional
    shows_objects = plan.card.task in (Task.DETECT, Task.INSTANCE, Task.SEMANTIC)
    sides = zip(images.column("width").to_pylist(), images.column("height").to_pylist(), strict=True)
    return Samples(
        names=images.column("image").to_pylist(),
        targets=task.targets(images, annotations, plan.card.labels),
        read=image_files(dataset, images, plan.extra),
        rule=plan.card.input,
        augmentation=augmentation,
        groups=[plan.card.labels.index(label) for label in labels] if is_classified else None,
        repeats=repeat_factors(labels_of_objects(images, annotations)) if shows_objects else None,
        # What ingest accepted is no mistake now.
        limits=Limits(max_pixels=max([Limits.max_pixels, *(width * height for width, height in sides)])),
        placed=getattr(task, "placed", None),
    )


def _record(plan: _Plan, fitted: "Fitted") -> dict[str, Any]:
    """What the card says of the training; the same in every run, so that exports are, too."""
    extra = {"extra_data": [each.reference for each in plan.extra]} if plan.extra else {}
    return {
        "key": plan.key,
        "dataset": plan.dataset.reference,
        **extra,
        "start": plan.start,
        "settings": asdict(plan.recipe) | {"lr": fitted.lr},
        "devices": list(plan.devices),
        "images": {"train": plan.images.train.num_rows, "val": plan.images.val.num_rows},
        **({} if plan.card.labels else {"classes": _classes_of(plan.images.train)}),
        **({} if plan.target is None else {"target": plan.target.record()}),
        "validated_on": "images of the split train" if plan.images.carved else "val",
        "validation": fitted.metrics,
        **({} if plan.judge is None else {"judge": plan.judge.name}),
        "epochs": len(fitted.history),
        "best_epoch": fitted.best_epoch,
    }


def _classes_of(images: "pa.Table") -> list[str]:
    """What a model without labels has seen all the same: images of other classes are strange to it."""
    return sorted(set(images.column("label").drop_null().to_pylist()))


def _devices(settings: TrainSettings) -> tuple[str, ...]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cuda" and not count:
        raise UsageError("--device cuda needs a GPU that PyTorch can use, and there is none: leave it out")
    if settings.device == "cpu" or not count:
        return ("cpu",)
    return tuple(f"cuda:{number}" for number in range(count))


def _digest(state: "dict[str, Tensor]") -> str:
    """A SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().numpy().data)
    return digest.hexdigest()
