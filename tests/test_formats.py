"""The readers of labelled formats: what they find, what they refuse and why, and that nothing is lost."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from broken_annotations import (
    HEIGHT,
    WIDTH,
    Broken,
    Files,
    annotation,
    box,
    broken_annotations,
    coco,
    grey,
    png,
    runs,
    voc,
    yolo,
)
from numpy.typing import NDArray
from PIL import Image

from models.dataset import ANNOTATIONS_SCHEMA, IMAGES_SCHEMA, Dataset
from models.errors import NotFound, UsageError
from models.imaging import masks
from tasks.datasets import formats
from tasks.datasets.coco_writer import to_coco
from tasks.datasets.labelled import Labelled, Reject
from tasks.datasets.regions import check_regions
from tasks.datasets.tree import open_tree
from tasks.storage import open_storage


def write(folder: Path, files: Files) -> str:
    """The URI of a folder that holds these files."""
    for path, data in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(folder)


def read(source: str, format_name: str, annotations: str | None = None) -> Labelled:
    with open_tree(source) as tree:
        return formats.reader(format_name).read(tree, annotations)


def rows_of(labelled: Labelled) -> tuple[list[dict[str, Any]], list[Reject]]:
    """The rows and all rejects, as if every image were 40×30."""
    rows: list[dict[str, Any]] = []
    rejects = list(labelled.rejects)
    for image in labelled.images:
        regions = [region for region in labelled.regions if region.image == image.path]
        good, bad = check_regions(regions, WIDTH, HEIGHT, labelled.classes)
        rows += [{"image": image.path, **row} for row in good]
        rejects += bad
    return rows, rejects


def brief(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["image"], row["label"], row["x_min"], row["y_min"], row["x_max"], row["y_max"]) for row in rows]


# Of broken sources: one body for all of them.


@pytest.mark.parametrize("broken", broken_annotations(), ids=lambda broken: broken.name)
def test_broken_annotations(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "source", broken.files)
    if broken.error:
        with pytest.raises(UsageError) as raised:
            read(source, broken.format)
        message = str(raised.value)
        assert broken.error in message
        assert broken.names in message
        assert "\n" not in message
        assert len(message) < 500
    else:
        labelled = read(source, broken.format)
        rows, rejects = rows_of(labelled)
        found = [(reject.kind, reject.source, reject.line, reject.reason) for reject in rejects]
        expected = [(kind, found_source(source, broken, file), line, why) for kind, file, line, why in broken.rejects]
        assert sorted(found, key=str) == sorted(expected, key=str)
        assert len(rows) == broken.kept
        assert len(labelled.images) == broken.images
        assert all("\n" not in reject.detail and len(reject.detail) < 300 for reject in rejects)
    assert not (tmp_path / "executed").exists()


def found_source(source: str, broken: Broken, file: str) -> str:
    """The URI of the one file whose path ends so."""
    (path,) = [path for path in broken.files if path.endswith(file)]
    return f"{source}/{path}"


# Of sources that are right: what is read.


def coco_of(name: str, image_id: object = 1, **changed: Any) -> bytes:
    """COCO's JSON of one image with this file name and one box."""
    image = {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT}
    row = annotation(image_id=image_id, bbox=[5, 5, 10, 10])
    return coco(**{"images": [image], "annotations": [row]} | changed)


BOX = (5.0, 5.0, 15.0, 15.0)
A_CELL = [("a.jpg", "cell", *BOX)]


def cells(*images: str, label: str | None = "cell", box_xyxy: tuple[float, ...] = BOX) -> list[tuple[Any, ...]]:
    return [(image, label, *box_xyxy) for image in images]


CORNER = (0.0, 0.0, 10.0, 10.0)  # of the masks
MIDDLE = (16.0, 12.0, 24.0, 18.0)  # of YOLO's good line
TWO = "background\ncell\n"


