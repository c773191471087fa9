"""Evaluation: figures against tables computed by hand, and against what predict itself answers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask

from models.card import ONNX_FILE
from models.dataset import ANNOTATIONS_SCHEMA
from models.errors import ModelError, NotFound, StorageError, UsageError
from models.learning import classification_metrics, metrics
from models.learning.classification_metrics import at_temperature, expected_calibration_error, fitted_temperature
from models.records import Task, part_schema
from models.settings.export import EvaluateSettings
from models.settings.predict import PredictSettings
from tasks import evaluate as evaluation
from tasks import predict, registry
from tasks.evaluate import evaluate, find_metrics, measure, measure_all
from tasks.photographs import encode_png
from tasks.table import Table
from tests.tiny_datasets import (
    COLOURS,
    colour_card,
    publish_colour_model,
    publish_dataset,
    publish_objects,
    square,
    write_colour_model,
)
from tests.tiny_models import publish_detector, publish_instances, publish_segmenter

# --- figures


def figures(true: list[str], answers: list[dict[str, float] | None], labels: list[str], classes=None, **options):
    """The figures of images with these labels and probabilities by label; None: the image could not be predicted."""
    names = [f"/{number}.png" for number in range(len(true))]
    rows = [
        {
            "image": name,
            "status": "ok" if answer is not None else "corrupt",
            "labels": None if answer is None else [{"label": label, "score": p} for label, p in answer.items()],
        }
        for name, answer in zip(names, answers, strict=True)
    ]
    schema = part_schema(Task.CLASSIFY)
    kept = pa.schema([schema.field(name) for name in ("image", "status", "labels")])
    return classification_metrics.measure(
        pa.Table.from_pylist(rows[::-1], schema=kept),
        pa.table({"image": names, "label": true}),
        ANNOTATIONS_SCHEMA.empty_table(),
        labels,
        classes or labels,
        options.get("temperature"),
        options.get("fit", False),
        0.25,
    )


A, B, C = {"a": 0.8, "b": 0.15, "c": 0.05}, {"b": 0.7, "a": 0.2, "c": 0.1}, {"c": 0.6, "a": 0.3, "b": 0.1}
ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("true", "answers", "top1", "counts", "precision", "recall", "f1"),
    [
        pytest.param(
            ["a", "a", "b", "c", "c", "c"],
            [A, B, B, C, A, C],
            4 / 6,
            [[1, 1, 0], [0, 1, 0], [1, 0, 2]],
            [1 / 2, 1 / 2, 1.0],
            [1 / 2, 1.0, 2 / 3],
            [1 / 2, 2 / 3, 4 / 5],
            id="some right",
        ),
        pytest.param(
            ["a", "b", "c"], [A, B, C], 1.0, np.eye(3).tolist(), [1.0] * 3, [1.0] * 3, [1.0] * 3, id="all right"
        ),
        pytest.param(
            ["a", "b", "c"],
            [B, C, A],
            0.0,
            [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
            [0.0] * 3,
            [0.0] * 3,
            [0.0] * 3,
            id="all wrong",
        ),
        pytest.param(
            ["a", "a", "b"],
            [A, C, B],
            2 / 3,
            [[1, 0, 1], [0, 1, 0], [0, 0, 0]],
            [1.0, 1.0, 0.0],
            [1 / 2, 1.0, 0.0],
            [2 / 3, 1.0, 0.0],
            id="a class without examples, predicted once",
        ),
    ],
)
def test_figures_by_hand(true, answers, top1, counts, precision, recall, f1):
    found = figures(true, answers, ABC)
    assert found["top1"] == pytest.approx(top1)
    assert found["top5"] is None
    assert found["confusion"] == {"rows": ABC, "columns": ABC, "counts": counts}
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert [found["per_class"][label][name] for label in ABC] == pytest.approx(expected)
        has_examples = [value for label, value in zip(ABC, expected, strict=True) if label in true]
        assert found["macro"][name] == pytest.approx(np.mean(has_examples))
    assert [found["per_class"][label]["support"] for label in ABC] == [true.count(label) for label in ABC]
    assert json.loads(json.dumps(found)) == found


def test_images_without_a_prediction_count_as_wrong():
    found = figures(["a", "b", "b"], [A, None, {"a": float("nan"), "b": 0.5, "c": 0.5}], ABC)
    assert (found["images"], found["not_ok"], found["top1"]) == (3, 2, pytest.approx(1 / 3))
    assert found["confusion"]["columns"] == [*ABC, "(not predicted)"]
    assert found["confusion"]["counts"] == [[1, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    assert found["ece"] == pytest.approx(0.2)  # of the one that has one: right, at .8


def test_no_prediction_at_all():
    found = figures(["a", "b"], [None, None], ABC, fit=True)
    assert (found["top1"], found["not_ok"], found["ece"], found["temperature"]) == (0.0, 2, None, None)


def test_one_class():
    found = figures(["a", "a"], [{"a": 1.0}, None], ["a"])
    assert (found["top1"], found["per_class"]["a"]["recall"], found["per_class"]["a"]["precision"]) == (0.5, 0.5, 1.0)


def test_classes_are_matched_by_name():
    """The model knows x beside a and b, and calls them in another order; it does not know z."""
    answers = [{"b": 0.1, "x": 0.1, "a": 0.8}, {"x": 0.6, "b": 0.3, "a": 0.1}, {"a": 0.5, "b": 0.4, "x": 0.1}]
    found = figures(["a", "b", "z"], answers, ["b", "x", "a"], classes=["z", "a", "b"])
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["unknown_classes"] == ["z"]
    assert found["confusion"] == {
        "rows": ["z", "a", "b"],
        "columns": ["z", "a", "b", "(another label)"],
        "counts": [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]],
    }
    assert found["ece"] == pytest.approx((0.2 + 0.6) / 2)  # z has no part in it


def test_two_outputs_of_one_name_are_added():
    found = figures(["a"], [{"b": 0.4, "a": 0.3}], ["a", "b", "a"], classes=["a", "b"])
    assert found["top1"] == 0.0
    row = pa.table({"image": ["/0.png"], "status": ["ok"], "labels": [[{"label": n, "score": s} for n, s in AAB]]})
    image = pa.table({"image": ["/0.png"], "label": ["a"]})
    nothing = ANNOTATIONS_SCHEMA.empty_table()
    twice = classification_metrics.measure(row, image, nothing, ["a", "b", "a"], ["a", "b"], None, False, 0.25)
    assert twice["top1"] == 1.0


AAB = [("b", 0.4), ("a", 0.3), ("a", 0.3)]


def test_top5_counts_the_fifth_and_not_the_sixth():
    labels = list("abcdefg")
    answer = {label: (7 - k) / 28 for k, label in enumerate(labels)}
    found = figures(["e", "f", "a"], [answer] * 3, labels)
    assert (found["top1"], found["top5"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_no_class_in_common_is_said():
    with pytest.raises(UsageError, match="the model knows a, b, c, the data set has x, y"):
        figures(["x"], [A], ABC, classes=["x", "y"])


def test_the_recall_of_classes_with_examples_is_what_the_gate_shows():
    found = figures(["a", "a", "b"], [A, C, B], ABC)
    assert classification_metrics.per_class(found) == {"a": 0.5, "b": 1.0}


# --- calibration


def test_calibration_error_by_hand():
    """Bins of 1/15: .95 and .97 lie in the last (half right), .55 in the ninth (right)."""
    probabilities = np.array([[0.95, 0.05], [0.97, 0.03], [0.55, 0.45]])
    error = expected_calibration_error(probabilities, np.array([0, 1, 0]))
    assert error == pytest.approx(2 / 3 * abs(0.96 - 0.5) + 1 / 3 * abs(0.55 - 1), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_again(temperature):
    """Labels drawn from probabilities whose logits were then multiplied by the temperature."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (20_000, 4))
    honest = at_temperature(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 1.0)
    true = (honest.cumsum(axis=1) > generator.random((len(honest), 1))).argmax(axis=1)
    sharpened = at_temperature(honest, 1 / temperature)
    found = fitted_temperature(sharpened, true)
    assert found == pytest.approx(temperature, rel=0.05)
    assert expected_calibration_error(at_temperature(sharpened, found), true) < 0.02
    if temperature != 1:
        assert expected_calibration_error(sharpened, true) > 0.05


