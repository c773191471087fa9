"""Average precision against tables worked out by hand, and against pycocotools."""

import contextlib
import io
from itertools import pairwise

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.learning.average_precision import FoundObjects, TrueObjects, precisions
from models.learning.matching import IGNORED, match
from models.learning.operating_point import best_operating_point


def shown(*objects: tuple) -> TrueObjects:
    """(box, label, ignored)"""
    boxes = np.array([box for box, _, _ in objects], float).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return TrueObjects(
        boxes, np.array([k for _, k, _ in objects], int), np.array([i for _, _, i in objects], bool), areas
    )


def found(*objects: tuple) -> FoundObjects:
    """(box, label, score)"""
    return FoundObjects(
        np.array([box for box, _, _ in objects], float).reshape(-1, 4),
        np.array([k for _, k, _ in objects], int),
        np.array([s for _, _, s in objects], float),
    )


A, B, LARGE, FAR = (0, 0, 10, 10), (50, 50, 60, 60), (0, 0, 200, 100), (300, 0, 310, 10)


@pytest.mark.parametrize(
    ("true", "findings", "expected"),
    [
        pytest.param([], [], None, id="no image"),
        pytest.param([shown()], [found((A, 0, 0.9))], None, id="nothing there"),
        pytest.param([shown((A, 0, False))], [found()], 0.0, id="nothing found"),
        pytest.param([shown((A, 0, False))], [found((A, 0, 0.9))], 1.0, id="found"),
        pytest.param([shown((A, 0, False))], [found((A, 1, 0.9))], 0.0, id="as another class"),
        pytest.param([shown((A, 0, False))], [found((A, 0, 0.8), (B, 0, 0.9))], 0.5, id="behind a false one"),
        pytest.param([shown((A, 0, False), (B, 1, False))], [found((A, 0, 0.9))], 0.5, id="one class of two"),
        pytest.param(
            [shown((A, 0, False), (B, 0, True))], [found((B, 0, 0.9), (B, 0, 0.8), (A, 0, 0.7))], 1.0, id="a crowd"
        ),
        pytest.param([shown((A, 0, False), (B, -1, True))], [found((B, 0, 0.9), (A, 0, 0.7))], 1.0, id="a region"),
    ],
)
def test_average_precision(true, findings, expected):
    measured = precisions(true, findings, 2)
    assert measured.ap() == (None if expected is None else pytest.approx(expected))
    assert measured.ap(iou=0) == (None if expected is None else pytest.approx(expected))


def test_by_size():
    measured = precisions([shown((LARGE, 0, False), (A, 0, False))], [found((LARGE, 0, 0.9))], 1)
    assert (measured.ar(size="large"), measured.ar(size="small"), measured.ar(size="medium")) == (1.0, 0.0, None)
    nothing = precisions([shown((LARGE, 0, False))], [found()], 2)
    assert (nothing.ar(size="large"), nothing.ar(size="small"), nothing.ap(label=1)) == (0.0, None, None)


def test_masks_are_compared_instead_of_boxes():
    left, right = (drawn((0, 0, 5, 10)), drawn((5, 0, 10, 10)))
    true = [shown((A, 0, False))._replace(masks=[left])]
    same = [found((A, 0, 0.9))._replace(masks=[right])]
    assert (precisions(true, same, 1, "bbox").ap(), precisions(true, same, 1, "segm").ap()) == (1.0, 0.0)
    other = [found((B, 0, 0.9))._replace(masks=[left])]
    assert (precisions(true, other, 1, "bbox").ap(), precisions(true, other, 1, "segm").ap()) == (0.0, 1.0)


def test_an_image_may_show_more_objects_than_coco_counts():
    """150 in a row, all found: with 100 findings, recall would end at two thirds."""
    boxes = [((x, 0, x + 10, 10), 0) for x in range(0, 1500, 10)]
    everything = [shown(*((box, k, False) for box, k in boxes))]
    measured = precisions(everything, [found(*((box, k, 0.9) for box, k in boxes))], 1)
    assert (measured.ap(), measured.ar(), measured.most_found) == (1.0, 1.0, 150)
    assert precisions([shown((A, 0, False))], [found()], 1).most_found == 100


SIDE, CLASSES = 256, 3


def drawn(box: tuple) -> dict:
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[round(box[1]) : round(box[3]), round(box[0]) : round(box[2])] = 1
    return coco_mask.encode(mask)


