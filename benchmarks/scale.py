"""Throughput of one slot and of two, one core each, on each runner of this machine; and what the engine itself costs.

Ray and Dask start a cluster of their own for each run, as the command does without --cluster; the pool has two workers
that are there already, one per core. All runs are recorded by one Prefect server, which is there already, too. While
slots work, images per second are counted from the first loaded model to the last part; the rest of the command is start
and end. In every round all runners take turns.

    python -m benchmarks.scale [--images 1000] [--rounds 5] [--runners local ray dask pool] [--model mobilenet_v2]
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.photographs import write_photographs
from tasks.server import ENVIRONMENT

POOL = "scale"
PATIENCE_S = 120.0


class Measured(NamedTuple):
    """One run of the command."""

    working: float  # images per second while the slots worked
    wall_s: float
    rest_s: float  # of these, before and after that work


def environment(scratch: Path, **more: str) -> dict[str, str]:
    """This process's, with a Prefect home in the scratch folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | ENVIRONMENT | {"PREFECT_HOME": str(scratch / "prefect"), "PREFECT_UI_ENABLED": "false"} | more


def pinned(command: list[str], cores: int, first: int = 0, **options: Any) -> subprocess.Popen:
    """A process that may use so many cores."""
    allowed = sorted(os.sched_getaffinity(0))[first : first + cores]
    return subprocess.Popen(["taskset", "-c", ",".join(map(str, allowed)), *command], **options)


@contextlib.contextmanager
def prefect_server(scratch: Path) -> Iterator[str]:
    """The URL of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (scratch / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=environment(scratch),
        )
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        yield url
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def pool_workers(scratch: Path, url: str, count: int) -> Iterator[None]:
    """Workers of the pool, one core each."""
    httpx.post(f"{url}/work_pools/", json={"name": POOL, "type": "process"}).raise_for_status()
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--limit", "1", "--name"]
    with (scratch / "workers.log").open("w") as log:
        workers = [
            pinned(
                [*command, f"worker-{number}"],
                1,
                number,
                stdout=log,
                stderr=log,
                env=environment(scratch, PREFECT_API_URL=url, PREFECT_WORKER_QUERY_SECONDS="1"),
            )
            for number in range(count)
        ]
    try:
        wait_for(lambda: len(httpx.post(f"{url}/work_pools/{POOL}/workers/filter", json={}).json()) == count)
        yield
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def wait_for(condition: Any) -> None:
    """Until it holds."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.2)
    raise SystemExit("Prefect did not start")


def run(scratch: Path, url: str, runner: str, slots: int, table: str, model: str) -> Measured:
    """One run of the command on so many cores."""
    name = f"pool:{POOL}" if runner == "pool" else runner
    start = time.perf_counter()
    process = pinned(
        [
            sys.executable, "-m", "flows", "predict", str(scratch / "photographs"), "--model", model, "--table", table,
            "--store", str(scratch / "mill"), "--runner", name, "--slots", str(slots), "--shard-size", "16", "--json",
        ],
        slots,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(scratch, PREFECT_API_URL=url),
    )  # fmt: skip
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    wall = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"{runner} with {slots} slots: {err.decode()}")
    result = json.loads(out)
    working = span_s(scratch / "mill" / "tables" / table) if result["rows"] else 0.0
    return Measured(result["rows"] / working if working else 0.0, wall, wall - working)


def span_s(table: Path) -> float:
    """Seconds from the beginning of the first shard to the end of the last part, read off the parts."""
    import pyarrow.parquet as pq

    ends, starts = [], []
    for part in table.rglob("parts/**/*.parquet"):
        seconds = json.loads(pq.read_metadata(part).metadata[b"pixelmill"])["seconds"]
        ends.append(part.stat().st_mtime)
        starts.append(ends[-1] - seconds)
    return max(ends) - min(starts)


def main() -> None:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runners", nargs="+", default=["local", "ray", "dask", "pool"])
    parser.add_argument("--model", default="mobilenet_v2")
    options = parser.parse_args()
    measured: defaultdict[tuple[str, int], list[Measured]] = defaultdict(list)
    idle: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="pixelmill-benchmark-") as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        write_photographs(scratch / "photographs", options.images)
        importing = [f"torchvision:{options.model}", "--name", options.model, "--weights", "none"]
        subprocess.run(
            [sys.executable, "-m", "flows", "import", *importing, "--store", str(scratch / "mill")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        url = stack.enter_context(prefect_server(scratch))
        if "pool" in options.runners:
            stack.enter_context(pool_workers(scratch, url, 2))
        for number in range(options.rounds):
            for runner in options.runners:
                for slots in (1, 2):
                    table = f"{runner}_{slots}_{number}"
                    measured[runner, slots].append(run(scratch, url, runner, slots, table, options.model))
                idle[runner].append(run(scratch, url, runner, 2, f"{runner}_2_{number}", options.model).wall_s)
            print(f"medians of {number + 1}:", flush=True)
            for runner in options.runners:
                show(runner, measured[runner, 1], measured[runner, 2], idle[runner])


def show(runner: str, one_slot: list[Measured], two_slots: list[Measured], idle: list[float]) -> None:
    """Prints one line for one runner."""
    one, two = (Measured(*map(statistics.median, zip(*runs, strict=True))) for runs in (one_slot, two_slots))
    ratio = two.working / one.working
    print(
        f"{runner:6} one slot {one.working:6.1f} images/s  two slots {two.working:6.1f} = ×{ratio:.2f}  "
        f"start and end {one.rest_s:5.1f} s, {two.rest_s:5.1f} s  nothing to do {statistics.median(idle):5.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
