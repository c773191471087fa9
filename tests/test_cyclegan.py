"""CycleGAN: the networks, who learns from what, two data sets side by side, the buffer of images, and the export."""

import math

import numpy as np
import pytest
import torch

from models.errors import UsageError
from models.learning import translation
from models.learning.fit import Place, fit
from models.learning.learner import AlternatingLearner, Sampler, Watcher
from models.learning.loading import Batch, ImageBatches, Part
from models.learning.recipe import resolve
from models.learning.translation import BUFFER, ImageBuffer, TranslationUpdates, augmentation
from models.learning.update import NonFiniteLoss
from models.nets import cyclegan
from models.nets.cyclegan import Size
from models.nets.untrained import build_untrained
from models.progress import Step
from models.runtime.engine import OnnxRuntimeEngine
from models.runtime.export import export_onnx
from models.runtime.parity import check_parity
from models.settings.train import Training
from tasks.photographs import prepared_photographs
from tests.tiny_generative import (
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

GENERATORS, DISCRIMINATORS = ("a_to_b", "b_to_a"), ("discriminator_a", "discriminator_b")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cyclegan, "SIZES", {16: Size(blocks=1, width=8, patch_layers=1)})


def recipe(**changes):
    return recipe_of(**{"epochs": 3, "batch_size": 4, "lr": 1e-3} | changes)


def updates_of(learner, **changes) -> TranslationUpdates:
    updates = learner.updater(recipe(**changes), torch.device("cpu"), torch.no_grad, [str(i) for i in range(9)])
    updates._cast = lambda: torch.autocast("cpu", enabled=False)
    return updates


def batch_of(a: np.ndarray, b: np.ndarray) -> Batch:
    return Batch(np.arange(len(a)), torch.from_numpy(a), torch.from_numpy(b))


# The networks


@pytest.mark.parametrize(
    ("side", "blocks", "field"), [(16, 2, 16), (32, 3, 16), (64, 4, 34), (128, 6, 70), (200, 6, 70), (256, 9, 70)]
)
def test_what_depends_on_the_size(monkeypatch, side, blocks, field):
    monkeypatch.undo()
    size = cyclegan.size_of(side)
    assert size.blocks == blocks
    discriminator = cyclegan.Discriminator(size._replace(width=4)).eval()
    # The patch of one judgement: where a change of a pixel moves it. Without norms, which see the whole image.
    convolutions = torch.nn.Sequential(*(m for m in discriminator if not isinstance(m, torch.nn.InstanceNorm2d)))
    image = torch.zeros(1, 3, 96, 96, requires_grad=True)
    judged = convolutions(image)
    judged[0, 0, judged.shape[2] // 2, judged.shape[3] // 2].backward()
    rows = torch.nonzero(image.grad.abs().sum(dim=(0, 1, 3)))
    assert int(rows.max() - rows.min()) + 1 == field


@pytest.mark.parametrize("size_hw", [(16, 16), (20, 32)])
def test_a_translation_has_the_size_of_the_image_and_hangs_on_no_other(size_hw):
    network = cyclegan.build("cyclegan", 0, 16)
    images = torch.rand(3, 3, *size_hw) * 2 - 1
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert together.shape == images.shape
    assert together.abs().max() <= 1
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_discriminators_serve_training_alone():
    kept = cyclegan.build("cyclegan", 0, 16).state_dict()
    trained = cyclegan.build_for_training("cyclegan", 0, 16).state_dict()
    assert {name for name in trained if not name.startswith(cyclegan.IGNORED_PREFIXES)} == set(kept)
    assert {name.partition(".")[0] for name in kept} == set(GENERATORS)


# Who learns from what


@pytest.mark.parametrize("identity_weight", [0.0, 5.0])
def test_gradients_do_not_leak(identity_weight):
    learner = learner_of("cyclegan", recipe(identity_weight=identity_weight))
    updates, network = updates_of(learner), learner.network
    a, b = (torch.from_numpy(images_of([colour], 2)) for colour in (0, 2))

    def learned() -> set[str]:
        return {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None}

    updates._learning(updates._generators, updates._discriminators)
    losses, made = updates.generator_losses(a, b)
    assert set(losses) == {"adversarial", "cycle"} | ({"identity"} if identity_weight else set())
    sum(losses.values()).backward()
    assert learned() == set(GENERATORS)
    network.zero_grad(set_to_none=True)
    assert not any(image.requires_grad for image in made)
    updates._learning(updates._discriminators, updates._generators)
    updates.discriminator_losses(*made)["discriminators"].backward()
    assert learned() == set(DISCRIMINATORS)


def test_after_an_update_both_sides_have_moved_and_may_learn():
    learner = learner_of("cyclegan", recipe(identity_weight=1.0))
    before = weights(learner)
    found = updates_of(learner).update([batch_of(images_of([0], 2), images_of([2], 2))], 1e-3, 1, 1)
    assert set(found) == {"adversarial", "cycle", "identity", "discriminators"}
    changed = {
        name.partition(".")[0] for name, value in weights(learner).items() if not torch.equal(value, before[name])
    }
    assert {name.partition(".")[0] for name in changed} == {*GENERATORS, *DISCRIMINATORS}
    assert all(parameter.requires_grad for parameter in learner.network.parameters())


def test_a_loss_that_is_not_finite_is_said():
    learner = learner_of("cyclegan", recipe())
    with torch.no_grad():
        learner.network.discriminator_a[0].weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="epoch 2, step 3: adversarial is not finite"):
        updates_of(learner).update([batch_of(images_of([0], 2), images_of([2], 2))], 1e-3, 2, 3)


