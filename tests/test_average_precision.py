"""Average precision against tables worked out by hand."""

import numpy as np
import pytest

from models.learning.average_precision import FoundObjects, TrueObjects, precisions


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


A, B, LARGE = (0, 0, 10, 10), (50, 50, 60, 60), (0, 0, 200, 100)


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
