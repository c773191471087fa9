"""In production: Postgres, a Prefect server on it, an S3 server and two workers, all real, and all killed in turn.

Run alone with `-m production`. Needs PostgreSQL's server (Debian: postgresql); nothing is skipped without it.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.session
import httpx
import numpy as np
import pytest
from conftest import SECRET
from PIL import Image

from tasks import registry, storage
from tasks.backfill import done_of
from tasks.promote import promote
from tasks.table import Table
from tasks.verify import verify
from tests.tiny_models import publish_classifier

pytestmark = pytest.mark.production

ROOT = Path(__file__).parent.parent
PATIENCE_S = 180.0
HEARTBEAT_S = 30  # the shortest that Prefect takes
BUCKET = "production"
SOURCE, STORE = f"s3://{BUCKET}/photos", f"s3://{BUCKET}/mill"
DAYS = [f"date=2026-01-{day:02}" for day in range(1, 13)]
PER_DAY = 8
CRASHES = ["flow", "worker", "both", "server"]
PER_CRASH = 240


def eventually(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S, every_s: float = 0.2) -> Any:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + patience_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"it never came true: {what}"
        time.sleep(every_s)
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Production:
    """The processes of one installation, and what they know."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port, self.s3_port, self.postgres_port = free_port(), free_port(), free_port()
        self.api = f"http://127.0.0.1:{self.port}/api"
        self._ended = contextlib.ExitStack()
        self.server: subprocess.Popen | None = None
        self.workers: list[subprocess.Popen] = []

    # --- processes

    def environment(self) -> dict[str, str]:
        """Of every process; without settings of this machine for Prefect."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))}
        return kept | {
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}",
            "AWS_CONFIG_FILE": str(self.folder / "no-aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-aws-credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "PIXELMILL_STORE": STORE,
            "PIXELMILL_IMAGES": f"{SOURCE}/{DAYS[0]}",
            "PIXELMILL_LABELLED": f"s3://{BUCKET}/labelled",
            "PREFECT_API_URL": self.api,
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, *command: str, **more: str) -> subprocess.Popen:
        """A process of the installation, in a group of its own, with a log."""
        with (self.folder / f"{'-'.join(command[:2])}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment() | more,
                start_new_session=True,
            )
        self._ended.callback(end, process)
        return process

    def start_postgres(self) -> None:
        """A new cluster. Postgres refuses to run as root, so that root runs it as the user postgres."""
        binaries = postgres_binaries()
        folder = Path(tempfile.mkdtemp(prefix="pixelmill-postgres-"))
        self._ended.callback(shutil.rmtree, folder, ignore_errors=True)
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
            user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        data = folder / "data"
        initdb = [binaries / "initdb", "-D", data, "-U", "prefect", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
        options = ["-h", "127.0.0.1", "-p", str(self.postgres_port), "-k", folder, "-c", "fsync=off"]
        with (self.folder / "postgres.log").open("w") as log:
            process = subprocess.Popen(
                [binaries / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=folder, **user
            )
        self._ended.callback(end, process)
        eventually(lambda: answers(self.postgres_port), "Postgres answers")

    def start_server(self) -> None:
        """Prefect on Postgres, with services that do not sleep long."""
        database = f"postgresql+asyncpg://prefect@127.0.0.1:{self.postgres_port}/postgres"
        self.server = self.start(
            "prefect",
            "server",
            "start",
            "--port",
            str(self.port),
            PREFECT_SERVER_DATABASE_CONNECTION_URL=database,
            PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="2",
            PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS="1",
            PREFECT_SERVER_UI_ENABLED="false",
        )
        eventually(self.is_healthy, "Prefect's server answers")

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health").status_code == 200
        except httpx.TransportError:
            assert self.server is not None
            assert self.server.poll() is None, (self.folder / "prefect-server.log").read_text()[-3000:]
            return False

    def start_worker(self) -> None:
        self.workers.append(self.start("prefect", "worker", "start", "--pool", "gpu", "--limit", "2"))

    @contextlib.contextmanager
    def replaced(self, worker: subprocess.Popen) -> Iterator[subprocess.Popen]:
        """A worker that will be killed; another takes its place in the end."""
        try:
            yield worker
        finally:
            self.workers.remove(worker)
            self.start_worker()

    def start_all(self) -> None:
        self.start_postgres()
        self.start("moto.server", "-H", "127.0.0.1", "-p", str(self.s3_port))
        self.start_server()
        eventually(lambda: answers(self.s3_port), "the S3 server answers")
        for pool in ("gpu", "cpu"):
            self.ask("work_pools/", name=pool, type="process")
        self.start_worker()
        self.start_worker()

    def stop(self) -> None:
        self._ended.close()

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """Runs a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment(),
            timeout=2 * PATIENCE_S,
        )

    def backfill(
        self, table: str, partitions: str, *options: str, deployment: str = "predict/backfill"
    ) -> subprocess.Popen:
        """`pixelmill backfill` on a deployment, under way."""
        settings = ["--model", "photos", "--table", table, "--partitions", partitions, "--shard-size", "2"]
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "flows", "backfill", SOURCE, *settings),
                *("--deployment", deployment, "--json", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment(),
        )

    # --- what Prefect knows

    def ask(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.api}/{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def deployment(self, name: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.api}/deployments/name/{name}")
        answer.raise_for_status()
        return answer.json()

    def runs(self, **filters: Any) -> list[dict[str, Any]]:
        return self.ask("flow_runs/filter", sort="EXPECTED_START_TIME_ASC", **filters)

    def runs_into(self, table: str) -> list[dict[str, Any]]:
        return [run for run in self.runs() if run["parameters"].get("table") == table]

    def process_of(self, run: dict[str, Any]) -> int | None:
        """The flow's own process: not its slots, which have its environment too."""
        wanted = f"PREFECT__FLOW_RUN_ID={run['id']}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                ours = wanted in (entry / "environ").read_bytes().split(b"\0")
                if ours and b"tasks.slot" not in (entry / "cmdline").read_bytes():
                    return int(entry.name)
        return None


def end(process: subprocess.Popen) -> None:
    """Ends a process and its children."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def postgres_binaries() -> Path:
    """The folder of initdb and postgres; Debian keeps them off the PATH."""
    found = [Path(path).resolve().parent for path in filter(None, [shutil.which("initdb")])]
    found += sorted(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "PostgreSQL's server is missing; on Debian: apt-get install postgresql"
    return found[-1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Bucket:
    """The photographs, put where every worker reads them."""

    def __init__(self, endpoint: str):
        self._client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="anyone",
            aws_secret_access_key="any",
        )
        self._client.create_bucket(Bucket=BUCKET)
        self._seed = 0

    def add(self, folder: str, count: int) -> None:
        """Small JPEGs, each of other pixels."""
        for _ in range(count):
            self._seed += 1
            pixels = np.random.default_rng(self._seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG")
            key = f"photos/{folder}/{self._seed:05}.jpg"
            self._client.put_object(Bucket=BUCKET, Key=key, Body=data.getvalue())


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    production = Production(tmp_path_factory.mktemp("production"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in production.environment().items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        patch.delitem(storage.OPENED, "s3", raising=False)
        try:
            production.start_all()
            yield production
        finally:
            production.stop()
            storage.OPENED.pop("s3", None)


@pytest.fixture(scope="module")
def bucket(production: Production, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """Photographs of some days, and a promoted model in the store."""
    bucket = Bucket(f"http://127.0.0.1:{production.s3_port}")
    for day in DAYS:
        bucket.add(day, PER_DAY)
    for crash in CRASHES:
        bucket.add(f"crash={crash}", PER_CRASH)
    publish_classifier(STORE, tmp_path_factory.mktemp("model"), name="photos")
    promote(STORE, "photos")
    return bucket


@pytest.fixture(scope="module")
def deployed(production: Production, bucket: Bucket) -> str:
    """What the command said that puts deploy/prefect.yaml on the server."""
    file = ROOT / "deploy" / "prefect.yaml"
    done = production.run("prefect", "--no-prompt", "deploy", "--prefect-file", str(file), "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_is_deployed(production, deployed):
    on_gpu = ["predict/hourly", "predict/backfill", "train/weekly", "pipeline/manual"]
    on_cpu = ["ingest/nightly", "evaluate/daily", "vacuum/weekly"]
    found = {name: production.deployment(name) for name in on_gpu + on_cpu}
    pools = {name: one["work_pool_name"] for name, one in found.items()}
    assert pools == dict.fromkeys(on_gpu, "gpu") | dict.fromkeys(on_cpu, "cpu")
    scheduled = {name: [one["schedule"]["timezone"] for one in made["schedules"]] for name, made in found.items()}
    assert scheduled == {
        name: [] if name in ("predict/backfill", "pipeline/manual") else ["Europe/Berlin"] for name in found
    }
    for name, made in found.items():
        assert (made["enforce_parameter_schema"], made["pull_steps"], made["path"]) == (True, [], None), name
        assert made["parameters"]["store"] == STORE, name
        described = made["parameter_openapi_schema"]["properties"]
        assert all(field["description"] for field in described.values()), name
    assert found["train/weekly"]["parameters"]["promote_if_better"] is True
    assert found["predict/backfill"]["parameters"]["scope"] == "source"


@pytest.mark.parametrize(
    ("deployment", "wrong", "complaint"),
    [
        pytest.param("predict/hourly", {"slots": 0}, "less than the minimum of 1", id="range"),
        pytest.param("predict/hourly", {"engine": "abacus"}, "is not one of", id="choice"),
        pytest.param("predict/backfill", {"table": "no-name"}, "does not match", id="name"),
        pytest.param("train/weekly", {"epochs": "many"}, "is not valid", id="type"),
        pytest.param("ingest/nightly", {"source": "s3://me:secret@bucket/x"}, "does not match", id="credentials"),
        pytest.param("evaluate/daily", {"split": "all"}, "does not match", id="split"),
    ],
)
def test_wrong_parameters_are_refused(production, deployed, deployment, wrong, complaint):
    made = production.deployment(deployment)
    answer = httpx.post(f"{production.api}/deployments/{made['id']}/create_flow_run", json={"parameters": wrong})
    assert answer.status_code == 409, answer.text
    assert complaint in answer.text


def set_cron(production: Production, name: str, cron: str, active: bool) -> None:
    made = production.deployment(name)
    url = f"{production.api}/deployments/{made['id']}/schedules/{made['schedules'][0]['id']}"
    schedule = {"cron": cron, "timezone": "Europe/Berlin"}
    httpx.patch(url, json={"schedule": schedule, "active": active}).raise_for_status()


def rows_of(table: str) -> int:
    """The rows of a table in which nothing is wrong."""
    checked = verify(STORE, table)
    assert checked.problems == []
    return checked.rows


def test_a_schedule_adds_what_is_new(production, bucket, deployed):
    def completed(count: int) -> list[dict[str, Any]] | None:
        runs = [run for run in production.runs_into("predictions") if run["state_name"] == "Completed"]
        assert all(run["auto_scheduled"] for run in runs)
        return runs if len(runs) >= count else None

    set_cron(production, "predict/hourly", "* * * * *", active=True)
    eventually(lambda: completed(1), "a scheduled run has ended")
    assert rows_of("predictions") == PER_DAY
    bucket.add(DAYS[0], 3)
    had = len(completed(1))
    eventually(lambda: completed(had + 1), "the next scheduled run has ended")
    set_cron(production, "predict/hourly", "5 * * * *", active=False)
    assert rows_of("predictions") == PER_DAY + 3
    table = Table(STORE, "predictions")
    assert [sum(shard.images for shard in head.shards) for head in table.heads()] == [PER_DAY, 3]


def test_an_outage_is_caught_up_by_one_run(production, bucket, deployed):
    """Runs of the past, as they wait when no worker was there for them."""
    eventually(lambda: not [run for run in production.runs() if run["state_type"] == "RUNNING"], "all is quiet")
    before = {run["id"] for run in production.runs_into("predictions")}
    bucket.add(DAYS[0], 2)
    set_cron(production, "predict/hourly", "5 * * * *", active=True)
    now = datetime.now(UTC)
    production.ask(
        f"deployments/{production.deployment('predict/hourly')['id']}/schedule",
        start_time=(now - timedelta(hours=12)).isoformat(),
        end_time=now.isoformat(),
        min_runs=100,
        max_runs=100,
    )

    def ended() -> list[dict[str, Any]] | None:
        runs = [run for run in production.runs_into("predictions") if run["id"] not in before]
        runs = [run for run in runs if run["expected_start_time"] < now.isoformat()]
        return runs if runs and all(run["state_type"] in ("COMPLETED", "CANCELLED") for run in runs) else None

    runs = eventually(ended, "all runs that were due have ended")
    set_cron(production, "predict/hourly", "5 * * * *", active=False)
    assert len(runs) == 12
    assert [run["state_name"] for run in runs] == ["Superseded"] * 11 + ["Completed"]
    # Those that a worker had taken already end at once, all others are cancelled without a process.
    assert sum(run["state_type"] == "COMPLETED" for run in runs) <= 1 + 2 * len(production.workers)
    assert rows_of("predictions") == PER_DAY + 5
    assert Table(STORE, "predictions").plan_numbers() == [1, 2, 3]


def result_of(process: subprocess.Popen) -> dict[str, Any]:
    """What a backfill that must succeed printed."""
    out, err = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, err
    return json.loads(out)


def test_a_backfill_keeps_to_its_concurrency(production, bucket, deployed):
    """Two of the same command at once wait for the same runs."""
    processes = [production.backfill("history", "2026-01-01..2026-01-31", "--concurrency", "3")]
    processes += [production.backfill("history", "2026-01-01..2026-01-31", "--concurrency", "3", "--direct")]
    most = 0
    while any(process.poll() is None for process in processes):
        at_work = [run for run in production.runs_into("history") if run["deployment_id"] and not run["end_time"]]
        most = max(most, len(at_work))
        time.sleep(0.5)
    for process in processes:
        done = result_of(process)
        assert [one["partition"] for one in done["partitions"]] == DAYS
    assert most == 3
    runs = [run for run in production.runs_into("history") if run["deployment_id"]]
    assert [run["state_name"] for run in runs] == ["Completed"] * 12
    assert len({run["idempotency_key"] for run in runs}) == 12
    assert rows_of("history") == 12 * PER_DAY + 5


def test_the_same_backfill_again_does_nothing(production, deployed):
    before = len(production.runs_into("history"))
    done = result_of(production.backfill("history", "2026-01-01..2026-01-31", "--concurrency", "3", "--direct"))
    assert done["rows"] == 0
    assert len(production.runs_into("history")) == before


def test_a_new_version_computes_what_it_lacks(production, bucket, deployed, tmp_path):
    card = publish_classifier(STORE, tmp_path, name="photos", seed=1)
    assert registry.resolve(STORE, "photos").reference == card.reference
    partitions = f"{DAYS[0]}..2026-01-02"
    done = result_of(production.backfill("history", partitions, "--concurrency", "2", "--direct"))
    assert (done["model"], done["rows"]) == (card.reference, 2 * PER_DAY + 5)
    assert rows_of("history") == 14 * PER_DAY + 10
    again = result_of(production.backfill("history", "2026-01-01..2026-01-03", "--direct"))
    assert again["rows"] == PER_DAY


def test_a_deployment_that_is_not_there_is_named(production, bucket, deployed):
    process = production.backfill("other", DAYS[0], "--direct", deployment="predict/none")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (2, "")
    assert "no deployment 'predict/none'; deployments there: predict/backfill, predict/hourly" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("ages_s", "dead"),
    [
        pytest.param([], False, id="perhaps it sends none"),
        pytest.param([10], False, id="one of now"),
        pytest.param([1000], True, id="one of long ago"),
        pytest.param([1000, 10], False, id="the last of now"),
        pytest.param([1500, 1000], False, id="its period is long"),
        pytest.param([1030, 1000], True, id="three of its periods ago"),
    ],
)
def test_a_run_whose_heartbeats_ceased_is_dead(production, deployed, ages_s, dead):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings

    from flows.catch_up import is_dead

    flow = production.deployment("predict/backfill")["flow_id"]
    made = production.ask("flow_runs/", flow_id=flow, state={"type": "RUNNING", "name": "Running"})
    now = datetime.now(UTC)
    beats = [
        {
            "id": str(uuid.uuid4()),
            "event": "prefect.flow-run.heartbeat",
            "occurred": (now - timedelta(seconds=age_s)).isoformat(),
            "resource": {"prefect.resource.id": f"prefect.flow-run.{made['id']}"},
        }
        for age_s in ages_s
    ]
    httpx.post(f"{production.api}/events", json=beats).raise_for_status()
    resource = {"id": [f"prefect.flow-run.{made['id']}"]}
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": resource}

    def are_there() -> bool:
        return len(production.ask("events/filter", filter=wanted)["events"]) == len(beats)

    eventually(are_there, "the heartbeats are there")
    own = {
        PREFECT_API_URL: production.api,
        PREFECT_HOME: str(production.folder / "prefect"),
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: HEARTBEAT_S,
    }
    with temporary_settings(own), get_client(sync_client=True) as client:
        assert is_dead(client, client.read_flow_run(made["id"])) is dead
    httpx.delete(f"{production.api}/flow_runs/{made['id']}").raise_for_status()


# --- kill -9


@pytest.fixture(scope="module")
def zombies_end(production: Production) -> None:
    """The automation that ends a run of which nothing was heard for three heartbeats."""
    heard = ["heartbeat", "Completed", "Failed", "Cancelled", "Crashed"]
    production.ask(
        "automations/",
        name="zombies",
        trigger={
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.heartbeat"],
            "expect": [f"prefect.flow-run.{event}" for event in heard],
            "threshold": 1,
            "within": 3 * HEARTBEAT_S,
        },
        actions=[{"type": "change-flow-run-state", "state": "CRASHED", "message": "no heartbeat"}],
    )


class Crash:
    """A backfill of one partition into a table of its own, stopped in the middle of its run."""

    def __init__(self, production: Production, name: str):
        self.production = production
        self.table = f"crash_{name}"
        self.process = production.backfill(self.table, f"crash={name}", "--direct")
        eventually(self.is_in_the_middle, "a first part is there", every_s=0.05)
        (self.run,) = production.runs_into(self.table)
        self.flow = production.process_of(self.run)
        assert self.flow is not None

    def is_in_the_middle(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        table = Table(STORE, self.table)
        return table.exists() and any(table.part_names(model) for model in table.models())

    def worker(self) -> subprocess.Popen:
        """The one that started the run."""
        return next(one for one in self.production.workers if self.flow in descendants(one.pid))

    def rows(self) -> int:
        table = Table(STORE, self.table)
        (head,) = table.heads()
        return done_of(table, head.model, [head.source])[head.source].rows

    def states(self) -> list[str]:
        return [run["state_name"] for run in self.production.runs_into(self.table)]

    def end(self) -> list[str]:
        """Waits for the backfill, checks the table, and says how the runs ended."""
        assert self.rows() < PER_CRASH, "it was killed too late"
        done = result_of(self.process)
        assert done["rows"] == PER_CRASH
        assert rows_of(self.table) == PER_CRASH
        return self.states()


def descendants(pid: int) -> set[int]:
    """The children of a process, and theirs."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def test_the_flow_is_killed(production, bucket, deployed):
    crash = Crash(production, "flow")
    os.kill(crash.flow, signal.SIGKILL)
    assert crash.end() == ["Crashed", "Completed"]


def test_the_worker_is_killed(production, bucket, deployed):
    """Its run ends with it once it prints what nobody hears, if it does; the other worker takes the next."""
    crash = Crash(production, "worker")
    with production.replaced(crash.worker()) as worker:
        worker.kill()
        assert set(crash.end()) <= {"Crashed", "Completed"}


def test_both_are_killed(production, bucket, deployed, zombies_end):
    """Nobody is left to say how the run ended, so that its heartbeats are missed."""
    crash = Crash(production, "both")
    with production.replaced(crash.worker()) as worker:
        worker.kill()
        os.kill(crash.flow, signal.SIGKILL)
        time.sleep(2)
        assert crash.states() == ["Running"]
        assert crash.end() == ["Crashed", "Completed"]


def test_the_server_is_restarted(production, bucket, deployed):
    crash = Crash(production, "server")
    os.killpg(production.server.pid, signal.SIGKILL)
    production.server.wait()
    time.sleep(3)
    production.start_server()
    assert crash.end()[-1] == "Completed"
