"""Small labelled sources, each with one fault, for the readers of all formats; and what must become of the fault.

Every source has one image of 40×30 pixels, or two, and one good annotation or mask that must survive the bad one.
"""

import io
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30

Files = dict[str, bytes | str]

GOOD_BOX = [5, 5, 10, 10]


@dataclass(frozen=True)
class Broken:
    """One source with one fault."""

    name: str
    format: str
    files: Files
    rejects: tuple[tuple[str, str, int | None, str], ...] = ()  # kind, file, line, reason
    error: str = ""  # or part of the UsageError's line
    names: str = ""  # the file that the error must name
    kept: int = 1  # annotations
    images: int = 1
    annotations: str | None = None  # a path in the source


def coco(*annotations: Any, **changed: Any) -> bytes:
    """instances.json with one good box, these annotations behind it, and some keys changed."""
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}],
        "annotations": [annotation(bbox=GOOD_BOX), *annotations],
        "categories": [{"id": 1, "name": "cell"}, {"id": 5, "name": "nucleus"}],
    }
    return json.dumps(document | changed).encode()


def annotation(**changed: Any) -> dict[str, Any]:
    """One of image 1 and category 1. A value of ... leaves the key out."""
    whole = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0} | changed
    return {key: value for key, value in whole.items() if value is not ...}


def runs(counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict[str, Any]:
    """An annotation with a run-length mask and no box."""
    return annotation(
        bbox=..., segmentation={"size": list(size) if isinstance(size, tuple) else size, "counts": counts}
    )


def voc(*objects: str, head: str = "") -> str:
    """a.xml: line 1 to 4 are its head, the good object stands on line 5, the others on the lines behind it."""
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    lines = [f'<?xml version="1.0"?>{head}', "<annotation>", "<filename>a.jpg</filename>", size]
    return "\n".join([*lines, box(5, 5, 15, 15), *objects, "</annotation>"])


def box(*sides: object, name: str = "cell", more: str = "") -> str:
    """One object of a VOC file, on one line."""
    tags = "".join(f"<{tag}>{side}</{tag}>" for tag, side in zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=False))
    return f"<object><name>{name}</name>{more}<bndbox>{tags}</bndbox></object>"


def yolo(*lines: str | bytes, **description: str) -> Files:
    """One image with its label file: the good line first, these behind it."""
    keys = {"names": "[cell, nucleus]", "train": "images", "val": "images"} | description
    text = "\n".join(f"{key}: {value}" for key, value in keys.items() if value)
    good = b"0 .5 .5 .2 .2"
    rest = [line if isinstance(line, bytes) else line.encode() for line in lines]
    return {"data.yaml": text, "images/a.jpg": "", "labels/a.txt": b"\n".join([good, *rest])}


