"""Preparing images in a child process, so that one that kills, blocks or bloats its decoder costs one row.

The parent sends the bytes of a file, the child answers with geometry and pixels of each view, and that it was the last,
each as a message with its length before it, over two pipes. A child that dies is replaced before the next image. It is
a fresh interpreter, not a fork, which threads make unsafe; it inherits no environment but what an interpreter needs, so
no credentials either.
"""

import contextlib
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from models.errors import PixelmillError, Rejected
from models.imaging.geometry import Geometry, ResizeRule, Tile
from models.imaging.prepare import Limits, Preparer
from models.imaging.tiles import Tiling
from models.records import Status

COMMAND = (sys.executable, "-m", "tasks.isolation")

_LENGTH = struct.Struct(">Q")
_PIECE = 1 << 20  # bytes
_START_S = 60.0
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")


class _Gone(Exception):
    """The child closed its end before the message was complete."""


class IsolatedPreparer:
    """`Preparer` in a child process: one for each thread. Close it, or use it in a `with` block.

    memory_mb: what one image may allocate, on top of the interpreter; cpu_s: its processor time; wall_s: all its time
    up to a view.
    """

    def __init__(
        self,
        rule: ResizeRule,
        limits: Limits | None = None,
        tiling: Tiling | None = None,
        *,
        memory_mb: int = 2048,
        cpu_s: int = 30,
        wall_s: float = 120.0,
    ):
        self.rule = rule
        self.limits = limits or Limits()
        self.tiling = tiling
        self.memory_mb = memory_mb
        self.cpu_s = cpu_s
        self.wall_s = wall_s
        self._child: subprocess.Popen[bytes] | None = None
        self._end_child: Callable[[], object] = lambda: None

    def __enter__(self) -> "IsolatedPreparer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def views(self, data: bytes, next_out: Callable[[], NDArray[np.uint8]]) -> Iterator[Geometry]:
        """As `Preparer.views`; where the child did not survive the image, Rejected is corrupt and says how it ended.

        Raises PixelmillError where no child can be started.
        """
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._start()
        try:
            deadline = time.monotonic() + self.wall_s
            self._send(data, deadline)
            while "geometry" in (answer := json.loads(self._receive(deadline))):
                pixels = np.frombuffer(self._receive(deadline), np.uint8)
                next_out()[:] = pixels.reshape(self.rule.height, self.rule.width, 3)
                yield _geometry(**answer["geometry"])
                deadline = time.monotonic() + self.wall_s
        except _Gone:
            raise Rejected(Status.CORRUPT, self._how_it_ended()) from None
        except TimeoutError:
            self.close()
            raise Rejected(Status.CORRUPT, f"the decoder took more than {self.wall_s:g} s") from None
        except BaseException:  # half a message is in the pipe
            self.close()
            raise
        if answer.get("out_of_memory"):
            self.close()  # libraries do not always give back what they held when an allocation failed
            raise Rejected(Status.CORRUPT, f"the decoder needed more than {self.memory_mb} MB")
        if "rejected" in answer:
            status, reason = answer["rejected"]
            raise Rejected(Status(status), reason)

    def close(self) -> None:
        """Ends the child and waits until it is gone."""
        self._end_child()
        self._child = None

    def _start(self) -> None:
        settings = {
            "rule": asdict(self.rule),
            "limits": asdict(self.limits),
            "tiling": self.tiling and asdict(self.tiling),
            "memory_mb": self.memory_mb,
            "cpu_s": self.cpu_s,
        }
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["OPENBLAS_NUM_THREADS"] = "1"
        self._child = subprocess.Popen(
            [*COMMAND, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders write what they think of a file there
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent, which decides
        )
        self._end_child = weakref.finalize(self, _end, self._child)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        try:
            self._receive(time.monotonic() + _START_S)
        except (_Gone, TimeoutError):
            how = self._how_it_ended()
            raise PixelmillError(f"cannot start a process that decodes images: {' '.join(COMMAND)}: {how}") from None

    def _how_it_ended(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(timeout=5)  # its end of the pipe closes a moment before it is gone
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        if code == -signal.SIGXCPU:
            return f"the decoder took more than {self.cpu_s} s of processor time"
        if code < 0:
            return f"the decoder died: signal {-code} ({signal.strsignal(-code) or 'unknown'})"
        return f"the decoder died: exit code {code}"

    def _send(self, message: bytes, deadline: float) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        pipe = self._child.stdin.fileno()
        for part in (_LENGTH.pack(len(message)), message):
            rest = memoryview(part)
            while rest:
                _wait(deadline, write=pipe)
                try:
                    rest = rest[os.write(pipe, rest[:_PIECE]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise _Gone from None

    def _receive(self, deadline: float) -> bytes:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        return self._read(length, deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        assert self._child is not None
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        message = bytearray()
        while len(message) < length:
            _wait(deadline, read=pipe)
            try:
                piece = os.read(pipe, min(length - len(message), _PIECE))
            except BlockingIOError:
                continue
            if not piece:
                raise _Gone
            message += piece
        return bytes(message)


def _geometry(tile: dict[str, Any] | None, **values: Any) -> Geometry:
    """From JSON."""
    return Geometry(**values, tile=Tile(**{name: tuple(sides) for name, sides in tile.items()}) if tile else None)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Also at the end of the program, and when nobody holds the preparer any more."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()


def _wait(deadline: float, *, read: int | None = None, write: int | None = None) -> None:
    """Until the pipe is ready; `poll`, because `select` fails at 1,024 open files. Raises TimeoutError."""
    poller = select.poll()
    if read is not None:
        poller.register(read, select.POLLIN)
    if write is not None:
        poller.register(write, select.POLLOUT)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def serve() -> None:
    """The child: answers one image after the other until its input ends."""
    settings = json.loads(sys.argv[1])
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    tiling = Tiling(**settings["tiling"]) if settings["tiling"] else None
    preparer = Preparer(ResizeRule(**settings["rule"]), Limits(**settings["limits"]), tiling)
    out = np.empty((preparer.rule.height, preparer.rule.width, 3), np.uint8)
    _limit_memory(settings["memory_mb"])
    _write(answers, b"ready")
    while length := requests.read(_LENGTH.size):
        _limit_cpu(settings["cpu_s"])
        answer: dict[str, Any] = {"end": True}
        try:
            data = requests.read(*_LENGTH.unpack(length))
            for geometry in preparer.views(data, lambda: out):
                _write(answers, json.dumps({"geometry": asdict(geometry)}).encode())
                _write(answers, out.tobytes())
        except MemoryError:
            answer = {"out_of_memory": True}
        except Rejected as rejected:
            if isinstance(rejected.__cause__, MemoryError):
                answer = {"out_of_memory": True}
            else:
                answer = {"rejected": [rejected.status, rejected.reason]}
        _write(answers, json.dumps(answer).encode())


def _write(pipe: BinaryIO, message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)) + message)
    pipe.flush()


def _limit_memory(memory_mb: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + memory_mb * 2**20, hard))


def _limit_cpu(cpu_s: int) -> None:
    """From now on; the limit counts the whole life of a process, in whole seconds."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + cpu_s, hard))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):  # the parent is gone
        serve()
