"""The crew that --runner names, connected before anything is planned; each engine is imported only when it is named."""

import contextlib
from collections.abc import Iterator
from importlib import import_module

from flows.runners.crew import Crew
from models.errors import UsageError
from models.settings.predict import PredictSettings

PACKAGES = {"ray": ("prefect_ray", "ray"), "dask": ("prefect_dask", "distributed", "dask")}


@contextlib.contextmanager
def crew_of(settings: PredictSettings) -> Iterator[Crew]:
    """Raises UsageError when the engine is not installed, PixelmillError in one line when it does not take us."""
    runner = settings.runner.partition(":")[0]
    try:
        make = getattr(import_module(f"flows.runners.on_{runner}"), f"{runner}_crew")
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES.get(runner, ()):
            raise
        raise UsageError(
            f"--runner {runner} needs prefect-{runner}: pip install prefect-{runner}, here and on each machine"
        ) from None
    with make(settings) as crew:
        yield crew
