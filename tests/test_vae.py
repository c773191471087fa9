"""Variational autoencoders: the bound and its terms, how they learn, what is strange to them, and their export."""

import logging
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from models import catalog
from models.errors import UsageError
from models.learning.embedding_metrics import auroc, measure, per_class
from models.learning.fit import Place, fit
from models.learning.learner import Finishing, HeadLearner, Sampler, Scheduled, Watcher
from models.learning.recipe import resolve
from models.nets import vae
from models.nets.untrained import build_untrained
from models.progress import Step
from models.runtime.engine import OnnxRuntimeEngine
from models.runtime.export import export_onnx
from models.runtime.parity import check_parity
from models.settings.train import Training
from tasks.photographs import prepared_photographs
from tests.tiny_generative import (
    LATENT,
    SIDE,
    Interrupted,
    card_of,
    curves,
    equal,
    images_of,
    learner_of,
    recipe_of,
    rule_of,
    samples_of,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(vae, "WIDTH", 8)
    monkeypatch.setattr(vae, "COMPONENTS", 32)


def network_of(side: int = SIDE, latent_size: int = LATENT) -> vae.Vae:
    return build_untrained(lambda: vae.build("vae", 0, side, latent_size))


# The network


@pytest.mark.parametrize(("side", "last"), [(16, 4), (32, 4), (48, 6), (64, 4), (80, 5), (112, 7), (128, 4)])
def test_what_is_decoded_has_the_size_of_what_is_encoded(side, last):
    network = network_of(side)
    images = torch.rand(2, 3, side, side)
    mean, terms = network(images, "gaussian")
    assert mean.shape == (2, LATENT)
    assert network.encoder(images).shape[2:] == (last, last)
    assert network.decoder(mean).shape == images.shape
    assert [tuple(term.shape) for term in terms] == [(2,), (2, LATENT), (2,)]


@pytest.mark.parametrize("observation", ["gaussian", "bernoulli"])
def test_the_terms_are_those_of_the_equations(observation):
    network = network_of()
    with torch.no_grad():
        network.likelihood.log_scale.fill_(-0.7)
    images, noise = torch.rand(3, 3, SIDE, SIDE), torch.randn(3, LATENT)
    mean, log_variance = network.encode(images)
    _, terms = network(images, observation, noise)
    drawn = mean + (log_variance / 2).exp() * noise
    logits = network.decoder(drawn)
    if observation == "gaussian":
        density = Normal(logits.sigmoid(), math.exp(-0.7))
    else:
        density = Bernoulli(logits=logits, validate_args=False)
    posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(3, LATENT), torch.ones(3, LATENT))
    torch.testing.assert_close(terms.reconstruction, -density.log_prob(images).sum(dim=(1, 2, 3)), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(terms.divergence, kl_divergence(posterior, prior))
    torch.testing.assert_close(terms.squared_error, (logits.sigmoid() - images).square().mean(dim=(1, 2, 3)))


def test_gradients_reach_mean_and_variance_through_what_is_drawn():
    network = network_of()
    _, terms = network(torch.rand(2, 3, SIDE, SIDE), "gaussian", torch.ones(2, LATENT))
    terms.reconstruction.sum().backward()
    of_mean, of_variance = network.posterior.project.weight.grad.chunk(2)
    assert of_mean.abs().max() > 0
    assert of_variance.abs().max() > 0


@pytest.mark.parametrize("count", [1, 3, 32])
def test_the_aggregate_posterior_is_the_mixture_of_what_it_was_filled_with(count):
    aggregate = vae.Aggregate(LATENT)
    latent = torch.randn(5, LATENT)
    torch.testing.assert_close(aggregate(latent), torch.zeros(5), atol=1e-5, rtol=0)  # N(0, I) as yet
    means, log_variances = torch.randn(count, LATENT), torch.randn(count, LATENT)
    aggregate.fill(torch.randn(32, LATENT), torch.randn(32, LATENT))  # what was there before is gone
    aggregate.fill(means, log_variances)
    kinds = Independent(Normal(means, (log_variances / 2).exp()), 1)
    mixture = MixtureSameFamily(Categorical(torch.full((count,), 1 / count)), kinds)
    prior = Normal(torch.zeros(LATENT), torch.ones(LATENT)).log_prob(latent).sum(dim=1)
    torch.testing.assert_close(aggregate(latent), mixture.log_prob(latent) - prior, rtol=1e-4, atol=1e-4)


# Learning


@pytest.mark.parametrize(
    ("done", "warmup", "share"),
    [
        pytest.param(0.0, 0.5, 0.0, id="begins with nothing"),
        pytest.param(0.25, 0.5, 0.5, id="half way"),
        pytest.param(0.5, 0.5, 1.0, id="in full"),
        pytest.param(0.9, 0.5, 1.0, id="and stays so"),
        pytest.param(0.0, 0.0, 1.0, id="no warm-up"),
    ],
)
def test_kl_is_let_in_slowly(done, warmup, share):
    learner = learner_of("vae", recipe_of(kl_warmup=warmup, beta=3.0))
    images = torch.from_numpy(images_of([0, 1], 2))
    learner.at(done)
    found = learner.losses(images, None)["kl"].detach()
    scaled = images.permute(0, 3, 1, 2).float() / 255
    divergence = learner.network(scaled, "gaussian")[1].divergence.sum(dim=1).mean().detach()
    assert float(found) == pytest.approx(share * 3.0 * float(divergence) / (SIDE * SIDE * 3), abs=1e-9)


@pytest.mark.parametrize("observation", ["gaussian", "bernoulli"])
def test_a_few_epochs_raise_the_bound(observation):
    images = images_of([0, 1, 2], 8)
    recipe = recipe_of(epochs=30, batch_size=4, observation=observation)
    learner, samples = learner_of("vae", recipe), samples_of(images, "vae")
    fitted = fit(learner, samples, samples, recipe)
    first, last = fitted.history[0], fitted.history[-1]
    assert learner.network.likelihood.observation == observation
    assert last["train_reconstruction"] < first["train_reconstruction"]
    assert last["val_elbo"] > first["val_elbo"]
    assert last["val_mse"] < first["val_mse"] / 2
    assert 1 <= last["val_active_units"] <= LATENT
    assert last["val_elbo"] == pytest.approx(-last["val_reconstruction"] - last["val_kl"] / images[0].size)


def test_the_learner_is_what_the_loop_asks_for():
    learner = learner_of("vae", recipe_of())
    assert all(isinstance(learner, kind) for kind in (Scheduled, Finishing, Sampler, Watcher))
    assert not isinstance(learner, HeadLearner)


def test_what_was_interrupted_ends_as_if_it_had_not_been(tmp_path):
    train, val = samples_of(images_of([0, 1], 12), "vae"), samples_of(images_of([0, 1], 2, seed=1), "vae")
    recipe = recipe_of(kl_warmup=0.9)
    undisturbed = learner_of("vae", recipe)
    expected = fit(undisturbed, train, val, recipe)

    def fall(step: Step) -> None:
        if step.stage == "epoch 3 of 4" and step.done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(learner_of("vae", recipe), train, val, recipe, Place(folder=tmp_path), fall)
    resumed = learner_of("vae", recipe)
    fitted = fit(resumed, train, val, recipe, Place(folder=tmp_path, threads=3))
    assert fitted.resumed_after == 2
    assert curves(fitted) == curves(expected)
    assert equal(weights(resumed), weights(undisturbed))
    weight = [row["train_kl"] / row["val_kl"] for row in expected.history]
    assert weight == sorted(weight)  # it was still growing when the training fell


def test_the_same_seed_gives_the_same_weights():
    samples = samples_of(images_of([0, 1], 6), "vae", augment="light")
    found = []
    for place, seed in ((Place(threads=1), 0), (Place(threads=4, memory_bytes=0), 0), (Place(), 1)):
        learner = learner_of("vae", recipe_of(epochs=2), seed=seed)
        fit(learner, samples, samples, recipe_of(epochs=2, seed=seed), place)
        found.append(weights(learner))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_posterior_collapse_is_said(caplog):
    samples = samples_of(images_of([0, 1], 6), "vae")
    recipe = recipe_of(epochs=12, batch_size=4, beta=1e5, kl_warmup=0.0)
    with caplog.at_level(logging.WARNING, "pixelmill.train"):
        fitted = fit(learner_of("vae", recipe), samples, samples, recipe)
    assert fitted.history[-1]["val_active_units"] == 0
    assert fitted.history[-1]["val_kl"] < 0.1
    assert "posterior collapse" in caplog.text
    assert "--beta" in caplog.text


def test_numbers_that_carry_nothing_are_counted_once_at_the_end(caplog):
    samples = samples_of(images_of([0, 1], 12), "vae")
    recipe = recipe_of(epochs=6, kl_warmup=0.0)
    with caplog.at_level(logging.WARNING, "pixelmill.train"):
        fitted = fit(learner_of("vae", recipe, latent_size=16), samples, samples, recipe)
    active = int(fitted.history[-1]["val_active_units"])
    assert 1 <= active < 16
    said = [record.message for record in caplog.records if "carry nothing" in record.message]
    assert len(said) == 1
    assert f"{16 - active} of the 16 numbers" in said[0]
    assert f"--latent-size {active}" in said[0]


def test_features_leave_the_encoder_as_it_is():
    samples = samples_of(images_of([0, 1], 6), "vae")
    learner = learner_of("vae", recipe_of(mode="features"))
    before = weights(learner)
    fit(learner, samples, samples, recipe_of(mode="features"))
    changed = {
        name.partition(".")[0] for name, value in weights(learner).items() if not torch.equal(value, before[name])
    }
    assert changed == {"posterior", "decoder", "likelihood", "aggregate"}


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(images_of([0], 1), id="one image"),
        pytest.param(images_of([0], 6), id="one kind"),
        pytest.param(np.full((6, SIDE, SIDE, 3), 128, np.uint8), id="all grey and all the same"),
        pytest.param(images_of([0, 1], 3)[..., :1].repeat(3, axis=3), id="without colours"),
    ],
)
def test_odd_images_teach_something_finite(images):
    samples = samples_of(images, "vae")
    learner = learner_of("vae", recipe_of())
    fitted = fit(learner, samples, samples, recipe_of())
    assert all(math.isfinite(value) for row in fitted.history for value in row.values())
    assert all(torch.isfinite(value).all() for value in weights(learner).values())


