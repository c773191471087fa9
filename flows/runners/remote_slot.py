"""A slot on the machine on which it runs: what it checks before it works, and what it tells Prefect meanwhile."""

import os
from collections.abc import Callable

from flows.artifacts import SlotArtifact
from flows.recording import log_to_prefect
from flows.runners.orders import SlotOrder, our_version
from models.errors import PixelmillError
from tasks import predict as steps
from tasks.sight import check_sight
from tasks.slot_report import SlotReport
from tasks.table import Table
from tasks.work import cores


def work_here(order: SlotOrder, share: float = 1.0, is_wanted: Callable[[], bool] = lambda: True) -> SlotReport:
    """Works through open shards until none is left, inside a flow run or task run of Prefect.

    `share`: of this machine's cores, 0 to 1. Raises PixelmillError in one line when this machine cannot do what it is
    told, Stopped when the slot is not wanted any more.
    """
    with log_to_prefect():
        check_version(order.version)
        check_sight(Table(order.store, order.planned.table), order.planned.model, order.planned.plans)
        artifact = SlotArtifact(order.planned.table, order.slot, order.slots)
        report = steps.work(
            order.store,
            order.settings,
            order.planned,
            order.slot,
            order.slots,
            artifact.hear,
            is_wanted,
            threads=max(1, round(cores() * share)),
            run=order.run,
        )
        artifact.finish(report)
        return report


def check_version(wanted: str) -> None:
    """Raises PixelmillError when the run was started by another version than is installed here."""
    ours = our_version()
    if ours and wanted and ours != wanted:
        raise PixelmillError(
            f"{os.uname().nodename} has pixelmill {ours}, the run was started by {wanted}: install the same on both"
        )
