"""Measures models: the images of a split go through the same bulk path that predicts, and the rows are compared with
the data set.

An evaluation is kept at models/NAME/VERSION/evaluations/DATASET@VERSION-SPLIT[-by-JUDGE][.PRECISION].json, so that
nothing is measured twice.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from models.card import Card
from models.dataset import Dataset
from models.errors import ModelError, StorageError, UsageError
from models.learning.metrics import task_module
from models.progress import Report, Step, silent
from models.records import RESULT_FIELDS, Status, Task
from models.settings.export import EvaluateSettings
from models.settings.fields import Device
from models.settings.fields import Engine as EngineName
from models.settings.predict import PredictSettings
from tasks import predict, registry
from tasks.datasets import datasets
from tasks.evaluate_generator import measure_generator
from tasks.evaluate_translator import measure_translator, reconstruction_error
from tasks.judge import judge as find_judge
from tasks.slot_process import cool_down, warm_up
from tasks.storage import join, normalise, open_storage
from tasks.table import Table, write_parquet

log = logging.getLogger("pixelmill")

# What makes images is compared by a judge, instead of by rows with what the data set says.
_BY_JUDGE: dict[Task, Callable[..., dict[str, Any]]] = {
    Task.GENERATE: measure_generator,
    Task.TRANSLATE: measure_translator,
}
_SCRATCH_TABLE = "evaluation"
_EXACT_ENGINE: EngineName = "onnxruntime"  # its figures are kept


@dataclass(frozen=True)
class Evaluation:
    """How good one model is on one split; the keys of `evaluate --json`."""

    model: str  # NAME@VERSION, or a variant
    dataset: str  # NAME@VERSION
    split: str
    metrics: dict[str, Any]  # see models.learning.metrics
    table: str | None = None  # that holds the predictions


def measure(
    card: Card,
    onnx_path: Path,
    store: str,
    dataset: Dataset,
    split: str,
    *,
    engine: EngineName = "auto",
    device: Device = "auto",
    judge: str | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """The metrics of an ONNX file that need not be published: what `predict` would answer, compared with the labels.

    `store` holds the data set. On the validation split the temperature is fitted; on others it is the card's. Raises
    UsageError where there is nothing to compare, ModelError where the file cannot be run.

    A generator or translator is measured by the judge of that name; see tasks.evaluate_generator, .evaluate_translator.
    """
    card = card if card.version else card.with_version()
    if (by_judge := _BY_JUDGE.get(card.task)) is not None:
        return by_judge(card, onnx_path, store, dataset, split, find_judge(judge, store), device, report)
    images = labelled_images(store, card, dataset, split)
    with tempfile.TemporaryDirectory(prefix="pixelmill-evaluate-") as scratch:
        published = registry.publish(scratch, replace(card, files={}), {card.onnx_file: onnx_path}, quietly=True)
        source = Path(scratch, "images.parquet")
        source.write_bytes(write_parquet(images.select(["image"])))
        settings = _predict_settings(published, str(source), _SCRATCH_TABLE, images, engine, device)
        rows, ran_on = _predicted(normalise(scratch), published, settings, images, f"measuring {split}", report)
    figures = _compared(card, rows, ran_on, images, store, dataset, split)
    return _with_reconstruction(figures, card, onnx_path, store, dataset, split, report)


def _with_reconstruction(
    figures: dict[str, Any], card: Card, onnx_path: Path, store: str, dataset: Dataset, split: str, report: Report
) -> dict[str, Any]:
    """Of an autoencoder also `mse`: how far what comes back is off."""
    if card.task != Task.EMBED:
        return figures
    return figures | {"mse": reconstruction_error(card, onnx_path, store, dataset, split, report)}


def measure_all(card: Card, onnx_path: Path, store: str, dataset: Dataset, report: Report = silent) -> dict[str, Any]:
    """The `metrics` of a card: both splits that the model did not learn from, as far as the data set has them.

    By the engine that is there wherever the model goes, and exact: others may only be near to it.
    """
    metrics: dict[str, Any] = {"dataset": dataset.reference, "temperature": None}
    judge = card.training.get("judge")
    for split in ("val", "test"):
        if dataset.splits.get(split):
            measured = replace(card, metrics=metrics)
            metrics[split] = measure(
                measured, onnx_path, store, dataset, split, engine=_EXACT_ENGINE, judge=judge, report=report
            )
            if split == "val":
                metrics["temperature"] = metrics[split].get("temperature")
    return metrics


def evaluate(store: str, settings: EvaluateSettings, report: Report = silent) -> Evaluation:
    """Measures a published model on a split, or finds what was measured before.

    With a table the predictions are kept there too, and a run that was interrupted goes on where it stopped. Figures
    of another engine than ONNX Runtime are not kept: they hold for one kind of machine.
    Raises UsageError, ModelError.
    """

    store = normalise(store)
    card = registry.check_exported(registry.resolve(store, settings.model))
    dataset = datasets.resolve(store, settings.dataset)
    evaluation = Evaluation(card.reference, dataset.reference, settings.split, {}, settings.table)
    if card.task in _BY_JUDGE:
        return _evaluate_by_judge(store, card, dataset, settings, evaluation, report)
    if settings.judge is not None:
        raise UsageError(f"--judge means nothing to models that {card.task}, such as {card.reference}: leave it out")
    if settings.table is not None:
        images = labelled_images(store, card, dataset, settings.split)
        source = _image_list(store, card, dataset, settings.split, images)
        prediction = _predict_settings(card, source, settings.table, images, settings.engine, settings.device)
        stage = f"measuring {settings.split}"
        rows, ran_on = _predicted(store, card, prediction, images, stage, report)
        metrics = _compared(card, rows, ran_on, images, store, dataset, settings.split)
        path = registry.fetch_model(store, card)
        metrics = _with_reconstruction(metrics, card, path, store, dataset, settings.split, report)
    elif settings.engine == _EXACT_ENGINE and (found := find_metrics(store, card, dataset, settings.split)) is not None:
        log.info("%s was measured on %s before", card.reference, dataset.reference)
        return replace(evaluation, metrics=found)
    else:
        metrics = measure(
            card,
            registry.fetch_model(store, card),
            store,
            dataset,
            settings.split,
            engine=settings.engine,
            device=settings.device,
            report=report,
        )
    evaluation = replace(evaluation, metrics=metrics)
    if settings.engine == _EXACT_ENGINE:
        _keep(store, card, dataset, evaluation)
    return evaluation


def _evaluate_by_judge(
    store: str, card: Card, dataset: Dataset, settings: EvaluateSettings, evaluation: Evaluation, report: Report
) -> Evaluation:
    """By the judge that is asked for, else that of its training; each judge's figures are kept by themselves."""
    if settings.table is not None:
        raise UsageError(f"{card.reference} makes images, so that there are no predictions to keep: leave out --table")
    if settings.engine == "openvino":
        raise UsageError(f"--engine openvino has no meaning for {card.reference}, which {_EXACT_ENGINE} measures")
    judge = find_judge(settings.judge or card.training.get("judge"), store)
    if (found := find_metrics(store, card, dataset, settings.split, judge.name)) is not None:
        log.info("%s was measured on %s by %s before", card.reference, dataset.reference, judge.name)
        return replace(evaluation, metrics=found)
    path = registry.fetch_model(store, card)
    metrics = _BY_JUDGE[card.task](card, path, store, dataset, settings.split, judge, settings.device, report)
    evaluation = replace(evaluation, metrics=metrics)
    _keep(store, card, dataset, evaluation)
    return evaluation


