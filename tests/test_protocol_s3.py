"""Exactly once, on S3: kills, encounters and random rounds, while the server refuses, forgets and cuts short."""

import contextlib
import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError
from protocol_rounds import (
    FIRST,
    Life,
    Mortal,
    Violation,
    World,
    Worlds,
    check_complete,
    check_disk,
    check_quiet,
    interrupt_everywhere,
    kill_everywhere,
    predict,
    random_round,
)

from models.errors import TransientError
from tasks.storage import Storage, open_storage
from tasks.storage_s3 import S3Storage

Fault = Callable[[str], str | None]  # operation → what befalls its next request, if anything


def no_fault(operation: str) -> None:
    """A healthy server."""


class MortalS3(Mortal, S3Storage):
    """S3 as one process sees it, over a connection that may lose what is asked and what is answered."""

    first_delay_s = 0.0005

    def __init__(self, life: Life, world: "S3World"):
        super().__init__(life, world)
        self._filesystem = open_storage("s3://")._connection()
        self._fault = world.fault

    def send(self, operation: str, max_bytes: int | None = None, **request: Any) -> dict[str, Any]:
        fault = self._fault(operation)
        if fault == "503":
            raise _refusal(operation, 503, "SlowDown")
        if fault == "409" and "IfNoneMatch" in request:
            raise _refusal(operation, 409, "ConditionalRequestConflict")
        answer = super().send(operation, max_bytes, **request)
        if fault == "lost":
            raise ConnectionClosedError(endpoint_url="http://nowhere")
        if fault == "cut" and "Body" in answer:
            answer["Body"] = answer["Body"][: len(answer["Body"]) // 2]
        return answer


def _refusal(operation: str, status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, operation)


class S3World(World):
    """A prefix of images and a store in one bucket."""

    def __init__(self, client: Any, bucket: str, number: int, make_storage: Callable[..., Storage] = MortalS3):
        super().__init__(f"s3://{bucket}/images", f"s3://{bucket}/store-{number}")
        self.fault: Fault = no_fault
        self._client = client
        self._bucket = bucket
        self._prefix = f"store-{number}/"
        self._make_storage = make_storage

    def put(self, name: str, data: bytes) -> None:
        self.history[f"{self.source}/{name}", hashlib.md5(data).hexdigest()] = data
        if name in self.names():
            self.gone.add(self.version(name))
        self._client.put_object(Bucket=self._bucket, Key=f"images/{name}", Body=data)

    def remove(self, name: str) -> None:
        self.gone.add(self.version(name))
        self._client.delete_object(Bucket=self._bucket, Key=f"images/{name}")

    def rename(self, name: str, new: str) -> None:
        self.put(new, self.history[self.version(name)])
        self.remove(name)

    def _objects(self, prefix: str) -> dict[str, Any]:
        found = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix).get("Contents", [])
        return {item["Key"].removeprefix(prefix): item for item in found}

    def names(self) -> list[str]:
        return sorted(self._objects("images/"))

    def version(self, name: str) -> tuple[str, str]:
        return f"{self.source}/{name}", self._client.head_object(Bucket=self._bucket, Key=f"images/{name}")[
            "ETag"
        ].strip('"')

    def files(self) -> dict[str, bytes]:
        return {
            name: self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
            for name in self._objects(self._prefix)
        }

    def stamps(self) -> dict[str, Any]:
        return {name: (item["ETag"], item["LastModified"]) for name, item in self._objects(self._prefix).items()}

    def storage(self, life: Life | None = None) -> Storage:
        return self._make_storage(life or Life(), self)


@pytest.fixture(scope="module")
def client(s3_server: str) -> Iterator[Any]:
    """A plain client, beside the code under test."""
    client = botocore.session.get_session().create_client(
        "s3", endpoint_url=s3_server, region_name="us-east-1", aws_access_key_id="anyone", aws_secret_access_key="any"
    )
    yield client
    client.close()


@pytest.fixture(scope="module")
def connections() -> list[Any]:
    """The connection of the first test, for all: it is not what is tested, and takes longer than a run."""
    return []


@pytest.fixture
def connection(bucket: str, connections: list[Any]) -> None:
    """Lets every S3 storage of the test share one connection."""
    storage = open_storage("s3://")
    storage._filesystem = connections[0] if connections else storage._connection()
    connections[:] = [storage._filesystem]


