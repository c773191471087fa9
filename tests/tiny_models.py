"""Models of a few hundred weights, in ONNX by hand, so that tests run the real path without torch."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.card import ONNX_FILE, Card
from models.imaging.geometry import ResizeRule
from models.records import Task
from tasks import registry

SIDE = 32  # pixels
LABELS = ("red", "green", "blue", "dark", "light")


def _constant(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def _publish(store: str, folder: Path, card: Card, nodes, outputs, constants, inputs=None) -> Card:
    graph = helper.make_graph(
        nodes,
        card.architecture,
        inputs or [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        outputs,
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path = folder / f"{card.name}-{card.version}.onnx"
    onnx.save(model, path)
    return registry.publish(store, card, {ONNX_FILE: path})


def publish_classifier(store: str, folder: Path, name: str = "tiny", seed: int = 0) -> Card:
    """Two convolutions and a softmax over five labels; random weights by `seed`, which also makes the version."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    rule = ResizeRule("crop", SIDE, SIDE, short_side=36)
    card = Card(name, f"{seed:012x}", Task.CLASSIFY, "tiny_classifier", LABELS, rule)
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "scale"], ["scaled"]),
        node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        node("Conv", ["planes", "conv1"], ["a"], strides=[2, 2]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "conv2"], ["c"], strides=[2, 2]),
        node("GlobalAveragePool", ["c"], ["d"]),
        node("Flatten", ["d"], ["e"]),
        node("Gemm", ["e", "head"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = [
        _constant("scale", np.float32(1 / 64)),
        _constant("conv1", weights(16, 3, 3, 3)),
        _constant("conv2", weights(32, 16, 3, 3)),
        _constant("head", weights(32, len(LABELS))),
    ]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(LABELS)])]
    return _publish(store, folder, card, nodes, outputs, constants)


def publish_detector(store: str, folder: Path, name: str = "tiny_detector", score_floor: float = 0.0) -> Card:
    """Finds one light object at (8, 4, 24, 12) of its input in every image that is lighter than grey, else nothing."""
    rule = ResizeRule("letterbox", SIDE, SIDE)
    card = Card(name, "d" * 12, Task.DETECT, "tiny_detector", LABELS, rule, score_floor=score_floor)
    nodes, outputs, constants = light_object()
    return _publish(store, folder, card, nodes, outputs, constants)


def publish_instances(store: str, folder: Path, name: str = "tiny_instances") -> Card:
    """As the detector, with a mask that leaves out the upper left quarter of the box."""
    card = Card(name, "e" * 12, Task.INSTANCE, "tiny_instances", LABELS, ResizeRule("letterbox", SIDE, SIDE))
    nodes, outputs, constants = light_object()
    mask = np.ones((4, 4), np.float32)
    mask[:2, :2] = 0
    nodes += [
        helper.make_node("Concat", ["count", "mask_size"], ["masks_shape"], axis=0),
        helper.make_node("Expand", ["mask", "masks_shape"], ["masks"]),
    ]
    constants += [_constant("mask_size", np.array([4, 4], np.int64)), _constant("mask", mask)]
    outputs.append(helper.make_tensor_value_info("masks", TensorProto.FLOAT, ["n", 4, 4]))
    return _publish(store, folder, card, nodes, outputs, constants)


def publish_segmenter(store: str, folder: Path, name: str = "tiny_segmenter") -> Card:
    """Tells pixels by their red: below 100 background, from there "grey", from 200 "light", as the padding would be."""
    rule = ResizeRule("letterbox", SIDE, SIDE, pad_rgb=(255, 255, 255))
    card = Card(name, "f" * 12, Task.SEMANTIC, "tiny_segmenter", ("grey", "light"), rule)
    node = helper.make_node
    nodes = [
        node("Gather", ["images", "red"], ["levels"], axis=3),
        node("Cast", ["levels"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "hundredth"], ["hundreds"]),
        node("Cast", ["hundreds"], ["class_map"], to=TensorProto.UINT8),
    ]
    constants = [_constant("red", np.array(0, np.int64)), _constant("hundredth", np.float32(0.01))]
    outputs = [helper.make_tensor_value_info("class_map", TensorProto.UINT8, ["batch", SIDE, SIDE])]
    return _publish(store, folder, card, nodes, outputs, constants)


