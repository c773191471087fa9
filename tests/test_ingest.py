"""Ingest: from folders, buckets and archives to a version; every image listed is kept or rejected with its reason."""

import hashlib
import io
import logging
import os
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from pydantic import ValidationError

from models.dataset import ANNOTATIONS_SCHEMA, IMAGES_SCHEMA, REJECTS_SCHEMA, Dataset
from models.errors import NotFound, StorageError, TransientError, UsageError
from models.progress import Step
from models.records import Status
from models.settings.ingest import IngestSettings
from tasks.datasets import datasets, formats, images
from tasks.datasets import ingest as ingesting
from tasks.datasets.ingest import Ingested, ingest
from tasks.datasets.labelled import Labelled, LabelledImage, LabelledRegion, Reject
from tasks.datasets.summary import describe
from tasks.datasets.tree import Tree
from tasks.storage import FileState, open_storage
from tests.odd_images import encode, odd_images, png
from tests.test_archives import put
from tests.test_datasets import files_of


def picture(seed: int, side: int = 24) -> Image.Image:
    """Noise in coarse blocks: no two are alike, and a JPEG of it still shows the same."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def jpeg(seed: int, quality: int = 90) -> bytes:
    return encode(picture(seed, 96), "JPEG", quality=quality)


def folder_of(root: str, counts: dict[str, int], first: int = 0) -> str:
    """A source with so many pictures per folder; its URI."""
    seed = first
    for folder, count in counts.items():
        for number in range(first, first + count):
            put(f"{root}/source", f"{folder}/{number:03d}.jpg", jpeg(seed * 1000 + number))
        seed += 1
    return f"{root}/source"


def make(root: str, source: str, **settings: Any) -> Ingested:
    """Ingests into the store beside the source; checks what holds for every ingest."""
    chosen = IngestSettings(source=source, name=settings.pop("name", "pets"), **settings)
    ingested = ingest(f"{root}/mill", chosen)
    dataset = datasets.resolve(f"{root}/mill", ingested.dataset)
    kept, annotations, rejects = rows_of(root, dataset)
    assert (ingested.images, ingested.annotations, ingested.rejected) == (len(kept), len(annotations), len(rejects))
    assert dataset.listed == len(kept) + sum(reject["kind"] == "image" for reject in rejects)
    assert (
        ingested.splits
        == dataset.splits
        == {split: count for split in ("train", "val", "test") if (count := sum(row["split"] == split for row in kept))}
    )
    assert [row["image"] for row in kept] == sorted({row["image"] for row in kept})
    groups: dict[int, set[str]] = {}
    for row in kept:
        if row["duplicate_group"] is not None:
            groups.setdefault(row["duplicate_group"], set()).add(row["split"])
    if not dataset.split_given:
        assert all(len(splits) == 1 for splits in groups.values())
    assert describe(ingested)[0].startswith(ingested.dataset)
    return ingested


def rows_of(root: str, dataset: Dataset | None = None) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of images, annotations and rejects of a version, by default the newest of `pets`."""
    store = f"{root}/mill"
    dataset = dataset or datasets.resolve(store, "pets")
    tables = (read_table(store, dataset) for read_table in (
        datasets.read_images, datasets.read_annotations, datasets.read_rejects
    ))  # fmt: skip
    found = list(tables)
    assert [table.schema for table in found] == [IMAGES_SCHEMA, ANNOTATIONS_SCHEMA, REJECTS_SCHEMA]
    images, annotations, rejects = (table.to_pylist() for table in found)
    return images, annotations, rejects


def by_name(root: str) -> dict[str, dict]:
    """Rows of images by the last two parts of their URI."""
    return {"/".join(row["image"].split("/")[-2:]): row for row in rows_of(root)[0]}


