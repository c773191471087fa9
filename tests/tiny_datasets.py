"""Data sets and a classifier whose answers one can tell by looking: images of one colour each."""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from models.card import ONNX_FILE, Card
from models.dataset import ANNOTATIONS_SCHEMA, IMAGES_SCHEMA, REJECTS_SCHEMA, Dataset, version_of
from models.imaging.geometry import ResizeRule
from models.records import Task
from tasks import registry
from tasks.datasets import datasets
from tasks.photographs import encode_png
from tests.tiny_models import SIDE

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def publish_dataset(
    store: str,
    folder: Path,
    examples: Iterable[tuple[str, str, bytes]],
    name: str = "squares",
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """A data set of (split, label, file content); the files lie in `folder`."""
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, label, data) in enumerate(examples):
        path = folder / f"{number:04d}.png"
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        rows.append((str(path), digest, len(data), SIDE, SIDE, "PNG", split, label, None))
    images = pa.Table.from_pylist(
        [dict(zip(IMAGES_SCHEMA.names, row, strict=True)) for row in rows], schema=IMAGES_SCHEMA
    )
    classes = classes or tuple(sorted({label for _, label, _ in examples if label}))
    annotations = ANNOTATIONS_SCHEMA.empty_table()
    dataset = Dataset(
        name=name,
        version=version_of(classes, images, annotations),
        source=str(folder),
        format="folder",
        classes=classes,
        has_labels=True,
        has_boxes=False,
        has_masks=False,
        listed=len(rows),
        images=len(rows),
        annotations=0,
        rejected=0,
        splits=dict(Counter(images.column("split").to_pylist())),
    )
    return datasets.publish(store, dataset, images, annotations, REJECTS_SCHEMA.empty_table())


def publish_objects(
    store: str,
    folder: Path,
    examples: Iterable[tuple[str, bytes, list[dict[str, Any]]]],
    classes: tuple[str, ...],
    name: str = "objects",
) -> Dataset:
    """A data set of (split, file content, annotations without their image); the PNG files lie in `folder`.

    An annotation is a row of annotations.parquet; what it leaves out is what most objects have.
    """
    images, annotations = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, data, objects) in enumerate(examples):
        path = folder / f"{number:04d}.png"
        path.write_bytes(data)
        height, width = read_size_hw(data)
        digest = hashlib.sha256(data).hexdigest()
        row = (str(path), digest, len(data), width, height, "PNG", split, None, None)
        images.append(dict(zip(IMAGES_SCHEMA.names, row, strict=True)))
        for one in objects:
            area = (one["x_max"] - one["x_min"]) * (one["y_max"] - one["y_min"])
            usual = {"image": str(path), "area": area, "crowd": False, "difficult": False}
            annotations.append(usual | one)
    tables = (
        pa.Table.from_pylist(images, schema=IMAGES_SCHEMA),
        pa.Table.from_pylist(annotations, schema=ANNOTATIONS_SCHEMA),
    )
    dataset = Dataset(
        name=name,
        version=version_of(classes, *tables),
        source=str(folder),
        format="coco",
        classes=classes,
        has_labels=False,
        has_boxes=bool(annotations),
        has_masks=any(one.get("mask") for one in annotations),
        listed=len(images),
        images=len(images),
        annotations=len(annotations),
        rejected=0,
        splits=dict(Counter(image["split"] for image in images)),
    )
    return datasets.publish(store, dataset, *tables, REJECTS_SCHEMA.empty_table())


def read_size_hw(png: bytes) -> tuple[int, int]:
    """Of the header, which is there even where the rest is rotten."""
    width, height = struct.unpack(">II", png[16:24])
    return height, width


def square(colour: str, seed: int = 0) -> bytes:
    """A PNG of one colour, under a little noise by which no two are the same."""
    noise = np.random.default_rng(seed).integers(-20, 20, (SIDE, SIDE, 3))
    return encode_png((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def colour_card(name: str = "colours", labels: tuple[str, ...] = tuple(COLOURS)) -> Card:
    """The card of `write_colour_model`."""
    rule = ResizeRule("stretch", SIDE, SIDE)
    return Card(name, "", Task.CLASSIFY, "mean_colour", labels, rule, weights_sha256=name).with_version()


def write_colour_model(path: Path, sharpness: float = 4.0, order: tuple[int, ...] = (0, 1, 2)) -> Path:
    """probabilities = softmax(sharpness · mean of red, green and blue, 0…1), the channels in `order`."""
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        node("MatMul", ["means", "weights"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weights = (np.eye(3, dtype=np.float32) * np.float32(sharpness / 255))[:, list(order)]
    constants = [
        numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
        numpy_helper.from_array(np.ascontiguousarray(weights), "weights"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "mean_colour", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def publish_colour_model(store: str, folder: Path, name: str = "colours", **options) -> Card:
    """A published `write_colour_model`; other options make another version."""
    from dataclasses import replace

    card = replace(colour_card(name), weights_sha256=str(sorted(options.items()))).with_version()
    return registry.publish(store, card, {ONNX_FILE: write_colour_model(folder / f"{card.version}.onnx", **options)})
