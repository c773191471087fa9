"""models/imaging: from the bytes of any file to the model's input, or to one reason."""

import io
import itertools
import logging
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from odd_images import OddImage, encode, odd_images, photograph
from PIL import Image, ImageFile

from models.errors import Rejected
from models.imaging import resize as resize_module
from models.imaging.boxes import boxes_xyxy_to_original
from models.imaging.geometry import Geometry, ResizeRule, Span, geometry_of, spans_yx
from models.imaging.jpeg_header import read_jpeg_header
from models.imaging.jpeg_mend import mend
from models.imaging.orientation import exif_orientation
from models.imaging.prepare import Limits, Preparer
from models.imaging.resize import resize, resize_with_pillow
from models.records import Status

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CLASSIFIER = ResizeRule("crop", 224, 224, 256)


def prepared(data: bytes, rule: ResizeRule) -> tuple[NDArray[np.uint8], Geometry]:
    out = np.full((rule.height, rule.width, 3), 77, np.uint8)
    return out, Preparer(rule).prepare(data, out)


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


# Of odd files: one body for all of them.


@pytest.mark.parametrize("odd", odd_images(), ids=lambda odd: odd.name)
def test_odd_image(odd: OddImage, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    if odd.status == Status.OK:
        assert odd.pixels is not None
        height, width = odd.pixels.shape[:2]
        out, geometry = prepared(odd.data, ResizeRule("stretch", height, width))  # so no pixel is changed
        assert geometry == Geometry(width, height, 1.0, 1.0, 0.0, 0.0)
        # quality 100 is not lossless, and Pillow's conversions round where ours do not
        assert difference(out, odd.pixels) <= (6 if odd.name.startswith("orientation") and "jpg" in odd.name else 2)
    else:
        with pytest.raises(Rejected) as rejected:
            prepared(odd.data, CLASSIFIER)
        assert rejected.value.status == odd.status
        assert odd.reason in rejected.value.reason
        assert "\n" not in rejected.value.reason
        assert " at 0x" not in rejected.value.reason
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_odd_names_are_unique() -> None:
    names = [odd.name for odd in odd_images()]
    assert len(set(names)) == len(names)


def test_padding_does_not_swallow_the_last_byte_of_the_scan() -> None:
    """A scan may end in 0xFF, which is written 0xFF 0."""
    noise = np.random.default_rng(0)
    pictures = (Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(3000))
    files = [data for picture in pictures if (data := encode(picture, "JPEG")).endswith(b"\xff\0\xff\xd9")]
    assert files
    for data in files:
        padded = data[:-2] + b"\0\0\0" + data[-2:]
        assert mend(padded, read_jpeg_header(padded), "3 extraneous bytes before marker 0xd9") == data


def test_pillow_is_left_as_it_was() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert logging.getLogger("PIL").level == logging.NOTSET


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_limits_are_those_given(kind: str) -> None:
    data = encode(photograph(), kind)
    out = np.empty((224, 224, 3), np.uint8)
    Preparer(CLASSIFIER, Limits(max_pixels=451 * 300)).prepare(data, out)
    with pytest.raises(Rejected, match="451×300 pixels; the limit is 135,299 pixels"):
        Preparer(CLASSIFIER, Limits(max_pixels=451 * 300 - 1)).prepare(data, out)


def test_scans_are_counted_in_the_first_image_only() -> None:
    data = encode(photograph(), "JPEG", progressive=True)
    out = np.empty((224, 224, 3), np.uint8)
    Preparer(CLASSIFIER, Limits(max_jpeg_scans=10)).prepare(data + b"\xff\xda" * 200, out)
    with pytest.raises(Rejected, match="more than 9 JPEG scans"):
        Preparer(CLASSIFIER, Limits(max_jpeg_scans=9)).prepare(data, out)


def test_a_wrong_output_array_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"\(224, 224, 3\)"):
        Preparer(CLASSIFIER).prepare(b"", np.empty((224, 225, 3), np.uint8))