def test_a_folder_of_classes_becomes_a_version(root, caplog):
    caplog.set_level(logging.INFO, "pixelmill")
    source = folder_of(root, {"cat": 20, "dog": 20})
    put(source, ".DS_Store", b"x")
    put(source, "README.md", b"x")
    ingested = make(root, source)
    assert ingested.new
    assert (ingested.images, ingested.annotations, ingested.rejected) == (40, 0, 0)
    assert ingested.classes == ["cat", "dog"]
    assert ingested.splits == {"train": 32, "val": 4, "test": 4}
    assert ingested.format == "folder"
    assert f"{source} looks like folder: 40 images in folders of 2 classes" in caplog.text
    dataset = datasets.resolve(f"{root}/mill", "pets")
    assert (dataset.has_labels, dataset.has_boxes, dataset.has_masks, dataset.split_given) == (
        True,
        False,
        False,
        False,
    )
    assert (dataset.source, dataset.seed, dataset.shares) == (source, 0, {"train": 0.8, "val": 0.1, "test": 0.1})
    row = by_name(root)["dog/003.jpg"]
    data = jpeg(1003)
    assert {**row, "split": ""} == {
        "image": f"{source}/dog/003.jpg",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "width": 96,
        "height": 96,
        "format": "JPEG",
        "split": "",
        "label": "dog",
        "duplicate_group": None,
    }
    assert ingested.summary["images_by_class"]["cat"] == {"train": 16, "val": 2, "test": 2}
    assert ingested.summary["ignored_files"] == {"hidden": 1}


def test_again_is_the_same_version_and_writes_nothing(root):
    source = folder_of(root, {"cat": 6, "dog": 6})
    put(source, "cat/bad.jpg", b"")
    first = make(root, source, copy_images=True)
    before = files_of(root)
    second = make(root, source, copy_images=True)
    assert files_of(root) == before
    assert (first.new, second.new) == (True, False)
    assert {**vars(second), "new": True} == vars(first)
    assert "nothing was written" in describe(second)[0]


def test_new_rejects_are_told_though_the_version_stays(root, caplog):
    source = folder_of(root, {"cat": 3})
    first = make(root, source)
    put(source, "cat/bad.jpg", b"")
    before = files_of(f"{root}/mill")
    second = ingest(f"{root}/mill", IngestSettings(source=source, name="pets"))
    assert (second.dataset, second.new, second.rejected) == (first.dataset, False, 1)
    assert second.summary["rejects"]["image"] == {"empty": 1}
    assert "1 files or annotations were rejected now, 0 when" in caplog.text
    assert files_of(f"{root}/mill") == before


def test_names_and_order_do_not_change_the_splits(tmp_path):
    for root in ("a", "b"):
        folder_of(str(tmp_path / root), {"cat": 30, "dog": 30})
    for path in (tmp_path / "b" / "source" / "cat").iterdir():
        path.rename(path.with_name(f"{1000 - int(path.stem)}.jpg"))
    (tmp_path / "b" / "source" / "dog").rename(tmp_path / "b" / "source" / "a dog")
    splits = []
    for root in ("a", "b"):
        make(str(tmp_path / root), str(tmp_path / root / "source"))
        splits.append({row["sha256"]: row["split"] for row in rows_of(str(tmp_path / root))[0]})
    assert splits[0] == splits[1]
    make(str(tmp_path / "a"), str(tmp_path / "a" / "source"), seed=1)
    assert {row["sha256"]: row["split"] for row in rows_of(str(tmp_path / "a"))[0]} != splits[0]


def test_added_images_never_move_those_that_were_there(tmp_path):
    root = str(tmp_path)
    source = folder_of(root, {"cat": 15, "dog": 10})
    first = make(root, source)
    before = {row["sha256"]: row["split"] for row in rows_of(root)[0]}
    folder_of(root, {"cat": 7, "dog": 40, "owl": 12}, first=100)
    second = make(root, source)
    after = {row["sha256"]: row["split"] for row in rows_of(root)[0]}
    assert second.dataset != first.dataset
    assert len(after) == 84
    assert {sha256: after[sha256] for sha256 in before} == before
    for counts in second.summary["images_by_class"].values():
        total = sum(counts.values())
        assert all(abs(counts.get(split, 0) - share * total) < max(1, 0.1 * share * total) for split, share in (
            ("train", 0.8), ("val", 0.1), ("test", 0.1)
        ))  # fmt: skip


