"""Slots on a Ray cluster, through prefect-ray: Ray keeps GPUs and cores free for each, and finds the machines."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

from flows.runners.cluster import Cluster, check_answers, check_prefect_is_seen, told
from flows.runners.orders import SlotOrder
from flows.runners.remote_slot import work_here
from models.errors import PixelmillError
from models.settings.predict import PredictSettings
from tasks.slot_report import SlotReport
from tasks.work import cores

log = logging.getLogger("pixelmill")

LIVES = 3  # times that Ray may start a slot again after its machine died, when there is room
CANCEL_S = 5.0  # for a slot to end its child process


def _work(parameters: dict[str, Any]) -> SlotReport:
    """One slot, in a process of Ray, on as many cores as Ray keeps free for it."""
    reserved = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return work_here(SlotOrder.of(parameters), min(1.0, reserved / cores()))


work = task(name="work", cache_policy=NO_CACHE, persist_result=False)(_work)


class RayCrew(Cluster):
    """The slots of one run on a Ray cluster that this process is connected to."""

    def __init__(self, runner: RayTaskRunner, cpus: float, gpus: float):
        """`cpus`, `gpus`: kept free for each slot."""
        super().__init__()
        self._runner = runner
        # Without max_calls=0 Ray ends the process of a GPU task after each task; with it the model's process is ours.
        self._options = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_calls": 0,
            "max_retries": LIVES,
            "scheduling_strategy": "SPREAD",
        }

    def submit(self, order: SlotOrder) -> PrefectFuture[Any]:
        """Hands one slot to Ray."""
        named = work.with_options(task_run_name=f"slot {order.slot + 1} of {order.slots}")
        with remote_options(**self._options):
            return self._runner.submit(named, {"parameters": order.parameters()})

    def is_done(self, future: PrefectFuture[Any]) -> bool:
        """Whether Ray has an answer."""
        done, _ = ray.wait([future.wrapped_future], timeout=0)  # type: ignore[attr-defined]
        return bool(done)

    def cancel(self, future: PrefectFuture[Any]) -> None:
        """Interrupts the slot as Ctrl-C would, and ends its process if that does not help."""
        reference = future.wrapped_future  # type: ignore[attr-defined]
        ray.cancel(reference, force=False)
        done, _ = ray.wait([reference], timeout=CANCEL_S)
        if not done:
            ray.cancel(reference, force=True)


@contextlib.contextmanager
def ray_crew(settings: PredictSettings) -> Iterator[RayCrew]:
    """A crew on the cluster of --cluster or RAY_ADDRESS, else on one of this machine that lasts as long as the run."""
    address = settings.cluster or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": False, "num_cpus": cores()}
    elif address != "auto":
        check_answers(address)
    # A slot that asks for no GPU runs where none is looked for; Ray need not hide them, and warns that it will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    runner = RayTaskRunner(init_kwargs=options)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(runner)
        except Exception as error:  # RuntimeError, ConnectionError, ValueError: versions, addresses, passwords
            raise PixelmillError(f"Ray at {address} does not take us: {told(error)}") from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        check_prefect_is_seen(addresses, ray.util.get_node_ip_address())
        gpus = _gpus(settings, nodes)
        cpus = _cpus(settings.slots, gpus, nodes)
        if not _room(cpus, gpus, nodes):
            log.warning("no machine of the Ray cluster has %g GPUs and %g cores: waiting for one", gpus, cpus)
        yield RayCrew(runner, cpus, gpus)


def _gpus(settings: PredictSettings, nodes: list[dict[str, float]]) -> float:
    """GPUs for each slot: as asked, else 1 where the model shall or may run on one."""
    if settings.gpus_per_slot is not None:
        return settings.gpus_per_slot
    has_enough = sum(node.get("GPU", 0) for node in nodes) >= settings.slots
    return 1.0 if settings.device == "cuda" or (settings.device == "auto" and has_enough) else 0.0


def _cpus(slots: int, gpus: float, nodes: list[dict[str, float]]) -> float:
    """The most cores for each slot with which all find room at once."""
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    for cpus in [*range(most, 0, -1), *(1 / parts for parts in range(2, 17))]:
        if _room(cpus, gpus, nodes) >= slots:
            return round(cpus, 2)
    return 1.0


def _room(cpus: float, gpus: float, nodes: list[dict[str, float]]) -> int:
    """How many slots the nodes have room for."""
    return sum(
        int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else node.get("CPU", 0) / cpus))
        for node in nodes
    )