def test_memory_is_reused_and_given_back() -> None:
    preparer = Preparer(CLASSIFIER)
    out = np.empty((224, 224, 3), np.uint8)
    small = encode(photograph(), "JPEG")
    huge = encode(Image.new("RGB", (6000, 4000)), "JPEG")
    preparer.prepare(small, out)
    tracemalloc.start()
    for _ in range(20):
        preparer.prepare(small, out)
    grown, peak_small = tracemalloc.get_traced_memory()
    preparer.prepare(huge, out)
    held, peak_huge = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 100_000
    assert peak_small < 451 * 300 * 3  # the buffer of the first call serves all others
    assert 72e6 <= peak_huge < 80e6  # one copy of its pixels
    assert held < 100_000


# Resizing, against Pillow.


def reference(pixels: NDArray[np.uint8], rule: ResizeRule) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """What torchvision's Resize and CenterCrop, or a letterbox, do with Pillow; and the size in between."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if rule.mode == "stretch":
        size, box = (rule.width, rule.height), None
    elif rule.mode == "letterbox":
        scale = min(rule.height / height, rule.width / width)
        size, box = (max(1, round(width * scale)), max(1, round(height * scale))), None
    else:
        assert rule.short_side
        short, long = sorted(image.size)
        long = int(rule.short_side * long / short)
        size = (rule.short_side, long) if width <= height else (long, rule.short_side)
        left, top = int(round((size[0] - rule.width) / 2.0)), int(round((size[1] - rule.height) / 2.0))  # noqa: RUF046
        box = (left, top, left + rule.width, top + rule.height)
    image = image.resize(size, PILLOW[rule.interpolation])
    image = image.crop(box) if box else image
    canvas = Image.new("RGB", (rule.width, rule.height), rule.pad_rgb)
    canvas.paste(image)
    return np.asarray(canvas), size


RULES = {
    "classifier": CLASSIFIER,
    "short-side-is-the-crop": ResizeRule("crop", 64, 64, 64),
    "wide-crop": ResizeRule("crop", 33, 97, 101),
    "detector": ResizeRule("letterbox", 320, 320, pad_rgb=(114, 115, 116)),
    "wide-detector": ResizeRule("letterbox", 96, 250, pad_rgb=(1, 2, 3)),
    "stretch": ResizeRule("stretch", 120, 90),
    "one-pixel": ResizeRule("stretch", 1, 1),
}
SIZES_HW = [
    (1, 1),
    (1, 2),
    (3, 2),
    (7, 13),
    (64, 64),
    (61, 97),
    (256, 256),
    (300, 451),
    (509, 331),
    (16, 1500),
    (1500, 14),
]


def contents(height: int, width: int) -> dict[str, NDArray[np.uint8]]:
    """What a resize can get wrong most: noise, black and white, and a real photograph."""
    noise = np.random.default_rng(height * 10_000 + width)
    cat = photograph().resize((width, height), Image.Resampling.NEAREST)
    return {
        "noise": noise.integers(0, 256, (height, width, 3), np.uint8),
        "black and white": noise.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255),
        "photograph": np.ascontiguousarray(cat),
    }


@pytest.mark.parametrize("kernel", ["compiled", "pillow"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_resize_is_pillows(rule: ResizeRule, interpolation: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "pillow":
        monkeypatch.setattr(resize_module, "_resize", None)
    else:
        assert resize_module._resize is not None, "build it: pip install -e ."
    rule = ResizeRule(rule.mode, rule.height, rule.width, rule.short_side, interpolation, rule.pad_rgb)  # type: ignore[arg-type]
    for height, width in SIZES_HW:
        for content, pixels in contents(height, width).items():
            out, geometry = prepared(encode(Image.fromarray(pixels), "BMP"), rule)
            expected, (scaled_width, scaled_height) = reference(pixels, rule)
            allowed = 1 if interpolation == "bilinear" and kernel == "compiled" else 0
            assert difference(out, expected) <= allowed, (height, width, content)
            assert geometry.scale_x == scaled_width / width
            assert geometry.scale_y == scaled_height / height


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size_hw", [(4000, 6000), (8000, 16), (16, 8000)], ids=["24-megapixels", "pole", "strip"])
def test_resize_of_large_images_is_pillows(size_hw: tuple[int, int], interpolation: str) -> None:
    rule = ResizeRule("crop", 224, 224, 256, interpolation)  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)
    y, x = spans_yx(rule, *size_hw)
    out = np.empty((224, 224, 3), np.uint8)
    resize(pixels, y, x, rule.interpolation, out)
    assert difference(out, reference(pixels, rule)[0]) <= (interpolation == "bilinear")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kernel", ["compiled", "pillow"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_comes_before_resizing(
    orientation: int, kernel: str, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is computed: a crop with an odd margin, and the order of bicubic's passes, would show it."""
    if kernel == "pillow":
        monkeypatch.setattr(resize_module, "_resize", None)
    rule = ResizeRule("crop", 64, 64, 67, interpolation)  # type: ignore[arg-type]
    upright = contents(123, 201)["black and white"]
    turned = next(odd for odd in odd_images() if odd.name == f"orientation-{orientation}.png")
    tags = Image.open(io.BytesIO(turned.data)).getexif()
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # of Image.Transpose
    image = Image.fromarray(upright)
    stored = image if inverse is None else image.transpose(Image.Transpose(inverse))
    out, geometry = prepared(encode(stored, "PNG", exif=tags), rule)
    assert (geometry.width, geometry.height) == (201, 123)
    assert difference(out, reference(upright, rule)[0]) <= (interpolation == "bilinear")


