"""Augmentation: what is drawn depends on the seed alone; what comes out fits the network and is still the image."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from skimage import data

from models.imaging.geometry import ResizeRule
from models.imaging.prepare import Preparer
from models.learning import augment
from models.learning.augment import augmentation, image_seed
from models.learning.learner import task_module
from models.records import Task
from tasks.photographs import encode_png

RULE = ResizeRule("crop", 56, 56, short_side=64)
TARGET = object()
PNG = encode_png(data.chelsea()[:150, 100:300])


def photograph(rule: ResizeRule) -> torch.Tensor:
    """uint8 [3, height, width]"""
    pixels = np.empty((rule.height, rule.width, 3), np.uint8)
    Preparer(rule).prepare(PNG, pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def varied(name: str, seed: int, rule: ResizeRule = RULE, **options) -> torch.Tensor:
    vary = augmentation(name, rule, **options)
    image, target = vary(photograph(vary.training_rule), TARGET, seed)
    assert target is TARGET
    return image


@pytest.mark.parametrize(
    ("name", "rule", "training"),
    [
        pytest.param("none", RULE, RULE, id="none"),
        pytest.param("light", ResizeRule("crop", 224, 224, 256), ResizeRule("crop", 256, 256, 256), id="light"),
        pytest.param("strong", ResizeRule("crop", 224, 224, 256), ResizeRule("crop", 320, 320, 320), id="strong"),
        pytest.param("light", ResizeRule("crop", 32, 32, 32), ResizeRule("crop", 32, 32, 32), id="nothing to spare"),
        pytest.param("light", ResizeRule("crop", 64, 128, 160), ResizeRule("crop", 80, 160, 160), id="wide"),
        pytest.param("light", ResizeRule("stretch", 56, 84), ResizeRule("stretch", 64, 96), id="stretch"),
        pytest.param("light", ResizeRule("letterbox", 56, 56), ResizeRule("letterbox", 64, 64), id="letterbox"),
        pytest.param(
            "light",
            ResizeRule("crop", 224, 224, 256, "bicubic"),
            ResizeRule("crop", 256, 256, 256, "bicubic"),
            id="bicubic",
        ),
    ],
)
def test_images_are_prepared_with_more_pixels_than_the_network_takes(name, rule, training):
    assert augmentation(name, rule).training_rule == training
    image = varied(name, 0, rule)
    assert (image.shape, image.dtype) == ((3, rule.height, rule.width), torch.uint8)


def test_none_is_what_the_network_is_given_in_use():
    assert torch.equal(varied("none", 1), photograph(RULE))


@pytest.mark.parametrize("name", ["light", "strong"])
def test_the_seed_alone_decides(name):
    torch.manual_seed(1)
    np.random.seed(1)
    first = [varied(name, seed) for seed in range(12)]
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda seed: varied(name, seed), reversed(range(12))))[::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert all(not torch.equal(first[0], other) for other in first[1:])


def test_every_image_and_epoch_has_a_seed_of_its_own_that_never_changes():
    seeds = {image_seed(seed, epoch, index) for seed in range(4) for epoch in range(8) for index in range(32)}
    assert len(seeds) == 4 * 8 * 32
    assert image_seed(0, 1, 2) == 3071860871404845570, "else a resumed training goes on with other images"


@pytest.mark.parametrize("name", ["light", "strong"])
@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_only_where_that_is_allowed(name, flip):
    vary = augmentation(name, RULE, flip)
    rule = vary.training_rule
    ramp = torch.linspace(40, 210, rule.width).to(torch.uint8).expand(3, rule.height, rule.width)  # light on the right
    ends = [vary(ramp, None, seed)[0].float().mean(dim=(0, 1)) for seed in range(60)]
    mirrored = sum(bool(end[5:20].mean() > end[-20:-5].mean()) for end in ends)
    assert 18 < mirrored < 42 if flip else mirrored == 0


def test_strong_changes_more_than_light_and_light_is_moderate():
    plain = photograph(RULE).float()

    def change(name: str) -> float:
        return float(np.mean([(varied(name, seed, flip=False).float() - plain).abs().mean() for seed in range(40)]))

    assert 2 < change("light") < 30
    assert change("strong") > 1.3 * change("light")


def test_a_crop_has_the_share_and_the_proportions_that_were_asked_for():
    drawn = np.random.default_rng(0)
    for _ in range(200):
        top, left, height, width = augment.random_crop(drawn, 100, 200, 0.5, 1.25)
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 200 - width
        assert 0.49 <= height * width / 20000 <= 1
        assert 1 / 1.28 <= (width / height) / 2 <= 1.28
    assert augment.random_crop(drawn, 1, 1, 0.01, 2.0) == (0, 0, 1, 1)


@pytest.mark.parametrize("number", range(len(augment._OPERATIONS)))
def test_every_operation_gives_an_image_that_is_still_seen(number):
    image = photograph(RULE)
    for amount in (-1.0, 0.0, 1.0):
        changed = augment._OPERATIONS[number](image, amount)
        assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)
        assert np.corrcoef(changed.flatten(), image.flatten())[0, 1] > 0.5
    assert torch.equal(image, photograph(RULE)), "the prepared image is cached, and must stay as it is"


def test_the_prepared_image_stays_as_it_is():
    vary = augmentation("strong", RULE)
    image = photograph(vary.training_rule)
    for seed in range(20):
        vary(image, None, seed)
    assert torch.equal(image, photograph(vary.training_rule))


def test_classifiers_vary_their_images_so():
    assert task_module(Task.CLASSIFY).augmentation is augmentation
