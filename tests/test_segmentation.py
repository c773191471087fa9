"""How segmenters learn: maps from masks, losses by hand, images varied with their maps, and every architecture."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from models import catalog
from models.card import Card
from models.dataset import ANNOTATIONS_SCHEMA
from models.errors import UsageError
from models.imaging import masks
from models.imaging.geometry import Geometry, ResizeRule, geometry_of, spans_yx
from models.imaging.mask_runs import segments_of_map
from models.learning import segmentation, transfer
from models.learning.learner import HeadLearner
from models.learning.segmentation import SegmentationScores, dice_loss, pixel_loss
from models.learning.segmentation_regions import IGNORED, Regions
from models.nets import unet
from models.nets.untrained import build_untrained
from models.records import Task
from tests.tiny_learning import recipe
from tests.tiny_segmentation import scenes

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = (
    pytest.param("fcn_resnet50", marks=pytest.mark.slow),
    pytest.param("deeplabv3_resnet50", marks=pytest.mark.slow),
    "unet",
    "unet_resnet34",
    "unet_mobilenet_v2",
)
LABELS = ("disc", "square")
RULE = ResizeRule("letterbox", 48, 48)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The networks' own widths cost seconds a step."""
    monkeypatch.setattr(unet, "WIDTH", 8)


def rectangle(top: int, left: int, bottom: int, right: int, height: int = 4, width: int = 6) -> str:
    """COCO's counts of a filled rectangle."""
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return masks.encode(mask)


def annotations(*rows: dict) -> pa.Table:
    box = {"x_min": 0.0, "y_min": 0.0, "x_max": 2.0, "y_max": 2.0}
    return pa.Table.from_pylist([{"image": "/a.png", **box, **row} for row in rows], schema=ANNOTATIONS_SCHEMA)


IMAGES = pa.table({"image": ["/a.png", "/empty.png"], "height": [4, 4], "width": [6, 6]})
LEFT, ALL, MIDDLE = rectangle(0, 0, 4, 2), rectangle(0, 0, 4, 6), rectangle(1, 1, 3, 5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([{"label": "b", "mask": LEFT}], ["220000"] * 4, id="a mask"),
        pytest.param(
            [{"label": "a", "mask": ALL}, {"label": "b", "mask": MIDDLE}],
            ["111111", "122221", "122221", "111111"],
            id="later ones lie above",
        ),
        pytest.param(
            [{"label": "b", "mask": MIDDLE}, {"label": "a", "mask": ALL, "crowd": True}],
            ["xxxxxx", "x2222x", "x2222x", "xxxxxx"],
            id="a crowd leaves open what nothing else says",
        ),
        pytest.param(
            [{"label": None, "mask": LEFT}, {"label": "a", "mask": ALL}],
            ["xx1111"] * 4,
            id="a region without label is open whatever else lies there",
        ),
        pytest.param(
            [{"label": "a", "mask": None, "x_min": 0.5, "x_max": 2.2, "y_max": 1.0}, {"label": "b", "mask": MIDDLE}],
            ["xxx000", "022220", "022220", "000000"],
            id="of a box nobody knows which pixels are meant",
        ),
        pytest.param([{"label": "a", "mask": ALL, "difficult": True}], ["111111"] * 4, id="difficult ones are learned"),
        pytest.param([{"label": "a", "mask": rectangle(0, 0, 0, 0)}], ["000000"] * 4, id="a mask of nothing"),
    ],
)  # fmt: skip
def test_a_map_of_the_regions(rows, expected):
    shown, empty = segmentation.targets(
        IMAGES, annotations(*rows, {"image": "/b.png", "label": "a", "mask": ALL}), "ab"
    )
    assert ["".join("x" if value == IGNORED else str(value) for value in row) for row in shown.drawn()] == expected
    assert not empty.drawn().any()
    assert empty.drawn().shape == (4, 6)


@pytest.mark.parametrize(
    ("rows", "classes", "message"),
    [
        ([{"label": "c", "mask": ALL}], "ab", "/a.png has a region with the label 'c'"),
        ([{"label": "0", "mask": ALL}], [str(number) for number in range(255)], "254 classes at most, got 255"),
    ],
)
def test_what_cannot_be_learned_from_is_said(rows, classes, message):
    with pytest.raises(UsageError, match=message):
        segmentation.targets(IMAGES, annotations(*rows), classes)