BAD_SPANS = {
    "nothing-kept": ((8, 0, 0), (8, 0, 8)),
    "beyond-the-end": ((8, 1, 8), (8, 0, 8)),
    "before-the-start": ((8, -1, 4), (8, 0, 8)),
    "scaled-to-nothing": ((0, 0, 1), (8, 0, 8)),
    "out-of-another-height": ((8, 0, 7), (8, 0, 8)),
    "out-of-another-width": ((8, 0, 8), (9, 0, 9)),
    "overflow": ((8, 2**31 - 1, 8), (8, 0, 8)),
}


@pytest.mark.parametrize(("y", "x"), BAD_SPANS.values(), ids=BAD_SPANS)
def test_the_kernel_reads_and_writes_within_bounds(y: tuple[int, int, int], x: tuple[int, int, int]) -> None:
    kernel = resize_module._resize
    source, out = np.zeros((10, 10, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    kernel.resize(source, (10, 10), (8, 0, 8), (8, 0, 8), False, False, out)
    with pytest.raises(ValueError, match=r"a span is|out is"):
        kernel.resize(source, (10, 10), y, x, False, False, out)


@pytest.mark.parametrize(
    ("source", "size_hw", "out"),
    [
        (np.zeros((10, 10, 3), np.uint8), (10, 11), np.zeros((8, 8, 3), np.uint8)),
        (np.zeros((10, 10, 3), np.uint8), (0, 10), np.zeros((8, 8, 3), np.uint8)),
        (np.zeros((10, 10, 3), np.uint8), (-1, -1), np.zeros((8, 8, 3), np.uint8)),
        (np.zeros((10, 10, 3), np.uint8), (10, 10), np.zeros((8, 8, 3), np.uint16)),
        (np.zeros((10, 10, 3), np.uint8), (10, 10), np.zeros((8, 8, 4), np.uint8)[:, :, :3]),
        (np.zeros((10, 10, 3), np.uint8), (10, 10), np.zeros((8, 8, 3), np.uint8).transpose(1, 0, 2)),
        (np.zeros((10, 20, 3), np.uint8)[:, ::2], (10, 10), np.zeros((8, 8, 3), np.uint8)),
        (b"short", (10, 10), np.zeros((8, 8, 3), np.uint8)),
        (np.zeros((10, 10, 3), np.uint8), (10, 10), bytes(192)),
    ],
    ids=["too-few", "no-rows", "negative", "16-bit", "gaps", "lying", "every-second", "bytes", "read-only"],
)
def test_the_kernel_takes_no_other_arrays(source: object, size_hw: tuple[int, int], out: object) -> None:
    with pytest.raises((ValueError, BufferError)):
        resize_module._resize.resize(source, size_hw, (8, 0, 8), (8, 0, 8), False, False, out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "zoom"}, "mode"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"height": 0}, "at least"),
        ({"mode": "crop"}, "short_side"),
        ({"mode": "crop", "short_side": 31}, "short_side of at least 32"),
        ({"pad_rgb": (0, 0, 256)}, "pad_rgb"),
    ],
    ids=["mode", "interpolation", "height", "no-short-side", "short-side-below-crop", "pad"],
)
def test_a_rule_that_cannot_be_carried_out(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResizeRule(**{"mode": "stretch", "height": 32, "width": 32, **arguments})


@pytest.mark.parametrize("size_hw", [(300, 451), (300, 140), (140, 300), (300, 2), (30, 20)], ids=str)
def test_bicubic_begins_with_the_width_whatever_pillow_does(size_hw: tuple[int, int]) -> None:
    pixels = contents(*size_hw)["noise"]
    y, x = spans_yx(ResizeRule("letterbox", 64, 64, interpolation="bicubic"), *size_hw)
    kernel, pillow = np.empty((2, y.count, x.count, 3), np.uint8)
    resize_module.resize(pixels, y, x, "bicubic", kernel)
    resize_with_pillow(pixels, y, x, "bicubic", pillow)
    np.testing.assert_array_equal(kernel, pillow)


def test_pillow_fall_back_of_a_long_strip_takes_only_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize_module, "_WHOLE_PIXELS", 0)
    pixels = np.ascontiguousarray(photograph())
    y, x = spans_yx(CLASSIFIER, *pixels.shape[:2])
    out = np.empty((224, 224, 3), np.uint8)
    resize_with_pillow(pixels, y, x, "bilinear", out)
    assert difference(out, reference(pixels, CLASSIFIER)[0]) <= 1


