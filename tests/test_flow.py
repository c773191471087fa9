"""The Prefect flows: embedded, on a server, from a deployment. The only file that starts a Prefect server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from flows.artifacts import artifact_key
from models.errors import ModelError
from models.settings.fields import StoreSettings
from models.settings.predict import PredictSettings
from tasks.digits import write_digits
from tasks.server import ENVIRONMENT
from tasks.verify import verify
from tests.tiny_models import publish_classifier, publish_generator

ROOT = Path(__file__).parent.parent
PATIENCE_S = 90.0
MODEL = "tiny@000000000000"

# In every process of a run, before anything else: notes each attempt to reach another machine.
TRAP = """
import os, socket
def note(host):
    if host not in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0", b"127.0.0.1", b"localhost"):
        with open(os.environ["REACHED"], "a") as file:
            print(host, file=file)
def watched(connect):
    def watching(self, address):
        if isinstance(address, tuple):
            note(address[0])
        return connect(self, address)
    return watching
class Watched(socket.socket):
    connect = watched(socket.socket.connect)
    connect_ex = watched(socket.socket.connect_ex)
socket.socket = Watched
resolve = socket.getaddrinfo
def getaddrinfo(host, *more, **named):
    note(host)
    return resolve(host, *more, **named)
socket.getaddrinfo = getaddrinfo
"""


class Mill:
    """A store with a tiny model, photographs, and a Prefect home of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = str(folder / "mill")
        self.photos = folder / "photos"
        self.home = folder / "prefect"
        self.reached = folder / "reached"
        (folder / "trap").mkdir()
        (folder / "trap" / "sitecustomize.py").write_text(TRAP)
        publish_classifier(self.store, folder)
        self.add(6)

    def add(self, count: int, first: int = 0) -> None:
        """Small JPEGs, each of other pixels."""
        self.photos.mkdir(exist_ok=True)
        for number in range(first, first + count):
            pixels = np.random.default_rng(number).integers(0, 255, (50, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.photos / f"{number:04d}.jpg")

    def environment(self, **more: str) -> dict[str, str]:
        """This process's, without its Prefect settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own = {
            "PREFECT_HOME": str(self.home),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder / 'trap'}",
            "REACHED": str(self.reached),
        }
        return kept | own | more

    def start(self, table: str, *arguments: str, source: Path | None = None, **environment: str) -> subprocess.Popen:
        """`pixelmill predict`, in a process group of its own."""
        settings = ["--model", "tiny", "--table", table, "--shard-size", "2", "--store", self.store, "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "flows", "predict", str(source or self.photos), *settings, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment(**environment),
            start_new_session=True,
        )

    def predict(self, table: str, *arguments: str, **environment: str) -> dict[str, Any]:
        """The result of a run that must succeed."""
        process = self.start(table, *arguments, **environment)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        return json.loads(out)

    def processes(self, command: str = "tasks.s", home: Path | None = None) -> list[int]:
        """The processes of a Prefect home, by default this mill's, whose command line holds these letters: by default
        slots and servers.
        """
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"PREFECT_HOME={home or self.home}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if ours and command.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found


def eventually(condition: Callable[[], Any]) -> Any:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)
    return result


class Server:
    """What a Prefect server knows."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, **body: Any) -> Any:
        """POST, as its filters want it."""
        answer = httpx.post(f"{self.url}/{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def flow_run(self, table: str) -> dict[str, Any]:
        """The only run of the flow into this table."""
        [run] = [run for run in self.ask("flow_runs/filter") if run["parameters"].get("table") == table]
        return run

    def task_runs(self, run: dict[str, Any]) -> dict[str, str]:
        """Name → state."""
        found = self.ask("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
        return {task["name"]: task["state_name"] for task in found}

    def artifacts(self, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """By key."""
        found = self.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}})
        return {artifact["key"]: artifact for artifact in found if artifact["key"]}

    def logs(self, run: dict[str, Any]) -> list[str]:
        """The messages of one run."""
        found = self.ask("logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}})
        return [line["message"] for line in found]


@pytest.fixture(scope="module")
def mill(tmp_path_factory) -> Mill:
    return Mill(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def embedded(mill) -> dict[str, Any]:
    """The result of a run without any server but its own."""
    return mill.predict("embedded", "--slots", "2")


@pytest.fixture(scope="module")
def interrupted(mill, embedded) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a run that Ctrl-C ended after its first shards."""
    mill.add(300)
    process = mill.start("interrupted")
    parts = Path(mill.store) / "tables" / "interrupted" / "parts"
    eventually(lambda: list(parts.rglob("*.parquet")) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def test_the_recorder_does_not_spin():
    from prefect.server.services.task_run_recorder import TaskRunRecorder
    from prefect.settings import PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL as INTERVAL
    from prefect.settings import temporary_settings

    with temporary_settings({INTERVAL: ENVIRONMENT[INTERVAL.name]}):
        assert int(TaskRunRecorder.service_settings().flush_interval) >= 1


def test_an_embedded_run_leaves_nothing_behind_and_reaches_nobody(mill, embedded):
    assert mill.processes() == []
    assert not mill.reached.exists(), mill.reached.read_text()


def test_the_trap_for_connections_works(mill):
    code = "import socket; s = socket.socket(); s.settimeout(0.01); s.connect_ex(('192.0.2.1', 9)); s.close()"
    environment = mill.environment(REACHED=str(mill.folder / "caught"))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (mill.folder / "caught").read_text() == "192.0.2.1\n"


def test_a_server_that_does_not_answer_is_one_line(mill):
    process = mill.start("unheard", PREFECT_API_URL="http://127.0.0.1:9/api")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert "--direct does without: RuntimeError: Failed to reach API at http://127.0.0.1:9/api/" in err


def test_ctrl_c_leaves_no_process(mill, interrupted):
    exit_code, out, err = interrupted
    assert (exit_code, out) == (130, "")
    assert err.splitlines()[-1] == "pixelmill: interrupted; run the same command again to go on"
    assert "Traceback" not in err
    assert mill.processes() == []


def test_kill_9_leaves_no_process(mill):
    process = mill.start("killed")
    parts = Path(mill.store) / "tables" / "killed" / "parts"
    eventually(lambda: list(parts.rglob("*.parquet")) or process.poll() is not None)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL
    eventually(lambda: mill.processes() == [])


# --- on a server


@pytest.fixture(scope="module")
def server(mill, embedded, interrupted) -> Iterator[Server]:
    """`prefect server start`, with a scheduler that does not sleep long.

    On the home of the embedded runs, which have ended by then: an SQLite file is for one server at a time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ENVIRONMENT | {
        "PREFECT_UI_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
    }
    log = mill.folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            stdout=output,
            stderr=output,
            env=mill.environment(**settings),
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}/api"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            return False

    eventually(answers)
    yield Server(url)
    early = process.poll()
    process.terminate()
    process.wait(30)
    assert early is None, f"the server ended with {early}: {log.read_text()}"


def test_the_history_of_an_embedded_run_is_complete(mill, embedded, server):
    assert (embedded["rows"], embedded["by_status"], embedded["shards"]) == (6, {"ok": 6}, 3)
    run = server.flow_run("embedded")
    assert (run["name"], run["state_name"]) == (f"embedded ← photos with {MODEL}", "Completed")
    states = dict.fromkeys(("plan", "slot 1 of 2", "slot 2 of 2", "summary"), "Completed")
    assert eventually(lambda: server.task_runs(run) == states)
    artifacts = server.artifacts(run)
    assert {key: artifact["type"] for key, artifact in artifacts.items()} == {
        "embedded-slot-1": "progress",
        "embedded-slot-2": "progress",
        "embedded-summary": "table",
    }
    assert artifacts["embedded-slot-1"]["data"] == 100
    summary = {row["what"]: row["value"] for row in json.loads(artifacts["embedded-summary"]["data"])}
    assert (summary["rows written"], summary["status: ok"], summary["shards still open"]) == (6, 6, 0)
    assert "6 listed, 6 new, 6 open" in server.logs(run)
    assert verify(mill.store, "embedded").problems == []


def test_the_end_of_an_interrupted_run_is_recorded(interrupted, server):
    assert server.flow_run("interrupted")["state_type"] in ("CRASHED", "CANCELLED")


@pytest.fixture(scope="module")
def chained(mill, server) -> dict[str, Any]:
    """What two runs of `pipeline` over a few digits gave, recorded on the server."""
    digits = mill.folder / "digits"
    write_digits(digits, per_class=10)
    arguments = (str(digits), "--name", "digits", "--images", str(digits), "--table", "read")
    training = ("--model", "resnet18", "--mode", "scratch", "--image-size", "32", "--epochs", "2", "--batch-size", "8")
    environment = mill.environment(
        PREFECT_API_URL=server.url, PIXELMILL_TRAINING=str(mill.folder / "training"), OMP_NUM_THREADS="1"
    )
    results = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "flows", "pipeline", *arguments, *training, "--store", mill.store, "--json"],
            capture_output=True,
            text=True,
            cwd=mill.folder,
            env=environment,
            timeout=4 * PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    return {"first": results[0], "second": results[1]}


def test_the_whole_chain_is_recorded(mill, chained, server):
    first = chained["first"]
    assert (first["ingest"]["images"], first["ingest"]["rejected"], first["predict"]["rows"]) == (100, 0, 100)
    assert first["train"]["model"] == first["export"]["model"] == first["predict"]["model"]
    assert first["evaluate"]["metrics"]["images"] == first["ingest"]["splits"]["test"]
    runs = server.ask(
        "flow_runs/filter", flow_runs={"name": {"any_": ["digits: resnet18 → read"]}}, sort="START_TIME_ASC"
    )
    assert [run["state_name"] for run in runs] == ["Completed", "Completed"]
    tasks = server.task_runs(runs[0])
    assert {name: tasks[name] for name in ("ingest", "train", "export", "evaluate")} == dict.fromkeys(
        ("ingest", "train", "export", "evaluate"), "Completed"
    )
    artifacts = server.artifacts(runs[0])
    curves = json.loads(artifacts["digits-curves"]["data"])
    assert [row["epoch"] for row in curves] == [1, 2]
    assert {"train_loss", "val_top1", "lr"} <= curves[0].keys()
    assert {"ingest-progress", "train-progress"} <= artifacts.keys()
    measured = artifact_key(f"{first['evaluate']['model']} on {first['evaluate']['dataset']}, test")
    shown = {row["what"]: row["value"] for row in json.loads(artifacts[measured]["data"])}
    assert shown["top1"] == first["evaluate"]["metrics"]["top1"]
    inner = [run for run in server.ask("flow_runs/filter") if run["name"].startswith("read ← digits")]
    assert [run["state_name"] for run in inner] == ["Completed", "Completed"]
    assert verify(mill.store, "read").problems == []


def test_the_chain_again_does_nothing(chained):
    first, second = chained["first"], chained["second"]
    assert (second["ingest"]["new"], second["train"]["new"], second["predict"]["rows"]) == (False, False, 0)
    for step, name in (("ingest", "dataset"), ("train", "model"), ("export", "model")):
        assert second[step][name] == first[step][name]
    assert second["evaluate"] == first["evaluate"]


def test_a_backfill_is_recorded_with_its_partitions(mill, server):
    days = mill.folder / "days"
    for number, day in enumerate(("date=2026-01-01", "date=2026-01-02", "date=2026-02-01")):
        (days / day).mkdir(parents=True)
        shutil.copy(mill.photos / f"{number:04d}.jpg", days / day)
    settings = ["--model", "tiny", "--table", "history", "--partitions", "date=2026-01-*", "--store", mill.store]
    done = subprocess.run(
        [sys.executable, "-m", "flows", "backfill", str(days), *settings, "--json"],
        capture_output=True,
        text=True,
        cwd=mill.folder,
        env=mill.environment(PREFECT_API_URL=server.url),
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2
    runs = [run for run in server.ask("flow_runs/filter") if run["parameters"].get("table") == "history"]
    assert {run["name"]: run["state_name"] for run in runs} == {
        "history ← date=2026-01-* with tiny": "Completed",
        f"history ← date=2026-01-01 with {MODEL}": "Completed",
        f"history ← date=2026-01-02 with {MODEL}": "Completed",
    }
    (whole,) = (run for run in runs if "partitions" in run["parameters"])
    shown = json.loads(server.artifacts(whole)["history-partitions"]["data"])
    assert [(row["partition"], row["rows"]) for row in shown] == [("date=2026-01-01", 1), ("date=2026-01-02", 1)]


@pytest.mark.parametrize("by", ["environment", "profile"])
def test_a_server_that_is_configured_is_used(mill, server, by):
    environment = {"PREFECT_API_URL": server.url}
    if by == "profile":
        profiles = mill.folder / "profiles.toml"
        profiles.write_text(f'active = "team"\n[profiles.team]\nPREFECT_API_URL = "{server.url}"\n')
        environment = {"PREFECT_PROFILES_PATH": str(profiles)}
    result = mill.predict(f"by_{by}", "--limit", "6", **environment)
    assert result["rows"] == 6
    assert server.flow_run(f"by_{by}")["state_name"] == "Completed"


# --- slots on a work pool


class Machine:
    """A worker of a pool, with a disk of its own for Prefect."""

    def __init__(self, mill: Mill, server: Server, name: str, pool: str):
        self._mill = mill
        self._home = mill.folder / name
        log = mill.folder / f"{name}.log"
        with log.open("w") as output:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", "1"],
                stdout=output,
                stderr=output,
                env=mill.environment(
                    PREFECT_HOME=str(self._home), PREFECT_API_URL=server.url, PREFECT_WORKER_QUERY_SECONDS="1"
                ),
                start_new_session=True,
            )
        eventually(
            lambda: any(
                worker["name"] == name and worker["status"] == "ONLINE"
                for worker in server.ask(f"work_pools/{pool}/workers/filter")
            )
        )

    def slots(self) -> list[int]:
        """The processes that have a model loaded."""
        return self._mill.processes("tasks.slot", self._home)

    def power_off(self) -> None:
        """Kills all that runs on it at once."""
        for process in self._mill.processes("", self._home):
            os.kill(process, signal.SIGKILL)
        self.worker.wait()


@pytest.fixture(scope="module")
def machines(mill, server) -> Iterator[list[Machine]]:
    """Two machines that work for the pool "machines"."""
    server.ask("work_pools/", name="machines", type="process")
    found = [Machine(mill, server, f"machine-{number}", "machines") for number in range(2)]
    yield found
    for machine in found:
        machine.power_off()


@pytest.fixture(scope="module")
def slow(mill) -> Path:
    """240 names of photographs that take a while to decode."""
    folder = mill.folder / "slow"
    folder.mkdir()
    for kind in range(8):
        shade = np.linspace(0, 31 * kind, 1600, dtype=np.uint8)
        Image.fromarray(np.stack([shade + np.zeros((1600, 1), np.uint8)] * 3, axis=-1)).save(folder / f"{kind}.png")
        for number in range(1, 30):
            os.link(folder / f"{kind}.png", folder / f"{kind}-{number:02d}.png")
    return folder


ON_MACHINES = ("--runner", "pool:machines", "--slots", "2")


def slot_runs(server: Server, table: str) -> dict[str, str]:
    """Name → state of the flow runs that are slots."""
    found = [run for run in server.ask("flow_runs/filter") if run["name"].startswith(f"{table}: slot")]
    return {run["name"]: run["state_name"] for run in found}


@pytest.mark.parametrize(
    ("pool", "reaches", "complaint"),
    [
        pytest.param("nowhere", True, "no work pool 'nowhere' at http", id="no pool"),
        pytest.param("idle", True, "no worker of work pool idle is online: start one", id="no worker"),
        pytest.param("idle", False, "workers of pool idle need a Prefect server that they reach", id="no server"),
    ],
)
def test_a_pool_that_cannot_work_is_one_line(mill, server, pool, reaches, complaint):
    if pool == "idle" and reaches:
        server.ask("work_pools/", name="idle", type="process")
    environment = {"PREFECT_API_URL": server.url} if reaches else {"PREFECT_HOME": str(mill.folder / "alone")}
    process = mill.start("refused", "--runner", f"pool:{pool}", **environment)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode != 0, out, err.count("\n")) == (True, "", 1)
    assert complaint in err
    assert not (Path(mill.store) / "tables" / "refused").exists()


