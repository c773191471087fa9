"""S3 and what speaks its protocol: whole objects through conditional PUT, our own retries, no caches.

The usual AWS environment variables and profiles decide on endpoint, region, credentials and checksums. Of fsspec's S3
filesystem only the session and the event loop are used: its path methods rewrite keys that look like URLs or versions.
"""

import asyncio
import io
import logging
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from models.errors import Rejected, StorageError, TransientError
from models.records import ListedImage, Status
from tasks.storage import TEMPORARY_PREFIX, FileState, Ignore, Storage, Unfinished, same_content, split_s3

logger = logging.getLogger("pixelmill.storage")

_CONNECTIONS = 64  # reader threads of one process share them
_BLOCK_BYTES = 8 << 20  # of a download
_SLOWEST_UPLOAD_BYTES_PER_S = 100_000

_CONNECTION_TROUBLE = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,  # an overloaded server may send half an answer
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)
_FAILURES = (*_CONNECTION_TROUBLE, boto.BotoCoreError, boto.ClientError, OSError, ValueError)
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_ENDPOINT = "check AWS_ENDPOINT_URL and AWS_REGION"
# What each refusal means to a user. All but these concern one object only, so that they may become one image's row.
_ADVICE = {
    "301": f"the bucket lies in another region; {_ENDPOINT}",
    "AccountProblem": "the account is blocked",
    "AllAccessDisabled": "the account is blocked",
    "AuthorizationHeaderMalformed": f"the bucket lies in another region; {_ENDPOINT}",
    "ExpiredToken": "the credentials have expired; renew them",
    "IllegalLocationConstraintException": f"the bucket lies in another region; {_ENDPOINT}",
    "InvalidAccessKeyId": f"the access key is not known there; {_CREDENTIALS}",
    "InvalidSecurity": f"the credentials are refused; {_CREDENTIALS}",
    "InvalidToken": f"the session token is refused; {_CREDENTIALS}",
    "NoSuchBucket": f"there is no such bucket; create it, or {_ENDPOINT}",
    "NotSignedUp": "the account is not signed up for S3",
    "PermanentRedirect": f"the bucket lies in another region; {_ENDPOINT}",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "SignatureDoesNotMatch": f"the secret key is wrong; {_CREDENTIALS}",
    "TokenRefreshRequired": "the credentials have expired; renew them",
}


# Operations on a bucket; all others name a key in it.
_OF_BUCKETS = {"list_objects_v2", "list_multipart_uploads"}


class _Refused(StorageError):
    """The server's final answer to one request."""

    def __init__(self, message: str, code: str = "", status: int = 0):  # defaults, so that it can be unpickled
        super().__init__(message)
        self.code = code
        self.status = status


def _answer_of(error: BaseException) -> tuple[str, int]:
    """Code and HTTP status of a server's refusal; of the code, which the server words, only letters and digits."""
    response = error.response if isinstance(error, boto.ClientError) else {}
    code = re.sub(r"[^A-Za-z0-9.]", "", str(response.get("Error", {}).get("Code", "")))[:64]
    return code, response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, boto.ClientError):
        code, status = _answer_of(error)
        return code in _TRANSIENT_CODES or status == 429 or (status >= 500 and status != 501)
    return isinstance(error, _CONNECTION_TROUBLE) and not isinstance(error, boto.SSLError)


