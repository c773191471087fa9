"""How detectors learn: targets, their way with the images, and the family's losses and answers."""

import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from models import catalog
from models.card import Card
from models.dataset import ANNOTATIONS_SCHEMA
from models.errors import UsageError
from models.imaging.geometry import Geometry, ResizeRule
from models.learning import detection
from models.learning.detection_augment import cut_out, mirrored
from models.learning.learner import HeadLearner
from models.nets.parts import Parts
from models.records import Task
from tests.tiny_learning import recipe

RULE = ResizeRule("letterbox", 32, 32)


def annotations(*rows: tuple) -> pa.Table:
    """(image, label, box, crowd)"""
    return pa.Table.from_pylist(
        [
            dict(zip(("image", "label", "x_min", "y_min", "x_max", "y_max", "crowd"), (i, n, *b, c), strict=True))
            for i, n, b, c in rows
        ],
        schema=ANNOTATIONS_SCHEMA,
    )


def target(*boxes: tuple[float, ...], ignored: bool = False) -> dict[str, torch.Tensor]:
    """Boxes of class 0, 1 …"""
    return {
        "boxes_xyxy": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(len(boxes)),
        "ignored": torch.full((len(boxes),), ignored),
        "difficult": torch.zeros(len(boxes), dtype=torch.bool),
    }


def test_objects_by_image():
    images = pa.table({"image": ["/empty.png", "/two.png"]})
    rows = annotations(
        ("/two.png", "b", (1, 2, 3, 4), False),
        ("/elsewhere.png", "a", (0, 0, 9, 9), False),
        ("/two.png", "a", (5, 6, 7, 8), True),
        ("/two.png", None, (0, 0, 2, 2), False),
    )
    empty, two = detection.targets(images, rows, ["a", "b"])
    assert empty.boxes_xyxy.shape == (0, 4)
    assert two.boxes_xyxy.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 2, 2]]
    assert two.labels.tolist() == [1, 0, -1]
    assert two.ignored.tolist() == [False, True, True]


def test_an_unknown_label_is_named():
    images, rows = pa.table({"image": ["/1.png"]}), annotations(("/1.png", "zebra", (1, 2, 3, 4), False))
    with pytest.raises(UsageError, match=r"/1\.png has an object with the label 'zebra'"):
        detection.targets(images, rows, ["a"])


def test_boxes_move_with_their_image_and_stay_inside():
    rows = annotations(("/1.png", "a", (10, 20, 110, 60), False))
    (objects,) = detection.targets(pa.table({"image": ["/1.png"]}), rows, ["a"])
    placed = detection.placed(objects, Geometry(100, 80, 0.5, 0.25, 3.0, 1.0), (32, 64))
    assert placed["boxes_xyxy"].tolist() == [[8.0, 6.0, 53.0, 16.0]]
    assert placed["boxes_xyxy"].dtype == torch.float32


@pytest.mark.parametrize(
    ("box", "ignored", "expected"),
    [
        pytest.param((12, 14, 16, 20), False, [4.0, 8.0, 12.0, 20.0], id="whole"),
        pytest.param((6, 10, 14, 20), False, [0.0, 0.0, 8.0, 20.0], id="half"),
        pytest.param((2, 10, 11, 20), False, None, id="a small rest"),
        pytest.param((2, 10, 11, 20), True, [0.0, 0.0, 2.0, 20.0], id="a small rest of an ignored region"),
        pytest.param((0, 0, 5, 5), True, None, id="outside"),
    ],
)
def test_boxes_follow_a_cut(box, ignored, expected):
    found = cut_out(target(box, ignored=ignored), 10, 10, 10, 20, (20, 40))
    assert found["boxes_xyxy"].tolist() == ([expected] if expected else [])
    assert len(found["labels"]) == len(found["ignored"]) == bool(expected)


def test_boxes_are_mirrored():
    assert mirrored(target((2, 3, 10, 8)), 32)["boxes_xyxy"].tolist() == [[22, 3, 30, 8]]


@pytest.mark.parametrize("name", ["light", "strong"])
def test_the_varied_box_still_frames_what_it_framed(name):
    varied = detection.augmentation(name, RULE, True)
    side = varied.training_rule.height
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    box = (side // 3, side // 4, side // 3 + 14, side // 4 + 10)
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    seen = []
    for seed in range(20):
        pixels, found = varied(image, target(box), seed)
        again, same = varied(image, target(box), seed)
        assert torch.equal(pixels, again)
        assert torch.equal(found["boxes_xyxy"], same["boxes_xyxy"])
        assert pixels.shape == (3, 32, 32)
        if len(found["boxes_xyxy"]):
            rows, columns = np.nonzero(
                pixels.float().mean(dim=0).numpy() > pixels.float().mean(dim=0).numpy().max() / 2
            )
            bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(found["boxes_xyxy"][0].numpy(), bright, atol=1.01)
            seen.append(tuple(bright))
    assert len(set(seen)) > 10


def test_an_image_without_objects_is_varied():
    varied = detection.augmentation("strong", RULE, True)
    side = varied.training_rule.height
    _, found = varied(torch.zeros(3, side, side, dtype=torch.uint8), target(), 0)
    assert found["boxes_xyxy"].shape == (0, 4)


@pytest.fixture
def learner(monkeypatch):
    """Of a family that always finds one object of class 0 at (0, 0, 8, 8) of the first image of a batch."""
    answers = {
        "boxes_xyxy": torch.tensor([[0.0, 0.0, 8.0, 8.0]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([0]),
        "batch_index": torch.tensor([0]),
    }
    family = SimpleNamespace(
        losses=lambda network, images, targets: {"boxes": network(images.float()).mean() * len(targets)},
        reference=lambda network, card: lambda images: answers,
    )
    monkeypatch.setitem(sys.modules, "models.nets.toy", family)
    monkeypatch.setitem(catalog.CATALOG, "toy", catalog.Entry(Task.DETECT, "toy", "toy"))
    card = Card("toys", "", Task.DETECT, "toy", ("a", "b"), RULE)
    return detection.learner(nn.Linear(3, 1), Parts(("head",), ()), card, recipe())


def test_losses_are_those_of_the_family(learner):
    targets = learner.collate([target(), target((0, 0, 8, 8))])
    losses = learner.losses(torch.ones(2, 32, 32, 3, dtype=torch.uint8), targets)
    assert losses["boxes"].requires_grad
    assert not isinstance(learner, HeadLearner)


@pytest.mark.parametrize(
    ("targets", "ap"),
    [
        pytest.param([target(), target()], 0.0, id="no objects at all"),
        pytest.param([target((0, 0, 8, 8)), target()], 1.0, id="found"),
        pytest.param([target((0, 0, 8, 6)), target()], 0.6, id="found with an IoU of three quarters"),
        pytest.param([target(), target((0, 0, 8, 8))], 0.0, id="in another image"),
        pytest.param([target((0, 0, 8, 8), (9, 9, 20, 20)), target()], 0.5, id="one class of two"),
    ],
)
def test_scores(learner, targets, ap):
    scores = learner.scores()
    scores.update(learner.outputs(torch.zeros(2, 32, 32, 3)), learner.collate(targets))
    assert scores.compute()["ap"] == pytest.approx(ap)