def test_slots_on_a_work_pool(mill, server, machines):
    result = mill.predict("pooled", *ON_MACHINES, PREFECT_API_URL=server.url)
    assert (result["open_shards"], result["failures"]) == (0, [])
    assert (result["rows"], result["by_status"]) == (result["listed"], {"ok": result["listed"]})
    assert verify(mill.store, "pooled").problems == []
    assert slot_runs(server, "pooled") == dict.fromkeys(("pooled: slot 1 of 2", "pooled: slot 2 of 2"), "Completed")
    assert server.flow_run("pooled")["state_name"] == "Completed"
    shown = [item for item in server.ask("artifacts/filter") if (item["key"] or "").startswith("pooled-slot-")]
    assert {item["key"]: item["data"] for item in shown} == {"pooled-slot-1": 100, "pooled-slot-2": 100}
    again = mill.predict("pooled", *ON_MACHINES, PREFECT_API_URL=server.url)
    assert (again["planned"], again["rows"], again["shards"]) == (0, 0, 0)
    assert len(slot_runs(server, "pooled")) == 2


def test_ctrl_c_ends_the_slots_of_a_pool(mill, server, machines, slow):
    process = mill.start("pool_stopped", *ON_MACHINES, source=slow, PREFECT_API_URL=server.url)
    eventually(lambda: all(machine.slots() for machine in machines) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, ""), err
    eventually(lambda: not any(machine.slots() for machine in machines))
    eventually(lambda: set(slot_runs(server, "pool_stopped").values()) == {"Cancelled"})


