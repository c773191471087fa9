"""Listing: what is an image by its name, what is ignored and counted, and that nothing ends the stream."""

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import NotFound, Rejected, StorageError, UsageError
from models.records import LISTING_SCHEMA, ListedImage, Status
from tasks import listing, storage_local
from tasks.listing import ignore_reason, list_source
from tasks.storage import join, open_storage
from tasks.storage_s3 import S3Storage

ODD_NAMES = ["a::b.jpg", "[1].jpg", "%41.jpg", "x?versionId=1#f.jpg", "sp ace+*.jpg", "😀 é.jpg", "https:__host.jpg"]


def put(root: str, *names: str) -> None:
    for name in names:
        open_storage(root).put_if_absent(join(root, *name.split("/")), name.encode())


def images_of(source: str, **options: Any) -> list[ListedImage]:
    return [ListedImage(**row) for batch in list_source(source, **options) for row in batch.to_pylist()]


def names_of(source: str, **options: Any) -> list[str]:
    """The listed names below the source, sorted."""
    return sorted(image.image.removeprefix(source + "/") for image in images_of(source, **options))


@pytest.mark.parametrize(
    ("name", "is_folder", "reason"),
    [
        ("a.jpg", False, None),
        ("a.JPEG", False, None),
        ("a.b.Png", False, None),
        ("a.heic", False, None),
        ("a.AVIF", False, None),
        ("a.svg", False, None),
        ("a.psd", False, None),
        ("a.nef", False, None),
        ("0a1b2c", False, None),
        ("ends with dot.", False, None),
        ("a.txt", False, "other"),
        ("a.jpg.json", False, "other"),
        ("a.MP4", False, "other"),
        ("00000001.parquet", False, "other"),
        (".a.jpg", False, "hidden"),
        ("._a.jpg", False, "hidden"),
        (".DS_Store", False, "hidden"),
        ("Thumbs.db", False, "hidden"),
        ("Desktop.ini", False, "hidden"),
        (".git", True, "hidden"),
        ("@eaDir", True, "hidden"),
        ("__MACOSX", True, "hidden"),
        ("folder.txt", True, None),
        ("", True, None),
    ],
    ids=repr,
)
def test_names_decide(name: str, is_folder: bool, reason: str | None) -> None:
    assert ignore_reason(name, is_folder) == reason


def test_a_folder_gives_its_images_with_their_versions(root: str) -> None:
    put(root, "a.jpg", "b/c.PNG", "b/d/e", "b/notes.txt", "f.mp4", ".hidden.jpg", ".git/g.jpg", "b/@eaDir/h.jpg")
    put(root, *(f"odd/{name}" for name in ODD_NAMES))
    source = list_source(root)
    rows = [row for batch in source for row in batch.to_pylist()]
    found = {row["image"].removeprefix(root + "/"): ListedImage(**row) for row in rows}
    assert sorted(found) == sorted(["a.jpg", "b/c.PNG", "b/d/e", *(f"odd/{name}" for name in ODD_NAMES)])
    assert source.listed == len(found) == len(rows)
    assert source.ignored == {"other": 2, "hidden": 3}
    for name, image in found.items():
        assert image.bytes == len(name.encode())
        assert open_storage(root).read_image(image, 1000) == name.encode()


def test_the_top_of_a_folder_only(root: str) -> None:
    put(root, "a.jpg", "b/c.jpg", ".hidden.jpg", "d.txt")
    source = list_source(root, recursive=False)
    assert [batch.num_rows for batch in source] == [1]
    assert source.ignored == {"hidden": 1, "other": 1}
    assert names_of(root, recursive=False) == ["a.jpg"]


def test_batches_have_the_schema_and_come_one_by_one(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, *(f"{number}/{number}.jpg" for number in range(5)))
    monkeypatch.setattr(listing, "BATCH_ROWS", 2)
    reports: list[int] = []
    batches = iter(list_source(root, report=reports.append))
    first = next(batches)
    assert first.schema.equals(LISTING_SCHEMA)
    assert reports == [2]
    assert [batch.num_rows for batch in batches] == [2, 1]
    assert reports == [2, 4, 5]


def test_the_store_is_passed_over(root: str) -> None:
    put(root, "a.jpg", "mill/b.jpg", "mill2/c.jpg", "d/mill/e.jpg")
    assert names_of(root, exclude=join(root, "mill")) == ["a.jpg", "d/mill/e.jpg", "mill2/c.jpg"]
    for elsewhere in (root, join(root, ".."), "/elsewhere", "s3://elsewhere", None):
        assert len(names_of(root, exclude=elsewhere)) == 4
    assert names_of(join(root, "mill"), exclude=root) == ["b.jpg"]


@pytest.mark.parametrize("name", ["a.jpg", "a.heic", "noextension", "a::b.jpg"])
def test_a_single_image(root: str, name: str) -> None:
    put(root, name, "other.jpg")
    assert [image.image for image in images_of(join(root, name))] == [join(root, name)]


