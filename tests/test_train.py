"""From a data set in the store to a model in the store, through real commands' own path."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.dataset import IMAGES_SCHEMA, Dataset
from models.errors import ModelError, NotFound, UsageError
from models.imaging import masks
from models.learning.operating_point import OperatingPoint
from models.records import Task
from models.settings.ingest import IngestSettings
from models.settings.predict import PredictSettings
from models.settings.train import TrainSettings
from tasks import predict, registry
from tasks.datasets import datasets
from tasks.datasets.ingest import ingest
from tasks.demo import weights_file
from tasks.digits import write_digits
from tasks.evaluate import measure
from tasks.photographs import encode_png
from tasks.table import Table
from tasks.train import FOLDER_VARIABLE, HISTORY_FILE, train
from tasks.training_images import image_files, labels_of_objects, training_images, with_extra_data
from tests.tiny_datasets import publish_dataset, publish_objects
from tests.tiny_learning import coloured, write_files
from tests.tiny_rcnn import shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mill(tmp_path_factory) -> Iterator[str]:
    """A store with data sets of colours and of shapes, and a folder of its own for unfinished trainings."""
    home = tmp_path_factory.mktemp("train")
    write_files(coloured(8), home / "colours")
    ingest(str(home / "mill"), IngestSettings(source=str(home / "colours"), name="colours", split="train=.7,val=.3"))
    publish_objects(str(home / "mill"), home / "shapes", shaped({"train": 8, "val": 4}), ("disc", "square"), "shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(home / "unfinished"))
        yield str(home / "mill")


def settings(**changes) -> TrainSettings:
    """The smallest network of the catalogue on the smallest images."""
    usual = {
        "dataset": "colours",
        "model": "mobilenet_v3_small",
        "name": "colours",
        "mode": "scratch",
        "image_size": 32,
        "epochs": 2,
        "batch_size": 8,
        "precision": "fp32",
        "export": False,
    }
    return TrainSettings(**usual | changes)


DETECTOR = {"dataset": "shapes", "model": "yolo_n", "image_size": 64, "batch_size": 4}


def shaped(counts: dict[str, int]) -> list[tuple[str, bytes, list[dict]]]:
    """Images of a disc and a square each, by split."""
    images, targets = shapes(sum(counts.values()), 64)
    splits = [split for split, count in counts.items() for _ in range(count)]
    sides = ("x_min", "y_min", "x_max", "y_max")
    return [
        (
            split,
            encode_png(image),
            [
                dict(zip(sides, box, strict=True)) | {"label": label, "mask": masks.encode(mask)}
                for box, label, mask in zip(
                    target["boxes_xyxy"].tolist(), ("disc", "square"), target["masks"].numpy(), strict=True
                )
            ],
        )
        for split, image, target in zip(splits, images.numpy(), targets, strict=True)
    ]


def unfinished() -> list[Path]:
    folder = Path(os.environ[FOLDER_VARIABLE])
    return list(folder.iterdir()) if folder.exists() else []


def exact_top1(store: str, card: Card) -> float:
    """Of the ONNX file through the bulk path; in fp32, as the loop validates, where the usual engine may take bf16."""
    dataset = datasets.resolve(store, card.training["dataset"])
    path = registry.fetch_model(store, card)
    return measure(card, path, store, dataset, "val", engine="onnxruntime", device="cpu")["top1"]


def test_a_training_is_published_and_the_same_again_finds_it(mill):
    rows: list[dict] = []
    trained = train(mill, settings(), on_epoch=rows.append)
    assert (trained.new, trained.epochs, trained.promoted) == (True, 2, None)
    card = registry.resolve(mill, trained.model)
    assert card.labels == ("class0", "class1", "class2", "class3")
    assert set(card.files) == {WEIGHTS_FILE, HISTORY_FILE}
    assert (card.input.height, card.input.width) == (32, 32)
    assert card.training["dataset"] == datasets.resolve(mill, "colours").reference
    assert card.training["settings"]["lr"] > 0  # what was left open is decided in the card
    assert (
        trained.metrics["val"]["top1"]
        == card.training["validation"]["top1"]
        == rows[card.training["best_epoch"] - 1]["val_top1"]
    )
    history = pq.read_table(Path(mill, "models", "colours", card.version, HISTORY_FILE))
    assert history.to_pylist() == rows
    assert unfinished() == []

    again = train(mill, settings(), on_epoch=lambda row: pytest.fail("nothing is to be trained"))
    assert (again.new, again.model, again.metrics, again.epochs) == (False, trained.model, trained.metrics, 2)
    other = train(mill, settings(epochs=1))
    assert other.new
    assert other.model != trained.model


@pytest.mark.parametrize(
    "changes",
    [{}, DETECTOR | {"mosaic": True, "multi_scale": True, "ema": 0.9}],
    ids=["classifier", "detector"],
)
def test_a_killed_training_goes_on_and_ends_as_if_it_had_not_been(mill, changes):
    wanted = settings(**changes, name=f"killed{len(changes)}", epochs=4, seed=3)
    undisturbed = train(mill, wanted.model_copy(update={"name": f"undisturbed{len(changes)}"}))
    script = """