@pytest.mark.parametrize(
    ("answers", "true"),
    [
        pytest.param([[0.9, 0.1], [0.2, 0.8]], [0, 1], id="all right"),
        pytest.param([[0.9, 0.1], [0.2, 0.8]], [1, 0], id="all wrong"),
        pytest.param([[1.0], [1.0]], [0, 0], id="one class"),
        pytest.param([[0.5, 0.5]], [0], id="no preference"),
    ],
)
def test_no_temperature_where_none_fits(answers, true):
    assert fitted_temperature(np.array(answers), np.array(true)) is None


def test_probabilities_of_zero_are_no_infinity():
    answers = np.array([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.7, 0.3, 0.0]])
    found = fitted_temperature(answers, np.array([0, 1, 0]))
    assert found is not None
    assert 0.5 < found < 2
    assert at_temperature(answers, found).sum(axis=1) == pytest.approx(np.ones(3))


# --- through the path that predicts


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "mill")


def wrong_sometimes(split: str) -> list[tuple[str, str, bytes]]:
    """Two squares of each colour, one that is labelled wrong, one that cannot be decoded."""
    first = {"train": 0, "val": 100, "test": 200}[split]
    squares = [(split, colour, square(colour, first + seed)) for colour in COLOURS for seed in range(2)]
    return [
        *squares,
        (split, "red", square("green", first + 9)),
        (split, "blue", b"\x89PNG\r\n\x1a\nrot" + bytes([first])),
    ]


