"""Storage: whole files or none, one winner, exact versions, and errors that name the mend but no secret."""

import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from conftest import SECRET

from models.errors import Rejected, StorageError, TransientError, UsageError
from models.records import ListedImage, Status
from tasks import storage_local
from tasks.storage import Storage, join, local_path, local_uri, normalise, open_storage
from tasks.storage_local import LocalStorage
from tasks.storage_s3 import S3Storage

MAX_BYTES = 1 << 20


class Killed(BaseException):
    """What a test throws where a process would die."""


def kind_of(uri: str) -> type[Storage]:
    return S3Storage if uri.startswith("s3://") else LocalStorage


class QuickS3(S3Storage):
    """S3 without a client and long pauses of its own."""

    first_delay_s = 0.001

    def _connection(self) -> Any:
        shared = open_storage("s3://")
        assert isinstance(shared, S3Storage)
        return shared._connection()


def dying(uri: str, at: int) -> Storage:
    """A storage whose process dies at its step number `at`: from then on nothing happens any more."""
    kind: Any = QuickS3 if uri.startswith("s3://") else LocalStorage

    class Dying(kind):
        steps = 0

        def step(self, name: str) -> None:
            self.steps += 1
            if self.steps > at:
                raise Killed(name)

    return Dying()


def refusal(code: str, status: int) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Any"
    )


