"""backfill as a Prefect flow: a survey task, then one run of predict for each partition, here or on a deployment."""

from typing import Any

import prefect.runtime
from prefect import flow
from prefect.states import Failed

from flows import deployed, partitions
from flows.artifacts import StepArtifact, TableArtifact
from flows.parameters import flat
from flows.predict import predict
from flows.recording import log_to_prefect, recorded_step, watch
from models.progress import Step
from models.settings.backfill import BackfillSettings
from models.settings.fields import StoreSettings
from tasks.backfill import Survey, survey

survey_step = recorded_step("survey", survey)


def _run_name() -> str:
    given = prefect.runtime.flow_run.parameters
    return f"{given['table']} ← {given['partitions']} with {given['model']}"


def put_partitions(done: partitions.Backfilled) -> None:
    """A row for each partition, on the run's page."""
    rows = [
        {"partition": one.partition, "images": one.images, "rows": one.rows, "state": one.state, "problem": one.problem}
        for one in done.partitions
    ]
    TableArtifact(f"{done.table}-partitions", f"{done.table} ← {done.model}").put(rows)


def put_survey(found: Survey) -> Survey:
    """What there is to do, a row for each partition, on the run's page."""
    rows = [
        {"partition": one.name, "images": one.images, "bytes": one.bytes, "new": one.new, "open": one.open}
        for one in found.partitions
    ]
    TableArtifact(f"{found.table}-survey", f"{found.table} ← {found.model}").put(rows)
    return found


@flow(name="backfill", flow_run_name=_run_name, persist_result=False)
@flat(BackfillSettings, StoreSettings)
def backfill(settings: BackfillSettings, store: StoreSettings) -> Any:
    """Predict partition by partition, each in a flow run of its own; what is complete is passed over."""
    if settings.plan_only:
        with log_to_prefect():
            return put_survey(survey_step(store.store, settings))
    artifact = StepArtifact("backfill")

    def hear(step: Step) -> None:
        watch.get().step(step)
        artifact.hear(step)

    here = partitions.run_here(lambda store, settings: predict(store=store, **settings.model_dump()))
    run = deployed.run_on_deployment if settings.deployment else here
    try:
        with log_to_prefect():
            done = partitions.backfill(store.store, settings, survey_step, run, hear)
    except partitions.Unfinished as error:
        put_partitions(error.done)
        return Failed(message=str(error), data=error)
    artifact.finish()
    put_partitions(done)
    return done