@pytest.fixture
def squares(store, tmp_path):
    examples = [example for split in ("train", "val", "test") for example in wrong_sometimes(split)]
    return publish_dataset(store, tmp_path / "squares", examples)


EXPECTED = {"images": 8, "not_ok": 1, "top1": 6 / 8, "by_status": {"corrupt": 1, "ok": 7}}


def test_an_unpublished_file_is_measured_as_predict_would_answer(store, squares, tmp_path):
    card = colour_card()
    path = write_colour_model(tmp_path / "unpublished.onnx")
    steps = []
    found = measure(card, path, store, squares, "test", report=steps.append)
    assert {key: found[key] for key in EXPECTED} == EXPECTED
    assert not Path(store, "models").exists()
    assert not Path(store, "tables").exists()
    assert {(step.done, step.total) for step in steps} >= {(0, 8), (8, 8)}

    published = registry.publish(store, card, {ONNX_FILE: path})
    settings = PredictSettings(source=squares.source, model="colours", table="all_of_them", top_k=3)
    planned = predict.plan(store, settings)
    predict.work(store, settings, planned)
    table = Table(store, "all_of_them")
    parts = [f"{table.uri}/parts/model={published.reference}/{n}" for n in table.part_names(published.reference)]
    answers = {row["image"]: row["labels"] for part in parts for row in table.read_part(part).to_pylist()}
    from tasks.datasets.datasets import read_images

    images = read_images(store, squares, "test")
    by_hand = figures(
        images.column("label").to_pylist(),
        [
            labels and {entry["label"]: entry["score"] for entry in labels}
            for labels in map(answers.get, images.column("image").to_pylist())
        ],
        list(COLOURS),
        classes=list(squares.classes),
    )
    assert {key: found[key] for key in by_hand} == by_hand


