"""What scheduled runs do about each other: a gap is caught up by one run, and no two runs compute the same.

Prefect keeps every scheduled run of an outage and starts them all when its workers return. Each of ours does all that
is new, whatever the gap, so only the one that was due last has something to do: one that starts earlier cancels the
others and ends at once.
"""

import functools
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import prefect.runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import State

from models.settings.fields import StoreSettings
from models.settings.predict import PredictSettings

log = logging.getLogger("pixelmill")

Function = Callable[..., Any]
SUPERSEDED = "Superseded"  # the state's name, on Prefect's pages
PAGE = 200  # runs; Prefect gives no more at once
HEARTBEATS_MISSED = 3


def catches_up(function: Function) -> Function:
    """Lets a scheduled run end at once, and cancel its kind, when a later one of the same schedule is due as well."""

    @functools.wraps(function)
    def caught_up(*values: Any, **given: Any) -> Any:
        return _superseded() or function(*values, **given)

    return caught_up


def _superseded() -> State | None:
    """The final state of a run that need not work; None for one that must: the last one due, or one by hand."""
    if not prefect.runtime.deployment.id:
        return None
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(prefect.runtime.flow_run.id)
        if not own.auto_scheduled or own.deployment_id is None:
            return None
        due = due_with(client, own)
        last = next((run for run in due if _comes_after(run, own)), None)
        if last is None:
            return None
        message = f"one run catches up for all that were due: {last.name} of {last.expected_start_time}"
        for run in due:
            if run.id != last.id and run.state_type == StateType.SCHEDULED:
                _cancel(client, run, message)
    log.info("%s", message)
    return State(type=StateType.COMPLETED, name=SUPERSEDED, message=message)


def due_with(client: SyncPrefectClient, own: FlowRun) -> list[FlowRun]:
    """The other runs of the same schedule that are due, waiting or at work, the last one first."""
    assert own.deployment_id is not None
    now: Any = datetime.now(UTC)  # Prefect's own type of it differs from Python to Python
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[own.deployment_id]),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=now),
            state=FlowRunFilterState(
                type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING])
            ),
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=PAGE,
    )
    return [run for run in found if run.id != own.id and run.auto_scheduled and run.parameters == own.parameters]


def _comes_after(run: FlowRun, own: FlowRun) -> bool:
    """Two that are due at the same moment must agree on which of them works."""
    assert run.expected_start_time is not None
    assert own.expected_start_time is not None
    return (run.expected_start_time, run.id) > (own.expected_start_time, own.id)


def _cancel(client: SyncPrefectClient, run: FlowRun, message: str) -> None:
    try:
        client.set_flow_run_state(run.id, State(type=StateType.CANCELLED, name=SUPERSEDED, message=message))
    except ObjectNotFound:  # deleted meanwhile
        log.debug("a superseded run is gone: %s", run.name)


def others_at_work() -> list[FlowRun]:
    """The other predict runs that are at work and may have shards in hand that this one would take.

    These are the runs into the same table with the same model, unless each keeps to another source. One whose
    heartbeats have ceased is dead, whatever its state says: its shards are to be finished.
    """
    own = prefect.runtime.flow_run.id
    with get_client(sync_client=True) as client:
        parameters = client.read_flow_run(own).parameters
        running = [run for run in running_predicts(client) if may_meet(parameters, run.parameters)]
        return [run for run in running if str(run.id) != str(own) and not is_dead(client, run)]


def running_predicts(client: SyncPrefectClient) -> list[FlowRun]:
    """All runs of predict that Prefect says are running."""
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["predict"])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
            ),
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return found


def is_dead(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a run sent heartbeats, and then none for three of their periods. One that sent none may have none."""
    beats = client.read_events(
        EventFilter(
            event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        ),
        limit=2,
    ).events
    if not beats:
        return False
    configured = get_current_settings().flows.heartbeat_frequency or 0
    # Where the run is at work the period may be another one: the time between its beats says.
    period_s = max(configured, (beats[0].occurred - beats[-1].occurred).total_seconds())
    return (datetime.now(UTC) - beats[0].occurred).total_seconds() > HEARTBEATS_MISSED * period_s > 0


def may_meet(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether runs with these parameters may take the same shards; what a run was not given is as by default."""
    one, other = _defaults() | one, _defaults() | other

    def same(name: str) -> bool:
        return str(one[name]).rstrip("/") == str(other[name]).rstrip("/")

    # NAME may be the very version that NAME@production is.
    same_model = one["model"].partition("@")[0] == other["model"].partition("@")[0]
    apart = one["scope"] == other["scope"] == "source" and not same("source")
    return same("store") and same("table") and same_model and not apart


def _defaults() -> dict[str, Any]:
    fields = PredictSettings.model_fields | StoreSettings.model_fields
    return {name: "" if field.is_required() else field.default for name, field in fields.items()}
