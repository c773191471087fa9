"""The figures of detectors and of masks, against tables worked out by hand."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask

from models.dataset import ANNOTATIONS_SCHEMA, IMAGES_SCHEMA
from models.errors import UsageError
from models.learning import detection_metrics
from models.records import Task, part_schema

SIDE = 200  # pixels of all images
A, B, C, LARGE = (0, 0, 10, 10), (50, 50, 60, 60), (100, 0, 110, 10), (0, 100, 200, 200)
NEAR_A, HALF_A = (0, 0, 10, 8), (0, 0, 10, 4)  # overlaps of .8 and .4
CELLS = ("red", "white")


def counts_of(box: tuple[int, int, int, int]) -> str:
    """The mask of a box in an image of SIDE."""
    drawn = np.zeros((SIDE, SIDE), np.uint8, order="F")
    drawn[box[1] : box[3], box[0] : box[2]] = 1
    return coco_mask.encode(drawn)["counts"].decode()


def shown(label: str | None, box: tuple, mask: tuple | None = None, **flags: bool) -> dict[str, Any]:
    """One annotation; `mask`: the box that its mask fills."""
    return {
        "label": label,
        **dict(zip(("x_min", "y_min", "x_max", "y_max"), map(float, box), strict=True)),
        "mask": None if mask is None else counts_of(mask),
        "area": float((box[2] - box[0]) * (box[3] - box[1])),
        "crowd": False,
        "difficult": False,
        **flags,
    }


def found(label: str, score: float, box: tuple, mask: tuple | None = None) -> dict[str, Any]:
    """One finding."""
    finding = {"label": label, "score": score, **dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True))}
    return finding if mask is None else finding | {"area": 0.0, "mask": counts_of(mask)}


def figures(
    *images: tuple[list[dict[str, Any]], list[dict[str, Any]] | None],
    task: Task = Task.DETECT,
    labels: tuple[str, ...] = CELLS,
    fit: bool = False,
    score: float = 0.5,
) -> dict[str, Any]:
    """Of images with (what they show, what was found; None: it could not be predicted)."""
    names = [f"/{number}.png" for number in range(len(images))]
    schema = part_schema(task)
    rows = [
        {"image": name, "status": "corrupt" if findings is None else "ok", "objects": findings}
        for name, (_, findings) in zip(names, images, strict=True)
    ]
    found = detection_metrics.measure(
        pa.Table.from_pylist(rows[::-1], pa.schema([schema.field(name) for name in ("image", "status", "objects")])),
        pa.Table.from_pylist([{"image": name, "width": SIDE, "height": SIDE} for name in names], IMAGES_SCHEMA),
        pa.Table.from_pylist(
            [{"image": name, **one} for name, (objects, _) in zip(names, images, strict=True) for one in objects],
            ANNOTATIONS_SCHEMA,
        ),
        labels,
        CELLS,
        None,
        fit,
        score,
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


RED_A = shown("red", A)
NOTHING_FOUND = [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
FOUND = [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("images", "ap", "ap50", "counts"),
    [
        pytest.param([([], [])], None, None, [[0, 0, 0]] * 3, id="nothing there, nothing found"),
        pytest.param([([RED_A], [])], 0.0, 0.0, NOTHING_FOUND, id="nothing found"),
        pytest.param([([RED_A], None)], 0.0, 0.0, NOTHING_FOUND, id="an image without a prediction"),
        pytest.param(
            [([], [found("red", 0.9, A)])], None, None, [[0, 0, 0], [0, 0, 0], [1, 0, 0]], id="found where nothing is"
        ),
        pytest.param(
            [([shown("red", A, crowd=True)], [found("red", 0.9, A)])], None, None, [[0, 0, 0]] * 3, id="crowd"
        ),
        pytest.param([([RED_A], [found("red", 0.9, A)])], 1.0, 1.0, FOUND, id="found"),
        pytest.param([([RED_A], [found("red", 0.9, NEAR_A)])], 0.7, 1.0, FOUND, id="found with an overlap of .8"),
        pytest.param(
            [([RED_A], [found("red", 0.9, HALF_A)])],
            0.0,
            0.0,
            [[0, 0, 1], [0, 0, 0], [1, 0, 0]],
            id="with one of .4: missed, and another found",
        ),
        pytest.param([([RED_A], [found("red", 0.4, A)])], 1.0, 1.0, NOTHING_FOUND, id="below the score"),
        pytest.param(
            [([RED_A], [found("white", 0.9, A)])], 0.0, 0.0, [[0, 1, 0], [0, 0, 0], [0, 0, 0]], id="as another class"
        ),
        pytest.param(
            [([RED_A], [found("white", 0.9, A), found("red", 0.8, A)])],
            1.0,
            1.0,
            [[1, 0, 0], [0, 0, 0], [0, 1, 0]],
            id="its own class first, however sure the other one is",
        ),
        pytest.param(
            [([RED_A], [found("red", 0.9, A), found("red", 0.8, NEAR_A)])],
            1.0,
            1.0,
            [[1, 0, 0], [0, 0, 0], [1, 0, 0]],
            id="found twice",
        ),
        pytest.param(
            [([RED_A, shown("red", B, difficult=True)], [found("red", 0.9, A), found("red", 0.95, B)])],
            1.0,
            1.0,
            FOUND,
            id="a difficult one is found, which counts neither way",
        ),
        pytest.param(
            [([RED_A, shown("white", B, difficult=True)], [found("red", 0.9, A)])], 1.0, 1.0, FOUND, id="or not"
        ),
        pytest.param(
            [
                (
                    [RED_A, shown(None, LARGE)],
                    [found("red", 0.9, A), *(found(k, 0.95, (5, 120, 15, 130)) for k in CELLS)],
                )
            ],
            1.0,
            1.0,
            FOUND,
            id="a region without a label holds anything",
        ),
        pytest.param(
            [([RED_A], [found("red", 0.9, A)]), ([shown("white", B)], [found("white", 0.9, C)])],
            0.5,
            0.5,
            [[1, 0, 0], [0, 0, 1], [0, 1, 0]],
            id="the mean of two classes, one found and one missed",
        ),
    ],
)
def test_figures_by_hand(images, ap, ap50, counts):
    measured = figures(*images)
    assert (measured["ap"], measured["ap50"]) == (pytest.approx(ap), pytest.approx(ap50))
    assert measured["confusion"] == {
        "rows": [*CELLS, "(background)"],
        "columns": [*CELLS, "(background)"],
        "counts": counts,
    }
    assert measured["objects"] == sum(sum(row) for row in counts[:-1])
    assert measured["not_ok"] == sum(findings is None for _, findings in images)
    assert [measured["per_class"][name]["support"] for name in CELLS] == [sum(row) for row in counts[:-1]]


def test_precision_and_recall_are_those_of_the_score():
    """Two of three red ones are found, and one where nothing is; another is found below the score."""
    answers = [
        found("red", 0.9, A),
        found("red", 0.8, B),
        found("red", 0.7, (150, 150, 160, 160)),
        found("red", 0.3, C),
    ]
    measured = figures(([shown("red", A), shown("red", B), shown("red", C)], answers), fit=True)
    rates = {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    assert measured["at_score"] == {"score": 0.5, **rates}
    assert {name: measured["per_class"]["red"][name] for name in rates} == rates
    best = {"score": 0.3, "precision": 0.75, "recall": 1.0, "f1": 6 / 7}
    assert measured["operating_point"] == {name: pytest.approx(value) for name, value in best.items()}
    assert figures(([RED_A], []))["operating_point"] is None
    assert measured["ap50"] == pytest.approx((67 * 1 + 34 * 0.75) / 101)
    curve = measured["pr_curve"]
    assert (curve["recall"][::5], curve["precision"]["red"][::5]) == (
        [0.0, 0.25, 0.5, 0.75, 1.0],
        [1, 1, 1, 0.75, 0.75],
    )
    assert list(curve["precision"]) == ["red"]
    assert (measured["per_class"]["white"]["ap"], measured["per_class"]["white"]["f1"]) == (None, 0.0)


def test_by_size():
    measured = figures(([shown("red", LARGE), shown("red", A)], [found("red", 0.9, LARGE)]))
    names = ("ap_small", "ap_medium", "ap_large", "ar_small", "ar_medium", "ar_large", "ar")
    assert [measured[name] for name in names] == [0.0, None, 1.0, 0.0, None, 1.0, 0.5]


def test_a_class_that_the_model_does_not_know_is_missed_and_told():
    """And what only the model knows is no mistake, but where it takes an object's place."""
    images = ([RED_A, shown("white", B)], [found("red", 0.9, A), found("cell", 0.9, B), found("cell", 0.9, C)])
    measured = figures(images, labels=("red", "cell"))
    assert (measured["ap"], measured["unknown_classes"]) == (0.5, ["white"])
    assert measured["confusion"]["columns"] == [*CELLS, "(another label)", "(background)"]
    assert measured["confusion"]["counts"] == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert measured["at_score"]["precision"] == 1.0
    with pytest.raises(UsageError, match="the model knows cell, the data set has red, white"):
        figures(images, labels=("cell",))


