"""Transfer learning: every classifier of the catalogue in every mode, then exported; and the rules one by one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import catalog
from models.card import Card
from models.dataset import IMAGES_SCHEMA
from models.errors import UsageError
from models.imaging.geometry import ResizeRule
from models.learning import classification, transfer
from models.nets import classifiers
from models.nets.parts import Parts
from models.nets.pretrained import pretrained
from models.nets.untrained import build_untrained
from models.records import Task
from models.runtime.export import export_onnx
from models.runtime.parity import check_parity
from tasks.photographs import prepared_photographs
from tasks.weights import apply_state

ROOT = Path(__file__).parent.parent
CLASSES = tuple("abcdef")
RULE = ResizeRule("crop", 64, 64, short_side=73)

# Side of the images in pixels, where it is not 64. In many random layers rounding grows, and less so over more pixels.
SIZES = {"inception_v3": 96, "resnet152": 192}
LR = 1e-5  # every parameter changes by about so much; many random layers that all do would answer always the same
SPREAD = 0.1  # of each logit over the images: they differ clearly, and rounding is not magnified
FAST = {"resnet18", "googlenet", "mobilenet_v2"}
CLASSIFIERS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name, entry in catalog.CATALOG.items()
    if entry.task == Task.CLASSIFY
]

WITHOUT_TORCH = """
import json, sys
import numpy as np
from models.card import Card
from models.runtime.engine import OnnxRuntimeEngine
folder = sys.argv[1]
card = Card.from_json(open(folder + "/card.json").read())
engine = OnnxRuntimeEngine(folder + "/model.onnx", card, concurrency=1)
images = np.load(folder + "/images.npy")
answers = [engine.run(images[:count])["probabilities"].tolist() for count in (1, 3)]
print(json.dumps([answers, sorted({"torch", "torchvision", "onnx"} & set(sys.modules))]))
"""


def beginning(name: str) -> tuple[nn.Module, Parts, Card, np.ndarray]:
    """An untrained network with its auxiliary heads that tells five photographs [5, side, side, 3] apart."""
    entry = catalog.entry(name)
    rule = catalog.input_rule(name, pretrained(entry.builder, entry.weights), SIZES.get(name, 64))
    card = Card(name, "0" * 12, entry.task, name, CLASSES, rule)
    images, _ = prepared_photographs(rule, 5)
    family = entry.family_module()
    network = build_untrained(lambda: family.build_for_training(entry.builder, len(CLASSES)))
    family.wake(network, card, images)
    parts = family.parts(network, entry.builder)
    learner = classification.Classification(network, parts, len(CLASSES), 0.0)
    with torch.no_grad():
        family.head(network, parts).weight.mul_(SPREAD / learner.outputs(torch.from_numpy(images)).std(dim=0).mean())
    return network, parts, card, images


def copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """The parameters and buffers that are no longer bit for bit what they were."""
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


def buffers(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_buffers()}


def below(modules: tuple[str, ...], names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(tuple(f"{module}." for module in modules))}


def step(network: nn.Module, parts: Parts, mode: str, images: np.ndarray) -> dict[str, torch.Tensor]:
    """One update by a batch, as the training loop does it; gives the losses."""
    learner = classification.Classification(network, parts, len(CLASSES), 0.1)
    optimizer = torch.optim.AdamW(transfer.parameter_groups(network, parts, mode, LR, 0.1, 0.05))
    torch.manual_seed(0)
    network.train()
    losses = learner.losses(torch.from_numpy(images), learner.collate([0, 1, 2, 3][: len(images)]))
    sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    network.eval()
    return losses


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_learns_in_each_mode_and_is_exported(name, tmp_path, monkeypatch, record_property):
    network, parts, card, images = beginning(name)
    family, builder = catalog.entry(name).family_module(), catalog.entry(name).builder
    start = copied(network)
    everything = set(start)

    # What the head is given comes out of a frozen network as it did before, and the head makes the answer of it.
    learner = classification.Classification(network, parts, len(CLASSES), 0.0)
    with torch.no_grad():
        answers = learner.outputs(torch.from_numpy(images))
        assert torch.equal(learner.head_outputs(learner.features(torch.from_numpy(images))), answers)

    for mode in ("features", "scratch", "finetune"):
        network.load_state_dict(start)
        transfer.prepare(network, parts, mode)
        losses = step(network, parts, mode, images[:4])
        auxiliary = {"inception_v3": {"auxiliary"}, "googlenet": {"auxiliary_1", "auxiliary_2"}}.get(name, set())
        assert set(losses) == {"cross_entropy"} | auxiliary
        learned = changed(network, start)
        of_norms = {name for name in buffers(network) if not name.startswith(classifiers.IGNORED_PREFIXES)}
        expected = {"features": below(parts.head, everything), "scratch": everything, "finetune": everything - of_norms}
        assert learned == expected[mode], mode

    # The network that is published has no auxiliary heads.
    published = family.build(builder, len(CLASSES))
    apply_state(published, network.state_dict(), family.IGNORED_PREFIXES, name)
    path = tmp_path / "model.onnx"
    export_onnx(family.graph(published, card), card, path, images[:2])
    monkeypatch.setattr("models.runtime.openvino.cpu_precisions", lambda: ())  # its own tests have it
    parity = check_parity(published, family, card, path, images)
    assert parity["batch_sizes"] == [1, 3, 5]
    assert parity["compared"] == 5
    assert parity["largest"]["probabilities"] < 1e-4
    assert parity["largest"]["log_probabilities"] < 1e-3
    assert parity["alone_vs_batch"]["probabilities"] < 1e-5

    (tmp_path / "card.json").write_text(card.to_json())
    np.save(tmp_path / "images.npy", images)
    with torch.no_grad():
        expected = family.reference(published, card)(torch.from_numpy(images))["probabilities"].numpy()
    alone, three, loaded = answers_without_torch(tmp_path)
    assert loaded == []
    np.testing.assert_allclose(alone, expected[:1], atol=1e-4)
    np.testing.assert_allclose(three, expected[:3], atol=1e-4)
    largest = max(float(np.abs(alone - expected[:1]).max()), float(np.abs(three - expected[:3]).max()))
    record_property("largest difference from PyTorch", f"{max(largest, parity['largest']['probabilities']):.1e}")
    print(f"{name}: {parity['largest']['probabilities']:.1e}")


def answers_without_torch(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (alone, three), loaded = json.loads(done.stdout)
    return np.array(alone), np.array(three), loaded


def test_head_and_stages_cover_every_classifier():
    for name, entry in catalog.CATALOG.items():
        if entry.task != Task.CLASSIFY:
            continue
        with torch.device("meta"):
            networks = [f(entry.builder, 10) for f in (classifiers.build, classifiers.build_for_training)]
        for network in networks:
            parts = classifiers.parts(network, entry.builder)
            names = [*parts.head, *(name for stage in parts.stages for name in stage)]
            held = [id(p) for part in names for p in network.get_submodule(part).parameters()]
            assert sorted(held) == sorted(id(p) for p in network.parameters()), name
            drops = {n for n, module in network.named_modules() if isinstance(module, nn.Dropout)}
            assert drops <= {n for part in names for n in (part, *below((part,), drops))}, name
            assert all(isinstance(network.get_submodule(head), nn.Linear) for head in parts.head)
            order = [n for n, _ in network.named_parameters() if not n.startswith(classifiers.IGNORED_PREFIXES)]
            staged = [min(order.index(n) for n in below(stage, set(order))) for stage in parts.stages]
            assert staged == sorted(staged), f"{name}: from the input to the head"


@pytest.fixture(scope="module")
def mobilenet() -> tuple[nn.Module, Parts, np.ndarray]:
    network, parts, _, images = beginning("mobilenet_v3_small")
    return network, parts, images


@pytest.fixture
def network(mobilenet) -> nn.Module:
    return copy.deepcopy(mobilenet[0])


@pytest.fixture
def parts(mobilenet) -> Parts:
    return mobilenet[1]


@pytest.fixture
def images(mobilenet) -> np.ndarray:
    return mobilenet[2][:4]


@pytest.mark.parametrize(
    ("mode", "unfreeze_epochs", "learning"),
    [
        pytest.param("features", 0, [0, 0, 0], id="features"),
        pytest.param("features", 2, [0, 0, 0], id="features never unfreeze"),
        pytest.param("scratch", 3, [6, 6, 6], id="scratch has nothing to unfreeze"),
        pytest.param("finetune", 0, [6, 6, 6], id="at once"),
        pytest.param("finetune", 1, [0, 6, 6], id="the head first"),
        pytest.param("finetune", 3, [0, 2, 4, 6, 6], id="two stages an epoch"),
        pytest.param("finetune", 9, [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6], id="slower than one an epoch"),
    ],
)
def test_stages_are_unfrozen_from_the_head_down(mode, unfreeze_epochs, learning, network, parts):
    transfer.prepare(network, parts, mode)
    transfer.set_trainable(network, parts, mode, 0, unfreeze_epochs)
    before = None
    for epoch, expected in enumerate(learning):
        has_changed = transfer.set_trainable(network, parts, mode, epoch, unfreeze_epochs)
        assert before is None or has_changed == (expected != before)
        before = expected
        for index, stage in enumerate(parts.stages):
            learns = {p.requires_grad for name in stage for p in network.get_submodule(name).parameters()}
            assert learns == {index >= len(parts.stages) - expected}
        assert all(p.requires_grad for p in network.get_submodule(parts.head[0]).parameters())


def test_a_stage_that_waits_is_frozen_whatever_train_is_called_and_learns_when_its_turn_comes(network, parts, images):
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()  # so that they learn, too, once their stage does
    transfer.prepare(network, parts, "finetune")
    names = set(network.state_dict())
    for epoch, learning in enumerate((parts.stages[6:], parts.stages[3:], parts.stages)):
        transfer.set_trainable(network, parts, "finetune", epoch, 2)
        before = copied(network)
        for module in network.modules():
            module.train()
        step(network, parts, "finetune", images)
        assert changed(network, before) == below((*parts.head, *(n for stage in learning for n in stage)), names)


def test_nothing_of_a_frozen_backbone_is_dropped_at_random():
    # EfficientNet leaves out whole blocks by chance, and drops what its head is given.
    network, parts, _, images = beginning("efficientnet_b0")
    learner = classification.Classification(network, parts, len(CLASSES), 0.0)
    transfer.prepare(network, parts, "features")
    network.train()
    with torch.no_grad():
        first, second = (learner.outputs(torch.from_numpy(images)) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(first, learner.head_outputs(learner.features(torch.from_numpy(images))))
        transfer.set_trainable(network, parts, "finetune", 0, 0)
        network.train()
        assert not torch.equal(learner.outputs(torch.from_numpy(images)), learner.outputs(torch.from_numpy(images)))


def test_a_copy_of_a_frozen_network_is_frozen_too(network, parts, images):
    transfer.prepare(network, parts, "features")
    twin = copy.deepcopy(network)
    before = copied(twin)
    step(twin, parts, "features", images)
    assert changed(twin, before) == below(parts.head, set(before))


@pytest.mark.parametrize(
    ("mode", "given", "kept"),
    [
        pytest.param("finetune", True, True, id="finetune"),
        pytest.param("finetune", False, False, id="nothing to keep"),
        pytest.param("scratch", True, False, id="scratch"),
    ],
)
def test_statistics_stay_where_weights_are_tuned(mode, given, kept, network, parts, images):
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not given:
        for norm in norms:
            norm.reset_running_stats()
    transfer.prepare(network, parts, mode)
    transfer.set_trainable(network, parts, mode, 0, 0)
    before = copied(network)
    step(network, parts, mode, images)
    assert changed(network, before) == set(before) - (buffers(network) if kept else set())


def test_statistics_follow_within_a_short_training(network, parts):
    own = [module.momentum for module in network.modules() if isinstance(module, _BatchNorm)]
    assert set(own) == {0.01}, "MobileNetV3 comes with the momentum of a long training"
    transfer.prepare(network, parts, "finetune")
    assert {module.momentum for module in network.modules() if isinstance(module, _BatchNorm)} == {0.1}


def test_statistics_that_start_from_nothing_are_the_average_of_the_first_batches(network, parts, images):
    norm = next(module for module in network.modules() if isinstance(module, _BatchNorm))
    norm.reset_running_stats()
    transfer.prepare(network, parts, "finetune")
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _norm, inputs, _outputs: seen.append(inputs[0].mean(dim=(0, 2, 3)).detach()))
    for epoch in range(4):
        transfer.set_trainable(network, parts, "finetune", epoch, 0)
        for number in range(4):
            step(network, parts, "finetune", images[number % 3 :])
        if epoch == 1:
            average = torch.stack(seen).mean(dim=0)
            assert len(seen) == 8
            torch.testing.assert_close(norm.running_mean, average)
    expected = torch.stack(seen[:10]).mean(dim=0)
    for mean in seen[10:]:
        expected = 0.9 * expected + 0.1 * mean
    torch.testing.assert_close(norm.running_mean, expected)


def rates(groups: list[dict]) -> dict[str, float]:
    return {group["name"]: round(group["lr"], 4) for group in groups if group["weight_decay"]}


def test_rates_fall_from_the_head_to_the_first_stage(network, parts):
    def groups(mode: str, factor: float = 0.1) -> list[dict]:
        return transfer.parameter_groups(network, parts, mode, 1.0, factor, 0.05)

    falling = {f"stage {number}": round(0.1 ** ((7 - number) / 6), 4) for number in (6, 5, 4, 3, 2, 1)}
    assert rates(groups("finetune")) == {"head": 1.0, **falling}
    assert rates(groups("finetune"))["stage 1"] == 0.1
    assert set(rates(groups("finetune", 1.0)).values()) == {1.0}
    assert set(rates(groups("scratch")).values()) == {1.0}
    assert rates(groups("features")) == {"head": 1.0}
    grouped = [id(p) for group in groups("finetune") for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny", "vgg16_bn"])
def test_only_matrices_and_kernels_decay(name):
    with torch.device("meta"):
        network = classifiers.build(name, 10)
    parts = classifiers.parts(network, name)
    groups = transfer.parameter_groups(network, parts, "finetune", 1.0, 0.1, 0.05)
    decaying = {id(p) for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    weights = {id(module.weight) for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert decaying == weights


def test_parts_that_leave_something_out_are_refused(network, parts):
    with pytest.raises(ValueError, match="head, neck and stages hold"):
        transfer.prepare(network, Parts(parts.head, parts.stages[1:]), "finetune")
    with pytest.raises(ValueError, match="head, neck and stages hold"):
        transfer.prepare(network, Parts(parts.head, (*parts.stages, parts.stages[0])), "finetune")


def test_inceptions_auxiliary_head_is_torchvisions_own_at_the_papers_size():
    ours = build_untrained(lambda: classifiers.build_for_training("inception_v3", 5).AuxLogits).train()
    theirs = type(ours).__mro__[1](768, 5)
    theirs.load_state_dict(ours.state_dict())
    grid = torch.rand(2, 768, 17, 17, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(grid), theirs.train()(grid))
    assert ours(grid[..., :3, :3]).shape == (2, 5)


# What a classifier learns from


def images_table(*labels: str | None) -> pa.Table:
    rows = [{"image": f"/photos/{number}.jpg", "label": label} for number, label in enumerate(labels)]
    return pa.Table.from_pylist(rows, IMAGES_SCHEMA)


def test_targets_are_indices_of_the_classes():
    assert classification.targets(images_table(), pa.table({}), ["cat", "dog"]) == []
    assert classification.targets(images_table("dog", "cat", "dog"), pa.table({}), ["cat", "dog"]) == [1, 0, 1]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"but /photos/1\.jpg has no label: ingest a folder with one folder of images per class"),
        ("cow", r"/photos/1\.jpg has the label 'cow', which is not among the classes"),
    ],
)
def test_an_image_without_a_class_is_named(label, message):
    with pytest.raises(UsageError, match=message):
        classification.targets(images_table("cat", label), pa.table({}), ["cat", "dog"])


def test_scores_are_those_of_all_batches_together(network, parts):
    def scored(num_classes: int, *batches: tuple[list[int], list[int]]) -> dict[str, float]:
        scores = classification.Classification(network, parts, num_classes, 0.1).scores()
        for best, targets in batches:
            logits = torch.arange(0, -num_classes, -1).repeat(len(best), 1).float()  # the second best is class 0
            logits[range(len(best)), best] = 1.0
            scores.update(logits, torch.tensor(targets))
        return scores.compute()

    found = scored(7, ([0, 1, 2], [0, 1, 0]), ([0], [4]), ([0, 0], [5, 6]))
    assert found["top1"] == pytest.approx(2 / 6)
    assert found["top5"] == pytest.approx(4 / 6)
    assert set(scored(5, ([0], [0]))) == {"top1", "loss"}
    certain = scored(2, ([0, 0], [0, 0]), ([0, 0, 0, 0], [0, 0, 0, 0]))["loss"]
    assert certain == pytest.approx(np.log1p(np.exp(-2)), abs=1e-6), "without label smoothing"


def test_training_sees_what_the_exported_graph_sees(network, parts, images):
    learner = classification.Classification(network.eval(), parts, len(CLASSES), 0.1)
    card = Card("a", "", Task.CLASSIFY, "mobilenet_v3_small", CLASSES, RULE)
    with torch.no_grad():
        probabilities = classifiers.graph(network, card)(torch.from_numpy(images))
        assert torch.equal(learner.outputs(torch.from_numpy(images)).softmax(dim=1), probabilities)
