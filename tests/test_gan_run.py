"""From images in the store to a generator in the store, through the commands' own path."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.card import ONNX_FILE, WEIGHTS_FILE
from models.errors import ModelError, UsageError
from models.learning.metrics import main_metric
from models.settings.export import EvaluateSettings
from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks import inventory, registry
from tasks import judge as judges
from tasks.datasets import datasets
from tasks.datasets.ingest import ingest
from tasks.evaluate import evaluate
from tasks.judge import judge
from tasks.promote import promote, promote_if_better
from tasks.train import FOLDER_VARIABLE, HISTORY_FILE, train
from tasks.weights import load_model
from tests.tiny_learning import coloured, write_files

ROOT = Path(__file__).parent.parent
EPOCHS = 2


def settings(**changes) -> TrainSettings:
    """Two epochs of some updates."""
    usual = {
        "dataset": "colours",
        "model": "conditional_gan",
        "name": "colours",
        "epochs": EPOCHS,
        "batch_size": 8,
        "precision": "fp32",
        "judge": "pixels",
    }
    return TrainSettings(**usual | changes)


@pytest.fixture(scope="module")
def mill(tmp_path_factory) -> Iterator[str]:
    """A store with images of four colours, once with their classes and once without; with a classifier of them, and a
    generator that has seen them for a moment."""
    home = tmp_path_factory.mktemp("gan")
    store = str(home / "mill")
    write_files(coloured(8), home / "colours")
    split = "train=.5,val=.25,test=.25"
    ingest(store, IngestSettings(source=str(home / "colours"), name="colours", split=split))
    (home / "plain").mkdir()
    for number, path in enumerate(sorted((home / "colours").rglob("*.png"))):
        (home / "plain" / f"{number}.png").write_bytes(path.read_bytes())
    ingest(store, IngestSettings(source=str(home / "plain"), name="plain", split=split))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(home / "unfinished"))
        classifier = {"model": "mobilenet_v3_small", "mode": "scratch", "image_size": 32, "judge": None, "epochs": 1}
        train(store, settings(name="judge", export=False, **classifier))
        train(store, settings())
        yield store
    torch.set_num_threads(threads)


def test_a_generator_is_published_with_what_it_made(mill):
    card = registry.resolve(mill, "colours")
    assert card.labels == ("class0", "class1", "class2", "class3")
    assert (card.latent_size, card.input.height, card.is_conditional) == (100, 32, True)
    grids = {f"samples/epoch-{epoch:04d}.png" for epoch in (1, 2)}
    assert set(card.files) == {ONNX_FILE, WEIGHTS_FILE, HISTORY_FILE, *grids}
    folder = Path(registry.version_folder(mill, card))
    for name in grids:
        with Image.open(folder / name) as sheet:
            assert sheet.size == (8 * 34 - 2, 8 * 34 - 2)
    assert card.training["judge"] == "pixels"
    assert card.training["settings"]["mode"] == "scratch"
    history = pq.read_table(folder / HISTORY_FILE)
    assert {"val_frechet", "val_class_coverage", "val_diversity", "train_generator"} <= set(history.column_names)
    assert card.parity["agrees"]
    assert card.metrics["test"]["judge"] == "pixels"
    figure = main_metric(card)
    assert figure.name == "frechet"
    (listed,) = [each for each in inventory.list_models(mill) if each.version == card.version]
    assert listed.metric == f"frechet {figure.value:.3f} (test, pixels)"
    assert card.metrics["test"]["per_class"].keys() == set(card.labels)


def test_the_same_again_finds_it(mill):
    again = train(mill, settings(), on_epoch=lambda row: pytest.fail("nothing is to be trained"))
    assert not again.new
    other = train(mill, settings(judge="judge", epochs=1))  # which epoch is kept depends on who judges
    assert other.new
    assert registry.resolve(mill, other.model).training["judge"].startswith("judge@")


def test_evaluations_of_two_judges_are_both_kept(mill, caplog):
    caplog.set_level(logging.INFO, "pixelmill")
    card = next(card for card in registry.list_models(mill, "colours") if card.training["judge"] == "pixels")
    asked = EvaluateSettings(model=card.reference, dataset="colours")
    assert evaluate(mill, asked).metrics == card.metrics["test"]  # the judge of its training, found in its card
    by_judge = asked.model_copy(update={"judge": "judge"})
    first = evaluate(mill, by_judge).metrics
    assert first["judge"] == registry.resolve(mill, "judge").reference
    assert first["frechet"] != card.metrics["test"]["frechet"]
    assert evaluate(mill, by_judge).metrics == first
    assert "by judge@" in caplog.messages[-1]
    assert 0 <= first["accuracy"] <= 1
    assert first["made"] == 100
    assert "mostly noise" in caplog.text  # 8 images to compare with
    kept = list(Path(registry.version_folder(mill, card), "evaluations").iterdir())
    assert [path.name.endswith(f"test-by-{first['judge']}.json") for path in kept] == [True]


@pytest.mark.parametrize("model", ["dcgan", "wgan_gp"])
def test_images_without_labels_are_enough(mill, model):
    trained = train(mill, settings(dataset="plain", model=model, name=model, epochs=1))
    card = registry.resolve(mill, trained.model)
    assert card.labels == ()
    assert "accuracy" not in card.metrics["test"]
    assert evaluate(mill, EvaluateSettings(model=model, dataset="colours", judge="pixels")).metrics["frechet"] > 0


def test_learning_on_from_another_generator(mill):
    before = registry.resolve(mill, "colours")
    old = load_model(mill, before)
    frozen = train(mill, settings(name="on", weights=before.reference, mode="features", epochs=1, export=False))
    card = registry.resolve(mill, frozen.model)
    assert card.training["settings"]["mode"] == "features"
    assert card.source.startswith(before.reference)
    new = load_model(mill, card)
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert {name for name in old if name.startswith(("discriminator.blocks.0.", "discriminator.blocks.1."))} <= same
    assert "generator.layers.0.weight" not in same
    usual = train(mill, settings(name="on", weights=before.reference, epochs=1, export=False))
    whole = load_model(mill, registry.resolve(mill, usual.model))
    assert registry.resolve(mill, usual.model).training["settings"]["mode"] == "finetune"
    moved = [name for name in old if name.startswith("discriminator.blocks.0.") and "original" in name]
    assert not any(torch.equal(old[name], whole[name]) for name in moved)


def test_other_classes_get_new_embeddings(mill, tmp_path):
    write_files(coloured((8, 8, 8, 0), seed=3), tmp_path / "three")
    ingest(mill, IngestSettings(source=str(tmp_path / "three"), name="three", split="train=.7,val=.3"))
    trained = train(mill, settings(dataset="three", name="three", weights="colours", epochs=1, export=False))
    assert registry.resolve(mill, trained.model).labels == ("class0", "class1", "class2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"dataset": "plain"}, "learns from images with one label each, and those of plain", id="no labels"
        ),
        pytest.param({"mode": "features"}, "add --weights MODEL", id="nothing to freeze"),
        pytest.param({"mode": "scratch", "weights": "colours"}, "scratch starts from random weights", id="scratch"),
        pytest.param({"weights": "judge"}, "whose weights do not fit conditional_gan", id="another architecture"),
        pytest.param({"weights": "colours", "image_size": 64}, "built for images of 32 pixels", id="another size"),
        pytest.param({"image_size": 48}, "32, 64 or 128 pixels, got --image-size 48", id="no such size"),
        pytest.param({"judge": "nobody"}, "--judge nobody is none: expected a classifier of the store", id="no judge"),
        pytest.param({"judge": "colours"}, "only a classifier can judge", id="a generator as judge"),
        pytest.param({"weights": "imagenet"}, "nothing that conditional_gan can start from", id="imagenet"),
    ],
)
def test_what_cannot_be_is_one_line(mill, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        train(mill, settings(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"table": "rows"}, "makes images, so that there are no predictions", id="table"),
        pytest.param({"model": "judge", "judge": "pixels"}, "was trained without an export", id="not exported"),
        pytest.param({"engine": "openvino"}, "--engine openvino has no meaning", id="engine"),
        pytest.param({"judge": "nobody"}, "--judge nobody is none", id="no judge"),
        pytest.param({"dataset": "plain"}, "shows none of the classes", id="no labels"),
    ],
)
def test_what_cannot_be_measured_is_one_line(mill, changes, message):
    with pytest.raises((UsageError, ModelError), match=message):
        evaluate(mill, EvaluateSettings(**{"model": "colours", "dataset": "colours", "judge": "pixels"} | changes))


def test_the_smaller_distance_is_promoted(mill):
    cards = [card for card in registry.list_models(mill, "colours") if card.training["judge"] == "pixels"]
    dataset = datasets.resolve(mill, "colours")
    better = cards[0]
    measured = better.metrics["test"] | {"frechet": better.metrics["test"]["frechet"] + 1}
    worse = replace(better, metrics=better.metrics | {"test": measured}, score=0.5).with_version()
    worse = registry.publish(mill, worse, {ONNX_FILE: registry.fetch_model(mill, better)})
    promote(mill, worse.reference)
    assert promote_if_better(mill, better, dataset).promoted
    assert not promote_if_better(mill, worse, dataset).promoted


def test_without_imagenets_weights_pixels_judge(monkeypatch, caplog, tmp_path):
    def unreachable(*_):
        raise ModelError("cannot download it")

    monkeypatch.setattr(judges, "weights_file", lambda: None)
    monkeypatch.setattr(judges, "load_pretrained", unreachable)
    assert judge(None, str(tmp_path)).name == "pixels"
    assert "by their pixels alone: cannot download it" in caplog.text
    with pytest.raises(ModelError, match="cannot download"):
        judge("imagenet", str(tmp_path))


def test_imagenet_judges_where_its_weights_are(tmp_path):
    assert judges.weights_file() is not None, "`make` installs the package that ships MobileNetV2"
    found = judge(None, str(tmp_path))
    assert found.name == "imagenet"
    seen = found.look(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    assert seen.features.shape == (3, 1280)
    assert np.isfinite(seen.features).all()
    assert (seen.classes == -1).all()


def test_after_a_kill_the_same_model_with_all_its_grids(mill, tmp_path):
    """A process that is killed in its third epoch; the run that goes on publishes what a whole run would have."""
    options = {"dataset": "plain", "model": "dcgan", "name": "killed", "epochs": 3, "export": False}
    code = (
        "import os, signal, torch\n"
        "torch.set_num_threads(1)\n"
        "from models.settings.train import TrainSettings\n"
        "from tasks.train import train\n"
        "def hear(row):\n"
        "    if row['epoch'] == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train({mill!r}, TrainSettings(**{settings(**options).model_dump()!r}), on_epoch=hear)\n"
    )
    environment = os.environ | {FOLDER_VARIABLE: str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(tmp_path))
        rows: list[dict] = []
        resumed = train(mill, settings(**options), on_epoch=rows.append)
        assert [row["epoch"] for row in rows] == [3]
    patched = registry.resolve(mill, resumed.model)
    whole = registry.resolve(mill, train(mill, settings(**options | {"name": "whole"})).model)
    assert patched.version == whole.version
    assert {name: facts["sha256"] for name, facts in patched.files.items() if name.startswith("samples")} == {
        name: facts["sha256"] for name, facts in whole.files.items() if name.startswith("samples")
    }
    assert len([name for name in whole.files if name.startswith("samples")]) == 3