def test_what_cannot_be_listed_is_said(root: str) -> None:
    put(root, "notes.md", "photos/a.txt", "photos/.b.jpg")
    with pytest.raises(NotFound, match="nowhere does not exist"):
        list_source(join(root, "nowhere"))
    with pytest.raises(UsageError, match=r"expected a folder, an image or a list .*notes\.md"):
        list_source(join(root, "notes.md"))
    with pytest.raises(NotFound, match=r"no images in .*photos \(ignored: 1 hidden, 1 other\)"):
        list(list_source(join(root, "photos")))
    with pytest.raises(UsageError, match="http:// is not supported"):
        list_source("http://host/a.jpg")


# Lists


def write_list(root: str, name: str, rows: list[str | None], tmp_path: Path) -> str:
    """A list file beside the images, in the format that its name tells."""
    path = tmp_path / "list"
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"number": range(len(rows)), "URI": pa.array(rows).dictionary_encode()}), path)
    elif name.startswith("headed"):
        path.write_text("\n".join(["number,Path", *(f'1,"{row or ""}"' for row in rows)]))
    else:
        path.write_text("\n".join(row or "" for row in rows), newline="\r\n")
    uri = join(root, "lists", name)
    open_storage(root).replace(uri, path.read_bytes())
    return uri


@pytest.mark.parametrize("name", ["plain.txt", "headed.csv", "plain.CSV", "table.parquet"])
def test_each_line_of_a_list_becomes_an_image(root: str, name: str, tmp_path: Path) -> None:
    put(root, "photos/a::b.jpg", "photos/.hidden.jpg", "photos/c.txt", "lists/beside.jpg")
    rows = [
        "../photos/a::b.jpg",
        join(root, "photos", ".hidden.jpg"),
        None,
        join(root, "photos", "c.txt"),
        "beside.jpg",
        "gone.jpg",
        "../photos",
        "beside.jpg",
    ]
    source = list_source(write_list(root, name, rows, tmp_path))
    found = [ListedImage(**row) for batch in source for row in batch.to_pylist()]
    expected = [
        "photos/a::b.jpg",
        "photos/.hidden.jpg",
        "photos/c.txt",
        "lists/beside.jpg",
        "lists/gone.jpg",
        "photos",
        "lists/beside.jpg",
    ]
    assert [image.image for image in found] == [join(root, *name.split("/")) for name in expected]
    assert [bool(image.fingerprint) for image in found] == [True, True, True, True, False, False, True]
    assert source.ignored == {"blank": 1}
    for image in found:
        if image.fingerprint:
            assert open_storage(root).read_image(image, 1000) == image.image.removeprefix(root + "/").encode()
        else:
            with pytest.raises(Rejected) as caught:
                open_storage(root).read_image(image, 1000)
            assert caught.value.status == Status.MISSING


def test_a_list_may_name_both_disk_and_bucket(bucket: str, tmp_path: Path) -> None:
    put(f"s3://{bucket}", "a.jpg")
    put(str(tmp_path), "a.jpg")
    (path := tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfa.jpg\n" + f"s3://{bucket}/a.jpg\ns3://{bucket}/b.jpg".encode()
    )
    assert [(image.image, image.bytes) for image in images_of(str(path))] == [
        (str(tmp_path / "a.jpg"), 5),
        (f"s3://{bucket}/a.jpg", 5),
        (f"s3://{bucket}/b.jpg", 0),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"a.jpg\nhttp://host/b.jpg\n", r"a\.txt, row 2: .*http:// is not supported", id="scheme"),
        pytest.param("a.csv", b'image\n"a.jpg\n' + b"x" * 200_000, r"a\.csv, row \d+: not CSV", id="broken CSV"),
        pytest.param("a.parquet", b"not Parquet", r"a\.parquet: expected Parquet", id="broken Parquet"),
        pytest.param("a.txt", b"", "no images in", id="empty"),
        pytest.param("a.csv", b"", "no images in", id="empty CSV"),
        pytest.param("a.csv", b"image\n", "no images in", id="header only"),
    ],
)
def test_a_list_that_cannot_be_read_is_a_user_mistake(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (path := tmp_path / name).write_bytes(content)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UsageError, match=message) as caught:
        images_of(str(path))
    assert "\n" not in str(caught.value)


# Local disk


