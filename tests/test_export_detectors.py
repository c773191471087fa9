"""Variants of detectors: only layers lose digits, and average precision decides."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import catalog
from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.dataset import Dataset
from models.errors import ModelError, UsageError
from models.imaging.geometry import ResizeRule
from models.nets.untrained import build_untrained
from models.records import Task
from models.runtime import layers, quantize
from models.settings.export import ExportSettings
from tasks import registry
from tasks.export import export
from tasks.photographs import encode_png
from tests.tiny_datasets import publish_objects
from tests.tiny_models import LABELS, SIDE, light_object
from tests.tiny_rcnn import shapes

LIGHT = {"label": "light", "x_min": 8.0, "y_min": 4.0, "x_max": 24.0, "y_max": 12.0}  # where the tiny models see it


def publish_layers(store: str, folder: Path, scales: list[list[float]], score: float = 0.25) -> Card:
    """The tiny detector behind a convolution per entry of `scales`: those of the two channels that it is given.

    The first channel holds red, the second one green and blue; at the end only the second one is looked at.
    """
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "unit"], ["scaled"]),
        node("Transpose", ["scaled"], ["x0"], perm=[0, 3, 1, 2]),
    ]
    strong, weak = scales[0]
    weights = [np.diag(np.array(after) / np.array(before)) for before, after in pairwise([*scales, [1.0, 1.0]])]
    weights[0] = weights[0] @ np.array([[1, 0, 0], [0, 0.5, 0.5]])
    weights[-1] = weights[-1][1:]
    constants = [numpy_helper.from_array(np.float32([strong, weak, weak]) / np.float32(255), "unit")]
    for number, weight in enumerate(weights):
        constants.append(numpy_helper.from_array(weight[:, :, None, None].astype(np.float32), f"w{number}"))
        nodes += [
            node("Conv", [f"x{number}", f"w{number}"], [f"c{number}"], name=f"layer{number}"),
            node("Relu", [f"c{number}"], [f"x{number + 1}"]),
        ]
    nodes.append(node("ReduceMean", [f"x{len(weights)}", "axes"], ["means"], keepdims=0))
    answer, outputs, others = light_object()
    graph = helper.make_graph(
        [*nodes, *answer[3:]],
        "layers",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        outputs,
        [*constants, *others],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path = folder / "layers.onnx"
    onnx.save(model, path)
    rule = ResizeRule("letterbox", SIDE, SIDE)
    card = Card("layers", "", Task.DETECT, "layers", LABELS, rule, score=score, weights_sha256=str(scales))
    return registry.publish(store, card.with_version(), {ONNX_FILE: path})


def picture(level: int) -> bytes:
    return encode_png(np.full((SIDE, SIDE, 3), level, np.uint8))


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "mill")


@pytest.fixture
def objects(store: str, tmp_path: Path) -> Dataset:
    """In validation light images show an object, dark ones do not; in test there is none."""
    examples = [
        (split, picture(level + number), [LIGHT] if level > 128 and split != "test" else [])
        for number, split in enumerate(("train", "val", "test"))
        for level in (20, 40, 60, 180, 200, 220)
    ]
    return publish_objects(store, tmp_path / "objects", examples, ("light",))


EVEN, UNEVEN = [1.0, 1.0], [3000.0, 1.0]  # rounded in common with the first channel, the second one vanishes


def test_an_int8_detector_is_published_when_its_precision_holds(store, objects, tmp_path):
    card = publish_layers(store, tmp_path, [EVEN] * 3)
    exported = export(store, ExportSettings(model="layers", precision="int8", dataset="objects"))
    variant = registry.resolve(store, exported.model)
    assert variant.reference == f"{card.reference}.int8"
    gate = exported.metrics["gate"]
    assert {name: gate[name] for name in ("metric", "fp32", "int8", "fall")} == {
        "metric": "ap",
        "fp32": 1.0,
        "int8": 1.0,
        "fall": 0.0,
    }
    assert gate["per_class"] == {"light": {"fp32": 1.0, "int8": 1.0, "change": 0.0}}
    assert variant.conversion["quantised"] == "all layers"
    assert (variant.parity["compared"], variant.parity["from_exact"]["unmatched"]) == (3, 0.0)
    rounded = {node.input[0] for node in onnx.load(exported.file).graph.node if node.op_type == "QuantizeLinear"}
    assert rounded.isdisjoint({"floats", "means", "scores", "boxes_xyxy", "box"})
    assert rounded >= {"x0", "x1", "x2"}


def test_layers_that_lose_too_much_stay_exact(store, objects, tmp_path):
    publish_layers(store, tmp_path, [UNEVEN, EVEN, EVEN])
    exported = export(store, ExportSettings(model="layers", precision="int8", dataset="objects"))
    conversion = registry.resolve(store, exported.model).conversion
    assert conversion["quantised"] == "all but the first and the last layer"
    assert conversion["exact_nodes"] == ["layer0", "layer2"]
    assert exported.metrics["gate"]["int8"] == 1.0


def test_the_most_sensitive_layers_stay_exact(store, objects, tmp_path):
    """What a layer does is seen in the sums that boxes are made from: there may be any number of boxes."""
    publish_layers(store, tmp_path, [EVEN, EVEN, UNEVEN, EVEN, EVEN, EVEN])
    exported = export(store, ExportSettings(model="layers", precision="int8", dataset="objects"))
    conversion = registry.resolve(store, exported.model).conversion
    assert conversion["quantised"] == "all but the first, the last and the 2 most sensitive layers"
    assert [name for name in conversion["exact_nodes"] if name.startswith("layer")] == [
        f"layer{k}" for k in (0, 1, 2, 5)
    ]


def test_an_int8_detector_that_finds_less_is_not_published(store, objects, tmp_path):
    card = publish_layers(store, tmp_path, [EVEN, UNEVEN, UNEVEN, EVEN])
    with pytest.raises(ModelError, match=r"ap 1\.0000 → 0\.0000, worst classes light 1\.00 → 0\.00"):
        export(store, ExportSettings(model="layers", precision="int8", dataset="objects"))
    assert registry.list_models(store) == [card]


def test_a_split_without_objects_says_nothing_of_a_loss(store, objects, tmp_path):
    publish_layers(store, tmp_path, [EVEN])
    with pytest.raises(UsageError, match=r"objects@\w+ test shows nothing to find"):
        export(store, ExportSettings(model="layers", precision="int8", dataset="objects", split="test"))


def test_half_precision_reaches_no_box(store, objects, tmp_path):
    publish_layers(store, tmp_path, [EVEN, EVEN])
    exported = export(store, ExportSettings(model="layers", precision="fp16", dataset="objects"))
    half = onnx.load(exported.file)
    types = {constant.name: constant.data_type for constant in half.graph.initializer}
    assert {types[f"w{number}"] for number in range(2)} == {TensorProto.FLOAT16}
    assert {types[name] for name in ("box", "unit", "grey")} == {TensorProto.FLOAT}
    assert exported.parity["compared_with"] == "the exact export"
    assert exported.parity["largest"]["boxes_xyxy"] == 0.0


@pytest.mark.parametrize(
    ("score", "compared", "from_score"),
    [
        pytest.param(0.25, 3, 0.25, id="all findings are told"),
        pytest.param(0.75, 2, 0.75, id="those that are told"),
        pytest.param(0.95, 3, None, id="none is told: all are compared"),
    ],
)
def test_findings_that_are_told_are_compared(store, objects, tmp_path, score, compared, from_score):
    publish_layers(store, tmp_path, [EVEN, EVEN], score)
    exported = export(store, ExportSettings(model="layers", precision="fp16", dataset="objects"))
    assert (exported.parity["compared"], exported.parity.get("from_score")) == (compared, from_score)


# --- a real one


def learned_yolo(store: str, folder: Path, steps: int = 60, side: int = 96) -> Card:
    """yolo_n after some steps on discs and squares, without an export; the data set `shapes` has 24 of each split."""
    import torch
    from safetensors.torch import save_file

    images, targets = shapes(48, side)
    names = ("disc", "square")
    examples = [
        (
            ("train", "val")[number % 2],
            encode_png(image.numpy()),
            [
                {"label": names[label], **dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True))}
                for label, box in zip(target["labels"].tolist(), target["boxes_xyxy"].tolist(), strict=True)
            ],
        )
        for number, (image, target) in enumerate(zip(images, targets, strict=True))
    ]
    dataset = publish_objects(store, folder / "shapes", examples, names, "shapes")
    entry = catalog.entry("yolo_n")
    family = entry.family_module()
    network = build_untrained(lambda: family.build_for_training(entry.builder, len(names))).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(steps):
        rows = torch.randint(0, len(images), (8,), generator=torch.Generator().manual_seed(step))
        losses = family.losses(network, images[rows], [targets[row] for row in rows.tolist()])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    path = folder / WEIGHTS_FILE
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    rule = ResizeRule("letterbox", side, side, pad_rgb=(124, 116, 104))
    card = Card("shapes", "", Task.DETECT, "yolo_n", names, rule, score_floor=entry.score_floor)
    card = replace(card, training={"dataset": dataset.reference}, weights_sha256=registry.sha256_of(path))
    return registry.publish(store, card.with_version(), {WEIGHTS_FILE: path})


@pytest.mark.slow
def test_a_detector_that_learned_keeps_its_precision(store, tmp_path):
    card = learned_yolo(store, tmp_path)
    exact = export(store, ExportSettings(model="shapes"))
    assert exact.metrics["val"]["ap50"] > 0.8
    assert exact.metrics["val"]["operating_point"]["f1"] > 0.8
    for precision, share in (("fp16", 0.55), ("int8", 0.4)):
        exported = export(store, ExportSettings(model="shapes", precision=precision, tolerance=0.03))
        variant = registry.resolve(store, f"{card.reference}.{precision}")
        assert Path(exported.file).stat().st_size < share * Path(exact.file).stat().st_size
        assert set(exported.metrics["gate"]["per_class"]) == {"disc", "square"}
        assert variant.parity["compared"] > 10


# --- graphs as those of detectors are


def two_stages() -> onnx.ModelProto:
    """A convolution that is used twice; boxes from one of its maps; a second stage that looks into the other one."""
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT, name="cast"),
        node("Conv", ["floats", "stem"], ["features"], name="stem"),
        node("Conv", ["features", "shared", "bias"], ["fine"], name="fine", pads=[1] * 4),
        node("MaxPool", ["features"], ["half"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        node("Conv", ["half", "shared", "bias"], ["coarse"], name="coarse", pads=[1] * 4),
        node("Reshape", ["fine", "flat"], ["deltas"], name="flatten"),
        node("Mul", ["deltas", "unit"], ["offsets"], name="decode"),
        node("TopK", ["offsets", "four"], ["best", "where"], axis=1, name="choose"),
        node("Reshape", ["best", "boxes"], ["rois"], name="boxes"),
        node("RoiAlign", ["coarse", "rois", "batch"], ["crops"], output_height=2, output_width=2, name="look"),
        node("Mul", ["crops", "unit"], ["weighted"], name="weigh"),
        node("Conv", ["weighted", "second"], ["sums"], name="second"),
        node("Sigmoid", ["sums"], ["masks"], name="answer"),
    ]
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 0.2, shape).astype(np.float32)

    constants = {
        "stem": weights(4, 3, 1, 1),
        "shared": weights(4, 4, 3, 3),
        "bias": weights(4),
        "second": weights(2, 4, 1, 1),
        "unit": np.float32([0.5]),
        "flat": np.int64([1, -1]),
        "four": np.int64([8]),
        "boxes": np.int64([2, 4]),
        "batch": np.int64([0, 0]),
    }
    graph = helper.make_graph(
        nodes,
        "stages",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("masks", TensorProto.FLOAT, [2, 2, 2, 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_decoding_and_places_are_outside_of_all_layers():
    model = two_stages()
    assert layers.before_layers(model) == {"cast", "weigh", "boxes"}
    assert layers.after_layers(model) == {"flatten", "decode", "choose", "boxes", "look", "answer"}


def run(path: Path) -> np.ndarray:
    import onnxruntime

    images = np.random.default_rng(1).integers(0, 255, (1, 3, 16, 16)).astype(np.uint8)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # as our engine has it
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def test_layers_that_share_weights_are_quantised(tmp_path):
    exact, prepared, out = (tmp_path / name for name in ("exact.onnx", "prepared.onnx", "out.onnx"))
    onnx.save(two_stages(), exact)
    quantize.prepare_int8(exact, prepared)
    images = np.random.default_rng(2).integers(0, 255, (1, 3, 16, 16)).astype(np.uint8)
    quantize.to_int8(prepared, Task.DETECT, quantize.Attempt("all layers", ()), [images], out)
    rounded = {node.input[0] for node in onnx.load(out).graph.node if node.op_type == "QuantizeLinear"}
    assert rounded.isdisjoint({"deltas", "offsets", "best", "rois", "crops", "masks"})
    assert run(out) == pytest.approx(run(exact), abs=0.2)


def test_constants_that_layers_share_with_the_rest_are_parted(tmp_path):
    """`unit` is used by the decoding; were it half, what comes after it could not be loaded."""
    model = two_stages()
    model.graph.node[1].input[0] = "lighter"
    model.graph.node.insert(1, helper.make_node("Mul", ["floats", "unit"], ["lighter"], name="lighten"))
    model.graph.node[3].input[0] = "weaker"
    model.graph.node.insert(3, helper.make_node("Mul", ["features", "unit"], ["weaker"], name="weaken"))
    exact, out = tmp_path / "exact.onnx", tmp_path / "out.onnx"
    onnx.save(model, exact)
    quantize.to_fp16(exact, out)
    types = {constant.name: constant.data_type for constant in onnx.load(out).graph.initializer}
    assert types["unit"] != types[next(name for name in types if name.startswith("unit of"))]
    assert run(out) == pytest.approx(run(exact), abs=0.01)
