"""ingest as a Prefect flow of one task."""

from typing import Any

import prefect.runtime
from prefect import flow

from flows.artifacts import put_facts
from flows.catch_up import catches_up
from flows.parameters import flat
from flows.recording import log_to_prefect, recorded_step
from models.settings.fields import StoreSettings
from models.settings.ingest import IngestSettings
from tasks.datasets.ingest import Ingested
from tasks.datasets.ingest import ingest as make_dataset

ingest_step = recorded_step("ingest", make_dataset)


def _run_name() -> str:
    given = prefect.runtime.flow_run.parameters
    return f"{given['name']} ← {str(given['source']).rstrip('/').rsplit('/', 1)[-1]}"


def put_ingested(ingested: Ingested) -> None:
    """The table at the end of a run."""
    facts = {
        "format": ingested.saw,
        "images": ingested.images,
        "annotations": ingested.annotations,
        "rejected": ingested.rejected,
        "classes": ", ".join(ingested.classes),
        **{f"split {name}": count for name, count in ingested.splits.items()},
    }
    put_facts(f"{ingested.dataset}-ingested", ingested.dataset, facts)


@flow(name="ingest", flow_run_name=_run_name, persist_result=False)
@catches_up
@flat(IngestSettings, StoreSettings)
def ingest(settings: IngestSettings, store: StoreSettings) -> Any:
    """Turn a labelled folder, bucket prefix or archive into a versioned data set."""
    with log_to_prefect():
        ingested = ingest_step(store.store, settings)
        put_ingested(ingested)
        return ingested