def test_a_grid_shows_images_over_what_comes_back():
    images = images_of([0, 1], 3)
    samples = samples_of(images, "vae")
    shown: list[np.ndarray] = []
    fit(
        learner_of("vae", recipe_of(epochs=2)),
        samples,
        samples,
        recipe_of(epochs=2),
        on_samples=lambda epoch, grid: shown.append(grid),
    )
    assert [grid.shape for grid in shown] == [(16, SIDE, SIDE, 3)] * 2
    assert all(np.array_equal(grid[:8], images[[0, 1, 2, 3, 4, 5, 0, 1]]) for grid in shown)
    assert not np.array_equal(shown[0][8:], shown[1][8:])


# What is strange


def test_colours_that_were_not_learnt_are_strange():
    samples = samples_of(images_of([0, 1], 16), "vae")
    recipe = recipe_of(epochs=30, batch_size=4)
    learner = learner_of("vae", recipe)
    fit(learner, samples, samples, recipe)
    network = learner.network.eval()
    assert int((network.aggregate.log_weights > -100).sum()) == 32
    graph = vae.graph(network, card_of("vae"))
    with torch.no_grad():
        _, usual = graph(torch.from_numpy(images_of([0, 1], 8, seed=1)))
        _, strange = graph(torch.from_numpy(images_of([2, 3], 8, seed=1)))
    assert usual.max() < strange.min()