def test_a_machine_of_the_pool_dies(mill, server, machines, slow):
    process = mill.start("pool_died", *ON_MACHINES, source=slow, PREFECT_API_URL=server.url)
    parts = Path(mill.store) / "tables" / "pool_died" / "parts"
    eventually(lambda: all(machine.slots() for machine in machines) and list(parts.rglob("*.parquet")))
    machines[0].power_off()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert (json.loads(out)["rows"], json.loads(out)["open_shards"]) == (240, 0)
    assert verify(mill.store, "pool_died").problems == []


# --- the flow in this process, on the server


@pytest.fixture
def flow(mill, server, monkeypatch) -> Iterator[Callable[..., Any]]:
    """Runs the flow into a table and returns its final state."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings

    from flows.predict import predict

    def run(table: str, **settings: Any) -> Any:
        given = {"source": str(mill.photos), "model": "tiny", "table": table, "store": mill.store, **settings}
        return predict(**given, return_state=True)

    own = {PREFECT_API_URL: server.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_HOME: str(mill.home)}
    with temporary_settings(own):
        yield run


def test_open_shards_fail_the_flow_in_one_line(flow, server, monkeypatch):
    from tasks import predict as steps
    from tasks.slot_report import SlotReport

    def work(store, settings, planned, slot, slots, on_progress):
        return SlotReport(slot, failed_shards=["shard 1-0: the storage does not answer"])

    monkeypatch.setattr(steps, "work", work)
    state = flow("open", limit=2)
    message = "1 shards of open are still open, run the same command again: shard 1-0: the storage does not answer"
    assert (state.type.value, state.message) == ("FAILED", message)
    run = server.flow_run("open")
    assert (run["state_name"], run["state"]["message"]) == ("Failed", message)


def test_a_slot_that_fails_leaves_the_work_to_the_others(flow, server, mill, monkeypatch):
    from tasks import predict as steps

    real = steps.work

    def work(store, settings, planned, slot, slots, on_progress):
        if slot == 0:
            raise ModelError("the GPU has fallen off the bus")
        return real(store, settings, planned, slot, slots, on_progress)

    monkeypatch.setattr(steps, "work", work)
    state = flow("lame", limit=6, shard_size=1, slots=2)
    assert state.type.value == "COMPLETED"
    states = {"plan": "Completed", "slot 1 of 2": "Failed", "slot 2 of 2": "Completed", "summary": "Completed"}
    assert eventually(lambda: server.task_runs(server.flow_run("lame")) == states)
    assert verify(mill.store, "lame").problems == []


def test_a_mistake_fails_the_flow_with_its_line(flow, server):
    state = flow("mistaken", model="nobody")
    assert state.type.value == "FAILED"
    assert "no model 'nobody'" in state.message


def test_generated_images_are_recorded(flow, mill, server):
    from flows.generate import generate

    publish_generator(mill.store, mill.folder)
    out = mill.folder / "generated"
    given = {"model": "tiny_generator", "count": 20, "out": str(out), "as_dataset": "made", "store": mill.store}
    state = generate(**given, return_state=True)
    assert state.type.value == "COMPLETED"
    assert len(list(out.glob("*.png"))) == 20
    (run,) = server.ask("flow_runs/filter", flow_runs={"name": {"any_": ["20 images of tiny_generator"]}})
    assert eventually(lambda: server.task_runs(run) == {"generate": "Completed"})  # recorded once a second
    artifacts = eventually(lambda: len(found := server.artifacts(run)) == 2 and found)
    shown = {
        row["what"]: row["value"] for row in json.loads(artifacts["tiny-generator-333333333333-generated"]["data"])
    }
    assert (shown["images"], shown["out"]) == (20, str(out))
    assert "generate-progress" in artifacts
    refused = generate(**given | {"count": 21}, return_state=True)
    assert refused.type.value == "FAILED"
    assert "count 20 there, 21 now" in refused.message


# --- deployments


def test_prefects_form_shows_what_the_settings_declare():
    from prefect.utilities.callables import parameter_schema

    from flows.predict import predict

    schema = parameter_schema(predict)
    fields = PredictSettings.model_fields | StoreSettings.model_fields
    assert list(schema.properties) == list(fields)
    assert schema.required == ["source", "model", "table"]
    for name, field in fields.items():
        assert schema.properties[name]["description"] == field.description
    assert schema.properties["slots"]["minimum"] == 1
    assert schema.properties["engine"]["enum"] == ["auto", "onnxruntime", "openvino"]
    assert schema.properties["table"]["pattern"] == "^[A-Za-z][A-Za-z0-9_]*$"


@pytest.fixture(scope="module")
def deployment(mill, server) -> str:
    """A deployment of the flow with a cron schedule, by module entrypoint, as deploy/ has it; its id."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
    from prefect.utilities.callables import parameter_schema

    from flows.predict import predict

    settings = {PREFECT_API_URL: server.url, PREFECT_HOME: str(mill.home)}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        made = client.create_deployment(
            client.create_flow(predict),
            "hourly",
            entrypoint="flows.predict.predict",
            path=str(ROOT),
            parameters={"source": str(mill.photos), "model": "tiny", "table": "hourly", "store": mill.store},
            parameter_openapi_schema=parameter_schema(predict).model_dump(),
            enforce_parameter_schema=True,
            schedules=[DeploymentScheduleCreate(schedule=CronSchedule(cron="0 * * * *", timezone="UTC"))],
        )
    return str(made)


