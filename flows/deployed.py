"""Partitions as flow runs on a deployment: some at a time, each found again by its idempotency key.

The key names store, table, model and partition, so that two commands at once, or one that was interrupted and started
again, create and wait for the same run. A run that has ended for good is not the end of its partition: as long as the
store says that images have no row, the next attempt has the next key.
"""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings

from flows.partitions import STRIKES, left_open, not_tried, settings_of
from models.errors import NotFound, PixelmillError, TransientError, UsageError
from models.progress import Report, Step
from models.settings.backfill import BackfillSettings
from models.settings.predict import PredictSettings
from tasks.backfill import Done, Partition, Survey, done_of
from tasks.storage import normalise
from tasks.table import Table

log = logging.getLogger("pixelmill")

POLL_S = 2.0
COUNT_EVERY_S = 10.0  # rows, which is a listing of parts
PATIENCE_S = 300.0  # with a server or a store that does not answer, as while it is restarted
WAITING_S = 60.0  # after which a run that no worker took is worth a warning
TRIES = 3  # of a partition whose run failed or crashed, within one command
PAUSE_S = 30.0  # before a partition whose run failed is tried again: the storage may be away
PAGE = 200
ACTIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]

_Answer = TypeVar("_Answer")


def check_server(deployment: str) -> None:
    """Raises UsageError when no server is configured: Prefect would start one of its own, which no worker knows."""
    if not get_current_settings().api.url:
        raise UsageError(f"runs of deployment {deployment} need a Prefect server that they reach: set PREFECT_API_URL")


def run_on_deployment(
    store: str, settings: BackfillSettings, survey: Survey, todo: Sequence[Partition], report: Report
) -> dict[str, str]:
    """Runs the partitions on the deployment of the settings, and says of each that is not complete why.

    Raises UsageError when there is no such deployment, or it refuses the parameters; PixelmillError when Prefect does
    not answer any more. The runs go on without this process.
    """
    with get_client(sync_client=True) as client:
        runs = _Runs(client, store, settings, survey, report)
        try:
            return runs.run(todo)
        except KeyboardInterrupt:
            log.info("runs that have begun go on on their workers; the same command waits for them again")
            raise