class S3Storage(Storage):
    """All buckets of the endpoint that the environment names."""

    tries = 5
    first_delay_s = 0.25  # doubled after each try, and spread at random so that readers do not come back together
    patience_s = 30.0  # no new try starts later than this
    connect_timeout_s = 5.0
    read_timeout_s = 15.0  # between two pieces of an answer
    put_bytes = (
        1 << 30
    )  # larger files go up in parts; S3 takes up to 5 GiB at once, and more servers do that conditionally
    part_bytes = 64 << 20
    keys_per_page = 1000  # of a listing, and the most that S3 gives

    def __init__(self) -> None:
        self._filesystem: S3FileSystem | None = None
        self._opening = threading.Lock()
        self._endpoint_url = ""

    def _connection(self) -> S3FileSystem:
        with self._opening:
            if self._filesystem is None:
                # botocore itself reads only AWS_DEFAULT_REGION.
                region = os.environ.get("AWS_REGION")
                self._filesystem = S3FileSystem(
                    skip_instance_cache=True,
                    use_listings_cache=False,
                    client_kwargs={"region_name": region} if region else {},
                    config_kwargs={
                        # A retried PUT that had succeeded looks like a lost race, so retries are ours alone.
                        "retries": {"total_max_attempts": 1},
                        "connect_timeout": self.connect_timeout_s,
                        "read_timeout": self.read_timeout_s,
                        "max_pool_connections": _CONNECTIONS,
                    },
                )
            return self._filesystem

    def send(self, operation: str, max_bytes: int | None = None, **request: Any) -> dict[str, Any]:
        """One request and its answer, never retried.

        A Body to send is bytes, or the Path of a file, which is streamed. A body that comes is bytes, empty if it is
        longer than `max_bytes`.
        """

        body = request.get("Body", b"")
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        # The client's own timeouts do not cover a server that takes a connection, but not the body.
        limit_s = self.connect_timeout_s + self.read_timeout_s + size / _SLOWEST_UPLOAD_BYTES_PER_S

        async def exchange() -> dict[str, Any]:
            client = await filesystem.set_session()
            self._endpoint_url = client.meta.endpoint_url
            answer = await asyncio.wait_for(getattr(client, operation)(**request), limit_s)
            if "Body" in answer:
                async with answer["Body"] as stream:
                    wanted = max_bytes is None or answer["ContentLength"] <= max_bytes
                    answer["Body"] = await stream.read() if wanted else b""
            return answer

        filesystem = self._connection()
        with body.open("rb") if isinstance(body, Path) else nullcontext(body) as content:
            if "Body" in request:
                request["Body"] = content
            return self.perform(operation, sync, filesystem.loop, exchange)

    def _request(self, operation: str, uri: str, max_bytes: int | None = None, **request: Any) -> dict[str, Any]:
        """Sends one request until it is answered.

        Raises FileNotFoundError, TransientError when no try was answered, _Refused for every other refusal.
        """
        bucket, key = split_s3(uri)
        request["Bucket"] = bucket
        if operation not in _OF_BUCKETS:
            request["Key"] = key
        started = time.monotonic()
        for attempt in range(self.tries):
            try:
                answer = self.send(operation, max_bytes, **request)
                if "Body" not in answer or (max_bytes is not None and answer["ContentLength"] > max_bytes):
                    return answer
                if len(answer["Body"]) == answer["ContentLength"]:
                    return answer
                raise boto.IncompleteReadError(actual_bytes=len(answer["Body"]), expected_bytes=answer["ContentLength"])
            except _FAILURES as error:
                if _answer_of(error)[0] in ("NoSuchKey", "404"):
                    raise FileNotFoundError(uri) from None
                late = attempt == self.tries - 1 or time.monotonic() - started > self.patience_s
                if late or not _is_transient(error):
                    raise self._failure(uri, error) from None
            time.sleep(self.first_delay_s * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")

    def _failure(self, uri: str, error: BaseException) -> StorageError:
        """One line on what went wrong and how to mend it.

        Of the error itself only its kind is told: its text may hold an address with a password, or parts of a request.
        """
        code, status = _answer_of(error)
        if _is_transient(error):
            what = (
                f"answers {code or 'with errors'} (HTTP {status})"
                if status
                else f"does not answer ({type(error).__name__})"
            )
            return TransientError(
                f"{uri}: {self._endpoint()} {what}, after {self.tries} tries; {_ENDPOINT} and the network"
            )
        if isinstance(error, boto.ClientError):
            advice = _ADVICE.get(code)
            if advice is None and status == 501:
                advice = "this server cannot do what a store needs (writes with If-None-Match)"
            elif advice is None and status == 403:
                advice = f"these credentials may not do this; {_CREDENTIALS}, and the permissions of the bucket"
            return _Refused(
                f"{uri}: {self._endpoint()} answers {code} (HTTP {status}): {advice or 'refused'}", code, status
            )
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            return StorageError(
                f"{uri}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        if isinstance(error, boto.ParamValidationError):
            return StorageError(f"{uri}: not a valid bucket or key name")
        if isinstance(error, boto.SSLError):
            return StorageError(
                f"{uri}: the certificate of {self._endpoint()} is not trusted; check AWS_CA_BUNDLE and AWS_ENDPOINT_URL"
            )
        return StorageError(
            f"{uri}: S3 cannot be used ({type(error).__name__}); check AWS_PROFILE, AWS_ENDPOINT_URL and AWS_REGION"
        )

    def _endpoint(self) -> str:
        """Host and port only: a URL may carry a password."""
        parts = urlsplit(self._endpoint_url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname or 'the S3 endpoint'}{port}"

    def read(self, uri: str) -> bytes:
        return self._request("get_object", uri)["Body"]

    def exists(self, uri: str) -> bool:
        return self._head(uri) is not None

    def _head(self, uri: str) -> FileState | None:
        if not split_s3(uri)[1]:
            return None
        try:
            answer = self._request("head_object", uri)
        except FileNotFoundError:
            return None
        return FileState(uri, answer["ETag"].strip('"'), answer["ContentLength"])

    def state(self, uri: str) -> FileState | None:
        try:
            return self._head(uri)
        except _Refused as refusal:
            if refusal.status == 403:
                return None
            raise

    def names(self, uri: str) -> list[str]:
        found: set[str] = set()
        for prefix, page in self._pages(uri, "/"):
            found.update(item["Key"][len(prefix) :] for item in page.get("Contents", ()))
            found.update(item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", ()))
        return sorted(found - {""})

    def is_folder(self, uri: str) -> bool:
        return any(page.get("Contents") or page.get("CommonPrefixes") for _, page in self._pages(uri, "/", keys=1))

    def _pages(self, uri: str, delimiter: str, keys: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """The key prefix of a folder and its listing, page by page, each asked for anew."""
        key = split_s3(uri)[1].rstrip("/")
        request: dict[str, Any] = {"Prefix": f"{key}/" if key else "", "Delimiter": delimiter}
        while True:
            page = self._request("list_objects_v2", uri, MaxKeys=keys or self.keys_per_page, **request)
            yield request["Prefix"], page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        def write() -> None:
            self._request("put_object", uri, Body=data, IfNoneMatch="*")

        return self._put(uri, write, lambda: self.read(uri) == data)

    def put_file_if_absent(self, uri: str, path: Path) -> bool:
        def write() -> None:
            self._request("put_object", uri, Body=path, IfNoneMatch="*")

        def write_in_parts() -> None:
            self._upload(uri, path)

        def same() -> bool:
            with path.open("rb") as ours, self.open(uri) as theirs:
                return same_content(ours, theirs)

        if path.stat().st_size <= self.put_bytes:
            return self._put(uri, write, same)
        # Not to send gigabytes for a race that is lost already.
        return same() if self.exists(uri) else self._put(uri, write_in_parts, same)

    def _put(self, uri: str, write: Callable[[], None], same: Callable[[], bool]) -> bool:
        """Decides who won a conditional write by what is there: an answer that got lost looks like a lost race."""
        for attempt in range(self.tries):
            outage = None
            try:
                write()
                return True
            except _Refused as refusal:
                # 409: another conditional write was under way. NoSuchUpload: completed before, unheard.
                if refusal.status not in (409, 412) and refusal.code != "NoSuchUpload":
                    raise
            except TransientError as error:
                outage = error
            try:
                return same()
            except FileNotFoundError:
                if outage is not None:
                    raise outage from None
            time.sleep(self.first_delay_s * 2**attempt * random.uniform(0.5, 1.5))
        raise TransientError(f"{uri}: cannot be written, other writers interfere; try again")

    def _upload(self, uri: str, path: Path) -> None:
        """A multipart upload, of which nothing shows before its conditional completion."""
        upload = {"UploadId": self._request("create_multipart_upload", uri)["UploadId"]}
        try:
            parts: list[dict[str, Any]] = []
            with path.open("rb") as file:
                while block := file.read(self.part_bytes):
                    number = len(parts) + 1
                    answer = self._request("upload_part", uri, PartNumber=number, Body=block, **upload)
                    parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            self._request("complete_multipart_upload", uri, MultipartUpload={"Parts": parts}, IfNoneMatch="*", **upload)
        except BaseException:
            try:
                self._request("abort_multipart_upload", uri, **upload)
            except StorageError as error:
                if getattr(error, "code", "") != "NoSuchUpload":
                    logger.warning("an unfinished upload stays behind: %s", error)
            raise

    def replace(self, uri: str, data: bytes) -> None:
        self._request("put_object", uri, Body=data)

    def remove(self, uri: str) -> None:
        with suppress(FileNotFoundError):  # some servers say so
            self._request("delete_object", uri)

    def modified_at(self, uri: str) -> float | None:
        try:
            return self._request("head_object", uri)["LastModified"].timestamp()
        except FileNotFoundError:
            return None

    @contextmanager
    def fetch(self, uri: str) -> Iterator[Path]:
        with tempfile.NamedTemporaryFile(prefix="pixelmill-", suffix=PurePosixPath(split_s3(uri)[1]).suffix) as file:
            with self.open(uri) as source:
                shutil.copyfileobj(source, file, _BLOCK_BYTES)
            file.flush()
            yield Path(file.name)

    def open(self, uri: str) -> BinaryIO:
        state = self._head(uri)
        if state is None:
            raise FileNotFoundError(uri)
        return io.BufferedReader(_RangeReader(self, state), _BLOCK_BYTES)

    def read_image(self, image: ListedImage, max_bytes: int) -> bytes:
        try:
            answer = self._request("get_object", image.image, max_bytes)
        except FileNotFoundError:
            reason = "gone since it was listed" if image.fingerprint else "not there when it was listed"
            raise Rejected(Status.MISSING, reason) from None
        except _Refused as refusal:
            if refusal.code in _ADVICE:
                raise
            raise Rejected(Status.UNREADABLE, f"{refusal.code} (HTTP {refusal.status})") from None
        if answer["ETag"].strip('"') != image.fingerprint:
            raise Rejected(Status.MISSING, "changed since it was listed")
        if answer["ContentLength"] > max_bytes:
            raise Rejected(Status.TOO_LARGE, f"{answer['ContentLength']} bytes, more than {max_bytes}")
        return answer["Body"]

    def walk(
        self, uri: str, *, recursive: bool, ignore: Ignore, ignored: dict[str, int], exclude: str | None = None
    ) -> Iterator[FileState]:
        bucket, _ = split_s3(uri)
        root = f"s3://{bucket}/"
        excluded = f"{exclude}/".removeprefix(root) if exclude and exclude.startswith(root) else None
        known_folder: str | None = None  # keys come sorted, so that the folder of most is that of the one before
        folder_reason: str | None = None
        for prefix, page in self._pages(uri, "" if recursive else "/"):
            below = excluded is not None and excluded.startswith(prefix) and excluded != prefix
            for item in page.get("Contents", ()):
                key: str = item["Key"]
                if key.endswith("/") or (below and key.startswith(excluded or "")):
                    continue  # a folder's marker, or what is not to be listed
                folder, _, name = key[len(prefix) :].rpartition("/")
                if folder != known_folder:
                    known_folder = folder
                    folder_reason = next(filter(None, (ignore(part, True) for part in folder.split("/"))), None)
                if reason := folder_reason or ignore(name, False):
                    ignored[reason] = ignored.get(reason, 0) + 1
                else:
                    yield FileState(root + key, item["ETag"].strip('"'), item["Size"])

    def unfinished(self, uri: str) -> Iterator[Unfinished]:
        for prefix, page in self._pages(uri, ""):
            for item in page.get("Contents", ()):
                if item["Key"][len(prefix) :].rpartition("/")[2].startswith(TEMPORARY_PREFIX):
                    place = f"s3://{split_s3(uri)[0]}/{item['Key']}"
                    yield Unfinished(place, item["Size"], item["LastModified"].timestamp())
        yield from self._uploads(uri)

    def _uploads(self, uri: str) -> Iterator[Unfinished]:
        """Uploads in parts, neither completed nor aborted; their parts are paid for, and no listing shows them."""
        bucket, key = split_s3(uri)
        marker: dict[str, Any] = {}
        while True:
            request = {"Prefix": f"{key}/" if key else "", **marker}
            page = self._request("list_multipart_uploads", uri, **request)
            for upload in page.get("Uploads", ()):
                place, identity = f"s3://{bucket}/{upload['Key']}", upload["UploadId"]
                try:
                    parts = self._request("list_parts", place, UploadId=identity).get("Parts", ())
                except _Refused as refusal:
                    if refusal.code == "NoSuchUpload":  # completed or aborted in between
                        continue
                    raise
                size = sum(part["Size"] for part in parts)  # of the first thousand
                yield Unfinished(place, size, upload["Initiated"].timestamp(), identity)
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, unfinished: Unfinished) -> None:
        if not unfinished.upload:
            self.remove(unfinished.uri)
            return
        try:
            self._request("abort_multipart_upload", unfinished.uri, UploadId=unfinished.upload)
        except _Refused as refusal:
            if refusal.code != "NoSuchUpload":
                raise


class _RangeReader(io.RawIOBase):
    """Reads an object piece by piece; of a version that is replaced meanwhile nothing more is read."""

    def __init__(self, storage: S3Storage, state: FileState):
        self._storage = storage
        self._state = state
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._state.bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._state.bytes)
        if end <= self._position:
            return 0
        span = f"bytes={self._position}-{end - 1}"
        answer = self._storage._request("get_object", self._state.uri, Range=span)
        if answer["ETag"].strip('"') != self._state.fingerprint:
            raise StorageError(f"{self._state.uri}: was replaced while it was read; run it again")
        buffer[: end - self._position] = answer["Body"]
        count = end - self._position
        self._position = end
        return count
