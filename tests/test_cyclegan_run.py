"""From two folders of images to a model that turns those of the one into the other's: train, evaluate, learn on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.card import Card
from models.errors import UsageError
from models.learning.metrics import main_metric
from models.nets import cyclegan
from models.nets.cyclegan import Size
from models.settings.export import EvaluateSettings
from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks import registry
from tasks.datasets import datasets
from tasks.datasets.ingest import ingest
from tasks.evaluate import evaluate
from tasks.photographs import encode_png
from tasks.promote import promote_if_better
from tasks.train import FOLDER_VARIABLE, train
from tasks.weights import load_model
from tests.tiny_generative import SIDE, images_of

COUNTS = {"train": 8, "val": 3, "test": 3}


def settings(**changes) -> TrainSettings:
    """A training of seconds on one thread."""
    usual = {
        "dataset": "red",
        "target": "blue",
        "model": "cyclegan",
        "name": "bluer",
        "image_size": SIDE,
        "epochs": 16,
        "lr": 2e-3,
        "identity_weight": 0.1,
        "augment": "none",
        "judge": "pixels",
        "precision": "fp32",
    }
    return TrainSettings(**usual | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[tuple[str, Path, Card]]:
    """A store with a translator from red to blue, the folder of both kinds of images, and its card."""
    home = tmp_path_factory.mktemp("cyclegan")
    store = str(home / "mill")
    for name, colour in (("red", 0), ("blue", 2)):
        for seed, (split, count) in enumerate(COUNTS.items()):
            for number, image in enumerate(images_of([colour], count, seed=seed)):
                path = home / name / split / name / f"{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(image))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(home / "unfinished"))
        patch.setattr(cyclegan, "SIZES", {16: Size(blocks=1, width=8, patch_layers=1)})
        for name in ("red", "blue"):
            ingest(store, IngestSettings(source=str(home / name), name=name))
        yield store, home, registry.resolve(store, train(store, settings()).model)
    torch.set_num_threads(threads)


def test_the_card_says_what_was_learnt_from_what(trained):
    store, _, card = trained
    target = datasets.resolve(store, "blue")
    assert card.training["target"] == {"dataset": target.reference, "images": {"train": 8, "val": 3}}
    assert (card.labels, card.latent_size, card.training["judge"]) == ((), 0, "pixels")
    assert {name.partition(".")[0] for name in load_model(store, card)} == {"a_to_b", "b_to_a"}
    assert card.parity["agrees"]


def test_what_is_made_looks_like_the_target(trained):
    store, _, card = trained
    test = card.metrics["test"]
    assert test["frechet"] < test["frechet_before"] / 2
    assert (test["images"], test["target_images"], test["judge"]) == (3, 3, "pixels")
    figure = main_metric(card)
    assert (figure.name, figure.value) == ("frechet", test["frechet"])
    again = evaluate(store, EvaluateSettings(model="bluer", dataset="red", split="test")).metrics
    assert again == test
    assert evaluate(store, EvaluateSettings(model="bluer", dataset="red", split="train")).metrics["images"] == 8


def test_every_epoch_has_a_grid(trained):
    _, _, card = trained
    grids = sorted(name for name in card.files if name.startswith("samples/"))
    assert len(grids) == 16


def test_the_same_again_finds_it(trained):
    store, _, card = trained
    again = train(store, settings())
    assert (again.model, again.new) == (card.reference, False)


def test_it_learns_on_from_a_model_of_the_store(trained):
    store, _, card = trained
    model = train(store, settings(name="later", weights="bluer", epochs=1, lr=1e-4, export=False)).model
    later = registry.resolve(store, model)
    assert later.training["settings"]["mode"] == "finetune"
    before, after = (load_model(store, found)["a_to_b.1.weight"] for found in (card, later))
    assert 0 < (before - after).abs().max() < 0.01


def test_a_smaller_distance_is_promoted(trained):
    store, _, card = trained
    dataset = datasets.resolve(store, "red")
    assert promote_if_better(store, card, dataset).promoted
    worse = registry.resolve(store, train(store, settings(epochs=1, seed=1)).model)
    promotion = promote_if_better(store, worse, dataset)
    assert (promotion.promoted, promotion.metric) == (False, "frechet")
    assert promotion.candidate > promotion.current


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"target": None}, "say which with --target NAME", id="no target"),
        pytest.param({"target": "red"}, "--target red is the data set itself", id="itself"),
        pytest.param({"target": "green"}, "green", id="unknown target"),
        pytest.param({"image_size": 30}, "multiples of 4 pixels, got --image-size 30: use 28 or 32", id="odd size"),
        pytest.param(
            {"model": "resnet18", "judge": None, "identity_weight": None}, "--target means nothing", id="other"
        ),
        pytest.param(
            {"weights": "imagenet"}, "--weights imagenet is nothing that cyclegan can start from", id="weights"
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(trained, changes, said):
    store, _, _ = trained
    with pytest.raises(UsageError, match=said) as caught:
        train(store, settings(**{"name": "refused", **changes}))
    assert "\n" not in str(caught.value)


def test_numbers_stay_finite_through_the_store(trained):
    store, _, card = trained
    assert all(np.isfinite(value.numpy()).all() for value in load_model(store, card).values())
