"""Prefect's server for the time of one command, in a child process, without its pages.

It starts while the command imports Prefect. Ctrl-C at the terminal does not reach it, so it can still record how the
run ended, and it ends when its parent does, however that ends.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from models.errors import PixelmillError

START_S = 180.0  # a slow disk and the first run's migrations
STOP_S = 20.0

# Set unless the user has set them, before Prefect is imported anywhere.
ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The recorder writes task runs in batches; with its own numbers the last ones can be lost when the server stops.
    # The interval is cut to whole seconds, and at 0 the recorder spins.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}

# What only a lasting server needs; registering blocks takes a second, and is left for that one to do.
NOT_NEEDED = {
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
}


class EmbeddedServer:
    """The child process. `start` returns at once, `url` waits until it answers."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts the process."""
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tasks.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path} | NOT_NEEDED,
        )

    def url(self) -> str:
        """The URL of its API, once it answers. Raises PixelmillError when it does not start."""
        assert self._process is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(START_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline().strip()
        finally:
            watchdog.cancel()
        if not line:
            raise PixelmillError("Prefect's embedded server did not start, see above; --direct does without")
        return line

    def stop(self) -> None:
        """Lets the server write what it holds, and ends it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process = None


def main() -> None:
    """The process: serves on a free port of the loopback address, and prints its URL when it answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(ephemeral=True, final=True), lifespan="on", log_level="error")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"http://127.0.0.1:{listener.getsockname()[1]}/api", file=answers, flush=True)

    asyncio.run(Server(config).serve([listener]))


def _end_with(parent: IO[str]) -> None:
    """Ends this process when the parent's end of the pipe closes, as it does even when the parent is killed."""
    parent.read()
    os.kill(os.getpid(), 15)
    time.sleep(STOP_S)
    os._exit(1)


if __name__ == "__main__":
    main()
