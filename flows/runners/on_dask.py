"""Slots on a Dask cluster, through prefect-dask: one task per slot, spread over the machines of its workers."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import dask
import distributed
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect_dask import DaskTaskRunner

from flows.runners.cluster import ANSWER_S, Cluster, check_answers, check_prefect_is_seen, told
from flows.runners.orders import SlotOrder
from flows.runners.remote_slot import work_here
from models.errors import PixelmillError
from models.settings.predict import PredictSettings
from tasks.slot_report import SlotReport


def _work(parameters: dict[str, Any], neighbours: int) -> SlotReport:
    """One slot, in a thread of a Dask worker, on its share of the machine that `neighbours` slots use."""
    worker = distributed.get_worker()
    key = worker.get_current_task()

    def is_wanted() -> bool:
        """Not after the run has cancelled it or gone away: Dask forgets a thread that runs, but does not end it."""
        state = worker.state.tasks.get(key)
        return state is not None and state.state == "executing"

    return work_here(SlotOrder.of(parameters), 1 / neighbours, is_wanted)


work = task(name="work", cache_policy=NO_CACHE, persist_result=False)(_work)


class DaskCrew(Cluster):
    """The slots of one run on a Dask cluster that the runner is connected to."""

    def __init__(self, runner: DaskTaskRunner, workers: dict[str, dict[str, Any]], slots: int, gpus: float):
        """`workers`: what the scheduler knows of each, by address; `gpus`: kept free for each slot."""
        super().__init__()
        self._runner = runner
        self._places = places(workers, slots)
        self._hosts = {address: worker["host"] for address, worker in workers.items()}
        self._resources = {"GPU": gpus} if gpus else {}

    def submit(self, order: SlotOrder) -> PrefectFuture[Any]:
        """Hands one slot to its worker, or to another one should that be gone."""
        named = work.with_options(task_run_name=f"slot {order.slot + 1} of {order.slots}")
        place = self._places[order.slot]
        hosts = [self._hosts[address] for address in self._places[: order.slots]]
        given = {"parameters": order.parameters(), "neighbours": hosts.count(self._hosts[place])}
        with dask.annotate(workers=[place], allow_other_workers=True, resources=self._resources):
            return self._runner.submit(named, given)

    def is_done(self, future: PrefectFuture[Any]) -> bool:
        """Whether Dask has an answer."""
        return future.wrapped_future.done()  # type: ignore[attr-defined]

    def cancel(self, future: PrefectFuture[Any]) -> None:
        """Takes the slot back; where it runs, it notices."""
        future.wrapped_future.cancel(force=True)  # type: ignore[attr-defined]


def places(workers: dict[str, dict[str, Any]], slots: int) -> list[str]:
    """The worker for each slot: always on the machine with the fewest slots per thread, there the emptiest."""
    threads: Counter[str] = Counter()
    for worker in workers.values():
        threads[worker["host"]] += worker["nthreads"]
    on_host: Counter[str] = Counter()
    on_worker: Counter[str] = Counter()
    chosen = []
    for _ in range(slots):
        address = min(
            workers,
            key=lambda name: (
                on_host[workers[name]["host"]] / threads[workers[name]["host"]],
                on_worker[name] / workers[name]["nthreads"],
            ),
        )
        on_host[workers[address]["host"]] += 1
        on_worker[address] += 1
        chosen.append(address)
    return chosen


@contextlib.contextmanager
def dask_crew(settings: PredictSettings) -> Iterator[DaskCrew]:
    """A crew on the cluster of --cluster or DASK_SCHEDULER_ADDRESS, else on one of this machine that lasts as long as
    the run.
    """
    address = settings.cluster or os.environ.get("DASK_SCHEDULER_ADDRESS") or ""
    if address:
        check_answers(address)
        runner = DaskTaskRunner(address=address, client_kwargs={"timeout": ANSWER_S})
    else:  # the work, and so the memory that would have to be watched, is in the child of each worker
        local = {"n_workers": settings.slots, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
        runner = DaskTaskRunner(cluster_class="distributed.LocalCluster", cluster_kwargs=local)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(runner)
            workers = runner.client.scheduler_info(n_workers=-1)["workers"]
            if not workers:
                raise PixelmillError(f"the Dask cluster at {address} has no workers: start some, dask worker {address}")
            runner.client.get_versions(check=True)
        except PixelmillError:
            raise
        except Exception as error:  # OSError: nobody there; ValueError: versions differ
            raise PixelmillError(f"Dask at {address or 'this machine'} does not take us: {told(error)}") from None
        check_prefect_is_seen({worker["host"] for worker in workers.values()}, distributed.utils.get_ip())
        yield DaskCrew(runner, workers, settings.slots, _gpus(settings, workers))


def _gpus(settings: PredictSettings, workers: dict[str, dict[str, Any]]) -> float:
    """GPUs for each slot: as asked, else 1 where the model shall or may run on one.

    Raises PixelmillError when no worker has so many.
    """
    offered = [worker["resources"].get("GPU", 0) for worker in workers.values()]
    gpus = settings.gpus_per_slot
    if gpus is None:
        is_likely = settings.device == "auto" and sum(offered) >= settings.slots
        gpus = 1.0 if settings.device == "cuda" or is_likely else 0.0
    if gpus > max(offered):
        raise PixelmillError(
            f"no Dask worker offers {gpus:g} GPU: start them with --resources GPU=1, or say --gpus-per-slot 0"
        )
    return gpus
