"""What Ray and Dask have in common: each slot is one long Prefect task, handed to the engine's task runner."""

import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any
from urllib.parse import urlsplit

import prefect.runtime
from prefect.futures import PrefectFuture
from prefect.settings import get_current_settings

from flows.artifacts import slot_updates
from flows.console import shorten
from flows.runners.orders import SlotOrder
from models.errors import PixelmillError
from tasks.slot_report import SlotReport

log = logging.getLogger("pixelmill")

ANSWER_S = 10.0  # for a cluster to take a connection
LONGEST = 400  # characters of an engine's own error
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Cluster(ABC):
    """The slots of one run on a cluster."""

    def __init__(self) -> None:
        self._futures: dict[int, PrefectFuture[Any]] = {}
        self._ended: dict[int, SlotReport | PixelmillError | None] = {}

    @abstractmethod
    def submit(self, order: SlotOrder) -> PrefectFuture[Any]:
        """Hands one slot to the engine."""

    @abstractmethod
    def is_done(self, future: PrefectFuture[Any]) -> bool:
        """Whether the slot has ended, in whatever way."""

    @abstractmethod
    def cancel(self, future: PrefectFuture[Any]) -> None:
        """Makes the slot end, if it runs or not."""

    def start(self, orders: list[SlotOrder]) -> None:
        """Hands all slots to the engine."""
        for order in orders:
            self._futures[order.slot] = self.submit(order)

    def ended(self) -> dict[int, SlotReport | PixelmillError | None]:
        """The slots that have ended, with their report or what ended them."""
        for slot, future in self._futures.items():
            if slot not in self._ended and self.is_done(future):
                self._ended[slot] = _outcome(future)
        return dict(self._ended)

    def signs(self) -> Hashable:
        """When Prefect's page of each slot was last changed."""
        return slot_updates([prefect.runtime.flow_run.id])

    def dismiss(self) -> None:
        """Ends the slots that have not ended."""
        for slot, future in self._futures.items():
            if slot not in self._ended:
                try:
                    self.cancel(future)
                except Exception as error:
                    log.debug("slot %d: %s", slot + 1, error)


def _outcome(future: PrefectFuture[Any]) -> SlotReport | PixelmillError:
    try:
        return future.result()
    except PixelmillError as error:
        return error
    except Exception as error:  # the engine's own: its nodes died, or could not import us
        return PixelmillError(told(error))


def told(error: BaseException) -> str:
    """The engine's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" +-=")]  # Dask draws tables
    missing = next((line for line in lines if "No module named" in line), None)
    if missing:
        return f"a machine of the cluster lacks a package ({missing}): install the same pixelmill there, extras too"
    if any(line.startswith("Traceback") for line in lines):  # whose last line says what it was
        lines = [lines[0], lines[-1]]
    return shorten(f"{type(error).__name__}: {' '.join(lines) or 'it ended'}", LONGEST)


def check_answers(address: str) -> None:
    """Raises PixelmillError when nothing listens at host:port of the address, which an engine would find out late."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise PixelmillError(f"--cluster {address!r}: expected a host and a port, as in host:6379 or tcp://host:8786")
    try:
        socket.create_connection((parts.hostname, port), ANSWER_S).close()
    except OSError as error:
        raise PixelmillError(f"the cluster at {address} does not answer: {error}") from None


def check_prefect_is_seen(nodes: set[str], here: str) -> None:
    """Raises PixelmillError when slots on other machines would look for Prefect's server on themselves.

    `nodes`: addresses of the cluster's machines; `here`: this machine's.
    """
    url = get_current_settings().api.url or ""
    elsewhere = sorted(nodes - {here, *LOOPBACK})
    if elsewhere and urlsplit(url).hostname in LOOPBACK:
        raise PixelmillError(
            f"slots on {elsewhere[0]} cannot reach the Prefect server of this machine at {url}: "
            "set PREFECT_API_URL to a server's address that all machines reach"
        )
