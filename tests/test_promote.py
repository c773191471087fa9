"""Promotion: the table of cases, and what NAME@production stands for afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.errors import ModelError, NotFound
from tasks import inventory, predict, registry
from tasks.promote import PRODUCTION, Promotion, promote, promote_if_better
from tests.tiny_datasets import (
    COLOURS,
    colour_card,
    publish_colour_model,
    publish_dataset,
    publish_objects,
    square,
    write_colour_model,
)
from tests.tiny_models import publish_detector


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "mill")


@pytest.fixture
def squares(store, tmp_path):
    examples = [("test", colour, square(colour, seed)) for colour in COLOURS for seed in range(2)]
    return publish_dataset(store, tmp_path / "squares", [*examples, ("train", "red", square("red", 7))])


def publish_measured(store: str, folder: Path, weights: str, dataset: str, top1: float | None) -> Card:
    """A version with a figure in its card, as training leaves it."""
    card = replace(colour_card(), weights_sha256=weights).with_version()
    if top1 is not None:
        card = replace(card, metrics={"dataset": dataset, "test": {"top1": top1}})
    return registry.publish(store, card, {ONNX_FILE: write_colour_model(folder / f"{weights}.onnx")})


@pytest.mark.parametrize(
    ("current", "candidate", "promoted", "reason"),
    [
        pytest.param(None, 0.2, True, "no version was promoted yet", id="the first"),
        pytest.param(0.8, 0.9, True, "top1 0.9000 against 0.8000 of colours@", id="better"),
        pytest.param(0.8, 0.8, True, "top1 0.8000 against 0.8000 of colours@", id="as good"),
        pytest.param(0.8, 0.7999, False, "top1 0.7999 against 0.8000 of colours@", id="worse"),
    ],
)
def test_promoted_when_not_worse(store, squares, tmp_path, monkeypatch, current, candidate, promoted, reason):
    monkeypatch.setattr(predict, "work", None)  # both were measured before
    old = None
    if current is not None:
        old = publish_measured(store, tmp_path, "a", squares.reference, current)
        promote(store, old.reference)
    new = publish_measured(store, tmp_path, "b", squares.reference, candidate)
    result = promote_if_better(store, new, squares)
    assert result.reason.startswith(reason)
    assert replace(result, reason="") == Promotion(
        promoted, "", "top1", candidate, current, old.reference if old else None
    )
    assert registry.resolve(store, "colours@production") == (new if promoted else old)
    assert registry.resolve(store, "colours") == new


def test_versions_that_were_not_measured_are(store, squares, tmp_path):
    old = publish_colour_model(store, tmp_path)
    promote(store, "colours")
    worse = publish_colour_model(store, tmp_path, order=(1, 0, 2))
    result = promote_if_better(store, worse, squares)
    assert (result.promoted, result.candidate, result.current) == (False, pytest.approx(1 / 3), 1.0)
    assert registry.resolve(store, "colours@production") == old
    again = promote_if_better(store, old, squares)
    assert (again.promoted, again.reason) == (False, "it is the promoted version already")


def test_a_variant_can_be_promoted_and_is_listed(store, squares, tmp_path):
    card = publish_measured(store, tmp_path, "a", squares.reference, 0.5)
    variant = registry.publish(store, card.variant("int8"), {"model.int8.onnx": tmp_path / "a.onnx"})
    assert promote(store, f"{card.reference}.int8") == variant
    assert registry.resolve(store, "colours@production") == variant
    assert [
        (entry.version, entry.precision, entry.metric, entry.aliases) for entry in inventory.list_models(store)
    ] == [
        (card.version, "fp32", "top1 0.500 (test)", []),
        (variant.version, "int8", "", [PRODUCTION]),
    ]


def test_a_split_that_shows_nothing_to_find_decides_nothing(store, tmp_path):
    """Average precision is null there; the promoted version stays."""
    old = publish_detector(store, tmp_path)
    promote(store, old.reference)
    examples = [
        ("test", square("red", 1), []),
        ("val", square("red", 2), [{"label": "light", "x_min": 0.0, "y_min": 0.0, "x_max": 9.0, "y_max": 9.0}]),
    ]
    dataset = publish_objects(store, tmp_path / "objects", examples, ("light",))
    new = registry.publish(
        store, replace(old, version="c" * 12, files={}), {ONNX_FILE: registry.fetch_model(store, old)}
    )
    result = promote_if_better(store, new, dataset)
    assert (result.promoted, result.metric, result.candidate) == (False, "ap", None)
    assert result.reason == f"{dataset.reference} shows nothing in its split test to compare on"


def test_other_aliases_stay(store, squares, tmp_path):
    card = publish_measured(store, tmp_path, "a", squares.reference, 0.5)
    registry.set_alias(store, card, "staging")
    promote(store, "colours@staging")
    assert registry.aliases(store, "colours") == {"production": card.version, "staging": card.version}


@pytest.mark.parametrize("first", [True, False], ids=["the first", "one is promoted"])
def test_without_a_test_split_only_the_first_is_promoted(store, squares, tmp_path, first):
    old = publish_measured(store, tmp_path, "a", squares.reference, 0.5)
    if not first:
        promote(store, old.reference)
    dataset = publish_dataset(store, tmp_path / "few", [("train", "red", square("red"))], "few")
    new = publish_measured(store, tmp_path, "b", dataset.reference, None)
    result = promote_if_better(store, new, dataset)
    assert (result.promoted, result.candidate) == (first, None)
    assert first or result.reason == f"{dataset.reference} has no split test to compare on"


def test_a_promoted_version_that_knows_none_of_the_classes_stays(store, squares, tmp_path):
    card = replace(colour_card(), labels=("x", "y", "z")).with_version()
    old = registry.publish(store, card, {ONNX_FILE: write_colour_model(tmp_path / "old.onnx")})
    promote(store, old.reference)
    new = publish_measured(store, tmp_path, "b", squares.reference, 0.9)
    result = promote_if_better(store, new, squares)
    assert not result.promoted
    assert result.reason.startswith(f"{old.reference} cannot be compared: the model and the data set have no class")


def test_a_promoted_version_that_was_deleted_is_replaced(store, squares, tmp_path):
    new = publish_measured(store, tmp_path, "b", squares.reference, 0.9)
    registry.set_alias(store, replace(new, version="0" * 12), PRODUCTION)
    assert promote_if_better(store, new, squares).promoted


def test_what_cannot_be_promoted(store, tmp_path):
    with pytest.raises(NotFound, match="no model 'birds'"):
        promote(store, "birds")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"weights")
    registry.publish(store, colour_card(), {WEIGHTS_FILE: tmp_path / WEIGHTS_FILE})
    with pytest.raises(ModelError, match="trained without an export: pixelmill export colours@"):
        promote(store, "colours")
    assert registry.aliases(store, "colours") == {}
