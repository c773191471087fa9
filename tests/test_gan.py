"""The three generative adversarial networks: one body for all, on images of 32 pixels."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models import catalog
from models.card import Card
from models.errors import UsageError
from models.imaging.geometry import ResizeRule
from models.learning import adversarial
from models.learning.adversarial import METHODS, AdversarialLearner
from models.learning.differentiable_augment import colours, cutout, translation, vary
from models.learning.fit import Place, fit
from models.learning.generative_metrics import UNKNOWN
from models.learning.learner import AlternatingLearner, Sampler, Watcher, lower_is_better
from models.learning.loading import Batch
from models.learning.recipe import Recipe, resolve
from models.learning.sample_grid import grid
from models.learning.samples import Samples
from models.learning.update import NonFiniteLoss
from models.nets import gan
from models.nets.untrained import build_untrained
from models.records import Task
from models.runtime.engine import OnnxRuntimeEngine
from models.runtime.latents import Latents, draw
from models.runtime.publishable import export_graphs
from models.settings.train import Training
from tasks.photographs import encode_png
from tests.tiny_learning import Files, coloured

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("dcgan", "wgan_gp", "conditional_gan")
RULE = ResizeRule("crop", 32, 32, short_side=32)
LABELS = ("class0", "class1", "class2", "class3")


def card_of(name: str, size: int = 32) -> Card:
    labels = LABELS if catalog.entry(name).is_conditional else ()
    rule = ResizeRule("crop", size, size, short_side=size)
    return Card("made", "", Task.GENERATE, name, labels, rule, latent_size=gan.LATENT_SIZE)


def recipe(name: str = "dcgan", **changes) -> Recipe:
    """Two epochs of four updates."""
    settings = Training(model=name, mode="scratch", epochs=2, batch_size=8, precision="fp32", warmup_epochs=0)
    return replace(resolve(settings), **{"augment": "none", "critic_steps": 1, **changes})


def learner(name: str, seed: int = 0, **changes) -> AdversarialLearner:
    card = card_of(name)
    network = build_untrained(lambda: catalog.entry(name).build_for_training(len(card.labels), 32), seed)
    return adversarial.learner(network, gan.parts(network, name), card, recipe(name, **changes))


def images_of(name: str, per_class: int = 8, seed: int = 0) -> Samples:
    samples = replace(coloured(per_class, seed=seed), rule=RULE)
    return samples if catalog.entry(name).is_conditional else replace(samples, targets=[UNKNOWN] * len(samples))


def batch(name: str, count: int = 16) -> Batch:
    """Images of four colours."""
    classes = torch.arange(count) % 4
    levels = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]], dtype=torch.uint8)
    pixels = levels[classes][:, None, None, :].expand(count, 32, 32, 3).contiguous()
    is_conditional = catalog.entry(name).is_conditional
    return Batch(np.arange(count), pixels, classes if is_conditional else torch.full((count,), UNKNOWN))


def state(learning: AdversarialLearner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learning.network.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def updates_of(learning: AdversarialLearner, name: str, **changes):
    made = recipe(name, **changes)
    learning.network.train()
    return learning.updater(made, torch.device("cpu"), contextlib.nullcontext, [f"{n}.png" for n in range(16)])


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_made_and_judged(name, size):
    classes = 3 if catalog.entry(name).is_conditional else 0
    network = catalog.entry(name).build(classes, size)
    labels = torch.tensor([0, 2]) if classes else None
    made = network.generator(torch.randn(2, gan.LATENT_SIZE), labels)
    assert made.shape == (2, 3, size, size)
    assert made.abs().max() <= 1
    assert network.discriminator(made, labels).shape == (2,)
    assert network.latent_size == gan.LATENT_SIZE


@pytest.mark.parametrize("name", NAMES)
def test_weights_start_as_the_paper_has_them(name):
    network = build_untrained(lambda: gan.build(name, 0, 64))
    kernels = [m.weight for m in network.generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert len(kernels) == 5
    assert all(kernel.std().item() == pytest.approx(0.02, rel=0.05) for kernel in kernels[:-1])
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([norm.weight for norm in norms])
    assert scales.mean().item() == pytest.approx(1, abs=0.01)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)
    in_discriminator = [m for m in network.discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(in_discriminator) == (0 if name == "wgan_gp" else 3)  # in all blocks but the first; a critic has none


def test_the_signal_neither_fades_nor_grows_in_an_untrained_critic():
    discriminator = build_untrained(lambda: gan.build("wgan_gp", 0, 128)).discriminator
    features = torch.randn(16, 3, 128, 128)
    with torch.no_grad():
        for block in discriminator.blocks:
            features = block(features)
            assert 0.5 < features.square().mean().sqrt() < 2


def test_the_projection_discriminator_adds_the_class_to_the_logit():
    discriminator = build_untrained(lambda: gan.build("conditional_gan", 4, 32)).discriminator
    discriminator.requires_grad_(False)
    images = torch.randn(3, 3, 32, 32)
    logits = torch.stack([discriminator(images, torch.full((3,), label)) for label in range(4)])  # [4, 3]
    features = images
    for block in discriminator.blocks:
        features = block(features)
    # [4, 3]: equation 3 less what all share
    expected = discriminator.project.weight.flatten(1) @ features.flatten(1).T
    torch.testing.assert_close(logits - logits[0], expected - expected[0])
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        pytest.param("dcgan", np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0)), np.log1p(np.exp(-1.0)), id="log D"),
        pytest.param("wgan_gp", -1.0, -1.0, id="earth moved"),
    ],
)
def test_losses_as_the_papers_have_them(name, discriminator, generator):
    real, made = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
    assert METHODS[name].discriminator(real, made).item() == pytest.approx(discriminator)
    assert METHODS[name].generator(made).item() == pytest.approx(generator)


def test_the_penalty_is_how_far_slopes_are_from_1():
    learning = learner("wgan_gp")

    class Sloped(nn.Module):
        """Its slope is `norm` everywhere."""

        def __init__(self, norm: float):
            super().__init__()
            self.norm = norm

        def forward(self, images, labels=None):
            return images.flatten(1).sum(dim=1) * self.norm / np.sqrt(3 * 32 * 32)

    for norm, expected in ((1.0, 0.0), (3.0, 4.0), (0.0, 1.0)):
        learning._pair.discriminator = Sloped(norm)
        pixels, targets = batch("wgan_gp")[1:]
        assert learning.penalty(pixels, targets).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_reduce_the_loss_of_whoever_learns(name):
    """With the other one held still; both losses would go up and down otherwise."""
    learning = learner(name)
    one = batch(name)
    for side in ("discriminator", "generator"):
        updates = updates_of(learning, name, critic_steps=10**6 if side == "discriminator" else 1)
        if side == "generator":
            updates._factors["discriminator"] = 0.0
        losses = [updates.update([one], 5e-4, 1, step)[side] for step in range(12)]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02, side


def test_the_generator_learns_once_in_critic_steps_updates():
    learning = learner("wgan_gp")
    updates = updates_of(learning, "wgan_gp", critic_steps=3)
    before = state(learning)
    found = [updates.update([batch("wgan_gp")], 1e-3, 1, step) for step in range(1, 7)]
    assert ["generator" in losses for losses in found] == [False, False, True] * 2
    assert all({"discriminator", "penalty"} <= losses.keys() for losses in found)
    assert not torch.equal(before["generator.layers.0.weight"], state(learning)["generator.layers.0.weight"])


def test_two_time_scales():
    """Each network takes its first step by Adam, which is as long as its rate."""
    learning = learner("wgan_gp")
    before = state(learning)
    updates_of(learning, "wgan_gp", critic_lr_factor=4.0).update([batch("wgan_gp")], 1e-3, 1, 1)
    moved = {name: (value - before[name]).abs().max().item() for name, value in state(learning).items()}
    assert moved["discriminator.judge.weight"] == pytest.approx(4e-3, rel=0.01)
    assert moved["generator.layers.0.weight"] == pytest.approx(1e-3, rel=0.01)


def test_clipped_weights_stay_within_and_take_the_penaltys_place():
    learning = learner("wgan_gp")
    settings = Training(model="wgan_gp", clip_weights=0.01)
    assert resolve(settings).penalty == 0
    updates = updates_of(learning, "wgan_gp", penalty=0.0, clip_weights=0.01)
    losses = updates.update([batch("wgan_gp")], 0.1, 1, 1)
    assert "penalty" not in losses
    assert max(p.abs().max().item() for p in learning._pair.discriminator.parameters()) <= 0.0100001


def test_gradients_of_several_batches_add_up():
    """Without BatchNorm and with one draw of latents, two halves teach what the whole does."""
    whole, halved = learner("dcgan"), learner("dcgan")
    one = batch("dcgan")
    parts = [Batch(one.indices[rows], one.inputs[rows], one.targets[rows]) for rows in (slice(0, 4), slice(4, 16))]
    for learning, batches in ((whole, [one]), (halved, parts)):
        learning._latents = lambda count, device: torch.zeros(count, gan.LATENT_SIZE)
        for norm in [m for m in learning.network.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.register_forward_pre_hook(lambda module, inputs: setattr(module, "training", False))
        updates_of(learning, "dcgan", critic_steps=10**6, clip_norm=0.0).update(batches, 1e-3, 1, 1)
    of_halves = dict(halved._pair.discriminator.named_parameters())
    for name, parameter in whole._pair.discriminator.named_parameters():
        torch.testing.assert_close(of_halves[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_has_figures_and_images_of_each_epoch(name):
    shown: list[tuple[int, np.ndarray]] = []
    learning = learner(name, ema=0.9)
    assert isinstance(learning, AlternatingLearner)
    assert isinstance(learning, Sampler)
    assert isinstance(learning, Watcher)
    assert lower_is_better(learning)
    fitted = fit(
        learning,
        images_of(name),
        images_of(name, 3, seed=1),
        recipe(name, ema=0.9),
        on_samples=lambda epoch, images: shown.append((epoch, images)),
    )
    assert [epoch for epoch, _ in shown] == [1, 2]
    assert shown[0][1].shape == (64, 32, 32, 3)
    assert not np.array_equal(shown[0][1], shown[1][1])
    row = fitted.history[-1]
    assert {"train_discriminator", "train_generator", "val_frechet", "val_kid", "val_coverage"} <= row.keys()
    assert ("val_accuracy" in row) == (name == "conditional_gan")
    assert "train_loss" not in row  # a sum of losses that fight means nothing
    best = min(fitted.history, key=lambda row: row["val_frechet"])
    assert fitted.metrics["frechet"] == best["val_frechet"]
    assert fitted.best_epoch == best["epoch"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_images(name):
    made = []
    for seed in (0, 0, 1):
        learning = learner(name, seed=seed)
        fit(learning, images_of(name, 4), images_of(name, 2, seed=1), recipe(name, epochs=1, seed=seed))
        made.append((state(learning), learning.samples()))
    assert equal(made[0][0], made[1][0])
    assert np.array_equal(made[0][1], made[1][1])
    assert not np.array_equal(made[0][1], made[2][1])


class Killed(Exception):
    """As if the process were gone."""


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dcgan", {"augment": "strong", "ema": 0.9}),
        ("wgan_gp", {"critic_steps": 3, "ema": 0.9}),  # 4 updates an epoch: the count goes on over the border
        ("conditional_gan", {"augment": "light"}),
    ],
)
def test_a_killed_training_goes_on_to_the_same_bits(name, changes, tmp_path):
    made = recipe(name, epochs=3, **changes)
    samples = images_of(name), images_of(name, 2, seed=1)

    whole = learner(name, **changes)
    expected = fit(whole, *samples, made)

    def kill(row):
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(learner(name, **changes), *samples, made, Place(folder=tmp_path), on_epoch=kill)
    again = learner(name, **changes)
    fitted = fit(again, *samples, made, Place(folder=tmp_path))
    assert fitted.resumed_after == 2
    assert equal(state(whole), state(again))
    clock = ("seconds", "images_per_second")
    for before, after in zip(expected.history, fitted.history, strict=True):
        assert {k: v for k, v in before.items() if k not in clock} == {k: v for k, v in after.items() if k not in clock}


@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_of_the_discriminator_stay_as_they_are(name):
    learning = learner(name)
    fit(learning, images_of(name, 4), images_of(name, 2, seed=1), recipe(name, epochs=1))  # a state to keep
    before = state(learning)
    fit(learning, images_of(name, 4), images_of(name, 2, seed=1), recipe(name, epochs=1, mode="features"))
    after = state(learning)
    frozen = [key for key in before if key.startswith(("discriminator.blocks.0.", "discriminator.blocks.1."))]
    assert frozen
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    for moved in ("generator.layers.0.weight", "discriminator.judge"):
        assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith(moved)), moved


def test_only_the_generator_is_averaged():
    learning = learner("dcgan")
    fit(learning, images_of("dcgan", 4), images_of("dcgan", 2, seed=1), recipe(epochs=1, ema=0.99))
    plain = learner("dcgan")
    fit(plain, images_of("dcgan", 4), images_of("dcgan", 2, seed=1), recipe(epochs=1, ema=0.0))
    averaged, own = state(learning), state(plain)
    assert all(torch.equal(averaged[key], own[key]) for key in own if key.startswith("discriminator"))
    assert not torch.equal(averaged["generator.layers.0.weight"], own["generator.layers.0.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_generator_gives_what_pytorch_gives(name, tmp_path):
    card = card_of(name).with_version()
    network = build_untrained(lambda: catalog.entry(name).build(len(card.labels), 32))
    gan.wake(network, card, np.zeros((4, 32, 32, 3), np.uint8))
    files, record = export_graphs(network, gan, card, np.zeros((5, 32, 32, 3), np.uint8), ["none"], tmp_path)
    assert record["compared"] >= 8
    assert record["max_differences"]["levels"] <= 1 if "max_differences" in record else record["agrees"]
    assert files["model.onnx"].stat().st_size < 3e6  # the discriminator stays behind

    engine = OnnxRuntimeEngine(files["model.onnx"], card, concurrency=1)
    latents = draw(card, 3, range(6))
    made = engine.run(latents)["images_out"]
    with torch.no_grad():
        expected = gan.to_uint8(network(*(torch.from_numpy(array) for array in latents.arrays)))
    assert np.abs(made.astype(int) - expected.numpy().astype(int)).max() <= 1
    assert len({image.tobytes() for image in made}) == 6
    if card.labels:
        others = engine.run(Latents(latents.latent, (latents.labels + 1) % 4))["images_out"]
        assert not np.array_equal(made, others)


class Sabotaged(AdversarialLearner):
    """From the second epoch on it makes one image only."""

    epochs = 0

    def scores(self):
        self.epochs += 1
        return super().scores()

    def made(self, count, labels):
        good = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return good if self.epochs < 2 else np.repeat(good[:1], count, axis=0)


def test_a_collapse_is_said_and_the_best_epoch_kept(caplog):
    tiny = learner("dcgan")
    random = np.random.default_rng(1)
    learning = Sabotaged(tiny.network, tiny.parts, card_of("dcgan"), recipe(epochs=4), tiny.judge)
    noise = tuple(encode_png(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(8))
    val = replace(images_of("dcgan", 2), read=Files(noise))
    fitted = fit(learning, images_of("dcgan", 4), val, recipe(epochs=4))
    said = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert said[0] == (
        "epoch 2: the generator has collapsed: two images differ by 0% of what real ones do; "
        "of the epochs so far, epoch 1 is kept"
    )
    assert fitted.best_epoch == 1
    assert [row["val_diversity"] < 0.1 for row in fitted.history] == [False, True, True, True]


@pytest.mark.parametrize(
    ("diversities", "classes", "said"),
    [
        pytest.param([0.9], [1.0], None, id="healthy"),
        pytest.param([0.1], [1.0], None, id="hardly begun"),
        pytest.param([0.1, 0.1], [1.0] * 2, "nearly always the same", id="never healthy"),
        pytest.param([0.1, 0.9], [1.0] * 2, None, id="recovered"),
        pytest.param([0.9, 0.9, 0.1], [1.0] * 3, "has collapsed", id="collapsed"),
        pytest.param([0.9, 0.9, 0.1, 0.1], [1.0] * 4, None, id="said before"),
        pytest.param([0.9, 0.9, 0.9], [1.0, 1.0, 0.3], "30% of the classes", id="classes lost"),
    ],
)
def test_when_a_collapse_is_said(diversities, classes, said):
    history = [
        {"epoch": n + 1, "val_frechet": 10.0 - n, "val_diversity": d, "val_class_coverage": c}
        for n, (d, c) in enumerate(zip(diversities, classes, strict=True))
    ]
    found = learner("dcgan", epochs=4).watch(history)
    assert found is None if said is None else said in found


def test_a_loss_that_is_not_finite_names_the_images():
    learning = learner("wgan_gp")
    with torch.no_grad():
        learning._pair.discriminator.judge.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteLoss, match="epoch 3, step 7: the discriminator loss is not finite") as caught:
        updates_of(learning, "wgan_gp").update([batch("wgan_gp")], 1e-3, 3, 7)
    assert caught.value.images[0] == "0.png"


@pytest.mark.parametrize("how", ["light", "strong"])
def test_variations_differ_by_image_and_have_a_gradient(how):
    torch.manual_seed(0)
    images = torch.full((16, 3, 32, 32), 0.5, requires_grad=True)
    varied = vary(images, how)
    assert varied.shape == images.shape
    assert len({row.numpy().tobytes() for row in varied.detach()}) > 12
    varied.sum().backward()
    assert (images.grad != 0).any(dim=1).flatten(1).float().mean() > 0.4
    assert vary(images, "none") is images


def test_each_variation_does_what_it_says():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 32, 32) + 0.5
    moved = translation(images)
    empty = (moved == 0).all(dim=1).float().mean(dim=(1, 2))
    assert empty.max() <= 1 - (28 / 32) ** 2 + 1e-6
    assert any(torch.equal(moved[k, :, 4:, :], images[k, :, :-4, :]) or empty[k] > 0.1 for k in range(64))
    holes = (cutout(images) == 0).all(dim=1).float().mean(dim=(1, 2))
    assert holes.max() <= 0.25
    assert holes.min() >= 0.06  # a quarter of the square at a corner
    coloured = colours(images)
    torch.testing.assert_close(  # a pixel keeps its place: grey levels are still in the same order
        coloured.mean(dim=1).flatten(1).argsort(dim=1)[:, :5], images.mean(dim=1).flatten(1).argsort(dim=1)[:, :5]
    )


def test_images_on_one_sheet():
    images = np.stack([np.full((4, 6, 3), level, np.uint8) for level in range(10)])
    sheet = grid(images)
    assert sheet.shape == (4 * 2 + 2, 6 * 8 + 2 * 7, 3)
    assert (sheet[0, 0, 0], sheet[0, 8, 0], sheet[6, 8, 0], sheet[4, 0, 0]) == (0, 1, 9, 255)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("dcgan", {"lr": "auto"}, "--lr auto looks at one loss"),
        ("dcgan", {"optimizer": "sgd"}, "--optimizer means nothing to models that generate"),
        ("dcgan", {"weight_decay": 0.1}, "--weight-decay means nothing"),
        ("dcgan", {"mosaic": True}, "--mosaic means nothing"),
        ("dcgan", {"label_smoothing": 0.1}, "--label-smoothing means nothing"),
        ("dcgan", {"unfreeze_epochs": 2}, "--unfreeze-epochs means nothing"),
        ("dcgan", {"balance": True}, "--balance means nothing"),
        ("dcgan", {"penalty": 1.0}, "--penalty means nothing to models that generate, such as dcgan"),
        ("conditional_gan", {"clip_weights": 0.1}, "--clip-weights means nothing"),
        ("wgan_gp", {"clip_weights": 0.1, "penalty": 1.0}, "use one of them"),
        ("resnet18", {"critic_steps": 2}, "--critic-steps means nothing to models that classify"),
        ("resnet18", {"critic_lr_factor": 2.0}, "--critic-lr-factor means nothing to models that classify"),
        ("resnet18", {"judge": "pixels"}, "--judge means nothing to models that classify"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        resolve(Training(model=model, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "weights", "mode"),
    [
        ("dcgan", None, "scratch"),
        ("dcgan", "none", "scratch"),
        ("dcgan", "other", "finetune"),
        ("resnet18", None, "finetune"),
    ],
)
def test_the_usual_mode(model, weights, mode):
    assert resolve(Training(model=model, weights=weights)).mode == mode


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        pytest.param("dcgan", {}, ("none", 0.0, 1), id="dcgan"),
        pytest.param("wgan_gp", {}, ("none", 0.0, 2), id="critic"),
        pytest.param("conditional_gan", {}, ("light", 0.0, 1), id="few images of each class"),
        pytest.param("conditional_gan", {"augment": "none", "clip_norm": 1.0}, ("none", 1.0, 1), id="asked for"),
        pytest.param("resnet18", {}, ("light", 1.0, 1), id="no generator"),
    ],
)
def test_the_usual_updates(model, changes, expected):
    usual = resolve(Training(model=model, **changes))
    assert (usual.augment, usual.clip_norm, usual.critic_steps) == expected


def test_a_size_that_is_not_built_for():
    with pytest.raises(UsageError, match="dcgan is built for images of 16, 32, 64 or 128 pixels, got --image-size 48"):
        catalog.input_rule("dcgan", None, 48)
