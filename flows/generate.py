"""generate as a Prefect flow of one task."""

from typing import Any

import prefect.runtime
from prefect import flow

from flows.artifacts import put_facts
from flows.parameters import flat
from flows.recording import log_to_prefect, recorded_step
from models.settings.fields import StoreSettings
from models.settings.generate import GenerateSettings
from tasks.generate import Generated
from tasks.generate import generate as make_images

generate_step = recorded_step("generate", make_images)


def _run_name() -> str:
    given = prefect.runtime.flow_run.parameters
    return f"{given['count']} images of {given['model']}"


def put_generated(generated: Generated) -> None:
    """The table at the end of a run."""
    facts = {
        "out": generated.out,
        "images": generated.images,
        "made by this run": generated.new,
        "seed": generated.seed,
        "data set": generated.dataset or "",
        **{f"class {name}": count for name, count in generated.classes.items()},
    }
    put_facts(f"{generated.model}-generated", generated.model, facts)


@flow(name="generate", flow_run_name=_run_name, persist_result=False)
@flat(GenerateSettings, StoreSettings)
def generate(settings: GenerateSettings, store: StoreSettings) -> Any:
    """Make images with a generator; as a data set, too."""
    with log_to_prefect():
        generated = generate_step(store.store, settings)
        put_generated(generated)
        return generated