def test_a_bridge_between_earlier_splits_is_told(tmp_path):
    root = str(tmp_path)
    source = folder_of(root, {"cat": 30})
    make(root, source)
    rows = {row["split"]: row["image"] for row in rows_of(root)[0]}
    store = f"{root}/mill"
    dataset = datasets.resolve(store, "pets")
    moving = Path(rows["test"]).read_bytes()
    table = datasets.read_images(store, dataset)
    assert hashlib.sha256(moving).hexdigest() in table["sha256"].to_pylist()
    Path(rows["train"]).write_bytes(encode(Image.open(io.BytesIO(moving)), "JPEG", quality=89))
    ingested = make(root, source)  # a near copy of a test image: it goes where that one is
    group = [row for row in rows_of(root)[0] if row["duplicate_group"] is not None]
    assert {row["split"] for row in group} == {"test"}
    assert len(group) == 2
    assert ingested.summary["moved_to_another_split"] == 0


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "identical": lambda image: encode(image, "JPEG", quality=90),
    "re-encoded": lambda image: encode(image, "JPEG", quality=60),
    "resized": lambda image: encode(image.resize((60, 60), Image.Resampling.LANCZOS), "PNG"),
    "brighter": lambda image: encode(ImageEnhance.Brightness(image).enhance(1.05), "JPEG", quality=90),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_never_straddle_splits(tmp_path, copy):
    root = str(tmp_path)
    source = folder_of(root, {"cat": 30})
    for number in range(30):
        put(source, f"cat/copy-{number:03d}.jpg", COPIES[copy](picture(number, 96)))
    ingested = make(root, source)
    rows = rows_of(root)[0]
    assert sorted(Counter(row["duplicate_group"] for row in rows).values()) == [2] * 30
    assert ingested.summary["duplicates"] == {
        "groups": 30,
        "identical": 60 if copy == "identical" else 0,
        "near": 0 if copy == "identical" else 60,
    }
    assert ingested.splits == {"train": 48, "val": 6, "test": 6}


def test_a_given_split_is_honoured_and_its_leaks_are_told(root):
    source = folder_of(root, {"train/cat": 5, "train/dog": 5, "test/cat": 2})
    put(source, "test/dog/same.jpg", jpeg(1001))
    put(source, "test/dog/near.jpg", jpeg(1002, quality=70))
    ingested = make(root, source)
    assert ingested.splits == {"train": 10, "test": 4}
    assert datasets.resolve(f"{root}/mill", "pets").split_given
    assert {row["split"] for name, row in by_name(root).items() if name in ("dog/same.jpg", "dog/near.jpg")} == {"test"}
    leaks = ingested.summary["leaks"]
    assert leaks["groups"] == 2
    assert all({each["split"] for each in group} == {"train", "test"} for group in leaks["examples"])
    assert any("2 times copies of an image are in different given splits" in line for line in describe(ingested))


def test_identical_images_with_different_labels_are_kept_and_told(root):
    source = folder_of(root, {"cat": 2, "dog": 2})
    put(source, "dog/cat.jpg", jpeg(1))
    ingested = make(root, source)
    assert ingested.images == 5
    conflicts = ingested.summary["label_conflicts"]
    assert conflicts["groups"] == 1
    assert sorted(each["label"] for each in conflicts["examples"][0]) == ["cat", "dog"]
    assert any("identical images have different labels" in line for line in describe(ingested))


def test_every_odd_image_is_kept_or_rejected_with_its_reason(tmp_path):
    for odd in odd_images():
        put(f"{tmp_path}/source/things", odd.name if "." in odd.name else f"{odd.name}.png", odd.data)
    put(f"{tmp_path}/source/others", "1.jpg", jpeg(0))
    ingested = make(str(tmp_path), f"{tmp_path}/source")
    rows, _, rejects = rows_of(str(tmp_path))
    readable = [odd for odd in odd_images() if odd.status == Status.OK]
    assert ingested.images == len(readable) + 1
    assert len(rejects) == len(odd_images()) - len(readable)
    reasons = {reject["source"].rpartition("/")[2]: reject for reject in rejects}
    kept = {row["image"].rpartition("/")[2]: row for row in rows}
    for odd in odd_images():
        name = odd.name if "." in odd.name else f"{odd.name}.png"
        if odd.status == Status.OK:
            assert (kept[name]["height"], kept[name]["width"]) == odd.pixels.shape[:2]
        else:
            assert reasons[name]["kind"] == "image"
            assert reasons[name]["reason"] == odd.status
            assert odd.reason in reasons[name]["detail"]
    assert ingested.summary["rejects"]["image"] == dict(
        Counter(str(odd.status) for odd in odd_images() if odd.status != Status.OK).most_common()
    )