import os, signal, sys, torch
from models.settings.train import TrainSettings
from tasks.train import train
torch.set_num_threads(1)
def report(step):
    if step.stage == "epoch 3 of 4" and step.done == 1:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    train(sys.argv[1], TrainSettings.model_validate_json(sys.argv[2]), report)
"""
    died = subprocess.run(
        [sys.executable, "-c", script, mill, wanted.model_dump_json()], cwd=ROOT, capture_output=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert len(unfinished()) == 1
    with pytest.raises(NotFound):
        registry.resolve(mill, wanted.name)

    rows: list[dict] = []
    resumed = train(mill, wanted, on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == [3, 4]
    assert (resumed.epochs, resumed.metrics) == (4, undisturbed.metrics)
    cards = [registry.resolve(mill, model) for model in (resumed.model, undisturbed.model)]
    assert cards[0].weights_sha256 == cards[1].weights_sha256
    assert unfinished() == []


@pytest.mark.parametrize(("best", "told"), [(0.67891, 0.679), (0.01, 0.05)], ids=["rounded", "below the floor"])
def test_a_detector_tells_findings_from_the_score_with_the_best_f1(mill, monkeypatch, best, told):
    monkeypatch.setattr(
        "models.learning.detection.best_operating_point", lambda *of_split: OperatingPoint(best, 0.5, 0.5, 0.5)
    )
    trained = train(mill, settings(**DETECTOR, name="scored", epochs=1, seed=int(best * 100)))
    card = registry.resolve(mill, trained.model)
    assert (card.score, card.score_floor) == (told, 0.05)
    assert card.training["validation"]["score"] == best


def test_without_resume_it_starts_anew(mill):
    wanted = settings(name="anew", epochs=3, seed=4)

    def fall(step) -> None:
        if step.stage == "epoch 3 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(mill, wanted, fall)
    rows: list[dict] = []
    train(mill, wanted.model_copy(update={"resume": False}), on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
def test_digits_are_learned_by_transfer_exported_measured_and_predicted(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "unfinished"))
    store = str(tmp_path / "mill")
    write_digits(tmp_path / "digits", 12)
    dataset = ingest(store, IngestSettings(source=str(tmp_path / "digits"), name="digits"))
    stages: list[str] = []
    wanted = TrainSettings(
        dataset="digits",
        model="mobilenet_v2",
        name="digits",
        mode="features",
        weights=str(weights_file()),
        image_size=64,
        flip=False,
        export=False,
    )
    bare = train(store, wanted)
    # An export that was left out is made up for, without another training.
    wanted = wanted.model_copy(update={"export": True, "promote_if_better": True})
    trained = train(store, wanted, lambda step: stages.append(step.stage))
    assert (trained.model, trained.new, trained.promoted) == (bare.model, False, True)
    assert not any(stage.startswith("epoch") for stage in stages)
    card = registry.resolve(store, "digits@production")
    assert card.is_exported
    assert trained.metrics["test"]["top1"] > 0.5
    assert exact_top1(store, card) == pytest.approx(card.training["validation"]["top1"])

    planned = predict.plan(store, PredictSettings(source=dataset.dataset, model=card.reference, table="found"))
    assert planned.listed == 120
    predict.work(store, PredictSettings(source=dataset.dataset, model=card.reference, table="found"), planned)
    assert Table(store, "found").open_shards(card.reference) == []


def test_an_exported_model_agrees_on_the_images_it_was_validated_on(mill):
    trained = train(mill, settings(name="exported", export=True, epochs=1, promote_if_better=True))
    card = registry.resolve(mill, trained.model)
    assert set(card.files) == {WEIGHTS_FILE, HISTORY_FILE, ONNX_FILE}
    validated = datasets.read_images(mill, datasets.resolve(mill, "colours"), "val").column("image").to_pylist()
    assert set(card.parity["images"]) <= set(validated)
    assert trained.metrics["val"]["images"] == len(validated)
    assert exact_top1(mill, card) == pytest.approx(card.training["validation"]["top1"])
    assert trained.promoted


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"dataset": "nothing"}, NotFound, "no data set 'nothing'", id="no data set"),
        pytest.param({"model": "resnet19"}, UsageError, "no architecture is named 'resnet19'", id="no architecture"),
        pytest.param({"weights": "imagenet"}, UsageError, "starts from random weights", id="weights for scratch"),
        pytest.param({"precision": "fp16", "device": "cpu"}, UsageError, "fp16 needs a GPU", id="fp16 on a CPU"),
        pytest.param({"promote_if_better": True}, UsageError, "leave out --no-export", id="promote without export"),
        pytest.param({"model": "yolo_n"}, UsageError, "a detector learns from boxes, and colours@", id="no boxes"),
        pytest.param({"model": "maskrcnn_resnet18"}, UsageError, "learns from masks of single objects", id="no masks"),
        pytest.param({"model": "unet"}, UsageError, "a segmenter learns from masks, and colours@", id="no maps"),
        pytest.param({"dataset": "shapes"}, UsageError, "a classifier learns from images with one", id="no labels"),
        pytest.param({"mosaic": True}, UsageError, "--mosaic means nothing to models that classify", id="mosaic"),
        pytest.param(
            DETECTOR | {"label_smoothing": 0.1}, UsageError, "--label-smoothing means nothing", id="smoothing"
        ),
        pytest.param(DETECTOR | {"image_size": 80}, UsageError, "multiples of 32 pixels", id="size of a detector"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(mill, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        train(mill, settings(name="refused", **changes))
    assert "\n" not in str(caught.value)
    with pytest.raises(NotFound):
        registry.resolve(mill, "refused")


def test_a_gpu_that_is_not_there_is_said(mill, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda needs a GPU"):
        train(mill, settings(device="cuda"))


def test_a_missing_package_is_named(mill, monkeypatch):
    monkeypatch.setitem(sys.modules, "models.learning.learner", None)
    with pytest.raises(ModelError, match=r"training needs .*pip install 'pixelmill\[train\]'"):
        train(mill, settings(seed=9))


def examples(counts: dict[tuple[str, str | None], int]) -> list[tuple[str, str | None, bytes]]:
    """Different small images by (split, label)."""
    files = iter(coloured(30, seed=5).read.data)
    return [(split, label, next(files)) for (split, label), count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "classes", "message"),
    [
        pytest.param({("train", "a"): 3, ("val", "a"): 1}, ("a",), "has 1: a", id="one class"),
        pytest.param({("test", "a"): 3, ("test", "b"): 3}, None, "no images in its split train", id="no train split"),
        pytest.param({("train", "a"): 3, ("val", "b"): 3}, None, "are of the class a", id="one class to learn"),
        pytest.param({("train", "a"): 1}, ("a", "b"), "too few different training images", id="one image"),
    ],
)
def test_a_data_set_from_which_nothing_can_be_learned(tmp_path, counts, classes, message):
    store = str(tmp_path / "mill")
    dataset = publish_dataset(store, tmp_path / "images", examples(counts), classes=classes)
    with pytest.raises(UsageError, match=message):
        training_images(store, dataset, Task.CLASSIFY)


def test_images_without_objects_are_kept_as_background(tmp_path, caplog):
    caplog.set_level("INFO")
    store = str(tmp_path / "mill")
    shown, empty = (
        shaped({"train": 6})[:3],
        [(split, data, []) for split, data, _ in shaped({"train": 6, "val": 2})[3:]],
    )
    dataset = publish_objects(store, tmp_path / "images", [*shown, *empty], ("disc", "square", "ring"))
    images = training_images(store, dataset, Task.DETECT)
    assert (images.train.num_rows, images.val.num_rows) == (6, 2)
    assert "3 of 6 training images show no object" in caplog.text
    assert "1 of 3 classes have no training image, and will not be recognised: ring" in caplog.text
    assert "no validation image shows an object" in caplog.text
    labels = labels_of_objects(images.train, datasets.read_annotations(store, dataset))
    assert labels == [{"disc", "square"}] * 3 + [set()] * 3


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        pytest.param({"crowd": True}, Task.DETECT, id="crowds"),
        pytest.param({"label": None}, Task.DETECT, id="regions to be ignored"),
        pytest.param({"mask": None}, Task.INSTANCE, id="no masks"),
        pytest.param({"mask": None}, Task.SEMANTIC, id="no maps"),
    ],
)
def test_training_images_that_show_nothing_to_learn(tmp_path, changes, task):
    store = str(tmp_path / "mill")
    examples = shaped({"train": 2, "val": 1})
    for _, _, objects in examples[:2]:
        for one in objects:
            one |= changes
    dataset = publish_objects(store, tmp_path / "images", examples, ("disc", "square"))
    with pytest.raises(UsageError, match="none of the 2 training images of objects@") as caught:
        training_images(store, dataset, task)
    assert "\n" not in str(caught.value)


def test_images_without_labels_teach_no_classifier(tmp_path):
    store = str(tmp_path / "mill")
    dataset = publish_dataset(store, tmp_path / "images", examples({("train", "a"): 3, ("train", "b"): 3}))
    with pytest.raises(UsageError, match="one label each, and those of squares@"):
        training_images(store, replace(dataset, has_labels=False), Task.CLASSIFY)


def test_what_is_left_out_or_lacking_is_said(tmp_path, caplog):
    store = str(tmp_path / "mill")
    counts = {("train", "a"): 4, ("train", "b"): 4, ("train", None): 2, ("val", "a"): 2}
    dataset = publish_dataset(store, tmp_path / "images", examples(counts), classes=("a", "b", "c"))
    images = training_images(store, dataset, Task.CLASSIFY)
    assert (images.train.num_rows, images.val.num_rows, images.carved) == (8, 2, False)
    assert "2 images of squares@" in caplog.text
    assert "1 of 3 classes have no training image, and will not be recognised: c" in caplog.text


def test_without_a_val_split_some_training_images_validate(tmp_path, caplog):
    caplog.set_level("INFO")
    store = str(tmp_path / "mill")
    dataset = publish_dataset(store, tmp_path / "images", examples({("train", "a"): 40, ("train", "b"): 20}))
    images = training_images(store, dataset, Task.CLASSIFY)
    assert images.carved
    assert images.val.column("label").to_pylist().count("a") in (3, 4, 5)
    assert images.val.column("label").to_pylist().count("b") in (1, 2, 3)
    kept, validated = (set(rows.column("image").to_pylist()) for rows in (images.train, images.val))
    assert not kept & validated
    assert len(kept | validated) == 60
    assert f"{len(validated)} of its 60 training images" in caplog.text
    assert training_images(store, dataset, Task.CLASSIFY).val.equals(images.val)


def test_copies_do_not_straddle_the_carved_split(tmp_path, monkeypatch):
    rows = [
        {"image": f"/{number}.png", "sha256": f"{number:064x}", "split": "train", "label": "ab"[number % 2]}
        | {"duplicate_group": number // 4}
        for number in range(40)
    ]
    table = pa.Table.from_pylist([{name: row.get(name) for name in IMAGES_SCHEMA.names} for row in rows], IMAGES_SCHEMA)
    monkeypatch.setattr(datasets, "read_images", lambda store, dataset, split: table if split == "train" else table[:0])
    dataset = Dataset("d", "0" * 12, "", "folder", ("a", "b"), True, False, False, 40, 40, 0, 0)
    images = training_images("", dataset, Task.CLASSIFY)
    assert images.val.num_rows == 4
    groups = [set(part.column("duplicate_group").to_pylist()) for part in (images.train, images.val)]
    assert not groups[0] & groups[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.unlink(), "is missing, and squares@", id="missing"),
        pytest.param(lambda path: path.write_bytes(b"other"), "has changed since it became part of", id="changed"),
    ],
)
def test_an_image_that_is_not_as_it_was_ingested_is_named(tmp_path, damage, message):
    store = str(tmp_path / "mill")
    dataset = publish_dataset(store, tmp_path / "images", examples({("train", "a"): 2, ("train", "b"): 2}))
    files = image_files(dataset, datasets.read_images(store, dataset))
    path = Path(files.images[1])
    assert files(1) == path.read_bytes()
    damage(path)
    with pytest.raises(UsageError, match=message) as caught:
        files(1)
    assert str(path) in str(caught.value)


def extra_colours(mill, folder: Path, name: str, classes: tuple[str, ...] = ("blue", "green", "red")) -> Dataset:
    """Twelve training images, and one that must never be learned from."""
    examples = [("train", classes[number % len(classes)], coloured_png(number)) for number in range(12)]
    return publish_dataset(mill, folder / name, [*examples, ("test", classes[0], coloured_png(99))], name, classes)


def coloured_png(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 255, (32, 32, 3)).astype(np.uint8))


def test_extra_data_adds_to_the_training_images_alone(mill, tmp_path):
    dataset = datasets.resolve(mill, "colours")
    more = extra_colours(mill, tmp_path, "more", dataset.classes)
    plain = training_images(mill, dataset, Task.CLASSIFY)
    images, extra = with_extra_data(mill, plain, dataset, "more, more", Task.CLASSIFY)
    assert extra == (more,)
    assert images.train.num_rows == plain.train.num_rows + 12
    assert images.train.slice(0, plain.train.num_rows).equals(plain.train)
    assert (images.val, images.carved) == (plain.val, plain.carved)

    without = train(mill, settings(name="extra", epochs=1))
    with_more = train(mill, settings(name="extra", epochs=1, extra_data="more"))
    assert train(mill, settings(name="extra", epochs=1, extra_data=more.reference)).model == with_more.model
    assert with_more.model != without.model
    cards = [registry.resolve(mill, trained.model) for trained in (without, with_more)]
    assert [card.training.get("extra_data") for card in cards] == [None, [more.reference]]
    counts = [card.training["images"] for card in cards]
    assert counts[1] == {"train": counts[0]["train"] + 12, "val": counts[0]["val"]}


def test_extra_images_that_validate_or_test_are_left_out(mill, tmp_path):
    dataset = datasets.resolve(mill, "colours")
    plain = training_images(mill, dataset, Task.CLASSIFY)
    (held_out,) = plain.val.slice(0, 1).to_pylist()
    copy = Path(held_out["image"]).read_bytes()
    examples = [("train", dataset.classes[0], copy), ("train", dataset.classes[0], coloured_png(1))]
    publish_dataset(mill, tmp_path / "leaky", examples, "leaky", dataset.classes)
    images, _ = with_extra_data(mill, plain, dataset, "leaky", Task.CLASSIFY)
    assert images.train.num_rows == plain.train.num_rows + 1
    assert held_out["sha256"] not in images.train.column("sha256").to_pylist()
    publish_dataset(mill, tmp_path / "copies", examples[:1], "copies", dataset.classes)
    with pytest.raises(UsageError, match=r"brings no training image that colours@.* lacks"):
        with_extra_data(mill, plain, dataset, "copies", Task.CLASSIFY)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", NotFound, "no data set 'nothing'"),
        ("colours", UsageError, "is the data set itself"),
        ("shapes", UsageError, "has no labels, which a model of task classify learns from"),
        ("animals", UsageError, "has classes that colours@.* does not have: cat, dog"),
    ],
)
def test_extra_data_that_does_not_fit_is_one_line(mill, tmp_path, name, error, message):
    extra_colours(mill, tmp_path, "animals", ("cat", "dog"))
    with pytest.raises(error, match=message):
        train(mill, settings(extra_data=name))
