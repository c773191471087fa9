"""The figures of a segmenter, on maps of a few pixels whose figures one can count."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from models.dataset import ANNOTATIONS_SCHEMA
from models.errors import UsageError
from models.imaging import masks
from models.learning.segmentation_boundaries import border, boundary_f1
from models.learning.segmentation_metrics import measure, per_class

OPEN = "x"  # a pixel that is not judged


def array(drawn: Sequence[str]) -> np.ndarray:
    """A map of characters, one for each pixel."""
    return np.array([list(row) for row in drawn])


def figures(pairs: Sequence[tuple], labels: Sequence[str] = "ab", classes: Sequence[str] = "ab", **changes) -> dict:
    """Of pairs of a true map and the one that was found, whose letters are classes; None: the image is corrupt."""
    images, annotations, rows = [], [], []
    for number, (true, found) in enumerate(pairs):
        image, true = f"/{number}.png", array(true)
        images.append({"image": image, "height": true.shape[0], "width": true.shape[1]})
        annotations += [
            {"image": image, "label": None if name == OPEN else name, "mask": masks.encode(true == name), **changes}
            for name in sorted(set(true.flat) - {"."})
        ]
        segments = found and [
            {"label": name, "area": 0.0, "mask": masks.encode(array(found) == name)}
            for name in sorted(set(array(found).flat) - {"."})
        ]
        rows.append({"image": image, "status": "corrupt" if found is None else "ok", "segments": segments})
    return measure(
        pa.Table.from_pylist(rows[::-1]),
        pa.Table.from_pylist(images),
        pa.Table.from_pylist(annotations, schema=ANNOTATIONS_SCHEMA),
        labels,
        classes,
        temperature=None,
        fit=True,
        score=0.25,
    )


@pytest.mark.parametrize(
    ("pairs", "iou", "accuracy"),
    [
        pytest.param([(["...."], ["...."])], {"(background)": 1}, 1, id="no object, none found"),
        pytest.param([(["...."], ["a..."])], {"(background)": 3 / 4}, 3 / 4, id="no object, one pixel found"),
        pytest.param([(["a..."], ["...."])], {"(background)": 3 / 4, "a": 0}, 3 / 4, id="one pixel missed"),
        pytest.param([(["aabb"], ["aabb"])], {"a": 1, "b": 1}, 1, id="no background"),
        pytest.param([(["aa..", "aa.."], ["aaa.", ".aa."])], {"(background)": 2 / 5, "a": 3 / 6}, 5 / 8, id="shifted"),
        pytest.param(
            [(["aab."], ["abb."])], {"(background)": 1, "a": 1 / 2, "b": 1 / 2}, 3 / 4, id="one class for another"
        ),
        pytest.param([(["aaxx"], ["aabb"])], {"a": 1}, 1, id="what is open counts for none"),
        pytest.param([(["xxxx"], ["aabb"])], {}, 0, id="nothing to judge"),
        pytest.param(
            [(["aa.."], ["a..."]), (["a", "."], ["a", "."])],
            {"(background)": 3 / 4, "a": 2 / 3},
            5 / 6,
            id="pixels of all images count alike",
        ),
        pytest.param(
            [(["a..."], None), (["a..."], ["a..."])],
            {"(background)": 3 / 6, "a": 1 / 2},
            1 / 2,
            id="without a prediction all is wrong",
        ),
    ],
)
def test_overlap_by_hand(pairs, iou, accuracy):
    found = figures(pairs)
    assert per_class(found) == pytest.approx(iou)
    assert found["miou"] == pytest.approx(np.mean([*iou.values()]) if iou else 0)
    assert found["mean_dice"] == pytest.approx(np.mean([2 * v / (1 + v) for v in iou.values()]) if iou else 0)
    assert found["pixel_accuracy"] == pytest.approx(accuracy)
    assert found["images"] == len(pairs)
    assert found["not_ok"] == sum(answer is None for _, answer in pairs)


def test_the_iou_by_image_does_not_ask_for_its_size():
    """Of a: 1/2 of a small image, all of a larger one, nothing where it was found for nothing or not predicted."""
    pairs = [
        (["ab"], ["aa"]),
        (["a" * 98 + ".."], ["a" * 98 + ".."]),
        (["...."], ["a..."]),
        (["a"], None),
        (["."], ["."]),
    ]
    of_class = figures(pairs)["per_class"]
    assert of_class["a"]["image_iou"] == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert of_class["b"]["image_iou"] == 0
    assert of_class["(background)"]["image_iou"] == pytest.approx((1 + 3 / 4 + 1) / 3)
    assert of_class["a"]["iou"] == pytest.approx(99 / 102)


def test_confusion_counts_every_judged_pixel():
    found = figures(
        [(["aabb.x"], ["abbo.o"]), (["ab..xx"], None), (["...aaa"], ["..aaao"])], labels="abo", classes="abc"
    )
    assert found["unknown_classes"] == ["c"]
    assert found["confusion"] == {
        "rows": ["(background)", "a", "b", "c"],
        "columns": ["(background)", "a", "b", "c", "(another label)", "(not predicted)"],
        "counts": [[3, 1, 0, 0, 0, 2], [0, 3, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]],
    }
    of_a = found["per_class"]["a"]
    assert of_a["precision"] == pytest.approx(3 / 4)
    assert of_a["recall"] == pytest.approx(3 / 6)
    assert of_a["share"] == pytest.approx(6 / 15)
    assert found["per_class"]["c"]["share"] == 0


def test_a_class_that_the_model_does_not_know_has_no_overlap():
    assert per_class(figures([(["abab"], ["a.a."])], labels="a")) == {"a": 1, "b": 0}
    with pytest.raises(UsageError, match="no class in common: the model knows c, d, the data set has a, b"):
        figures([(["abab"], ["cdcd"])], labels="cd")


@pytest.mark.parametrize("changes", [{"crowd": True}, {"difficult": True}, {"mask": None, "x_max": 4.0, "y_max": 1.0}])
def test_what_is_not_to_be_judged(changes):
    box = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
    assert per_class(figures([(["aaaa", "...."], ["bbb.", "...."])], **box | changes)) == {"(background)": 1}


def squares(*corners: tuple[int, int], side: int = 10, size: int = 100) -> list[str]:
    drawn = np.full((size, size), ".")
    for top, left in corners:
        drawn[top : top + side, left : left + side] = "a"
    return ["".join(row) for row in drawn]


@pytest.mark.parametrize(
    ("true", "found", "expected"),
    [
        pytest.param(squares(), squares(), None, id="no border"),
        pytest.param(["aaaa"], ["aaaa"], None, id="the image's edge is none"),
        pytest.param(squares((40, 40)), squares((40, 40)), 1, id="the same"),
        # 100×100 pixels: 1.06 of them are near.
        pytest.param(squares((40, 40)), squares((41, 40)), 1, id="one pixel beside"),
        pytest.param(squares((40, 40)), squares((70, 70)), 0, id="elsewhere"),
        pytest.param(squares((40, 40)), squares(), 0, id="missed"),
        pytest.param(squares(), squares((40, 40)), 0, id="of nothing"),
        pytest.param(squares((40, 40)), squares((40, 40), (70, 70)), 2 / 3, id="one of two is wrong"),
        pytest.param(squares((40, 40), (70, 70), (10, 10)), squares((40, 40)), 2 / 4, id="one of three is found"),
        pytest.param(["a..."], ["a..."], 1, id="one pixel"),
        pytest.param(["aaxx"], ["aabb"], None, id="what is open has none"),
        pytest.param(
            squares((99, 40), side=1), squares((0, 41), side=1), 0, id="the foot of a column is not by a head"
        ),
    ],
)
def test_boundary_f1_by_hand(true, found, expected):
    measured = figures([(true, found)])["per_class"]["a"]["boundary_f1"]
    assert measured is None if expected is None else measured == pytest.approx(expected)


def test_boundary_f1_is_a_mean_over_images_and_then_over_the_classes_that_are_there():
    pairs = [
        (squares((40, 40)), squares((40, 40))),
        (squares((40, 40)), None),
        (squares(), [row.replace("a", "b") for row in squares((9, 9))]),
    ]
    found = figures(pairs)
    assert [found["per_class"][name]["boundary_f1"] for name in "ab"] == [0.5, 0]
    assert found["boundary_f1"] == 0.5  # no image shows b
    assert figures([(["...."], ["...."])])["boundary_f1"] is None


def test_borders_are_near_by_their_true_distance():
    """Against every pair of pixels, over maps of noise with holes that are not judged."""
    generator = np.random.default_rng(0)
    for height, width in [(31, 700), (640, 33), (200, 260)]:
        maps = [(generator.random((width, height)) < 0.001).astype(np.uint8) for _ in range(2)]
        judged = generator.random((width, height)) < 0.97
        true, found = (border(drawn, judged).of(1) for drawn in maps)
        assert len(true.row) > 3
        assert len(found.row) > 3
        offsets = np.hypot(true.column[:, None] - found.column, true.row[:, None] - found.row)
        is_near = offsets <= 0.0075 * np.hypot(height, width)
        precision, recall = is_near.any(axis=0).mean(), is_near.any(axis=1).mean()
        expected = 2 * precision * recall / (precision + recall) if precision else 0
        assert boundary_f1(true, found, height, width) == pytest.approx(expected)


def test_a_border_stops_where_nothing_is_judged():
    drawn = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], np.uint8)
    judged = np.ones(drawn.shape, bool)
    whole = border(drawn, judged)
    assert {(c, r, v) for c, r, v in zip(*(part.tolist() for part in whole), strict=True)} == {
        (column, row, value) for column in range(3) for row, value in ((1, 1), (2, 0))
    }
    judged[:, 2] = False
    assert not len(border(drawn, judged).row)
