"""export as a Prefect flow of one task."""

from typing import Any

import prefect.runtime
from prefect import flow

from flows.parameters import flat
from flows.recording import log_to_prefect, recorded_step
from models.settings.export import ExportSettings
from models.settings.fields import StoreSettings
from tasks.export import export as export_model

export_step = recorded_step("export", export_model)


def _run_name() -> str:
    given = prefect.runtime.flow_run.parameters
    return f"{given['model']} as {given['precision']}"


@flow(name="export", flow_run_name=_run_name, persist_result=False)
@flat(ExportSettings, StoreSettings)
def export(settings: ExportSettings, store: StoreSettings) -> Any:
    """Export a model to ONNX; published only when it agrees with PyTorch, or its metric holds."""
    with log_to_prefect():
        return export_step(store.store, settings)
