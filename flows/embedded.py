"""Runs the flow from the command line: on the configured Prefect server, or one that lives as long as the command."""

import contextlib
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from flows.watch import Watch
from models.errors import PixelmillError, UsageError
from models.settings.fields import Settings
from tasks.server import ENVIRONMENT, EmbeddedServer

DRAIN_S = 20.0


def run_recorded(name: str, store: str, settings: Settings, watch: Watch) -> Any:
    """Runs the flow of that name, flows.NAME:NAME, in this process; Prefect records it."""
    pool = getattr(settings, "runner", "").partition(":")[2]
    deployment = getattr(settings, "deployment", None)
    others = f"workers of pool {pool}" if pool else f"runs of deployment {deployment}" if deployment else ""
    with prefect_api(f"flows.{name}", others):
        import httpx

        from flows import recording

        recording.watch.set(watch)
        flow = getattr(import_module(f"flows.{name}"), name)
        try:
            return flow(store=store, **settings.model_dump())
        except (httpx.HTTPError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "reach API" not in str(error):
                raise
            why = f"{type(error).__name__}: {error}"
            raise PixelmillError(f"the Prefect server does not work with us; --direct does without: {why}") from None


@contextlib.contextmanager
def prefect_api(flow_module: str, others: str = "") -> Iterator[None]:
    """While it lasts, Prefect has a server to talk to, and it is complete afterwards.

    `others`: who has to reach that server too, so that one of this command's own does not do.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Our own lines are on the terminal already; Prefect's, with tracebacks of user mistakes, go to its server only.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    server = EmbeddedServer()
    try:
        if not os.environ.get("PREFECT_API_URL"):
            server.start()
        from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

        import_module(flow_module)  # while the server starts

        if get_current_settings().api.url:  # the environment or a profile names a server
            server.stop()
            yield
            return
        if others:
            raise UsageError(f"{others} need a Prefect server that they reach: set PREFECT_API_URL to its address")
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

    EventsWorker.drain_all(timeout=DRAIN_S)
    APILogWorker.drain_all(timeout=DRAIN_S)
