"""Runs made without a mask: each against the same picture drawn pixel by pixel."""

import numpy as np
import pytest

from models.imaging import masks
from models.imaging.geometry import ResizeRule, geometry_of, spans_yx
from models.imaging.mask_runs import paste_mask, segments_of_map

RNG = np.random.default_rng(4)
DISC = (np.hypot(*np.mgrid[-13.5:14, -13.5:14]) < 11).astype(np.float32)  # [28, 28]


def drawn(mask: np.ndarray, box: tuple[float, ...], height: int, width: int) -> np.ndarray:
    """The mask interpolated at the centre of every pixel, and zero outside its box; over a half."""
    x_min, y_min, x_max, y_max = box
    m = len(mask)
    framed = np.pad(mask.astype(np.float64), 1)
    out = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            u = (x + 0.5 - x_min) * m / (x_max - x_min) + 0.5
            v = (y + 0.5 - y_min) * m / (y_max - y_min) + 0.5
            if 0 <= u < m + 1 and 0 <= v < m + 1:
                i, j = int(v), int(u)
                weights = np.outer([1 - v + i, v - i], [1 - u + j, u - j])
                out[y, x] = (framed[i : i + 2, j : j + 2] * weights).sum() > 0.5
    return out


@pytest.mark.parametrize(
    ("mask", "box"),
    [
        pytest.param(np.zeros((28, 28), np.float32), (3.0, 4.0, 20.0, 30.0), id="nothing"),
        pytest.param(DISC, (3.2, 4.7, 20.1, 30.9), id="inside"),
        pytest.param(DISC, (-8.0, -5.5, 20.0, 70.0), id="over three edges"),
        pytest.param(np.ones((28, 28), np.float32), (-100.0, -100.0, 200.0, 200.0), id="the whole image"),
        pytest.param(np.ones((28, 28), np.float32), (6.0, 6.0, 7.0, 7.0), id="one pixel"),
        pytest.param(np.ones((28, 28), np.float32), (6.1, 6.1, 6.4, 6.4), id="no pixel's centre"),
        pytest.param(np.ones((28, 28), np.float32), (100.0, 6.0, 120.0, 9.0), id="outside"),
        pytest.param(RNG.random((28, 28)).astype(np.float32), (1.3, -2.0, 36.0, 44.0), id="noise"),
        pytest.param(RNG.random((2, 2)).astype(np.float32), (1.3, 2.0, 36.0, 41.0), id="a coarse mask"),
    ],
)
def test_a_pasted_mask_is_what_interpolation_draws(mask, box):
    expected = drawn(mask, box, 42, 37)
    counts, area = paste_mask(mask, np.array(box), 42, 37)
    assert counts == masks.encode(expected)
    assert area == expected.sum()


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(ResizeRule("letterbox", 16, 20), id="letterbox"),
        pytest.param(ResizeRule("stretch", 16, 20), id="stretch"),
        pytest.param(ResizeRule("crop", 16, 12, short_side=18), id="crop"),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (16, 20), (33, 71), (64, 20)])
@pytest.mark.parametrize("classes", [1, 4])
def test_segments_have_the_class_of_the_map_at_each_pixel(rule, height, width, classes):
    geometry = geometry_of(*spans_yx(rule, height, width))
    class_map = RNG.integers(classes == 1, classes + 1, (rule.height, rule.width)).astype(np.uint8)
    expected = np.zeros((height, width), np.uint8)  # what a crop hides stays background
    for y in range(height):
        for x in range(width):
            row = int(np.floor((y + 0.5) * geometry.scale_y + geometry.offset_y))
            column = int(np.floor((x + 0.5) * geometry.scale_x + geometry.offset_x))
            if 0 <= row < rule.height and 0 <= column < rule.width:
                expected[y, x] = class_map[row, column]
    shown = [int(number) for number in np.unique(expected) if number]
    assert segments_of_map(class_map, geometry) == [
        (number, masks.encode(expected == number), int((expected == number).sum())) for number in shown
    ]


@pytest.mark.parametrize(
    "runs", [[12], [0, 12], [3, 10**6, 5, 2, 10**6, 1], [10**9, 1, 1], [16, 15, 17, 1, 512, 511, 1]]
)
def test_counts_are_read_as_they_were_written(runs):
    assert masks.runs_of(masks.counts_of(np.array(runs)), 1, sum(runs)).tolist() == runs


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_counts_are_those_of_pycocotools(share):
    counts = masks.encode(RNG.random((40, 30)) < share)
    assert masks.counts_of(masks.runs_of(counts, 40, 30)) == counts
