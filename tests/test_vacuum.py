"""vacuum: what it finds, what it never touches, and that a run beside it notices nothing that lasts."""

import json
import os
import re
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import order
from flows.__main__ import main
from flows.watch import Lines
from models.card import ONNX_FILE
from models.errors import PixelmillError
from models.settings.predict import PredictSettings
from models.settings.vacuum import VacuumSettings
from tasks import registry, vacuum
from tasks.promote import promote
from tasks.storage import TEMPORARY_PREFIX, join, normalise, open_storage
from tasks.train import training_folder
from tasks.verify import verify
from tests.tiny_datasets import COLOURS, publish_dataset, square
from tests.tiny_models import publish_classifier

DAY = 86400.0


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PIXELMILL_TRAINING", str(tmp_path / "training"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "training"


def run(store: str, *, days: float = 0.0, **settings) -> dict[str, str]:
    """Kind by URI of what was found and, where it is deleted, is gone; as seen so many days from now."""
    done = vacuum.vacuum(store, VacuumSettings(**settings), clock=lambda: time.time() + days * DAY)
    return {entry["uri"]: entry["kind"] for entry in done.found if entry["removed"] or not done.deleted}


def files(store: str) -> set[str]:
    """Every file of a store, temporary ones too."""
    ignored: dict[str, int] = {}
    place = open_storage(store)
    return {state.uri for state in place.walk(store, recursive=True, ignore=lambda *_: None, ignored=ignored)}


