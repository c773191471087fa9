"""Data sets in the store: published whole or not at all, found by name and version, read back, listed and queried."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from models.dataset import ANNOTATIONS_SCHEMA, IMAGES_SCHEMA, REJECTS_SCHEMA, Dataset, version_of
from models.errors import NotFound, StorageError, UsageError
from models.records import Task
from models.settings.predict import PredictSettings
from tasks import inventory, predict
from tasks.datasets import datasets
from tasks.query import ask
from tasks.storage import join, local_uri, open_storage
from tasks.table import Table
from tests.odd_images import encode, photograph

CLASSES = ("cat", "dog")


def tables(labels: list[str], folder: str = "/photos") -> tuple[pa.Table, pa.Table, pa.Table]:
    """Images, annotations and rejects: one image per label, every fifth to test on, each with one box."""
    images = [
        {
            "image": f"{folder}/{number}.jpg",
            "sha256": f"{number:064x}",
            "bytes": 10,
            "width": 4,
            "height": 3,
            "format": "JPEG",
            "split": "test" if number % 5 == 4 else "train",
            "label": label,
        }
        for number, label in enumerate(labels)
    ]
    boxes = [
        {"image": row["image"], "label": row["label"], "x_min": 0.0, "y_min": 0.0, "x_max": 2.0, "y_max": 1.5}
        for row in images
    ]
    reject = {"kind": "image", "source": "/photos/bad.jpg", "line": None, "reason": "corrupt", "detail": "cut off"}
    return (
        pa.Table.from_pylist(images, IMAGES_SCHEMA),
        pa.Table.from_pylist(boxes, ANNOTATIONS_SCHEMA),
        pa.Table.from_pylist([reject], REJECTS_SCHEMA),
    )


def dataset(name: str, images: pa.Table, annotations: pa.Table) -> Dataset:
    splits = images["split"].to_pylist()
    return Dataset(
        name,
        version_of(CLASSES, images, annotations),
        "/photos",
        "folder",
        CLASSES,
        has_labels=True,
        has_boxes=True,
        has_masks=False,
        listed=images.num_rows + 1,
        images=images.num_rows,
        annotations=annotations.num_rows,
        rejected=1,
        splits={split: splits.count(split) for split in ("train", "test")},
        summary={"leaks": {"groups": 0}},
    )


def publish(store: str, labels: list[str], name: str = "pets", folder: str = "/photos") -> Dataset:
    images, annotations, rejects = tables(labels, folder)
    return datasets.publish(store, dataset(name, images, annotations), images, annotations, rejects)


def files_of(store: str) -> dict[str, str]:
    """Every file below, with its fingerprint."""
    files = open_storage(store).walk(store, recursive=True, ignore=lambda name, is_folder: None, ignored={})
    return {file.uri: file.fingerprint for file in files}


def test_what_is_published_is_read_back(root):
    published = publish(root, ["cat", "dog", "dog", "cat", "cat"])
    images, annotations, rejects = tables(["cat", "dog", "dog", "cat", "cat"])
    assert datasets.resolve(root, "pets") == datasets.resolve(root, published.reference) == published
    assert published.created_at
    assert set(published.files) == {"images.parquet", "annotations.parquet", "rejects.parquet"}
    assert datasets.read_images(root, published) == images
    assert datasets.read_images(root, published, "test")["image"].to_pylist() == ["/photos/4.jpg"]
    assert datasets.read_images(root, published, "val").num_rows == 0
    assert datasets.read_annotations(root, published) == annotations
    assert datasets.read_rejects(root, published) == rejects
    assert datasets.images_uri(root, published) == f"{root}/datasets/pets/{published.version}/images.parquet"


def test_publishing_again_writes_nothing(root):
    first = publish(root, ["cat", "dog"])
    before = files_of(root)
    assert publish(root, ["cat", "dog"]) == first
    assert files_of(root) == before


def test_a_version_is_what_it_was_when_it_was_made(root):
    images, annotations, rejects = tables(["cat"])
    first = publish(root, ["cat"])
    assert datasets.publish(root, dataset("pets", images, annotations), images, annotations, rejects[:0]) == first
    assert datasets.read_rejects(root, first) == rejects


def test_versions_are_listed_from_old_to_new(root):
    versions = [publish(root, ["cat"] * count).version for count in (3, 1, 2)]
    other = publish(root, ["dog"], name="a.b-c")
    open_storage(root).put_if_absent(f"{root}/datasets/pets/images/ab/abc.jpg", b"x")  # copies are no version
    assert [each.version for each in datasets.list_datasets(root, "pets")] == versions
    assert [each.reference for each in datasets.list_datasets(root)] == [
        other.reference,
        *(f"pets@{version}" for version in versions),
    ]
    assert datasets.resolve(root, "pets").version == versions[-1]


@pytest.mark.parametrize(
    ("reference", "error", "expected"),
    [
        pytest.param("birds", NotFound, "no data set 'birds' in .*; data sets there: pets", id="another name"),
        pytest.param("pets@000000000000", NotFound, "versions of pets: [0-9a-f]{12} ", id="another version"),
        pytest.param("pets@production", NotFound, "versions of pets: [0-9a-f]{12} ", id="no version"),
        pytest.param("../pets", UsageError, r"as NAME or NAME@VERSION, got '\.\./pets'", id="no name"),
        pytest.param("", UsageError, "as NAME or NAME@VERSION, got ''", id="empty"),
    ],
)
def test_what_is_not_there(root, reference, error, expected):
    publish(root, ["cat"])
    with pytest.raises(error, match=expected):
        datasets.resolve(root, reference)


def test_an_empty_store(root):
    assert datasets.list_datasets(root) == []
    with pytest.raises(NotFound, match="data sets there: none yet: see pixelmill ingest"):
        datasets.resolve(root, "pets")


def test_an_unfinished_version_does_not_show_and_is_finished_later(root, monkeypatch):
    storage = open_storage(root)
    put = storage.put_if_absent

    def dying(uri: str, data: bytes) -> bool:
        if uri.endswith("dataset.json"):
            raise KeyboardInterrupt
        return put(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_if_absent", dying)
        with pytest.raises(KeyboardInterrupt):
            publish(root, ["cat", "dog"])
    assert len(files_of(root)) == 3
    assert datasets.list_datasets(root) == []
    with pytest.raises(NotFound):
        datasets.resolve(root, "pets")
    assert datasets.resolve(root, publish(root, ["cat", "dog"]).reference).images == 2


def test_other_files_in_the_way_are_named(root):
    images, annotations, rejects = tables(["cat"])
    planned = dataset("pets", images, annotations)
    uri = f"{root}/datasets/pets/{planned.version}/images.parquet"
    open_storage(root).put_if_absent(uri, b"something else")
    with pytest.raises(StorageError, match=r"images\.parquet is left from an ingest that did not finish"):
        datasets.publish(root, planned, images, annotations, rejects)
    assert datasets.list_datasets(root) == []


@pytest.mark.parametrize(
    ("file", "data", "expected"),
    [
        pytest.param("images.parquet", b"not Parquet", "images.parquet is damaged: ", id="no Parquet"),
        pytest.param("images.parquet", None, "images.parquet is missing, though", id="gone"),
        pytest.param("dataset.json", b"{}", "dataset.json is damaged: KeyError", id="no description"),
        pytest.param("dataset.json", b"{", "dataset.json is damaged: ", id="no JSON"),
    ],
)
def test_damage_is_one_line(tmp_path, file, data, expected):
    store = str(tmp_path)
    published = publish(store, ["cat"])
    path = tmp_path / "datasets" / "pets" / published.version / file
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(StorageError, match=expected) as caught:
        datasets.read_images(store, datasets.resolve(store, "pets"))
    assert "\n" not in str(caught.value)


def test_rot_never_becomes_other_rows(tmp_path):
    published = publish(str(tmp_path), ["cat", "dog"] * 20)
    path = tmp_path / "datasets" / "pets" / published.version / "images.parquet"
    data = path.read_bytes()
    seen = 0
    for position in range(4, len(data), 50):
        path.unlink()
        path.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        try:
            datasets.read_images(str(tmp_path), published)
        except StorageError as error:
            seen += "is damaged" in str(error)
    assert seen == len(range(4, len(data), 50))


def test_the_version_follows_from_the_content():
    images, annotations, _ = tables(["cat", "dog"])
    version = version_of(CLASSES, images, annotations)
    assert version == version_of(CLASSES, pa.concat_tables([images[:1], images[1:]]), annotations)
    assert version != version_of(("dog", "cat"), images, annotations)
    assert version != version_of(CLASSES, images[:1], annotations)
    assert version != version_of(CLASSES, images, annotations[:1])


def test_listing_a_store(root):
    published = publish(root, ["cat", "dog", "dog", "cat", "cat"])
    (entry,) = inventory.list_datasets(root)
    assert (entry.name, entry.version, entry.format) == ("pets", published.version, "folder")
    assert (entry.images, entry.annotations, entry.classes) == (5, 5, 2)
    assert entry.splits == {"train": 4, "test": 1}
    assert entry.bytes == sum(file["bytes"] for file in published.files.values()) > 0
    assert entry.created_at == published.created_at


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        pytest.param("select count(*) from pets_images", [(2,)], id="images of the newest version"),
        pytest.param("select label, area from pets_annotations order by 1", [("cat", None), ("dog", None)], id="boxes"),
        pytest.param("select kind, reason from pets_rejects", [("image", "corrupt")], id="rejects"),
        pytest.param("select count(*) from my_cats_2_images", [(1,)], id="characters that SQL does not take"),
        pytest.param("select count(*) from a_b_images", [(3,)], id="a name as it stands comes first"),
        pytest.param(
            "select name, images, classes, train, val, test from datasets where name = 'pets' order by images",
            [("pets", 1, ["cat", "dog"], 1, 0, 0), ("pets", 2, ["cat", "dog"], 2, 0, 0)],
            id="all versions",
        ),
        pytest.param("select count(*) from busy_images", [(0,)], id="a table of that name wins"),
    ],
)
def test_queries(root, sql, expected):
    publish(root, ["cat"])
    publish(root, ["cat", "dog"])
    publish(root, ["cat"], name="my.cats-2")
    publish(root, ["cat"] * 3, name="a_b")
    publish(root, ["cat"] * 4, name="a-b")
    publish(root, ["cat"], name="busy")
    Table(root, "busy_images").define(Task.CLASSIFY, {})
    assert ask(root, sql).rows == expected


def test_data_sets_that_sql_cannot_tell_apart(tmp_path):
    store = str(tmp_path)
    for count, name in enumerate(("my-pets", "my.pets"), 1):
        publish(store, ["cat"] * count, name=name)
    with pytest.raises(UsageError, match=r"could be the data set my-pets or the data set my\.pets, and SQL"):
        ask(store, "from my_pets_images")
    publish(store, ["cat"] * 3, name="my_pets")
    assert ask(store, "select count(*) from my_pets_images").rows == [(3,)]


def test_a_query_for_what_is_not_there_names_the_data_sets(tmp_path):
    publish(str(tmp_path), ["cat"])
    with pytest.raises(NotFound, match="data sets: pets, each D as D_images or D_annotations or D_rejects"):
        ask(str(tmp_path), "select * from birds")


@pytest.fixture
def photographs(root, tmp_path) -> Dataset:
    """A data set of two images that exist."""
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(encode(photograph(), "JPEG", quality=60 + number))
    return publish(root, ["cat", "dog"], folder=local_uri(str(tmp_path)))


@pytest.mark.parametrize("version", ["", "@"], ids=["newest", "version"])
def test_a_data_set_is_a_source_of_predictions(root, photographs, tmp_path, monkeypatch, version):
    from tests.tiny_models import publish_classifier

    publish_classifier(root, tmp_path)
    monkeypatch.chdir(tmp_path)
    source = photographs.reference if version else photographs.name
    settings = PredictSettings(source=source, model="tiny", table="t")
    planned = predict.plan(root, settings)
    assert (planned.listed, planned.planned) == (2, 2)
    assert planned.source == datasets.images_uri(root, photographs)
    table = Table(root, "t")
    (shard,) = table.open_shards(planned.model)
    assert table.shard_rows(shard)["image"].to_pylist() == [f"{tmp_path}/0.jpg", f"{tmp_path}/1.jpg"]
    assert table.shard_rows(shard)["bytes"].to_pylist() == [Path(tmp_path, f"{n}.jpg").stat().st_size for n in (0, 1)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("birds", "birds does not exist; expected .* or a data set .there are: pets", id="another name"),
        pytest.param("pets@000000000000", "versions of pets: ", id="another version"),
        pytest.param("birds.jpg", "or a data set", id="a file that is not there"),
    ],
)
def test_a_source_that_is_neither(tmp_path, monkeypatch, source, expected):
    publish(str(tmp_path), ["cat"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=expected):
        predict.source_uri(str(tmp_path), source)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    publish(str(tmp_path), ["cat"])
    monkeypatch.chdir(tmp_path)
    assert predict.source_uri(str(tmp_path), "pets").endswith("images.parquet")
    (tmp_path / "pets").mkdir()
    assert predict.source_uri(str(tmp_path), "pets") == join(str(tmp_path), "pets")


def test_the_description_is_readable(tmp_path):
    published = publish(str(tmp_path), ["cat"])
    text = (tmp_path / "datasets" / "pets" / published.version / "dataset.json").read_text()
    assert json.loads(text)["classes"] == ["cat", "dog"]
    assert Dataset.from_json(text.replace('"name"', '"of_a_later_version": 1, "name"')) == published
