"""Tiles: how an image is cut, what the model is shown, and which findings of several views are one object."""

from collections.abc import Iterator

import numpy as np
import pytest
from odd_images import encode, exif, photograph
from PIL import Image

from models.errors import Rejected
from models.imaging import masks
from models.imaging.boxes import boxes_xyxy_to_original
from models.imaging.geometry import Geometry, ResizeRule
from models.imaging.mask_runs import paste_mask, segments_of_map, united
from models.imaging.prepare import Preparer
from models.imaging.tiles import Tiling, tiles_of
from models.records import Status, Task
from models.runtime.merging import group_findings, merge_views
from models.runtime.results import Detection, Instances, Segments
from tasks.isolation import IsolatedPreparer

RULE = ResizeRule("letterbox", 48, 64, interpolation="bicubic", pad_rgb=(1, 2, 3))
RNG = np.random.default_rng(5)


# --- where they lie


@pytest.mark.parametrize(
    ("height", "width", "overlap", "rows", "columns"),
    [
        pytest.param(1, 1, 0.2, 0, 0, id="one pixel"),
        pytest.param(100, 100, 0.2, 0, 0, id="one tile"),
        pytest.param(100, 101, 0.2, 1, 2, id="a pixel more"),
        pytest.param(180, 100, 0.2, 2, 1, id="two, overlapping as asked"),
        pytest.param(181, 100, 0.2, 3, 1, id="three"),
        pytest.param(40, 500, 0.2, 1, 6, id="a strip"),
        pytest.param(300, 200, 0.0, 3, 2, id="side by side"),
        pytest.param(101, 150, 0.89, 2, 6, id="nearly on top of each other"),
        pytest.param(3001, 2001, 0.3, 43, 29, id="many"),
    ],
)
def test_tiles_cover_the_image_and_each_pixel_has_the_nearest(height, width, overlap, rows, columns):
    tiles = tiles_of(height, width, Tiling(100, overlap, and_whole=True))
    assert len(tiles) == rows * columns
    if not tiles:
        return
    owners = np.full((height, width), -1)
    for number, tile in enumerate(tiles):
        x_min, y_min, x_max, y_max = tile.shown_xyxy
        assert (x_max - x_min, y_max - y_min) == (min(100, width), min(100, height))
        assert x_min >= 0 <= y_min
        assert x_max <= width
        assert y_max <= height
        left, top, right, bottom = tile.cell_xyxy
        assert x_min <= left < right <= x_max
        assert y_min <= top < bottom <= y_max
        assert (owners[top:bottom, left:right] == -1).all()
        owners[top:bottom, left:right] = number
    assert (owners >= 0).all()
    for axis, size in ((0, width), (1, height)):
        starts = sorted({tile.shown_xyxy[axis] for tile in tiles})
        assert np.diff([*starts, starts[-1]]).max() <= 100 * (1 - overlap)
        centres = np.array(starts) + min(100, size) / 2
        middle = owners[height // 2] if axis == 0 else owners[:, width // 2]
        distance = np.abs(np.arange(size)[:, None] + 0.5 - centres)  # [pixels, tiles]
        own = [tiles[number].shown_xyxy[axis] + min(100, size) / 2 for number in middle]
        np.testing.assert_array_less(np.abs(np.arange(size) + 0.5 - own), distance.min(axis=1) + 1)


# --- what the model is shown


def upright_photograph() -> np.ndarray:
    return np.asarray(photograph())


FILES = {
    "PNG": lambda: encode(photograph(), "PNG"),
    "turned PNG": lambda: encode(photograph().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6)),
    "mirrored PNG": lambda: encode(photograph().transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG", exif=exif(2)),
    "JPEG": lambda: encode(photograph(), "JPEG", quality=95),
}


def seen(preparer: Preparer | IsolatedPreparer, data: bytes) -> Iterator[tuple[Geometry, np.ndarray]]:
    out = np.empty((RULE.height, RULE.width, 3), np.uint8)
    for geometry in preparer.views(data, lambda: out):
        yield geometry, out.copy()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("and_whole", [True, False])
@pytest.mark.parametrize("kind", [Preparer, IsolatedPreparer])
def test_each_tile_is_seen_as_if_it_were_an_image(name, and_whole, kind):
    data = FILES[name]()
    tiling = Tiling(200, 0.25, and_whole)
    alone = np.empty((RULE.height, RULE.width, 3), np.uint8)
    views = list(seen(kind(RULE, None, tiling), data))
    if and_whole:
        whole, pixels = views.pop(0)
        assert whole == Preparer(RULE).prepare(data, alone)
        np.testing.assert_array_equal(pixels, alone)
    assert [geometry.tile for geometry, _ in views] == tiles_of(300, 451, tiling)
    upright = upright_photograph()
    for geometry, pixels in views:
        x_min, y_min, x_max, y_max = geometry.shown_xyxy
        of_tile = Preparer(RULE).prepare(encode(Image.fromarray(upright[y_min:y_max, x_min:x_max]), "PNG"), alone)
        if name != "JPEG":
            np.testing.assert_array_equal(pixels, alone)
        assert (geometry.width, geometry.height) == (451, 300)
        assert (geometry.scale_x, geometry.scale_y) == (of_tile.scale_x, of_tile.scale_y)
        corners = np.array([[0, 0, (x_max - x_min) * of_tile.scale_x, (y_max - y_min) * of_tile.scale_y]], np.float32)
        np.testing.assert_allclose(boxes_xyxy_to_original(corners, geometry), [geometry.shown_xyxy], atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (200, 7)])
