"""Copies of an image are found; other images are not taken for copies, however alike they look when small."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from models.imaging.perceptual_hash import LEAST_DETAIL, SIDE, SIGNATURE, THUMBNAIL_RULE, are_copies, signature
from models.imaging.prepare import Preparer
from models.near_duplicates import Groups, near_duplicates
from tests.odd_images import encode, photograph


def signatures(images: list[Image.Image | bytes]) -> np.ndarray:
    """SIGNATURE [n], by way of files."""
    preparer = Preparer(THUMBNAIL_RULE)
    found = []
    for image in images:
        thumbnail = np.empty((SIDE, SIDE, 3), np.uint8)
        preparer.prepare(image if isinstance(image, bytes) else encode(image, "PNG"), thumbnail)
        found.append(signature(thumbnail))
    return np.array(found, SIGNATURE)


def grouped(images: list[Image.Image | bytes]) -> bool:
    """Whether any two are found to be copies."""
    return bool(list(near_duplicates(signatures(images))))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encode(image.convert("RGB"), "JPEG", quality=quality)))


def field(seed: int) -> Image.Image:
    """A dark microscope field: the same shading and noise in all, and bright spots elsewhere in each."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:240, :320]
    level = 14 + 10 * np.exp(-((x - 160) ** 2 + (y - 120) ** 2) / 20000) + random.normal(0, 1.5, x.shape)
    for centre_y, centre_x in random.uniform((10, 10), (230, 310), (25, 2)):
        level += 60 * np.exp(-((x - centre_x) ** 2 + (y - centre_y) ** 2) / 60)
    return Image.fromarray(np.clip(level, 0, 255).astype(np.uint8))


def shaded(seed: int) -> Image.Image:
    """The same strong shading in all, and faint spots elsewhere in each."""
    faint = np.asarray(field(seed), np.float32) * 0.35
    return Image.fromarray((np.linspace(10, 220, 320) + faint).clip(0, 255).astype(np.uint8))


def lit_from(left: float, right: float) -> Image.Image:
    light = np.linspace(left, right, photograph().width)[:, np.newaxis]  # grey levels
    return Image.fromarray((np.asarray(photograph()) * 0.6 + 40 + light).astype(np.uint8))


def square(colour: str, at: int = 60, side: int = 80) -> Image.Image:
    image = Image.new("RGB", (200, 200), "white")
    image.paste(colour, (at, at, at + side, at + side))
    return image


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": lambda image: jpeg(image, 50),
    "re-encoded at quality 75": lambda image: jpeg(image, 75),
    "half as large": lambda image: jpeg(half(image), 85),
    "a third as large": lambda image: image.resize((image.width // 3, image.height // 3), Image.Resampling.BILINEAR),
    "twice as large": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "10 % brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.1), 90),
    "10 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.1),
}
ORIGINALS: dict[str, Callable[[], Image.Image]] = {
    "photograph": photograph,
    "dark field": lambda: field(0),
    "drawing": lambda: square("steelblue"),
}


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found(original, copy):
    image = ORIGINALS[original]()
    assert grouped([COPIES[copy](image), field(99), image])


@pytest.mark.parametrize(
    "images",
    [
        pytest.param([], id="no image"),
        pytest.param([photograph()], id="one image"),
        pytest.param([field(seed) for seed in range(40)], id="dark microscope fields"),
        pytest.param([shaded(seed) for seed in range(20)], id="faint spots under one strong shading"),
        pytest.param([photograph(), ImageOps.mirror(photograph())], id="mirrored"),
        pytest.param([photograph(), ImageOps.invert(photograph())], id="inverted"),
        pytest.param([photograph(), photograph().crop((60, 40, 451, 300))], id="cropped"),
        pytest.param([square("red"), square("blue"), square("#4C4C4C")], id="colours of one brightness"),
        pytest.param([square("black"), square("#C0C0C0")], id="black and silver"),
        pytest.param([square("black"), square("black", 75)], id="elsewhere"),
        pytest.param([square("black"), square("black", 60, 90)], id="larger"),
        pytest.param([Image.new("RGB", (90, 90), "grey"), Image.new("RGB", (80, 90), "grey")], id="flat"),
        pytest.param(
            [Image.linear_gradient("L"), Image.linear_gradient("L").resize((200, 200))], id="nothing but shading"
        ),
        pytest.param(
            [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)) for seed in range(30)],
            id="noise",
        ),
    ],
)
def test_others_are_not(images):
    assert not grouped(images)


@pytest.mark.parametrize("side", [8, 64])
def test_no_two_of_1797_digits_are_copies(side):
    from sklearn.datasets import load_digits

    digits = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in load_digits().images]
    found = signatures([digit.resize((side, side), Image.Resampling.BICUBIC) for digit in digits])
    assert (found["detail"] > LEAST_DETAIL).all()
    assert not list(near_duplicates(found))


def test_every_copy_among_many_is_found():
    fields = [field(seed) for seed in range(30)]
    found = signatures([*fields, *(jpeg(image, 60) for image in fields)])
    assert {(min(pair), max(pair)) for pair in near_duplicates(found)} == {(index, index + 30) for index in range(30)}


def test_what_shares_a_word_with_a_thousand_is_still_told_apart():
    crowd = np.repeat(signatures([field(0)]), 1000)
    crowd["position"] = np.linspace(-0.9, 0.9, 1000)
    crowd["grey"] = np.random.default_rng(0).integers(-127, 128, crowd["grey"].shape)
    crowd[[456, 457]] = crowd[456]
    assert {tuple(sorted(pair)) for pair in near_duplicates(crowd)} == {(456, 457)}


def test_being_a_copy_does_not_depend_on_the_order():
    pair = signatures([photograph(), jpeg(photograph(), 40)])
    assert are_copies(pair[:1], pair[1:]) == are_copies(pair[1:], pair[:1]) == [True]


def test_what_has_too_little_detail_is_a_copy_of_nothing():
    flat = signatures([Image.new("RGB", (90, 90), "grey")])
    assert not are_copies(flat, flat).any()


def test_the_same_under_other_light_is_another_image():
    even, left, right = signatures([lit_from(0, 0), lit_from(10, -10), lit_from(1, -1)])[:, np.newaxis]
    assert not are_copies(even, left)
    assert are_copies(even, right)


def test_groups_are_closed_under_chains():
    groups = Groups(6)
    for left, right in ((4, 3), (1, 4), (5, 5)):
        groups.join(left, right)
    assert [groups.root(member) for member in range(6)] == [0, 1, 2, 1, 1, 5]
