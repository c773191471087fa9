"""One slot of a prediction as a flow of its own, which `predict --runner pool:NAME` gives to the workers of a pool."""

from typing import Any

from prefect import flow
from prefect.states import Failed

from flows.runners.orders import SlotOrder
from flows.runners.remote_slot import work_here


@flow(name="predict-slot", persist_result=False)
def predict_slot(order: dict[str, Any]) -> Any:
    """Work through the open shards of a prediction that was planned elsewhere.

    Args:
        order: What to do, as `predict` wrote it: store, table, model, settings and which of how many slots this is.
    """
    report = work_here(SlotOrder.of(order))
    if report.failed_shards:
        return Failed(message="; ".join(report.failed_shards[:3]))
    return None