def test_the_metrics_of_a_card(store, squares, tmp_path):
    card = colour_card()
    path = write_colour_model(tmp_path / "unpublished.onnx", sharpness=12.0)
    found = measure_all(card, path, store, squares)
    assert (found["dataset"], found["val"]["top1"], found["test"]["top1"]) == (squares.reference, 0.75, 0.75)
    assert found["temperature"] == found["val"]["temperature"] == found["test"]["temperature"] > 1
    assert found["val"]["ece_at_temperature"] < found["val"]["ece"]
    named = metrics.main_metric(replace(card, metrics=found))
    assert named == metrics.MainMetric("top1", 0.75, "test")
    assert metrics.main_metric(card) is None


def never(*_, **__):
    raise AssertionError("it predicts again")


def test_nothing_is_measured_twice(store, squares, tmp_path, monkeypatch):
    card = publish_colour_model(store, tmp_path)
    settings = EvaluateSettings(model="colours", dataset="squares")
    first = evaluate(store, settings)
    assert {key: first.metrics[key] for key in EXPECTED} == EXPECTED
    assert (first.model, first.dataset, first.split, first.table) == (
        card.reference,
        squares.reference,
        "test",
        None,
    )
    folder = Path(store, "models", "colours", card.version, "evaluations")
    assert [path.name for path in folder.iterdir()] == [f"{squares.reference}-test.json"]
    monkeypatch.setattr(predict, "work", never)
    assert evaluate(store, settings) == first
    with pytest.raises(AssertionError, match="it predicts again"):
        evaluate(store, EvaluateSettings(model="colours", dataset="squares", split="val"))


def test_the_figures_of_another_engine_are_not_kept(store, squares, tmp_path):
    card = publish_colour_model(store, tmp_path)
    found = evaluate(store, EvaluateSettings(model="colours", dataset="squares", engine="openvino"))
    assert found.metrics["engine"].startswith("openvino")
    assert not Path(store, "models", "colours", card.version, "evaluations").exists()
    exact = evaluate(store, EvaluateSettings(model="colours", dataset="squares"))
    assert exact.metrics["engine"] == "onnxruntime cpu fp32"


def test_what_training_measured_is_found_in_the_card(store, squares, tmp_path, monkeypatch):
    path = write_colour_model(tmp_path / "model.onnx")
    card = replace(colour_card(), metrics={"dataset": squares.reference, "test": {"top1": 0.5}})
    registry.publish(store, card, {ONNX_FILE: path})
    monkeypatch.setattr(predict, "work", never)
    assert evaluate(store, EvaluateSettings(model="colours", dataset="squares")).metrics == {"top1": 0.5}


def test_a_table_keeps_the_rows_and_a_second_run_adds_none(store, squares, tmp_path, monkeypatch):
    card = publish_colour_model(store, tmp_path)
    settings = EvaluateSettings(model="colours", dataset="squares", table="checked")
    first = evaluate(store, settings)
    assert {key: first.metrics[key] for key in EXPECTED} == EXPECTED
    table = Table(store, "checked")
    assert [head.source.rpartition("/")[2] for head in table.heads()] == [f"{squares.reference}-test.parquet"]
    assert sum(shard.images for head in table.heads() for shard in head.shards) == 8
    with monkeypatch.context() as patch:
        patch.setattr(predict, "work", never)
        assert evaluate(store, settings) == first
    assert table.models() == [card.reference]

    val = evaluate(store, settings.model_copy(update={"split": "val"}))
    assert val.metrics["images"] == 8  # the test split's rows in the same table have no part in it
    assert evaluate(store, settings).metrics == first.metrics