# The buffer


def test_the_buffer_gives_back_as_many_as_it_takes():
    buffer = ImageBuffer(3)
    images = torch.arange(63.0).view(63, 1, 1, 1).expand(63, 3, 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = buffer.exchanged(images[:3])
        torch.testing.assert_close(first, images[:3])  # as long as it fills, everything passes
        later = torch.cat([buffer.exchanged(images[3:8]), buffer.exchanged(images[8:])])
    assert later.shape == (60, 3, 2, 2)
    assert len(buffer.images) == 3
    numbers = [int(image[0, 0, 0]) for image in (*first, *later, *buffer.images)]
    assert set(numbers) == set(range(63))  # nothing is lost: it is given out, or still there
    older = sum(int(image[0, 0, 0]) != number for number, image in enumerate(later, 3))
    assert 20 <= older <= 40  # about half


def test_the_buffer_keeps_no_gradients():
    buffer = ImageBuffer()
    given = buffer.exchanged(torch.zeros(2, 3, 4, 4, requires_grad=True) * 2)
    assert not given.requires_grad
    assert not any(image.requires_grad for image in buffer.images)
    assert buffer.size == BUFFER == 50


# Two data sets


@pytest.mark.parametrize(("ours", "theirs"), [(5, 5), (5, 2), (3, 7), (4, 1)])
def test_what_stands_beside_an_image(ours, theirs):
    samples = samples_of(images_of([0], ours), "cyclegan", beside=images_of([2], theirs))
    shown = [samples.order_beside(0, epoch, ours) for epoch in range(4)]
    indices = np.concatenate([found for found, _ in shown])
    times = np.bincount(indices, minlength=theirs)
    assert times.max() - times.min() <= 1  # each as often as the others
    assert np.array_equal(np.concatenate([rounds for _, rounds in shown]), np.arange(4 * ours) // theirs)
    again, _ = samples.order_beside(0, 2, ours)
    assert np.array_equal(again, shown[2][0])  # of an epoch, not of those before it


def test_pairs_are_the_same_whatever_the_threads_and_the_memory():
    samples = samples_of(images_of([0], 5, noise=60), "cyclegan", beside=images_of([2], 3, noise=60), augment="light")
    learner = learner_of("cyclegan", recipe())
    found = []
    for threads, memory in ((1, 2**30), (4, 2**30), (3, 0)):
        batches = ImageBatches(learner, samples, torch.device("cpu"), 0, threads, memory)
        found.append(
            [
                (batch.inputs, batch.targets)
                for epoch in (0, 1)
                for update in batches.training(epoch, 2, 1, False, Part())
                for batch in update
            ]
        )
        batches.close()
    for other in found[1:]:
        for (inputs, targets), (inputs_too, targets_too) in zip(found[0], other, strict=True):
            assert torch.equal(inputs, inputs_too)
            assert torch.equal(targets, targets_too)
    assert found[0][0][1].dtype == torch.uint8
    shown = torch.cat([targets for _, targets in found[0]])
    assert len({image.numpy().tobytes() for image in shown}) == len(shown)  # varied anew each time


def test_variations_keep_colours():
    image = torch.full((3, 18, 18), 77, dtype=torch.uint8)
    for name in ("none", "light", "strong"):
        varied, _ = augmentation(name, rule_of("cyclegan"))(image, None, 5)
        assert (varied == 77).all()


# Learning


def test_the_learner_is_what_the_loop_asks_for():
    learner = learner_of("cyclegan", recipe())
    assert all(isinstance(learner, kind) for kind in (AlternatingLearner, Sampler, Watcher))


def test_a_few_epochs_bring_cycles_and_style():
    a, b = images_of([0], 8), images_of([2], 8)
    samples = samples_of(a, "cyclegan", beside=b)
    wanted = recipe(epochs=16, lr=2e-3)
    learner = learner_of("cyclegan", wanted)
    fitted = fit(learner, samples, samples, wanted)
    first, last = fitted.history[0], fitted.history[-1]
    assert last["train_cycle"] < first["train_cycle"] / 2
    assert last["val_cycle_l1"] < first["val_cycle_l1"]
    assert fitted.metrics["frechet"] == min(row["val_frechet"] for row in fitted.history)
    with torch.no_grad():
        made = cyclegan.levels(learner.outputs(torch.from_numpy(a)).made).float().mean(dim=(0, 1, 2))
    assert made.argmax() == 2  # red became blue


def test_what_was_interrupted_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "BUFFER", 6)
    train = samples_of(images_of([0, 1], 8), "cyclegan", beside=images_of([2], 5), augment="light")
    val = samples_of(images_of([0], 3, seed=1), "cyclegan", beside=images_of([2], 3, seed=1))
    wanted = recipe(epochs=3, ema=0.8)
    undisturbed = learner_of("cyclegan", wanted)
    expected = fit(undisturbed, train, val, wanted)

    def fall(step: Step) -> None:
        if step.stage == "epoch 2 of 3" and step.done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(learner_of("cyclegan", wanted), train, val, wanted, Place(folder=tmp_path), fall)
    resumed = learner_of("cyclegan", wanted)
    fitted = fit(resumed, train, val, wanted, Place(folder=tmp_path, threads=3))
    assert fitted.resumed_after == 1  # the buffers were full then, and are as they were
    assert curves(fitted) == curves(expected)
    assert equal(weights(resumed), weights(undisturbed))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param(images_of([0], 1), images_of([2], 1), id="one image each"),
        pytest.param(images_of([0], 2), images_of([2], 5), id="more of the target"),
        pytest.param(np.full((3, SIDE, SIDE, 3), 128, np.uint8), images_of([2], 2), id="all grey"),
    ],
)
def test_odd_images_teach_something_finite(a, b):
    samples = samples_of(a, "cyclegan", beside=b)
    wanted = recipe(epochs=2, batch_size=1)
    learner = learner_of("cyclegan", wanted)
    fitted = fit(learner, samples, samples, wanted)
    assert all(math.isfinite(value) for row in fitted.history for value in row.values())
    assert all(torch.isfinite(value).all() for value in weights(learner).values())


