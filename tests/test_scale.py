"""Slots on real clusters of two nodes, and on two machines that share a bucket only; one of them dies in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.server import ENVIRONMENT
from tasks.storage import open_storage
from tasks.table import Table
from tasks.verify import verify
from tests.tiny_models import publish_classifier

ROOT = Path(__file__).parent.parent
PATIENCE_S = 180.0
IMAGES = 240  # enough for two slots to be caught in the middle
SHARD = 4


def eventually(find: Callable[[], Any]) -> Any:
    """What `find` gives, once it gives something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := find()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.05)
    return found


class Mill:
    """A store with a tiny model, and photographs that take a while to decode."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = str(folder / "mill")
        self.photos = folder / "photos"
        self.photos.mkdir()
        publish_classifier(self.store, folder)
        for kind in range(8):
            shade = np.linspace(0, 31 * kind, 1600, dtype=np.uint8)
            pixels = np.stack([shade + np.zeros((1600, 1), np.uint8)] * 3, axis=-1)
            Image.fromarray(pixels).save(folder / f"{kind}.png")
        for number in range(IMAGES):  # one file has many names
            os.link(folder / f"{number % 8}.png", self.photos / f"{number:04d}.png")

    def environment(self, **more: str) -> dict[str, str]:
        """This process's, without its Prefect settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own = {"PREFECT_HOME": str(self.folder / "prefect"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return kept | ENVIRONMENT | own | more

    def start(self, table: str, *more: str) -> subprocess.Popen[str]:
        """The command, in a process group of its own."""
        options = ("--model", "tiny", "--table", table, "--store", self.store, "--shard-size", str(SHARD), "--json")
        return subprocess.Popen(
            [sys.executable, "-m", "flows", "predict", str(self.photos), *options, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment(),
            start_new_session=True,
        )

    def slots_seen(self, table: str) -> set[int]:
        """The slots that have written a part."""
        return {_statistics(part)["slot"] for part in (Path(self.store) / "tables" / table).rglob("parts/**/*.parquet")}


def _statistics(part: Path) -> dict[str, Any]:
    return json.loads(pq.read_metadata(part).metadata[b"pixelmill"])


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The result of a command that ends well."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def mill(tmp_path_factory) -> Mill:
    return Mill(tmp_path_factory.mktemp("scale"))


@pytest.fixture(scope="module")
def local(mill) -> list[dict[str, Any]]:
    """The rows that one slot of this machine gives."""
    assert finish(mill.start("local", "--direct"))["rows"] == IMAGES
    return rows(mill, "local")


def rows(mill: Mill, table: str) -> list[dict[str, Any]]:
    """All rows, less what two runs may differ in."""
    found = pq.read_table(Path(mill.store) / "tables" / table / "parts").to_pylist()
    return sorted(({**row, "predicted_at": None} for row in found), key=lambda row: row["image"])


def check_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Scores may differ in their last digits: batches are put together as images arrive."""

    def flat(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name != "labels"}

    def labels(rows: list[dict[str, Any]]) -> list[str]:
        return [label["label"] for row in rows for label in row["labels"]]

    def scores(rows: list[dict[str, Any]]) -> list[float]:
        return [label["score"] for row in rows for label in row["labels"]]

    assert [flat(row) for row in ours] == [flat(row) for row in theirs]
    assert labels(ours) == labels(theirs)
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-6)


class Nodes:
    """Two nodes of a cluster; the second can be powered off."""

    def __init__(self, address: str, power_off: Callable[[], None], processes: Callable[[], list[psutil.Process]]):
        self.address = address
        self.power_off = power_off
        self.processes = processes  # of all nodes

    def slots(self) -> list[psutil.Process]:
        """The processes that have a model loaded."""
        return [process for process in self.processes() if "tasks.slot" in _arguments(process)]


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _below(*processes: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            found += psutil.Process(process.pid).children(recursive=True)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def ray(mill) -> Iterator[Nodes]:
    """Two Ray nodes of one core each."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "ray_nodes.py"), "1", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=mill.environment(RAY_USAGE_STATS_ENABLED="0"),
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address = process.stdout.readline().strip()

    def power_off() -> None:
        process.stdin.write("off\n")
        process.stdin.flush()
        assert process.stdout.readline() == "off\n"

    yield Nodes(address, power_off, lambda: _below(process))
    process.stdin.close()
    process.wait(PATIENCE_S)
    process.stdout.close()


@pytest.fixture
def dask(mill, tmp_path) -> Iterator[Nodes]:
    """A Dask scheduler and two workers."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        with (tmp_path / "dask.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                stdout=log,
                stderr=log,
                text=True,
                cwd=tmp_path,
                env=mill.environment(),
                start_new_session=True,
            )

    told = tmp_path / "scheduler.json"
    scheduler = start(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)
    )
    address = json.loads(eventually(lambda: told.exists() and told.read_text()))["address"]
    workers = [start("worker", address, "--no-nanny", "--no-dashboard", "--nthreads", "1") for _ in range(2)]
    eventually(lambda: (tmp_path / "dask.log").read_text().count("Registered to:") == 2)
    yield Nodes(address, lambda: os.killpg(workers[1].pid, signal.SIGKILL), lambda: _below(*workers))
    for process in (*workers, scheduler):
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.fixture(params=[pytest.param("ray", marks=pytest.mark.slow), pytest.param("dask", marks=pytest.mark.slow)])
def nodes(request) -> Nodes:
    return request.getfixturevalue(request.param)


def on(nodes: Nodes, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The options that send two slots there."""
    runner = request.node.callspec.params["nodes"]
    return ("--runner", runner, "--cluster", nodes.address, "--slots", "2")


def test_a_cluster_gives_the_same_table(mill, local, nodes, request):
    table = f"same_{request.node.callspec.params['nodes']}"
    result = finish(mill.start(table, *on(nodes, request)))
    assert (result["rows"], result["shards"], result["by_status"]) == (IMAGES, IMAGES / SHARD, {"ok": IMAGES})
    assert (result["open_shards"], result["failures"]) == (0, [])
    assert mill.slots_seen(table) == {0, 1}
    assert verify(mill.store, table).problems == []
    check_same(rows(mill, table), local)
    assert nodes.slots() == []


def test_the_other_node_does_the_work_of_one_that_dies(mill, local, nodes, request):
    table = f"died_{request.node.callspec.params['nodes']}"
    process = mill.start(table, *on(nodes, request))
    eventually(lambda: mill.slots_seen(table) == {0, 1} or process.poll() is not None)
    nodes.power_off()
    assert process.poll() is None, process.communicate()
    result = finish(process)
    assert (result["rows"], result["by_status"], result["open_shards"]) == (IMAGES, {"ok": IMAGES}, 0)
    assert verify(mill.store, table).problems == []
    check_same(rows(mill, table), local)


def test_ctrl_c_ends_the_slots_of_a_cluster(mill, nodes, request):
    table = f"stopped_{request.node.callspec.params['nodes']}"
    process = mill.start(table, *on(nodes, request))
    eventually(lambda: mill.slots_seen(table) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "pixelmill: interrupted; run the same command again to go on"
    eventually(lambda: nodes.slots() == [])
    assert mill.slots_seen(table)
    assert len(list((Path(mill.store) / "tables" / table).rglob("parts/**/*.parquet"))) < IMAGES / SHARD


# --- two machines that share nothing but a bucket


class Machine:
    """A process with a home, a disk for temporary files and a working directory of its own."""

    def __init__(self, folder: Path, store: str):
        self._store = store
        self._folder = folder
        places = {name: folder / name.lower() for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "PREFECT_HOME")}
        for place in places.values():
            place.mkdir(parents=True)
        self._environment = os.environ | {name: str(place) for name, place in places.items()}
        self._environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self, source: str) -> subprocess.Popen[str]:
        """Predicts into the table "shared"."""
        options = ("--model", "tiny", "--table", "shared", "--store", self._store, "--shard-size", "2")
        return subprocess.Popen(
            [sys.executable, "-m", "flows", "predict", source, *options, "--direct", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            env=self._environment,
            start_new_session=True,
        )


def test_two_machines_share_a_bucket_only(mill, bucket, tmp_path):
    """One plans and is powered off in the middle; the other, which found nothing left to plan, ends its work."""
    images, store, source = 120, f"s3://{bucket}/mill", f"s3://{bucket}/photos"
    storage = open_storage(store)
    for number in range(images):
        storage.put_if_absent(f"{source}/{number:03d}.png", (mill.folder / f"{number % 8}.png").read_bytes())
    publish_classifier(store, tmp_path)
    machines = [Machine(tmp_path / name, store) for name in ("a", "b")]
    table = Table(store, "shared")

    def parts() -> int:
        return len(table.part_names("tiny@000000000000"))

    first = machines[0].start(source)
    eventually(lambda: parts() or first.poll() is not None)
    second = machines[1].start(source)
    slots = eventually(lambda: [child for child in _below(second) if "tasks.slot" in _arguments(child)])
    before = parts()
    eventually(lambda: parts() >= before + 4)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert slots
    result = finish(second)
    assert (result["planned"], result["skipped"], result["open_shards"]) == (0, images, 0)
    assert 0 < result["rows"] < images
    checked = verify(store, "shared")
    assert (checked.rows, checked.problems) == (images, [])
    again = finish(machines[0].start(source))
    assert (again["planned"], again["rows"]) == (0, 0)