def test_a_cron_schedule_creates_runs(server, deployment):
    def scheduled() -> list[dict[str, Any]]:
        return server.ask("flow_runs/filter", deployments={"id": {"any_": [deployment]}})

    assert all(run["state_name"] == "Scheduled" for run in eventually(scheduled))


def test_a_run_of_a_deployment_in_a_process_of_its_own(mill, server, deployment):
    given = {"table": "from_deployment", "slots": 1, "limit": 4, "recursive": False}
    run = server.ask(f"deployments/{deployment}/create_flow_run", parameters=given)
    environment = mill.environment(PREFECT_API_URL=server.url, PREFECT_SERVER_EPHEMERAL_ENABLED="false")
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "flow-run", "execute", run["id"]],
        env=environment,
        cwd=mill.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = server.flow_run("from_deployment")
    assert (run["name"], run["state_name"]) == (f"from_deployment ← photos with {MODEL}", "Completed")
    assert any(" listed, 4 new, 4 open" in line for line in server.logs(run))
    assert verify(mill.store, "from_deployment").rows == 4


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        pytest.param({"slots": 0}, "0 is less than the minimum of 1", id="range"),
        pytest.param({"engine": "abacus"}, "'abacus' is not one of", id="choice"),
        pytest.param({"source": "s3://someone:secret@bucket/x"}, "does not match", id="credentials"),
        pytest.param({"store": "s3://someone:secret@bucket/x"}, "does not match", id="credentials in the store"),
    ],
)
def test_the_server_refuses_wrong_parameters(server, deployment, wrong, complaint):
    with pytest.raises(httpx.HTTPStatusError) as refused:
        server.ask(f"deployments/{deployment}/create_flow_run", parameters=wrong)
    assert complaint in refused.value.response.text