def test_an_image_no_larger_than_a_tile_is_seen_whole(size):
    data = encode(photograph().resize(size), "PNG")
    (view,) = seen(Preparer(RULE, None, Tiling(200, 0.2, True)), data)
    (untiled,) = seen(Preparer(RULE), data)
    assert view[0] == untiled[0]
    np.testing.assert_array_equal(view[1], untiled[1])


@pytest.mark.parametrize("kind", [Preparer, IsolatedPreparer])
def test_a_broken_image_is_rejected_as_without_tiles_and_the_next_is_seen(kind):
    preparer = kind(RULE, None, Tiling(200, 0.2, True))
    with pytest.raises(Rejected) as rejected:
        list(seen(preparer, FILES["PNG"]()[:2000]))
    assert rejected.value.status == Status.CORRUPT
    assert len(list(seen(preparer, FILES["PNG"]()))) == 7


def test_views_that_are_not_wanted_any_more_leave_no_trace():
    preparer = IsolatedPreparer(RULE, None, Tiling(200, 0.2, True))
    views = seen(preparer, FILES["PNG"]())
    next(views)
    views.close()
    assert len(list(seen(preparer, FILES["PNG"]()))) == 7
    preparer.close()


# --- which findings are one object

TILING = Tiling(100, 0.2, and_whole=True)
WHOLE, LEFT, RIGHT = "whole", "left", "right"
IMAGE = (100, 180)  # height, width: two tiles, which share the pixels from 80 to 100


def geometries(height: int, width: int, tiling: Tiling = TILING) -> list[Geometry]:
    """The whole image and then its tiles, at their own size."""
    alone = Geometry(100, 100, 1.0, 1.0, 0.0, 0.0)
    tiles = [alone.of_tile(tile, height, width) for tile in tiles_of(height, width, tiling)]
    return [Geometry(width, height, 0.5, 0.5, 0.0, 0.0), *tiles]


def grouped(*findings: tuple, size_hw: tuple[int, int] = IMAGE, tiling: Tiling = TILING) -> list[list[int]]:
    """(view, box, score, label=0)"""
    views = {WHOLE: 0, LEFT: 1, RIGHT: 2}
    boxes = np.array([box for _, box, *_ in findings], np.float32).reshape(-1, 4)
    groups = group_findings(
        boxes,
        np.array([score for _, _, score, *_ in findings], np.float32),
        np.array([label[0] if label else 0 for _, _, _, *label in findings], np.int64),
        geometries(*size_hw, tiling),
        np.array([views.get(view, view) for view, *_ in findings], np.int64),
    )
    return sorted(sorted(group) for group in groups)