class FaultyS3(QuickS3):
    """Goes wrong once per entry of `faults`, in their order: step name, and what to raise there."""

    def __init__(self, *faults: tuple[str, Callable[[], Exception]]):
        super().__init__()
        self.faults = list(faults)
        self.steps: list[str] = []

    def step(self, name: str) -> None:
        self.steps.append(name)
        if self.faults and self.faults[0][0] == name:
            raise self.faults.pop(0)[1]()


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes S3 uploads go in parts as soon as they are larger than this."""
    monkeypatch.setattr(S3Storage, "put_bytes", 1000)
    monkeypatch.setattr(S3Storage, "part_bytes", 1000)


def listed(uri: str) -> ListedImage:
    state = open_storage(uri).state(uri)
    assert state is not None
    return ListedImage(*state)


def rejection(storage: Storage, image: ListedImage, max_bytes: int = MAX_BYTES) -> tuple[Status, str]:
    with pytest.raises(Rejected) as caught:
        storage.read_image(image, max_bytes)
    return caught.value.status, caught.value.reason


# URIs


@pytest.mark.parametrize(
    ("typed", "uri"),
    [
        pytest.param("/a/b.jpg", "/a/b.jpg", id="absolute"),
        pytest.param("/a/../b//c/", "/b/c", id="dots and slashes"),
        pytest.param("b.jpg", "/here/b.jpg", id="relative"),
        pytest.param("~/b.jpg", "/home/me/b.jpg", id="home"),
        pytest.param("/a/%41::[1] \n😀.jpg", "/a/%41::[1] \n😀.jpg", id="literal"),
        pytest.param("/a/\udcff%.jpg", "file:///a/%FF%25.jpg", id="not UTF-8"),
        pytest.param("file:///a/%41%20b.jpg", "/a/A b.jpg", id="file URI"),
        pytest.param("file://localhost/a", "/a", id="file URI with host"),
        pytest.param("file:///a/%FF.jpg", "file:///a/%FF.jpg", id="file URI, not UTF-8"),
        pytest.param("s3://b/k/../%41 //x?versionId=1#f", "s3://b/k/../%41 //x?versionId=1#f", id="key literal"),
        pytest.param("s3://b/prefix/", "s3://b/prefix", id="prefix"),
        pytest.param("s3://b/", "s3://b", id="bucket"),
    ],
)
def test_each_file_has_one_uri(typed: str, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    assert normalise(typed) == uri
    assert normalise(uri) == uri


@pytest.mark.parametrize(
    "typed",
    ["", "a\0b", "s3://", "s3:///key", "s3://b/\udcff", "http://host/a.jpg", "gs://b/k", "memory://a", "file://host/a"],
)
def test_other_addresses_are_refused_with_what_is_supported(typed: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)^expected .*got "):
        normalise(typed)


@pytest.mark.parametrize(
    ("folder", "relative", "uri"),
    [
        pytest.param("/lists", "a.jpg", "/lists/a.jpg", id="local"),
        pytest.param("/lists", "../~a.jpg", "/~a.jpg", id="parent"),
        pytest.param("file:///%FF", "a%.jpg", "file:///%FF/a%25.jpg", id="not UTF-8"),
        pytest.param("/lists", "s3://b/k", "s3://b/k", id="absolute"),
        pytest.param("s3://b/lists", "./../x//a.jpg", "s3://b/x//a.jpg", id="s3"),
        pytest.param("s3://b", "a.jpg", "s3://b/a.jpg", id="bucket"),
    ],
)
def test_relative_addresses_count_from_a_folder(folder: str, relative: str, uri: str) -> None:
    assert normalise(relative, folder=folder) == uri


def test_local_uris_lead_back_to_the_bytes_of_the_name() -> None:
    for name in (b"/a/\xff%41.jpg", "/a/%41 é\n.jpg".encode()):
        uri = local_uri(os.fsdecode(name))
        uri.encode()
        assert os.fsencode(local_path(uri)) == name
    assert join("file:///%FF", "a%", "b") == "file:///%FF/a%25/b"


# Whole files


def test_files_appear_once_and_whole(root: str) -> None:
    storage = open_storage(root)
    uri = join(root, "tables", "t", "00000001.parquet")
    assert (storage.exists(uri), storage.names(root), storage.is_folder(root)) == (False, [], False)
    with pytest.raises(FileNotFoundError):
        storage.read(uri)
    assert storage.put_if_absent(uri, b"ours")
    assert storage.put_if_absent(uri, b"ours")
    assert not storage.put_if_absent(uri, b"theirs")
    assert not storage.put_if_absent(uri, b"")
    assert storage.read(uri) == b"ours"
    assert (storage.exists(uri), storage.exists(root), storage.is_folder(root)) == (True, False, True)
    assert storage.names(join(root, "tables", "t")) == ["00000001.parquet"]
    assert storage.put_if_absent(join(root, "tables", "t", "00000002.parquet"), b"")
    assert storage.names(join(root, "tables", "t")) == ["00000001.parquet", "00000002.parquet"]
    assert storage.names(join(root, "tables")) == ["t"]


def test_replace_leaves_the_new_file_alone(root: str) -> None:
    storage = open_storage(root)
    uri = join(root, "aliases.json")
    for content in (b"first", b"second"):
        storage.replace(uri, content)
        assert storage.read(uri) == content
    assert storage.names(root) == ["aliases.json"]


@pytest.mark.parametrize(
    ("size", "parts"), [(0, False), (3 << 20, False), (2500, True)], ids=["empty", "streamed", "in parts"]
)
def test_local_files_are_put_if_absent(
    root: str, size: int, parts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        in_parts(monkeypatch)
    storage = open_storage(root)
    content = os.urandom(size)
    (ours := tmp_path / "ours").write_bytes(content)
    (theirs := tmp_path / "theirs").write_bytes(content + b"more")
    uri = join(root, "model.onnx")
    assert storage.put_file_if_absent(uri, ours)
    assert storage.put_file_if_absent(uri, ours)
    assert not storage.put_file_if_absent(uri, theirs)
    with storage.fetch(uri) as path:
        assert path.read_bytes() == content
        assert path.suffix == ".onnx"
    with storage.open(uri) as file:
        assert file.seek(size // 2) == size // 2
        assert file.read() == content[size // 2 :]
    with pytest.raises(FileNotFoundError), storage.fetch(join(root, "absent")):
        pass
    with pytest.raises(FileNotFoundError):
        storage.open(join(root, "absent"))


@pytest.mark.parametrize("same", [True, False], ids=["same content", "different content"])
def test_a_race_of_threads_has_one_winner(root: str, same: bool) -> None:
    storage = open_storage(root)
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        return storage.put_if_absent(join(root, "race"), b"content" if same else b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    if same:
        assert all(won)
    else:
        assert [number for number in range(8) if won[number]] == [int(storage.read(join(root, "race")))]


RACER = """
import sys
from tasks.storage import open_storage
uri, number = sys.argv[1:]
storage = open_storage(uri)
storage.exists(uri)
print("ready", flush=True)
sys.stdin.readline()
print(int(storage.put_if_absent(uri, number.encode())))
"""


def test_a_race_of_processes_has_one_winner(root: str) -> None:
    uri = join(root, "race")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, uri, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(4)
    ]
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [racer.communicate()[0].strip() == "1" for racer in racers]
    assert [number for number in range(4) if won[number]] == [int(open_storage(uri).read(uri))]


@pytest.mark.parametrize("operation", ["put", "put file", "replace"])
def test_a_death_at_any_step_leaves_the_old_or_the_new_file(
    root: str, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    new = os.urandom(2500) if operation == "put file" else b"new"
    (source := tmp_path / "source").write_bytes(new)
    writes: dict[str, Callable[[Storage, str], object]] = {
        "put": lambda storage, uri: storage.put_if_absent(uri, new),
        "put file": lambda storage, uri: storage.put_file_if_absent(uri, source),
        "replace": lambda storage, uri: storage.replace(uri, new),
    }
    survivor = open_storage(root)
    deaths = 0
    while True:
        uri = join(root, f"folder-{deaths}", "file.parquet")
        if operation == "replace":
            survivor.put_if_absent(uri, b"old")
        try:
            writes[operation](dying(root, deaths), uri)
            break
        except Killed:
            deaths += 1
        content = survivor.read(uri) if survivor.exists(uri) else None
        assert content in (new, b"old" if operation == "replace" else None)
        assert set(survivor.names(join(uri, ".."))) <= {"file.parquet"}
        assert writes[operation](survivor, uri) in (True, None)
        assert survivor.read(uri) == new
    assert deaths >= (2 if root.startswith("s3") and operation != "put file" else 8)


def test_a_local_file_is_durable_before_its_name_is(tmp_path: Path) -> None:
    steps: list[str] = []

    class Watched(LocalStorage):
        def step(self, name: str) -> None:
            if name.endswith(":after"):
                steps.append(name.removesuffix(":after"))

    assert Watched().put_if_absent(str(tmp_path / "folder" / "a.parquet"), b"data")
    assert steps == ["mkdir", "fsync folder", "create", "write", "fsync", "link", "fsync folder", "unlink"]


def test_temporary_names_are_no_parquet_files_and_not_listed(tmp_path: Path) -> None:
    seen: set[str] = set()

    class Watched(LocalStorage):
        def step(self, name: str) -> None:
            seen.update(os.listdir(tmp_path))

    assert Watched().put_if_absent(str(tmp_path / "a.parquet"), b"data")
    temporary = seen - {"a.parquet"}
    assert temporary
    assert not any(name.endswith(".parquet") for name in temporary)
    (tmp_path / temporary.pop()).write_bytes(b"left by a killed process")
    assert open_storage(str(tmp_path)).names(str(tmp_path)) == ["a.parquet"]


# Local disk


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        pytest.param("link", errno.EPERM, "has no hard links", id="no hard links"),
        pytest.param("link", errno.ENOTSUP, "has no hard links", id="hard links not supported"),
        pytest.param("fsync", errno.ENOSPC, "No space left on device; free some space", id="disk full"),
        pytest.param("link", errno.EDQUOT, "free some space", id="quota"),
        pytest.param("open", errno.EACCES, "Permission denied", id="permission"),
        pytest.param("fsync", errno.EIO, "Input/output error", id="I/O error"),
    ],
)
def test_a_failed_local_write_names_the_path_and_leaves_nothing(
    function: str, error: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(storage_local.os, function, fail)
        with pytest.raises(StorageError, match=message) as caught:
            LocalStorage().put_if_absent(str(tmp_path / "a.parquet"), b"data")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"image", b""], ids=["bytes", "empty"])
def test_an_image_is_read_as_it_was_listed(root: str, content: bytes) -> None:
    storage = open_storage(root)
    uri = join(root, "a::b [1]%41 é.jpg")
    storage.put_if_absent(uri, content)
    assert storage.read_image(listed(uri), MAX_BYTES) == content


def test_an_image_that_changed_or_went_is_missing(root: str) -> None:
    storage = open_storage(root)
    uri = join(root, "a.jpg")
    assert rejection(storage, ListedImage(uri, "", 0)) == (Status.MISSING, "not there when it was listed")
    assert rejection(storage, ListedImage(uri, "3-1", 3)) == (Status.MISSING, "gone since it was listed")
    storage.put_if_absent(uri, b"old")
    before = listed(uri)
    storage.replace(uri, b"new")
    assert rejection(storage, before) == (Status.MISSING, "changed since it was listed")
    assert rejection(storage, before, max_bytes=2) == (Status.MISSING, "changed since it was listed")
    assert rejection(storage, ListedImage(uri, "", 0)) == (Status.MISSING, "changed since it was listed")
    assert rejection(storage, listed(uri), max_bytes=2) == (Status.TOO_LARGE, "3 bytes, more than 2")


def test_an_image_that_grows_while_it_is_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a.jpg").write_bytes(b"half")
    image = listed(str(path))
    fstat = os.fstat
    looks: list[int] = []

    def growing(descriptor: int) -> os.stat_result:
        if looks:
            path.write_bytes(b"half and the rest")
        looks.append(descriptor)
        return fstat(descriptor)

    monkeypatch.setattr(storage_local.os, "fstat", growing)
    assert rejection(LocalStorage(), image) == (Status.MISSING, "changed since it was listed")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(make_fifo, "not a regular file", id="FIFO"),
        pytest.param(lambda path: path.mkdir(), "not a regular file", id="folder"),
        pytest.param(lambda path: path.symlink_to("/etc/hostname"), "a link, not a regular file", id="link"),
        pytest.param(lambda path: path.symlink_to(path.name), "a link, not a regular file", id="link to itself"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "a link, not a regular file", id="dangling link"),
    ],
)
def test_what_is_no_regular_file_is_missing_and_never_blocks(
    make: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    make(path := tmp_path / "a.jpg")
    assert LocalStorage().state(str(path)) is None
    assert rejection(LocalStorage(), ListedImage(str(path), "5-1", 5)) == (Status.MISSING, reason)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_an_image_that_cannot_be_read_is_unreadable(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(error, os.strerror(error))

    (path := tmp_path / "a.jpg").write_bytes(b"image")
    image = listed(str(path))
    monkeypatch.setattr(storage_local.os, "open", fail)
    assert rejection(LocalStorage(), image) == (Status.UNREADABLE, os.strerror(error))


def test_an_exhausted_process_is_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(storage_local.os, "open", fail)
    with pytest.raises(TransientError, match=r"a\.jpg: Too many open files"):
        LocalStorage().read_image(ListedImage(str(tmp_path / "a.jpg"), "5-1", 5), MAX_BYTES)


def test_many_threads_read_at_once(root: str) -> None:
    storage = open_storage(root)
    uris = [join(root, f"{number}.jpg") for number in range(32)]
    for uri in uris:
        storage.put_if_absent(uri, uri.encode() * 1000)
    images = [listed(uri) for uri in uris] * 4
    with ThreadPoolExecutor(32) as pool:
        contents = list(pool.map(lambda image: storage.read_image(image, MAX_BYTES), images))
    assert contents == [image.image.encode() * 1000 for image in images]


# S3 with faults


def unavailable() -> Exception:
    return refusal("ServiceUnavailable", 503)


def conflict() -> Exception:
    return refusal("ConditionalRequestConflict", 409)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([("put_object:before", unavailable)], id="503"),
        pytest.param([("put_object:before", TimeoutError)] * 3, id="timeouts"),
        pytest.param([("put_object:before", conflict)], id="409, nobody there"),
        pytest.param([("put_object:after", ConnectionResetError)], id="lost answer"),
        pytest.param([("put_object:after", conflict)], id="409, but written"),
        pytest.param(
            [("put_object:after", TimeoutError), *[("put_object:before", TimeoutError)] * 4], id="no answer at all"
        ),
        pytest.param(
            [("put_object:after", TimeoutError), ("get_object:before", unavailable)],
            id="lost answer, 503 on reading back",
        ),
    ],
)
def test_a_write_that_got_through_is_known_to_be_ours(bucket: str, faults: list[Any]) -> None:
    uri = f"s3://{bucket}/part.parquet"
    storage = FaultyS3(*faults)
    assert storage.put_if_absent(uri, b"ours")
    assert not storage.faults
    assert storage.read(uri) == b"ours"


@pytest.mark.parametrize("fault", [conflict, TimeoutError, unavailable])
def test_a_write_that_lost_is_known_to_be_lost(bucket: str, fault: Callable[[], Exception]) -> None:
    uri = f"s3://{bucket}/part.parquet"
    open_storage(uri).put_if_absent(uri, b"theirs")
    assert not FaultyS3(("put_object:before", fault)).put_if_absent(uri, b"ours")
    assert open_storage(uri).read(uri) == b"theirs"


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([("upload_part:before", unavailable)], id="503"),
        pytest.param([("complete_multipart_upload:after", TimeoutError)], id="lost answer"),
        pytest.param([("complete_multipart_upload:before", conflict)], id="409"),
        pytest.param(
            [
                ("complete_multipart_upload:after", TimeoutError),
                *[("complete_multipart_upload:before", TimeoutError)] * 4,
            ],
            id="no answer at all",
        ),
    ],
)
def test_a_multipart_write_that_got_through_is_known_to_be_ours(
    bucket: str, faults: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    (path := tmp_path / "model.onnx").write_bytes(content := os.urandom(2500))
    uri = f"s3://{bucket}/model.onnx"
    storage = FaultyS3(*faults)
    assert storage.put_file_if_absent(uri, path)
    assert not storage.faults
    assert storage.read(uri) == content


@pytest.mark.parametrize("fault", ["put_object:before", "put_object:after"])
def test_a_streamed_file_is_sent_again_from_its_beginning(bucket: str, fault: str, tmp_path: Path) -> None:
    (path := tmp_path / "model.onnx").write_bytes(content := os.urandom(100_000))
    uri = f"s3://{bucket}/model.onnx"
    assert FaultyS3((fault, unavailable)).put_file_if_absent(uri, path)
    assert open_storage(uri).read(uri) == content


def test_a_lost_multipart_write_leaves_no_upload_behind(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    (path := tmp_path / "model.onnx").write_bytes(os.urandom(2500))
    uri = f"s3://{bucket}/model.onnx"
    open_storage(uri).put_if_absent(uri, b"theirs")
    assert not FaultyS3().put_file_if_absent(uri, path)
    storage = FaultyS3()
    monkeypatch.setattr(storage, "exists", lambda uri: False)  # not yet, when the upload begins
    assert not storage.put_file_if_absent(uri, path)
    assert "complete_multipart_upload:before" in storage.steps
    assert "Uploads" not in storage.send("list_multipart_uploads", Bucket=bucket)


@pytest.mark.parametrize("fault", [unavailable, TimeoutError, ConnectionResetError, lambda: refusal("SlowDown", 503)])
def test_reading_is_tried_again_for_a_while(bucket: str, fault: Callable[[], Exception]) -> None:
    uri = f"s3://{bucket}/a.jpg"
    open_storage(uri).put_if_absent(uri, b"image")
    image = listed(uri)
    assert FaultyS3(*[("get_object:before", fault)] * 4).read_image(image, MAX_BYTES) == b"image"
    with pytest.raises(TransientError, match=r"a\.jpg: .* after 5 tries") as caught:
        FaultyS3(*[("get_object:before", fault)] * 5).read_image(image, MAX_BYTES)
    assert SECRET not in str(caught.value)


def test_a_body_that_was_cut_short_is_read_again(bucket: str) -> None:
    class Cutting(FaultyS3):
        cuts = 4

        def send(self, operation: str, max_bytes: int | None = None, **request: Any) -> dict[str, Any]:
            answer = super().send(operation, max_bytes, **request)
            if self.cuts and answer.get("Body"):
                self.cuts -= 1
                answer["Body"] = answer["Body"][:-1]
            return answer

    uri = f"s3://{bucket}/a.jpg"
    open_storage(uri).put_if_absent(uri, b"image")
    storage = Cutting()
    assert storage.read_image(listed(uri), MAX_BYTES) == b"image"
    storage.cuts = 5
    with pytest.raises(TransientError):
        storage.read_image(listed(uri), MAX_BYTES)
    storage.cuts = 1
    assert storage.read(uri) == b"image"


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        pytest.param("AccessDenied", 403, Rejected, id="this object"),
        pytest.param("InvalidObjectState", 403, Rejected, id="archived"),
        pytest.param("SignatureDoesNotMatch", 403, StorageError, id="wrong secret"),
        pytest.param("ExpiredToken", 400, StorageError, id="expired credentials"),
        pytest.param("NoSuchBucket", 404, StorageError, id="no bucket"),
    ],
)
def test_only_what_concerns_one_object_rejects_the_image(
    bucket: str, code: str, status: int, error: type[Exception]
) -> None:
    storage = FaultyS3(("get_object:before", lambda: refusal(code, status)))
    with pytest.raises(error, match=code) as caught:
        storage.read_image(ListedImage(f"s3://{bucket}/a.jpg", "e", 1), MAX_BYTES)
    if isinstance(caught.value, Rejected):
        assert caught.value.status == Status.UNREADABLE


def test_an_object_that_may_not_be_seen_has_no_state(bucket: str) -> None:
    uri = f"s3://{bucket}/a.jpg"
    assert FaultyS3(("head_object:before", lambda: refusal("403", 403))).state(uri) is None
    for code, status in (("400", 400), ("301", 301)):
        with pytest.raises(StorageError, match=code):
            FaultyS3(("head_object:before", lambda: refusal(code, status))).state(uri)  # noqa: B023
    with pytest.raises(StorageError, match="403"):
        FaultyS3(("head_object:before", lambda: refusal("403", 403))).exists(uri)


def test_a_too_large_body_is_not_read(bucket: str) -> None:
    uri = f"s3://{bucket}/a.jpg"
    open_storage(uri).put_if_absent(uri, b"image")
    assert FaultyS3().send("get_object", 4, Bucket=bucket, Key="a.jpg")["Body"] == b""
    assert FaultyS3().send("get_object", 5, Bucket=bucket, Key="a.jpg")["Body"] == b"image"


# Environment, errors and secrets


class Stub(BaseHTTPRequestHandler):
    """Refuses every request with the server's `refusal`, and keeps the request."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        code, status = self.server.refusal  # type: ignore[attr-defined]
        body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = answer

    def handle_expect_100(self) -> bool:
        return not self.server.stalls and super().handle_expect_100()  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def stub(aws_environment: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        server.requests = []  # type: ignore[attr-defined]
        server.stalls = False  # type: ignore[attr-defined]
        server.refusal = ("AccessDenied", 403)  # type: ignore[attr-defined]
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        aws_environment.setenv("AWS_ENDPOINT_URL", f"http://localhost:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


def failures(uri: str) -> Iterator[StorageError]:
    """What every operation on a URI raises."""
    storage = S3Storage()
    for call in (
        lambda: storage.read(uri),
        lambda: storage.names(uri),
        lambda: storage.is_folder(uri),
        lambda: storage.put_if_absent(uri, b"data"),
        lambda: storage.replace(uri, b"data"),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        yield caught.value


@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [
        pytest.param("SignatureDoesNotMatch", 403, "AWS_SECRET_ACCESS_KEY", id="wrong secret"),
        pytest.param("InvalidAccessKeyId", 403, "AWS_ACCESS_KEY_ID", id="wrong key"),
        pytest.param("AccessDenied", 403, "permissions of the bucket", id="no permission"),
        pytest.param("NoSuchBucket", 404, "no such bucket; create it", id="no bucket"),
        pytest.param("PermanentRedirect", 301, "AWS_REGION", id="other region"),
        pytest.param("NotImplemented", 501, "If-None-Match", id="not implemented"),
        pytest.param(f"Odd: {SECRET}\n", 400, "HTTP 400", id="nonsense"),
    ],
)
def test_a_refusal_says_in_one_line_how_to_mend_it(stub: Any, code: str, status: int, advice: str) -> None:
    stub.refusal = (code, status)
    for error in failures("s3://bucket/key"):
        assert "s3://bucket/key: localhost:" in str(error)
        assert advice in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        pytest.param({"AWS_ENDPOINT_URL": "http://user:pass-word@127.0.0.1:9"}, "AWS_ENDPOINT_URL", id="no server"),
        pytest.param({"AWS_ENDPOINT_URL": "nonsense"}, "AWS_ENDPOINT_URL", id="no URL"),
        pytest.param({"AWS_PROFILE": "nobody"}, "AWS_PROFILE", id="no profile"),
        pytest.param(
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no AWS credentials found", id="no credentials"
        ),
        pytest.param({"AWS_REQUEST_CHECKSUM_CALCULATION": "sometimes"}, "S3 cannot be used", id="no such setting"),
    ],
)
def test_what_the_environment_lacks_is_told_without_secrets(
    stub: Any, variables: dict[str, str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Storage, "first_delay_s", 0.001)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for error in failures("s3://bucket/key"):
        shown = "".join(traceback.format_exception(error)) + repr(error)
        assert advice in str(error)
        assert "\n" not in str(error)
        assert SECRET not in shown
        assert "pass-word" not in shown


def test_only_our_own_retries_are_made(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Storage, "first_delay_s", 0.001)
    stub.refusal = ("SlowDown", 503)
    with pytest.raises(TransientError, match=r"SlowDown \(HTTP 503\), after 5 tries"):
        S3Storage().replace("s3://bucket/key", b"data")
    assert len(stub.requests) == 5


def test_a_server_that_stalls_is_given_up(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Storage, "first_delay_s", 0.001)
    monkeypatch.setattr(S3Storage, "connect_timeout_s", 0.1)
    monkeypatch.setattr(S3Storage, "read_timeout_s", 0.1)
    stub.stalls = True
    with pytest.raises(TransientError, match="does not answer"):
        S3Storage().replace("s3://bucket/key", b"data")


def request_with(stub: Any, uri: str = "s3://bucket.with.dots/a b/%41.jpg") -> tuple[str, dict[str, str]]:
    """Path and headers of a conditional PUT as they reach a server."""
    stub.requests.clear()
    with pytest.raises(StorageError):
        S3Storage().put_if_absent(uri, b"data")
    return stub.requests[0]


def test_a_conditional_put_reaches_the_endpoint_in_path_style(stub: Any) -> None:
    path, headers = request_with(stub)
    assert path == "/bucket.with.dots/a%20b/%2541.jpg"
    assert headers["If-None-Match"] == "*"
    assert "x-amz-checksum-crc32" in {name.lower() for name in headers}
    assert "Credential=anyone/" in headers["Authorization"]
    assert "/us-east-1/s3/" in headers["Authorization"]
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({"AWS_REGION": "eu-west-9"}, "/eu-west-9/s3/", id="AWS_REGION"),
        pytest.param({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-west-8"}, "/eu-west-8/s3/", id="AWS_DEFAULT_REGION"),
        pytest.param(
            {"AWS_REGION": "eu-west-9", "AWS_DEFAULT_REGION": "eu-west-8"}, "/eu-west-9/s3/", id="both regions"
        ),
        pytest.param({"AWS_SESSION_TOKEN": "a-token"}, "x-amz-security-token", id="AWS_SESSION_TOKEN"),
    ],
)
def test_the_usual_variables_decide(
    stub: Any, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert expected in request_with(stub)[1]["Authorization"]


def test_checksums_can_be_limited_to_where_they_are_required(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    assert not [name for name in request_with(stub)[1] if "checksum" in name.lower()]
    for value, asked in (("when_supported", True), ("when_required", False)):
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", value)
        stub.requests.clear()
        with pytest.raises(StorageError):
            S3Storage().read("s3://bucket/key")
        assert ("x-amz-checksum-mode" in {name.lower() for name in stub.requests[0][1]}) is asked


def test_endpoint_and_credentials_may_come_from_elsewhere(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (profiles := tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id = me\naws_secret_access_key = {SECRET}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "Credential=me/" in request_with(stub)[1]["Authorization"]


def test_a_storage_shows_and_carries_nothing(root: str) -> None:
    storage = open_storage(root)
    storage.names(root)
    assert repr(storage) == f"{kind_of(root).__name__}()"
    with pytest.raises(TypeError, match="pass URIs"):
        pickle.dumps(storage)
    assert open_storage(root) is storage


def test_an_error_survives_the_way_to_another_process(stub: Any) -> None:
    for error in failures("s3://bucket/key"):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