def find_metrics(
    store: str, card: Card, dataset: Dataset, split: str, judge: str | None = None
) -> dict[str, Any] | None:
    """What was measured before: by training or export, which note it in the card, or by an evaluation.

    `judge`: of a generator, the name of the judge whose figures are wanted.
    """
    if card.metrics.get("dataset") == dataset.reference and split in card.metrics:
        found = dict(card.metrics[split])
        if found.get("judge") == judge:
            return found
    uri = _evaluation_uri(store, card, dataset, split, ".json", judge)
    try:
        return json.loads(open_storage(uri).read(uri))["metrics"]
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{uri} is damaged ({type(error).__name__}: {error}): delete it") from None


def labelled_images(store: str, card: Card, dataset: Dataset, split: str) -> pa.Table:
    """The images of a split that say what the model should answer. Raises UsageError if there are none."""

    task_module(card.task)  # a task that cannot be measured is said first
    if lacking := dataset.lacks(card.task):
        raise UsageError(
            f"{card.reference} is a model of task {card.task}, and the images of {dataset.reference} have no "
            f"{' and no '.join(lacking)} to compare its answers with"
        )
    images = datasets.read_images(store, dataset, split)
    if card.task == Task.CLASSIFY:  # of objects an image may also have none
        images = images.filter(pc.is_valid(images.column("label")))
    if not images.num_rows:
        has = ", ".join(f"{name} {count}" for name, count in dataset.splits.items()) or "none"
        raise UsageError(f"{dataset.reference} has no labelled images in its split {split}; its splits: {has}")
    return images


def _predict_settings(
    card: Card, source: str, table: str, images: pa.Table, engine: EngineName, device: Device
) -> PredictSettings:
    pixels = pc.max(pc.multiply(images.column("width").cast(pa.int64()), images.column("height").cast(pa.int64())))
    defaults = {name: field.default for name, field in PredictSettings.model_fields.items()}
    applying = predict.RESULT_SETTINGS[card.task]
    return PredictSettings(
        source=source,
        model=card.reference,
        table=table,
        score=card.score_floor if "score" in applying else None,  # average precision looks at all findings
        top_k=len(card.labels) if "top_k" in applying else defaults["top_k"],  # calibration looks at all probabilities
        max_pixels=max(defaults["max_pixels"], pixels.as_py() or 0),  # what ingest accepted is no mistake of the model
        engine=engine,
        device=device,
    )


