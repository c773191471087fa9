"""Slots as flow runs on a work pool: any worker of Prefect, on any machine, takes one and works as a slot."""

import contextlib
import logging
from collections.abc import Hashable, Iterator
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, WorkerStatus, WorkPool
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling
from prefect.utilities.callables import parameter_schema

from flows.artifacts import slot_updates
from flows.predict_slot import predict_slot
from flows.runners.orders import SlotOrder
from flows.watch import Seldom
from models.errors import PixelmillError, UsageError
from models.settings.predict import PredictSettings
from tasks.slot_report import SlotReport

log = logging.getLogger("pixelmill")


class PoolCrew:
    """The slots of one run on a work pool."""

    def __init__(self, pool: str):
        self._pool = pool
        self._runs: dict[int, FlowRun] = {}  # by slot, as last seen
        self._complain = Seldom(60.0)

    def start(self, orders: list[SlotOrder]) -> None:
        """Creates a flow run for each slot; doing it twice for the same run makes no second one."""
        for order in orders:
            self._runs[order.slot] = run_deployment(  # type: ignore[assignment]
                f"{predict_slot.name}/{self._pool}",
                parameters={"order": order.parameters()},
                flow_run_name=f"{order.planned.table}: slot {order.slot + 1} of {order.slots}",
                idempotency_key=f"{order.run}-slot-{order.slot}",
                timeout=0,
            )

    def ended(self) -> dict[int, SlotReport | PixelmillError | None]:
        """The slots whose flow run has ended; its report does not come back."""
        self._look()
        return {slot: _outcome(run) for slot, run in self._runs.items() if run.state and run.state.is_final()}

    def _look(self) -> None:
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in self._runs.values()]))
        try:
            with get_client(sync_client=True) as client:
                found = {run.id: run for run in client.read_flow_runs(flow_run_filter=wanted, limit=len(self._runs))}
        except httpx.HTTPError as error:  # the slots work on without it
            why = f"{type(error).__name__}: {error}"
            self._complain(lambda: log.warning("the Prefect server does not answer: %s", why))
            return
        self._runs = {slot: found.get(run.id, run) for slot, run in self._runs.items()}

    def signs(self) -> Hashable:
        """The states of the flow runs, and when Prefect's page of each was last changed."""
        states = tuple(run.state and run.state.id for run in self._runs.values())
        return states, slot_updates([run.id for run in self._runs.values()])

    def dismiss(self) -> None:
        """Cancels what has not ended: a worker ends the process or container, and what waits never starts."""
        for run in self._runs.values():
            if not (run.state and run.state.is_final()):
                with contextlib.suppress(Exception), get_client(sync_client=True) as client:
                    client.set_flow_run_state(run.id, Cancelling())


def _outcome(run: FlowRun) -> PixelmillError | None:
    assert run.state is not None
    if run.state.is_completed():
        return None
    message = (run.state.message or "").replace("Flow run encountered an exception: ", "")
    kind, _, reason = message.partition(": ")
    message = reason if reason and kind.endswith("Error") else message
    message = message.partition(". ")[0] if run.state.is_crashed() else message  # then Prefect's advice
    return PixelmillError(f"{run.state.name}: {' '.join(message.split())}")


@contextlib.contextmanager
def pool_crew(settings: PredictSettings) -> Iterator[PoolCrew]:
    """A crew on the pool of --runner pool:NAME, whose deployment of `predict-slot` is made when it has none.

    Raises PixelmillError when there is no such pool, or nobody works for it.
    """
    name = settings.runner.partition(":")[2]
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            known = ", ".join(sorted(found.name for found in client.read_work_pools())) or "none yet"
            raise UsageError(f"no work pool {name!r} at {client.api_url}; pools there: {known}") from None
        _check_is_worked_for(client, pool)
        _deployment(client, pool)
    yield PoolCrew(name)


def _check_is_worked_for(client: SyncPrefectClient, pool: WorkPool) -> None:
    if pool.is_paused:
        raise PixelmillError(f"work pool {pool.name} is paused: prefect work-pool resume {pool.name}")
    if pool.is_push_pool or pool.is_managed_pool:
        return
    workers = client.read_workers_for_work_pool(pool.name)
    if not any(worker.status == WorkerStatus.ONLINE for worker in workers):
        raise PixelmillError(
            f"no worker of work pool {pool.name} is online: start one on each machine, "
            f"prefect worker start --pool {pool.name}"
        )


def _deployment(client: SyncPrefectClient, pool: WorkPool) -> UUID:
    """The deployment predict-slot/POOL; one that is there is used as it is, with the job variables that it has."""
    try:
        return client.read_deployment_by_name(f"{predict_slot.name}/{pool.name}").id
    except ObjectNotFound:
        return client.create_deployment(
            client.create_flow(predict_slot),
            pool.name,
            work_pool_name=pool.name,
            entrypoint=f"{predict_slot.fn.__module__}.{predict_slot.fn.__name__}",
            parameter_openapi_schema=parameter_schema(predict_slot).model_dump(),
            description=predict_slot.description,
        )
