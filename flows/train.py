"""train as a Prefect flow of one task."""

from typing import Any

import prefect.runtime
from prefect import flow

from flows.artifacts import ImageArtifact, TableArtifact, put_metrics
from flows.catch_up import catches_up
from flows.parameters import flat
from flows.recording import log_to_prefect, recorded_step
from models.progress import Report
from models.settings.fields import StoreSettings
from models.settings.train import TrainSettings
from tasks.train import Trained
from tasks.train import train as train_model


def _train(store: str, settings: TrainSettings, report: Report) -> Trained:
    """Trains; the curves are on the run's page after each epoch, and what a model that makes images has made."""
    curves: list[dict[str, Any]] = []
    artifact = TableArtifact(f"{settings.name}-curves", f"{settings.name}: one row per epoch")

    def on_epoch(row: dict[str, Any]) -> None:
        curves.append(row)
        artifact.put(curves)

    samples = ImageArtifact(f"{settings.name}-samples", f"{settings.name}: made images")

    def on_samples(epoch: int, png: bytes) -> None:
        samples.put(png, f"epoch {epoch}")

    return train_model(store, settings, report, on_epoch, on_samples)


train_step = recorded_step("train", _train)


def _run_name() -> str:
    given = prefect.runtime.flow_run.parameters
    return f"{given['name']} ← {given['dataset']} with {given['model']}"


@flow(name="train", flow_run_name=_run_name, persist_result=False)
@catches_up
@flat(TrainSettings, StoreSettings)
def train(settings: TrainSettings, store: StoreSettings) -> Any:
    """Fine-tune a pretrained model on a data set, export it and measure it."""
    with log_to_prefect():
        trained = train_step(store.store, settings)
        put_metrics(f"{trained.model}-metrics", trained.model, trained.metrics)
        return trained