ACROSS = (70, 20, 120, 60)  # reaches over both borders: no tile shows it whole
GROUPS = {
    "nothing": ([], []),
    "in one tile": ([(LEFT, (10, 10, 20, 20), 0.5)], [[0]]),
    "in both tiles": ([(LEFT, (82, 10, 92, 20), 0.5), (RIGHT, (82, 10, 93, 20), 0.9)], [[1]]),
    "of two classes": ([(LEFT, (82, 10, 92, 20), 0.5), (RIGHT, (82, 10, 92, 20), 0.9, 1)], [[0], [1]]),
    "beside each other": ([(LEFT, (82, 10, 90, 20), 0.5), (RIGHT, (90, 10, 98, 20), 0.9)], [[0], [1]]),
    "overlapping in one view": ([(LEFT, (10, 10, 20, 20), 0.5), (LEFT, (11, 10, 20, 20), 0.9)], [[0], [1]]),
    "cut in one tile, whole in the other": (
        [(LEFT, (95, 20, 100, 40), 0.9), (RIGHT, (95, 20, 115, 40), 0.3)],
        [[1]],
    ),
    "cut, with a rough box": ([(LEFT, (86, 24, 100, 36), 0.9), (RIGHT, (95, 20, 115, 40), 0.3)], [[1]]),
    "cut in both tiles": ([(LEFT, (70, 20, 100, 60), 0.4), (RIGHT, (80, 20, 120, 60), 0.8)], [[0, 1]]),
    "cut in both tiles, seen whole": (
        [(WHOLE, ACROSS, 0.3), (LEFT, (70, 20, 100, 60), 0.4), (RIGHT, (80, 20, 120, 60), 0.8)],
        [[0]],
    ),
    "two of them across": (
        [
            (LEFT, (70, 20, 100, 40), 0.4),
            (RIGHT, (80, 20, 120, 40), 0.8),
            (LEFT, (70, 45, 100, 60), 0.5),
            (RIGHT, (80, 45, 120, 60), 0.6),
        ],
        [[0, 1], [2, 3]],
    ),
    "whole in the image and in a tile": ([(WHOLE, (20, 20, 70, 70), 0.9), (LEFT, (21, 20, 70, 70), 0.5)], [[0]]),
    "small in the image, sharper in a tile": (
        [(WHOLE, (20, 20, 32, 32), 0.9), (LEFT, (22, 22, 30, 30), 0.5)],
        [[1]],
    ),
    "small, and only the image shows it": ([(WHOLE, (20, 20, 32, 32), 0.9)], [[0]]),
    "larger than a tile": ([(WHOLE, (5, 5, 175, 95), 0.3), (LEFT, (5, 5, 100, 95), 0.9)], [[0]]),
    "a small one in front of a large one": (
        [(WHOLE, (5, 5, 175, 95), 0.3), (LEFT, (30, 30, 50, 50), 0.9)],
        [[0], [1]],
    ),
    "at the edge of the image": ([(LEFT, (0, 0, 10, 10), 0.5), (RIGHT, (170, 90, 180, 100), 0.5)], [[0], [1]]),
}


@pytest.mark.parametrize(("findings", "expected"), GROUPS.values(), ids=GROUPS)
def test_each_object_is_kept_once(findings, expected):
    assert grouped(*findings) == expected


def test_pieces_meet_at_the_border_of_tiles_without_overlap():
    pieces = [(1, (70, 20, 100, 60), 0.4), (2, (100, 21, 120, 60), 0.8), (2, (100, 70, 120, 90), 0.7)]
    assert grouped(*pieces, size_hw=(100, 200), tiling=Tiling(100, 0.0, True)) == [[0, 1], [2]]


def test_pieces_of_many_tiles_are_one_object():
    size, tiling = (180, 260), TILING
    box = np.array([30, 40, 240, 150])
    pieces = []
    for number, geometry in enumerate(geometries(*size, tiling)[1:], 1):
        x_min, y_min, x_max, y_max = geometry.shown_xyxy
        piece = np.clip(box, [x_min, y_min] * 2, [x_max, y_max] * 2)
        pieces.append((number, tuple(piece), 0.3 + number / 100))
    assert grouped(*pieces, size_hw=size) == [list(range(6))]


def detection(box, score=0.5, label=0) -> Detection:
    return Detection(np.array([label]), np.array([score], np.float32), np.array([box], np.float32))


def test_an_object_of_pieces_has_the_box_around_them_and_the_best_score():
    _, left, right = geometries(*IMAGE)
    merged = merge_views(
        Task.DETECT, [(left, detection((70, 20, 100, 60), 0.4)), (right, detection((80, 19, 120, 60), 0.8))]
    )
    assert merged.boxes_xyxy.tolist() == [[70, 19, 120, 60]]
    assert merged.scores.tolist() == [np.float32(0.8)]


