"""Exports: the exact graph of a model that has none yet, and its less exact variants, each behind its gate.

The exact one must agree with PyTorch. A variant may cost answers, so it is measured on a data set beside the exact one,
and published only if the main metric of the task holds.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import catalog
from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.dataset import Dataset
from models.errors import ModelError, NotFound, ParityError, UsageError
from models.learning.metrics import MAIN_METRIC, task_module
from models.progress import Report, Step, silent
from models.records import Task
from models.runtime.parity import MIN_IMAGES, check_variant
from models.runtime.predictor import one_line
from models.settings.export import EvaluateSettings, ExportSettings
from models.settings.fields import Precision
from tasks import registry
from tasks.calibration import prepared_images
from tasks.datasets import datasets
from tasks.evaluate import evaluate, labelled_images, measure, measure_all
from tasks.photographs import prepared_photographs
from tasks.storage import join, normalise

log = logging.getLogger("pixelmill")

_PARITY_IMAGES = 16  # of the measured split, for variants
_CALIBRATION_BATCH = 8
_WORST_CLASSES = 5

# What a smaller, less exact graph of these costs has no measure yet.
EXACT_ONLY = (Task.GENERATE, Task.TRANSLATE, Task.EMBED)


@dataclass(frozen=True)
class Exported:
    """What an export made; the keys of `export --json`."""

    model: str  # NAME@VERSION, or the reference of the variant
    file: str  # URI of the graph
    parity: dict[str, Any]
    metrics: dict[str, Any]  # see models.learning.metrics


def export(store: str, settings: ExportSettings, report: Report = silent) -> Exported:
    """Makes the export, or finds the one that is there.

    Raises ParityError or ModelError if it disagrees or loses too much, and UsageError where what it needs is missing;
    then nothing is published.
    """
    store = normalise(store)
    named = registry.resolve(store, settings.model)
    card = registry.find_version(store, named.name, named.base_version)
    assert card is not None  # a variant lies in the folder of its version
    try:
        if not card.is_exported:
            card = _export_exact(store, card, settings, report)
        if settings.precision != "fp32":
            card = _export_variant(store, card, settings, report)
    except ModuleNotFoundError as error:
        raise ModelError(f"an export needs {error.name}: pip install 'pixelmill[train]'") from None
    return Exported(
        card.reference, join(registry.version_folder(store, card), card.onnx_file), card.parity, card.metrics
    )


def _export_exact(store: str, card: Card, settings: ExportSettings, report: Report) -> Card:
    """From the weights of a model that was trained without an export."""
    from models.runtime.publishable import export_graphs
    from tasks.weights import apply_state, load_model

    if WEIGHTS_FILE not in card.files:
        raise ModelError(f"{card.reference} has neither {ONNX_FILE} nor {WEIGHTS_FILE}: import it again")
    entry = catalog.entry(card.architecture)
    family = entry.family_module()
    report(Step(f"exporting {card.reference}", 0, None))
    network = entry.build(len(card.labels), card.input.height, card.latent_size)
    apply_state(network, load_model(store, card), family.IGNORED_PREFIXES, card.architecture)
    network.eval()

    dataset = _dataset_of(store, card, settings, is_needed=False)
    images, names = _images_of(store, dataset, settings.split, card)
    with tempfile.TemporaryDirectory(prefix="pixelmill-export-") as folder:
        files, parity = export_graphs(network, family, card, images, names, Path(folder))
        exported = replace(card, parity=parity)
        if dataset is not None and dataset.reference == card.training.get("dataset"):
            exported = replace(exported, metrics=measure_all(exported, files[ONNX_FILE], store, dataset, report))
        return registry.publish(store, exported, files)


def _export_variant(store: str, exact: Card, settings: ExportSettings, report: Report) -> Card:
    precision = settings.precision
    variant = exact.variant(precision)
    if (existing := registry.find_version(store, exact.name, variant.version)) is not None:
        return _within(existing, settings)
    if exact.task in EXACT_ONLY:
        raise UsageError(
            f"{exact.reference} is a model of task {exact.task}: what a less exact export of one costs has no measure "
            "yet that could guard it; use --precision fp32"
        )
    metric = MAIN_METRIC.get(exact.task)
    task_module(exact.task)  # a task that cannot be measured is said first
    assert metric is not None
    dataset = _dataset_of(store, exact, settings, is_needed=True)
    assert dataset is not None
    labelled_images(store, exact, dataset, settings.split)
    measured = _exact_figures(store, exact, dataset, settings.split, report)
    if measured[metric] is None:
        raise UsageError(
            f"{dataset.reference} {settings.split} shows nothing to find, so that it cannot tell what is lost"
        )
    exact_path = registry.fetch_model(store, exact)
    images, names = _images_of(store, dataset, settings.split, exact)
    refusals = []
    with tempfile.TemporaryDirectory(prefix="pixelmill-export-") as folder:
        for card, onnx_path in _candidates(store, variant, exact_path, dataset, settings, images, Path(folder), report):
            how = card.conversion.get("quantised", precision)
            try:
                parity = check_variant(card, onnx_path, exact_path, images)
            except ParityError as error:
                refusals.append(f"{how}: {error}")
                continue
            # ONNX Runtime is there wherever the variant goes; other engines must agree with it.
            found = measure(card, onnx_path, store, dataset, settings.split, engine="onnxruntime", report=report)
            gate = compare(exact.task, measured, found, precision, settings.tolerance)
            figures = f"{metric} {gate['fp32']:.4f} → {gate[precision]:.4f}"
            if gate["fall"] > settings.tolerance + 1e-9:
                refusals.append(f"{how}: {figures}, worst classes {_worst(gate, precision)}")
                log.info("%s, %s: %s is beyond the tolerance", variant.reference, how, figures)
                continue
            log.info("%s, %s: %s", variant.reference, how, figures)
            metrics = {
                "dataset": dataset.reference,
                settings.split: found,
                "temperature": found.get("temperature"),
                "gate": {"dataset": dataset.reference, "split": settings.split, **gate},
            }
            card = replace(card, metrics=metrics, parity={"images": names, **parity})
            return registry.publish(store, card, {card.onnx_file: onnx_path})
    raise ModelError(
        f"{variant.reference} was not published: on {dataset.reference} {settings.split} it loses more than "
        f"--tolerance {settings.tolerance:g}: {'; '.join(refusals)}"
    )


def _exact_figures(store: str, exact: Card, dataset: Dataset, split: str, report: Report) -> dict[str, Any]:
    """Of ONNX Runtime, as the variant is measured: what OpenVINO may have answered in bf16 would move the bar."""
    settings = EvaluateSettings(model=exact.reference, dataset=dataset.reference, split=split, engine="onnxruntime")
    found = evaluate(store, settings, report).metrics
    if found["engine"].startswith("onnxruntime"):
        return found
    path = registry.fetch_model(store, exact)
    return measure(exact, path, store, dataset, split, engine="onnxruntime", report=report)


def _candidates(
    store: str,
    variant: Card,
    exact_path: Path,
    dataset: Dataset,
    settings: ExportSettings,
    images: NDArray[np.uint8],
    folder: Path,
    report: Report,
) -> Iterator[tuple[Card, Path]]:
    """Cards and graphs to try, from the fastest to the most careful; a later one is made when it is asked for."""
    from models.runtime import quantize
    from models.runtime.export import embed_card

    raw, out = folder / "raw.onnx", folder / variant.onnx_file
    if variant.precision == "fp16":
        largest, tensor = quantize.largest_value(exact_path, images)
        if not largest < quantize.HALF_MAX:
            raise ParityError(
                f"{variant.reference} was not published: {tensor} reaches {largest:.4g} in the exact export, and half "
                f"precision ends at {quantize.HALF_MAX:g}"
            )
        quantize.to_fp16(exact_path, raw)
        conversion = {"method": "half precision, input and answers in fp32", "largest_value": largest}
        card = replace(variant, conversion=conversion)
        embed_card(raw, card, out)
        yield card, out
        return
    report(Step("reading images to calibrate on", 0, settings.calibration_images))
    calibration, names = prepared_images(store, dataset, "train", variant, settings.calibration_images)
    prepared, whole = folder / "prepared.onnx", folder / "whole.onnx"
    quantize.prepare_int8(exact_path, prepared)
    for attempt in quantize.attempts(prepared, whole, variant.task, images):
        made = raw if whole.exists() else whole
        stage = f"quantising {attempt.what}"
        quantize.to_int8(prepared, variant.task, attempt, _batches(calibration, stage, report), made)
        card = replace(
            variant,
            conversion={
                "method": "static QDQ, weights per channel, ranges by minimum and maximum",
                "quantised": attempt.what,
                "exact_nodes": list(attempt.exact_nodes),
                "calibration": {"dataset": dataset.reference, "split": "train", "images": len(names)},
            },
        )
        embed_card(made, card, out)
        yield card, out


def _batches(images: NDArray[np.uint8], stage: str, report: Report) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), _CALIBRATION_BATCH):
        report(Step(stage, start, len(images)))
        yield images[start : start + _CALIBRATION_BATCH]
    report(Step(stage, len(images), len(images)))


def compare(
    task: Task, exact: Mapping[str, Any], found: Mapping[str, Any], precision: Precision, tolerance: float
) -> dict[str, Any]:
    """The exact model and a variant side by side: the main metric, how far it falls, and the figures per class."""
    metric, per_class = MAIN_METRIC[task], task_module(task).per_class
    before, after = per_class(exact), per_class(found)
    return {
        "metric": metric,
        "fp32": exact[metric],
        precision: found[metric],
        "fall": exact[metric] - found[metric],
        "tolerance": tolerance,
        "per_class": {
            name: {"fp32": before[name], precision: after[name], "change": after[name] - before[name]}
            for name in before
        },
    }


def _worst(gate: Mapping[str, Any], precision: str) -> str:
    """The classes that lost most, for people."""
    fallen = sorted(gate["per_class"].items(), key=lambda entry: entry[1]["change"])
    shown = [
        f"{name} {figures['fp32']:.2f} → {figures[precision]:.2f}"
        for name, figures in fallen[:_WORST_CLASSES]
        if figures["change"] < 0
    ]
    return ", ".join(shown) or "none"


def _within(existing: Card, settings: ExportSettings) -> Card:
    """The variant that is there. Raises ModelError where it loses more than is allowed now."""
    gate = existing.metrics.get("gate", {})
    if gate.get("fall", 0.0) > settings.tolerance + 1e-9:
        raise ModelError(
            f"{existing.reference} is in the store, published with --tolerance {gate['tolerance']:g}: its "
            f"{gate['metric']} is {gate['fp32']:.4f} → {gate[existing.precision]:.4f} on {gate['dataset']} "
            f"{gate['split']}, more than {settings.tolerance:g} lower"
        )
    log.info("%s is already in the store", existing.reference)
    return existing


def _dataset_of(store: str, card: Card, settings: ExportSettings, *, is_needed: bool) -> Dataset | None:
    """The one that was asked for, else the one the model was trained on; None if neither is there and none needed."""
    reference = settings.dataset or card.training.get("dataset")
    if reference is None:
        if is_needed:
            raise UsageError(
                f"{card.reference} was not trained here, so an export as {settings.precision} needs --dataset NAME: "
                "images to calibrate on, and labels to measure what it costs"
            )
        return None
    try:
        return datasets.resolve(store, reference)
    except NotFound:
        if is_needed or settings.dataset is not None:
            raise
        return None


def _images_of(store: str, dataset: Dataset | None, split: str, card: Card) -> tuple[NDArray[np.uint8], list[str]]:
    """Images to compare graphs on: of the split, filled up with photographs where it has few."""
    if dataset is None:
        return prepared_photographs(card.input, MIN_IMAGES)
    try:
        images, names = prepared_images(store, dataset, split, card, _PARITY_IMAGES)
    except UsageError as error:
        log.info("%s", one_line(error))
        return prepared_photographs(card.input, MIN_IMAGES)
    if (lacking := MIN_IMAGES - len(names)) > 0:
        photographs, photograph_names = prepared_photographs(card.input, lacking)
        return np.concatenate([images, photographs]), names + photograph_names
    return images, names
