"""S3 servers with one fault each, before moto's: conditional writes are ignored or raced, or requests refused."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app

Application = Callable[[dict[str, Any], Callable[..., Any]], Any]
_CONDITION = "HTTP_IF_NONE_MATCH"


def ignores_conditions(inner: Application) -> Application:
    """As servers that have never heard of If-None-Match: the later write replaces the earlier one."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        environ.pop(_CONDITION, None)
        return inner(environ, start_response)

    return application


def looks_then_writes(inner: Application) -> Application:
    """Right as long as nobody else writes: it looks whether the object is there, and some time later writes it."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ.pop(_CONDITION, None):
            look = environ | {"REQUEST_METHOD": "HEAD", "CONTENT_LENGTH": "0", "wsgi.input": io.BytesIO()}
            _, status, _ = run_wsgi_app(inner, look)
            if status.startswith("200"):
                return _refuse(start_response, "412 Precondition Failed", "PreconditionFailed")
            time.sleep(0.1)
        return inner(environ, start_response)

    return application


def refuses(code: str) -> Callable[[Application], Application]:
    """Answers every request with 403 and this code."""

    def wrap(inner: Application) -> Application:
        return lambda environ, start_response: _refuse(start_response, "403 Forbidden", code)

    return wrap


def read_only(inner: Application) -> Application:
    """Lists and reads, and refuses to write."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].count("/") > 1:
            return _refuse(start_response, "403 Forbidden", "AccessDenied")
        return inner(environ, start_response)

    return application


def _refuse(start_response: Callable[..., Any], status: str, code: str) -> list[bytes]:
    start_response(status, [("Content-Type", "application/xml")])
    return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()]


@contextmanager
def serving(wrap: Callable[[Application], Application]) -> Iterator[str]:
    """The endpoint of such a server while it lasts."""
    inner = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, wrap(inner), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