def test_an_image_that_changed_since_it_was_ingested_counts_as_wrong(store, squares, tmp_path):
    publish_colour_model(store, tmp_path)
    (tmp_path / "squares" / "0016.png").write_bytes(square("red", 999))
    (tmp_path / "squares" / "0017.png").unlink()
    found = evaluate(store, EvaluateSettings(model="colours", dataset="squares")).metrics
    assert (found["not_ok"], found["top1"]) == (3, 4 / 8)
    assert found["by_status"] == {"changed": 1, "corrupt": 1, "missing": 1, "ok": 5}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param({"model": "shapes"}, NotFound, "no model 'shapes'", id="model"),
        pytest.param({"dataset": "circles"}, NotFound, "no data set 'circles'", id="data set"),
        pytest.param({"dataset": "cats"}, UsageError, "have no class in common", id="classes"),
        pytest.param(
            {"dataset": "cats", "split": "val"}, UsageError, "no labelled images in its split val", id="split"
        ),
    ],
)
def test_what_cannot_be_measured(store, squares, tmp_path, settings, error, message):
    publish_colour_model(store, tmp_path)
    publish_dataset(store, tmp_path / "cats", [("test", "cat", square("red", 7))], "cats")
    with pytest.raises(error, match=message):
        evaluate(store, EvaluateSettings(**{"model": "colours", "dataset": "squares", **settings}))
    assert not list(Path(store).rglob("evaluations/*.json"))


def test_an_evaluation_that_is_damaged_is_named(store, squares, tmp_path):
    card = publish_colour_model(store, tmp_path)
    path = Path(store, "models", "colours", card.version, "evaluations", f"{squares.reference}-test.json")
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(StorageError, match=rf"{path} is damaged .* delete it"):
        find_metrics(store, card, squares, "test")


def test_the_figures_of_a_variant_are_its_own(store, squares, tmp_path):
    card = publish_colour_model(store, tmp_path)
    variant = registry.publish(
        store, card.variant("int8"), {"model.int8.onnx": write_colour_model(tmp_path / "v.onnx", order=(1, 0, 2))}
    )
    exact = evaluate(store, EvaluateSettings(model=card.reference, dataset="squares"))
    other = evaluate(store, EvaluateSettings(model=variant.reference, dataset="squares"))
    assert (exact.metrics["top1"], other.metrics["top1"]) == (6 / 8, 3 / 8)
    assert other.metrics["engine"] == "onnxruntime cpu int8"
    folder = Path(store, "models", "colours", card.version, "evaluations")
    assert {path.name for path in folder.iterdir()} == {
        f"{squares.reference}-test.json",
        f"{squares.reference}-test.int8.json",
    }


# --- objects

LIGHT = {"label": "light", "x_min": 16.0, "y_min": 8.0, "x_max": 48.0, "y_max": 24.0}  # where the tiny models see it
ELSEWHERE = {"label": "light", "x_min": 0.0, "y_min": 40.0, "x_max": 20.0, "y_max": 60.0}


def mask_of(*without: tuple[slice, slice]) -> str:
    """The mask of LIGHT in an image of 64×64, but for some rows and columns."""
    drawn = np.zeros((64, 64), np.uint8, order="F")
    drawn[8:24, 16:48] = 1
    for part in without:
        drawn[part] = 0
    return coco_mask.encode(drawn)["counts"].decode()


def picture(level: int, number: int) -> bytes:
    """A grey image of 64×64, no two the same."""
    return encode_png(np.full((64, 64, 3), level, np.uint8) + np.uint8(number))


@pytest.fixture
def objects(store, tmp_path):
    """Of six test images the models see something in five, at a score of their lightness; one cannot be decoded."""
    whole = {"mask": mask_of()}
    quarter = {"mask": mask_of((slice(8, 16), slice(16, 32)))}  # what the tiny model draws
    return publish_objects(
        store,
        tmp_path / "objects",
        [
            ("test", picture(240, 1), [LIGHT | quarter]),
            ("test", picture(230, 2), [LIGHT | whole, ELSEWHERE | whole | {"difficult": True}]),
            ("test", picture(120, 3), [LIGHT | {"crowd": True} | whole]),
            ("test", picture(110, 4), []),
            ("test", picture(20, 5), [LIGHT | whole]),
            ("test", picture(220, 6)[:60], [LIGHT | whole]),
            ("val", picture(243, 7), [LIGHT | quarter]),
            ("train", picture(200, 8), [LIGHT | quarter]),
        ],
        classes=("light", "grey"),
    )