@pytest.fixture
def worlds(client: Any, bucket: str, connection: None) -> Worlds:
    """Worlds in which nothing was predicted yet, all over the same images."""
    first = S3World(client, bucket, -1)
    first.fill(random.Random(1))

    def make(number: int, make_storage: Callable[..., Storage] = MortalS3) -> S3World:
        world = S3World(client, bucket, number, make_storage)
        world.history = first.history
        return world

    return make


def random_faults(seed: int, share: float) -> Fault:
    """Befalls a share of all requests, but never so many tries of one that they run out."""
    rng = random.Random(seed)
    in_a_row = threading.local()

    def fault(operation: str) -> str | None:
        count = getattr(in_a_row, "count", 0)
        hit = count < S3Storage.tries - 2 and rng.random() < share
        in_a_row.count = count + 1 if hit else 0
        return rng.choice(("503", "409", "lost", "cut")) if hit else None

    return fault


def nth_put(number: int, fault: str) -> Fault:
    """Befalls one write, counted from 0."""
    puts = iter(range(1000))
    return lambda operation: fault if operation == "put_object" and next(puts) == number else None


def outage(start: int, end: int) -> Fault:
    """No answer to the requests from `start` up to `end`."""
    requests = iter(range(100_000))
    return lambda operation: "503" if start <= next(requests) < end else None


def test_kills(worlds: Worlds) -> None:
    assert kill_everywhere(worlds, range(1, 1000, 15)) >= 5


def test_encounters(worlds: Worlds) -> None:
    assert interrupt_everywhere(worlds, range(3, 1000, 19)) >= 4


@pytest.mark.parametrize("fault", ["503", "409", "lost"])
@pytest.mark.parametrize("number", [0, 1, 3], ids=["table", "plan", "part"])
def test_one_write_that_fails_is_repaired_at_once(worlds: Worlds, number: int, fault: str) -> None:
    world = worlds(1)
    world.fault = nth_put(number, fault)
    ran = predict(world)
    assert (ran.claimed.number, ran.claimed.planned, ran.failed) == (1, 12, [])
    check_complete(world, FIRST)


@pytest.mark.parametrize("seed", range(3))
def test_every_third_request_fails(worlds: Worlds, seed: int) -> None:
    world = worlds(1)
    world.fault = random_faults(seed, 0.3)
    predict(world)
    check_disk(world)
    world.fault = no_fault
    predict(world)
    check_complete(world, FIRST)
    check_quiet(world)


@pytest.mark.parametrize("start", [2, 12, 30])
def test_outage(worlds: Worlds, start: int) -> None:
    """An outage ends the run, or fails shards; it never ends as a row."""
    world = worlds(1)
    world.fault = outage(start, start + 200)
    with contextlib.suppress(TransientError):
        predict(world)
    check_disk(world)
    world.fault = no_fault
    predict(world)
    check_complete(world, FIRST)
    check_quiet(world)


def test_random_rounds(client: Any, bucket: str, connection: None) -> None:
    rng = random.Random(1)
    world = S3World(client, bucket, 0)
    world.fill(rng)
    for seed in range(2):
        world.fault = random_faults(seed, 0.03)
        random_round(world, rng)


class Overwrites(MortalS3):
    """Replaces what another run has published."""

    def _request(self, operation: str, uri: str, max_bytes: int | None = None, **request: Any) -> dict[str, Any]:
        request.pop("IfNoneMatch", None)
        return super()._request(operation, uri, max_bytes, **request)


class CachesListings(MortalS3):
    """Answers from what it listed earlier."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._listings: dict[str, list[str]] = {}

    def names(self, uri: str) -> list[str]:
        return self._listings.setdefault(uri, super().names(uri))


def test_overwriting_is_noticed(worlds: Any) -> None:
    with pytest.raises(Violation, match="was changed"):
        interrupt_everywhere(lambda number: worlds(number, Overwrites), range(5, 1000, 2))


def test_cached_listings_are_noticed(worlds: Any) -> None:
    with pytest.raises(Violation, match=r"are open|no row|steps"):
        kill_everywhere(lambda number: worlds(number, CachesListings), range(1, 2))
