"""Mask R-CNN: its exports agree with torchvision, and each image gets the same masks alone and in any batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from models import catalog
from models.card import Card
from models.nets import mask_rcnn
from models.runtime.export import export_onnx
from models.runtime.parity import check_parity
from tests.tiny_rcnn import LABELS, awake

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("boxes_xyxy", "scores", "labels", "batch_index", "masks")


def exported(network: nn.Module, card: Card, images: np.ndarray, path: Path) -> onnxruntime.InferenceSession:
    export_onnx(mask_rcnn.graph(network, card), card, path, images[:2])
    return onnxruntime.InferenceSession(path)


def answers(session: onnxruntime.InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs by name, the objects of each image best first."""
    return in_order(dict(zip(NAMES, session.run(None, {"images": images}), strict=True)))


def in_order(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    order = np.lexsort((-outputs["scores"], outputs["batch_index"]))
    return {name: values[order] for name, values in outputs.items()}


def of_torchvision(network: nn.Module, card: Card, images: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = mask_rcnn.reference(network, card)(torch.from_numpy(images))
    return in_order({name: value.numpy() for name, value in outputs.items()})


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, tolerance in (("labels", 0), ("batch_index", 0), ("scores", 1e-4), ("boxes_xyxy", 0.01), ("masks", 1e-3)):
        assert one[name].shape == other[name].shape, name
        np.testing.assert_allclose(one[name], other[name], atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[nn.Module, Card, np.ndarray, onnxruntime.InferenceSession]:
    network, card, images = awake("maskrcnn_resnet18", 128)
    return network, card, images, exported(network, card, images, tmp_path_factory.mktemp("mask") / "model.onnx")


@pytest.mark.parametrize("count", [1, 3, 5])
def test_masks_are_those_of_torchvision(small, count):
    network, card, images, session = small
    got = answers(session, images[:count])
    assert len(got["scores"]) > 10 * count
    assert got["masks"].shape[1:] == (28, 28)
    assert got["masks"].std() > 0.1, "the masks are not all grey"
    assert_same(got, of_torchvision(network, card, images[:count]))


def test_the_gate_before_publishing_agrees(small, monkeypatch):
    network, card, images, session = small
    monkeypatch.setattr("models.runtime.openvino.cpu_precisions", lambda: ())  # it cannot convert Mask R-CNN
    parity = check_parity(network, mask_rcnn, card, Path(session._model_path), images)
    assert parity["compared"] > 50
    assert parity["largest"]["unmatched"] <= 0.01


def test_an_image_gets_the_same_masks_alone_and_in_a_batch(small):
    _, _, images, session = small
    together = answers(session, images)
    for number in range(len(images)):
        alone = answers(session, images[number : number + 1])
        rows = together["batch_index"] == number
        of_image = {name: values[rows] for name, values in together.items()}
        assert_same(alone, of_image | {"batch_index": np.zeros(rows.sum(), np.int64)})


def test_images_without_objects_have_no_masks(small):
    *_, images, session = small
    model = onnx.load(session._model_path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("cls_score.bias"))
    value = numpy_helper.to_array(bias) + np.eye(1, len(LABELS) + 1, dtype=np.float32)[0] * 50  # all is background
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))
    got = answers(onnxruntime.InferenceSession(model.SerializeToString()), images)
    assert [got[name].shape for name in NAMES] == [(0, 4), (0,), (0,), (0,), (0, 28, 28)]


@pytest.mark.parametrize("module", ["backbone", "mask_head"])
def test_what_is_not_finite_is_said_by_the_score_of_its_image_alone(small, module):
    network, card, images, _ = small
    graph = mask_rcnn.graph(network, card)

    def spoil(_module, _inputs, output):
        if module == "mask_head":
            bad = torch.arange(len(output)) == 0  # the first object is of the first image
            return torch.where(bad[:, None, None, None], torch.nan, output)
        bad = torch.arange(2) == 0
        return {name: torch.where(bad[:, None, None, None], torch.nan, feature) for name, feature in output.items()}

    with graph.get_submodule(module).register_forward_hook(spoil), torch.no_grad():
        _, scores, _, image, _ = graph(torch.from_numpy(images[:2]))
    assert scores[image == 0].isnan().any()
    assert (image == 1).sum() > 10
    assert scores[image == 1].isfinite().all()


@pytest.mark.parametrize("name", ["maskrcnn_resnet18", "maskrcnn_mobilenet_v2"])
def test_small_networks_find_more_than_a_hundred_objects_in_an_image(name):
    network, card, images = awake(name, 128, images=2)
    built = catalog.entry(name).family_module().build(catalog.entry(name).builder, len(LABELS))
    built.load_state_dict(network.state_dict())
    found = of_torchvision(built, replace(card, score_floor=0.0), images)
    assert (np.bincount(found["batch_index"]) > 100).all()


@pytest.mark.parametrize(
    ("name", "side"), [("maskrcnn_mobilenet_v2", 128), pytest.param("maskrcnn_resnet50", 192, marks=pytest.mark.slow)]
)
def test_other_networks_agree_too(name, side, tmp_path, monkeypatch):
    network, card, images = awake(name, side)
    exported(network, card, images, tmp_path / "model.onnx")
    monkeypatch.setattr("models.runtime.openvino.cpu_precisions", lambda: ())
    assert check_parity(network, mask_rcnn, card, tmp_path / "model.onnx", images)["compared"] > 50


def test_the_catalogue_has_them():
    assert catalog.entry("maskrcnn_resnet50").data == "coco"
    for name in ("maskrcnn_resnet18", "maskrcnn_mobilenet_v2"):
        assert catalog.entry(name).data == "imagenet"  # of its backbone: nobody publishes the whole
