"""Sources as trees of files; archives are unpacked completely, or refused in one line that names archive and member."""

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import NotFound, StorageError, UsageError
from tasks.datasets import archives
from tasks.datasets.archives import Caps
from tasks.datasets.tree import open_annotations, open_tree
from tasks.storage import open_storage

FILES = {"cats/1.jpg": b"one", "cats/2.jpg": b"two" * 1000, "notes.txt": b"", "dogs/a b/ä[1]::?.jpg": b"three"}


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_member(name: str, kind: bytes, target: str = "") -> bytes:
    """A tar with one good file and one member of this kind."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        good = tarfile.TarInfo("good.jpg")
        good.size = 3
        archive.addfile(good, io.BytesIO(b"one"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return buffer.getvalue()


def zip_member(name: str, mode: int = 0, data: bytes = b"x") -> bytes:
    """A ZIP with one good file and one member of this mode."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("good.jpg", b"one")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, data)
    return buffer.getvalue()


def twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", b"one")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.jpg", b"two")
    return buffer.getvalue()


def encrypted() -> bytes:
    data = bytearray(zipped({"a.jpg": b"one"}))
    data[6] |= 1  # the flag in the local header, and in the directory
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def put(folder: str, name: str, data: bytes) -> str:
    uri = f"{folder}/{name}"
    assert open_storage(uri).put_if_absent(uri, data)
    return uri


