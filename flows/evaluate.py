"""evaluate as a Prefect flow of one task."""

from typing import Any

import prefect.runtime
from prefect import flow

from flows.artifacts import put_metrics
from flows.catch_up import catches_up
from flows.parameters import flat
from flows.recording import log_to_prefect, recorded_step
from models.settings.export import EvaluateSettings
from models.settings.fields import StoreSettings
from tasks.evaluate import Evaluation
from tasks.evaluate import evaluate as evaluate_model

evaluate_step = recorded_step("evaluate", evaluate_model)


def put_evaluation(evaluation: Evaluation) -> None:
    """The figures as tables on the run's page."""
    title = f"{evaluation.model} on {evaluation.dataset}, {evaluation.split}"
    put_metrics(title, title, evaluation.metrics)


def _run_name() -> str:
    given = prefect.runtime.flow_run.parameters
    return f"{given['model']} on {given['dataset']}, {given['split']}"


@flow(name="evaluate", flow_run_name=_run_name, persist_result=False)
@catches_up
@flat(EvaluateSettings, StoreSettings)
def evaluate(settings: EvaluateSettings, store: StoreSettings) -> Any:
    """Measure a model on a split of a data set, through the same path that predicts."""
    with log_to_prefect():
        evaluation = evaluate_step(store.store, settings)
        put_evaluation(evaluation)
        return evaluation
