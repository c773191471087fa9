"""Every detector of the catalogue through the training loop, with boxes or with masks: one table for all of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models import catalog
from models.card import Card
from models.imaging import masks
from models.learning.fit import Fitted, Place, fit
from models.learning.learner import Learner, task_module
from models.learning.object_targets import Objects
from models.learning.samples import Samples
from models.nets.untrained import build_untrained
from models.records import Task
from models.settings.train import Augment, Mode
from tasks.photographs import encode_png
from tests.tiny_learning import Files, recipe
from tests.tiny_rcnn import LABELS, shapes, target

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 64  # pixels
DETECTORS = [name for name, entry in catalog.CATALOG.items() if entry.task in (Task.DETECT, Task.INSTANCE)]
SMALL = ("yolo_n", "yolo_v1", "fasterrcnn_resnet18", "maskrcnn_resnet18", "maskrcnn_mobilenet_v2")
TABLE = [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in DETECTORS]
MAIN = {Task.DETECT: "ap", Task.INSTANCE: "mask_ap"}


def learner_of(name: str, side: int = SIDE) -> Learner:
    """Untrained."""
    entry = catalog.entry(name)
    assert entry.input is not None
    rule = replace(entry.input, height=side, width=side)
    card = Card(name, "0" * 12, entry.task, name, LABELS, rule, score_floor=entry.score_floor)
    family = entry.family_module()
    network = build_untrained(lambda: family.build_for_training(entry.builder, len(LABELS)))
    return task_module(entry.task).learner(network, family.parts(network, entry.builder), card, recipe())


def samples_of(name: str, images: Tensor, targets: Sequence[dict[str, Tensor]], augment: Augment | None) -> Samples:
    """Images uint8 [n, side, side, 3] as files, with the targets of detectors that draw masks or do not."""
    entry = catalog.entry(name)
    assert entry.input is not None
    task, side = task_module(entry.task), images.shape[1]
    rule = replace(entry.input, height=side, width=side)
    return Samples(
        names=[f"/{number}.png" for number in range(len(images))],
        targets=[
            Objects(
                one["boxes_xyxy"].numpy(),
                one["labels"].numpy(),
                one["ignored"].numpy(),
                np.zeros(len(one["labels"]), bool),
                tuple(map(masks.encode, one["masks"].numpy())) if entry.task == Task.INSTANCE else None,
            )
            for one in targets
        ],
        read=Files(tuple(encode_png(image) for image in images.numpy())),
        rule=rule,
        augmentation=task.augmentation(augment, rule, True) if augment else None,
        placed=task.placed,
    )


def drawn(boxes: Sequence[Sequence[int]], ignored: list[bool] | None = None) -> dict[str, Tensor]:
    """Objects of the third class that fill their boxes."""
    shown = np.zeros((len(boxes), SIDE, SIDE), bool)
    for mask, (left, top, right, bottom) in zip(shown, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return target(boxes, [2] * len(boxes), ignored, shown)


def hard_cases() -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Nothing, one pixel, a hundred objects, an object in a crowd, and two images as they should be."""
    images, targets = shapes(6, SIDE)
    many = [[x, y, x + 7, y + 7] for x in range(0, 60, 6) for y in range(0, 60, 6)]
    hard = [
        drawn([]),
        drawn([[30, 40, 31, 41]]),
        drawn(many[:100]),
        drawn([[0, 0, 64, 64], [8, 8, 40, 40]], [True, False]),
    ]
    return images, [*hard, *targets[4:]]


def train(name: str, mode: Mode, augment: Augment, **changes) -> tuple[Learner, dict[str, Tensor], Fitted]:
    """The learner after a training, the state before it, and what came of it."""
    learner = learner_of(name)
    before = {key: value.clone() for key, value in learner.network.state_dict().items()}
    images, targets = hard_cases()
    fitted = fit(
        learner,
        samples_of(name, images, targets, augment),
        samples_of(name, images[2:], targets[2:], None),
        recipe(mode=mode, epochs=1, batch_size=3, lr=1e-3, **changes),
        Place(threads=1),
    )
    return learner, before, fitted


@pytest.mark.parametrize("mode", ["features", "finetune", "scratch"])
@pytest.mark.parametrize("name", TABLE)
def test_an_epoch_in_each_mode_whatever_the_images_show(name, mode):
    learner, before, fitted = train(name, mode, "light")
    after = learner.network.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    of_backbone = {
        key for key in before if key.startswith(tuple(f"{n}." for stage in learner.parts.stages for n in stage))
    }
    assert changed - of_backbone, "head and neck learn in every mode"
    assert bool(changed & of_backbone) == (mode != "features")
    assert all(value.isfinite().all() for value in after.values())
    main = MAIN[catalog.entry(name).task]
    assert learner.main_metric == main
    assert {main, f"{main}50", "f1", "score"} <= fitted.metrics.keys()
    assert all(0 <= value <= 1 for value in fitted.metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("fasterrcnn_resnet18", 0.9),
        ("maskrcnn_resnet18", 0.9),
        ("maskrcnn_mobilenet_v2", 0.9),
        ("fasterrcnn_resnet50", 0.9),
        ("maskrcnn_resnet50", 0.5),  # 40 updates are few for so many weights, and its smallest anchors are of 32 pixels
    ],
)
def test_eight_images_are_learned_from_scratch(name, score):
    """Those of one stage: test_yolo."""
    learner = learner_of(name, 96)
    images, targets = shapes(8, 96)
    fitted = fit(
        learner,
        samples_of(name, images, targets, None),
        samples_of(name, images, targets, None),
        recipe(epochs=20, batch_size=4, lr=1e-3),
        Place(threads=1),
    )
    assert fitted.metrics[f"{learner.main_metric}50"] >= score
    assert fitted.metrics["f1"] >= score
