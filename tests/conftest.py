"""Fixtures: a folder or a bucket to put files into, and an S3 server in this process."""

import logging
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tasks import storage

if TYPE_CHECKING:
    from tasks.storage_s3 import S3Storage

SECRET = "a-secret-that-no-message-may-show"
_AWS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE")
_AWS_CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")


# A shell lets what it starts in the background ignore Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of PyTorch. On a busy machine threads that wait for each other take many times as long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a moto server, which accepts any credentials, and multipart uploads of small parts."""
    import moto.s3.models
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Credentials of nobody, and no settings of this machine; the S3 storage is opened anew before and after."""
    for name in (*_AWS, *_AWS_CHECKSUMS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.delitem(storage.OPENED, "s3", raising=False)
    yield monkeypatch
    storage.OPENED.pop("s3", None)


@pytest.fixture(scope="session")
def s3_storage() -> "S3Storage":
    """The one client of the moto server; to make one takes longer than most tests."""
    from tasks.storage_s3 import S3Storage

    return S3Storage()


@pytest.fixture
def bucket(s3_server: str, s3_storage: "S3Storage", aws_environment: pytest.MonkeyPatch) -> str:
    """The name of a new, empty bucket; `open_storage` finds it through the environment, here and in children."""
    aws_environment.setenv("AWS_ENDPOINT_URL", s3_server)
    aws_environment.setitem(storage.OPENED, "s3", s3_storage)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3_storage.send("create_bucket", Bucket=name)
    return name


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty folder, on local disk and on S3 in turn: one test body serves both."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"s3://{request.getfixturevalue('bucket')}/root"
