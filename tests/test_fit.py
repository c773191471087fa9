"""The training loop on a tiny network: what is learned follows from recipe and samples alone."""

import errno
import io
import math
import os
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.errors import PixelmillError, StorageError, UsageError
from models.learning import precision
from models.learning.averaging import AveragedWeights
from models.learning.checkpoint import CHECKPOINT_FILE
from models.learning.classification import Classification
from models.learning.fit import Fitted, Place, fit
from models.learning.history import to_arrow
from models.learning.loading import ImageBatches, Part
from models.learning.order import epoch_order, updates
from models.learning.rates import HIGHEST, LOWEST, NoRate, steepest, sweep
from models.learning.recipe import resolve
from models.learning.samples import UndecodableImage
from models.learning.schedule import rate_factor
from models.learning.update import NonFiniteLoss
from models.learning.whole_files import write_whole
from models.progress import Step
from models.settings.train import Training
from tests.tiny_learning import Files, coloured, recipe, tiny_learner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def train_samples():
    return coloured(6, augment="light")


@pytest.fixture(scope="module")
def val_samples():
    return coloured(2, seed=1)


def weights(learner: Classification) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def curves(fitted: Fitted) -> list[dict]:
    """The history without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in fitted.history]


@pytest.mark.parametrize(
    ("steps", "warmup", "factors"),
    [
        pytest.param(1, 0, [1.0], id="one step"),
        pytest.param(4, 0, [1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2)], id="cosine"),
        pytest.param(
            6, 2, [1 / 3, 2 / 3, 1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2)], id="warm-up"
        ),
        pytest.param(4, 100, [1 / 3, 2 / 3, 1.0, 0.5], id="warm-up longer than the training"),
    ],
)
def test_the_rate_rises_and_falls(steps, warmup, factors):
    assert [rate_factor(step, steps, warmup) for step in range(steps)] == pytest.approx(factors)


def test_each_epoch_has_every_image_once_in_an_order_of_its_own():
    orders = [tuple(epoch_order(20, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(orders)) == 4
    assert tuple(epoch_order(20, 0, 1)) == orders[1]


def test_balanced_epochs_draw_each_class_equally_often():
    groups = [0] * 90 + [1] * 8 + [3] * 2
    drawn = [epoch_order(100, 0, epoch, groups) for epoch in range(6)]
    for order in drawn:
        assert len(order) == 100
        assert sorted(Counter(groups[i] for i in order).values()) == [33, 33, 34]
    seen = set(np.concatenate(drawn).tolist())
    assert len([i for i in seen if groups[i] == 0]) > 75  # a large class is not the same third every time


@pytest.mark.parametrize(
    ("images", "batch_size", "accumulate", "sizes"),
    [
        pytest.param(8, 4, 1, [[4], [4]], id="whole batches"),
        pytest.param(9, 4, 1, [[3], [3], [3]], id="no batch of one"),
        pytest.param(3, 8, 4, [[3]], id="fewer than a batch"),
        pytest.param(20, 4, 2, [[3, 3], [4, 3], [4, 3]], id="accumulated"),
    ],
)
def test_batches_are_evenly_filled(images, batch_size, accumulate, sizes):
    order = epoch_order(images, 0, 0)
    plan = updates(order, batch_size, accumulate)
    assert [[len(batch) for batch in update] for update in plan] == sizes
    assert sorted(np.concatenate([batch for update in plan for batch in update]).tolist()) == list(range(images))


def test_processes_share_each_update():
    order = epoch_order(21, 0, 0)
    alone = updates(order, 8)
    shared = [updates(order, 4, rank=rank, ranks=2) for rank in (0, 1)]
    assert [len(plan) for plan in shared] == [len(alone)] * 2
    together = [np.concatenate([*first, *second]) for first, second in zip(*shared, strict=True)]
    assert set(np.concatenate(together).tolist()) == set(range(21))
    assert {len(part) for update in shared for batches in update for part in batches} <= {3, 4}


@pytest.mark.parametrize("changes", [{}, {"mode": "features"}, {"mode": "finetune", "unfreeze_epochs": 2}], ids=str)
def test_the_same_seed_gives_the_same_bits_whatever_the_threads_and_the_memory(changes, train_samples, val_samples):
    results = []
    for place in (Place(threads=1), Place(threads=4), Place(threads=2, memory_bytes=0)):
        learner = tiny_learner()
        fitted = fit(learner, train_samples, val_samples, recipe(**changes), place)
        results.append((weights(learner), curves(fitted)))
    for state, rows in results[1:]:
        assert equal(state, results[0][0])
        assert rows == results[0][1]
    other = tiny_learner()
    fit(other, train_samples, val_samples, recipe(seed=1, **changes))
    assert not equal(weights(other), results[0][0])


@pytest.mark.parametrize("mode", ["features", "finetune", "scratch"])
def test_a_small_set_is_learned_by_heart(mode):
    samples = coloured(4)
    rate = 0.3 if mode == "features" else 0.03
    fitted = fit(
        tiny_learner(), samples, samples, recipe(mode=mode, epochs=12, lr=rate, augment="none", weight_decay=0.0)
    )
    assert fitted.metrics["top1"] == 1.0
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"] / 2


def test_accumulated_gradients_are_those_of_the_larger_batch(val_samples):
    samples = coloured((6, 6, 6, 4), augment="light")  # two updates of 11 images, and so batches of unequal size
    large, small = tiny_learner(norm=False), tiny_learner(norm=False)
    fit(large, samples, val_samples, recipe(batch_size=12, optimizer="sgd", lr=0.1))
    fit(small, samples, val_samples, recipe(batch_size=4, accumulate=3, optimizer="sgd", lr=0.1))
    for name, value in weights(large).items():
        torch.testing.assert_close(weights(small)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "still", "moving"),
    [
        pytest.param({"clip_norm": 1e-9}, "head.weight", None, id="clipped"),
        pytest.param({"clip_norm": 0.0}, None, "head.weight", id="not clipped"),
        pytest.param(
            {"mode": "finetune", "backbone_lr_factor": 1e-9}, "stem.0.weight", "head.weight", id="slow backbone"
        ),
        pytest.param({"backbone_lr_factor": 1e-9}, None, "stem.0.weight", id="scratch knows no slow backbone"),
    ],
)
def test_how_far_weights_move(changes, still, moving, train_samples, val_samples):
    learner = tiny_learner()
    before = weights(learner)
    fit(learner, train_samples, val_samples, recipe(optimizer="sgd", weight_decay=0.0, **changes))
    moved = {name: (value - before[name]).abs().max().item() for name, value in weights(learner).items()}
    assert still is None or moved[still] < 1e-7
    assert moving is None or moved[moving] > 1e-4


def test_images_are_varied_anew_in_each_epoch_and_when_drawn_twice():
    samples = coloured((8, 1, 1, 1), augment="light", noise=100)
    batches = ImageBatches(tiny_learner(), samples, torch.device("cpu"), 0, 2, 2**30)
    seen: list[bytes] = []
    for epoch in (0, 1):
        for update in batches.training(epoch, 4, 1, balance=True, part=Part()):
            for batch in update:
                of_rare = batch.inputs[torch.from_numpy(batch.indices == 10)]
                seen += [image.numpy().tobytes() for image in of_rare]
    batches.close()
    assert len(seen) >= 4
    assert len(set(seen)) == len(seen)


def test_averaged_weights_follow_the_formula():
    state = {"w": torch.tensor([0.0]), "steps": torch.tensor(0)}
    average = AveragedWeights(state, 0.5)
    expected = 0.0
    for number in range(1, 20):
        state["w"] = torch.tensor([float(number)])
        state["steps"] = torch.tensor(number)
        average.update(state)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * number
    assert average.average["w"].item() == pytest.approx(expected)
    assert average.average["steps"].item() == 19


def test_the_averaged_weights_are_what_is_validated_and_kept(train_samples, val_samples):
    plain, averaged = tiny_learner(), tiny_learner()
    fit(plain, train_samples, val_samples, recipe(epochs=1))
    fitted = fit(averaged, train_samples, val_samples, recipe(epochs=1, ema=0.9))
    assert not equal(weights(plain), weights(averaged))
    scores = averaged.scores()
    with torch.no_grad():
        for index in range(len(val_samples)):
            image = _prepared(val_samples, index)
            scores.update(averaged.outputs(image), averaged.collate([val_samples.targets[index]]))
    assert scores.compute() == pytest.approx(fitted.metrics, abs=1e-6)


def _prepared(samples, index: int) -> torch.Tensor:
    from models.imaging.prepare import Preparer

    pixels = np.empty((samples.rule.height, samples.rule.width, 3), np.uint8)
    Preparer(samples.rule).prepare(samples.read(index), pixels)
    return torch.from_numpy(pixels)[None]


def test_training_stops_when_nothing_gets_better(train_samples, val_samples):
    fitted = fit(tiny_learner(norm=False), train_samples, val_samples, recipe(epochs=9, lr=1e-12, patience=2))
    assert len(fitted.history) == 3


def test_the_best_epoch_is_kept_and_of_equals_the_last(train_samples, val_samples):
    class Rated(Classification):
        main_metric = "rating"
        ratings = iter([0.2, 0.9, 0.9, 0.5])

        def scores(self):
            scores = super().scores()
            compute = scores.compute
            scores.compute = lambda: compute() | {"rating": next(self.ratings)}
            return scores

    tiny = tiny_learner()
    learner = Rated(tiny.network, tiny.parts, 4, 0.0)
    after: list[dict] = []
    fitted = fit(
        learner, train_samples, val_samples, recipe(epochs=4), on_epoch=lambda row: after.append(weights(learner))
    )
    assert (fitted.best_epoch, fitted.metrics["rating"]) == (3, 0.9)
    assert equal(weights(learner), after[2])


def test_the_range_test_leaves_no_trace(train_samples, val_samples):
    searching, told = tiny_learner(), tiny_learner()
    found = fit(searching, train_samples, val_samples, recipe(lr="auto"))
    assert LOWEST < found.lr < HIGHEST
    given = fit(told, train_samples, val_samples, recipe(lr=found.lr))
    assert equal(weights(searching), weights(told))
    assert curves(found) == curves(given)


def test_the_steepest_rate_is_found():
    def loss(rate: float) -> float | None:
        """Falls between 1e-3 and 1e-2, and explodes above 1e-1."""
        return 2 - 1 / (1 + (3e-3 / rate) ** 4) if rate < 0.1 else 100 * rate

    tried = list(sweep(loss))
    assert tried[-1][0] < HIGHEST
    assert 1e-3 < steepest(tried) < 1e-2
    assert list(sweep(lambda rate: None)) == []


@pytest.mark.parametrize("losses", [[], [1.0], list(range(1, 40))], ids=["none", "one", "rising"])
def test_no_rate_is_made_up(losses):
    with pytest.raises(NoRate, match="--lr auto found no rate"):
        steepest([(1e-5 * (number + 1), loss) for number, loss in enumerate(losses)])


class Poisoned(Classification):
    """Its loss is NaN for the images of class 3."""

    def losses(self, images, targets):
        poison = torch.where((targets == 3).any(), math.nan, 0.0)
        return {name: loss + poison for name, loss in super().losses(images, targets).items()}


def test_a_loss_that_is_not_finite_names_epoch_step_and_images(train_samples, val_samples):
    tiny = tiny_learner()
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, step \d+: cross_entropy is not finite.*--lr") as caught:
        fit(Poisoned(tiny.network, tiny.parts, 4, 0.0), train_samples, val_samples, recipe(batch_size=1))
    (name,) = caught.value.images
    assert train_samples.targets[train_samples.names.index(name)] == 3
    assert name in str(caught.value)
    order = epoch_order(len(train_samples), 0, 0).tolist()
    assert train_samples.names[order[caught.value.step - 1]] == name


def test_a_diverging_training_is_stopped(train_samples, val_samples):
    with pytest.raises(NonFiniteLoss) as caught:
        fit(
            tiny_learner(norm=False),
            train_samples,
            val_samples,
            recipe(batch_size=12, optimizer="sgd", lr=1e25, clip_norm=0.0, warmup_epochs=0),
        )
    assert len(caught.value.images) == 12
    assert "and 7 more" in str(caught.value)


class Counted(Classification):
    """Counts the images that the backbone sees, and keeps what the head learns from."""

    seen = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.learned: set[bytes] = set()

    def head_losses(self, features, targets):
        self.learned |= {row.numpy().tobytes() for row in features}
        return super().head_losses(features, targets)

    def features(self, images):
        self.seen += len(images)
        return super().features(images)


def counted() -> Counted:
    tiny = tiny_learner()
    return Counted(tiny.network, tiny.parts, 4, 0.0)


@pytest.mark.parametrize(("augment", "views"), [("none", 1), ("light", 2), ("strong", 4)])
def test_features_are_computed_once_per_image_and_view(augment, views, val_samples, tmp_path):
    samples = coloured(6, augment=augment)
    learner = counted()
    steps: list[Step] = []
    wanted = recipe(mode="features", epochs=6, augment=augment)
    first = fit(learner, samples, val_samples, wanted, Place(folder=tmp_path), steps.append)
    assert learner.seen == views * len(samples) + len(val_samples)
    assert len(learner.learned) == views * len(samples)  # the views differ, and take turns
    told = [step for step in steps if step.stage == "features of training images"]
    assert (told[0].done, told[-1].done, told[-1].total) == (0, views * len(samples), views * len(samples))

    (tmp_path / CHECKPOINT_FILE).unlink()
    again = counted()
    second = fit(again, samples, val_samples, wanted, Place(folder=tmp_path))
    assert again.seen == 0
    assert curves(second) == curves(first)
    assert equal(weights(again), weights(learner))


class WithoutFeatures(Classification):
    """A Learner, but no HeadLearner: as a task whose head is given more than one tensor."""

    features = None


@pytest.mark.parametrize("kind", [Counted, WithoutFeatures])
def test_a_frozen_backbone_stays_bit_identical(kind, train_samples, val_samples):
    tiny = tiny_learner()
    learner = kind(tiny.network, tiny.parts, 4, 0.0)
    before = weights(learner)
    fit(learner, train_samples, val_samples, recipe(mode="features"))
    changed = {name for name, value in weights(learner).items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_the_backbone_is_unfrozen_step_by_step(train_samples, val_samples):
    learner = tiny_learner()
    states = [weights(learner)]
    fit(
        learner,
        train_samples,
        val_samples,
        recipe(mode="finetune", epochs=3, unfreeze_epochs=2),
        on_epoch=lambda row: states.append(weights(learner)),
    )
    moved = [
        {stage for stage in ("stem.0", "body.0", "head") if not torch.equal(a[f"{stage}.weight"], b[f"{stage}.weight"])}
        for a, b in pairwise(states)
    ]
    assert moved == [{"head"}, {"body.0", "head"}, {"stem.0", "body.0", "head"}]


class Interrupted(Exception):
    """Ends a training from outside."""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="scratch"),
        pytest.param({"mode": "features"}, id="features"),
        pytest.param({"mode": "finetune", "unfreeze_epochs": 3, "ema": 0.8}, id="unfreezing, averaged"),
        pytest.param({"lr": "auto", "optimizer": "sgd", "accumulate": 2}, id="found rate"),
        pytest.param({"lr": 1e-12, "patience": 2}, id="early end"),
    ],
)
def test_what_was_interrupted_ends_as_if_it_had_not_been(changes, train_samples, val_samples, tmp_path):
    wanted = recipe(epochs=5, **changes)
    undisturbed = tiny_learner()
    expected = fit(undisturbed, train_samples, val_samples, wanted)

    def fall(step: Step) -> None:
        if step.stage == "epoch 3 of 5" and step.done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(tiny_learner(), train_samples, val_samples, wanted, Place(folder=tmp_path), fall)
    resumed = tiny_learner()
    fitted = fit(resumed, train_samples, val_samples, wanted, Place(folder=tmp_path))
    assert fitted.resumed_after == 2
    assert curves(fitted) == curves(expected)
    assert (fitted.best_epoch, fitted.metrics, fitted.lr) == (expected.best_epoch, expected.metrics, expected.lr)
    assert equal(weights(resumed), weights(undisturbed))

    finished = fit(tiny_learner(), train_samples, val_samples, wanted, Place(folder=tmp_path))
    assert finished.resumed_after == len(expected.history)
    anew = fit(tiny_learner(), train_samples, val_samples, wanted, Place(folder=tmp_path, resume=False))
    assert anew.resumed_after == 0


def test_a_damaged_checkpoint_is_not_taken_up(train_samples, val_samples, tmp_path, caplog):
    fit(tiny_learner(), train_samples, val_samples, recipe(), Place(folder=tmp_path))
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:1000])
    assert fit(tiny_learner(), train_samples, val_samples, recipe(), Place(folder=tmp_path)).resumed_after == 0
    assert "cannot be read" in caplog.text


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, lambda file: file.write(b"first"))

    def fail(file) -> None:
        file.write(b"second, of which")
        raise Interrupted

    with pytest.raises(Interrupted):
        write_whole(path, fail)
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(descriptor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device; .*PIXELMILL_TRAINING"):
        write_whole(tmp_path / "file", lambda file: file.write(b"content"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_is_one_line(tmp_path):
    class Filling(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() + len(data) > 10_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with pytest.raises(StorageError, match="No space left on device"):
        write_whole(tmp_path / "file", lambda file: torch.save({"weights": torch.zeros(10_000)}, Filling()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), PixelmillError, "smaller --batch-size", id="memory"),
        pytest.param(
            ValueError("Expected more than 1 value per channel when training"), UsageError, "2 or more", id="one image"
        ),
        pytest.param(ValueError("else"), ValueError, "else", id="a mistake of ours"),
    ],
)
def test_what_torch_raises_is_said_for_people(fault, error, message, train_samples, val_samples):
    class Failing(Classification):
        def losses(self, images, targets):
            raise fault

    tiny = tiny_learner()
    with pytest.raises(error, match=message):
        fit(Failing(tiny.network, tiny.parts, 4, 0.0), train_samples, val_samples, recipe())


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        pytest.param([5], r"/images/005.png can no longer be decoded \(corrupt: .*ingest the data set again", id="one"),
        pytest.param(range(9), r"\d images can no longer be decoded: .*\.png; .*: ingest", id="several"),
    ],
)
def test_an_image_that_cannot_be_decoded_any_more_is_named(broken, named, train_samples, val_samples):
    assert isinstance(train_samples.read, Files)
    data = list(train_samples.read.data)
    for index in broken:
        data[index] = data[index][:200]
    with pytest.raises(UndecodableImage, match=named):
        fit(tiny_learner(), replace(train_samples, read=Files(tuple(data))), val_samples, recipe())


def test_what_reading_raises_ends_the_training(train_samples, val_samples):
    def read(index: int) -> bytes:
        raise UsageError(f"image {index} has changed")

    with pytest.raises(UsageError, match="has changed"):
        fit(tiny_learner(), replace(train_samples, read=read), val_samples, recipe())


@pytest.mark.parametrize(
    ("changes", "train", "message"),
    [
        pytest.param({"balance": True}, {"groups": None}, "--balance needs", id="nothing to balance"),
        pytest.param({}, {"names": [], "targets": []}, "the split train has no images", id="no images"),
    ],
)
def test_what_cannot_be_learned_is_refused(changes, train, message, train_samples, val_samples):
    with pytest.raises(UsageError, match=message):
        fit(tiny_learner(), replace(train_samples, **train), val_samples, recipe(**changes))


def test_balance_shows_rare_classes_as_often(val_samples):
    seen: Counter[int] = Counter()

    class Watching(Classification):
        def losses(self, images, targets):
            seen.update(targets.tolist())
            return super().losses(images, targets)

    tiny = tiny_learner()
    samples = coloured((18, 2, 2, 2), augment="light")
    fit(Watching(tiny.network, tiny.parts, 4, 0.0), samples, val_samples, recipe(balance=True, epochs=2))
    assert seen == dict.fromkeys(range(4), 12)


def test_the_callers_random_numbers_and_settings_stay(train_samples, val_samples):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(tiny_learner(), train_samples, val_samples, recipe(epochs=1), Place(threads=2))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1


def test_bf16_learns_too(train_samples, val_samples):
    fitted = fit(tiny_learner(), train_samples, val_samples, recipe(precision="bf16", epochs=6, lr=0.03))
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"]


@pytest.mark.parametrize(
    ("changes", "decided"),
    [
        pytest.param({"mode": "features"}, {"augment": "none", "precision": "fp32"}, id="features"),
        pytest.param({"mode": "finetune"}, {"augment": "light", "lr": 1e-3}, id="finetune"),
        pytest.param({"optimizer": "sgd"}, {"lr": 1e-2}, id="SGD wants larger rates"),
        pytest.param({"lr": "auto"}, {"lr": "auto"}, id="to be found"),
        pytest.param({"epochs": 3, "augment": "strong", "flip": False}, {"epochs": 3, "flip": False}, id="as asked"),
        pytest.param({"model": "yolo_n"}, {"lr": 2e-3, "mosaic": False, "label_smoothing": 0.0}, id="detector"),
        pytest.param({"model": "yolo_n", "mosaic": True, "ema": 0.9}, {"ema": 0.9}, id="detector, as asked"),
        pytest.param({"model": "maskrcnn_resnet18"}, {"batch_size": 4, "lr": 5e-4}, id="masks"),
        pytest.param({"model": "fasterrcnn_resnet18"}, {"batch_size": 4, "lr": 5e-4}, id="two stages"),
    ],
)
def test_what_is_left_open_is_decided_by_mode(changes, decided):
    settings = Training(**{"model": "resnet18"} | changes)
    chosen = asdict(resolve(settings))
    assert chosen | decided == chosen
    assert None not in chosen.values()
    given = settings.model_dump(exclude_unset=True, exclude={"model"})
    assert chosen | given == chosen  # nothing that was asked for is lost


@pytest.mark.parametrize(
    ("asked", "mode", "groups", "has_bf16", "chosen"),
    [
        ("auto", "finetune", 1, True, "bf16"),
        ("auto", "finetune", 1, False, "fp32"),
        ("auto", "finetune", 8, True, "fp32"),
        ("auto", "features", 1, True, "fp32"),
        ("fp32", "scratch", 1, True, "fp32"),
        ("bf16", "features", 8, False, "bf16"),
    ],
)
def test_the_arithmetic_is_what_the_device_is_built_for(asked, mode, groups, has_bf16, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16}, raising=False)
    assert precision.arithmetic(asked, "cpu", mode, torch.nn.Conv2d(8, 8, 3, groups=groups)) == chosen


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="--precision fp16 needs a GPU"):
        precision.arithmetic("fp16", "cpu", "finetune", torch.nn.Identity())


def test_progress_tells_loss_and_metric(train_samples, val_samples):
    steps: list[Step] = []
    rows: list[dict] = []
    fit(tiny_learner(), train_samples, val_samples, recipe(epochs=2), report=steps.append, on_epoch=rows.append)
    last = steps[-1]
    assert (last.stage, last.done, last.total) == ("epoch 2 of 2", 3, 3)
    assert last.text == f"loss {rows[1]['train_loss']:.3g} · top1 {rows[0]['val_top1']:.3f}"


def test_the_history_is_a_table(train_samples, val_samples):
    fitted = fit(tiny_learner(), train_samples, val_samples, recipe(epochs=2))
    table = to_arrow(fitted.history)
    assert table.column_names == ["epoch", "lr", "train_loss", "seconds", "images_per_second", "val_top1", "val_loss"]
    assert table.column("epoch").to_pylist() == [1, 2]
    # Three updates in each epoch; the rate is that of the last one.
    assert table.column("lr").to_pylist() == [0.01 * rate_factor(step, 6, 3) for step in (2, 5)]
    assert table.schema.field("epoch").type == pa.int32()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="scratch"),
        pytest.param({"mode": "finetune", "unfreeze_epochs": 2, "lr": 0.03}, id="unfreezing", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(changes, train_samples, val_samples, tmp_path):
    alone, shared = tiny_learner(norm=False), tiny_learner(norm=False)
    fit(alone, train_samples, val_samples, recipe(batch_size=8, **changes))
    rows: list[dict] = []
    wanted, place = recipe(batch_size=4, **changes), Place(devices=("cpu", "cpu"), folder=tmp_path)
    fitted = fit(shared, train_samples, val_samples, wanted, place, on_epoch=rows.append)
    assert rows == fitted.history
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(shared)[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_what_fails_in_another_process_is_said_here(train_samples, val_samples):
    # The second process works on every second image of the order.
    second = updates(epoch_order(len(train_samples), 0, 0), 4, rank=1, ranks=2)[0][0]
    index = int(epoch_order(len(train_samples), 0, 0)[second[0]])
    assert isinstance(train_samples.read, Files)
    data = list(train_samples.read.data)
    data[index] = b""
    with pytest.raises(PixelmillError, match=rf"{train_samples.names[index]} can no longer be decoded"):
        fit(
            tiny_learner(),
            replace(train_samples, read=Files(tuple(data))),
            val_samples,
            recipe(batch_size=4),
            Place(devices=("cpu", "cpu")),
        )


def test_the_folder_holds_nothing_unfinished(train_samples, val_samples, tmp_path: Path):
    fit(tiny_learner(), train_samples, val_samples, recipe(mode="features"), Place(folder=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        CHECKPOINT_FILE,
        "features-plain-0-00000.npy",
        "features-varied-0-00000.npy",
        "features-varied-1-00000.npy",
    }