def in_input(drawn: np.ndarray, geometry: Geometry, rule: ResizeRule) -> np.ndarray:
    height, width = drawn.shape
    regions = Regions(height, width, tuple(
        segmentation_region(value, drawn == value) for value in np.unique(drawn[drawn > 0]).tolist()
    ))  # fmt: skip
    return segmentation.placed(regions, geometry, (rule.height, rule.width)).numpy()


def segmentation_region(value: int, mask: np.ndarray):
    from models.learning.segmentation_regions import Region

    return Region(value, masks.encode(mask), (0.0, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "rule", [ResizeRule("letterbox", 40, 40), ResizeRule("stretch", 21, 33)], ids=["letterbox", "stretch"]
)
def test_a_map_lies_as_its_image_does(rule):
    """An image of flat colours, prepared as for the network, is brightest where its map says so."""
    from models.imaging.resize import resize

    drawn = np.zeros((61, 83), np.uint8)
    drawn[20:43, 31:70] = 1
    spans = spans_yx(rule, *drawn.shape)
    prepared = np.empty((spans[0].count, spans[1].count, 3), np.uint8)
    resize(np.repeat(drawn[..., None] * 255, 3, axis=2), *spans, "bilinear", prepared)
    placed = in_input(drawn, geometry_of(*spans), rule)
    assert placed.shape == prepared.shape[:2]
    assert np.mean(placed == (prepared[..., 0] > 127)) == 1


def test_a_map_that_is_enlarged_comes_back_as_it_was():
    drawn = np.random.default_rng(0).integers(0, 3, (13, 17)).astype(np.uint8)
    rule = ResizeRule("letterbox", 50, 50)
    geometry = geometry_of(*spans_yx(rule, 13, 17))
    placed = in_input(drawn, geometry, rule)
    padded = np.zeros((50, 50), np.uint8)
    padded[: placed.shape[0], : placed.shape[1]] = placed
    for value, counts, _ in segments_of_map(padded, geometry):
        np.testing.assert_array_equal(masks.decode(counts, 13, 17), drawn == value)
    assert len(np.unique(drawn)) == 3


def test_a_cropped_image_takes_its_map_with_it():
    rule = ResizeRule("crop", 10, 10, short_side=13)
    drawn = np.zeros((26, 40), np.uint8)
    drawn[:, 20:] = 1
    placed = in_input(drawn, geometry_of(*spans_yx(rule, 26, 40)), rule)
    batch = learner_of("unet", rule)[0].collate([torch.from_numpy(placed)])
    assert batch.tolist() == [[[0] * 5 + [1] * 5] * 10]


def test_padding_is_not_learned_from():
    learner = learner_of("unet", ResizeRule("letterbox", 3, 4))[0]
    batch = learner.collate([torch.ones(2, 4, dtype=torch.uint8), torch.full((3, 2), 2, dtype=torch.uint8)])
    x = IGNORED
    assert batch.tolist() == [[[1] * 4, [1] * 4, [x] * 4], [[2, 2, x, x]] * 3]


def certain(values: list, num_values: int = 3) -> torch.Tensor:
    """Logits that are sure of these values [batch, height, width]."""
    return 100.0 * nn.functional.one_hot(torch.tensor(values), num_values).movedim(-1, 1).float()


@pytest.mark.parametrize(
    ("found", "true", "dice"),
    [
        pytest.param([0, 0, 0, 0], [0, 0, 0, 0], 0.0, id="no object, none found"),
        pytest.param([1, 0, 0, 0], [0, 0, 0, 0], 0.0, id="no object: cross entropy alone says so"),
        pytest.param([1, 1, 0, 0], [1, 1, 0, 0], 0.0, id="right"),
        pytest.param([1, 1, 1, 1], [1, 1, 0, 0], 1 - 4 / 6, id="too much"),
        pytest.param([0, 0, 0, 0], [1, 0, 0, 0], 1.0, id="one pixel missed"),
        pytest.param([1, 1, 1, 1], [1, 1, 2, 1], 1 - (6 / 7 + 0) / 2, id="a small class counts as a large one"),
        pytest.param([1, 1, 1, 1], [1, 1, IGNORED, IGNORED], 0.0, id="ignored pixels"),
        pytest.param([1, 1, 1, 1], [IGNORED] * 4, 0.0, id="nothing to judge"),
    ],
)
def test_dice_by_hand(found, true, dice):
    assert float(dice_loss(certain([[found]]), torch.tensor([[true]]))) == pytest.approx(dice, abs=1e-6)


def test_cross_entropy_is_the_mean_of_the_judged_pixels():
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1] = math.log(3)  # probabilities ¼ and ¾
    true = torch.tensor([[[0, 1, IGNORED, IGNORED]]])
    assert float(pixel_loss(logits, true)) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    smoothed = (math.log(4) * 0.95 + math.log(4 / 3) * 0.05 + math.log(4 / 3) * 0.95 + math.log(4) * 0.05) / 2
    assert float(pixel_loss(logits, true, 0.1)) == pytest.approx(smoothed)
    assert float(pixel_loss(logits, torch.full((1, 1, 4), IGNORED))) == 0