def test_objects_are_ordered_as_those_of_one_view():
    whole, left, right = geometries(*IMAGE)
    views = [
        (left, detection((10, 10, 20, 20), 0.5, 1)),
        (right, detection((150, 10, 160, 20), 0.9, 2)),
        (whole, detection((10, 40, 70, 99), 0.5, 0)),
    ]
    assert merge_views(Task.DETECT, views).labels.tolist() == [2, 0, 1]
    empty = Detection(np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, 4), np.float32))
    assert merge_views(Task.DETECT, [(left, empty), (right, empty)]).boxes_xyxy.shape == (0, 4)


def test_masks_of_pieces_are_united():
    height, width = IMAGE
    _, left, right = geometries(height, width)
    drawn = np.zeros((height, width), bool)
    drawn[20:60, 70:120] = RNG.random((40, 50)) < 0.5
    views = []
    for geometry, box in ((left, (70, 20, 100, 60)), (right, (80, 20, 120, 60))):
        x_min, _, x_max, _ = geometry.shown_xyxy
        piece = drawn.copy()
        piece[:, :x_min] = piece[:, x_max:] = False
        views.append((geometry, Instances(*detection(box), np.array([piece.sum()]), [masks.encode(piece)])))
    merged = merge_views(Task.INSTANCE, views)
    assert merged.masks == [masks.encode(drawn)]
    assert merged.areas.tolist() == [drawn.sum()]


def test_one_view_is_the_answer_and_one_failure_too():
    found = detection((1, 2, 3, 4))
    failed = Rejected(Status.FAILED, "NaN")
    _, left, right = geometries(*IMAGE)
    assert merge_views(Task.DETECT, [(left, found)]) is found
    assert merge_views(Task.DETECT, [(left, found), (right, failed)]) is failed


# --- pixels


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.3,), (0.5, 0.5, 0.1), (1.0, 0.2)], ids=str)
def test_a_union_is_that_of_the_pixels(shares):
    drawn = [RNG.random((21, 13)) < share for share in shares]
    union = np.logical_or.reduce(drawn)
    assert united([masks.encode(one) for one in drawn], 21, 13) == (masks.encode(union), union.sum())


def test_a_mask_ends_where_its_tile_ends():
    ones = np.ones((28, 28), np.float32)
    counts, area = paste_mask(ones, np.array([70.0, 30.0, 130.0, 60.0]), 80, 200, (20, 10, 100, 50))
    expected = np.zeros((80, 200), bool)
    expected[30:50, 70:100] = True
    assert (counts, area) == (masks.encode(expected), 30 * 20)


@pytest.mark.parametrize("side", [64, 32, 48])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("tiles_agree", [True, False])
def test_maps_are_stitched_without_seams(side, overlap, tiles_agree):
    """Tiles at their own size: of one picture, or each with a number of its own."""
    height, width = 90, 150
    tiles = tiles_of(height, width, Tiling(side, overlap, and_whole=False))
    expected = RNG.integers(0, 4, (height, width)).astype(np.uint8)
    if not tiles_agree:
        for number, tile in enumerate(tiles, 1):
            left, top, right, bottom = tile.cell_xyxy
            expected[top:bottom, left:right] = number
    views = []
    for number, tile in enumerate(tiles, 1):
        left, top, right, bottom = tile.shown_xyxy
        geometry = Geometry(right - left, bottom - top, 1.0, 1.0, 0.0, 0.0).of_tile(tile, height, width)
        shown = expected[top:bottom, left:right]
        found = segments_of_map(shown if tiles_agree else np.full_like(shown, number), geometry)
        segments = Segments(
            np.array([one - 1 for one, _, _ in found]),
            np.array([area for _, _, area in found]),
            [counts for _, counts, _ in found],
        )
        views.append((geometry, segments))
    merged = merge_views(Task.SEMANTIC, views)
    classes = [int(one) for one in np.unique(expected) if one]
    assert merged.labels.tolist() == [one - 1 for one in classes]
    assert merged.masks == [masks.encode(expected == one) for one in classes]
    assert merged.areas.tolist() == [(expected == one).sum() for one in classes]
