"""From a folder of images to a table of embeddings and anomalies: ingest, train, evaluate, predict, learn on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models import catalog
from models.card import Card
from models.errors import UsageError
from models.learning.metrics import main_metric
from models.nets import vae
from models.settings.export import EvaluateSettings
from models.settings.ingest import IngestSettings
from models.settings.predict import PredictSettings
from models.settings.train import TrainSettings
from tasks import predict, registry
from tasks.datasets.ingest import ingest
from tasks.evaluate import evaluate
from tasks.photographs import encode_png
from tasks.promote import promote_if_better
from tasks.query import ask
from tasks.train import FOLDER_VARIABLE, train
from tasks.weights import apply_state, load_model
from tests.tiny_generative import LATENT, SIDE, images_of

# Colours 0 and 1 are learnt; among the test images there are two of colour 2, which nobody has shown to the model.
SPLITS = {"train": {"red": (0, 16), "green": (1, 16)}, "val": {"red": (0, 2), "green": (1, 2)}}
SPLITS |= {"test": {"red": (0, 4), "green": (1, 4), "blue": (2, 4)}}


def settings(**changes) -> TrainSettings:
    """A training of seconds on one thread."""
    usual = {
        "dataset": "colours",
        "model": "vae",
        "name": "colours",
        "image_size": SIDE,
        "latent_size": LATENT,
        "epochs": 25,
        "batch_size": 4,
        "precision": "fp32",
    }
    return TrainSettings(**usual | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[tuple[str, Path, Card]]:
    """A store with an autoencoder of two colours, the folder of its images, and its card."""
    home = tmp_path_factory.mktemp("vae")
    store, source = str(home / "mill"), home / "colours"
    for seed, (split, classes) in enumerate(SPLITS.items()):
        for label, (colour, count) in classes.items():
            for number, image in enumerate(images_of([colour], count, seed=seed)):
                path = source / split / label / f"{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(image))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(home / "unfinished"))
        patch.setattr(vae, "WIDTH", 8)
        patch.setattr(vae, "COMPONENTS", 32)
        ingest(store, IngestSettings(source=str(source), name="colours"))
        yield store, source, registry.resolve(store, train(store, settings()).model)
    torch.set_num_threads(threads)


def test_the_card_says_what_was_learnt(trained):
    _, _, card = trained
    assert (card.labels, card.latent_size, card.training["settings"]["mode"]) == ((), LATENT, "scratch")
    assert card.training["classes"] == ["green", "red"]
    assert card.parity["agrees"]
    assert set(card.training["validation"]) == {"elbo", "reconstruction", "kl", "mse", "active_units"}


def test_the_strange_colour_is_found(trained):
    store, _, card = trained
    test, val = card.metrics["test"], card.metrics["val"]
    assert (test["images"], test["not_ok"], test["unknown_classes"]) == (12, 0, ["blue"])
    assert test["auroc"] == test["per_class"]["blue"]["auroc"] == 1.0
    assert test["per_class"]["red"]["auroc"] is None
    assert (val["auroc"], val["unknown_classes"]) == (None, [])
    figure = main_metric(card)
    assert (figure.name, figure.split, figure.value) == ("elbo", "test", test["elbo"])
    again = evaluate(store, EvaluateSettings(model="colours", dataset="colours", split="test")).metrics
    assert again == test
    train = evaluate(store, EvaluateSettings(model="colours", dataset="colours", split="train")).metrics
    assert train["mse"] < test["mse"]


def test_what_comes_back_through_both_files_is_what_the_loop_measured(trained):
    _, _, card = trained
    assert {"model.onnx", "decoder.onnx"} <= set(card.files)
    assert card.parity["decoder"]["agrees"]
    assert card.metrics["val"]["mse"] == pytest.approx(card.training["validation"]["mse"], rel=0.02)


def test_the_aggregate_posterior_raises_the_bound(trained):
    _, _, card = trained
    assert card.metrics["val"]["elbo"] > card.training["validation"]["elbo"]


def test_predictions_are_what_pytorch_says(trained):
    store, source, card = trained
    asked = PredictSettings(source=str(source / "test"), model="colours", table="found", engine="onnxruntime")
    planned = predict.plan(store, asked)
    summary = predict.summarise(store, asked, planned, [predict.work(store, asked, planned)], 1.0)
    assert summary.by_status == {"ok": 12}
    entry = catalog.entry("vae")
    network = entry.build(0, SIDE, card.latent_size)
    apply_state(network, load_model(store, card), vae.IGNORED_PREFIXES, "vae")
    images = np.concatenate([images_of([colour], 4, seed=2) for colour in (2, 1, 0)])  # blue, green, red
    with torch.no_grad():
        expected = vae.reference(network.eval(), card)(torch.from_numpy(images))
    rows = ask(store, "select embedding, anomaly from found order by image").rows
    np.testing.assert_allclose([row[0] for row in rows], expected["embedding"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose([row[1] for row in rows], expected["anomaly"], rtol=1e-3, atol=1e-5)


def test_the_same_again_finds_it(trained):
    store, _, card = trained
    again = train(store, settings())
    assert (again.model, again.new) == (card.reference, False)


@pytest.mark.parametrize("mode", ["finetune", "features"])
def test_it_learns_on_from_a_model_of_the_store(trained, mode):
    store, _, card = trained
    model = train(
        store, settings(name=mode, weights="colours", mode=mode, latent_size=None, epochs=1, lr=1e-3, export=False)
    ).model
    later = registry.resolve(store, model)
    assert later.latent_size == LATENT
    before, after = load_model(store, card), load_model(store, later)
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert ("encoder" in changed) == (mode == "finetune")
    assert "decoder" in changed
    # It begins where the other one ended: one epoch from scratch is worse.
    assert later.training["validation"]["mse"] < 2 * card.training["validation"]["mse"]


def test_another_latent_size_begins_anew_behind_the_encoder(trained):
    store, _, _ = trained
    model = train(store, settings(name="wider", weights="colours", latent_size=6, epochs=1, export=False)).model
    assert registry.resolve(store, model).latent_size == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"image_size": 32}, "colours@.* is built for images of 16 pixels", id="another size"),
        pytest.param({"weights": "imagenet"}, "--weights imagenet is nothing that vae can start from", id="imagenet"),
        pytest.param({"target": "colours"}, "--target means nothing to models that embed", id="target"),
        pytest.param({"judge": "pixels", "weights": None}, "--judge means nothing", id="judge"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(trained, changes, said):
    store, _, _ = trained
    with pytest.raises(UsageError, match=said) as caught:
        train(store, settings(**{"name": "refused", "weights": "colours", **changes}))
    assert "\n" not in str(caught.value)


def test_a_better_bound_is_promoted(trained):
    store, _, card = trained
    assert promote_if_better(store, card, _dataset(store)).promoted
    worse = train(store, settings(epochs=1, seed=1)).model
    promotion = promote_if_better(store, registry.resolve(store, worse), _dataset(store))
    assert (promotion.promoted, promotion.metric) == (False, "elbo")
    assert promotion.candidate < promotion.current


def _dataset(store: str):
    from tasks.datasets import datasets

    return datasets.resolve(store, "colours")
