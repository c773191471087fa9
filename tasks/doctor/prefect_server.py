"""Prefect's server: the one that is configured, or the one that a command starts for itself."""

import time
from dataclasses import dataclass, field
from importlib import metadata
from urllib.parse import urlsplit

import httpx

from tasks.doctor.finding import Finding, ok, problem, warning
from tasks.server import EmbeddedServer

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Api:
    """Where Prefect's server answers, and how we say who we are. Its repr shows no secret."""

    url: str
    auth_string: str | None = field(default=None, repr=False)  # user:password
    api_key: str | None = field(default=None, repr=False)


def check_server(api: Api) -> list[Finding]:
    """Is it reachable, does it let us in, and is it of a version that works with ours?"""
    place = _place(api.url)
    try:
        health = httpx.get(f"{api.url}/health", timeout=TIMEOUT_S)
        answer = httpx.get(f"{api.url}/admin/version", headers=_headers(api), timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        mend = "start it (prefect server start), or correct PREFECT_API_URL; --direct does without"
        return [problem("prefect", f"the server at {place} does not answer ({type(error).__name__})", mend)]
    if answer.status_code in (401, 403):
        given = "the credentials are refused" if api.auth_string or api.api_key else "it wants credentials"
        mend = "set PREFECT_API_AUTH_STRING=user:password to what the server has in PREFECT_SERVER_API_AUTH_STRING"
        return [problem("prefect", f"the server at {place} answers {answer.status_code}: {given}", mend)]
    if health.status_code != 200 or answer.status_code != 200:
        mend = "PREFECT_API_URL must end in /api; if it does, look into the server's log: its database may be away"
        statuses = f"{health.status_code} to /health and {answer.status_code} to /admin/version"
        return [problem("prefect", f"the server at {place} answers {statuses}", mend)]
    findings = [_version(place, str(answer.json()))]
    if not api.url.startswith("https://") and (api.auth_string or api.api_key) and not _is_near(api.url):
        mend = "put TLS before it (a reverse proxy), or keep it in a private network"
        findings.append(warning("prefect", f"the password travels to {place} in the clear", mend))
    return findings


def _version(place: str, server: str) -> Finding:
    ours = metadata.version("prefect")
    if _minor(server) < _minor(ours):
        mend = f"upgrade the server first, then its clients: pip install prefect=={ours} there"
        kind = problem if _minor(server)[0] < _minor(ours)[0] else warning
        return kind("prefect", f"the server at {place} is older ({server}) than this client ({ours})", mend)
    return ok("prefect", f"the server at {place} answers; version {server}, here {ours}")


def check_embedded(server: EmbeddedServer, started_at: float) -> list[Finding]:
    """Does the server that a command starts for itself come up? It was started at `started_at` (monotonic)."""
    server.url()
    seconds = time.monotonic() - started_at
    return [ok("prefect", f"no PREFECT_API_URL; the embedded server started in {seconds:.0f} s")]


def _headers(api: Api) -> dict[str, str]:
    if api.auth_string:
        from base64 import b64encode

        return {"Authorization": f"Basic {b64encode(api.auth_string.encode()).decode()}"}
    return {"Authorization": f"Bearer {api.api_key}"} if api.api_key else {}


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _place(url: str) -> str:
    """Host and port only: a URL may carry a password."""
    try:
        parts = urlsplit(url)
        return f"{parts.hostname}:{parts.port}" if parts.port else f"{parts.hostname}"
    except ValueError:
        return "PREFECT_API_URL, which is no URL,"


def _is_near(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
