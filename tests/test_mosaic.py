"""Several images in one: objects and pixels follow each other, what is drawn depends on seed, epoch and place alone."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from models.imaging.geometry import ResizeRule
from models.learning import detection, samples
from models.learning.augment import Changing, Mixing, image_seed
from models.learning.loading import ImageBatches, Part
from models.learning.mosaic import Shown, mixed_up, mosaic, random_warp, warp
from models.learning.moved_objects import cut_out, framed, mirrored, resized
from models.learning.multi_scale import at_random_scale
from models.learning.order import epoch_order, repeat_factors
from models.learning.samples import PreparedImages, Samples
from tasks.photographs import encode_png
from tests.tiny_learning import Files, tiny_learner

RULE = ResizeRule("letterbox", 64, 64, pad_rgb=(0, 0, 0))
BOX = (20, 12, 44, 30)


def rectangle(box=BOX, size_hw=(60, 73), with_mask=True, value=255) -> Shown:
    """A dark image with one light rectangle, and its target."""
    image = torch.zeros(3, *size_hw, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = value
    target = {
        "boxes_xyxy": torch.tensor([box], dtype=torch.float32),
        "labels": torch.tensor([2]),
        "ignored": torch.tensor([False]),
        "difficult": torch.tensor([False]),
    }
    return Shown(image, target | {"masks": image[:1] > 0} if with_mask else target)


def without_objects(shown: Shown) -> Shown:
    return Shown(torch.zeros_like(shown.image), {name: value[:0] for name, value in shown.target.items()})


def extent(image: Tensor) -> list[int]:
    """Of what is at least half as light as the lightest."""
    grey = image.float().mean(dim=0).numpy()
    rows, columns = np.nonzero(grey > grey.max() / 2)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def thicker(mask: Tensor) -> Tensor:
    """By a pixel all around."""
    return max_pool2d(mask[None].float(), 3, stride=1, padding=1)[0] > 0


def assert_follows(shown: Shown) -> None:
    np.testing.assert_allclose(shown.target["boxes_xyxy"][0].numpy(), extent(shown.image), atol=1.01)
    if "masks" in shown.target:
        mask, grey = shown.target["masks"][0], shown.image.float().mean(dim=0)
        light = grey > grey.max() / 2
        assert not (mask & ~thicker(light)).any()
        assert not (light & ~thicker(mask)).any()
        assert torch.equal(framed(shown.target["masks"]), shown.target["boxes_xyxy"])


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "box"])
@pytest.mark.parametrize("place", range(4))
def test_objects_of_a_mosaic_lie_where_their_pixels_do(place, with_mask):
    seen = 0
    for seed in range(30):
        one = rectangle(with_mask=with_mask)
        four = [without_objects(one)] * 4
        four[place] = one
        shown = mosaic(np.random.default_rng(seed), four, RULE, 8 / 7, (0.6, 1.2))
        assert shown.image.shape == (3, 64, 64)
        if len(shown.target["labels"]):
            assert_follows(shown)
            seen += 1
    assert seen > 10


def test_the_parts_of_a_mosaic_fill_the_image_where_they_are_large_enough():
    white = Shown(torch.full((3, 90, 90), 255, dtype=torch.uint8), without_objects(rectangle(with_mask=False)).target)
    for seed in range(20):
        image, _ = mosaic(np.random.default_rng(seed), [white] * 4, RULE, 1.0, (1.0, 1.4))
        assert (image == 255).all()


def test_small_parts_of_a_mosaic_meet():
    nothing = without_objects(rectangle(with_mask=False)).target
    levels = [[60, 120], [180, 240]]
    four = [Shown(torch.full((3, 40, 40), level, dtype=torch.uint8), nothing) for row in levels for level in row]
    for seed in range(20):
        image, _ = mosaic(np.random.default_rng(seed), four, RULE, 1.0, (0.2, 0.4))
        blocks = image[0].unfold(0, 2, 1).unfold(1, 2, 1)  # [63, 63, 2, 2]
        assert (blocks == torch.tensor(levels)).flatten(2).all(dim=2).sum() == 1


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "box"])
def test_warped_objects_lie_where_their_pixels_do(with_mask):
    for seed in range(20):
        one = rectangle(size_hw=(64, 64), with_mask=with_mask)
        matrix = random_warp(np.random.default_rng(seed), 20.0, 5.0, (64, 64))
        shown = warp(one, matrix, RULE.pad_rgb)
        assert_follows(shown)
    assert not np.allclose(shown.target["boxes_xyxy"].numpy(), [BOX], atol=0.5)


def test_an_image_is_turned_around_its_centre():
    one = rectangle((22, 22, 42, 42), (64, 64))
    for seed in range(20):
        (box,) = warp(one, random_warp(np.random.default_rng(seed), 20.0, 5.0, (64, 64)), (0, 0, 0)).target[
            "boxes_xyxy"
        ]
        np.testing.assert_allclose(((box[:2] + box[2:]) / 2).numpy(), [32, 32], atol=1)


def test_a_mask_at_the_border_is_not_drawn_out():
    found = warp(rectangle((0, 12, 10, 30)), np.array([[1.0, 0, 15], [0, 1, 0]]), (0, 0, 0)).target
    assert found["boxes_xyxy"].tolist() == [[15, 12, 25, 30]]


def test_a_resized_mask_is_what_the_mask_is_at_the_centres_of_its_pixels():
    row = torch.tensor([True, False, True, False])
    assert resized(row.expand(1, 4, 4), (4, 2)).tolist() == [[[False, False]] * 4]
    assert torch.equal(resized(row.expand(1, 4, 4), (4, 8))[0, 0], row.repeat_interleave(2))


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        pytest.param((0, 0, 60, 73), 1, id="all"),
        pytest.param((0, 32, 60, 20), 1, id="half"),
        pytest.param((0, 41, 60, 20), 0, id="an eighth"),
        pytest.param((40, 0, 10, 73), 0, id="none"),
    ],
)
def test_masks_follow_a_cut(cut, kept):
    image, target = rectangle()
    found = cut_out(target, *cut, (120, 100))
    assert [len(value) for value in found.values()] == [kept] * 5
    assert found["masks"].shape[1:] == (120, 100)
    if kept:
        top, left, height, width = cut
        part = image[:, top : top + height, left : left + width] > 0
        assert torch.equal(found["masks"], resized(part[:1], (120, 100)))
        assert torch.equal(found["boxes_xyxy"], framed(found["masks"]))


def test_what_shows_is_judged_by_the_mask_and_not_by_its_box():
    _, target = rectangle()
    target["masks"][0, :, 22:] = False  # a thin object at the left of its box
    assert len(cut_out(target, 0, 23, 60, 50, (60, 50))["labels"]) == 0
    assert cut_out(target, 0, 0, 60, 30, (60, 30))["boxes_xyxy"].tolist() == [[20, 12, 22, 30]]
    target["masks"][0, 13, 22:44] = True  # and a hair to the right
    assert len(cut_out(target, 0, 30, 60, 43, (60, 43))["labels"]) == 0


@pytest.mark.parametrize("with_mask", [True, False], ids=["empty mask", "box alone"])
def test_ignored_regions_survive(with_mask):
    _, target = rectangle(with_mask=with_mask)
    target["ignored"][0] = True
    if with_mask:
        target["masks"][:] = False
    assert cut_out(target, 0, 41, 60, 20, (60, 20))["boxes_xyxy"].tolist() == [[0, 12, 3, 30]]
    turned = warp(
        Shown(torch.zeros(3, 60, 73, dtype=torch.uint8), target), np.array([[1.0, 0, 50], [0, 1, 0]]), (0, 0, 0)
    )
    assert turned.target["boxes_xyxy"].tolist() == [[70, 12, 73, 30]]


def test_masks_are_mirrored():
    _, target = rectangle()
    found = mirrored(target, 73)
    assert torch.equal(framed(found["masks"]), found["boxes_xyxy"])
    assert found["boxes_xyxy"].tolist() == [[29, 12, 53, 30]]


def test_mixed_images_show_both():
    one, other = rectangle(size_hw=(64, 64)), rectangle((2, 40, 12, 60), (64, 64))
    image, target = mixed_up(np.random.default_rng(0), one, other)
    assert target["boxes_xyxy"].tolist() == [list(BOX), [2, 40, 12, 60]]
    assert 60 < image[0, 20, 30] < 195
    assert 60 < image[0, 50, 5] < 195
    assert image[0, 0, 0] == 0


# Batches at other sizes


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "box"])
def test_objects_follow_a_batch_to_another_size(with_mask):
    one = rectangle(size_hw=(96, 128), with_mask=with_mask)
    sizes = set()
    torch.manual_seed(0)
    for _ in range(30):
        images, targets = at_random_scale(torch.stack([one.image.permute(1, 2, 0)] * 2), [one.target] * 2, 32, 0.6, 1.4)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        sizes.add(tuple(images.shape[1:3]))
        for image, target in zip(images, targets, strict=True):
            assert_follows(Shown(image.permute(2, 0, 1), target))
    assert sizes == {(64, 96), (96, 128), (128, 160)}
    assert one.target["boxes_xyxy"].tolist() == [list(BOX)]


@pytest.mark.parametrize(
    ("side", "sizes"),
    [(320, {224, 256, 288, 320, 352, 384, 416}), (96, {64, 96, 128}), (32, {32}), (40, {32})],
    ids=str,
)
def test_the_sizes_are_multiples_that_a_network_takes(side, sizes):
    torch.manual_seed(0)
    empty = without_objects(rectangle()).target
    seen = {at_random_scale(torch.zeros(1, side, side, 3, dtype=torch.uint8), [empty])[0].shape[1] for _ in range(80)}
    assert seen == sizes


def test_the_size_is_drawn_from_the_seeded_generator():
    def drawn() -> list[int]:
        torch.manual_seed(5)
        images = torch.zeros(1, 320, 320, 3, dtype=torch.uint8)
        return [at_random_scale(images, [without_objects(rectangle()).target])[0].shape[1] for _ in range(8)]

    assert drawn() == drawn()
    assert len(set(drawn())) > 2


# Which images, and when


@pytest.mark.parametrize(
    ("name", "mosaics", "mixed"), [("light", (0.35, 0.65), (0, 0)), ("strong", (0.65, 0.95), (0.05, 0.3))]
)
def test_how_many_images_are_asked_for(name, mosaics, mixed):
    vary = detection.augmentation(name, RULE, mosaic=True)
    assert isinstance(vary, Mixing)
    wanted = [vary.partners(image_seed(0, 0, index), 5) for index in range(200)]
    assert {number for numbers in wanted for number in numbers} == set(range(5))
    sizes = Counter(len(numbers) for numbers in wanted)
    assert mosaics[0] <= (sizes[3] + sizes[4]) / 200 <= mosaics[1]
    assert mixed[0] <= (sizes[1] + sizes[4]) / 200 <= mixed[1]


@pytest.mark.parametrize(("epochs", "first_closed"), [(1, 1), (2, 1), (3, 2), (10, 8), (20, 17), (100, 85)], ids=str)
def test_mosaics_end_before_the_training_does(epochs, first_closed):
    vary = detection.augmentation("light", RULE, mosaic=True)
    assert isinstance(vary, Changing)
    mixing = [isinstance(vary.at_epoch(epoch, epochs), Mixing) for epoch in range(epochs)]
    assert mixing == [epoch < first_closed for epoch in range(epochs)]
    assert {vary.at_epoch(epoch, epochs).training_rule for epoch in range(epochs)} == {vary.training_rule}


def test_there_is_no_mosaic_without_variation_or_where_it_is_not_asked_for():
    assert not isinstance(detection.augmentation("none", RULE, mosaic=True), Mixing)
    assert not isinstance(detection.augmentation("strong", RULE), Mixing)


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "box"])
@pytest.mark.parametrize("name", ["light", "strong"])
def test_the_whole_variation_moves_boxes_as_it_moves_pixels(name, with_mask):
    vary = detection.augmentation(name, RULE, mosaic=True)
    rule = vary.training_rule
    one = rectangle((30, 20, 54, 40), (rule.height - 9, rule.width), with_mask)
    if with_mask:  # a target lies in the padded image
        one.target["masks"] = torch.nn.functional.pad(one.target["masks"], (0, 0, 0, 9))
    nothing = without_objects(one)
    seen = 0
    for seed in range(60):
        image, target = vary(one.image, one.target, seed, [nothing] * len(vary.partners(seed, 9)))
        again, _ = vary(one.image, one.target, seed, [nothing] * len(vary.partners(seed, 9)))
        assert torch.equal(image, again)
        assert (image.shape, image.dtype) == ((3, 64, 64), torch.uint8)
        if len(target["labels"]):
            assert_follows(Shown(image, target))
            seen += 1
    assert seen > 25
    assert extent(one.image) == [30, 20, 54, 40], "the prepared image is cached, and must stay as it is"


def test_an_image_that_is_seen_alone_keeps_its_proportions():
    vary = detection.augmentation("light", RULE, mosaic=True)
    one = rectangle((10, 10, 26, 26), (36, 73), with_mask=False)
    alone = [seed for seed in range(40) if not vary.partners(seed, 9)]
    boxes = [vary(one.image, one.target, seed)[1]["boxes_xyxy"] for seed in alone]
    sides = [(box[2:] - box[:2]).tolist() for found in boxes for box in found if box.min() > 0 and box.max() < 64]
    assert len(sides) > 5
    assert all(0.8 < width / height < 1.25 for width, height in sides)


class Recording:
    """A Mixing Augmentation that changes nothing, and notes what it is given."""

    def __init__(self):
        self.training_rule = RULE
        self.shapes: set[tuple[int, ...]] = set()
        self.seeds: list[int] = []
        self.partners_of: dict[int, list[int]] = {}

    def partners(self, seed, count):
        return [seed % count, seed // count % count]

    def __call__(self, image, target, seed, partners=()):
        self.shapes |= {tuple(each.shape) for each in (image, *(partner for partner, _ in partners))}
        self.partners_of[int(target["labels"])] = [int(of_partner["labels"]) for _, of_partner in partners]
        self.seeds.append(seed)
        return image.new_zeros(3, 64, 64), target


def test_what_a_mixing_augmentation_is_given():
    scene = replace(scenes(30), augmentation=Recording())
    epoch_of(scene, 0)
    given = scene.augmentation
    order = epoch_order(30, 7, 0).tolist()
    assert given.shapes == {(3, 40, 64)}, "without padding"
    assert len(set(given.seeds)) == 30
    for position, index in enumerate(order):
        numbers = given.partners(image_seed(7, 0, index), 30)
        assert given.partners_of[index] == [order[(position - 1 - number) % 30] for number in numbers]


@dataclass(frozen=True)
class Counted:
    """Reads what it holds, and counts."""

    files: Files
    times: Counter

    def __call__(self, index: int) -> bytes:
        self.times[index] += 1
        return self.files(index)


def scenes(count: int, name="strong") -> Samples:
    """Images of as many levels of grey, no two alike, and of the size of wide photographs."""
    files = [encode_png(np.full((40, 64, 3), 255 * (number + 1) // count, np.uint8)) for number in range(count)]
    target = {**rectangle(with_mask=False).target}
    return Samples(
        names=[f"/{number}.png" for number in range(count)],
        targets=[target | {"labels": torch.tensor([number])} for number in range(count)],
        read=Counted(Files(tuple(files)), Counter()),
        rule=RULE,
        augmentation=detection.augmentation(name, RULE, mosaic=True),
        placed=lambda target, geometry, size_hw: target,
    )


def epoch_of(scene: Samples, epoch: int, threads=1, memory=2**30, epochs=4, batch_size=4) -> list[bytes]:
    """All that the network is given in one epoch."""
    learner = tiny_learner()
    learner.collate = list
    batches = ImageBatches(learner, scene, torch.device("cpu"), 7, threads, memory, epochs)
    seen = []
    for update in batches.training(epoch, batch_size, 1, False, Part()):
        for inputs, targets in ((batch.inputs, batch.targets) for batch in update):
            seen += [image.numpy().tobytes() for image in inputs]
            seen += [target[key].numpy().tobytes() for target in targets for key in ("boxes_xyxy", "labels")]
    batches.close()
    return seen


@pytest.mark.parametrize("memory", [2**30, 3 * 100**2 * 5, 0], ids=["plenty", "five images", "none"])
def test_neither_threads_nor_memory_nor_earlier_epochs_change_a_mosaic(memory):
    expected = [epoch_of(scenes(9), epoch) for epoch in (1, 2)]
    assert expected[0] != expected[1]
    assert epoch_of(scenes(9), 2, threads=4, memory=memory) == expected[1], "as after a restart"
    assert epoch_of(scenes(9), 1, threads=3, memory=memory) == expected[0]


def test_the_last_epoch_shows_each_image_alone():
    learner = tiny_learner()
    learner.collate = list
    counts = {}
    for epoch in (0, 3):
        batches = ImageBatches(learner, scenes(9), torch.device("cpu"), 0, 1, 2**30, 4)
        counts[epoch] = [
            set(target["labels"].tolist()) <= {int(index)}
            for update in batches.training(epoch, 3, 1, False, Part())
            for batch in update
            for index, target in zip(batch.indices, batch.targets, strict=True)
        ]
        batches.close()
    assert all(counts[3])
    assert not all(counts[0])


def test_a_single_image_is_its_own_partner():
    seen = epoch_of(scenes(1), 0)
    assert len(seen) == 3


def test_images_drawn_just_before_are_still_in_memory():
    count = 400
    scene = scenes(count, "light")
    room = 3 * samples.NEIGHBOURS
    assert scene.augmentation is not None
    side = scene.augmentation.training_rule.height
    epoch_of(scene, 0, memory=room * side * side * 3, batch_size=8)
    again = sum(scene.read.times.values()) - count
    assert again <= samples.NEIGHBOURS, "only those that the first images are mixed with"


def test_the_padding_of_a_letterbox_is_left_out_for_what_is_mixed():
    images = PreparedImages(scenes(1), 0)
    whole, _ = images.get(0)
    part, _ = images.get(0, padded=False)
    side = images.samples.prepared_rule.height
    assert (whole.shape, part.shape) == ((side, side, 3), (round(side * 40 / 64), side, 3))
    assert (part == whole[: len(part)]).all()
    assert not whole[len(part) :].any()


# Rare classes


@pytest.mark.parametrize(
    ("labels", "factors"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([[], []], [1, 1], id="no objects"),
        pytest.param([["a"], ["a", "a"]], [1, 1], id="one class"),
        pytest.param([["a"]] * 3 + [["a", "b"], []], [1, 1, 1, 2, 1], id="the rarest class of an image counts"),
        pytest.param([[0, 0, 0, 1], [0, 1]], [1, 1], id="images count, not objects"),
    ],
)
def test_repeat_factors(labels, factors):
    assert repeat_factors(labels) == factors


def test_images_come_in_proportion_to_their_repeats():
    repeats = [1.0] * 30 + [3.0] * 10
    orders = [epoch_order(40, 0, epoch, repeats=repeats) for epoch in range(60)]
    assert {len(order) for order in orders} == {40}
    times = np.bincount(np.concatenate(orders), minlength=40) / 60
    np.testing.assert_allclose(times[:30].mean(), 40 / 60, rtol=0.03)
    np.testing.assert_allclose(times[30:].mean(), 120 / 60, rtol=0.03)
    assert times[:30].min() > 0.4, "none is left out for long"
    assert np.array_equal(orders[3], epoch_order(40, 0, 3, repeats=repeats))
    assert sorted(epoch_order(5, 0, 0, repeats=[1.0] * 5)) == list(range(5))