def test_a_pixel_limit(tmp_path):
    source = folder_of(str(tmp_path), {"cat": 2})
    put(source, "cat/large.png", png(8, 2, np.zeros((1, 3), np.uint8), (100, 100)))
    make(str(tmp_path), source, max_pixels=9999)
    (reject,) = rows_of(str(tmp_path))[2]
    assert (reject["reason"], reject["source"]) == ("too_large", f"{source}/cat/large.png")


@pytest.mark.parametrize(
    ("files", "error", "expected"),
    [
        pytest.param({}, NotFound, "does not exist", id="no source"),
        pytest.param(
            {"a.txt": b"x", "b.md": b"x"}, UsageError, r"Looked for coco \(.*found 1 .md, 1 .txt", id="no image"
        ),
        pytest.param(
            {"cat/1.jpg": b"", "cat/2.jpg": b"text"},
            UsageError,
            "none of the 2 images in .* can be used: 1 empty, 1 unsupported; the first: .*cat/1.jpg: zero bytes",
            id="all rejected",
        ),
    ],
)
def test_a_source_that_yields_nothing(root, files, error, expected):
    for path, data in files.items():
        put(f"{root}/source", path, data)
    with pytest.raises(error, match=expected):
        make(root, f"{root}/source")
    assert not files_of(f"{root}/mill")


def test_no_image_in_a_named_format(root):
    put(f"{root}/source", ".hidden/1.jpg", b"x")
    put(f"{root}/source", "a.txt", b"x")
    with pytest.raises(NotFound, match=r"no images in .*source \(ignored: 1 hidden\)"):
        make(root, f"{root}/source", format="folder")


def test_one_class_without_labels_beside(tmp_path):
    source = folder_of(str(tmp_path), {"cat": 3})
    assert make(str(tmp_path), source).classes == ["cat"]


def test_images_without_labels(root):
    put(f"{root}/source", "1.jpg", jpeg(1))
    ingested = make(root, f"{root}/source")
    assert (ingested.classes, ingested.splits) == ([], {"train": 1})
    assert not datasets.resolve(f"{root}/mill", "pets").has_labels
    assert rows_of(root)[0][0]["label"] is None
    assert describe(ingested)


def test_names_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/source/caf\xe9"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/\xff.jpg")).write_bytes(jpeg(0))
    Path(os.fsdecode(folder + b"/\xfe.jpg")).write_bytes(b"")
    folder_of(str(tmp_path), {"dog": 1}, first=7)
    ingested = make(str(tmp_path), f"{tmp_path}/source")
    assert ingested.classes == ["caf%E9", "dog"]
    images, _, rejects = rows_of(str(tmp_path))
    assert f"file://{tmp_path}/source/caf%E9/%FF.jpg" in [row["image"] for row in images]
    assert [row["source"] for row in rejects] == [f"file://{tmp_path}/source/caf%E9/%FE.jpg"]


def archive_of(files: dict[str, bytes], name: str) -> bytes:
    buffer = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for path, data in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["pets.zip", "pets.tar.gz"])