class _Runs:
    def __init__(
        self, client: SyncPrefectClient, store: str, settings: BackfillSettings, survey: Survey, report: Report
    ):
        self._client = client
        self._store = normalise(store)
        self._settings = settings
        self._survey = survey
        self._report = report
        self._deployment = self._find(settings.deployment or "")
        self._table = Table(self._store, survey.table)
        self._waiting: deque[Partition] = deque()
        self._running: dict[UUID, Partition] = {}
        self._before: dict[str, Done] = {}
        self._tries: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._strikes = 0  # partitions given up since the last that ended well
        self._problems: dict[str, str] = {}
        self._begun = time.monotonic()
        self._warned = False

    def _find(self, name: str) -> DeploymentResponse:
        try:
            found = _ask(lambda: self._client.read_deployment_by_name(name))
        except ObjectNotFound:
            there = ", ".join(self._known()) or "none of predict"
            raise NotFound(f"Prefect has no deployment {name!r}; deployments there: {there}") from None
        if not found.entrypoint or not found.entrypoint.replace(":", ".").endswith("predict.predict"):
            raise UsageError(f"deployment {name!r} does not run predict; name one that does, like predict/backfill")
        return found

    def _known(self) -> list[str]:
        found = _ask(lambda: self._client.read_deployments(limit=PAGE))
        return sorted(f"predict/{one.name}" for one in found if (one.entrypoint or "").endswith("predict.predict"))

    def run(self, todo: Sequence[Partition]) -> dict[str, str]:
        """Keeps as many partitions at work as the settings allow, until each has ended."""
        self._waiting.extend(todo)
        self._before = self._done(todo)
        count_at = 0.0
        while self._waiting or self._running:
            self._start_some()
            time.sleep(POLL_S)
            self._hear()
            if time.monotonic() >= count_at or not self._running:
                self._count(todo)
                count_at = time.monotonic() + COUNT_EVERY_S
        return self._problems

    def _start_some(self) -> None:
        """As many as may be at work; one that failed waits a while first."""
        for partition in list(self._waiting):
            if len(self._running) >= self._settings.concurrency:
                return
            if time.monotonic() < self._not_before.get(partition.name, 0.0):
                continue
            self._waiting.remove(partition)
            if not self._is_complete(partition):
                self._start(partition)

    def _done(self, partitions: Sequence[Partition]) -> dict[str, Done]:
        """By URI, how far each is."""
        uris = [partition.uri for partition in partitions]
        return _ask(lambda: done_of(self._table, self._survey.model, uris))

    def _is_complete(self, partition: Partition) -> bool:
        """Whether another command of the same kind has done all that was left meanwhile."""
        now = self._done([partition])[partition.uri]
        return 0 < partition.left <= now.rows - self._before[partition.uri].rows and not now.open_shards

    def _start(self, partition: Partition) -> None:
        run = self._active(partition) or self._create(partition)
        self._running[run.id] = partition
        log.info("%s: run %s", partition.name, run.name)

    def _active(self, partition: Partition) -> FlowRun | None:
        """A run of this partition that has not ended, whoever started it: an automation that mends crashes may have."""
        runs = _ask(
            lambda: self._client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    deployment_id=FlowRunFilterDeploymentId(any_=[self._deployment.id]),
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ACTIVE)),
                ),
                limit=PAGE,
            )
        )
        wanted = self._parameters(partition)
        places = ("source", "model", "table", "store")
        same = (run for run in runs if all(run.parameters.get(name) == wanted[name] for name in places))
        return next((run for run in same if run.id not in self._running), None)

    def _create(self, partition: Partition) -> FlowRun:
        """A new run, or the one that another command has just created."""
        base = f"backfill {self._store} {self._survey.table} {self._survey.model} {partition.uri}"
        for attempt in itertools.count(1):
            key = base if attempt == 1 else f"{base} attempt {attempt}"
            run = self._created(partition, key)
            if run.state is None or not run.state.is_final():
                return run
        raise AssertionError("there is always a next attempt")

    def _created(self, partition: Partition, key: str) -> FlowRun:
        try:
            return _ask(
                lambda: self._client.create_flow_run_from_deployment(
                    self._deployment.id,
                    parameters=self._parameters(partition),
                    name=f"{self._survey.table} ← {partition.name} with {self._survey.model}",
                    tags=["backfill"],
                    idempotency_key=key,
                )
            )
        except PrefectHTTPStatusError as error:
            why = " ".join(error.response.text.split())[:300]
            raise UsageError(f"deployment {self._settings.deployment!r} refuses the run: {why}") from None

    def _parameters(self, partition: Partition) -> dict[str, Any]:
        """What differs from the defaults of predict, so that the deployment's own parameters hold for the rest."""
        own = settings_of(self._settings, self._survey, partition)
        given = {name: getattr(own, name) for name in PredictSettings.model_fields}
        changed = {name: value for name, value in given.items() if value != PredictSettings.model_fields[name].default}
        return changed | {"store": self._store, "scope": "source"}

    def _hear(self) -> None:
        """What became of the runs at work."""
        ids = list(self._running)
        found: dict[UUID, FlowRun] = {}
        for start in range(0, len(ids), PAGE):
            some = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))
            runs = _ask(lambda some=some: self._client.read_flow_runs(flow_run_filter=some, limit=PAGE))  # type: ignore[misc]
            found |= {run.id: run for run in runs}
        for run_id in ids:
            run = found.get(run_id)
            if run is None or (run.state is not None and run.state.is_final()):
                self._end(self._running.pop(run_id), run)
        self._warn(found.values())

    def _end(self, partition: Partition, run: FlowRun | None) -> None:
        problem, is_worth_retrying = self._problem(partition, run)
        if not problem:
            self._strikes = 0
            return
        self._tries[partition.name] += 1
        if is_worth_retrying and self._tries[partition.name] < TRIES:
            log.warning("%s is run again: %s", partition.name, problem)
            if run is not None and run.state is not None and run.state.is_failed():
                self._not_before[partition.name] = time.monotonic() + PAUSE_S
            self._waiting.append(partition)
            return
        log.warning("%s: %s", partition.name, problem)
        self._problems[partition.name] = problem
        self._strikes += 1
        if self._strikes == STRIKES:
            self._problems |= not_tried(self._waiting)
            self._waiting.clear()

    def _problem(self, partition: Partition, run: FlowRun | None) -> tuple[str, bool]:
        """What is wrong, "" for nothing, and whether another run may mend it. A run that ended well has claimed all
        that is new; whether all that is claimed has rows, the store says."""
        if run is None or run.state is None:
            return "its flow run was deleted", False
        if not run.state.is_completed():
            text = f"run {run.name} ended as {run.state.name}"
            return f"{text}: {run.state.message}" if run.state.message else text, not run.state.is_cancelled()
        if self._done([partition])[partition.uri].open_shards:
            return f"run {run.name} left shards open", True
        return _ask(lambda: left_open(self._store, self._survey, partition)).get(partition.name, ""), False

    def _warn(self, runs: Any) -> None:
        late = [run for run in runs if run.state_type == StateType.SCHEDULED]
        if late and len(late) == len(self._running) and time.monotonic() - self._begun > WAITING_S and not self._warned:
            pool = self._deployment.work_pool_name
            log.warning("no worker takes the runs; is one up? prefect worker start --pool %s", pool)
            self._warned = True

    def _count(self, todo: Sequence[Partition]) -> None:
        """Reports rows of all partitions."""
        done = self._done(todo)
        had = sum(partition.images - partition.left for partition in todo)
        rows = sum(one.rows for one in done.values())
        total = sum(partition.images for partition in todo)
        ended = len(todo) - len(self._waiting) - len(self._running)
        text = f"{ended} of {len(todo)} partitions, {len(self._running)} at work"
        self._report(Step("images", min(total, max(had, rows)), total, text))


def _ask(request: Callable[[], _Answer]) -> _Answer:
    """What Prefect or the store answers; one that is away is asked again for some minutes. Raises PixelmillError after
    that."""
    started = time.monotonic()
    while True:
        try:
            return request()
        except (httpx.TransportError, PrefectHTTPStatusError, TransientError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                raise
            if time.monotonic() - started > PATIENCE_S:
                if isinstance(error, TransientError):
                    raise
                why = f"{type(error).__name__}: {error}"
                raise PixelmillError(f"the Prefect server does not answer; the runs go on without us: {why}") from None
            away = "the store" if isinstance(error, TransientError) else "the Prefect server"
            log.warning("%s does not answer, trying again", away)
            time.sleep(POLL_S)