MAKERS: dict[str, Callable[[], bytes]] = {
    "a.zip": lambda: zipped(FILES),
    "stored.ZIP": lambda: zipped(FILES, zipfile.ZIP_STORED),
    "a.tar": lambda: tarred(FILES),
    "a.tar.gz": lambda: tarred(FILES, "w:gz"),
    "a.tgz": lambda: tarred(FILES, "w:gz"),
    "a.tar.bz2": lambda: tarred(FILES, "w:bz2"),
    "a.tar.xz": lambda: tarred(FILES, "w:xz"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_archive_is_a_tree(root, name, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    uri = put(root, name, MAKERS[name]())
    with open_tree(uri) as tree:
        assert list(tree.files) == sorted(FILES)
        assert {path: tree.read(path) for path in tree.files} == FILES
        assert tree.is_archive
        assert tree.uri("cats/1.jpg") == f"{uri}/cats/1.jpg"
        assert tree.uri("gone.jpg") == f"{uri}/gone.jpg"
        assert Path(tree.root).is_dir()
    assert not Path(tree.root).exists()


def test_a_folder_is_a_tree(root):
    for path, data in {**FILES, ".hidden": b"x", "__MACOSX/._1.jpg": b"x", "mill/models/card.json": b"x"}.items():
        put(root, path, data)
    with open_tree(root + "/", exclude=f"{root}/mill") as tree:
        assert list(tree.files) == sorted(FILES)
        assert {path: tree.read(path) for path in tree.files} == FILES
        assert tree.uri("cats/1.jpg") == f"{root}/cats/1.jpg" == tree.files["cats/1.jpg"].uri
        assert not tree.is_archive
        assert tree.ignored["hidden"] >= 2
        assert tree.images() == ["cats/1.jpg", "cats/2.jpg", "dogs/a b/ä[1]::?.jpg"]
        assert list(tree.below("cats").files) == ["1.jpg", "2.jpg"]
        assert tree.below("cats").uri("1.jpg") == f"{root}/cats/1.jpg"
        with pytest.raises(FileNotFoundError):
            tree.read("gone.jpg")


def test_names_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/Caf\xe9 1"
    os.mkdir(folder)
    for name in (b"\xff.jpg", b"%FF.jpg", b"a b.jpg"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(name)
    os.symlink("a b.jpg", folder + b"/link.jpg")
    with open_tree(str(tmp_path)) as tree:
        assert sorted(map(tree.read, tree.files)) == sorted((b"\xff.jpg", b"%FF.jpg", b"a b.jpg"))
        assert {path.partition("/")[0] for path in tree.files} == {"Caf%E9%201"}
        assert tree.ignored == {"link": 1}
        for path in tree.files:
            path.encode()


REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "parent in a ZIP": ("a.zip", lambda: zip_member("../out.jpg"), "'../out.jpg' leads outside"),
    "parent in the middle": ("a.zip", lambda: zip_member("a/../../out.jpg"), "leads outside"),
    "parent deep in a tar": ("a.tar", lambda: tarred({"a/../../out.jpg": b"x"}), "leads outside"),
    "absolute in a ZIP": ("a.zip", lambda: zip_member("/etc/out.jpg"), "'/etc/out.jpg' leads outside"),
    "parent in a tar": ("a.tar", lambda: tarred({"../out.jpg": b"x"}), "'../out.jpg' leads outside"),
    "absolute in a tar": ("a.tar", lambda: tarred({"/etc/out.jpg": b"x"}), "leads outside"),
    "link in a ZIP": ("a.zip", lambda: zip_member("l.jpg", stat.S_IFLNK | 0o777, b"/etc/passwd"), "'l.jpg' is a link"),
    "device in a ZIP": ("a.zip", lambda: zip_member("d.jpg", stat.S_IFCHR | 0o666), "is a link or a device"),
    "link in a tar": ("a.tar", lambda: tar_member("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), "'l.jpg' is a link"),
    "hard link in a tar": ("a.tar", lambda: tar_member("l.jpg", tarfile.LNKTYPE, "good.jpg"), "'l.jpg' is a link"),
    "device in a tar": ("a.tar", lambda: tar_member("d.jpg", tarfile.CHRTYPE), "'d.jpg' is a link or a device"),
    "pipe in a tar": ("a.tar", lambda: tar_member("p.jpg", tarfile.FIFOTYPE), "'p.jpg' is a link or a device"),
    "twice in a ZIP": ("a.zip", twice, "'a.jpg' occurs twice"),
    "twice in a tar": ("a.tar", lambda: tarred({"a.jpg": b"1", "./a.jpg": b"2"}), "'./a.jpg' occurs twice"),
    "a file as a folder": ("a.tar", lambda: tarred({"a.jpg": b"1", "a.jpg/b.jpg": b"2"}), "'a.jpg/b.jpg' occurs twice"),
    "encrypted": ("a.zip", encrypted, "'a.jpg' is encrypted"),
    "too long a name": ("a.tar", lambda: tarred({"x" * 300: b"1"}), "cannot unpack 'xxx"),
    "no ZIP": ("a.zip", lambda: b"not an archive", "not a ZIP archive"),
    "no tar": ("a.tar.gz", lambda: b"not an archive", "not a tar archive"),
    "empty file": ("a.zip", lambda: b"", "not a ZIP archive"),
    "cut ZIP": ("a.zip", lambda: zipped(FILES)[:-40], "not a ZIP archive"),
    "cut tar.gz": ("a.tar.gz", lambda: tarred({"a": os.urandom(9999)}, "w:gz")[:5000], "a.tar.gz: "),
    "cut tar": ("a.tar", lambda: tarred(FILES)[:700], "a.tar: "),
    "rotten ZIP": ("a.zip", lambda: zipped({"a.jpg": b"A" * 99}, 0).replace(b"A" * 9, b"B" * 9), "a.zip: "),
    "rotten tar.xz": ("a.tar.xz", lambda: tarred({"a": b"x" * 9999}, "w:xz").replace(b"7zXZ\0", b"7zXZ\1"), "a.tar.xz"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    name, make, expected = REFUSED[case]
    uri = put(str(tmp_path), name, make())
    with pytest.raises(UsageError) as caught, open_tree(uri):
        pass
    message = str(caught.value)
    assert message.startswith(f"{uri}: ")
    assert expected in message
    assert "\n" not in message
    assert not (tmp_path.parent / "out.jpg").exists()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        pytest.param(Caps(files=2), "more than 2 members", id="files"),
        pytest.param(Caps(bytes=50_000), "GiB unpacked", id="bytes"),
        pytest.param(Caps(ratio=20, ratio_from_bytes=10_000), "like a zip bomb", id="ratio"),
    ],
)
def test_caps(tmp_path, kind, caps, expected):
    files = {f"{number}.bmp": bytes(100_000) for number in range(3)}
    uri = put(str(tmp_path), f"bomb.{kind}", zipped(files) if kind == "zip" else tarred(files, "w:gz"))
    with pytest.raises(UsageError, match=expected), open_tree(uri, caps=caps):
        pass
    with open_tree(uri) as tree:  # by default so little is no bomb
        assert len(tree.files) == 3


def test_a_zip_that_lies_about_its_size(tmp_path):
    """The directory claims 10 bytes of what unpacks to 200,000."""
    honest = zipped({"a.bmp": bytes(200_000)})
    uri = put(str(tmp_path), "liar.zip", honest.replace((200_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(UsageError), open_tree(uri, caps=Caps(bytes=1000)):
        pass


def test_windows_separators(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("cats/1.jpg")
        info.create_system = 0
        archive.writestr(info, b"one")
    uri = put(str(tmp_path), "windows.zip", buffer.getvalue().replace(b"cats/1.jpg", b"cats\\1.jpg"))
    with open_tree(uri) as tree:
        assert list(tree.files) == ["cats/1.jpg"]


def test_a_full_disk_is_no_fault_of_the_archive(tmp_path, monkeypatch):
    uri = put(str(tmp_path), "a.zip", zipped(FILES))

    def full(file: object, block: bytes) -> None:
        raise archives._NoRoom("No space left on device")

    monkeypatch.setattr(archives, "_write", full)
    with pytest.raises(StorageError, match="No space left on device; set TMPDIR"), open_tree(uri):
        pass


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        pytest.param("gone", NotFound, "does not exist; expected a folder, a bucket prefix or an archive", id="gone"),
        pytest.param("labels.json", UsageError, r"or an archive \(\.zip, \.tar", id="another file"),
    ],
)
def test_what_is_no_tree(root, name, error, expected):
    put(root, "labels.json", b"{}")
    with pytest.raises(error, match=expected), open_tree(f"{root}/{name}"):
        pass


def test_a_link_is_no_tree(tmp_path):
    (tmp_path / "a.zip").symlink_to(put(str(tmp_path), "b.zip", zipped(FILES)))
    with pytest.raises(UsageError, match="links to archives are not followed"), open_tree(str(tmp_path / "a.zip")):
        pass


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        pytest.param("source/labels/a.json", {"a.json": "source/labels/a.json"}, id="URI below the source"),
        pytest.param("labels/a.json", {"a.json": "source/labels/a.json"}, id="path in the source"),
        pytest.param("labels", {"a.json": "source/labels/a.json"}, id="folder in the source"),
        pytest.param("elsewhere/b.json", {"b.json": "elsewhere/b.json"}, id="file elsewhere"),
        pytest.param("elsewhere", {"b.json": "elsewhere/b.json", "c.json": "elsewhere/c.json"}, id="folder elsewhere"),
    ],
)
def test_annotations_are_a_tree_too(root, annotations, expected):
    for path in ("source/1.jpg", "source/labels/a.json", "elsewhere/b.json", "elsewhere/c.json"):
        put(root, path, path.encode())
    named = annotations if annotations.startswith("labels") else f"{root}/{annotations}"
    with open_tree(f"{root}/source") as tree, open_annotations(tree, named) as found:
        assert {path: found.uri(path) for path in found.files} == {
            path: f"{root}/{uri}" for path, uri in expected.items()
        }
        assert {path: found.read(path) for path in found.files} == {p: uri.encode() for p, uri in expected.items()}


def test_annotations_inside_and_beside_an_archive(tmp_path):
    uri = put(str(tmp_path), "a.zip", zipped({"x/1.jpg": b"1", "x/labels.json": b"inside"}))
    put(str(tmp_path), "labels.json", b"beside")
    with open_tree(uri) as tree:
        with open_annotations(tree, "x/labels.json") as found:
            assert (found.uri("labels.json"), found.read("labels.json")) == (f"{uri}/x/labels.json", b"inside")
        with open_annotations(tree, str(tmp_path / "labels.json")) as found:
            assert (found.uri("labels.json"), found.read("labels.json")) == (f"{tmp_path}/labels.json", b"beside")


def test_annotations_that_are_nowhere(root):
    put(root, "1.jpg", b"")
    with (
        open_tree(root) as tree,
        pytest.raises(NotFound, match=r"no annotations 'gone\.json'"),
        open_annotations(tree, "gone.json"),
    ):
        pass