def test_scores_by_hand():
    scores = SegmentationScores(3)
    scores.update(certain([[[0, 0, 1, 1, 1, 1]]]), torch.tensor([[[0, 0, 0, 1, IGNORED, 1]]]))
    scores.update(certain([[[0, 2]]]), torch.tensor([[[0, 0]]]))
    found = scores.compute()
    # Background 3 of 5 and class 1 two of 3; class 2 is in no map, and its one pixel is the background's loss.
    assert found["miou"] == pytest.approx((3 / 5 + 2 / 3) / 2)
    assert found["pixel_accuracy"] == pytest.approx(5 / 7)
    assert found["loss"] == pytest.approx(200 / 7)
    nothing = SegmentationScores(3)
    nothing.update(certain([[[0]]]), torch.tensor([[[IGNORED]]]))
    assert nothing.compute() == {"miou": 0.0, "pixel_accuracy": 0.0, "loss": 0.0}


@pytest.mark.parametrize("name", ["light", "strong"])
def test_a_map_follows_its_image(name):
    """Of an image that shows its map, each pixel still does, whatever has been cut out, resized and mirrored."""
    rule = ResizeRule("letterbox", 40, 56, pad_rgb=(9, 9, 9))
    varied = segmentation.augmentation(name, rule)
    training = varied.training_rule
    target = torch.zeros(training.height - 11, training.width, dtype=torch.uint8)  # padded below
    target[8:30, 10:60] = 1
    image = torch.full((3, training.height, training.width), 9, dtype=torch.uint8)
    image[:, : target.shape[0]] = torch.where(target == 1, 220, 80)
    shapes, padded = set(), 0
    for seed in range(40):
        got, followed = varied(image, target, seed)
        again, again_followed = varied(image, target, seed)
        assert torch.equal(got, again)
        assert torch.equal(followed, again_followed)
        assert got.shape == (3, 40, 56)
        assert followed.shape == (40, 56)
        level, judged = got.float().mean(dim=0), followed != IGNORED
        middle = (level[judged].min() + level[judged].max()) / 2  # colours change, too
        wrong = ((level > middle) != (followed == 1)) & judged
        assert wrong.float().mean() < 0.01
        assert (got[:, followed == IGNORED] == 9).all()
        padded += bool((followed == IGNORED).any())
        shapes.add(int((followed == 1).sum()))
    assert len(shapes) > 30
    assert 0 < padded < 40


def test_unvaried_images_are_as_in_use_and_text_is_not_mirrored():
    rule = ResizeRule("letterbox", 32, 32)
    assert segmentation.augmentation("none", rule).training_rule == rule
    target = torch.zeros(37, 37, dtype=torch.uint8)
    target[:, :18] = 1
    image = torch.full((3, 37, 37), 200, dtype=torch.uint8)
    sides = {}
    for flip in (True, False):
        varied = segmentation.augmentation("light", rule, flip)
        maps = [varied(image, target, seed)[1] for seed in range(20)]
        sides[flip] = {bool((m[:, :4] == 1).any()) for m in maps}
    assert sides == {True: {True, False}, False: {True}}


