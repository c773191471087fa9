"""The single-shot detectors: what they learn in each mode, what they export, and their losses by hand."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import complete_box_iou_loss

from models import catalog
from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.errors import UsageError
from models.imaging.geometry import Geometry, ResizeRule
from models.learning import transfer
from models.learning.detection import DetectionScores
from models.nets import yolo, yolo_v1
from models.nets.dense_detections import Dense, Detections, detections
from models.nets.parts import Parts
from models.nets.untrained import build_untrained
from models.nets.yolo_assignment import (
    assign,
    complete_iou_loss,
    distribution_focal_loss,
    varifocal_loss,
    widened,
)
from models.runtime.engine import open_engine
from models.runtime.export import export_onnx
from models.runtime.parity import check_parity
from models.runtime.predictor import Predictor
from tasks import demo, registry
from tasks.adopt import import_model
from tasks.photographs import prepared_photographs
from tasks.weights import apply_start, starting_state
from tests.tiny_rcnn import LABELS, shapes, target

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("yolo_n", "yolo_s", "yolo_m", "yolo_v1")
SIDE = 96


def new(name: str, seed: int = 0) -> tuple[nn.Module, Parts]:
    entry = catalog.entry(name)
    family = entry.family_module()
    network = build_untrained(lambda: family.build_for_training(entry.builder, len(LABELS)), seed)
    return network, family.parts(network, entry.builder)


def card_of(name: str, side: int = SIDE) -> Card:
    entry = catalog.entry(name)
    assert entry.input is not None
    rule = replace(entry.input, height=side, width=side)
    return Card(name, "0" * 12, entry.task, name, LABELS, rule, score_floor=entry.score_floor)


def awake(name: str, side: int = SIDE) -> tuple[nn.Module, Card, np.ndarray]:
    """A random network that finds objects in five photographs [5, side, side, 3]."""
    network, _ = new(name)
    card = card_of(name, side)
    photographs, _ = prepared_photographs(card.input, 5)
    catalog.entry(name).family_module().wake(network.eval(), card, photographs)
    return network, card, photographs


def update(name: str, network: nn.Module, parts: Parts, mode: str, images: Tensor, targets: list, steps: int = 1):
    """So many updates by the same batch."""
    optimizer = torch.optim.AdamW(transfer.parameter_groups(network, parts, mode, 3e-3, 0.1, 0.0))
    network.train()
    for _ in range(steps):
        losses = catalog.entry(name).family_module().losses(network, images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    network.eval()


# Learning


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["features", "finetune", "scratch"])
def test_what_is_frozen_stays_bit_for_bit(name, mode):
    network, _, _ = awake(name)
    entry = catalog.entry(name)
    parts = entry.family_module().parts(network, entry.builder)
    transfer.prepare(network, parts, mode)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    update(name, network, parts, mode, *shapes(2, SIDE))
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    of_backbone = {key for key in before if key.startswith("backbone.")}
    statistics = {key for key, _ in network.named_buffers()}
    expected = {
        "features": before.keys() - of_backbone,
        "finetune": before.keys() - statistics,
        "scratch": set(before),
    }[mode]
    assert changed <= expected
    # No object needs be of the size of each map, and then the boxes of that map learn nothing.
    assert all(key.startswith("box_tower.norms.") for key in expected - changed)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([target([], []), target([], [])], id="nothing"),
        pytest.param([target([], []), target([[10, 10, 40, 50]], [1])], id="nothing in one"),
        pytest.param([target([[0, 0, 96, 96]], [0], [True]), target([], [])], id="only a crowd"),
        pytest.param([target([[10, 10, 11, 11]], [3]), target([[0, 0, 96, 96]], [3])], id="a pixel and everything"),
        pytest.param([target([[95, 95, 96, 96]], [3]), target([[0, 0, 1, 1]], [3])], id="pixels in corners"),
        pytest.param([target([[10, 10, 10, 30], [5, 5, 5, 5]], [3, 1]), target([], [])], id="boxes without area"),
        pytest.param([target([[9, 9, 30, 30]] * 2, [0, 1]), target([], [])], id="twice the same box"),
        pytest.param(
            [target([[i % 80, 96 - i % 80 - 9, i % 80 + 9, 96 - i % 80] for i in range(100)], [2] * 100)] * 2,
            id="a hundred",
        ),
    ],
)
@pytest.mark.parametrize("name", ["yolo_n", "yolo_v1"])
def test_losses_are_finite_whatever_the_image_holds(name, given):
    network, _ = new(name)
    network.train()
    losses = catalog.entry(name).family_module().losses(network, shapes(2, SIDE)[0], given)
    assert all(loss.isfinite() and loss >= 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ["yolo_n", "yolo_v1"])
def test_an_ignored_region_is_no_background(name):
    network, _, _ = awake(name)
    family = catalog.entry(name).family_module()
    images, _ = shapes(1, SIDE)
    background = {"yolo_n": "loss_score", "yolo_v1": "loss_no_object"}[name]
    with torch.no_grad():
        alone = family.losses(network, images, [target([], [])])[background]
        half = family.losses(network, images, [target([[0, 0, 96, 48]], [0], [True])])[background]
        everything = family.losses(network, images, [target([[0, 0, 96, 96]], [0], [True])])[background]
    assert 0 < half < alone
    assert everything == 0


@pytest.mark.parametrize("size", [(32, 64), (320, 320), (416, 224)], ids=str)
@pytest.mark.parametrize("name", ["yolo_n", "yolo_v1"])
def test_any_multiple_of_32_will_do(name, size):
    network, _ = new(name)
    family = catalog.entry(name).family_module()
    images = torch.zeros((1, *size, 3), dtype=torch.uint8)
    with torch.no_grad():
        answers = network(images)
        cells = {"yolo_n": sum(size[0] * size[1] // s**2 for s in (8, 16, 32)), "yolo_v1": size[0] * size[1] // 32**2}
        found = family.reference(network, replace(card_of(name), score_floor=0.0))(images)
    assert answers[0].shape[1] == cells[name]
    assert (found["boxes_xyxy"] <= torch.tensor([size[1], size[0]] * 2)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_does_not_fit_says_which_do(name):
    assert catalog.input_rule(name, None, 320).width == 320
    with pytest.raises(UsageError, match=f"{name} needs images whose sides are multiples of 32 .* use 320 or 352"):
        catalog.input_rule(name, None, 330)
    with pytest.raises(UsageError, match="got --image-size 16: use 32 or 64"):
        catalog.input_rule(name, None, 16)


def ap50(name: str, network: nn.Module, images: Tensor, targets: list) -> float:
    scores = DetectionScores(len(LABELS))
    with torch.no_grad():
        scores.update(
            catalog.entry(name).family_module().reference(network, card_of(name, images.shape[1]))(images), targets
        )
    return scores.compute()["ap50"]


def test_eight_images_are_learned_in_few_steps_on_a_pretrained_backbone():
    shipped = demo.weights_file()
    assert shipped is not None, "the package with MobileNetV2's weights is not installed: see the Makefile"
    network, parts = new("yolo_n")
    network.load_state_dict(yolo.backbone_state(torch.load(shipped, weights_only=True)), strict=False)
    images, targets = shapes(8, 128)
    transfer.prepare(network, parts, "features")
    assert ap50("yolo_n", network.eval(), images, targets) < 0.1
    update("yolo_n", network, parts, "features", images, targets, steps=30)
    assert ap50("yolo_n", network, images, targets) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("yolo_s", 60), ("yolo_m", 60), ("yolo_v1", 60)])
def test_eight_images_are_learned_from_scratch(name, steps):
    network, parts = new(name)
    images, targets = shapes(8, 128)
    transfer.prepare(network, parts, "scratch")
    optimizer = torch.optim.AdamW(transfer.parameter_groups(network, parts, "scratch", 1e-3, 0.1, 0.0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.2)
    network.train()
    for _ in range(steps):
        losses = catalog.entry(name).family_module().losses(network, images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    assert ap50(name, network.eval(), images, targets) >= 0.9


# Weights


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_answers_as_the_classifier_whose_weights_it_has(name):
    entry = catalog.entry(name)
    classifier = build_untrained(lambda: get_model(entry.backbone, weights=None)).eval()
    network, parts = new(name, seed=1)
    state = entry.family_module().backbone_state(classifier.state_dict())
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    assert set(state) == {key for key in network.state_dict() if key.startswith("backbone.")}
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = images
        blocks = getattr(classifier, "features", classifier).named_children()
        for _, block in (named for named in blocks if named[0] not in ("18", "avgpool", "fc")):
            expected = block(expected)
        maps = network.eval().backbone(images)
    torch.testing.assert_close(maps[-1], expected)
    assert [one.shape[2] for one in maps] == [8, 4, 2]
    again = entry.family_module().backbone_state(network.state_dict())
    assert set(again) == set(network.state_dict()), "a whole detector's stay as they are"
    held = [
        id(p)
        for part in (*parts.head, *parts.neck, *(n for s in parts.stages for n in s))
        for p in network.get_submodule(part).parameters()
    ]
    assert sorted(held) == sorted(id(p) for p in network.parameters())


def published(store: str, folder: Path, name: str, architecture: str, state: dict, labels: tuple[str, ...]) -> Card:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS_FILE)
    (folder / ONNX_FILE).write_bytes(b"graph")
    rule = ResizeRule("letterbox", 64, 64) if "yolo" in architecture else ResizeRule("crop", 64, 64, short_side=72)
    task = catalog.entry(architecture).task
    sha256 = registry.sha256_of(folder / WEIGHTS_FILE)
    card = Card(name, "", task, architecture, labels, rule, licence="MIT", weights_sha256=sha256).with_version()
    return registry.publish(store, card, {file: folder / file for file in (WEIGHTS_FILE, ONNX_FILE)})


@pytest.mark.parametrize("source", ["imagenet", "IMAGENET1K_V1", None, "file", "classifier of the store"])
def test_a_detector_starts_from_a_classifier(source, tmp_path, monkeypatch):
    shipped = demo.weights_file()
    assert shipped is not None
    weights, store = source, str(tmp_path / "mill")
    state = torch.load(shipped, weights_only=True)
    said, licence = "yolo_n on torchvision:mobilenet_v2 IMAGENET1K_V1", "BSD-3"
    if source == "file":
        weights, said, licence = str(shipped), f"yolo_n {shipped.name}", ""
    elif source == "classifier of the store":
        card = published(store, tmp_path, "pets", "mobilenet_v2", state, tuple(map(str, range(1000))))
        weights, said, licence = "pets", f"yolo_n on {card.reference}", "MIT"
    else:
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        shutil.copy(shipped, tmp_path / "hub" / "checkpoints")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    start = starting_state(weights, "yolo_n", "features", store, image_size=320)
    assert start.source == said
    assert start.licence.startswith(licence)
    assert start.input == ResizeRule("letterbox", 320, 320, pad_rgb=(124, 116, 104))
    network, parts = new("yolo_n")
    own = {key: value.clone() for key, value in network.state_dict().items()}
    assert apply_start(network, start, parts, yolo.IGNORED_PREFIXES, LABELS, "yolo_n")
    expected = own | yolo.backbone_state(state)
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    assert not torch.equal(expected["backbone.0.0.weight"], own["backbone.0.0.weight"])


@pytest.mark.parametrize("source", ["file", "store"])
def test_a_detector_of_other_classes_brings_its_neck(source, tmp_path):
    entry = catalog.entry("yolo_n")
    state = build_untrained(lambda: yolo.build(entry.builder, 7), seed=1).state_dict()
    published(str(tmp_path / "mill"), tmp_path, "cells", "yolo_n", state, tuple("abcdefg"))
    weights = str(tmp_path / WEIGHTS_FILE) if source == "file" else "cells"
    start = starting_state(weights, "yolo_n", "finetune", str(tmp_path / "mill"))
    network, parts = new("yolo_n")
    own = {key: value.clone() for key, value in network.state_dict().items()}
    assert apply_start(network, start, parts, yolo.IGNORED_PREFIXES, LABELS, "yolo_n")
    for key, value in network.state_dict().items():
        assert torch.equal(value, own[key] if key.startswith("classify.") else state[key]), key


def test_torchvision_has_none_to_import(tmp_path):
    with pytest.raises(UsageError, match="torchvision has no trained yolo_n: train one"):
        import_model("torchvision:yolo_n", "a", str(tmp_path))


def test_another_backbone_is_refused(tmp_path):
    state = build_untrained(lambda: get_model("mobilenet_v3_small", weights=None, num_classes=2)).state_dict()
    published(str(tmp_path / "mill"), tmp_path, "pets", "mobilenet_v3_small", state, ("cat", "dog"))
    with pytest.raises(UsageError, match=r"do not fit yolo_n: .* or other weights, or those of a mobilenet_v2"):
        starting_state("pets", "yolo_n", "finetune", str(tmp_path / "mill"))


# Exports

Exported = tuple[nn.Module, Card, np.ndarray, Path]


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow if n in ("yolo_s", "yolo_m") else ()) for n in NAMES]
)
def exported(request, tmp_path_factory) -> Exported:
    network, card, photographs = awake(request.param)
    path = tmp_path_factory.mktemp(request.param) / ONNX_FILE
    family = catalog.entry(request.param).family_module()
    export_onnx(family.graph(network, card), card, path, photographs[:2])
    return network, card, photographs, path


def test_an_export_agrees_with_the_reference(exported):
    network, card, photographs, path = exported
    parity = check_parity(network, catalog.entry(card.architecture).family_module(), card, path, photographs)
    assert parity["compared"] > 50
    assert parity["largest"]["unmatched"] <= 0.01
    assert parity["largest"]["scores"] < 5e-4
    assert parity["largest"]["boxes_xyxy"] < 0.05
    assert "score_floor" not in parity, "compared on the very file that is published"


def test_an_image_gets_the_same_objects_alone_and_in_any_batch(exported):
    _, card, photographs, path = exported
    predictor = Predictor(card, open_engine(path, card, engine="onnxruntime"), score=0.05)
    unscaled = [Geometry(SIDE, SIDE, 1.0, 1.0, 0.0, 0.0)] * 6
    images = np.concatenate([photographs, np.zeros_like(photographs[:1])])  # and an empty one
    together = predictor.predict(images, unscaled)
    for start, stop in ((0, 1), (1, 3), (4, 6)):
        alone = predictor.predict(images[start:stop], unscaled[start:stop])
        for found, expected in zip(alone, together[start:stop], strict=True):
            np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=0.01)
            np.testing.assert_array_equal(found.labels, expected.labels)
    none = Predictor(card, open_engine(path, card, engine="onnxruntime"), score=1.0).predict(images, unscaled)
    assert [found.boxes_xyxy.shape for found in none] == [(0, 4)] * 6


@pytest.mark.parametrize("name", ["yolo_n", "yolo_v1"])
def test_an_image_whose_features_are_not_finite_has_one_row_without_a_score(name):
    network, card, photographs = awake(name)
    graph = catalog.entry(name).family_module().graph(network, card)

    def spoiled(_module, _inputs, maps):
        return [torch.where(torch.arange(len(one))[:, None, None, None] == 1, torch.nan, one) for one in maps]

    with torch.no_grad():
        whole = graph(torch.from_numpy(photographs[:3]))
        with network.backbone.register_forward_hook(spoiled):
            boxes, scores, _, image = graph(torch.from_numpy(photographs[:3]))
    assert scores[image == 1].isnan().tolist() == [True]
    assert boxes.isfinite().all()
    for other in (0, 2):
        torch.testing.assert_close(boxes[image == other], whole[0][whole[3] == other])


@pytest.mark.parametrize("number", [0, 1, 7, 400])
def test_suppression_in_the_graph_is_torchvisions(number):
    random = torch.Generator().manual_seed(number)
    corners = torch.rand((2, number, 2), generator=random) * 100 - 5
    boxes = torch.cat([corners, corners + torch.rand((2, number, 2), generator=random) * 40], dim=2)
    scores = torch.rand((2, number, 5), generator=random) ** 2
    got = Detections(96, 96, 0.3, 0.5)(boxes, scores)
    expected = detections(Dense(boxes, scores), (96, 96), 0.3, 0.5)
    for one, other in zip(got, expected.values(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(got[1]) > 0 or number < 7


# Losses and assignment, by hand

ASPECT = 4 / math.pi**2 * (math.pi / 4 - math.atan(2)) ** 2  # v of a square and of what is twice as wide as high


@pytest.mark.parametrize(
    ("box", "wanted", "expected"),
    [
        pytest.param((0, 0, 4, 4), (0, 0, 4, 4), 0.0, id="the same"),
        pytest.param((0, 0, 4, 4), (4, 0, 8, 4), 1 + 16 / 80, id="side by side: the distance alone"),
        pytest.param((0, 0, 4, 4), (2, 0, 6, 4), 1 - 1 / 3 + 4 / 52, id="a third in common"),
        # IoU 1/2, centres 1 apart, c² = 4² + 4², and v² / (1/2 + v)
        pytest.param((0, 0, 4, 2), (0, 0, 4, 4), 0.5 + 1 / 32 + ASPECT**2 / (0.5 + ASPECT), id="another shape"),
    ],
)
def test_complete_iou(box, wanted, expected):
    boxes, targets = (torch.tensor([value], dtype=torch.float32) for value in (box, wanted))
    found = complete_iou_loss(boxes, targets)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(found, complete_box_iou_loss(boxes, targets), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("box", [(3, 3, 3, 3), (3, 3, 3, 9), (3, 3, 9, 3), (1e4, 0, 1e4, 0)], ids=str)
@pytest.mark.parametrize("wanted", [(0, 0, 4, 4), (3, 3, 3, 3), (3, 3, 3, 9)], ids=str)
def test_complete_iou_of_boxes_without_area_is_finite(box, wanted):
    boxes = torch.tensor([box], dtype=torch.float32, requires_grad=True)
    loss = complete_iou_loss(boxes, torch.tensor([wanted], dtype=torch.float32))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        pytest.param(1.0, -math.log(0.5), id="whole"),
        pytest.param(1.25, -0.75 * math.log(0.5) - 0.25 * math.log(0.25), id="between"),
        pytest.param(0.0, -math.log(0.25), id="nothing"),
        pytest.param(-3.0, -math.log(0.25), id="beyond the near end"),
        pytest.param(2.0, -math.log(0.25), id="the last"),
        pytest.param(9.0, -math.log(0.25), id="beyond the far end"),
    ],
)
def test_distribution_focal_loss(distance, expected):
    logits = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert distribution_focal_loss(logits, torch.tensor([distance])).item() == pytest.approx(expected)


def test_varifocal_loss():
    logits = torch.tensor([0.0, 0.0, 4.0])
    quality = torch.tensor([0.8, 0.0, 0.0])
    certain = 1 / (1 + math.exp(-4))
    expected = [0.8 * math.log(2), 0.75 * 0.25 * math.log(2), -0.75 * certain**2 * math.log(1 - certain)]
    torch.testing.assert_close(varifocal_loss(logits, quality), torch.tensor(expected))


def test_boxes_are_the_means_of_their_distributions():
    centres, strides = yolo.cells([(4, 4), (2, 2), (1, 1)], torch.device("cpu"))
    assert centres[[0, 1, 4, 16, 20]].tolist() == [[4, 4], [12, 4], [4, 12], [8, 8], [16, 16]]
    assert strides.tolist() == [8.0] * 16 + [16.0] * 4 + [32.0]
    distributions = torch.full((1, 21, 4, yolo.BINS), -100.0)
    distributions[0, :, torch.arange(4), torch.tensor([0, 1, 2, 3])] = 0.0
    distributions[0, 20, 3, 4] = 0.0  # as much as 3: 3.5 on the mean
    boxes = yolo.decode(yolo.Answers(torch.zeros(1, 21, 2), distributions, centres, strides))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([4.0, 4 - 8, 4 + 16, 4 + 24]))
    torch.testing.assert_close(boxes[0, 20], torch.tensor([16.0, 16 - 32, 16 + 64, 16 + 3.5 * 32]))


CENTRES = torch.tensor([[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [28.0, 4.0]])


def assigned(scores, boxes, wanted):
    return assign(torch.tensor(scores), torch.tensor(boxes, dtype=torch.float32), CENTRES, wanted, 8.0)


def test_places_in_an_object_learn_it_by_how_well_they_see_it():
    boxes = [(0, 0, 16, 8), (0, 0, 8, 8), (0, 0, 16, 8), (0, 0, 16, 8)]
    found = assigned([[0.5], [0.5], [0.5], [0.5]], boxes, target([[0, 0, 16, 8]], [0]))
    assert found.objects.tolist() == [0, 0, -1, -1], "the centres of the others lie outside"
    # IoU 1 and 1/2, of which the sixth power ranks; the best place gets the best IoU.
    torch.testing.assert_close(found.quality, torch.tensor([1.0, 0.5**6, 0.0, 0.0]))
    found = assigned([[0.5, 0.1], [0.5, 0.4], [0, 0], [0, 0]], [(0, 0, 12, 8)] * 4, target([[0, 0, 16, 8]], [1]))
    torch.testing.assert_close(found.quality, torch.tensor([0.25 * 0.75, 0.75, 0.0, 0.0]))  # by the score of its class


def test_a_place_that_two_objects_want_learns_the_one_that_it_overlaps_most():
    wanted = target([[0, 0, 32, 8], [0, 0, 8, 8]], [0, 1])
    found = assigned([[0.9, 0.1]] * 4, [(0, 0, 8, 8), (0, 0, 32, 8), (0, 0, 32, 8), (0, 0, 32, 8)], wanted)
    assert found.objects.tolist() == [1, 0, 0, 0]


def test_no_more_places_than_thirteen_learn_an_object():
    centres = torch.stack([torch.arange(40) * 2.0, torch.full((40,), 4.0)], dim=1)
    boxes = torch.stack([torch.zeros(40), torch.zeros(40), torch.arange(40) + 1.0, torch.full((40,), 8.0)], dim=1)
    found = assign(torch.full((40, 1), 0.5), boxes, centres, target([[0, 0, 80, 8]], [0]), 8.0)
    assert (found.objects >= 0).nonzero().flatten().tolist() == list(range(27, 40))
    # Those outside do not count among the thirteen, however well they see it.
    boxes[:20] = torch.tensor([70.0, 0, 80, 8])
    found = assign(torch.full((40, 1), 0.5), boxes, centres, target([[70, 0, 80, 8]], [0]), 8.0)
    assert (found.objects >= 0).nonzero().flatten().tolist() == list(range(35, 40))


def test_every_object_has_a_place_however_small():
    for x in np.arange(0, 31.5, 0.7):
        found = assigned([[0.01]] * 4, [(0, 0, 32, 8)] * 4, target([[x, 5, x + 0.5, 5.5]], [0]))
        assert (found.objects == 0).any(), x
        assert found.quality.max() > 0
    assert widened(torch.tensor([[3.0, 0, 4, 20]]), 8.0).tolist() == [[-0.5, 0, 7.5, 20]]


def test_regions_to_be_ignored_are_no_background_but_objects_in_them_are_learned():
    wanted = target([[0, 0, 24, 8], [0, 0, 8, 8]], [0, 0], [True, False])
    found = assigned([[0.5]] * 4, [(0, 0, 8, 8)] * 4, wanted)
    assert found.objects.tolist() == [0, -1, -1, -1]
    assert found.ignored.tolist() == [False, True, True, False]
    nothing = assigned([[0.5]] * 4, [(0, 0, 8, 8)] * 4, target([], []))
    assert nothing.objects.tolist() == [-1] * 4
    assert not nothing.ignored.any()


def test_the_grid_detectors_loss_is_equation_3():
    """Two cells, two boxes each, two classes; one object in the right cell, for which its second box is responsible."""
    boxes = torch.tensor([[[0.5, 0.5, 0.1, 0.1, 0.2], [0.5, 0.5, 0.1, 0.1, 0.4]],
                          [[0.5, 0.5, 0.1, 0.1, 0.3], [0.5, 0.5, 0.5, 1.0, 0.6]]])[None]  # fmt: skip
    classes = torch.tensor([[[0.9, 0.9], [0.7, 0.4]]])
    answers = yolo_v1.Answers(boxes, classes, torch.tensor([[0.0, 0.0], [32.0, 0.0]]), torch.tensor([64.0, 32.0]))
    # Its centre is (44, 16), .375 and .5 of its cell; its sides 16 and 32 are 1/4 and all of the image, as box 2 says.
    wanted = target([[36, 0, 52, 32]], [0])
    found = yolo_v1.losses(lambda _images: answers, torch.zeros(1, 32, 64, 3, dtype=torch.uint8), [wanted])
    iou = 12 / 20  # box 2 lies from 40 to 56
    expected = {
        "loss_place": 5 * 0.125**2,
        "loss_size": 0.0,
        "loss_object": (0.6 - iou) ** 2,
        "loss_no_object": 0.5 * (0.2**2 + 0.4**2 + 0.3**2),
        "loss_class": 0.3**2 + 0.4**2,
    }
    assert {name: pytest.approx(value.item(), abs=1e-6) for name, value in found.items()} == expected
