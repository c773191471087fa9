"""predict as a Prefect flow: a plan task, one long work task per slot, a summary task.

Prefect shows and schedules; it decides nothing. A shard is retried in its slot, and whether the run succeeded is read
off the store, so no task has retries here and no result is kept. Only names and numbers travel between tasks.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import prefect.runtime
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.states import Failed

from flows import order, recording
from flows.artifacts import SlotArtifact, put_summary
from flows.catch_up import catches_up, others_at_work
from flows.parameters import flat
from flows.recording import log_to_prefect
from flows.runners.choose import crew_of
from flows.runners.crew import work_elsewhere
from models.settings.fields import StoreSettings
from models.settings.predict import PredictSettings
from tasks import predict as steps
from tasks.slot_report import SlotProgress, SlotReport

log = logging.getLogger("pixelmill")


def _run_name(model: str = "") -> str:
    given = prefect.runtime.flow_run.parameters
    source = str(given["source"]).rstrip("/").rsplit("/", 1)[-1]
    return f"{given['table']} ← {source} with {model or given['model']}"


@task(name="plan", task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def plan(store: str, settings: PredictSettings) -> steps.Planned:
    """Lists the source and claims what is new.

    A run of a deployment leaves shards alone that another run may have in hand: there is no lock, so to help with them
    is to compute some of them twice.
    """
    others: steps.Others = "help"
    if prefect.runtime.deployment.id:
        at_work = others_at_work()
        others = "leave" if at_work else "finish"
        for run in at_work:
            log.info("%s is at work on this table: only what is new is done here", run.name)
    planned = steps.plan(store, settings, recording.watch.get().listed, others)
    with get_client(sync_client=True) as client:  # only now it is known which version is meant
        client.update_flow_run(prefect.runtime.flow_run.id, name=_run_name(planned.model))
    log.info("%d listed, %d new, %d open", planned.listed, planned.planned, planned.open_images)
    return planned


@task(name="work", cache_policy=NO_CACHE, persist_result=False)
def work(store: str, settings: PredictSettings, planned: steps.Planned, slot: int, slots: int) -> SlotReport:
    """Works through open shards, as one of so many slots."""
    artifact = SlotArtifact(planned.table, slot, slots)

    def hear(progress: SlotProgress) -> None:
        recording.watch.get().progress(progress)
        artifact.hear(progress)

    report = steps.work(store, settings, planned, slot, slots, hear)
    artifact.finish(report)
    return report


@task(name="summary", task_run_name="summary", cache_policy=NO_CACHE, persist_result=False)
def summarise(
    store: str, settings: PredictSettings, planned: steps.Planned, reports: list[SlotReport], seconds: float
) -> steps.Summary:
    """Says what the run did."""
    summary = steps.summarise(store, settings, planned, reports, seconds)
    put_summary(summary)
    return summary


def _work_here(store: str, settings: PredictSettings, planned: steps.Planned, slots: int) -> Sequence[order.Running]:
    return [
        work.with_options(task_run_name=f"slot {slot + 1} of {slots}").submit(store, settings, planned, slot, slots)
        for slot in range(slots)
    ]


@contextlib.contextmanager
def _working(settings: PredictSettings) -> Iterator[order.StartWork]:
    """How the slots are started: in this process, or by a crew elsewhere, which has ended with its context."""
    if settings.runner == "local":
        yield _work_here
        return
    with crew_of(settings) as crew:
        run = f"{prefect.runtime.flow_run.id}-{prefect.runtime.flow_run.run_count}"  # a retry needs slots of its own
        yield lambda store, settings, planned, slots: work_elsewhere(
            crew, store, settings, planned, slots, run, recording.watch.get().progress
        )


@flow(name="predict", flow_run_name=_run_name, persist_result=False)
@catches_up
@flat(PredictSettings, StoreSettings)
def predict(settings: PredictSettings, store: StoreSettings) -> Any:
    """Run a model over a folder or bucket of images; one row per image in a table."""
    try:
        with log_to_prefect(), _working(settings) as start_work:
            return order.predict(store.store, settings, order.Steps(plan, start_work, summarise))
    except order.Incomplete as error:
        return Failed(message=str(error), data=error)
