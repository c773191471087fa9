"""The supervisor's end of a slot's process: starts it, talks to it, and finds out how it ended."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.slot import SlotConfig

if TYPE_CHECKING:  # a process is started before Arrow is imported here
    from tasks.table import Shard

LAST_WORDS_S = 5.0  # for a process that has closed its events to end
SLOT_COMMAND = [sys.executable, "-m", "tasks.slot"]


class SlotProcess:
    """The child process of a slot, and the shards it has in hand."""

    def __init__(self) -> None:
        """Starts it; it imports what it will need, and waits to be configured."""
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.in_hand: list[Shard] = []
        self.is_ready = False
        self.predicting: tuple[Shard, int] | None = None  # the image that an isolated process works on
        self.progress: dict[str, Any] = {"images": 0, "by_status": {}, "stages": {}}
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            SLOT_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def configure(self, config: SlotConfig) -> None:
        """Makes it load its model; then it takes shards."""
        self._send_line(json.dumps(asdict(config)) + "\n")

    def _receive(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def _send_line(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the end of its events says so
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def give(self, shard: "Shard", poison: dict[int, str] | None = None) -> None:
        """Hands out one more shard."""
        self.in_hand.append(shard)
        key = [shard.plan, shard.index, shard.images]
        self._send_line(json.dumps({"shard": key, "poison": poison or {}}) + "\n")

    def finish(self) -> None:
        """No more shards will come."""
        self._send_line(json.dumps({"stop": True}) + "\n")

    def event(self, timeout_s: float) -> dict[str, Any] | None:
        """The next event; None when the process has ended. Raises queue.Empty when nothing came in time."""
        return self._events.get(timeout=timeout_s)

    def end(self) -> str:
        """Kills the process if it still runs, and says how it ended."""
        if not self._receiver.is_alive():  # its events have ended, so it is about to end by itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_WORDS_S)
        self._process.kill()
        code = self._process.wait()
        self._receiver.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


_warm: list[SlotProcess] = []
_warm_lock = threading.Lock()


def warm_up(slots: int) -> None:
    """Keeps so many processes started, so that their imports overlap with the listing. Undone by `cool_down`."""
    with _warm_lock:
        _warm.extend(SlotProcess() for _ in range(slots - len(_warm)))


def cool_down() -> None:
    """Ends the processes that no slot has taken."""
    while _warm:
        _warm.pop().end()


def take_warm() -> SlotProcess:
    """A process that was started ahead, or else a new one."""
    with _warm_lock:
        return _warm.pop() if _warm else SlotProcess()
