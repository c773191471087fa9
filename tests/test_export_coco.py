"""Tables and data sets as COCO files, read back by pycocotools."""

import json
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from flows.__main__ import main
from models.errors import NotFound, UsageError
from models.settings.predict import PredictSettings
from tasks import predict
from tasks.export_coco import export_coco
from tests.tiny_models import LABELS, publish_classifier, publish_detector, publish_instances

BOX = [16, 8, 32, 16]  # the light object of the tiny models, in a 64×32 image
LIGHT = LABELS.index("light") + 1


@pytest.fixture(scope="module")
def mill(tmp_path_factory) -> str:
    """A store with a table of boxes, one of masks and one of labels, over three images."""
    folder = tmp_path_factory.mktemp("coco")
    store, photos = str(folder / "mill"), folder / "photos"
    (photos / "deep").mkdir(parents=True)
    Image.new("RGB", (64, 32), "black").save(photos / "dark.png")
    Image.new("RGB", (64, 32), "white").save(photos / "deep" / "light.png")
    (photos / "empty.png").touch()
    publish_classifier(store, folder)
    publish_detector(store, folder)
    publish_instances(store, folder)
    for model, table in (("tiny_detector", "boxes"), ("tiny_instances", "masks"), ("tiny", "labels")):
        settings = PredictSettings(source=str(photos), model=model, table=table)
        planned = predict.plan(store, settings)
        predict.work(store, settings, planned)
    return store


@pytest.mark.parametrize("table", ["boxes", "masks"])
def test_a_table_loads_in_pycocotools_and_so_do_its_results(mill, tmp_path, table):
    whole, results = tmp_path / "whole.json", tmp_path / "results.json"
    done = export_coco(mill, table, whole)
    assert (done.images, done.annotations, done.categories) == (2, 1, 5)
    export_coco(mill, table, results, results=True)
    truth = COCO(str(whole))
    assert [image["file_name"] for image in truth.imgs.values()] == ["dark.png", "deep/light.png"]
    assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == list(LABELS)
    for coco in (truth, truth.loadRes(str(results))):
        (found,) = coco.loadAnns(coco.getAnnIds())
        assert (found["image_id"], found["category_id"], found["score"]) == (2, LIGHT, 0.5)
        assert found["bbox"] == BOX


def test_a_mask_keeps_its_area_and_a_box_has_its_own(mill, tmp_path):
    found = {}
    for table in ("boxes", "masks"):
        export_coco(mill, table, tmp_path / "x.json")
        (found[table],) = json.loads((tmp_path / "x.json").read_text())["annotations"]
    assert found["boxes"]["area"] == 32 * 16
    assert "segmentation" not in found["boxes"]
    assert found["masks"]["segmentation"]["size"] == [32, 64]
    assert 0.6 < found["masks"]["area"] / (32 * 16) < 0.75


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        pytest.param("labels", {}, UsageError, "results of task classify", id="labels are no objects"),
        pytest.param("none", {}, NotFound, "tables there: boxes, labels, masks", id="neither table nor data set"),
        pytest.param("none", {"results": True}, UsageError, "belong to tables", id="results of no table"),
        pytest.param("boxes", {"model": "tiny"}, NotFound, "models there: tiny_detector@", id="another model"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_no_file(mill, tmp_path, source, options, error, message):
    with pytest.raises(error, match=message):
        export_coco(mill, source, tmp_path / "x.json", **options)
    assert list(tmp_path.iterdir()) == []


def test_several_models_need_one_to_be_named(mill, tmp_path):
    publish_detector(mill, tmp_path, name="second")
    photos = Path(mill).parent / "photos"
    for model in ("tiny_detector", "second"):
        settings = PredictSettings(source=str(photos), model=model, table="two")
        predict.work(mill, settings, predict.plan(mill, settings))
    with pytest.raises(UsageError, match=r"2 models; name one with --model: second@.*, tiny_detector@"):
        export_coco(mill, "two", tmp_path / "x.json")
    assert export_coco(mill, "two", tmp_path / "x.json", model="second").annotations == 1


def test_the_command_writes_a_data_set(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    Image.new("RGB", (40, 30), "white").save(source / "a.png")
    document = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cell"}],
    }
    (source / "labels.json").write_text(json.dumps(document))
    store = ["--store", str(tmp_path / "mill")]
    assert main(["ingest", str(source), "--name", "cells", "--direct", *store]) == 0
    capsys.readouterr()
    assert main(["export-coco", "cells", "--out", str(tmp_path / "x.json"), "--json", *store]) == 0
    assert json.loads(capsys.readouterr().out)["annotations"] == 1
    coco = COCO(str(tmp_path / "x.json"))
    (found,) = coco.loadAnns(coco.getAnnIds())
    assert (found["bbox"], coco.imgs[1]["file_name"]) == ([1, 2, 10, 12], "a.png")
