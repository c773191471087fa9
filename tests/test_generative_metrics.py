"""Distances between samples, against closed forms and against another way to compute them."""

import numpy as np
import pytest
import scipy.linalg

from models.learning.generative_metrics import (
    UNKNOWN,
    Seen,
    class_coverage,
    compare,
    coverage,
    frechet_distance,
    halves,
    kernel_distance,
    mean_distance,
    nearest_classes,
    within,
)


def sample(count: int, features: int, seed: int = 0, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, (count, features))


def whitened(count: int, features: int, seed: int = 0) -> np.ndarray:
    """A sample with a mean of exactly 0 and a covariance of exactly 1."""
    drawn = sample(count, features, seed)
    drawn -= drawn.mean(axis=0)
    left, _, right = np.linalg.svd(drawn, full_matrices=False)
    return left @ right * np.sqrt(count - 1)


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, word for word, with SciPy's root of a matrix."""
    c_x, c_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c_x @ c_y)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c_x + c_y - 2 * np.real(root)))


def test_the_frechet_distance_of_a_sample_to_itself_is_0():
    assert frechet_distance(sample(50, 8), sample(50, 8)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("mean", "scale", "expected"),
    [
        pytest.param(3.0, 1.0, 5 * 9.0, id="moved: the square of the way"),
        pytest.param(0.0, 3.0, 5 * 4.0, id="spread: the squares of the differences of standard deviations"),
        pytest.param(1.0, 0.5, 5 * 1.25, id="both"),
    ],
)
def test_the_frechet_distance_between_known_normal_distributions(mean, scale, expected):
    x = whitened(40, 5)
    assert frechet_distance(x, x * scale + mean) == pytest.approx(expected)
    assert frechet_distance(x, whitened(70, 5, seed=1) * scale + mean) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (60, 300, 12), (20, 200, 12)], ids=str)
def test_the_frechet_distance_as_scipy_computes_it(n, m, d):
    mixing = sample(d, d, seed=9)
    x, y = sample(n, d, 1) @ mixing, sample(m, d, 2, mean=0.3) @ mixing.T
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))


def test_fewer_images_than_features_are_no_trouble():
    """The roots of such covariances are where others get NaN: here the distance along each axis is known."""
    x, y = np.zeros((2, 500)), np.zeros((2, 500))
    x[0, 0], x[1, 0] = 1, -1  # variance 2 along the first axis
    y[0, 1], y[1, 1] = 1, -1  # and along the second
    assert frechet_distance(x, y) == pytest.approx(4.0)
    assert frechet_distance(x, 2 * x) == pytest.approx(2.0)  # (2√2 - √2)²
    assert frechet_distance(np.zeros((5, 500)), np.zeros((3, 500))) == 0


def test_the_kernel_distance_is_unbiased():
    """Of two samples of one distribution it is 0 on average, and below 0 as often as above."""
    values = [kernel_distance(sample(30, 6, 2 * seed), sample(30, 6, 2 * seed + 1)) for seed in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert 0.3 < np.mean(np.array(values) < 0) < 0.7


def test_the_kernel_distance_by_its_definition():
    x, y = sample(4, 3, 0), sample(5, 3, 1, mean=1.0)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([kernel(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    yy = np.mean([kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy)


def test_precision_and_recall_tell_too_narrow_from_too_wide():
    real, narrow, wide = sample(200, 2, 0), sample(200, 2, 1, scale=0.2), sample(200, 2, 2, scale=5.0)
    assert within(narrow, real) > 0.95  # precision: all of it is realistic
    assert within(real, narrow) < 0.4  # recall: but it is not all there is
    assert within(wide, real) < 0.4
    assert within(real, wide) > 0.9
    far = real + 100
    assert within(far, real) == within(real, far) == coverage(real, far) == 0
    assert coverage(real, real) == 1


def test_one_image_over_and_over_covers_one_neighbourhood():
    real = np.arange(10.0)[:, None] ** 2
    assert coverage(real, np.full((50, 1), real[9])) == pytest.approx(0.3)  # 81 itself, 64, and 49, whose fifth is 16


def test_the_mean_distance_of_known_points():
    assert mean_distance(np.array([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5)
    assert mean_distance(np.full((4, 3), 7.0)) == 0


@pytest.mark.parametrize(
    ("made", "covered"),
    [
        pytest.param([0, 1, 2, 3], 1.0, id="all"),
        pytest.param([0] * 99 + [1], 0.25, id="one of a hundred is none"),
        pytest.param([0, 0, 1, 1], 0.5, id="half"),
        pytest.param([UNKNOWN] * 4, 0.0, id="nothing that is recognised"),
        pytest.param([7, 7, 7, 7], 0.0, id="a class that no real image has"),
    ],
)
def test_which_classes_are_covered(made, covered):
    assert class_coverage(np.array([0, 1, 2, 3] * 5), np.array(made)) == covered


def test_an_image_is_of_the_class_of_the_real_one_that_is_most_like_it():
    real = Seen(np.array([[0.0], [10.0]]), np.array([3, 5]))
    assert nearest_classes(np.array([[1.0], [9.0], [100.0]]), real).tolist() == [3, 5, 5]


def test_perfect_and_collapsed_samples():
    classes = np.arange(200) % 4
    real = Seen(sample(200, 6, 0) + classes[:, None] * 5, classes)
    perfect = compare(real, Seen(sample(200, 6, 1) + classes[:, None] * 5, classes), classes)
    collapsed = compare(real, Seen(sample(200, 6, 1) * 1e-3, np.zeros(200, int)), classes)
    assert perfect["frechet"] < 0.1 * collapsed["frechet"]
    assert perfect["diversity"] == pytest.approx(1, abs=0.1)
    assert collapsed["diversity"] < 0.01
    assert (perfect["class_coverage"], collapsed["class_coverage"]) == (1.0, 0.25)
    assert (perfect["accuracy"], collapsed["accuracy"]) == (1.0, 0.25)
    assert halves(real.features) < collapsed["frechet"]


def test_what_is_not_finite_is_the_worst():
    broken = Seen(np.full((5, 3), np.nan), np.zeros(5, int))
    figures = compare(Seen(sample(5, 3), np.zeros(5, int)), broken, np.zeros(5, int))
    assert figures["frechet"] == np.inf
    assert figures["accuracy"] == figures["diversity"] == 0


def test_figures_of_classes_are_only_there_where_classes_are():
    unknown = np.full(6, UNKNOWN)
    assert {"accuracy", "class_coverage"}.isdisjoint(
        compare(Seen(sample(6, 3), unknown), Seen(sample(6, 3, 1), unknown))
    )
