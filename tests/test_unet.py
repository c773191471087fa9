"""U-Net and torchvision's segmenters: any size, and an export that answers as PyTorch does."""

import numpy as np
import pytest
import torch
from torchvision.models import mobilenet_v2

from models import catalog
from models.card import Card
from models.imaging.geometry import ResizeRule
from models.nets import unet
from models.nets.untrained import build_untrained
from models.runtime.engine import OnnxRuntimeEngine
from models.runtime.export import export_onnx
from models.runtime.parity import check_parity
from tasks.demo import weights_file
from tasks.photographs import prepared_photographs
from tasks.weights import apply_start, starting_state

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("a", "b", "c")
SEGMENTERS = (
    pytest.param("fcn_resnet50", marks=pytest.mark.slow),
    pytest.param("deeplabv3_resnet50", marks=pytest.mark.slow),
    "unet",
    "unet_resnet34",
    "unet_mobilenet_v2",
)
PARAMETERS = {"unet": 31_037_828}  # of the paper's network with four outputs, its BatchNorms included


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The networks' own widths cost seconds a step."""
    monkeypatch.setattr(unet, "WIDTH", 8)


@pytest.mark.parametrize("size_hw", [(64, 64), (37, 50), (1, 1), (17, 96)])
@pytest.mark.parametrize("name", ["unet", "unet_resnet34", "unet_mobilenet_v2"])
def test_an_answer_has_the_size_of_the_image(name, size_hw):
    network = unet.build(name, 3)
    with torch.no_grad():
        assert network(torch.zeros(2, 3, *size_hw)).shape == (2, 4, *size_hw)


def test_the_papers_network_has_the_papers_width(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        network = unet.UNet(4)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS["unet"]
    assert [block[0].out_channels for block in network.contract] == [64, 128, 256, 512, 1024]


def test_mobilenet_starts_from_what_a_package_ships():
    """Every parameter of the encoder, and each of its maps is the classifier's own."""
    shipped = weights_file()
    assert shipped is not None, "the development tools bring it"
    entry = catalog.entry("unet_mobilenet_v2")
    network = unet.build(entry.builder, 1)
    start = starting_state(str(shipped), "unet_mobilenet_v2", "finetune", store="")
    parts = unet.parts(network, entry.builder)
    assert apply_start(network, start, parts, unet.IGNORED_PREFIXES, ("a",), "unet_mobilenet_v2"), "the head is new"
    assert set(start.state) == {name for name in network.state_dict() if name.startswith("encoder.")}
    classifier = mobilenet_v2(weights=None).eval()
    classifier.load_state_dict(torch.load(shipped, weights_only=True))
    images = torch.rand(1, 3, 64, 96)
    expected, features = [], images
    with torch.no_grad():
        for number, block in enumerate(classifier.features):
            features = block(features)
            if number in (1, 3, 6, 13, 17):
                expected.append(features)
        got = network.maps(images)
    assert [map_.shape[2:] for map_ in got] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_without_norms_convolutions_have_biases():
    network = unet.UNet(2, width=8, norm=False)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(m.bias is not None for m in network.modules() if isinstance(m, torch.nn.Conv2d))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_is_exported(name, tmp_path):
    entry = catalog.entry(name)
    family = entry.family_module()
    # FCN and DeepLab see an eighth of it; the odd sides are U-Net's difficulty.
    rule = ResizeRule("letterbox", 64, 64) if entry.family == "segmenters" else ResizeRule("letterbox", 67, 58)
    card = Card(name, "0" * 12, entry.task, name, LABELS, rule)
    images, _ = prepared_photographs(rule, 5)
    network = build_untrained(lambda: family.build(entry.builder, len(LABELS)))
    family.wake(network, card, images)
    path = tmp_path / "model.onnx"
    export_onnx(family.graph(network, card), card, path, images[:2])
    record = check_parity(network, family, card, path, images)
    assert record["agrees"]
    class_map = OnnxRuntimeEngine(path, card, concurrency=1).run(images)["class_map"]
    assert class_map.dtype == np.uint8
    assert class_map.shape == (5, rule.height, rule.width)
    assert set(np.unique(class_map)) == {0, 1, 2, 3}