def colour_mask(*colours: tuple[int, int, int]) -> bytes:
    """Black, but for the upper left 10×10, whose left and right halves have these colours."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:10, :5], pixels[:10, 5:10] = colours[0], colours[-1]
    return png(pixels)


def palette_mask(values: NDArray[np.uint8]) -> bytes:
    """A PNG with a palette in which 2 is (0, 200, 0)."""
    image = Image.fromarray(values)
    image.putpalette([0, 0, 0, 7, 7, 7, 0, 200, 0])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def one_mask(data: bytes, name: str = "a.png", **classes: str) -> Files:
    """One image with its mask, and a list of classes."""
    lists = {".".join(file.rsplit("_", 1)): text for file, text in classes.items()}
    return {"images/a.jpg": "", f"masks/{name}": data, **lists}


@pytest.mark.parametrize(
    ("format_name", "files", "rows"),
    [
        pytest.param("coco", {"x.json": coco_of("a.jpg"), "a.jpg": ""}, A_CELL, id="coco beside"),
        pytest.param("coco", {"x.json": coco_of("a.jpg"), "images/a.jpg": ""}, cells("images/a.jpg"), id="coco images"),
        pytest.param("coco", {"x.json": coco_of("z/a.jpg"), "b/a.jpg": ""}, cells("b/a.jpg"), id="coco by base name"),
        pytest.param("coco", {"x.json": coco_of("z\\a.jpg"), "z/a.jpg": ""}, cells("z/a.jpg"), id="coco Windows"),
        pytest.param("coco", {"x.json": coco_of("a.jpg", "007"), "a.jpg": ""}, A_CELL, id="coco id as text"),
        pytest.param("coco", {"x.json": coco_of("a.jpg", 1.0), "a.jpg": ""}, A_CELL, id="coco id with decimals"),
        pytest.param(
            "coco",
            {"x.json": coco_of("a.jpg", annotations=[annotation(image_id="1", bbox=[5, 5, 10, 10])]), "a.jpg": ""},
            A_CELL,
            id="coco id as number and as text",
        ),
        pytest.param(
            "coco", {"x.json": b"\xef\xbb\xbf" + coco_of("a.jpg"), "a.jpg": ""}, A_CELL, id="coco with byte order mark"
        ),
        pytest.param(
            "coco", {"x.json": coco_of("a.jpg").decode().encode("utf-16"), "a.jpg": ""}, A_CELL, id="coco in UTF-16"
        ),
        pytest.param(
            "coco",
            {
                "train/_annotations.coco.json": coco_of("a.jpg"),
                "train/a.jpg": "",
                "valid/_annotations.coco.json": coco_of("a.jpg"),
                "valid/a.jpg": "",
            },
            cells("train/a.jpg", "valid/a.jpg"),
            id="coco one name in two folders",
        ),
        pytest.param(
            "coco",
            {
                "annotations/instances_train2017.json": coco_of("a.jpg"),
                "train2017/a.jpg": "",
                "annotations/captions_train2017.json": '{"images": [], "annotations": []}',
                "annotations/instances_val2017.json": coco_of("a.jpg"),
                "val2017/a.jpg": "",
            },
            cells("train2017/a.jpg", "val2017/a.jpg"),
            id="coco as published",
        ),
        pytest.param("coco", {"x.json": coco(annotations=[]), "a.jpg": ""}, [], id="coco no annotation"),
        pytest.param("voc", {"Annotations/a.xml": voc(), "JPEGImages/a.jpg": ""}, cells("JPEGImages/a.jpg"), id="voc"),
        pytest.param("voc", {"a.xml": voc(), "a.jpg": ""}, A_CELL, id="voc beside"),
        pytest.param("voc", {"b.xml": voc(), "b.png": ""}, cells("b.png"), id="voc renamed"),
        pytest.param("voc", {"ann/1.xml": voc(), "ims/a.jpg": ""}, cells("ims/a.jpg"), id="voc elsewhere"),
        pytest.param(
            "voc",
            {"a.xml": voc().replace('"1.0"', '"1.0" encoding="utf-16"').encode("utf-16"), "a.jpg": ""},
            A_CELL,
            id="voc in UTF-16",
        ),
        pytest.param("voc", {"a.xml": "<annotation/>", "a.jpg": ""}, [], id="voc no object"),
        pytest.param("yolo", yolo(), cells("images/a.jpg", box_xyxy=MIDDLE), id="yolo"),
        pytest.param(
            "yolo",
            {"a.jpg": "", "a.txt": "1 .5 .5 .2 .2", "classes.txt": "no\ncell\n\n"},
            cells("a.jpg", box_xyxy=MIDDLE),
            id="yolo beside",
        ),
        pytest.param(
            "yolo",
            {"a.jpg": "", "a.txt": "1.0 .5 .5 .2 .2"},
            cells("a.jpg", label="1", box_xyxy=MIDDLE),
            id="yolo without names",
        ),
        pytest.param("yolo", {**yolo(), "labels/a.txt": ""}, [], id="yolo empty"),
        pytest.param("yolo", {"data.yaml": yolo()["data.yaml"], "images/a.jpg": ""}, [], id="yolo no label file"),
        pytest.param(
            "yolo",
            yolo(names="{3: nucleus, 0: cell}"),
            cells("images/a.jpg", box_xyxy=MIDDLE),
            id="yolo names by number",
        ),
        pytest.param("yolo", yolo(names="[no, yes]"), cells("images/a.jpg", label="no", box_xyxy=MIDDLE), id="yolo no"),
        pytest.param(
            "yolo", yolo(names="", nc="2"), cells("images/a.jpg", label="0", box_xyxy=MIDDLE), id="yolo only nc"
        ),
        pytest.param(
            "yolo",
            {**yolo(), "labels/a.txt": "0 .5 .5 .2 .2\r\n".encode("utf-16")},
            cells("images/a.jpg", box_xyxy=MIDDLE),
            id="yolo in UTF-16",
        ),
        pytest.param(
            "yolo",
            {**yolo(kpt_shape="[1, 3]"), "labels/a.txt": "0 .5 .5 .2 .2 .5 .5 2"},
            cells("images/a.jpg", box_xyxy=MIDDLE),
            id="yolo key points",
        ),
        pytest.param(
            "yolo",
            {**yolo(), "labels/a.txt": "0 .125 .2 .375 .2 .375 .5"},
            cells("images/a.jpg", box_xyxy=(5, 6, 15, 15)),
            id="yolo polygon",
        ),
        pytest.param(
            "yolo",
            yolo(train="../images", val="../images", test="../test/images"),
            cells("images/a.jpg", box_xyxy=MIDDLE),
            id="yolo too many ..",
        ),
        pytest.param(
            "yolo", yolo(path="/datasets/cells"), cells("images/a.jpg", box_xyxy=MIDDLE), id="yolo of another machine"
        ),
        pytest.param(
            "yolo",
            {**yolo(train="[list.txt]", val=""), "list.txt": "./images/a.jpg\n\n"},
            cells("images/a.jpg", box_xyxy=MIDDLE),
            id="yolo list",
        ),
        pytest.param(
            "masks", one_mask(png(grey(3))), cells("images/a.jpg", label="3", box_xyxy=CORNER), id="masks grey"
        ),
        pytest.param(
            "masks",
            one_mask(palette_mask(grey(2))),
            cells("images/a.jpg", label="2", box_xyxy=CORNER),
            id="masks palette",
        ),
        pytest.param(
            "masks",
            one_mask(png(grey(255))),
            cells("images/a.jpg", label="foreground", box_xyxy=CORNER),
            id="masks 0 and 255",
        ),
        pytest.param(
            "masks",
            one_mask(png(grey(255)), classes_txt="cell"),
            cells("images/a.jpg", box_xyxy=CORNER),
            id="masks 0 and 255 with a name",
        ),
        pytest.param(
            "masks",
            one_mask(png(np.where(grey(255) > 0, grey(255), 1))),
            [
                *cells("images/a.jpg", label="1", box_xyxy=(0, 0, 40, 30)),
                *cells("images/a.jpg", label=None, box_xyxy=CORNER),
            ],
            id="masks void",
        ),
        pytest.param(
            "masks", one_mask(png(grey(1)), classes_txt=TWO), cells("images/a.jpg", box_xyxy=CORNER), id="masks list"
        ),
        pytest.param(
            "masks",
            one_mask(png(grey(1)), classes_txt="cell"),
            cells("images/a.jpg", box_xyxy=CORNER),
            id="masks list that begins at 1",
        ),
        pytest.param(
            "masks",
            one_mask(png(grey(1)), classes_txt="sky\ncell"),
            [*cells("images/a.jpg", label="sky", box_xyxy=(0, 0, 40, 30)), *cells("images/a.jpg", box_xyxy=CORNER)],
            id="masks list that begins at 0",
        ),
        pytest.param(
            "masks",
            one_mask(png(grey(9)), classes_csv="name;value\ncell;9\n"),
            cells("images/a.jpg", box_xyxy=CORNER),
            id="masks values",
        ),
        pytest.param(
            "masks",
            one_mask(colour_mask((9, 8, 7)), classes_csv="name,r,g,b\ncell,9,8,7\n"),
            cells("images/a.jpg", box_xyxy=CORNER),
            id="masks colours",
        ),
        pytest.param(
            "masks",
            one_mask(colour_mask((9, 8, 7), (1, 2, 3)), label_colors_txt="9 8 7\tcell\n1 2 3\tcell\n0 0 0\tVoid\n"),
            [*cells("images/a.jpg", label=None, box_xyxy=(0, 0, 40, 30)), *cells("images/a.jpg", box_xyxy=CORNER)],
            id="masks two colours of one class, and void",
        ),
        pytest.param(
            "masks",
            one_mask(palette_mask(grey(2)), labelmap_txt="# label:color_rgb:parts:actions\ncell:0,200,0::\n"),
            cells("images/a.jpg", box_xyxy=CORNER),
            id="masks colours of CVAT, in a palette",
        ),
        pytest.param(
            "masks",
            one_mask(png(grey(1)), "a_mask.png"),
            cells("images/a.jpg", label="1", box_xyxy=CORNER),
            id="masks ending of the name",
        ),
        pytest.param(
            "masks",
            {"train/imgs/a.jpg": "", "train/gt/a.png": png(grey(1))},
            cells("train/imgs/a.jpg", label="1", box_xyxy=CORNER),
            id="masks below splits",
        ),
        pytest.param("masks", one_mask(png(grey(0))), [], id="masks nothing but background"),
    ],
)
def test_reads_and_recognises(format_name: str, files: Files, rows: list[tuple[Any, ...]], tmp_path: Path) -> None:
    source = write(tmp_path, files)
    with open_tree(source) as tree:
        assert formats.recognise(tree) == format_name
        labelled = formats.reader(format_name).read(tree, None)
    found, rejects = rows_of(labelled)
    assert brief(found) == rows
    assert not rejects
    assert labelled.format == format_name
    assert labelled.classes is not None or format_name == "voc"


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"a.jpg": ""}, id="images"),
        pytest.param({"mask/a.jpg": "", "no_mask/b.jpg": ""}, id="classes called mask and no_mask"),
        pytest.param({"cats/a.jpg": "", "cats/a.txt": "a cat on 1 mat", "labels.txt": "cats"}, id="captions"),
        pytest.param({"cats/a.jpg": "", "cats/a.json": '{"shapes": []}', "package.json": "{}"}, id="other JSON"),
        pytest.param({"cats/a.jpg": "", "index.json": '{"images": ["a.jpg"]}'}, id="JSON with images"),
        pytest.param({"cats/a.jpg": "", "a.xml": "<project/>", "config.yaml": "names: x"}, id="other XML and YAML"),
        pytest.param({"cats/a.jpg": "", "data.json": "[" * 100_000, "b.xml": b"\x80", "c.yaml": b"\x80"}, id="hostile"),
    ],
)
def test_others_are_not_recognised(files: Files, tmp_path: Path) -> None:
    with open_tree(write(tmp_path, files)) as tree:
        assert formats.recognise(tree) == "folder"


BOTH: Files = {"a.jpg": "", "b.jpg": ""}


@pytest.mark.parametrize(
    ("format_name", "files", "splits"),
    [
        pytest.param("coco", {"train.json": coco_of("a.jpg"), "a.jpg": ""}, [None], id="coco one file"),
        pytest.param(
            "coco",
            {"instances_train2017.json": coco_of("a.jpg"), "instances_val2017.json": coco_of("b.jpg"), **BOTH},
            ["train", "val"],
            id="coco files",
        ),
        pytest.param(
            "coco",
            {"test/x.json": coco_of("a.jpg"), "test/a.jpg": "", "valid/x.json": coco_of("b.jpg"), "valid/b.jpg": ""},
            ["test", "val"],
            id="coco folders",
        ),
        pytest.param(
            "coco",
            {"one.json": coco_of("a.jpg"), "val.json": coco_of("b.jpg"), **BOTH},
            [None, None],
            id="coco not all are splits",
        ),
        pytest.param(
            "voc",
            {
                "a.xml": voc(),
                "b.xml": voc(),
                **BOTH,
                "ImageSets/Main/train.txt": "a\n",
                "ImageSets/Main/test.txt": "b 1",
            },
            ["train", "test"],
            id="voc lists",
        ),
        pytest.param(
            "voc",
            {"a.xml": voc(), "b.xml": voc(), **BOTH, "ImageSets/Main/trainval.txt": "a"},
            ["train", None],
            id="voc trainval",
        ),
        pytest.param(
            "voc",
            {"a.xml": voc(), "a.jpg": "", "ImageSets/Main/trainval.txt": "a", "ImageSets/Main/val.txt": "a"},
            ["val"],
            id="voc trainval beside val",
        ),
        pytest.param(
            "voc",
            {"train/a.xml": voc(), "train/a.jpg": "", "valid/b.xml": voc(), "valid/b.jpg": ""},
            ["train", "val"],
            id="voc folders",
        ),
        pytest.param("yolo", yolo(), ["train"], id="yolo the same folder twice"),
        pytest.param(
            "yolo",
            {**yolo(train="1.txt", val="2.txt"), "images/b.jpg": "", "1.txt": "images/b.jpg", "2.txt": "images/a.jpg"},
            ["train", "val"],
            id="yolo lists",
        ),
        pytest.param(
            "yolo",
            {"images/train/a.jpg": "", "images/val/b.jpg": "", "labels/train/a.txt": "0 .5 .5 .2 .2"},
            ["train", "val"],
            id="yolo folders",
        ),
        pytest.param(
            "masks",
            {f"{kind}/{name}.png": png(grey()) for kind in ("images", "masks") for name in ("train/a", "test/b")},
            ["test", "train"],
            id="masks folders",
        ),
    ],
)
def test_splits(format_name: str, files: Files, splits: list[str | None], tmp_path: Path) -> None:
    labelled = read(write(tmp_path, files), format_name)
    assert [image.split for image in labelled.images] == splits
    assert not labelled.rejects


@pytest.mark.parametrize(
    ("format_name", "files", "annotations", "rows"),
    [
        pytest.param("coco", {"a.jpg": ""}, {"x.json": coco_of("a.jpg")}, A_CELL, id="coco file"),
        pytest.param("voc", {"a.jpg": ""}, {"a.xml": voc()}, A_CELL, id="voc file"),
        pytest.param(
            "yolo",
            {"images/a.jpg": "", "labels/a.txt": "0 .5 .5 .2 .2"},
            {"my.yaml": "names: [cell]\ntrain: images"},
            cells("images/a.jpg", box_xyxy=MIDDLE),
            id="yolo description",
        ),
        pytest.param(
            "yolo",
            {"images/train/a.jpg": ""},
            {"train/a.txt": "1 .5 .5 .2 .2", "classes.txt": "no\ncell"},
            cells("images/train/a.jpg", box_xyxy=MIDDLE),
            id="yolo labels",
        ),
        pytest.param(
            "yolo",
            {"train/a.jpg": ""},
            {"data.yaml": "names: [cell]\ntrain: train", "labels/train/a.txt": "0 .5 .5 .2 .2"},
            cells("train/a.jpg", box_xyxy=MIDDLE),
            id="yolo description and labels",
        ),
        pytest.param(
            "masks",
            one_mask(png(grey(4))),
            {"x.csv": "cell,4"},
            cells("images/a.jpg", box_xyxy=CORNER),
            id="masks list",
        ),
        pytest.param(
            "masks",
            {"a.jpg": ""},
            {"a.png": png(grey(1)), "classes.txt": TWO},
            cells("a.jpg", box_xyxy=CORNER),
            id="masks",
        ),
    ],
)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_annotations_elsewhere(
    format_name: str, files: Files, annotations: Files, rows: list[tuple[Any, ...]], where: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", files)
    folder = write(tmp_path / ("source/apart" if where == "inside" else "apart"), annotations)
    named = f"{folder}/{next(iter(annotations))}" if len(annotations) == 1 else folder
    with open_tree(source) as tree:
        assert formats.reader(format_name).recognise(tree, named)
        labelled = formats.reader(format_name).read(tree, named)
    found, rejects = rows_of(labelled)
    assert brief(found) == rows
    assert not rejects
    with pytest.raises(NotFound, match="nowhere"):
        read(source, format_name, "nowhere")


EVERYWHERE: list[tuple[str, Files, str, str]] = [
    ("coco", {"x.json": coco(annotation(bbox=[1, 1, 0, 0])), "images/a.jpg": ""}, "x.json", "zero area"),
    ("voc", {"Annotations/a.xml": voc(box(1, 1, 1, 1)), "JPEGImages/a.jpg": ""}, "Annotations/a.xml", "zero area"),
    ("yolo", yolo("0 .5 .5 0 0"), "labels/a.txt", "zero area"),
    ("masks", {**one_mask(png(grey())), "masks/b.png": png(grey())}, "masks/b.png", "missing image"),
]


@pytest.mark.parametrize(("format_name", "files", "file", "reason"), EVERYWHERE, ids=[each[0] for each in EVERYWHERE])
@pytest.mark.parametrize("where", ["archive", "bucket"])
def test_reads_archives_and_buckets(
    format_name: str, files: Files, file: str, reason: str, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if where == "archive":
        source = f"{tmp_path}/cells.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
    else:
        source = f"s3://{request.getfixturevalue('bucket')}/cells"
        for path, data in files.items():
            content = data if isinstance(data, bytes) else data.encode()
            assert open_storage(source).put_if_absent(f"{source}/{path}", content)
    with open_tree(source) as tree:
        assert formats.recognise(tree) == format_name
        rows, rejects = rows_of(formats.reader(format_name).read(tree, None))
    assert len(rows) == 1
    assert [(reject.source, reject.reason) for reject in rejects] == [(f"{source}/{file}", reason)]


@pytest.mark.parametrize(
    ("format_name", "files", "line"),
    [
        pytest.param("coco", {"x.json": coco_of("../../a.jpg")}, 1, id="coco"),
        pytest.param("voc", {"Annotations/x.xml": voc()}, None, id="voc"),
        pytest.param("yolo", {**yolo(train="x.txt", val=""), "x.txt": "images/a.jpg\n\nb.jpg"}, 3, id="yolo"),
    ],
)
def test_missing_images_are_named(format_name: str, files: Files, line: int | None, tmp_path: Path) -> None:
    labelled = read(write(tmp_path, files), format_name)
    (image,) = [image for image in labelled.images if not (tmp_path / image.path).exists()]
    assert image.source.rpartition("/")[2].startswith("x.")
    assert image.line == line
    assert not image.path.startswith(("/", ".."))


def test_voc_keeps_what_the_file_says(tmp_path: Path) -> None:
    """Numbers counted from 1 as they are, difficult, the sizes; and the name inside, where two images share a stem."""
    part = "<part><name>rim</name><object/></part>"
    objects = [box(1, 1, WIDTH, HEIGHT, name="dish", more=f"<difficult>1</difficult>{part}"), "\n", box(0, 0, 39.5, 29)]
    source = write(tmp_path, {"a.xml": voc(*objects), "a.jpg": "", "a.png": ""})
    labelled = read(source, "voc")
    (image,) = labelled.images
    assert (image.path, image.width, image.height, image.source) == ("a.jpg", WIDTH, HEIGHT, f"{source}/a.xml")
    _, dish, other = labelled.regions
    assert (dish.label, dish.box_xyxy, dish.difficult, dish.line) == ("dish", (1, 1, 40, 30), True, 6)
    assert (other.box_xyxy, other.difficult, other.line) == ((0, 0, 39.5, 29), False, 9)
    assert labelled.rejects == [Reject("image", f"{source}/a.png", None, "no annotation file")]


def test_classes_keep_the_order_of_the_source(tmp_path: Path) -> None:
    categories = [{"id": 90, "name": "z"}, {"id": 3, "name": "m"}, {"id": 10, "name": "a"}, {"id": 11, "name": "m"}]
    rows = [annotation(category_id=number, bbox=[number, 1, 2, 2]) for number in (3, 10, 11)]
    source = write(tmp_path / "coco", {"x.json": coco(annotations=rows, categories=categories), "a.jpg": ""})
    labelled = read(source, "coco")
    assert labelled.classes == ("m", "a", "z")
    assert [region.label for region in labelled.regions] == ["m", "a", "m"]
    named = write(tmp_path / "yolo", yolo(names="{7: z, 0: cell, 3: a}"))
    assert read(named, "yolo").classes == ("cell", "a", "z")


# Of the round trip.


def tables_of(labelled: Labelled) -> tuple[Dataset, pa.Table, pa.Table]:
    """A data set as ingest would make it, with images of 40×30 below /cells."""
    rows, rejects = rows_of(labelled)
    assert not rejects
    assert labelled.classes is not None
    images = [
        {"image": f"/cells/{image.path}", "width": WIDTH, "height": HEIGHT, "split": image.split}
        for image in labelled.images
    ]
    annotations = [{**row, "image": f"/cells/{row['image']}"} for row in rows]
    dataset = Dataset("cells", "0" * 12, "/cells", "coco", labelled.classes, False, True, True, 2, 2, len(rows), 0)
    return (
        dataset,
        pa.Table.from_pylist(images, IMAGES_SCHEMA),
        pa.Table.from_pylist(annotations, ANNOTATIONS_SCHEMA),
    )


def test_coco_round_trip_loses_nothing(tmp_path: Path) -> None:
    images = [{"id": 40, "file_name": "a.jpg", "split": "val"}, {"id": 2, "file_name": "b/c.jpg", "split": "train"}]
    polygons = [[1.5, 2, 20, 2, 20, 9.25], [30, 20, 39, 20, 39, 29]]
    rows = [
        annotation(image_id=40, category_id=90, bbox=[0.1, 0.2, 10.3, 7.7], area=55.5),
        {**runs([35, 10, 1155]), "image_id": 40, "category_id": 3, "iscrowd": 1},
        annotation(image_id=2, category_id=3, bbox=..., segmentation=polygons),
        {**runs(masks.encode(grey() > 0)), "image_id": 2, "category_id": 90, "difficult": 1},
    ]
    ignored = [annotation(image_id=2, category_id=..., bbox=[3, 3, 3, 3])]
    categories = [{"id": 90, "name": "last"}, {"id": 3, "name": "first"}, {"id": 4, "name": "none of it"}]
    files: Files = {
        "x.json": coco(images=images, annotations=rows, categories=categories, ignored=ignored),
        "a.jpg": "",
        "b/c.jpg": "",
    }
    source = write(tmp_path, files)
    dataset, images_table, annotations_table = tables_of(read(source, "coco"))
    assert annotations_table.num_rows == len(rows) + len(ignored)
    assert annotations_table["polygons"].to_pylist()[2] == polygons
    document = to_coco(dataset, images_table, annotations_table, root="/cells")
    assert [image["file_name"] for image in document["images"]] == ["a.jpg", "b/c.jpg"]
    assert [category["id"] for category in document["categories"]] == [1, 2, 3]
    assert [row["iscrowd"] for row in document["annotations"]] == [0, 1, 0, 0]
    write(tmp_path, {"x.json": json.dumps(document, allow_nan=False)})
    assert tables_of(read(source, "coco")) == (dataset, images_table, annotations_table)


def test_coco_names_images_from_the_root_on_else_by_their_last_part() -> None:
    images = pa.Table.from_pylist([{"image": "s3://bucket/deep/a.jpg", "width": 4, "height": 3}], IMAGES_SCHEMA)
    dataset = Dataset("x", "0" * 12, "", "folder", ("cell",), True, False, False, 1, 1, 0, 0)
    for root, name in ((None, "a.jpg"), ("s3://other", "a.jpg"), ("s3://bucket", "deep/a.jpg")):
        document = to_coco(dataset, images, ANNOTATIONS_SCHEMA.empty_table(), root)
        assert document["images"] == [{"id": 1, "file_name": name, "width": 4, "height": 3}]
        assert document["annotations"] == []
