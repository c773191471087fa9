"""Faster and Mask R-CNN learn: in each mode what should, from objects alone, and from whatever weights there are."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from models import catalog
from models.learning import transfer
from models.nets import faster_rcnn
from models.nets.parts import Parts
from models.nets.untrained import build_untrained
from tasks.weights import Start, apply_start, starting_state
from tests.tiny_rcnn import LABELS, awake, shapes, target

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 96
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
SMALL = ("fasterrcnn_resnet18", "maskrcnn_resnet18", "maskrcnn_mobilenet_v2")


def beginning(name: str) -> tuple[nn.Module, Parts]:
    entry = catalog.entry(name)
    network, _, _ = awake(name, SIDE, images=2)
    return network, entry.family_module().parts(network, entry.builder)


def update(network: nn.Module, parts: Parts, mode: str, images: Tensor, targets: list, steps: int = 1) -> list[float]:
    """So many updates by the same batch; gives the sum of the losses at each."""
    optimizer = torch.optim.AdamW(transfer.parameter_groups(network, parts, mode, 1e-3, 0.1, 0.0))
    torch.manual_seed(0)
    network.train()
    sums = []
    for _ in range(steps):
        losses = faster_rcnn.losses(network, images, targets)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        sums.append(total.item())
    network.eval()
    return sums


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mode", ["features", "finetune", "scratch"])
def test_what_is_frozen_stays_bit_for_bit(name, mode):
    network, parts = beginning(name)
    transfer.prepare(network, parts, mode)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    update(network, parts, mode, *shapes(2, SIDE))
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    of_backbone = {key for key in before if key.startswith("backbone.body.")}
    statistics = {key for key, _ in network.named_buffers()}
    expected = {
        "features": before.keys() - of_backbone,
        "finetune": before.keys() - statistics,
        "scratch": set(before),
    }
    assert changed == expected[mode]


@pytest.mark.parametrize("name", SMALL)
def test_losses_fall(name):
    entry = catalog.entry(name)
    network = build_untrained(lambda: entry.family_module().build_for_training(entry.builder, len(LABELS)))
    parts = entry.family_module().parts(network, entry.builder)
    transfer.prepare(network, parts, "scratch")
    sums = update(network, parts, "scratch", *shapes(2, SIDE), steps=12)
    assert all(math.isfinite(value) for value in sums)
    assert sum(sums[-3:]) < 0.6 * sum(sums[:3])


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([target([], []), target([], [])], id="nothing"),
        pytest.param([target([], []), target([[10, 10, 40, 50]], [1])], id="nothing in one"),
        pytest.param([target([[0, 0, 96, 96]], [0], [True]), target([], [])], id="only a crowd in one"),
        pytest.param([target([[0, 0, 96, 96]], [0], [True])], id="only a crowd"),
        pytest.param([target([[10, 10, 11, 11]], [3]), target([[0, 0, 96, 96]], [3])], id="a pixel and everything"),
        pytest.param([target([[10, 10, 10, 30]], [3]), target([], [])], id="a box without area"),
        pytest.param(
            [target([[i, 96 - i - 9, i + 9, 96 - i] for i in range(80)] * 2, [2] * 160), target([], [])], id="many"
        ),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_losses_are_finite_whatever_the_image_holds(name, given):
    network, _ = beginning(name)
    network.train()
    for of_image in given:
        count = len(of_image["labels"])
        of_image["masks"] = torch.ones((count, SIDE, SIDE), dtype=torch.uint8)
    losses = faster_rcnn.losses(network, shapes(len(given), SIDE)[0], given)
    assert set(losses) == LOSSES | ({"loss_mask"} if name.startswith("mask") else set())
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()


def test_an_ignored_region_is_no_background():
    network, _ = beginning("fasterrcnn_resnet18")
    network.train()
    images, _ = shapes(1, SIDE)
    everything = [0, 0, SIDE, SIDE]

    def negatives(given: dict[str, Tensor]) -> tuple[int, int]:
        """How many anchors and how many proposals are examples of the background."""
        seen: list[int] = []
        hooks = []
        for part in (network.rpn, network.roi_heads):
            sampler = part.fg_bg_sampler

            def counting(labels, sampler=sampler):
                seen.append(sum(int((label == 0).sum()) for label in labels))
                return sampler(labels)

            hooks.append((part, sampler))
            part.fg_bg_sampler = counting
        faster_rcnn.losses(network, images, [given])
        for part, sampler in hooks:
            part.fg_bg_sampler = sampler
        anchors, proposals = seen
        return anchors, proposals

    thing = [20, 20, 60, 60]
    anchors, proposals = negatives(target([thing], [0]))
    fewer_anchors, fewer_proposals = negatives(target([thing, everything], [0, 0], [False, True]))
    assert anchors > 500
    assert proposals > 50
    assert fewer_proposals == 0
    assert 0 < fewer_anchors < anchors / 2, "those that stand out of the image for the most part stay"


def test_half_precision_keeps_whole_coordinates():
    network, parts = beginning("maskrcnn_resnet18")
    transfer.prepare(network, parts, "finetune")
    network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = faster_rcnn.losses(network, *shapes(2, SIDE))
    assert all(loss.isfinite() for loss in losses.values())
    network.eval()
    _, card, photographs = awake("maskrcnn_resnet18", SIDE, images=2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = faster_rcnn.reference(network, card)(torch.from_numpy(photographs))
    assert {name: value.dtype for name, value in found.items() if name in ("boxes_xyxy", "masks")} == {
        "boxes_xyxy": torch.float32,
        "masks": torch.float32,
    }
    assert (found["boxes_xyxy"] != found["boxes_xyxy"].bfloat16().float()).any()


# Weights


@pytest.mark.parametrize(
    ("classifier", "detector"),
    [
        ("resnet18", "maskrcnn_resnet18"),
        ("mobilenet_v2", "maskrcnn_mobilenet_v2"),
        ("mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"),
        pytest.param("resnet50", "maskrcnn_resnet50", marks=pytest.mark.slow),
    ],
)
def test_a_backbone_answers_as_the_classifier_whose_weights_it_has(classifier, detector):
    entry = catalog.entry(detector)
    one = build_untrained(lambda: get_model(classifier, weights=None)).eval()
    randomised(one)
    network = build_untrained(lambda: entry.family_module().build_for_training(entry.builder, 3), seed=1)
    state = entry.family_module().backbone_state(one.state_dict())
    loaded = network.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    of_stages = tuple(f"{name}." for stage in faster_rcnn.parts(network, entry.builder).stages for name in stage)
    assert {name for name in network.state_dict() if name.startswith(of_stages)} == set(state)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        blocks = one.features[:18] if classifier == "mobilenet_v2" else getattr(one, "features", None)
        expected = blocks(images) if blocks else layers_of(one, images)
        got = list(network.backbone.body(images).values())[-1]
    assert_close(got, expected)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def layers_of(resnet: nn.Module, images: Tensor) -> Tensor:
    for name, layer in resnet.named_children():
        if name not in ("avgpool", "fc"):
            images = layer(images)
    return images


def randomised(network: nn.Module) -> None:
    """BatchNorms as after a training, some channels with hardly any variance."""
    torch.manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
            module.running_var[0], module.weight.data[0] = 1e-5, 0.01


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50", pytest.param("maskrcnn_resnet50", marks=pytest.mark.slow)])
def test_published_weights_answer_as_in_torchvision(name):
    """Its old names, and BatchNorms that are frozen and without epsilon."""
    entry = catalog.entry(name)
    theirs = build_untrained(
        lambda: get_model(entry.builder, weights=None, weights_backbone=None, num_classes=5)
    ).eval()
    randomised(theirs)
    state = {
        key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value
        for key, value in theirs.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    state = {
        f"roi_heads.mask_head.mask_fcn{int(key.split('.')[2]) + 1}.{key.split('.')[-1]}"
        if key.startswith("roi_heads.mask_head.")
        else key: value
        for key, value in state.items()
    }
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    network = build_untrained(lambda: entry.family_module().build(entry.builder, 4), seed=1)
    converted = entry.family_module().published_state(state)
    assert {key for key in network.state_dict() if not key.endswith("num_batches_tracked")} == set(converted)
    network.load_state_dict(converted, strict=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for got, expected in zip(network.backbone(images).values(), theirs.backbone(images).values(), strict=True):
            assert_close(got, expected)
    own = network.state_dict()
    again = entry.family_module().published_state(own)
    assert all(torch.equal(again[key], own[key]) for key in own), "own weights stay as they are"


@pytest.mark.parametrize("kind", ["a detector's", "a classifier's"])
def test_the_neck_is_taken_over_where_weights_have_one(kind, tmp_path):
    name = "maskrcnn_resnet18"
    entry = catalog.entry(name)
    family = entry.family_module()
    if kind == "a detector's":
        state = build_untrained(lambda: family.build(entry.builder, 7)).state_dict()
        old = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for key, value in state.items()}
        torch.save(old, tmp_path / "mine.pth")
        start = starting_state(str(tmp_path / "mine.pth"), name, "finetune", str(tmp_path))
    else:
        classifier = build_untrained(lambda: get_model("resnet18", weights=None))
        state = family.backbone_state(classifier.state_dict())
        start = Start(state, None, entry.input, "resnet18", "")
    network = build_untrained(lambda: family.build_for_training(entry.builder, len(LABELS)), seed=1)
    own = {key: value.clone() for key, value in network.state_dict().items()}
    parts = family.parts(network, entry.builder)
    assert apply_start(network, start, parts, family.IGNORED_PREFIXES, LABELS, name), "the head is new"
    for key, value in network.state_dict().items():
        is_new = key.startswith(parts.head) or (kind == "a classifier's" and key.startswith(parts.neck))
        assert torch.equal(value, own[key] if is_new else state[key]), key