def scattered(images: int, seed: int) -> tuple[list[TrueObjects], list[FoundObjects]]:
    """Objects of all sizes, some to be ignored; findings near them, of another class, or where nothing is."""
    random = np.random.default_rng(seed)
    true, findings = [], []
    for _ in range(images):
        count = int(random.integers(0, 8))
        corner, size = random.uniform(0, 120, (count, 2)), random.choice([8, 40, 110], (count, 1))
        boxes = np.concatenate([corner, corner + size], axis=1)
        labels, ignored = random.integers(0, CLASSES, count), random.random(count) < 0.2
        moved = boxes + random.normal(0, 0.06, (count, 4)) * size
        astray = random.uniform(0, 100, (3, 2))
        found_boxes = np.concatenate([moved, moved + 1, np.concatenate([astray, astray + 30], axis=1)])
        found_labels = np.concatenate([labels, random.integers(0, CLASSES, count), random.integers(0, CLASSES, 3)])
        scores = random.permutation(len(found_boxes)) / len(found_boxes)
        true.append(TrueObjects(boxes, labels, ignored, (size[:, 0] ** 2).astype(float), [drawn(b) for b in boxes]))
        findings.append(FoundObjects(found_boxes, found_labels, scores, [drawn(b) for b in found_boxes]))
    return true, findings


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_what_pycocotools_says(kind):
    true, findings = scattered(40, seed=3)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image, "height": SIDE, "width": SIDE} for image in range(len(true))],
        "categories": [{"id": number} for number in range(CLASSES)],
        "annotations": [
            {
                "id": 1000 * image + row + 1,
                "image_id": image,
                "category_id": int(of_image.labels[row]),
                "bbox": [*box[:2], *(box[2:] - box[:2])],
                "area": of_image.areas[row],
                "iscrowd": int(of_image.ignored[row]),
                "segmentation": of_image.masks[row],
            }
            for image, of_image in enumerate(true)
            for row, box in enumerate(of_image.boxes_xyxy)
        ],
    }
    results = [
        {"image_id": image, "category_id": int(label), "score": score}
        | ({"bbox": [*box[:2], *(box[2:] - box[:2])]} if kind == "bbox" else {"segmentation": mask})
        for image, in_image in enumerate(findings)
        for box, label, score, mask in zip(*in_image, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    measured = precisions(true, findings, CLASSES, kind)
    assert 0.1 < measured.ap() < 0.9
    assert measured.precision == pytest.approx(evaluation.eval["precision"][..., 2], abs=1e-12)
    assert measured.recall == pytest.approx(evaluation.eval["recall"][..., 2], abs=1e-12)


# --- matching, one overlap at a time


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_matches_give_the_recall_and_the_precision_of_coco(kind):
    true, findings = scattered(40, seed=5)
    measured = precisions(true, findings, CLASSES, kind)
    matched = [match(of_image, in_image, kind) for of_image, in_image in zip(true, findings, strict=True)]
    for label in range(CLASSES):
        support = sum(int((of_image.labels[~of_image.ignored] == label).sum()) for of_image in true)
        counted = [(one != IGNORED) & (f.labels == label) for one, f in zip(matched, findings, strict=True)]
        right = np.concatenate([one[kept] >= 0 for one, kept in zip(matched, counted, strict=True)])
        scores = np.concatenate([f.scores[kept] for f, kept in zip(findings, counted, strict=True)])
        right = right[np.argsort(-scores, kind="stable")].cumsum()
        assert right[-1] / support == pytest.approx(measured.recall[0, label, 0])
        precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
        at = np.searchsorted(right / support, np.linspace(0, 1, 101))
        expected = np.append(precision, 0.0)[np.minimum(at, len(precision))]
        assert measured.precision[0, :, label, 0] == pytest.approx(expected)


# --- the operating point


@pytest.mark.parametrize(
    ("true", "findings", "expected"),
    [
        pytest.param([], [], (0.25, 0, 0, 0), id="no image"),
        pytest.param([shown()], [found((A, 0, 0.9))], (0.25, 0, 0, 0), id="nothing there"),
        pytest.param([shown((A, 0, False))], [found()], (0.25, 0, 0, 0), id="nothing found"),
        pytest.param([shown((A, 0, False))], [found((B, 0, 0.9))], (0.25, 0, 0, 0), id="nothing right"),
        pytest.param([shown((A, 0, False))], [found((A, 0, 0.9), (B, 0, 0.5))], (0.7, 1, 1, 1), id="in the middle"),
        pytest.param([shown((A, 0, False))], [found((A, 0, 0.9))], (0.9, 1, 1, 1), id="nothing to drop"),
        pytest.param(
            [shown((A, 0, False), (B, 1, False))],
            [found((A, 0, 0.9), (LARGE, 0, 0.8), (B, 1, 0.7), (LARGE, 1, 0.2))],
            (0.45, 0.8, 2 / 3, 1.0),
            id="one wrong, but two right",
        ),
        pytest.param(
            [shown((A, 0, False))] * 2,
            [found((A, 0, 0.9)), found((A, 0, 0.4), (B, 0, 0.4), (LARGE, 0, 0.4))],
            (0.65, 2 / 3, 1.0, 0.5),
            id="equal scores are kept or dropped together",
        ),
        pytest.param(
            [shown((A, 0, False), (B, 0, True), (FAR, -1, True))],
            [found((A, 0, 0.6), (B, 0, 0.9), (B, 0, 0.8), (FAR, 1, 0.7), (B, 1, 0.3))],
            (0.45, 1, 1, 1),
            id="crowds and regions count neither way",
        ),
        pytest.param(
            [shown((A, 0, False))], [found((B, 2, 0.9), (A, 0, 0.8))], (0.8, 1, 1, 1), id="nor do other labels"
        ),
    ],
)
def test_the_best_operating_point(true, findings, expected):
    point = best_operating_point(true, findings, 2)
    assert (point.score, point.f1, point.precision, point.recall) == pytest.approx(expected)


def test_no_score_is_better_than_the_best():
    true, findings = scattered(40, seed=7)
    best = best_operating_point(true, findings, CLASSES)

    def f1(score: float) -> float:
        kept = [FoundObjects(*(each[f.scores >= score] for each in f[:3])) for f in findings]
        matched = np.concatenate([match(*pair) for pair in zip(true, kept, strict=True)])
        objects = sum(int((~of_image.ignored).sum()) for of_image in true)
        return 2 * int((matched >= 0).sum()) / max(1, int((matched != IGNORED).sum()) + objects)

    scores = sorted({score for f in findings for score in f.scores.tolist()})
    assert f1(best.score) == pytest.approx(best.f1) == pytest.approx(max(map(f1, scores)))
    assert any(low < best.score < high for low, high in pairwise(scores))
    assert best.f1 == pytest.approx(2 * best.precision * best.recall / (best.precision + best.recall))
