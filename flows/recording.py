"""What every Prefect flow shares: who hears of its progress, its log on Prefect's pages, and one step as a task."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging.handlers import APILogHandler

from flows.artifacts import StepArtifact
from flows.watch import Lines, Watch
from models.progress import Report, Step

log = logging.getLogger("pixelmill")

# Who hears of the progress besides Prefect's pages: its logs, or the terminal of the command line.
watch: ContextVar[Watch] = ContextVar("watch", default=Lines(60.0))  # noqa: B039 - it is replaced, not changed


@contextlib.contextmanager
def log_to_prefect() -> Iterator[None]:
    """Lets our log lines reach the run's page, whatever PREFECT_LOGGING_EXTRA_LOGGERS says where this runs."""
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if any(isinstance(handler, APILogHandler) for handler in log.handlers):
        yield
        return
    handler = APILogHandler()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def recorded_step(name: str, function: Callable[[str, Any, Report], Any]) -> Callable[[str, Any], Any]:
    """A Prefect task of a function of (store, settings, report); its progress is an artifact, updated in place.

    Nothing is retried or cached by Prefect: each step finds by itself what it has done already.
    """

    @task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def run(store: str, settings: Any) -> Any:
        artifact = StepArtifact(name)

        def hear(step: Step) -> None:
            watch.get().step(step)
            artifact.hear(step)

        result = function(store, settings, hear)
        artifact.finish()
        return result

    return run
