"""vacuum as a Prefect flow of one task, for a schedule."""

from typing import Any

from prefect import flow

from flows.catch_up import catches_up
from flows.parameters import flat
from flows.recording import log_to_prefect, recorded_step
from models.settings.fields import StoreSettings
from models.settings.vacuum import VacuumSettings
from tasks.vacuum import vacuum as vacuum_store

vacuum_step = recorded_step("vacuum", vacuum_store)


@flow(name="vacuum", persist_result=False)
@catches_up
@flat(VacuumSettings, StoreSettings)
def vacuum(settings: VacuumSettings, store: StoreSettings) -> Any:
    """Show, or delete, what killed runs and old model versions left behind."""
    with log_to_prefect():
        return vacuum_step(store.store, settings)