# Orientation and boxes.


@pytest.mark.parametrize(
    ("block", "orientation"),
    [
        (b"", 1),
        (b"Exif\0\0", 1),
        (b"not exif at all", 1),
        (b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0", 6),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0", 8),
        (b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0", 1),
        (b"II*\0\x08\0\0\0\x01\0\x12\x01\x04\0\x01\0\0\0\x06\0\0\0", 1),
        (b"II*\0\xff\xff\xff\xff\x01\0", 1),
        (b"II*\0\x08\0\0\0\xff\xff\x12\x01", 1),
    ],
    ids=["none", "prefix-only", "text", "little-endian", "big-endian", "9", "long", "directory-outside", "cut"],
)
def test_exif_orientation(block: bytes, orientation: int) -> None:
    assert exif_orientation(block) == orientation


def test_boxes_of_nothing() -> None:
    boxes = boxes_xyxy_to_original(np.empty((0, 4), np.float32), Geometry(10, 20, 1, 1, 0, 0))
    assert boxes.shape == (0, 4)
    assert boxes.dtype == np.float32


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.height > 1], ids=[n for n, r in RULES.items() if r.height > 1]
)
def test_boxes_come_back(rule: ResizeRule) -> None:
    geometry = geometry_of(*spans_yx(rule, 480, 640))
    original = np.array([[10, 20, 300, 400], [0, 0, 640, 480]], np.float32)
    scale, offset = [geometry.scale_x, geometry.scale_y] * 2, [geometry.offset_x, geometry.offset_y] * 2
    np.testing.assert_allclose(boxes_xyxy_to_original(original * scale + offset, geometry), original, atol=1e-3)


def test_boxes_are_clipped_to_the_original() -> None:
    geometry = geometry_of(*spans_yx(ResizeRule("letterbox", 320, 320), 480, 640))
    boxes = boxes_xyxy_to_original(np.array([[-5, -5, 330, 330]], np.float32), geometry)
    assert boxes.tolist() == [[0, 0, 640, 480]]


def test_a_span_counted_from_both_ends_is_itself() -> None:
    for start, count in itertools.product(range(5), range(1, 5)):
        span = Span(100, 10, start, count)
        assert span.mirrored().mirrored() == span