def test_labels_of_one_name_are_one():
    measured = figures(([RED_A], [found("red", 0.9, A)]), labels=("red", "white", "red"))
    assert measured["ap"] == 1.0


# --- masks


@pytest.mark.parametrize(
    ("mask", "found_mask", "ap", "mask_ap", "right"),
    [
        pytest.param(A, A, 1.0, 1.0, 1, id="found"),
        pytest.param(A, NEAR_A, 1.0, 0.7, 1, id="the mask has an overlap of .8"),
        pytest.param(A, HALF_A, 1.0, 0.0, 0, id="the mask has one of .4, so that it is missed"),
        pytest.param(None, HALF_A, 1.0, None, 0, id="an object without a mask counts neither way"),
    ],
)
def test_masks_decide(mask, found_mask, ap, mask_ap, right):
    measured = figures(([shown("red", A, mask)], [found("red", 0.9, A, found_mask)]), task=Task.INSTANCE, fit=True)
    assert (measured["ap"], measured["mask_ap"]) == (ap, pytest.approx(mask_ap))
    assert measured["confusion"]["counts"][0][0] == right
    red = measured["per_class"]["red"]
    assert (red["ap"], red["mask_ap"], red["support"]) == (ap, pytest.approx(mask_ap), int(mask is not None))
    assert measured["operating_point"]["f1"] == right
    assert ("red" in measured["pr_curve"]["precision"]) == (mask is not None)
    assert detection_metrics.per_class(measured) == ({} if mask_ap is None else {"red": pytest.approx(mask_ap)})