def light_object():
    """Nodes, outputs and constants of a detector."""
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "scale"], ["scaled"]),
        node("ReduceMean", ["scaled", "axes"], ["means"], keepdims=0),
        node("Greater", ["means", "grey"], ["is_light"]),
        node("NonZero", ["is_light"], ["rows"]),
        node("Squeeze", ["rows", "first"], ["batch_index"]),
        node("Gather", ["means", "batch_index"], ["scores"]),
        node("Shape", ["batch_index"], ["count"]),
        node("Expand", ["label", "count"], ["labels"]),
        node("Concat", ["count", "four"], ["boxes_shape"], axis=0),
        node("Expand", ["box", "boxes_shape"], ["boxes_xyxy"]),
    ]
    constants = [
        _constant("scale", np.float32(1 / 255)),
        _constant("axes", np.array([1, 2, 3], np.int64)),
        _constant("grey", np.float32(0.4)),
        _constant("first", np.array([0], np.int64)),
        _constant("label", np.array(LABELS.index("light"), np.int64)),
        _constant("four", np.array([4], np.int64)),
        _constant("box", np.array([8, 4, 24, 12], np.float32)),
    ]
    outputs = [
        helper.make_tensor_value_info("boxes_xyxy", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("labels", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("batch_index", TensorProto.INT64, ["n"]),
    ]
    return nodes, outputs, constants


def publish_translator(store: str, folder: Path, name: str = "tiny_negative", mode: str = "stretch") -> Card:
    """Makes the negative of an image."""
    rule = ResizeRule(mode, SIDE, SIDE, pad_rgb=(255, 0, 0))  # type: ignore[arg-type]
    card = Card(name, "1" * 12, Task.TRANSLATE, "tiny_negative", (), rule)
    nodes = [helper.make_node("Sub", ["white", "images"], ["images_out"])]
    outputs = [helper.make_tensor_value_info("images_out", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])]
    return _publish(store, folder, card, nodes, outputs, [_constant("white", np.array(255, np.uint8))])


def publish_embedder(store: str, folder: Path, name: str = "tiny_embedder") -> Card:
    """The mean colour of an image, 0 to 1, and how light it is."""
    card = Card(name, "2" * 12, Task.EMBED, "tiny_embedder", (), ResizeRule("stretch", SIDE, SIDE))
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "scale"], ["scaled"]),
        node("ReduceMean", ["scaled", "places"], ["embedding"], keepdims=0),
        node("ReduceMean", ["embedding", "channels"], ["anomaly"], keepdims=0),
    ]
    constants = [
        _constant("scale", np.float32(1 / 255)),
        _constant("places", np.array([1, 2], np.int64)),
        _constant("channels", np.array([1], np.int64)),
    ]
    outputs = [
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("anomaly", TensorProto.FLOAT, ["batch"]),
    ]
    return _publish(store, folder, card, nodes, outputs, constants)


def publish_generator(store: str, folder: Path, name: str = "tiny_generator", labels: tuple[str, ...] = ()) -> Card:
    """Stripes whose levels are the latent's; of a conditional one, class k adds 40·k to every level."""
    rule = ResizeRule("crop", SIDE, SIDE, short_side=SIDE)
    card = Card(name, ("4" if labels else "3") * 12, Task.GENERATE, "tiny_generator", labels, rule, latent_size=SIDE)
    node = helper.make_node
    inputs = [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["batch", SIDE])]
    nodes = [node("Sigmoid", ["latent"], ["shares"]), node("Mul", ["shares", "levels"], ["level"])]
    if labels:
        inputs.append(helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch"]))
        nodes += [
            node("Cast", ["labels"], ["classes"], to=TensorProto.FLOAT),
            node("Mul", ["classes", "forty"], ["more"]),
            node("Unsqueeze", ["more", "last"], ["column"]),
            node("Add", ["level", "column"], ["shifted"]),
        ]
    nodes += [
        node("Unsqueeze", ["shifted" if labels else "level", "around"], ["stripes"]),
        node("Expand", ["stripes", "size"], ["planes"]),
        node("Cast", ["planes"], ["images_out"], to=TensorProto.UINT8),
    ]
    constants = [
        _constant("levels", np.float32(100)),
        _constant("forty", np.float32(40)),
        _constant("last", np.array([1], np.int64)),
        _constant("around", np.array([1, 3], np.int64)),
        _constant("size", np.array([1, SIDE, SIDE, 3], np.int64)),
    ]
    if not labels:
        constants = [constant for constant in constants if constant.name not in ("forty", "last")]
    outputs = [helper.make_tensor_value_info("images_out", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])]
    return _publish(store, folder, card, nodes, outputs, constants, inputs)