def _tables(found: list[tuple[str | None, float | None]]) -> tuple[pa.Table, pa.Table]:
    """Rows of predicted images and of a data set, from their labels and anomalies; None: not predicted."""
    names = [f"{number}.png" for number in range(len(found))]
    labels, anomalies = zip(*found, strict=True) if found else ((), ())
    statuses = ["ok" if anomaly is not None else "corrupt" for anomaly in anomalies]
    rows = {"image": names, "status": statuses, "anomaly": pa.array(anomalies, pa.float32())}
    return pa.table(rows), pa.table({"image": names, "label": pa.array(labels, pa.string())})


@pytest.mark.parametrize(
    ("found", "known", "expected"),
    [
        pytest.param([], ("a",), {"images": 0, "elbo": None, "auroc": None, "per_class": {}}, id="no images"),
        pytest.param([(None, 2.0), (None, 4.0)], (), {"elbo": -3.0, "auroc": None, "per_class": {}}, id="no labels"),
        pytest.param([("a", 1.0), ("b", 9.0)], (), {"elbo": -5.0, "auroc": None}, id="learnt without labels"),
        pytest.param([("a", 1.0), ("b", 9.0)], ("a", "b"), {"elbo": -5.0, "auroc": None}, id="nothing strange"),
        pytest.param([("b", 1.0), ("b", 9.0)], ("a",), {"elbo": None, "auroc": None}, id="nothing else"),
        pytest.param(
            [("a", 1.0), ("a", 3.0), ("b", 2.0), ("b", 4.0)],
            ("a",),
            {"elbo": -2.0, "auroc": 0.75, "unknown_classes": ["b"], "not_ok": 0},
            id="three of four pairs",
        ),
        pytest.param([("a", 1.0), ("b", 1.0)], ("a",), {"auroc": 0.5}, id="a tie"),
        pytest.param(
            [("a", 1.0), ("a", None), ("b", 0.5), ("c", 2.0)],
            ("a",),
            {"images": 4, "not_ok": 1, "elbo": -1.0, "auroc": 0.5, "unknown_classes": ["b", "c"]},
            id="not predicted",
        ),
    ],
)
def test_what_is_measured(found, known, expected):
    rows, images = _tables(found)
    classes = sorted({label for label, _ in found if label})
    figures = measure(rows, images, pa.table({}), known, classes, None, False, 0.25)
    assert {name: figures[name] for name in expected} == expected


