"""doctor, with what it has to find really broken: folders, buckets, servers, packages, engines."""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from botocore.exceptions import ClientError
from packaging.requirements import Requirement

from flows.__main__ import main
from models.errors import StorageError
from models.imaging import resize
from models.runtime import gpu
from tasks import storage
from tasks.doctor import decoders, engines, machine, packages
from tasks.doctor.finding import Finding, guarded, ok, problem
from tasks.doctor.prefect_server import Api, check_server
from tasks.doctor.store import check_store
from tasks.storage_local import LocalStorage
from tasks.storage_s3 import S3Storage
from tests.conftest import SECRET
from tests.faulty_s3 import ignores_conditions, looks_then_writes, read_only, refuses, serving

ROOT = Path(__file__).parent.parent


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def the(findings: list[Finding], check: str) -> Finding:
    [found] = [finding for finding in findings if finding.check == check]
    return found


# --- the store


def test_a_good_store_passes_and_keeps_nothing_of_the_probe(root):
    found = check_store(root)
    assert states(found) == {"store": "ok", "clock": "ok", "put-if-absent": "ok"}
    place = storage.open_storage(root)
    ignored: dict[str, int] = {}
    assert list(place.walk(root, recursive=True, ignore=lambda name, is_folder: None, ignored=ignored)) == []


def test_a_store_that_is_not_there_yet_is_not_made(tmp_path):
    assert "not there yet" in the(check_store(str(tmp_path / "deep" / "mill")), "store").found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "mill", "deep/mill"])
def test_a_file_where_the_store_would_be(tmp_path, below):
    (tmp_path / "file").touch()
    [found] = check_store(str(tmp_path / "file" / below))
    assert (found.check, found.state) == ("store", "problem")
    assert f"{tmp_path / 'file'} is a file, and a store is a folder" in found.found


def test_a_read_only_folder():
    """As another user: root may write everywhere. Not in pytest's folder, which is closed to others."""
    code = (
        "import os, sys\n"
        "from tasks.doctor.store import check_store\n"
        "from tasks import storage_local\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(*check_store(sys.argv[1]), sep='\\n')"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"problem  store           cannot write {folder}/"), done.stderr
    assert "Permission denied; to mend: grant" in done.stdout


@contextmanager
def faulty(wrap, aws_environment: pytest.MonkeyPatch, bucket: str) -> Iterator[str]:
    """A store in a bucket of such a server."""
    with serving(wrap) as endpoint:
        aws_environment.setenv("AWS_ENDPOINT_URL", endpoint)
        place = S3Storage()
        place.tries = 2
        aws_environment.setitem(storage.OPENED, "s3", place)
        with suppress(ClientError):  # that refuses everything
            place.send("create_bucket", Bucket=bucket)
        yield f"s3://{bucket}/mill"


@pytest.fixture(autouse=True)
def quiet_server() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)


@pytest.mark.parametrize(
    ("wrap", "check", "said"),
    [
        pytest.param(ignores_conditions, "put-if-absent", "a file that was there was overwritten", id="ignores"),
        pytest.param(looks_then_writes, "put-if-absent", "writers that raced were told that they had won", id="races"),
        pytest.param(read_only, "store", "AccessDenied (HTTP 403)", id="read-only"),
        pytest.param(refuses("InvalidAccessKeyId"), "store", "the access key is not known there", id="unknown key"),
        pytest.param(refuses("SignatureDoesNotMatch"), "store", "the secret key is wrong", id="wrong secret"),
        pytest.param(refuses("RequestTimeTooSkewed"), "clock", "the clock of this machine is wrong", id="clock"),
    ],
)
def test_a_bucket_that_a_store_cannot_live_in(aws_environment, wrap, check, said):
    with faulty(wrap, aws_environment, f"bucket-{uuid.uuid4().hex[:12]}") as uri:
        found = check_store(uri)
    last = found[-1]
    assert (last.check, last.state) == (check, "problem")
    assert said in last.found
    assert bool(last.mend) is not ("; check " in last.found), "it says how to mend it, once"
    assert SECRET not in "".join(map(str, found))