def add_photos(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def predict(store: str, photos: Path, model: str, table: str, shard_size: int = 4) -> None:
    settings = PredictSettings(source=str(photos), model=model, table=table, shard_size=shard_size)
    order.predict_directly(normalise(store), settings, Lines())


@pytest.fixture
def versions(root, tmp_path) -> list[str]:
    """Five versions of one model, from old to new."""
    return [publish_classifier(root, tmp_path, seed=seed).reference for seed in range(5)]


def folder_of(root: str, reference: str) -> str:
    name, _, version = reference.partition("@")
    return join(normalise(root), "models", name, version)


# --- nothing to do


@pytest.mark.parametrize("keep", [None, 1])
def test_a_store_that_is_not_there(root, keep):
    assert run(root, days=100, keep_versions=keep, delete=True) == {}


@pytest.mark.parametrize("age", ["", "7", "d", "1w", "-1d", "1.5h"])
def test_an_age_is_a_number_and_a_unit(age, capsys):
    assert main(["vacuum", "--older-than", age, "--direct"]) == 2
    assert "--older-than" in capsys.readouterr().err


@pytest.mark.parametrize(("age", "seconds"), [("0m", 0), ("45m", 2700), ("12h", 43200), ("7d", 604800)])
def test_ages(age, seconds):
    assert VacuumSettings(older_than=age).older_than_s == seconds


# --- unfinished writes


@pytest.mark.parametrize(("days", "found"), [(6, False), (8, True)])
def test_temporary_files(root, days, found):
    left = join(normalise(root), "tables", "t", "parts", "model=m@0", f"{TEMPORARY_PREFIX}0123")
    whole = join(normalise(root), "tables", "t", "parts", "model=m@0", "00000001-00000.parquet")
    place = open_storage(root)
    for uri in (left, whole):
        assert place.put_if_absent(uri, b"rows")
    expected = {left: "unfinished write"} if found else {}
    assert run(root, days=days) == expected
    assert files(root) == {left, whole}
    assert run(root, days=days, delete=True) == expected
    assert files(root) == ({whole} if found else {left, whole})


def test_an_upload_that_was_never_completed(bucket, s3_storage):
    place, key = s3_storage, "mill/models/m/0123456789ab/model.onnx"
    upload = place.send("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
    place.send("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100)
    elsewhere = place.send("create_multipart_upload", Bucket=bucket, Key="other/file")["UploadId"]
    store = f"s3://{bucket}/mill"
    assert run(store, older_than="20000d") == {}  # moto dates all uploads to 2010
    done = vacuum.vacuum(store, VacuumSettings(delete=True))
    assert [(e["uri"], e["bytes"], e["removed"]) for e in done.found] == [(f"s3://{bucket}/{key}", 100, True)]
    left = place.send("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    assert [each["UploadId"] for each in left] == [elsewhere]


def test_an_upload_that_is_completed_meanwhile_is_no_error(bucket, s3_storage):
    upload = s3_storage.send("create_multipart_upload", Bucket=bucket, Key="mill/big")["UploadId"]
    [found] = s3_storage.unfinished(f"s3://{bucket}/mill")
    s3_storage.send("abort_multipart_upload", Bucket=bucket, Key="mill/big", UploadId=upload)
    s3_storage.discard(found)


# --- unfinished versions


def without_commit(root: str, folder: str, commit: str) -> set[str]:
    """Takes away the file that commits a version, as if its publication had been killed before; what is left."""
    open_storage(root).remove(join(folder, commit))
    return {uri for uri in files(root) if uri.startswith(folder)}


@pytest.mark.parametrize(("days", "found"), [(6, False), (8, True)])
def test_a_model_without_a_card(root, tmp_path, versions, days, found):
    folder = folder_of(root, versions[0])
    assert without_commit(root, folder, "card.json") == {join(folder, ONNX_FILE)}
    before = files(root)
    assert run(root, days=days, delete=True) == ({folder: "unfinished version"} if found else {})
    assert before - files(root) == ({join(folder, ONNX_FILE)} if found else set())
    assert [card.reference for card in registry.list_models(root)] == versions[1:]
    if not root.startswith("s3://"):
        assert os.path.exists(folder) is not found


def test_a_data_set_without_its_description(root, tmp_path):
    dataset = publish_dataset(root, tmp_path / "squares", [("train", c, square(c, 0)) for c in COLOURS])
    assert run(root, days=100, keep_versions=1) == {}
    folder = join(normalise(root), "datasets", dataset.name, dataset.version)
    left = without_commit(root, folder, "dataset.json")
    assert len(left) == 3
    before = files(root)
    assert run(root, days=8, delete=True) == {folder: "unfinished version"}
    assert before - files(root) == left


def test_what_is_being_published_is_not_taken_however_small_the_age(root, versions):
    without_commit(root, folder_of(root, versions[0]), "card.json")
    assert run(root, older_than="0m", delete=True) == {}


def test_a_version_that_is_published_while_it_goes_stays_whole(root, tmp_path, versions, monkeypatch):
    """The publisher finds its file there from an attempt of last week; then it goes; then the card comes."""
    folder = folder_of(root, versions[0])
    without_commit(root, folder, "card.json")
    place = open_storage(root)
    put_file = type(place).put_file_if_absent

    def slow(self, uri, path):
        there = put_file(self, uri, path)
        monkeypatch.undo()
        monkeypatch.setenv("PIXELMILL_TRAINING", str(tmp_path / "training"))
        self.remove(uri)
        return there

    monkeypatch.setattr(type(place), "put_file_if_absent", slow)
    again = publish_classifier(root, tmp_path, seed=0)
    assert again.reference == versions[0]
    assert place.exists(join(folder, ONNX_FILE))
    assert place.exists(join(folder, "card.json"))


# --- trainings


def test_checkpoints_that_nobody_took_up(root, checkpoints):
    old, new, foreign = training_folder("a" * 24), training_folder("b" * 24), checkpoints / "photos of mine"
    for folder in (old, new, foreign):
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_bytes(b"weights")
    for path in (old / "checkpoint.pt", old, foreign / "checkpoint.pt", foreign):
        os.utime(path, (time.time() - 8 * DAY,) * 2)
    assert run(root) == {str(old): "training"}
    assert old.exists()
    assert run(root, delete=True) == {str(old): "training"}
    assert (old.exists(), new.exists(), foreign.exists()) == (False, True, True)


def test_folders_of_commands_at_work_are_not_taken_however_small_the_age(root, tmp_path):
    for folder in (training_folder("a" * 24), Path(tempfile.gettempdir(), "pixelmill-plan-ab_d1234")):
        folder.mkdir(parents=True)
    assert run(root, older_than="0m", delete=True) == {}


def test_scratch_folders_of_killed_commands(root, tmp_path):
    """One of a plan that was killed, one at work, and others' that are not ours to take."""
    ours = ("pixelmill-plan-ab_d1234", "pixelmill-backfill-ab_d1234")
    names = (*ours, "pixelmill-query-ab_d1234", "pixelmill-photos", "pixelmill-plan-of-mine", "x")
    folders = {name: Path(tempfile.gettempdir(), name) for name in names}
    for folder in folders.values():
        folder.mkdir()
        (folder / "rows").write_bytes(b"rows")
        for path in (folder / "rows", folder):
            os.utime(path, (0, 0))
    os.utime(folders["pixelmill-query-ab_d1234"] / "rows")
    expected = {str(folders[name]): "scratch folder" for name in ours}
    assert run(root) == expected
    assert run(root, delete=True) == expected
    assert [name for name in names if not folders[name].exists()] == list(ours)


def test_every_scratch_folder_of_ours_is_known():
    """What the code calls its temporary folders, and what vacuum takes for one."""
    code = [path.read_text() for room in ("flows", "tasks", "models") for path in Path(room).rglob("*.py")]
    prefixes = {prefix for text in code for prefix in re.findall(r'TemporaryDirectory\(prefix="([^"]+)"', text)}
    assert len(prefixes) > 5
    assert [prefix for prefix in sorted(prefixes) if not vacuum._SCRATCH.fullmatch(f"{prefix}ab_d1234")] == []


# --- old versions


def gone(root: str, versions: list[str]) -> list[int]:
    left = {card.reference for card in registry.list_models(root)}
    return [number for number, reference in enumerate(versions) if reference not in left]


@pytest.mark.parametrize(
    ("settings", "days", "expected"),
    [
        pytest.param({}, 100, [], id="not asked for"),
        pytest.param({"keep_versions": 2}, 6, [], id="too young"),
        pytest.param({"keep_versions": 9}, 100, [], id="fewer than that"),
        pytest.param({"keep_versions": 2}, 8, [0, 1, 2], id="the oldest go"),
        pytest.param({"keep_versions": 1}, 8, [0, 1, 2, 3], id="the newest stays"),
    ],
)
def test_old_versions(root, versions, settings, days, expected):
    run(root, days=days, delete=True, **settings)
    assert gone(root, versions) == expected
    assert not [uri for number in expected for uri in files(root) if uri.startswith(folder_of(root, versions[number]))]


def test_what_lies_below_a_version_goes_with_it(root, versions):
    """Evaluations, and the sheets of a model that makes images: of an old version, and of one without a card."""
    place, folders = open_storage(root), [folder_of(root, reference) for reference in versions]
    for folder in folders:
        for name in (("evaluations", "squares@0123456789ab-test.json"), ("samples", "epoch-0001.png")):
            assert place.put_if_absent(join(folder, *name), b"{}")
    without_commit(root, folders[0], "card.json")
    expected = {folders[0]: "unfinished version"} | dict.fromkeys(folders[1:4], "old version")
    assert run(root, days=8, keep_versions=1) == expected
    assert run(root, days=8, delete=True, keep_versions=1) == expected
    left = files(root)
    assert [uri for folder in folders[:4] for uri in left if uri.startswith(folder)] == []
    assert len([uri for uri in left if uri.startswith(folders[4])]) == 4
    if not root.startswith("s3://"):
        assert not any(os.path.exists(folder) for folder in folders[:4])


def test_what_is_promoted_stays(root, versions):
    promote(root, versions[1])
    run(root, days=8, delete=True, keep_versions=1)
    assert gone(root, versions) == [0, 2, 3]


def test_what_a_table_names_stays(root, versions, tmp_path):
    add_photos(tmp_path / "photos", 3)
    predict(root, tmp_path / "photos", versions[2], "seen")
    before = {uri for uri in files(root) if "/tables/" in uri}
    run(root, days=8, delete=True, keep_versions=1)
    assert gone(root, versions) == [0, 1, 3]
    assert {uri for uri in files(root) if "/tables/" in uri} == before
    assert verify(root, "seen").problems == []


def test_what_a_plan_alone_names_stays(root, versions, tmp_path):
    """Claimed and not yet worked on: the parts would need it."""
    from tasks import predict as steps

    add_photos(tmp_path / "photos", 3)
    settings = PredictSettings(source=str(tmp_path / "photos"), model=versions[0], table="claimed")
    steps.plan(normalise(root), settings, lambda images: None)
    run(root, days=8, delete=True, keep_versions=1)
    assert gone(root, versions) == [1, 2, 3]


def test_what_another_card_names_stays(root, versions, tmp_path):
    from dataclasses import replace

    first = registry.resolve(root, versions[0])
    child = replace(first, name="child", version="c" * 12, source=f"{versions[0]}, finetune on squares@{'d' * 12}")
    path = tmp_path / "child.onnx"
    path.write_bytes(b"graph")
    registry.publish(root, child, {ONNX_FILE: path})
    run(root, days=8, delete=True, keep_versions=1)
    assert gone(root, versions) == [1, 2, 3]


def test_a_version_that_is_promoted_at_the_last_moment_stays(root, versions, monkeypatch):
    content = vacuum._content

    def late(storage, folder, now):
        if folder.endswith(versions[2].partition("@")[2]):
            promote(root, versions[2])
        return content(storage, folder, now)

    monkeypatch.setattr(vacuum, "_content", late)
    run(root, days=8, delete=True, keep_versions=1)
    assert gone(root, versions) == [0, 1, 3]


# --- beside a live run


def test_a_live_run_beside_it(tmp_path):
    """With an age of nothing it takes a run's temporary files from under it; the table is complete all the same."""
    store = str(tmp_path / "mill")
    publish_classifier(store, tmp_path)
    add_photos(tmp_path / "photos", 24)
    stop, taken = threading.Event(), []

    def sweep() -> None:
        while not stop.is_set():
            done = vacuum.vacuum(store, VacuumSettings(older_than="0m", keep_versions=1, delete=True))
            taken.append([entry["uri"] for entry in done.found])
            time.sleep(0.01)  # else not even a plan gets through

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for _ in range(3):
            with suppress(PixelmillError):  # as of a disk that failed
                predict(store, tmp_path / "photos", "tiny", "raced", shard_size=1)
    finally:
        stop.set()
        sweeper.join()
    assert taken
    assert all(TEMPORARY_PREFIX in uri for sweep in taken for uri in sweep)
    predict(store, tmp_path / "photos", "tiny", "raced", shard_size=1)
    found = verify(store, "raced")
    assert (found.rows, found.problems) == (24, [])


# --- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    store = str(tmp_path / "mill")
    publish_classifier(store, tmp_path)
    left = Path(store, "tables", "t", f"{TEMPORARY_PREFIX}0123")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"rows")
    os.utime(left, (0, 0))
    assert main(["vacuum", "--store", store, "--direct"]) == 0
    out = capsys.readouterr().out
    assert "1, 4 B; the same with --delete removes it" in out
    assert main(["vacuum", "--store", store, "--direct", "--delete", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["store", "deleted", "found", "bytes"]
    assert [(entry["kind"], entry["removed"]) for entry in result["found"]] == [("unfinished write", True)]
    assert not left.exists()
    assert main(["vacuum", "--store", store, "--direct"]) == 0
    assert capsys.readouterr().out == f"nothing to remove in {store}\n"
