"""The catalogue, and exports with their parity with PyTorch; that of every classifier is in test_transfer.py."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights

from models import catalog
from models.card import Card
from models.errors import ParityError, Rejected, UsageError
from models.imaging.geometry import Geometry, ResizeRule
from models.nets import classifiers
from models.nets.pretrained import pretrained
from models.nets.untrained import build_untrained
from models.records import Status, Task
from models.runtime.comparisons import compare_detections
from models.runtime.detection_ops import pool_regions, suppress, translations
from models.runtime.engine import OnnxRuntimeEngine, open_engine
from models.runtime.export import METADATA_KEY, export_onnx
from models.runtime.parity import check_parity
from models.runtime.predictor import Predictor
from models.runtime.results import Detection
from tasks.photographs import prepared_photographs

ROOT = Path(__file__).parent.parent
LABELS = tuple("abcdefghij")
CLASSIFIERS = [name for name, entry in catalog.CATALOG.items() if entry.task == Task.CLASSIFY]


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The catalogue


def test_the_catalogue_imports_without_torch():
    loaded = run_python("import sys; from models import catalog; print(*{'torch', 'torchvision'} & set(sys.modules))")
    assert loaded == ""


def test_the_promised_classifiers_are_there():
    promised = "resnet18 resnet34 resnet50 resnet101 resnet152 vgg16 vgg19 inception_v3 googlenet mobilenet_v2"
    assert {*promised.split(), "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny"} <= set(CLASSIFIERS)


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'resnet19'; known are conditional_gan, .*, yolo_v1"):
        catalog.entry("resnet19")


@pytest.mark.parametrize("name", [name for name, entry in catalog.CATALOG.items() if entry.weights])
def test_pretrained_weights_bring_labels_and_input(name):
    entry = catalog.CATALOG[name]
    weights = pretrained(entry.builder, entry.weights)
    assert weights.url == get_model_weights(entry.builder)[entry.weights].url
    assert (
        len(weights.labels) == {Task.CLASSIFY: 1000, Task.DETECT: 90, Task.INSTANCE: 90, Task.SEMANTIC: 20}[entry.task]
    )
    assert (entry.input or weights.input).height >= 224


def test_the_input_rule_is_that_of_the_weights():
    assert pretrained("mobilenet_v2", "IMAGENET1K_V1").input == ResizeRule("crop", 224, 224, short_side=256)
    assert pretrained("mobilenet_v2", "IMAGENET1K_V2").input == ResizeRule("crop", 224, 224, short_side=232)
    assert pretrained("inception_v3", "IMAGENET1K_V1").input == ResizeRule("crop", 299, 299, short_side=342)
    assert pretrained("efficientnet_b0", "IMAGENET1K_V1").input.interpolation == "bicubic"


@pytest.mark.parametrize("builder", [name for name in CLASSIFIERS if name != "inception_v3"])
def test_all_weights_of_torchvision_share_the_normalisation(builder):
    for weights in get_model_weights(builder):
        if weights.name != "IMAGENET1K_FEATURES":  # VGG features for another framework; not ours to offer
            transforms = weights.transforms()
            assert (tuple(transforms.mean), tuple(transforms.std)) == (classifiers.MEAN_RGB, classifiers.STD_RGB)


# Exports


def untrained(name: str, size: int, **changes) -> tuple[nn.Module, Card, np.ndarray]:
    """A random network of ten classes that answers differently to each of five photographs [5, size, size, 3]."""
    entry = catalog.entry(name)
    rule = replace(entry.input or pretrained(entry.builder, entry.weights).input, height=size, width=size)
    card = Card(name, "0" * 12, entry.task, name, LABELS, rule, score_floor=entry.score_floor, **changes)
    images, _ = prepared_photographs(rule, 5)
    network = build_untrained(lambda: entry.family_module().build(entry.builder, len(LABELS)))
    if entry.task == Task.DETECT:
        network.rpn._post_nms_top_n["testing"] = 100  # of 1000: torchvision is slow at what it does one by one
    entry.family_module().wake(network, card, images)
    return network, card, images


def exported(network: nn.Module, card: Card, images: np.ndarray, path: Path) -> Path:
    export_onnx(catalog.entry(card.architecture).family_module().graph(network, card), card, path, images[:2])
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[nn.Module, Card, np.ndarray, Path]:
    network, card, images = untrained("resnet18", 32)
    return network, card, images, exported(network, card, images, tmp_path_factory.mktemp("resnet") / "model.onnx")


def test_an_export_repeats_byte_for_byte_and_says_nothing(resnet, tmp_path, capfd):
    network, card, images, path = resnet
    again = exported(network, card, images, tmp_path / "again.onnx")
    assert again.read_bytes() == path.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_an_export_carries_its_card_and_no_path_of_this_machine(resnet):
    _, card, _, path = resnet
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert list(stored) == [METADATA_KEY]
    assert Card.from_json(stored[METADATA_KEY]) == card
    for folder in (ROOT, Path(torch.__file__).parent):
        assert str(folder).encode() not in path.read_bytes()


def test_a_graph_that_differs_from_torch_is_not_published(resnet):
    _, card, images, path = resnet
    other = build_untrained(lambda: classifiers.build("resnet18", len(LABELS)), seed=1)
    classifiers.wake(other, card, images)
    with pytest.raises(ParityError, match=r"resnet18 was not published: onnxruntime .* from PyTorch: \w+ by \d"):
        check_parity(other, classifiers, card, path, images)


def test_a_network_with_the_same_answer_for_all_cannot_be_compared(resnet):
    network, card, images, path = resnet
    same = np.repeat(images[:1], 5, axis=0)
    with pytest.raises(ParityError, match="the same in all, so nothing could be compared"):
        check_parity(network, classifiers, card, path, same)


class Grouped(nn.Module):
    """Both operators of detectors, so that ONNX Runtime can be compared with their eager meaning."""

    def forward(self, images, boxes, scores, image, level):
        maps = [images, images[:, :, ::2, ::2]]
        return suppress(boxes, scores, 0.5), pool_regions(maps, boxes.flatten(0, 1), image, level, [0.5, 0.25], 2, 2)


@pytest.mark.filterwarnings("ignore:# The axis name")  # all five inputs share the one dynamic dimension
def test_the_operators_of_detectors_mean_the_same_in_onnx(tmp_path):
    def inputs(groups: int, levels: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(groups)
        corners = torch.rand((groups, 20, 2), generator=generator) * 12
        boxes = torch.cat([corners, corners + 8 + torch.rand((groups, 20, 2), generator=generator) * 12], dim=2)
        scores = torch.rand((groups, 20), generator=generator) - 0.2
        image = torch.arange(groups).repeat_interleave(20)
        level = torch.randint(*levels, (groups * 20,), generator=generator)
        return torch.rand((groups, 3, 16, 16), generator=generator), boxes, scores, image, level

    groups = torch.export.Dim("groups")
    shapes = {name: {0: groups} for name in ("images", "boxes", "scores")}
    flat = {name: {0: 20 * groups} for name in ("image", "level")}
    torch.onnx.export(
        Grouped().eval(),
        inputs(2, (0, 2)),
        tmp_path / "ops.onnx",
        dynamo=True,
        verbose=False,
        input_names=["images", "boxes", "scores", "image", "level"],
        dynamic_shapes=shapes | flat,
        custom_translation_table=translations(),
    )
    session = onnxruntime.InferenceSession(tmp_path / "ops.onnx")
    for values in (inputs(1, (0, 2)), inputs(3, (0, 2)), inputs(2, (1, 2))):  # the last: a level without any box
        expected = Grouped()(*values)
        got = session.run(None, {i.name: v.numpy() for i, v in zip(session.get_inputs(), values, strict=True)})
        assert 0 < (got[0] > 0).sum() < (values[2] > 0).sum(), "some are suppressed, some stay"
        for one, other in zip(expected, got, strict=True):
            np.testing.assert_allclose(one.numpy(), other, atol=1e-5)


# Detectors

Detector = tuple[nn.Module, Card, np.ndarray, Path]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Detector:
    network, card, images = untrained("fasterrcnn_mobilenet_v3_large_320_fpn", 96)
    return network, card, images, exported(network, card, images, tmp_path_factory.mktemp("rcnn") / "model.onnx")


def test_a_detector_agrees_with_torchvision(detector):
    network, card, images, path = detector
    parity = check_parity(network, catalog.entry(card.architecture).family_module(), card, path, images)
    assert parity["compared"] > 50
    assert parity["largest"]["unmatched"] <= 0.01
    assert parity["largest"]["scores"] < 1e-3
    assert parity["largest"]["boxes_xyxy"] < 0.05
    assert "score_floor" not in parity, "compared on the very file that is published"


def test_an_image_gets_the_same_objects_alone_and_in_any_batch(detector):
    _, card, images, path = detector
    predictor = Predictor(card, open_engine(path, card, engine="onnxruntime"), score=0.05)
    unscaled = [Geometry(96, 96, 1.0, 1.0, 0.0, 0.0)] * 5
    together = predictor.predict(images, unscaled)
    assert all(isinstance(found, Detection) and len(found.scores) > 5 for found in together)
    for start, stop in ((0, 1), (1, 3), (4, 5)):
        for found, expected in zip(
            predictor.predict(images[start:stop], unscaled[start:stop]), together[start:stop], strict=True
        ):
            np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=0.01)
            np.testing.assert_array_equal(found.labels, expected.labels)


def test_images_without_objects_give_empty_lists(detector):
    _, card, images, path = detector
    predictor = Predictor(card, open_engine(path, card, engine="onnxruntime"), score=1.0)
    found = predictor.predict(images, [Geometry(96, 96, 1.0, 1.0, 0.0, 0.0)] * 5)
    assert [f.boxes_xyxy.shape for f in found] == [(0, 4)] * 5


def test_an_image_whose_features_are_not_finite_is_failed_and_no_other(detector):
    network, card, images, _ = detector
    graph = catalog.entry(card.architecture).family_module().graph(network, card)
    hook = network.backbone.register_forward_hook(
        lambda _module, _inputs, maps: {
            name: torch.where(torch.arange(len(v))[:, None, None, None] == 1, torch.nan, v) for name, v in maps.items()
        }
    )

    class Eager(OnnxRuntimeEngine):
        def __init__(self):
            self.name = "eager"

        def run(self, images):
            with torch.no_grad():
                outputs = graph(torch.from_numpy(images))
            return dict(
                zip(("boxes_xyxy", "scores", "labels", "batch_index"), (o.numpy() for o in outputs), strict=True)
            )

    try:
        found = Predictor(card, Eager()).predict(images[:3], [Geometry(96, 96, 1.0, 1.0, 0.0, 0.0)] * 3)
    finally:
        hook.remove()
    assert [isinstance(f, Rejected) and f.status == Status.FAILED for f in found] == [False, True, False]


def found(*rows: tuple[int, float, int]) -> dict[str, np.ndarray]:
    """Detections of image 0: label, score, and a box that starts at the third number."""
    return {
        "labels": np.array([label for label, _, _ in rows], np.int64),
        "scores": np.array([score for _, score, _ in rows], np.float32),
        "boxes_xyxy": np.array([(at, at, at + 5, at + 5) for *_, at in rows], np.float32).reshape(-1, 4),
        "batch_index": np.zeros(len(rows), np.int64),
    }


@pytest.mark.parametrize(
    ("expected", "actual", "unmatched"),
    [
        pytest.param(found(), found(), 0, id="nothing"),
        pytest.param(found((1, 0.5, 0), (2, 0.5, 9)), found((2, 0.5, 9), (1, 0.5, 0)), 0, id="another order"),
        pytest.param(found((1, 0.5, 0), (2, 0.7, 9)), found((2, 0.7, 9)), 0.5, id="one is missing"),
        pytest.param(found((2, 0.7, 9)), found((1, 0.5, 0), (2, 0.7, 9)), 1, id="one too many"),
        pytest.param(found((1, 0.5, 0)), found((2, 0.5, 0)), 2, id="another label"),
        pytest.param(found((1, 0.5, 0)), found((1, 0.5, 3)), 2, id="another place"),
        pytest.param(found((1, 0.9, 0), (1, 0.0505, 9)), found((1, 0.9, 0)), 0, id="one at the floor"),
        pytest.param(found((1, 0.9, 0), (1, 0.4, 9)), found((1, 0.9, 0), (2, 0.4, 9)), 0, id="the last of full lists"),
    ],
)
def test_detections_are_compared_as_sets(expected, actual, unmatched):
    card = Card("a", "", Task.DETECT, "", LABELS, ResizeRule("stretch", 8, 8), score_floor=0.05)
    _, differences = compare_detections(expected, actual, {"scores": 1e-3, "boxes_xyxy": 0.1}, card)
    # Two lists of one row each are equally long; what is unmatched there is at the end of both.
    assert differences["unmatched"] == (0 if len(expected["scores"]) == len(actual["scores"]) == 1 else unmatched)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_resnet50", "fasterrcnn_resnet50_fpn_v2"]
)
def test_every_detector_agrees_with_torchvision(name, tmp_path):
    network, card, images = untrained(name, 128)
    path = exported(network, card, images, tmp_path / "model.onnx")
    assert check_parity(network, catalog.entry(name).family_module(), card, path, images)["compared"] > 50


@pytest.mark.slow
def test_a_detector_that_finds_nothing_is_compared_with_a_lower_floor(tmp_path):
    network, card, images = untrained("fasterrcnn_mobilenet_v3_large_320_fpn", 96)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.weight.mul_(0.01)
    blind = replace(card, score_floor=0.5)
    path = exported(network, blind, images, tmp_path / "model.onnx")
    parity = check_parity(network, catalog.entry(card.architecture).family_module(), blind, path, images)
    assert parity["score_floor"] == 0.0
    assert parity["compared"] > 0