def test_a_server_that_is_not_there(aws_environment):
    aws_environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    place = S3Storage()
    place.tries = 1
    aws_environment.setitem(storage.OPENED, "s3", place)
    [found] = check_store("s3://bucket/mill")
    assert (found.check, found.state) == ("store", "problem")
    assert "127.0.0.1:9 does not answer" in found.found


class OtherTime(LocalStorage):
    """A disk whose clock is wrong by so many seconds."""

    skew_s = 0.0

    def modified_at(self, uri):
        return super().modified_at(uri) + self.skew_s


@pytest.mark.parametrize(("skew_s", "state"), [(0, "ok"), (-2, "ok"), (60, "warning"), (-600, "problem")])
def test_clocks_that_differ(tmp_path, monkeypatch, skew_s, state):
    place = OtherTime()
    place.skew_s = skew_s
    monkeypatch.setitem(storage.OPENED, "local", place)
    assert the(check_store(str(tmp_path)), "clock").state == state


class CannotRemove(LocalStorage):
    def remove(self, uri):
        raise StorageError(f"cannot remove {uri}: it is frozen")


def test_a_probe_that_stays_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(storage.OPENED, "local", CannotRemove())
    assert "it is frozen" in check_store(str(tmp_path))[-1].found


# --- engines


def test_the_trial_graph_is_the_convolution_that_it_says():
    model = onnx.load_from_string(engines.TRIAL_GRAPH)
    onnx.checker.check_model(model)
    [node] = model.graph.node
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0])
    windows = np.lib.stride_tricks.sliding_window_view(engines._INPUT[0, 0], (3, 3))
    assert node.op_type == "Conv"
    assert np.array_equal((windows * weights[0, 0]).sum((2, 3)), engines._ANSWER[0, 0])


def test_every_engine_that_is_here_answers():
    found = engines.check_engines()
    assert the(found, "engine").state == "ok"
    assert the(found, "openvino").state == "ok"


def test_a_wrong_answer_is_a_problem(monkeypatch):
    monkeypatch.setattr(engines, "_ANSWER", engines._ANSWER + 5)
    found = engines.check_engines()
    assert (the(found, "engine").state, the(found, "openvino").state) == ("problem", "warning")


def test_a_gpu_that_cannot_be_used_says_how(monkeypatch):
    """The driver reports a device, and the installed ONNX Runtime is the one for CPUs."""
    monkeypatch.setattr(gpu, "device_present", lambda: True)
    found = the(engines.check_engines(), "gpu")
    assert found.state == "warning"
    assert "pip install onnxruntime-gpu" in found.found


def test_a_gpu_provider_that_does_not_start(monkeypatch):
    monkeypatch.setattr(gpu, "device_present", lambda: True)
    monkeypatch.setattr(gpu, "provider_choices", lambda height, width: [[(gpu.CUDA, {})]])
    found = the(engines.check_engines(), "gpu")
    assert (found.state, "CUDAExecutionProvider" in found.found) == ("warning", True)


# --- decoders, packages, machine


def test_decoders_and_kernel(monkeypatch):
    assert {finding.state for finding in decoders.check_decoders()} == {"ok"}
    monkeypatch.setattr(resize, "_resize", None)
    assert the(decoders.check_decoders(), "resize kernel").state == "warning"


def test_a_pillow_without_webp(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    assert any("without WebP" in finding.found for finding in decoders.check_decoders())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("numpy>=1", None),
        ("no-such-package-here>=1", "no-such-package-here is missing"),
        ("numpy<1", f"numpy {metadata.version('numpy')} is there, <1 is needed"),
    ],
    ids=["fits", "missing", "too new"],
)
def test_packages(line, said):
    found = packages.check_needed([Requirement(line)])
    if said is None:
        assert found.state == "ok"
    else:
        assert (found.state, found.found) == ("problem", said)
        requirement = Requirement(line)
        assert found.mend == f"pip install '{requirement.name}{requirement.specifier}'"


@pytest.mark.parametrize(
    ("lines", "state"),
    [([], "ok"), (["no-such-package-here"], "ok"), (["torch<1", "onnx"], "warning"), (["torch", "onnx"], "ok")],
    ids=["none declared", "not installed", "too new", "installed"],
)
def test_the_training_extra(lines, state):
    assert packages.check_training([Requirement(line) for line in lines]).state == state


def test_this_installation_has_what_it_needs():
    assert {finding.state for finding in packages.check_packages()} == {"ok"}


