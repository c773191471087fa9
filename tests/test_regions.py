"""Regions become rows or reasons, and masks in run-length code are those of pycocotools."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from broken_annotations import HEIGHT, WIDTH, grey
from pycocotools import mask as coco_mask

from models.dataset import ANNOTATIONS_SCHEMA
from models.imaging import masks
from tasks.datasets.labelled import LabelledRegion, Reject
from tasks.datasets.regions import annotation_row, check_regions


def region(**changed: Any) -> LabelledRegion:
    return LabelledRegion(**({"image": "a.jpg", "label": "cell", "source": "a.txt"} | changed))


@pytest.mark.parametrize(
    ("given", "width", "expected"),
    [
        pytest.param(region(), 40, "no box and no mask", id="nothing"),
        pytest.param(region(box_xyxy=(0, 0, 40, 30)), 40, (0, 0, 40, 30), id="whole image"),
        pytest.param(region(box_xyxy=(-1, -0.5, 41, 30.9)), 40, (0, 0, 40, 30), id="rounded outside"),
        pytest.param(region(box_xyxy=(-1.01, 0, 9, 9)), 40, "outside the image", id="more than rounded"),
        pytest.param(region(box_xyxy=(0, 0, 4004, 9)), 4000, (0, 0, 4000, 9), id="a thousandth of a large side"),
        pytest.param(region(box_xyxy=(0, 0, 4004.5, 9)), 4000, "outside the image", id="more than a thousandth"),
        pytest.param(region(box_xyxy=(40, 0, 41, 9)), 40, "outside the image", id="wholly in the rounding"),
        pytest.param(region(box_xyxy=(0.25, 0.5, 0.5, 1.0), relative=True), 40, (10, 15, 20, 30), id="relative"),
        pytest.param(region(polygons=((-0.5, 0, 9, 0, 9, 9),)), 40, (0, 0, 9, 9), id="polygon rounded outside"),
        pytest.param(region(polygons=()), 40, "too few polygon points", id="no polygon"),
        pytest.param(region(box_xyxy=(5, 5, 5.2, 5.2)), 40, (5, 5, 5.2, 5.2), id="smaller than a pixel"),
        pytest.param(region(label=None, box_xyxy=(1, 2, 3, 4)), 40, (1, 2, 3, 4), id="to be ignored"),
        pytest.param(region(label="", box_xyxy=(1, 2, 3, 4)), 40, "unknown label", id="empty label"),
        pytest.param(region(label="cat", box_xyxy=(1, 2, 3, 4)), 40, "unknown label", id="unknown label"),
        pytest.param(region(rle="0`V1"), 40, "corrupt mask", id="runs of another size"),
        pytest.param(region(rle="0", rle_size_hw=(40, 30)), 40, "mask of another size", id="sides swapped"),
    ],
)
def test_region(given: LabelledRegion, width: int, expected: tuple[float, ...] | str) -> None:
    row = annotation_row(given, width, HEIGHT, ("cell",))
    if isinstance(expected, str):
        assert isinstance(row, Reject)
        assert (row.kind, row.source, row.reason) == ("annotation", "a.txt", expected)
    else:
        assert not isinstance(row, Reject)
        assert (row["x_min"], row["y_min"], row["x_max"], row["y_max"]) == expected


def test_a_row_holds_what_the_source_says() -> None:
    corner = masks.encode(grey() > 0)
    outline = (-0.5, 0, 10, 0, 10, 10, -0.5, 10)
    given = [
        region(box_xyxy=(0, 0, 10, 20)),
        region(box_xyxy=(0, 0, 9, 9), rle=corner, rle_size_hw=(HEIGHT, WIDTH), crowd=True),
        region(rle=corner, rle_size_hw=(HEIGHT, WIDTH), area=7, difficult=True),
        region(polygons=(outline,)),
    ]
    rows, rejects = check_regions(given, WIDTH, HEIGHT)
    assert not rejects
    assert [row["area"] for row in rows] == [200, 100, 7, 100]
    assert [row["mask"] for row in rows] == [None, corner, corner, corner]
    assert [row["x_max"] for row in rows] == [10, 9, 10, 10]
    assert [row["crowd"] for row in rows] == [False, True, False, False]
    assert [row["difficult"] for row in rows] == [False, False, True, False]
    assert rows[3]["polygons"] == [list(outline)]  # the source's own, though its box is rounded
    assert pa.Table.from_pylist([{"image": "a.jpg", **row} for row in rows], ANNOTATIONS_SCHEMA).num_rows == 4


def test_only_the_same_geometry_under_the_same_label_is_a_duplicate() -> None:
    given = [
        region(box_xyxy=(1, 2, 3, 4), line=5),
        region(box_xyxy=(1, 2, 3, 4), label="dish"),
        region(box_xyxy=(1, 2, 3, 5)),
    ]
    rows, rejects = check_regions([*given, region(box_xyxy=(1, 2, 3, 4), line=9)], WIDTH, HEIGHT)
    assert len(rows) == 3
    assert rejects == [Reject("annotation", "a.txt", 9, "duplicate", "as at 5 in a.txt")]


def test_masks_are_those_of_pycocotools() -> None:
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 40), (40, 1), (30, 40), (7, 300)):
        for share in (0.0, 0.02, 0.5, 0.98, 1.0):
            mask = random.random((height, width)) < share
            counts = masks.encode(mask)
            theirs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            assert counts == theirs["counts"].decode()
            assert (masks.decode(counts, height, width) == mask).all()
            assert masks.area(counts, height, width) == mask.sum()
            assert masks.encode_runs(masks.runs_of(counts, height, width).tolist(), height, width) == counts
            x, y, box_width, box_height = coco_mask.toBbox(theirs)
            box_xyxy = (x, y, x + box_width, y + box_height) if mask.any() else None
            assert masks.box_xyxy(counts, height, width) == box_xyxy


def test_polygons_are_drawn_as_by_pycocotools() -> None:
    polygons = [[1.5, 2, 20, 2, 20, 9.25], [30.0, 20, 39, 20, 39, 29]]
    theirs = coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH))
    assert masks.encode_polygons(polygons, HEIGHT, WIDTH) == theirs["counts"].decode()


def test_runs_of_no_length_do_not_move_the_box() -> None:
    counts = masks.encode_runs([31, 0, 4, 2, 0, 3, 1160], HEIGHT, WIDTH)
    assert masks.box_xyxy(counts, HEIGHT, WIDTH) == (1, 5, 2, 10)
    assert masks.area(counts, HEIGHT, WIDTH) == 5
    none = masks.encode_runs([31, 0, 1169, 0], HEIGHT, WIDTH)
    assert masks.box_xyxy(none, HEIGHT, WIDTH) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: masks.runs_of("0", 0, 5), "between 1 and", id="no pixel"),
        pytest.param(lambda: masks.runs_of("0", 2**16, 2**16), "between 1 and", id="more pixels than 32 bits count"),
        pytest.param(lambda: masks.runs_of("", 1, 5), "empty", id="empty"),
        pytest.param(lambda: masks.runs_of("p", 1, 5), "characters", id="character too high"),
        pytest.param(lambda: masks.runs_of("/", 1, 5), "characters", id="character too low"),
        pytest.param(lambda: masks.runs_of("5P", 1, 5), "cut off", id="cut off"),
        pytest.param(lambda: masks.runs_of("o" * 7 + "0", 1, 5), "longer than any image", id="number without end"),
        pytest.param(lambda: masks.runs_of("O", 1, 5), "negative", id="negative"),
        pytest.param(lambda: masks.runs_of("4", 1, 5), "add up", id="too short"),
        pytest.param(lambda: masks.runs_of("ooooo00", 1, 5), "add up", id="too long"),
        pytest.param(lambda: masks.decode("4", 1, 5), "add up", id="decode checks too"),
        pytest.param(lambda: masks.encode_runs([2**80, -(2**80)], 1, 5), "negative", id="runs that cancel out"),
        pytest.param(lambda: masks.encode_runs([], 1, 5), "add up", id="no runs"),
        pytest.param(lambda: masks.encode_polygons([], 3, 5), "no polygon", id="no polygons"),
        pytest.param(lambda: masks.encode_polygons([[0, 0, 1, 1]], 3, 5), "three points", id="read as a box"),
        pytest.param(lambda: masks.encode_polygons([[0, 0, 1, 1, 1e9, 0]], 3, 5), "far outside", id="far outside"),
        pytest.param(lambda: masks.encode_polygons([[0, 0, 1, 1, np.nan, 0]], 3, 5), "far outside", id="not a number"),
    ],
)
def test_what_would_harm_pycocotools_never_reaches_it(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