def test_names_of_any_bytes_are_listed_and_read(tmp_path: Path) -> None:
    for name in (b"new\nline.jpg", b"\xff\xfe%41.jpg", b"folder\xe9/a b.jpg"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(name)
    found = images_of(str(tmp_path))
    assert sorted(image.image for image in found) == sorted(
        [f"{tmp_path}/new\nline.jpg", f"file://{tmp_path}/%FF%FE%2541.jpg", f"file://{tmp_path}/folder%E9/a%20b.jpg"]
    )
    assert {open_storage(image.image).read_image(image, 100) for image in found} == {
        b"new\nline.jpg",
        b"\xff\xfe%41.jpg",
        b"folder\xe9/a b.jpg",
    }
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe%41.jpg\n")
    assert [bool(image.fingerprint) for image in images_of(str(tmp_path / "list.txt"))] == [True]


def test_links_and_devices_are_counted_not_followed(tmp_path: Path) -> None:
    (tmp_path / "photos" / "folder").mkdir(parents=True)
    photos = tmp_path / "photos"
    (photos / "a.jpg").write_bytes(b"a")
    (photos / "link.jpg").symlink_to("a.jpg")
    (photos / "dangling.jpg").symlink_to("nowhere")
    (photos / "folder" / "loop").symlink_to("..")
    (photos / "self").symlink_to("self")
    os.mkfifo(photos / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(photos / "socket.jpg"))
    source = list_source(str(photos))
    assert [batch["image"].to_pylist() for batch in source] == [[str(photos / "a.jpg")]]
    assert source.ignored == {"link": 4, "special": 2}
    (tmp_path / "way").symlink_to("photos")
    assert names_of(str(tmp_path / "way")) == ["a.jpg"]
    for name in ("fifo.jpg", "dangling.jpg"):
        with pytest.raises(UsageError, match="neither a folder nor a regular file"):
            list_source(str(photos / name))


@pytest.mark.parametrize("error", [PermissionError(13, "x"), OSError(5, "x")], ids=["permission", "I/O"])
def test_a_folder_that_cannot_be_read_does_not_end_the_run(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(str(tmp_path), "a.jpg", "closed/b.jpg", "open/c.jpg")
    scandir = os.scandir

    def closed(path: str) -> Any:
        if path.endswith("closed"):
            raise error
        return scandir(path)

    monkeypatch.setattr(storage_local.os, "scandir", closed)
    source = list_source(str(tmp_path))
    assert sum(batch.num_rows for batch in source) == 2
    assert source.ignored == {"unreadable_folder": 1}
    assert f"passed over {tmp_path}/closed" in caplog.text


def test_what_vanishes_while_it_is_listed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), "a.jpg", "b/c.jpg", "d.jpg")

    class Vanishing(storage_local.LocalStorage):
        def step(self, name: str) -> None:
            if name == "scan:after":
                (tmp_path / "a.jpg").unlink(missing_ok=True)
                shutil.rmtree(tmp_path / "b", ignore_errors=True)

    # The entries are read, a.jpg first, before the files go.
    monkeypatch.setattr(storage_local.os, "scandir", read_first(os.scandir))
    ignored: dict[str, int] = {}
    found = list(Vanishing().walk(str(tmp_path), recursive=True, ignore=ignore_reason, ignored=ignored))
    assert [state.uri for state in found] == [str(tmp_path / "d.jpg")]
    assert ignored == {}


def read_first(scandir: Any) -> Any:
    class Entries(list[Any]):
        def __enter__(self) -> "Entries":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    def scan(path: str) -> Entries:
        with scandir(path) as entries:
            return Entries(sorted(entries, key=lambda entry: entry.name))

    return scan


def test_depth_has_no_limit_but_that_of_paths(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for depth in range(2100):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
        if depth in (1500, 2099):
            os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    try:
        source = list_source(str(tmp_path))
        assert sum(batch.num_rows for batch in source) == 1
        assert source.ignored == {"unreadable_folder": 1}
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # Python's own removal recurses


# S3


def test_a_bucket_is_listed_by_pages_and_nothing_else(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"s3://{bucket}", *(f"photos/{number:02}.jpg" for number in range(10)))
    steps: list[str] = []
    monkeypatch.setattr(S3Storage, "step", lambda self, name: steps.append(name))
    monkeypatch.setattr(S3Storage, "keys_per_page", 4)
    assert len(names_of(f"s3://{bucket}/photos/")) == 10
    assert steps.count("list_objects_v2:before") == 1 + 3  # is there a folder?, then its pages
    assert {name.split(":")[0] for name in steps} == {"list_objects_v2"}


def test_markers_of_folders_and_neighbours_with_the_same_beginning_are_no_images(bucket: str) -> None:
    storage = open_storage("s3://")
    assert isinstance(storage, S3Storage)
    for key in ("photos/", "photos/a.jpg", "photos/b/", "photos2/c.jpg", "photos.jpg", "photos//d.jpg"):
        storage.send("put_object", Bucket=bucket, Key=key, Body=b"" if key.endswith("/") else b"x")
    assert names_of(f"s3://{bucket}/photos") == ["/d.jpg", "a.jpg"]
    assert names_of(f"s3://{bucket}") == ["photos.jpg", "photos//d.jpg", "photos/a.jpg", "photos2/c.jpg"]


def test_a_missing_bucket_is_said(bucket: str) -> None:
    with pytest.raises(StorageError, match="there is no such bucket"):
        images_of(f"s3://{bucket}-not/photos")