def png(pixels: Any, mode: str | None = None) -> bytes:
    """A PNG of these pixels."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(file, "PNG")
    return file.getvalue()


def grey(value: int = 1, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A grey mask [height, width]: 0, and in the upper left corner 10×10 of the value."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:10, :10] = value
    return pixels


def pairs(mask: bytes, name: str = "b.png") -> Files:
    """Two images: a.jpg with a good mask, b.jpg with this one."""
    return {"images/a.jpg": "", "images/b.jpg": "", "masks/a.png": png(grey()), f"masks/{name}": mask}


def _of_coco(name: str, data: bytes, *rejects: tuple[int | None, str], **more: Any) -> Broken:
    listed = tuple(("annotation", "instances.json", line, reason) for line, reason in rejects)
    return Broken(f"coco {name}", "coco", {"instances.json": data, "images/a.jpg": ""}, listed, **more)


def _coco_row(name: str, reason: str, row: Any) -> Broken:
    return _of_coco(name, coco(row), (2, reason))


def _coco_error(name: str, data: bytes, error: str) -> Broken:
    return _of_coco(name, data, error=error, names="instances.json")


NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**400
DEEP = 100_000


def _coco_cases() -> list[Broken]:
    def image(**changed: Any) -> dict[str, Any]:
        return {"id": 1, "file_name": "a.jpg"} | changed

    good = image()
    polygon = annotation(segmentation=[[5, 5, 15, 5, 15, 15]])
    return [
        _of_coco("nothing wrong", coco(), kept=1),
        _coco_row("NaN", "not finite", annotation(bbox=[NAN, 2, 3, 4])),
        _coco_row("infinite width", "not finite", annotation(bbox=[1, 2, INFINITY, 4])),
        _of_coco("1e400", coco(annotation(bbox=[1, 2, 77777, 4])).replace(b"77777", b"1e400"), (2, "not finite")),
        _coco_row("integer of 400 digits", "not finite", annotation(bbox=[HUGE, 2, 3, 4])),
        _coco_row("NaN area", "not finite", annotation(area=NAN)),
        _coco_row("negative area", "negative area", annotation(area=-3)),
        _coco_row("area in words", "malformed area", annotation(area="big")),
        _coco_row("zero width", "zero area", annotation(bbox=[1, 2, 0, 4])),
        _coco_row("negative width", "inverted box", annotation(bbox=[10, 2, -3, 4])),
        _coco_row("negative height", "inverted box", annotation(bbox=[10, 12, 3, -4])),
        _coco_row("outside", "outside the image", annotation(bbox=[100, 2, 3, 4])),
        _coco_row("partly outside", "outside the image", annotation(bbox=[35, 2, 8, 4])),
        _coco_row("three numbers", "malformed box", annotation(bbox=[1, 2, 3])),
        _coco_row("numbers as text", "malformed box", annotation(bbox=["1", "2", "3", "4"])),
        _coco_row("box of booleans", "malformed box", annotation(bbox=[True, True, True, True])),
        _coco_row("box as object", "malformed box", annotation(bbox={"x": 1})),
        _coco_row("no geometry", "no box and no mask", annotation(bbox=..., segmentation=[])),
        _coco_row("unknown image", "unknown image", annotation(image_id=99)),
        _coco_row("image id missing", "unknown image", annotation(image_id=...)),
        _coco_row("image id of a list", "unknown image", annotation(image_id=[1])),
        _coco_row("image id true", "unknown image", annotation(image_id=True)),
        _coco_row("unknown category", "unknown label", annotation(category_id=2)),
        _coco_row("category missing", "unknown label", annotation(category_id=...)),
        _coco_row("annotation is a list", "malformed annotation", [1, 2, 3]),
        _coco_row("annotation is null", "malformed annotation", None),
        _coco_row("crowd 2", "malformed iscrowd", annotation(iscrowd=2)),
        _coco_row("crowd in words", "malformed iscrowd", annotation(iscrowd="no")),
        _coco_row("segmentation is a number", "malformed segmentation", annotation(segmentation=5)),
        _coco_row("flat polygon", "malformed polygon", annotation(segmentation=[5, 5, 15, 5, 15, 15])),
        _coco_row("polygon of text", "malformed polygon", annotation(segmentation=[["5", "5"]])),
        _coco_row("odd polygon", "malformed polygon", annotation(segmentation=[[5, 5, 15, 5, 15, 15, 5]])),
        _coco_row("two points", "too few polygon points", annotation(segmentation=[[5, 5, 15, 5]])),
        _coco_row("polygon NaN", "not finite", annotation(segmentation=[[5, 5, 15, NAN, 15, 15]])),
        _coco_row("polygon outside", "outside the image", annotation(segmentation=[[5, 5, 15, 5, 15, 45]])),
        _coco_row("polygon of no pixel", "empty mask", annotation(segmentation=[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]])),
        _coco_row("endless outline", "malformed polygon", annotation(segmentation=[[0, 0, WIDTH, HEIGHT] * 60_000])),
        _coco_row("mask of another size", "mask of another size", runs([1200], (40, 30))),
        _coco_row("runs too short", "corrupt mask", runs([5, 5])),
        _coco_row("negative run", "corrupt mask", runs([-5, 1205])),
        _coco_row("run beyond 64 bits", "corrupt mask", runs([0, 2**70])),
        _coco_row("runs that overflow 32 bits", "corrupt mask", runs([2**32, 1200])),
        _coco_row("run of text", "corrupt mask", runs(["5", 1195])),
        _coco_row("run true", "corrupt mask", runs([True, 1199])),
        _coco_row("no pixel on", "empty mask", runs([1200])),
        _coco_row("counts cut off", "corrupt mask", runs("P")),
        _coco_row("counts empty", "corrupt mask", runs("")),
        _coco_row("counts not ASCII", "corrupt mask", runs("ä1")),
        _coco_row("counts of a wild number", "corrupt mask", runs("o" * 40 + "0")),
        _coco_row("counts negative", "corrupt mask", runs("O0")),
        _coco_row("counts missing", "corrupt mask", annotation(bbox=..., segmentation={"size": [30, 40]})),
        _coco_row("size of text", "corrupt mask", runs([1200], ["30", "40"])),
        _of_coco(
            "gigantic size",
            coco(runs([2**60], (2**30, 2**30)), images=[good]),
            (2, "corrupt mask"),
        ),
        _coco_row("duplicate", "duplicate", annotation(id=7, bbox=GOOD_BOX)),
        _of_coco("duplicate polygon", coco(polygon, polygon), (3, "duplicate"), kept=2),
        _of_coco("image entry is text", coco(images=[good, "b.jpg"]), (2, "malformed image entry")),
        _of_coco("image without name", coco(images=[good, image(id=2, file_name=None)]), (2, "malformed image entry")),
        _of_coco("image without id", coco(images=[good, image(id=None)]), (2, "malformed image entry")),
        _of_coco(
            "image name no text", coco(images=[good, image(id=2, file_name="\ud800")]), (2, "malformed image entry")
        ),
        _coco_row("image id no text", "unknown image", annotation(image_id="\ud800")),
        _of_coco("image id twice", coco(images=[good, image(file_name="b.jpg")]), (2, "duplicate image id")),
        _of_coco("image twice", coco(images=[good, image(id=2)]), (2, "image named twice")),
        Broken(
            "coco image in no file",
            "coco",
            {"instances.json": coco(), "images/a.jpg": "", "images/b.jpg": ""},
            (("image", "images/b.jpg", None, "not in the annotations"),),
        ),
        Broken(
            "coco name in two folders",
            "coco",
            {"instances.json": coco(), "b/a.jpg": "", "c/a.jpg": ""},
            (
                ("image", "b/a.jpg", None, "not in the annotations"),
                ("image", "c/a.jpg", None, "not in the annotations"),
            ),
        ),
        _coco_error("not JSON", b'{"images": [', "is no JSON"),
        _coco_error("empty file", b"", "is no JSON"),
        _coco_error("nested 10^5 deep", b'{"images":' + b"[" * DEEP, "nested too deep"),
        _coco_error("number of 5,000 digits", b'{"images": [' + b"1" * 5000 + b"]}", "cannot be read"),
        _coco_error("not text", b"\xff\xfe\xfd\x80" * 9 + b"\xff", "cannot be read"),
        _coco_error("a list", b"[1, 2]", "expected COCO's JSON"),
        _coco_error("results of a model", json.dumps([annotation(score=0.5)]).encode(), "expected COCO's JSON"),
        _coco_error("no categories", coco(categories=None), "got for categories null"),
        _coco_error("images as object", coco(images={"1": "a.jpg"}), "got for images"),
        _coco_error("category without name", coco(categories=[{"id": 1}]), "category 1 needs an id and a name"),
        _coco_error("category no text", coco(categories=[{"id": 1, "name": "\ud800"}]), "category 1 needs an id"),
        _coco_error("category id true", coco(categories=[{"id": True, "name": "x"}]), "category 1 needs an id"),
        _coco_error(
            "category id twice",
            coco(categories=[{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]),
            "the category id 1 is both 'x' and 'y'",
        ),
        Broken("coco no file", "coco", {"a.jpg": ""}, error="found no file: name one with --annotations"),
    ]


def _voc_row(name: str, reason: str, text: str) -> Broken:
    files: Files = {"Annotations/a.xml": voc(text), "JPEGImages/a.jpg": ""}
    return Broken(f"voc {name}", "voc", files, (("annotation", "a.xml", 6, reason),))


def _voc_file(name: str, line: int | None, data: str | bytes) -> Broken:
    files: Files = {
        "Annotations/a.xml": voc(),
        "JPEGImages/a.jpg": "",
        "Annotations/b.xml": data,
        "JPEGImages/b.jpg": "",
    }
    lost = ("image", "b.jpg", None, "its annotations cannot be read")
    return Broken(f"voc {name}", "voc", files, (("annotation", "b.xml", line, "malformed XML"), lost))


def _voc_cases() -> list[Broken]:
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    bomb = voc(box(1, 1, 9, 9, name="&l9;"), head=f'<!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]>')
    outside = voc(box(1, 1, 9, 9, name="&x;"), head='<!DOCTYPE x [<!ENTITY x SYSTEM "file:///etc/hostname">]>')
    both = {"Annotations/a.xml": voc(), "JPEGImages/a.jpg": ""}
    return [
        _voc_row("zero area", "zero area", box(9, 5, 9, 15)),
        _voc_row("inverted", "inverted box", box(15, 5, 5, 15)),
        _voc_row("NaN", "not finite", box("nan", 5, 9, 15)),
        _voc_row("1e400", "not finite", box(1, 5, "1e400", 15)),
        _voc_row("outside", "outside the image", box(1, 5, 60, 15)),
        _voc_row("words", "malformed box", box("left", 5, 9, 15)),
        _voc_row("no number", "malformed box", box("", 5, 9, 15)),
        _voc_row("a side is missing", "malformed box", box(1, 5, 9)),
        _voc_row("no box", "no box and no mask", "<object><name>cell</name></object>"),
        _voc_row("no name", "no label", box(1, 5, 9, 15, name=" ")),
        _voc_row("difficult in words", "malformed difficult", box(1, 5, 9, 15, more="<difficult>very</difficult>")),
        _voc_row("duplicate", "duplicate", box(5, 5, 15, 15)),
        _voc_file("not XML", 1, "cell 1 2 3 4"),
        _voc_file("empty file", 1, ""),
        _voc_file("cut off", 5, voc()[:-20]),
        _voc_file("another root", None, "<html></html>"),
        _voc_file("billion laughs", None, bomb),
        _voc_file("external entity", None, outside),
        _voc_file("unknown encoding", None, b'<?xml version="1.0" encoding="rot13"?><annotation/>'),
        _voc_file("binary", 1, b"\x00\x01\x02"),
        Broken(
            "voc image without file",
            "voc",
            {**both, "JPEGImages/b.jpg": ""},
            (("image", "JPEGImages/b.jpg", None, "no annotation file"),),
        ),
        Broken(
            "voc list names nothing",
            "voc",
            {**both, "ImageSets/Main/train.txt": "a\nzzz\n"},
            (("annotation", "train.txt", 2, "missing image"),),
        ),
        Broken(
            "voc in two splits",
            "voc",
            {**both, "ImageSets/Main/train.txt": "a\n", "ImageSets/Main/val.txt": "\na\n"},
            (("annotation", "val.txt", 2, "in two splits"),),
        ),
        Broken(
            "voc list not text",
            "voc",
            {**both, "ImageSets/Main/train.txt": b"\x80\x81"},
            error="expected names of images",
            names="train.txt",
        ),
        Broken("voc no file", "voc", {"a.jpg": ""}, error="found none: name them with --annotations"),
    ]


def _yolo_row(name: str, reason: str, line: str | bytes) -> Broken:
    return Broken(f"yolo {name}", "yolo", yolo(line), (("annotation", "a.txt", 2, reason),))


def _yolo_error(name: str, error: str, **description: str) -> Broken:
    return Broken(f"yolo {name}", "yolo", yolo(**description), error=error, names="data.yaml")


def _yaml_error(name: str, data: bytes | str, error: str) -> Broken:
    return Broken(f"yolo {name}", "yolo", {**yolo(), "data.yaml": data}, error=error, names="data.yaml")


def _yolo_cases() -> list[Broken]:
    execute = '!!python/object/apply:os.system ["touch executed"]'
    return [
        Broken("yolo download is not executed", "yolo", yolo(download="exec('touch executed')")),
        _yolo_row("NaN", "not finite", "0 nan .5 .2 .2"),
        _yolo_row("infinite", "not finite", "0 inf .5 .2 .2"),
        _yolo_row("1e400", "not finite", "0 .5 .5 1e400 .2"),
        _yolo_row("1e308 of a width", "not finite", "0 .5 .5 1e308 .2"),
        _yolo_row("zero width", "zero area", "0 .5 .5 0 .2"),
        _yolo_row("negative width", "inverted box", "0 .5 .5 -.2 .2"),
        _yolo_row("in pixels", "outside the image", "0 20 15 10 10"),
        _yolo_row("partly outside", "outside the image", "0 .95 .5 .3 .2"),
        _yolo_row("three numbers", "malformed line", "0 .5 .5 .2"),
        _yolo_row("box and a score", "malformed line", "0 .5 .5 .2 .2 .9"),
        _yolo_row("class alone", "malformed line", "0"),
        _yolo_row("two points", "malformed line", "0 .1 .1 .2"),
        _yolo_row("words", "malformed line", "0 .5 .5 wide .2"),
        _yolo_row("1_0", "malformed line", "0 .5 .5 1_0 .2"),
        _yolo_row("digits of another script", "malformed line", "0 .5 .5 .٢ .2"),
        _yolo_row("commas", "malformed class", "0,.5,.5,.2,.2"),
        _yolo_row("class in words", "malformed class", "cell .5 .5 .2 .2"),
        _yolo_row("class negative", "malformed class", "-1 .5 .5 .2 .2"),
        _yolo_row("class one half", "malformed class", "0.5 .5 .5 .2 .2"),
        _yolo_row("class of 30 digits", "malformed class", f"{10**29} .5 .5 .2 .2"),
        _yolo_row("unknown class", "unknown label", "2 .5 .5 .2 .2"),
        _yolo_row("duplicate", "duplicate", "0 .5 .5 .2 .2"),
        _yolo_row("polygon of no pixel", "empty mask", "0 .5 .5 .501 .5 .501 .501"),
        _yolo_row("polygon outside", "outside the image", "0 .5 .5 1.5 .5 1.5 1"),
        Broken(
            "yolo labels not text",
            "yolo",
            {**yolo(), "images/b.jpg": "", "labels/b.txt": b"\x80\x00\x81"},
            (
                ("annotation", "b.txt", None, "not a text file"),
                ("image", "b.jpg", None, "its annotations cannot be read"),
            ),
        ),
        Broken(
            "yolo labels without image",
            "yolo",
            {**yolo(), "labels/zzz.txt": "0 .5 .5 .2 .2"},
            (("annotation", "zzz.txt", None, "missing image"),),
        ),
        Broken(
            "yolo image in no split",
            "yolo",
            {**yolo(), "extra/b.jpg": ""},
            (("image", "b.jpg", None, "in no split"),),
        ),
        Broken(
            "yolo list leads out",
            "yolo",
            {**yolo(train="list.txt", val=""), "list.txt": "images/a.jpg\n/etc/passwd\n../../b.jpg\nimages/a.jpg\n"},
            (
                ("annotation", "list.txt", 2, "outside the source"),
                ("annotation", "list.txt", 3, "outside the source"),
                ("annotation", "list.txt", 4, "image named twice"),
            ),
        ),
        _yolo_error("python object", "the tag", names=execute),
        _yolo_error("python name", "the tag", names="!!python/name:os.system"),
        _yolo_error("absolute path", "leads out of the source", train="/etc"),
        _yolo_error("path upwards", "leads out of the source", train="../../other/images"),
        _yolo_error("home", "leads out of the source", train="~/images"),
        _yolo_error("drive", "leads out of the source", train="'C:\\images'"),
        _yolo_error("address", "leads out of the source", train="http://host/images.zip"),
        _yolo_error("folder is missing", "is not in the source", val="images/val"),
        _yolo_error("path is a mapping", "expected a path or a list of paths", train="{a: b}"),
        _yolo_error("names is a file", "names: expected a list", names="coco.names"),
        _yolo_error("name is a list", "class 1 has no name", names="[a, [b]]"),
        _yolo_error("name is empty", "class 0 has no name", names="['']"),
        _yolo_error("name is no text", "class 0 has no name", names='["\\uD800"]'),
        _yolo_error("path is no text", "expected a path", train='"\\uD800"'),
        _yolo_error("names by text", "names: expected whole numbers", names="{a: 0}"),
        _yolo_error("nc disagrees", "nc is 3, but names has 2", nc="3"),
        _yolo_error("nc in words", "nc: expected the number of classes", nc="many"),
        _yolo_error("nc huge", "nc: expected the number of classes", nc="999999", names=""),
        _yaml_error("not YAML", "names: [a\ntrain: b: c", "expected YAML"),
        _yaml_error("a list", "- names\n- train", "got a list"),
        _yaml_error("nested 10^5 deep", "names: " + "[" * DEEP, "nested too deep"),
        _yaml_error("holds itself", "names: &a [*a]", "expected YAML"),
        _yaml_error("not text", b"names: \x80", "no text in UTF-8"),
    ]


def _mask_case(name: str, reason: str, mask: bytes, file: str = "b.png") -> Broken:
    lost = ("image", "images/b.jpg", None, "its mask cannot be read")
    refused = ("annotation", f"masks/{file}", None, reason)
    return Broken(f"masks {name}", "masks", pairs(mask, file), (refused, lost))


def _mask_cases() -> list[Broken]:
    colours = np.dstack([grey(200), grey(10), grey(0)])
    many = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    jpeg = io.BytesIO()
    Image.fromarray(grey()).save(jpeg, "JPEG")
    sixteen = io.BytesIO()
    Image.fromarray(many.astype(np.uint16)).save(sixteen, "PNG")
    size = struct.pack(">4sIIBBBBB", b"IHDR", 100_000, 100_000, 8, 0, 0, 0, 0)
    bomb = png(grey())[:12] + size + struct.pack(">I", zlib.crc32(size)) + png(grey())[33:]
    table = {"classes.csv": "name,r,g,b\nbackground,0,0,0\ncell,1,1,1\n"}
    return [
        _mask_case("not an image", "unreadable mask", b"hello"),
        _mask_case("empty file", "unreadable mask", b""),
        _mask_case("cut off", "unreadable mask", png(grey())[:-20]),
        _mask_case("of 10^10 pixels", "mask too large", bomb),
        _mask_case("JPEG", "lossy mask", jpeg.getvalue(), "b.jpg"),
        _mask_case("colours without a list", "colours without a list", png(colours)),
        _mask_case("numbers of instances", "too many values", sixteen.getvalue()),
        Broken(
            "masks of another size",
            "masks",
            pairs(png(grey(height=20))),
            (("annotation", "b.png", None, "mask of another size"),),
            images=2,
        ),
        Broken(
            "masks unknown value",
            "masks",
            {**pairs(png(grey(7))), "classes.txt": "background\ncell\n"},
            (("annotation", "b.png", None, "unknown label"),),
            images=2,
        ),
        Broken(
            "masks unknown colour",
            "masks",
            {**pairs(png(colours)), "masks/a.png": png(np.dstack([grey()] * 3)), **table},
            (("annotation", "b.png", None, "unknown label"),),
            images=2,
        ),
        Broken(
            "masks image alone",
            "masks",
            {"images/a.jpg": "", "images/b.jpg": "", "masks/a.png": png(grey())},
            (("image", "b.jpg", None, "no mask"),),
        ),
        Broken(
            "masks mask alone",
            "masks",
            {"images/a.jpg": "", "masks/a.png": png(grey()), "masks/b.png": png(grey())},
            (("annotation", "b.png", None, "missing image"),),
        ),
        Broken(
            "masks colours everywhere",
            "masks",
            {"images/a.jpg": "", "masks/a.png": png(colours)},
            error="no list says which is which class",
            names="masks/a.png",
        ),
        Broken(
            "masks two classes for 0 and 255",
            "masks",
            {"images/a.jpg": "", "masks/a.png": png(grey(255)), "classes.txt": "cell\nnucleus\n"},
            error="names 2 classes",
            names="classes.txt",
        ),
        Broken("masks none", "masks", {"images/a.jpg": "", "images/b.jpg": ""}, error="found no pair"),
        *[
            Broken(
                f"masks {name}", "masks", {**pairs(png(grey())), "classes.csv": text}, error=error, names="classes.csv"
            )
            for name, text, error in (
                ("list empty", "\n\n", "it is empty"),
                ("list not text", b"\x80\x81", "it is no text"),
                ("colour twice", "a,1,2,3\nb,1,2,3\n", "line 2: 'b' has the same colour"),
                ("value twice", "a,1\nb,1\n", "line 2: 'b' has the same value"),
                ("colour of 300", "a,1,2,300\n", "line 1: expected a name and r, g, b"),
                ("colour in words", "a,1,2,3\nb,red\n", "line 2: expected a name and r, g, b"),
            )
        ],
    ]


def broken_annotations() -> list[Broken]:
    """All of them."""
    return [*_coco_cases(), *_voc_cases(), *_yolo_cases(), *_mask_cases()]