def _predicted(
    store: str, card: Card, settings: PredictSettings, images: pa.Table, stage: str, report: Report
) -> tuple[pa.Table, str]:
    """Predicts what the table does not hold yet, and returns its rows of these images, and the engine that ran."""
    total = images.num_rows
    report(Step(stage, 0, total))
    warm_up(1)
    try:
        planned = predict.plan(store, settings)
        reports = []
        if planned.open_shards:
            done = total - planned.open_images
            reports.append(
                predict.work(
                    store,
                    settings,
                    planned,
                    on_progress=lambda progress: report(Step(stage, max(0, done + progress.done), total)),
                )
            )
    finally:
        cool_down()
    summary = predict.summarise(store, settings, planned, reports, 0.0)
    if summary.open_shards:
        raise StorageError(
            f"{summary.open_shards} shards of {stage} are still open, run it again: {'; '.join(summary.failures[:3])}"
        )
    report(Step(stage, total, total))
    return _rows_of(Table(store, settings.table), card, images)


def _rows_of(table: Table, card: Card, images: pa.Table) -> tuple[pa.Table, str]:
    """The newest row of each image, and the engine of the last part."""
    columns = ["image", "sha256", "status", *(field.name for field in RESULT_FIELDS[card.task])]
    wanted = images.column("image").combine_chunks()
    parts, ran_on = [], ""
    for name in sorted(table.part_names(card.reference)):  # by plan: a later one saw a newer version, or tried again
        uri = join(table.uri, "parts", f"model={card.reference}", name)
        rows = table.read_part(uri, columns)
        rows = rows.filter(pc.is_in(rows.column("image"), value_set=wanted))
        if rows.num_rows:
            parts.append(rows)
            ran_on = table.part_statistics(uri).get("engine", "")
    if not parts:
        raise ModelError(f"{table.uri} has no rows of {card.reference} for these images")
    rows = pa.concat_tables(parts)
    last = {image: number for number, image in enumerate(rows.column("image").to_pylist())}
    return rows.take(pa.array(sorted(last.values()))), ran_on


def _compared(
    card: Card, rows: pa.Table, ran_on: str, images: pa.Table, store: str, dataset: Dataset, split: str
) -> dict[str, Any]:
    expected = dict(zip(*(images.column(name).to_pylist() for name in ("image", "sha256")), strict=True))
    # The label belongs to the content that was ingested; another content under the same name is no example.
    statuses = [
        "changed" if status == Status.OK and expected[image] and sha256 != expected[image] else status
        for image, sha256, status in zip(
            *(rows.column(name).to_pylist() for name in ("image", "sha256", "status")), strict=True
        )
    ]
    rows = rows.set_column(rows.schema.get_field_index("status"), "status", pa.array(statuses, pa.string()))
    annotations = datasets.read_annotations(store, dataset)
    figures = task_module(card.task).measure(
        rows,
        images,
        annotations.filter(pc.is_in(annotations.column("image"), value_set=images.column("image").combine_chunks())),
        card.labels or card.training.get("classes", ()),
        dataset.classes,
        temperature=card.metrics.get("temperature"),
        fit=split == "val",
        score=card.score,
    )
    by_status = {str(status): statuses.count(status) for status in sorted(set(statuses))}
    if figures["not_ok"]:
        log.warning("%d of %d images count as wrong: %s", figures["not_ok"], images.num_rows, by_status)
    if figures.get("unknown_classes"):
        log.warning("%s does not know the classes %s", card.reference, ", ".join(figures["unknown_classes"]))
    return {**figures, "by_status": by_status, "engine": ran_on}


def _evaluation_uri(store: str, card: Card, dataset: Dataset, split: str, ending: str, judge: str | None = None) -> str:
    precision = f".{card.precision}" if card.is_variant else ""
    folder = join(registry.version_folder(store, card), "evaluations")
    by = f"-by-{judge}" if judge else ""
    return join(folder, f"{dataset.reference}-{split}{by}{precision}{ending}")


def _image_list(store: str, card: Card, dataset: Dataset, split: str, images: pa.Table) -> str:
    """The images of the split as a list in the store: the source that the table's plan names."""
    uri = _evaluation_uri(store, card, dataset, split, ".parquet")
    open_storage(uri).put_if_absent(uri, write_parquet(images.select(["image"])))
    return uri


def _keep(store: str, card: Card, dataset: Dataset, evaluation: Evaluation) -> None:
    uri = _evaluation_uri(store, card, dataset, evaluation.split, ".json", evaluation.metrics.get("judge"))
    content: Mapping[str, Any] = asdict(evaluation) | {
        "created_at": datetime.now(UTC).isoformat(timespec="microseconds")
    }
    open_storage(uri).put_if_absent(uri, json.dumps(content, indent=2, ensure_ascii=False).encode())
