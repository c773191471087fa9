"""pipeline as a Prefect flow: a task for each step, and predict as a flow within it."""

from typing import Any

import prefect.runtime
from prefect import flow

from flows import chain
from flows.artifacts import put_metrics
from flows.evaluate import evaluate_step, put_evaluation
from flows.export import export_step
from flows.ingest import ingest_step, put_ingested
from flows.parameters import flat
from flows.predict import predict
from flows.recording import log_to_prefect
from flows.train import train_step
from models.settings.fields import StoreSettings
from models.settings.pipeline import PipelineSettings


def _run_name() -> str:
    given = prefect.runtime.flow_run.parameters
    return f"{given['name']}: {given['model']} → {given['table']}"


@flow(name="pipeline", flow_run_name=_run_name, persist_result=False)
@flat(PipelineSettings, StoreSettings)
def pipeline(settings: PipelineSettings, store: StoreSettings) -> Any:
    """From a labelled source to a table of predictions: ingest, train, export, evaluate, predict."""
    steps = chain.Steps(
        ingest_step,
        train_step,
        export_step,
        evaluate_step,
        lambda store, settings: predict(store=store, **settings.model_dump()),
    )
    with log_to_prefect():
        done = chain.pipeline(store.store, settings, steps)
        put_ingested(done.ingest)
        put_metrics(f"{done.train.model}-metrics", done.train.model, done.train.metrics)
        if done.evaluate is not None:
            put_evaluation(done.evaluate)
        return done
