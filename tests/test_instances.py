"""Masks of objects: their way into the network's input, and how masks that were found are compared with them."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from models import catalog
from models.card import Card
from models.dataset import ANNOTATIONS_SCHEMA
from models.imaging import masks
from models.imaging.geometry import Geometry, ResizeRule, geometry_of, spans_yx
from models.learning import instances
from models.nets.parts import Parts
from tests.tiny_learning import recipe

HEIGHT, WIDTH = 61, 83
LETTERBOX = ResizeRule("letterbox", 40, 40)


def original(*shown: np.ndarray, **changes) -> instances.Objects:
    """Objects of the first class with these masks [height, width]."""
    rows = [{"image": "/1.png", "label": "a", "x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1, "mask": masks.encode(one)}
            for one in shown]  # fmt: skip
    for row, one in zip(rows, shown, strict=True):
        extent = masks.box_xyxy(row["mask"], *one.shape)
        row |= dict(zip(("x_min", "y_min", "x_max", "y_max"), extent or (0, 0, 1, 1), strict=True)) | changes
    annotations = pa.Table.from_pylist(rows, schema=ANNOTATIONS_SCHEMA)
    (objects,) = instances.targets(pa.table({"image": ["/1.png"]}), annotations, ["a"])
    return objects


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[top:bottom, left:right] = True
    return drawn


@pytest.mark.parametrize(
    "rule",
    [LETTERBOX, ResizeRule("stretch", 21, 33), ResizeRule("letterbox", 100, 130)],
    ids=["smaller", "stretched", "larger"],
)
def test_masks_lie_as_their_image_does(rule):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ring = (np.hypot(y - 30, x - 40) < 25) & (np.hypot(y - 30, x - 40) > 12)
    shown = [ring, rectangle(0, 0, HEIGHT, WIDTH), rectangle(50, 70, HEIGHT, WIDTH), y % 2 == 0]
    geometry = geometry_of(*spans_yx(rule, HEIGHT, WIDTH))
    placed = instances.placed(original(*shown), geometry, (rule.height, rule.width))["masks"].numpy()
    assert placed.shape == (4, rule.height, rule.width)
    rows, columns = geometry.sources_yx((rule.height, rule.width))
    for got, one in zip(placed, shown, strict=True):
        np.testing.assert_array_equal(got[: len(rows), : len(columns)], one[rows[:, None], columns])
    assert not placed[:, len(rows) :].any()
    assert not placed[:, :, len(columns) :].any()


@pytest.mark.parametrize("place", [(0, 0), (33, 45), (60, 82)], ids=["first", "middle", "last"])
def test_no_object_is_lost_between_the_centres(place):
    geometry = geometry_of(*spans_yx(ResizeRule("letterbox", 8, 8), HEIGHT, WIDTH))
    shown = rectangle(place[0], place[1], place[0] + 1, place[1] + 1)
    (placed,) = instances.placed(original(shown), geometry, (8, 8))["masks"]
    assert torch.nonzero(placed).tolist() == [[int(place[0] * geometry.scale_y), int(place[1] * geometry.scale_x)]]


def test_of_an_object_without_a_mask_nothing_is_known():
    objects = original(rectangle(3, 3, 9, 9), mask=None)
    assert objects.ignored.tolist() == [True]
    placed = instances.placed(objects, Geometry(WIDTH, HEIGHT, 1.0, 1.0, 0.0, 0.0), (HEIGHT, WIDTH))
    assert placed["boxes_xyxy"].tolist() == [[3, 3, 9, 9]]
    assert not placed["masks"].any()


def test_an_image_without_objects_has_no_masks():
    geometry = geometry_of(*spans_yx(LETTERBOX, HEIGHT, WIDTH))
    placed = instances.placed(original(), geometry, (40, 40))
    assert {name: tuple(value.shape) for name, value in placed.items()} == {
        "boxes_xyxy": (0, 4), "labels": (0,), "ignored": (0,), "difficult": (0,), "masks": (0, 40, 40),
    }  # fmt: skip


def outputs(share: float, score: float = 0.9) -> dict[str, torch.Tensor]:
    """One finding in the first image, at (8, 8, 24, 24), that draws the left `share` of its box."""
    drawn = torch.zeros(1, 28, 28)
    drawn[:, :, : round(28 * share)] = 1
    return {
        "boxes_xyxy": torch.tensor([[8.0, 8.0, 24.0, 24.0]]),
        "scores": torch.tensor([score]),
        "labels": torch.tensor([0]),
        "batch_index": torch.tensor([0]),
        "masks": drawn,
    }


def placed_square(**flags: bool) -> dict[str, torch.Tensor]:
    shown = torch.zeros(1, 40, 40, dtype=torch.bool)
    shown[:, 8:24, 8:24] = True
    given = {"ignored": False, "difficult": False} | flags
    return {
        "boxes_xyxy": torch.tensor([[8.0, 8.0, 24.0, 24.0]]),
        "labels": torch.tensor([0]),
        "masks": shown,
        **{name: torch.tensor([value]) for name, value in given.items()},
    }


@pytest.mark.parametrize(
    ("share", "ap", "f1"),
    [
        pytest.param(1.0, 1.0, 1.0, id="all of it"),
        pytest.param(0.75, 0.6, 1.0, id="three quarters: at six of ten overlaps"),
        pytest.param(0.25, 0.0, 0.0, id="a quarter, though its box is right"),
    ],
)
def test_scores_are_those_of_masks(share, ap, f1):
    entry = catalog.entry("maskrcnn_resnet18")
    card = Card("m", "", entry.task, "maskrcnn_resnet18", ("a",), LETTERBOX)
    learner = instances.learner(torch.nn.Identity(), Parts((), ()), card, recipe())
    scores = learner.scores()
    scores.update(outputs(share), [placed_square()])
    found = scores.compute()
    assert found[learner.main_metric] == pytest.approx(ap, abs=1e-3)
    assert found["f1"] == f1
    assert found["score"] == pytest.approx(0.9 if f1 else Card.score)


@pytest.mark.parametrize("is_found", [True, False], ids=["found", "not-found"])
@pytest.mark.parametrize("flag", ["ignored", "difficult"])
def test_what_is_ignored_or_difficult_may_be_found_or_not(flag, is_found):
    entry = catalog.entry("maskrcnn_resnet18")
    card = Card("m", "", entry.task, "maskrcnn_resnet18", ("a",), LETTERBOX)
    scores = instances.learner(torch.nn.Identity(), Parts((), ()), card, recipe()).scores()
    other = outputs(1.0, 0.8) | {"batch_index": torch.tensor([1])}
    found = {name: torch.cat([outputs(1.0)[name], other[name]]) if is_found else other[name] for name in other}
    scores.update(found, [placed_square(**{flag: True}), placed_square()])
    computed = scores.compute()
    assert (computed["mask_ap"], computed["f1"]) == (pytest.approx(1.0), 1.0)
