"""Instances and segments end to end: real files, a real slot process, hand-made ONNX models, SQL over the table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from models.card import Card
from models.errors import ModelError, UsageError
from models.imaging.geometry import ResizeRule
from models.records import Task
from models.runtime.comparisons import COMPARISONS
from models.runtime.parity import check_values
from models.settings.predict import PredictSettings
from tasks import predict
from tasks.adopt import import_model
from tasks.query import ask
from tests.tiny_models import LABELS, publish_instances, publish_segmenter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")

TURNED = 6  # EXIF: stored lying, shown upright


def run(store: str, photos: Path, model: str, table: str, **settings) -> predict.Summary:
    chosen = PredictSettings(source=str(photos), model=model, table=table, **settings)
    planned = predict.plan(store, chosen)
    return predict.summarise(store, chosen, planned, [predict.work(store, chosen, planned)], 1.0)


@pytest.fixture(scope="module")
def mill(tmp_path_factory) -> str:
    """A store with a table of objects and one of segments, over the same images."""
    folder = tmp_path_factory.mktemp("masks")
    store, photos = str(folder / "mill"), folder / "photos"
    photos.mkdir()
    exif = Image.Exif()
    exif[274] = TURNED
    Image.new("RGB", (64, 32), "white").save(photos / "light.png")
    Image.new("RGB", (64, 32), "black").save(photos / "dark.png")
    pixels = np.zeros((32, 64), np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).convert("RGB").save(photos / "turned.jpg", exif=exif, quality=95)
    publish_instances(store, folder)
    publish_segmenter(store, folder)
    assert run(store, photos, "tiny_instances", "things").by_status == {"ok": 3}
    assert run(store, photos, "tiny_segmenter", "stuff").by_status == {"ok": 3}
    return store


def decoded(counts: str, height: int, width: int) -> np.ndarray:
    return coco_mask.decode({"size": [height, width], "counts": counts}).astype(bool)


def of_image(store: str, view: str, name: str) -> list[dict]:
    answer = ask(store, f"from {view} where image like '%/{name}.%'")
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def test_a_mask_lies_in_the_box_in_pixels_of_the_original(mill):
    (found,) = of_image(mill, "things_objects", "light")
    # 64×32 is scaled by half into 32×32: the box comes back doubled, without the quarter that the mask leaves out.
    assert (found["x_min"], found["y_min"], found["x_max"], found["y_max"]) == (16, 8, 48, 24)
    mask = decoded(found["mask"], found["height"], found["width"])
    assert mask.shape == (32, 64)
    assert found["area"] == mask.sum()
    assert [bool(mask[y, x]) for x, y in [(24, 12), (40, 12), (24, 20), (40, 20)]] == [False, True, True, True]
    rows, columns = np.nonzero(mask)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (16, 8, 48, 24)


@pytest.mark.parametrize(("table", "column"), [("things", "objects"), ("stuff", "segments")])
def test_an_image_without_findings_is_ok_with_an_empty_list(mill, table, column):
    (row,) = of_image(mill, table, "dark")
    assert (row["status"], row[column]) == ("ok", [])
    assert of_image(mill, f"{table}_{column}", "dark") == []


def test_segments_are_in_pixels_of_the_oriented_original_and_padding_is_no_segment(mill):
    (found,) = of_image(mill, "stuff_segments", "turned")
    assert (found["label"], found["area"], found["width"], found["height"]) == ("light", 32 * 32, 32, 64)
    mask = decoded(found["mask"], 64, 32)
    assert mask[:32].all()
    assert not mask[32:].any()


def test_only_objects_have_a_threshold(mill, tmp_path):
    Image.new("RGB", (32, 32), (200, 200, 200)).save(tmp_path / "light.png")
    run(mill, tmp_path, "tiny_instances", "strict", score=0.9)
    assert ask(mill, "select objects from strict").rows == [([],)]
    with pytest.raises(UsageError, match="--score does not apply to models of task semantic"):
        run(mill, tmp_path, "tiny_segmenter", "other", score=0.9)


@pytest.mark.parametrize(
    ("file", "task", "labels"),
    [
        ("tiny_instances-eeeeeeeeeeee", "instance", LABELS),
        ("tiny_segmenter-ffffffffffff", "semantic", ("grey", "light")),
    ],
)
def test_a_foreign_file_is_adopted_after_its_trial(mill, tmp_path, file, task, labels):
    card_file = tmp_path / "card.json"
    rule = {"mode": "letterbox", "height": 32, "width": 32}
    card_file.write_text(json.dumps({"task": task, "labels": labels, "input": rule}))
    onnx_file = Path(mill).parent / f"{file}.onnx"
    card = import_model(str(onnx_file), "adopted", str(tmp_path / "mill"), card_file=str(card_file))
    assert (card.task, card.parity["agrees"]) == (task, True)
    assert card.parity["compared"] > 0


def instances(count: int, masks: np.ndarray) -> dict[str, np.ndarray]:
    """So many objects in the first image, one below the other."""
    tops = 10 * np.arange(count, dtype=np.float32)
    boxes = np.stack([tops, tops, tops + 9, tops + 9], axis=1)
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    of_rows = np.zeros(count, np.int64)
    return {"boxes_xyxy": boxes, "scores": scores, "labels": of_rows, "batch_index": of_rows, "masks": masks}


def compare(task: Task, expected: dict, actual: dict) -> tuple[int, dict[str, float]]:
    card = Card("tiny", "0" * 12, task, "tiny", LABELS, ResizeRule("letterbox", 32, 32))
    comparison = COMPARISONS[task]
    assert set(comparison.tolerance) == {"fp32", "bf16", "fp16", "int8"}
    compared, largest = comparison.differences(expected, actual, comparison.tolerance["fp32"], card)
    assert set(largest) == set(comparison.tolerance["fp32"])
    return compared, largest


def test_instances_are_compared_as_sets_mask_by_mask():
    masks = np.linspace(0.1, 0.9, 3 * 16, dtype=np.float32).reshape(3, 4, 4)
    expected = instances(3, masks)
    shuffled = {name: values[[2, 0, 1]] for name, values in expected.items()}
    assert compare(Task.INSTANCE, expected, shuffled) == (
        3,
        dict.fromkeys(compare(Task.INSTANCE, expected, expected)[1], 0.0),
    )
    other = masks.copy()
    other[1, 0, :2] = 1 - other[1, 0, :2]
    compared, largest = compare(Task.INSTANCE, expected, {**expected, "masks": other})
    assert (compared, largest["mask_pixels"]) == (3, 2 / 16)
    assert largest["masks"] == pytest.approx(np.abs(other - masks)[1].mean())
    none = instances(0, np.empty((0, 4, 4), np.float32))
    assert compare(Task.INSTANCE, none, none)[0] == 0
    assert compare(Task.INSTANCE, expected, none)[1]["unmatched"] > 0.5


def test_class_maps_are_compared_pixel_by_pixel():
    expected = {"class_map": np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4) % 3}
    assert compare(Task.SEMANTIC, expected, expected) == (2, {"pixels": 0.0})
    other = expected["class_map"].copy()
    other[1, :2] += 1
    assert compare(Task.SEMANTIC, expected, {"class_map": other}) == (2, {"pixels": 0.5})
    asleep = {"class_map": np.zeros((2, 4, 4), np.uint8)}
    assert compare(Task.SEMANTIC, asleep, asleep)[0] == 0


@pytest.mark.parametrize(
    ("task", "outputs", "message"),
    [
        pytest.param(
            Task.SEMANTIC, {"class_map": np.full((1, 32, 32), 6, np.uint8)}, "class_map goes to 6", id="class"
        ),
        pytest.param(
            Task.SEMANTIC, {"class_map": np.zeros((1, 8, 8), np.uint8)}, r"\[32, 32\], got \[8, 8\]", id="size"
        ),
        pytest.param(
            Task.INSTANCE, instances(1, np.full((1, 4, 4), 3, np.float32)), "is the sigmoid missing", id="logits"
        ),
        pytest.param(Task.INSTANCE, instances(1, np.zeros((1, 4, 5), np.float32)), "square masks", id="shape"),
        pytest.param(
            Task.INSTANCE,
            {**instances(1, np.zeros((1, 4, 4), np.float32)), "labels": np.array([7])},
            "labels goes from 7",
            id="label",
        ),
    ],
)
def test_outputs_that_break_the_contract_are_refused(task, outputs, message):
    card = Card("tiny", "0" * 12, task, "tiny", LABELS, ResizeRule("letterbox", 32, 32))
    with pytest.raises(ModelError, match=message):
        check_values(card, outputs)
    fitting = {"class_map": np.full((1, 32, 32), 5, np.uint8)}
    check_values(replace(card, task=Task.SEMANTIC), fitting)