def test_a_detector_is_measured_by_what_the_bulk_path_finds(store, objects, tmp_path):
    card = publish_detector(store, tmp_path)
    found = evaluate(store, EvaluateSettings(model="tiny_detector", dataset="objects")).metrics
    assert (found["images"], found["not_ok"], found["objects"]) == (6, 1, 4)
    assert found["confusion"]["counts"] == [[2, 0, 2], [0, 0, 0], [1, 0, 0]]
    assert found["at_score"] == {"score": card.score, "precision": 2 / 3, "recall": 0.5, "f1": pytest.approx(4 / 7)}
    assert (found["ap"], found["ap50"]) == (pytest.approx(51 / 101), pytest.approx(51 / 101))
    assert (found["unknown_classes"], found["operating_point"]) == (["grey"], None)
    assert found["by_status"] == {"corrupt": 1, "ok": 5}
    assert "mask_ap" not in found
    validated = evaluate(store, EvaluateSettings(model="tiny_detector", dataset="objects", split="val")).metrics
    assert (validated["ap"], validated["operating_point"]["f1"]) == (1.0, 1.0)
    named = metrics.main_metric(replace(card, metrics={"test": found}))
    assert named == metrics.MainMetric("ap", found["ap"], "test")


def test_masks_are_measured_too(store, objects, tmp_path):
    """The model leaves a quarter out, and rounds corners: one object is so, of the other that is not quite .75."""
    publish_instances(store, tmp_path)
    found = evaluate(store, EvaluateSettings(model="tiny_instances", dataset="objects")).metrics
    assert found["ap"] == pytest.approx(51 / 101)
    by_mask = [51 / 101] * 5 + [26 / 101] * 5
    assert found["mask_ap"] == pytest.approx(np.mean(by_mask), abs=1e-6)
    assert found["per_class"]["light"]["mask_ap50"] == pytest.approx(51 / 101)
    assert found["at_score"]["f1"] == pytest.approx(4 / 7)


def test_all_findings_are_measured_and_the_score_cuts_only_what_is_told(store, objects, tmp_path):
    """Average precision does not change with the card's score; the confusion does."""
    card = replace(publish_detector(store, tmp_path), score=0.93)
    found = measure(card, registry.fetch_model(store, card), store, objects, "test")
    assert found["ap"] == pytest.approx(51 / 101)
    assert found["confusion"]["counts"] == [[1, 0, 3], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("publish", "lacking"),
    [
        pytest.param(publish_detector, "no boxes", id="detect"),
        pytest.param(publish_instances, "no boxes and no masks", id="instance"),
        pytest.param(publish_segmenter, "no masks", id="semantic"),
    ],
)
def test_labels_of_images_say_nothing_of_objects(store, squares, tmp_path, publish, lacking):
    card = publish(store, tmp_path)
    with pytest.raises(
        UsageError, match=f"a model of task {card.task}, and the images of squares@.* have {lacking} to"
    ):
        evaluation.labelled_images(store, card, squares, "test")


def test_a_table_of_all_findings(store, objects, tmp_path):
    publish_detector(store, tmp_path)
    settings = EvaluateSettings(model="tiny_detector", dataset="objects", table="seen")
    kept = evaluate(store, settings)
    assert kept.metrics == evaluate(store, settings).metrics
    assert sum(shard.images for head in Table(store, "seen").heads() for shard in head.shards) == 6


def test_an_engine_that_cannot_load_the_file_is_said(store, squares, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot load colours@"):
        measure(colour_card(), tmp_path / "broken.onnx", store, squares, "test")


def test_a_task_without_metrics(store, squares, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MEASURES", {Task.DETECT: "detection_metrics"})
    with pytest.raises(UsageError, match="models of task classify cannot be measured; those of task detect can"):
        evaluation.labelled_images(store, colour_card(), squares, "test")
