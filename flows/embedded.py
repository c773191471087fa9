"""Runs the flow from the command line: on the configured Prefect server, or one that lives as long as the command."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.watch import Watch
from models.settings import PredictSettings
from tasks.server import ENVIRONMENT, EmbeddedServer

if TYPE_CHECKING:
    from tasks.predict import Summary


def predict_recorded(store: str, settings: PredictSettings, watch: Watch) -> "Summary":
    """Runs the flow `predict` in this process; Prefect records it."""
    with prefect_api():
        from flows import predict as recorded

        recorded.watch.set(watch)
        return recorded.predict(store=store, **settings.model_dump())


@contextlib.contextmanager
def prefect_api() -> Iterator[None]:
    """While it lasts, Prefect has a server to talk to, and it is complete afterwards."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Our own lines are on the terminal already; Prefect's, with tracebacks of user mistakes, go to its server only.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    server = EmbeddedServer()
    try:
        if not os.environ.get("PREFECT_API_URL"):
            server.start()
        from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

        if get_current_settings().api.url:  # the environment or a profile names a server
            server.stop()
            yield
            return
        with temporary_settings({PREFECT_API_URL: server.url()}):
            try:
                yield
            finally:
                _drain()
    finally:
        server.stop()


def _drain() -> None:
    """Sends what Prefect's background threads still hold: events, which carry the states of tasks, and logs."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all()
    APILogWorker.drain_all()
