"""The order of doctor: the embedded server starts first, because it takes longest, and is asked last."""

import os
import time
from collections.abc import Callable, Iterator

from tasks.doctor.finding import Finding, guarded
from tasks.server import ENVIRONMENT, EmbeddedServer


def examine(store: str, direct: bool) -> Iterator[Finding]:
    """Every check, as soon as it is done. `direct` leaves Prefect out."""
    server = EmbeddedServer()
    started_at = time.monotonic()
    try:
        if not direct and not os.environ.get("PREFECT_API_URL"):
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            server.start()
        for check, function in _checks(store):
            yield from guarded(check, function)
        if not direct:
            yield from guarded("prefect", lambda: _prefect(server, started_at))
    finally:
        server.stop()


def _checks(store: str) -> Iterator[tuple[str, Callable[[], list[Finding]]]]:
    """Name and function of each check; what one needs is imported inside, so that what is missing fails only there."""

    def packages() -> list[Finding]:
        from tasks.doctor.packages import check_packages

        return check_packages()

    def access() -> list[Finding]:
        from tasks.doctor.store import check_store

        return check_store(store)

    def engines() -> list[Finding]:
        from tasks.doctor.engines import check_engines

        return check_engines()

    def decoders() -> list[Finding]:
        from tasks.doctor.decoders import check_decoders

        return check_decoders()

    def machine() -> list[Finding]:
        from tasks.doctor.machine import check_machine

        return check_machine(store)

    yield "packages", packages
    yield "store", access
    yield "engine", engines
    yield "decoders", decoders
    yield "disk", machine


def _prefect(server: EmbeddedServer, started_at: float) -> list[Finding]:
    from prefect.settings import get_current_settings

    from tasks.doctor.prefect_server import Api, check_embedded, check_server

    api = get_current_settings().api  # of the environment, or of the active profile
    if not api.url:
        return check_embedded(server, started_at)
    server.stop()
    auth_string = api.auth_string.get_secret_value() if api.auth_string else None
    key = api.key.get_secret_value() if api.key else None
    return check_server(Api(api.url.rstrip("/"), auth_string, key))