def test_a_package_that_cannot_be_imported_is_named():
    def check() -> list[Finding]:
        import no_such_package_here  # noqa: F401

        return []

    [found] = guarded("engine", check)
    assert (found.state, found.found) == ("problem", "the package no_such_package_here is missing")


def test_an_unforeseen_error_shows_its_kind_only():
    def check() -> list[Finding]:
        raise ValueError(SECRET)

    [found] = guarded("store", check)
    assert "ValueError" in found.found
    assert SECRET not in str(found)


@pytest.mark.parametrize(
    ("grade", "gigabytes", "state"),
    [
        (lambda size: machine.disk("the store", size), 0.5, "problem"),
        (lambda size: machine.disk("the store", size), 5, "warning"),
        (lambda size: machine.disk("the store", size), 50, "ok"),
        (machine.memory, 0.2, "problem"),
        (machine.memory, 1, "warning"),
        (machine.memory, 4, "ok"),
    ],
)
def test_room(grade, gigabytes, state):
    assert grade(gigabytes * 1e9).state == state


def test_the_room_of_this_machine(tmp_path):
    found = machine.check_machine(str(tmp_path / "not" / "there"))
    assert {"disk", "memory"} == set(states(found))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < (machine.available_memory() or 1) <= total


# --- Prefect


class FakeServer(BaseHTTPRequestHandler):
    """Answers as a Prefect server with basic authentication does."""

    version = metadata.version("prefect")

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization") == "Basic YWRtaW46cGFzcw=="  # admin:pass
        known = {"/api/health": True, "/api/admin/version": self.version}
        status = 404 if self.path not in known else 200 if allowed or self.path == "/api/health" else 401
        body = json.dumps(known.get(self.path)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("auth_string", "state", "said"),
    [
        (None, "problem", "it wants credentials"),
        (f"admin:{SECRET}", "problem", "the credentials are refused"),
        ("admin:pass", "ok", "answers; version"),
    ],
    ids=["none", "wrong", "right"],
)
def test_the_password_of_a_prefect_server(server, auth_string, state, said):
    [found] = check_server(Api(server, auth_string))
    assert (found.state, said in found.found) == (state, True)
    assert SECRET not in str(found)


@pytest.mark.parametrize(("version", "state"), [("2.20.1", "problem"), ("3.0.0", "warning"), ("99.0.0", "ok")])
def test_the_version_of_a_prefect_server(server, monkeypatch, version, state):
    monkeypatch.setattr(FakeServer, "version", version)
    assert check_server(Api(server, "admin:pass"))[0].state == state


def test_a_url_without_api(server):
    [found] = check_server(Api(server.removesuffix("/api"), "admin:pass"))
    assert (found.state, "must end in /api" in found.mend) == ("problem", True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", f"http://user:{SECRET}@127.0.0.1:9/api", "http://[/api"])
def test_a_prefect_server_that_is_not_there(url):
    [found] = check_server(Api(url))
    assert (found.state, "does not answer" in found.found) == ("problem", True)
    assert SECRET not in str(found)


def test_the_repr_of_an_api_shows_no_secret():
    assert SECRET not in repr(Api("http://there/api", f"admin:{SECRET}", SECRET))


# --- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIXELMILL_STORE", str(tmp_path))
    assert main(["doctor", "--direct", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["problems"], list(result)) == (0, ["problems", "warnings", "checks"])
    checks = [check["check"] for check in result["checks"]]
    assert {"packages", "store", "clock", "put-if-absent", "engine", "decoders", "disk", "memory"} <= set(checks)
    assert "prefect" not in checks
    assert len(err.splitlines()) == len(checks)


def test_a_problem_is_exit_code_1(tmp_path, monkeypatch, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_API_URL": url,
        "PREFECT_API_AUTH_STRING": f"admin:{SECRET}",
        "PREFECT_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "flows", "doctor", "--store", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (1, "pixelmill: 1 problem\n")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert line.startswith("problem  prefect         the server at 127.0.0.1:")
    assert SECRET not in done.stdout


def test_a_line():
    assert str(ok("store", "fine")) == "ok       store           fine"
    assert str(problem("store", "bad", "do this")) == "problem  store           bad; to mend: do this"