def test_figures_by_class():
    rows, images = _tables([("a", 1.0), ("a", 3.0), ("b", 0.0), ("c", 4.0)])
    figures = measure(rows, images, pa.table({}), ("a",), ["a", "b", "c", "d"], None, False, 0.25)
    assert figures["per_class"] == {
        "a": {"images": 2, "anomaly": 2.0, "is_strange": False, "auroc": None},
        "b": {"images": 1, "anomaly": 0.0, "is_strange": True, "auroc": 0.0},
        "c": {"images": 1, "anomaly": 4.0, "is_strange": True, "auroc": 1.0},
    }
    assert per_class(figures) == {"a": -2.0, "b": -0.0, "c": -4.0}
    assert figures["anomaly"]["p50"] == 2.0


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_under_the_curve(seed):
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(seed)
    usual, strange = random.integers(0, 9, 40) / 1.0, random.integers(3, 12, 25) / 1.0
    truth = np.r_[np.zeros(40), np.ones(25)]
    assert auroc(usual, strange) == pytest.approx(roc_auc_score(truth, np.r_[usual, strange]))


# Export


@pytest.mark.parametrize("observation", ["gaussian", "bernoulli"])
def test_the_encoder_is_exported(observation, tmp_path):
    card, network = card_of("vae"), network_of()
    images, _ = prepared_photographs(rule_of("vae"), 5)
    vae.wake(network, card, images)
    network.likelihood.assume(observation, beta=2.0)
    network.aggregate.fill(torch.randn(7, LATENT), torch.randn(7, LATENT))
    path = tmp_path / "model.onnx"
    export_onnx(vae.graph(network, card), card, path, images[:2])
    record = check_parity(network, vae, card, path, images)
    assert record["agrees"]
    assert record["compared"] == 5
    found = OnnxRuntimeEngine(path, card, concurrency=1).run(images)
    assert found["embedding"].shape == (5, LATENT)
    assert found["anomaly"].shape == (5,)
    np.testing.assert_allclose(found["embedding"].std(axis=0, ddof=1), 1, rtol=1e-3)  # awake


@pytest.mark.parametrize("log_scale", [-20.0, 20.0])
def test_a_deviation_that_runs_away_is_held_everywhere(log_scale):
    network = network_of()
    network.likelihood.log_scale.data.fill_(log_scale)
    images = torch.from_numpy(images_of([0, 1], 2))
    with torch.no_grad():
        _, anomaly = vae.graph(network, card_of("vae"))(images)
        expected = vae.reference(network, card_of("vae"))(images)["anomaly"]
    assert torch.isfinite(anomaly).all()
    torch.testing.assert_close(anomaly, expected, rtol=1e-4, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"model": "vae", "mosaic": True}, "--mosaic means nothing to models that embed", id="mosaic"),
        pytest.param({"model": "vae", "label_smoothing": 0.1}, "--label-smoothing means nothing", id="smoothing"),
        pytest.param({"model": "vae", "cycle_weight": 1.0}, "--cycle-weight means nothing", id="cycles"),
        pytest.param({"model": "resnet18", "beta": 2.0}, "--beta means nothing to models that classify", id="beta"),
        pytest.param({"model": "unet", "latent_size": 8}, "--latent-size means nothing", id="latent"),
        pytest.param({"model": "resnet18", "observation": "gaussian"}, "--observation means nothing", id="observation"),
        pytest.param({"model": "resnet18", "kl_warmup": 0.5}, "--kl-warmup means nothing", id="warm-up"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        resolve(Training(**settings))


def test_sides_are_multiples_of_16():
    with pytest.raises(UsageError, match=r"multiples of 16 pixels, got --image-size 40: use 32 or 48"):
        catalog.input_rule("vae", None, 40)
    assert catalog.input_rule("vae", None, 48).short_side == 48


@pytest.mark.parametrize(("weights_named", "mode"), [(None, "scratch"), ("none", "scratch"), ("faces", "finetune")])
def test_without_weights_it_is_trained_from_scratch(weights_named, mode):
    assert resolve(Training(model="vae", weights=weights_named)).mode == mode