def learner_of(name: str, rule: ResizeRule = RULE, mode: str = "scratch"):
    """A learner of two classes with a network of random weights, its family and its card."""
    entry = catalog.entry(name)
    family = entry.family_module()
    network = build_untrained(lambda: family.build_for_training(entry.builder, len(LABELS)))
    card = Card(name, "0" * 12, Task.SEMANTIC, name, LABELS, rule)
    parts = family.parts(network, entry.builder)
    return segmentation.learner(network, parts, card, recipe(mode=mode)), family, card


def step(learner, images: np.ndarray, maps: np.ndarray, mode: str, lr: float = 1e-3) -> dict[str, float]:
    groups = transfer.parameter_groups(learner.network, learner.parts, mode, lr, 0.1, 0.05)
    optimizer = torch.optim.AdamW([{**group, "lr": group["lr"]} for group in groups])
    learner.network.train()
    losses = learner.losses(torch.from_numpy(images), learner.collate([torch.from_numpy(drawn) for drawn in maps]))
    torch.stack([*losses.values()]).sum().backward()
    optimizer.step()
    return {name: float(loss.detach()) for name, loss in losses.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["features", "finetune", "scratch"])
def test_what_is_frozen_stays_bit_by_bit(name, mode):
    learner, family, card = learner_of(name, mode=mode)
    network = learner.network
    images, maps = scenes(2, 48)
    family.wake(network, card, scenes(2, 48, seed=1)[0])  # statistics as after training: finetune keeps them
    transfer.prepare(network, learner.parts, mode)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    losses = step(learner, images, maps, mode)
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert set(losses) == {"cross_entropy", "dice"} | ({"auxiliary"} if hasattr(network, "aux_classifier") else set())
    after = network.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    of_stages = tuple(f"{module}." for stage in learner.parts.stages for module in stage)
    backbone = {key for key in before if key.startswith(of_stages)}
    learned = {key for key, _ in network.named_parameters()}
    statistics = {key for key in before if key.endswith(("running_mean", "running_var"))}
    assert statistics
    if mode == "features":
        assert not changed & backbone
        assert learned - backbone <= changed
        assert statistics - backbone <= changed
    else:
        assert learned <= changed
        assert (statistics & changed) == (set() if mode == "finetune" else statistics)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "drawn",
    [
        pytest.param([], id="no object"),
        pytest.param([(7, 9, 1)], id="one pixel"),
        pytest.param([(7, 9, IGNORED)], id="one pixel ignored"),
    ],
)
def test_images_with_hardly_anything_teach(name, drawn):
    learner, _, _ = learner_of(name, ResizeRule("letterbox", 37, 50))
    images, maps = np.random.default_rng(0).integers(0, 255, (2, 37, 50, 3), np.uint8), np.zeros((2, 37, 50), np.uint8)
    for y, x, value in drawn:
        maps[:, y, x] = value
    transfer.prepare(learner.network, learner.parts, "scratch")
    losses = step(learner, images, maps, "scratch")
    assert all(map(math.isfinite, losses.values()))
    assert (losses["dice"] > 0) == any(value == 1 for _, _, value in drawn)
    assert all(torch.isfinite(parameter.grad).all() for parameter in learner.network.parameters())
    assert not isinstance(learner, HeadLearner)


@pytest.mark.parametrize(
    ("name", "steps", "miou"),
    [
        ("unet", 60, 0.95),
        pytest.param("unet_resnet34", 60, 0.95, marks=pytest.mark.slow),
        ("unet_mobilenet_v2", 60, 0.95),
        pytest.param("fcn_resnet50", 60, 0.75, marks=pytest.mark.slow),  # one answer for eight by eight pixels
        pytest.param("deeplabv3_resnet50", 60, 0.75, marks=pytest.mark.slow),
    ],
)
def test_eight_images_are_learned_by_heart(name, steps, miou):
    learner, _, _ = learner_of(name)
    images, maps = scenes(8, 48)
    pixels, targets = torch.from_numpy(images), learner.collate([torch.from_numpy(drawn) for drawn in maps])
    network = learner.network
    transfer.prepare(network, learner.parts, "scratch")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3 if name == "unet" else 1e-3)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([*learner.losses(pixels, targets).values()]).sum().backward()
        optimizer.step()
    network.eval()
    scores = learner.scores()
    with torch.no_grad():
        scores.update(learner.outputs(pixels), targets)
    assert scores.compute()["miou"] > miou