def test_images_of_an_archive_are_copied(root, name, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    files = {f"pets/{label}/{number}.jpg": jpeg(number) for number, label in enumerate(("cat", "cat", "dog"))}
    source = put(root, name, archive_of(files | {"pets/dog/bad.jpg": b"", "__MACOSX/._1.jpg": b"x"}, name))
    ingested = make(root, source)
    assert (ingested.images, ingested.rejected, ingested.classes) == (3, 1, ["cat", "dog"])
    images, _, rejects = rows_of(root)
    for row in images:
        assert row["image"] == f"{root}/mill/datasets/pets/images/{row['sha256'][:2]}/{row['sha256']}.jpg"
        assert hashlib.sha256(open_storage(root).read(row["image"])).hexdigest() == row["sha256"]
    assert [row["source"] for row in rejects] == [f"{source}/pets/dog/bad.jpg"]
    before = files_of(root)
    assert not make(root, source).new
    assert files_of(root) == before
    assert list(scratch.iterdir()) == []


def test_copied_images_outlive_their_source(tmp_path):
    root = str(tmp_path)
    source = folder_of(root, {"cat": 2})
    Path(source, "cat", "3.gif").write_bytes(encode(picture(9).convert("P"), "GIF"))
    make(root, source, copy_images=True)
    for path in Path(source, "cat").iterdir():
        path.unlink()
    rows = rows_of(root)[0]
    assert sorted(Path(row["image"]).suffix for row in rows) == [".gif", ".jpg", ".jpg"]
    assert all(Path(row["image"]).stat().st_size == row["bytes"] for row in rows)


def test_identical_images_get_copies_of_their_own(root):
    source = folder_of(root, {"cat": 1})
    put(source, "dog/1.jpg", jpeg(0))
    put(source, "dog/2.jpg", jpeg(0))
    make(root, source, copy_images=True)
    rows = rows_of(root)[0]
    digest = hashlib.sha256(jpeg(0)).hexdigest()
    assert [(row["image"].rpartition("/")[2], row["label"]) for row in rows] == [
        (f"{digest}-2.jpg", "dog"),
        (f"{digest}-3.jpg", "dog"),
        (f"{digest}.jpg", "cat"),
    ]
    assert {open_storage(root).read(row["image"]) for row in rows} == {jpeg(0)}


def test_without_copies_the_store_holds_no_image(tmp_path):
    root = str(tmp_path)
    make(root, folder_of(root, {"cat": 2}))
    assert not Path(root, "mill", "datasets", "pets", "images").exists()


def test_a_store_inside_the_source_is_passed_over(tmp_path):
    folder_of(str(tmp_path), {"cat": 3, "dog": 3})
    settings = IngestSettings(source=f"{tmp_path}/source", name="pets", copy_images=True)
    first = ingest(f"{tmp_path}/source/mill", settings)
    assert first.images == 6
    assert ingest(f"{tmp_path}/source/mill", settings).dataset == first.dataset


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Callable[[Labelled], None]:
    """Makes every source read as this."""

    def set_up(labelled: Labelled) -> None:
        fake = type("Fake", (), {"read": staticmethod(lambda tree, annotations: labelled)})
        monkeypatch.setattr(formats, "reader", lambda name: fake)

    return set_up


def box(image: str, label: str = "cell", line: int = 1, **fields: Any) -> LabelledRegion:
    return LabelledRegion(image, label, "/labels.json", line, **{"box_xyxy": (1.0, 2.0, 10.0, 12.0), **fields})


def test_listed_is_kept_plus_rejected_whatever_the_reader_says(root, reader):
    source = folder_of(root, {"cat": 4})
    put(source, "cat/bad.jpg", b"")
    put(source, "elsewhere/1.jpg", jpeg(77))
    labelled = Labelled("coco", "a made-up reader", ("cell",), has_boxes=True)
    labelled.images = [
        LabelledImage("cat/000.jpg"),
        LabelledImage("cat/001.jpg", width=96, height=96),
        LabelledImage("cat/001.jpg", split="test", source="/labels.json", line=7),
        LabelledImage("cat/002.jpg", width=96, height=95),
        LabelledImage("cat/003.jpg"),
        LabelledImage("cat/bad.jpg"),
        LabelledImage("cat/gone.jpg", source="/labels.json", line=9),
    ]
    labelled.regions = [
        box("cat/000.jpg", line=1),
        box("cat/000.jpg", line=2),  # the same again
        box("cat/001.jpg", line=3, box_xyxy=(90.0, 90.0, 200.0, 95.0)),
        box("cat/001.jpg", "unknown", line=4),
        box("cat/001.jpg", line=5),
        box("cat/002.jpg", line=6),
        box("cat/bad.jpg", line=7),
        box("cat/gone.jpg", line=8),
    ]
    labelled.rejects = [
        Reject("image", "/other.jpg", None, "not in the annotations"),
        Reject("annotation", "/labels.json", 99, "malformed"),
    ]
    reader(labelled)
    ingested = make(root, source, format="coco")
    assert (ingested.images, ingested.annotations) == (3, 2)
    assert ingested.classes == ["cell"]
    rejects = [(row["kind"], row["source"].rpartition("/")[2], row["line"], row["reason"]) for row in rows_of(root)[2]]
    assert sorted(rejects, key=str) == sorted([
        ("image", "labels.json", 7, "image named twice"),
        ("image", "002.jpg", None, "other size than annotated"),
        ("image", "bad.jpg", None, "empty"),
        ("image", "labels.json", 9, "missing image"),
        ("image", "other.jpg", None, "not in the annotations"),
        ("annotation", "labels.json", 2, "duplicate"),
        ("annotation", "labels.json", 3, "outside the image"),
        ("annotation", "labels.json", 4, "unknown label"),
        ("annotation", "labels.json", 6, "its image was rejected"),
        ("annotation", "labels.json", 7, "its image was rejected"),
        ("annotation", "labels.json", 8, "its image was rejected"),
        ("annotation", "labels.json", 99, "malformed"),
    ], key=str)  # fmt: skip
    assert datasets.resolve(f"{root}/mill", "pets").listed == 8
    assert ingested.summary["ignored_files"] == {"images_elsewhere": 1}
    assert ingested.summary["annotations_by_class"] == {"cell": 2}
    assert datasets.resolve(f"{root}/mill", "pets").has_boxes


def test_nothing_may_go_missing(tmp_path, reader, monkeypatch):
    source = folder_of(str(tmp_path), {"cat": 2})
    see = ingesting.see_images
    monkeypatch.setattr(ingesting, "see_images", lambda *given, **named: list(see(*given, **named))[1:])
    with pytest.raises(AssertionError, match="every image listed is accounted for"):
        make(str(tmp_path), source)


def test_splits_are_balanced_by_the_rarest_class_of_an_image(tmp_path, reader):
    source = folder_of(str(tmp_path), {"x": 100})
    labelled = Labelled("coco", "a made-up reader", ("rare", "usual"), has_boxes=True)
    labelled.images = [LabelledImage(f"x/{number:03d}.jpg") for number in range(100)]
    labelled.regions = [box(image.path, "usual") for image in labelled.images]
    labelled.regions += [box(f"x/{number:03d}.jpg", "rare") for number in range(0, 100, 5)]
    reader(labelled)
    by_class = make(str(tmp_path), source, format="coco").summary["images_by_class"]
    assert by_class["rare"] == {"train": 16, "val": 2, "test": 2}
    assert by_class["usual"] == {"train": 80, "val": 10, "test": 10}


def test_the_order_of_the_source_does_not_change_the_version(tmp_path, reader):
    source = folder_of(str(tmp_path), {"x": 4})
    versions = []
    for step in (1, -1):
        labelled = Labelled("coco", "a made-up reader", ("cell",), has_boxes=True)
        labelled.images = [LabelledImage(f"x/{number:03d}.jpg") for number in range(4)][::step]
        labelled.regions = [
            box("x/001.jpg", box_xyxy=(float(x), 0.0, 50.0, 50.0), crowd=bool(x % 2)) for x in range(8)
        ][::step]
        reader(labelled)
        versions.append(make(str(tmp_path), source, format="coco").dataset)
    assert versions[0] == versions[1]


def test_a_source_gives_some_images_a_split(tmp_path, reader):
    source = folder_of(str(tmp_path), {"x": 20})
    put(source, "x/copy.jpg", jpeg(0, quality=70))
    labelled = Labelled("voc", "a made-up reader")
    labelled.images = [LabelledImage("x/000.jpg", "test"), LabelledImage("x/copy.jpg")]
    labelled.images += [LabelledImage(f"x/{number:03d}.jpg") for number in range(1, 20)]
    reader(labelled)
    make(str(tmp_path), source, format="voc")
    rows = by_name(str(tmp_path))
    assert (rows["x/000.jpg"]["split"], rows["x/copy.jpg"]["split"]) == ("test", "test")
    assert Counter(row["split"] for row in rows.values())["train"] > 12


def test_an_image_that_changes_meanwhile_is_rejected(tmp_path, monkeypatch):
    source = folder_of(str(tmp_path), {"cat": 2})
    recognise_format = formats.recognise

    def changing(tree: Tree, annotations: str | None) -> str:
        Path(source, "cat", "000.jpg").write_bytes(b"other")
        Path(source, "cat", "001.jpg").rename(Path(source, "cat", "002.jpg"))
        return recognise_format(tree, annotations)

    put(source, "cat/100.jpg", jpeg(100))
    monkeypatch.setattr(formats, "recognise", changing)
    make(str(tmp_path), source)
    rejects = rows_of(str(tmp_path))[2]
    assert [(row["reason"], row["detail"]) for row in rejects] == [
        ("missing", "changed since it was listed"),
        ("missing", "gone since it was listed"),
    ]


@pytest.mark.parametrize("error", [StorageError, TransientError, KeyboardInterrupt])
def test_an_interrupted_ingest_leaves_nothing_that_shows(tmp_path, monkeypatch, error):
    source = folder_of(str(tmp_path), {"cat": 20})
    storage = open_storage(source)
    read_image, calls = storage.read_image, iter(range(100))

    def failing(image: Any, max_bytes: int) -> bytes:
        if next(calls) == 10:
            raise error("the line went dead")
        return read_image(image, max_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_image", failing)
        with pytest.raises(error, match="the line went dead"):
            make(str(tmp_path), source, copy_images=True)
    assert datasets.list_datasets(f"{tmp_path}/mill") == []
    ingested = make(str(tmp_path), source, copy_images=True)
    assert (ingested.new, ingested.images) == (True, 20)


def test_two_at_once_make_one_version(root):
    source = folder_of(root, {"cat": 6, "dog": 6})
    results: list[Ingested] = []
    start = threading.Barrier(2)

    def run() -> None:
        start.wait()
        results.append(ingest(f"{root}/mill", IngestSettings(source=source, name="pets", copy_images=True)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0].dataset == results[1].dataset
    assert len(datasets.list_datasets(f"{root}/mill")) == 1
    assert len(files_of(f"{root}/mill")) == 12 + 4


def test_few_images_are_in_memory_at_once(tmp_path, monkeypatch):
    source = folder_of(str(tmp_path), {"cat": 60})
    storage = open_storage(source)
    read_image, started, most = storage.read_image, Counter(), []

    def counting(image: Any, max_bytes: int) -> bytes:
        started["read"] += 1
        return read_image(image, max_bytes)

    monkeypatch.setattr(storage, "read_image", counting)
    tree = Tree(source, {state.uri.removeprefix(f"{source}/"): state for state in walk(source)}, {})
    seeing = images.see_images(
        tree, [LabelledImage(path) for path in sorted(tree.files)], max_pixels=10**6, copies=None, threads=2
    )
    for done, _ in enumerate(seeing, 1):
        most.append(started["read"] - done)
    assert max(most) <= 4
    assert started["read"] == 60


def walk(uri: str) -> list[FileState]:
    return list(open_storage(uri).walk(uri, recursive=True, ignore=lambda name, is_folder: None, ignored={}))


def test_progress_is_told(tmp_path):
    steps: list[Step] = []
    source = folder_of(str(tmp_path), {"cat": 40})
    put(source, "cat/bad.jpg", b"")
    ingest(f"{tmp_path}/mill", IngestSettings(source=source, name="pets"), steps.append)
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages == ["reading labels", "reading images", "looking for copies", "writing"]
    assert [step for step in steps if step.stage == "reading images"][-1] == Step(
        "reading images", 41, 41, "1 rejected"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("split", "train=.8,val=.1", id="shares that do not add up"),
        pytest.param("split", "train=.8,dev=.2", id="an unknown split"),
        pytest.param("name", "a/b", id="a name with a slash"),
        pytest.param("format", "csv", id="an unknown format"),
        pytest.param("source", "https://me:secret@host/x", id="credentials"),
    ],
)
def test_settings_that_cannot_be(field, value):
    with pytest.raises(ValidationError):
        IngestSettings(**{"source": "/x", "name": "pets", field: value})


def test_a_source_that_is_as_it_was_is_not_opened_again(root, monkeypatch):
    source = folder_of(root, {"cat": 3, "dog": 3})
    first = make(root, source)
    put(f"{root}/labels", "unused.txt", b"")

    def opened(*given: Any, **more: Any) -> Any:
        raise AssertionError("an image was opened")

    with monkeypatch.context() as patch:
        patch.setattr(ingesting, "see_images", opened)
        again = make(root, source)
        assert (again.dataset, again.new, again.saw, again.summary) == (first.dataset, False, first.saw, first.summary)
        with pytest.raises(AssertionError):
            make(root, source, seed=1)
        with pytest.raises(AssertionError):
            make(root, source, name="others")
    put(f"{root}/source", "dog/new.jpg", jpeg(77))
    assert make(root, source).images == 7


def test_an_archive_that_is_as_it_was_is_not_unpacked_again(tmp_path, monkeypatch):
    packed = tmp_path / "pets.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(4):
            archive.writestr(f"{'cat' if number % 2 else 'dog'}/{number}.jpg", jpeg(number))
    first = make(str(tmp_path), str(packed))
    monkeypatch.setattr(ingesting, "open_tree", None)
    assert make(str(tmp_path), str(packed)).dataset == first.dataset