def test_a_grid_shows_there_and_back():
    a = images_of([0, 1], 3)
    samples = samples_of(a, "cyclegan", beside=images_of([2], 2))
    shown: list[np.ndarray] = []
    wanted = recipe(epochs=1)
    fit(learner_of("cyclegan", wanted), samples, samples, wanted, on_samples=lambda epoch, grid: shown.append(grid))
    assert shown[0].shape == (24, SIDE, SIDE, 3)
    assert np.array_equal(shown[0][:8], a[[0, 1, 2, 3, 0, 1, 2, 3]])  # of the first batch


def test_a_collapse_is_said():
    learner = learner_of("cyclegan", recipe())
    assert "collapse" in learner.watch([{"val_diversity": 0.05}])
    assert learner.watch([{"val_diversity": 0.9}]) is None
    assert learner.watch([{}]) is None


# Export


def test_a_translator_is_exported(tmp_path):
    card = card_of("cyclegan")
    network = build_untrained(lambda: cyclegan.build("cyclegan", 0, SIDE))
    images, _ = prepared_photographs(rule_of("cyclegan"), 5)
    cyclegan.wake(network, card, images)
    path = tmp_path / "model.onnx"
    export_onnx(cyclegan.graph(network, card), card, path, images[:2])
    record = check_parity(network, cyclegan, card, path, images)
    assert record["agrees"]
    assert record["compared"] == 5
    found = OnnxRuntimeEngine(path, card, concurrency=1).run(images)["images_out"]
    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    assert found.std() > 10


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"mode": "features"}, "cyclegan cannot be trained with --mode features: use finetune or scratch"),
        pytest.param({"lr": "auto"}, "--lr auto looks at one loss"),
        pytest.param({"beta": 2.0}, "--beta means nothing to models that translate"),
        pytest.param({"balance": True}, "--balance means nothing"),
        pytest.param({"optimizer": "sgd"}, "--optimizer means nothing"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        resolve(Training(model="cyclegan", **settings))