@pytest.mark.parametrize(
    "images",
    [
        pytest.param([([], [])], id="nothing there, nothing found"),
        pytest.param([([shown(None, LARGE)], [found("red", 0.9, A, A)])], id="only a region"),
        pytest.param([([], None)], id="nothing there, no prediction"),
    ],
)
def test_no_masks(images):
    measured = figures(*images, task=Task.INSTANCE, fit=True)
    assert (measured["mask_ap"], measured["mask_ar_small"], measured["objects"]) == (None, None, 0)


def test_what_lies_in_a_crowds_mask_counts_neither_way():
    crowd = shown("red", LARGE, LARGE, crowd=True)
    inside = [found("red", 0.95, (x, 120, x + 10, 130), (x, 120, x + 10, 130)) for x in (0, 20, 40)]
    measured = figures(([crowd, shown("red", A, A)], [*inside, found("red", 0.9, A, A)]), task=Task.INSTANCE, fit=True)
    assert (measured["mask_ap"], measured["at_score"]["precision"], measured["operating_point"]["f1"]) == (1, 1, 1)


def test_the_gate_sees_the_precision_of_classes_with_objects():
    assert detection_metrics.per_class(figures(([RED_A], [found("red", 0.9, NEAR_A)]))) == {"red": pytest.approx(0.7)}
