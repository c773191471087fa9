"""From pairs of images and masks to a table of segments: ingest, train, export, evaluate, predict."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models import catalog
from models.card import Card
from models.errors import ModelError
from models.imaging import masks
from models.learning.metrics import main_metric
from models.nets import unet
from models.settings.export import EvaluateSettings, ExportSettings
from models.settings.ingest import IngestSettings
from models.settings.predict import PredictSettings
from models.settings.train import TrainSettings
from tasks import predict, registry
from tasks.datasets.ingest import ingest
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.query import ask
from tasks.train import FOLDER_VARIABLE, train
from tasks.weights import apply_state, load_model
from tests.tiny_segmentation import scenes, write_pairs

SIDE = 48
COUNTS = {"train": 16, "val": 4, "test": 4}


def settings(**changes) -> TrainSettings:
    """A training of seconds on one thread."""
    usual = {
        "dataset": "scenes",
        "model": "unet",
        "name": "scenes",
        "mode": "scratch",
        "image_size": SIDE,
        "epochs": 20,
        "batch_size": 4,
        "lr": 3e-3,
        "precision": "fp32",
    }
    return TrainSettings(**usual | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[tuple[str, Path, Card]]:
    """A store with a narrow U-Net that has learned discs and squares, the folder of its images, and its card."""
    home = tmp_path_factory.mktemp("segmentation")
    store, source = str(home / "mill"), home / "scenes"
    for number, (split, count) in enumerate(COUNTS.items()):
        write_pairs(source, *scenes(count, SIDE, seed=number), split)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(home / "unfinished"))
        patch.setattr(unet, "WIDTH", 8)
        summary = ingest(store, IngestSettings(source=str(source), name="scenes"))
        assert summary.splits == COUNTS
        yield store, source, registry.resolve(store, train(store, settings()).model)
    torch.set_num_threads(threads)


def test_the_loop_and_the_bulk_path_measure_the_same(trained):
    """The images have the size of the input, so that both judge the same pixels."""
    _, _, card = trained
    assert card.labels == ("1", "2")
    assert card.parity["agrees"]
    val = card.metrics["val"]
    assert val["miou"] == pytest.approx(card.training["validation"]["miou"], abs=1e-3)
    assert val["pixel_accuracy"] == pytest.approx(card.training["validation"]["pixel_accuracy"], abs=1e-3)
    figure = main_metric(card)
    assert (figure.name, figure.split) == ("miou", "test")
    assert figure.value > 0.8
    assert val["boundary_f1"] > 0.8


def test_evaluate_measures_any_split(trained):
    store, _, card = trained
    figures = evaluate(store, EvaluateSettings(model="scenes", dataset="scenes", split="train")).metrics
    assert (figures["images"], figures["not_ok"], figures["by_status"]) == (16, 0, {"ok": 16})
    assert set(figures["per_class"]) == {"(background)", "1", "2"}
    assert sum(map(sum, figures["confusion"]["counts"])) == 16 * SIDE * SIDE
    again = evaluate(store, EvaluateSettings(model="scenes", dataset="scenes", split="test")).metrics
    assert again == card.metrics["test"]


def test_predictions_are_what_pytorch_says(trained):
    store, source, card = trained
    folder = source / "images" / "test"
    asked = PredictSettings(source=str(folder), model="scenes", table="found", engine="onnxruntime")
    planned = predict.plan(store, asked)
    summary = predict.summarise(store, asked, planned, [predict.work(store, asked, planned)], 1.0)
    assert summary.by_status == {"ok": COUNTS["test"]}
    entry = catalog.entry(card.architecture)
    family = entry.family_module()
    network = family.build(entry.builder, len(card.labels))
    apply_state(network, load_model(store, card), family.IGNORED_PREFIXES, card.architecture)
    images, _ = scenes(COUNTS["test"], SIDE, seed=2)
    with torch.no_grad():
        expected = family.reference(network.eval(), card)(torch.from_numpy(images))["class_map"].numpy()
    for number, answer in enumerate(ask(store, "select segments from found order by image").rows):
        drawn = np.zeros((SIDE, SIDE), np.uint8)
        for segment in answer[0]:
            mask = masks.decode(segment["mask"], SIDE, SIDE)
            assert segment["area"] == mask.sum()
            drawn[mask] = card.labels.index(segment["label"]) + 1
        assert (drawn != expected[number]).mean() < 1e-3


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_less_exact_exports_pass_their_gate(trained, precision):
    store, _, card = trained
    exported = export(store, ExportSettings(model="scenes", precision=precision, tolerance=0.05))
    gate = exported.metrics["gate"]
    assert exported.model == f"{card.reference}.{precision}"
    assert gate["metric"] == "miou"
    assert gate["fp32"] == card.metrics["val"]["miou"]
    assert set(gate["per_class"]) == {"(background)", "1", "2"}
    if gate["fall"] > 0:
        with pytest.raises(ModelError, match="published with --tolerance"):
            export(store, ExportSettings(model="scenes", precision=precision, tolerance=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50", "unet_resnet34"])
def test_large_segmenters_are_trained_and_published(trained, name):
    store, _, _ = trained
    model = train(store, settings(model=name, name=name, epochs=10, lr=1e-3)).model
    card = registry.resolve(store, model)
    assert card.metrics["val"]["miou"] == pytest.approx(card.training["validation"]["miou"], abs=1e-3)
    assert card.metrics["val"]["miou"] > 0.5
    assert not [key for key in load_model(store, card) if key.startswith("aux_classifier.")]
