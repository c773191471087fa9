"""Where a training starts: torchvision's weights, those of a file or of another model, or none; and its input."""

import shutil
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import catalog
from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.errors import ModelError, UsageError
from models.imaging.geometry import ResizeRule
from models.nets import classifiers
from models.nets.pretrained import pretrained
from models.nets.untrained import build_untrained
from models.records import Task
from tasks import demo, registry
from tasks.storage import open_storage
from tasks.weights import TORCHVISION_LICENCE, Start, apply_start, load_file, starting_state

RULE = ResizeRule("crop", 64, 64, short_side=72)


@pytest.fixture(scope="module")
def mobilenet_v2(tmp_path_factory) -> Iterator[Path]:
    """torchvision's own file, in torch's cache folder."""
    shipped = demo.weights_file()
    assert shipped is not None, "the package with MobileNetV2's weights is not installed: see the Makefile"
    home = tmp_path_factory.mktemp("torch-home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(shipped, home / "hub" / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield shipped


def built(architecture: str, num_classes: int, seed: int = 0) -> nn.Module:
    return build_untrained(lambda: classifiers.build_for_training(architecture, num_classes), seed)


def started(architecture: str, start: Start, labels: tuple[str, ...], seed: int = 9) -> tuple[nn.Module, bool]:
    """A network that has its starting weights, and whether its head is new."""
    network = built(architecture, len(labels), seed)
    parts = classifiers.parts(network, architecture)
    is_new = apply_start(network, start, parts, classifiers.IGNORED_PREFIXES, labels, architecture)
    return network, is_new


def taken_over(network: nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in network.state_dict().items() if name in state and torch.equal(value, state[name])}


HEAD = {"classifier.1.weight", "classifier.1.bias"}


@pytest.mark.parametrize("weights", [None, "imagenet", "IMAGENET1K_V1"])
def test_pretrained_weights_get_a_new_head(weights, mobilenet_v2, tmp_path):
    start = starting_state(weights, "mobilenet_v2", "finetune", str(tmp_path))
    assert start.input == ResizeRule("crop", 224, 224, short_side=256)
    assert (start.source, start.licence) == ("torchvision:mobilenet_v2 IMAGENET1K_V1", TORCHVISION_LICENCE)
    network, is_new = started("mobilenet_v2", start, ("cat", "dog", "cow"))
    assert is_new
    shipped = load_file(mobilenet_v2)
    assert taken_over(network, shipped) == set(shipped) - HEAD
    assert taken_over(network, built("mobilenet_v2", 3, seed=9).state_dict()) >= HEAD
    answers_alike, is_new = started("mobilenet_v2", start, start.labels)
    assert not is_new
    assert taken_over(answers_alike, shipped) == set(shipped)


@pytest.mark.parametrize(
    ("weights", "mode"), [("none", "finetune"), ("none", "features"), ("none", "scratch"), (None, "scratch")]
)
def test_none_starts_from_random_weights(weights, mode, tmp_path, caplog):
    start = starting_state(weights, "mobilenet_v2", mode, str(tmp_path), image_size=64)
    assert (start.state, start.source, start.licence) == (None, "mobilenet_v2 untrained", "")
    assert start.input == ResizeRule("crop", 64, 64, short_side=73)
    network, is_new = started("mobilenet_v2", start, ("cat", "dog"))
    own = built("mobilenet_v2", 2, seed=9).state_dict()
    assert is_new
    assert taken_over(network, own) == set(own)
    assert ("the head learns from noise" in caplog.text) == (mode == "features")


@pytest.mark.parametrize(("classes", "is_new"), [(10, False), (3, True)])
def test_a_file_keeps_its_head_if_it_tells_as_many_classes_apart(classes, is_new, tmp_path):
    state = built("mobilenet_v3_small", 10).state_dict()
    torch.save(state, tmp_path / "mine.pth")
    start = starting_state(str(tmp_path / "mine.pth"), "mobilenet_v3_small", "finetune", str(tmp_path))
    assert (start.labels, start.source, start.licence) == (None, "mobilenet_v3_small mine.pth", "")
    network, found = started("mobilenet_v3_small", start, tuple("abcdefghij"[:classes]))
    assert found == is_new
    kept = taken_over(network, state)
    assert ("classifier.3.weight" in kept) == (not is_new)
    assert {name for name in state if not name.startswith("classifier.3.")} <= kept


def test_a_file_without_a_head_gets_a_new_one(tmp_path):
    state = {k: v for k, v in built("resnet18", 10).state_dict().items() if not k.startswith("fc.")}
    save_file(state, tmp_path / "backbone.safetensors")
    start = starting_state(str(tmp_path / "backbone.safetensors"), "resnet18", "finetune", str(tmp_path))
    network, is_new = started("resnet18", start, ("cat", "dog"))
    assert is_new
    assert set(state) <= taken_over(network, state)


def test_a_file_may_lie_in_a_bucket(bucket, tmp_path):
    state = built("mobilenet_v3_small", 2).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    uri = f"s3://{bucket}/weights/mine.safetensors"
    assert open_storage(uri).put_file_if_absent(uri, tmp_path / "mine.safetensors")
    start = starting_state(uri, "mobilenet_v3_small", "finetune", str(tmp_path))
    assert start.source == "mobilenet_v3_small mine.safetensors"
    network, is_new = started("mobilenet_v3_small", start, ("cat", "dog"))
    assert not is_new
    assert taken_over(network, state) == set(state)
    with pytest.raises(UsageError, match=r"got s3://.*/no\.pth: no such file"):
        starting_state(f"s3://{bucket}/no.pth", "mobilenet_v3_small", "finetune", str(tmp_path))


# The auxiliary heads of the Inceptions

AUXILIARY = {"inception_v3": {"AuxLogits.fc"}, "googlenet": {"aux1.fc2", "aux2.fc2"}}


@pytest.mark.parametrize("architecture", AUXILIARY)
@pytest.mark.parametrize("published", [False, True], ids=["pretrained", "published"])
@pytest.mark.parametrize("known", [False, True], ids=["other classes", "same classes"])
def test_auxiliary_heads_take_over_what_there_is(architecture, published, known):
    labels = ("cat", "dog", "cow")
    state = built(architecture, 3 if known else 5).state_dict()
    auxiliary = {name for name in state if name.startswith(classifiers.IGNORED_PREFIXES)}
    assert len(auxiliary) > 8
    given = {name: value for name, value in state.items() if not (published and name in auxiliary)}
    start = Start(given, labels if known else tuple("abcde"), RULE, "", "")
    network, is_new = started(architecture, start, labels)
    assert is_new == (not known)
    own = built(architecture, 3, seed=9).state_dict()
    new = (
        set()
        if known
        else {f"{name}.{part}" for name in {"fc", *AUXILIARY[architecture]} for part in ("weight", "bias")}
    )
    if published:
        new |= auxiliary
    # As it was initialised, a BatchNorm is the same in both.
    assert set(own) - taken_over(network, state) == new - taken_over(built(architecture, 3, seed=9), state)


# Models of the store


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in built("mobilenet_v3_small", 2).state_dict().items()}


@pytest.fixture
def published(state, tmp_path, root) -> tuple[str, Card]:
    """A store, and in it a model that tells cats from dogs."""
    save_file(state, tmp_path / WEIGHTS_FILE)
    (tmp_path / ONNX_FILE).write_bytes(b"graph")
    card = Card(
        "pets",
        "",
        Task.CLASSIFY,
        "mobilenet_v3_small",
        ("cat", "dog"),
        RULE,
        licence="MIT",
        weights_sha256=registry.sha256_of(tmp_path / WEIGHTS_FILE),
    ).with_version()
    files = {name: tmp_path / name for name in (WEIGHTS_FILE, ONNX_FILE)}
    return root, registry.publish(root, card, files)


@pytest.mark.parametrize(
    "labels", [("cat", "dog"), ("dog", "cat"), ("cat", "dog", "cow")], ids=["same", "order", "more"]
)
def test_a_model_of_the_store_keeps_its_head_if_it_has_the_same_labels(labels, published, state):
    store, card = published
    for reference in ("pets", f"pets@{card.version}"):
        start = starting_state(reference, "mobilenet_v3_small", "features", store, image_size=32)
        assert (start.source, start.licence, start.labels) == (card.reference, "MIT", ("cat", "dog"))
        assert start.input == ResizeRule("crop", 32, 32, short_side=36)
        network, is_new = started("mobilenet_v3_small", start, labels)
        assert is_new == (labels != ("cat", "dog"))
        assert ("classifier.3.weight" in taken_over(network, state)) == (not is_new)
        assert {name for name in state if not name.startswith("classifier.3.")} <= taken_over(network, state)


def test_a_model_of_another_architecture_says_which(published):
    store, _ = published
    with pytest.raises(UsageError, match=r"--weights pets is a mobilenet_v3_small, .* use --model mobilenet_v3_small"):
        starting_state("pets", "resnet18", "finetune", store)


def test_a_model_that_came_as_onnx_cannot_learn(tmp_path):
    (tmp_path / ONNX_FILE).write_bytes(b"graph")
    card = Card("a", "0" * 12, Task.CLASSIFY, "resnet18", ("cat", "dog"), RULE)
    registry.publish(str(tmp_path / "mill"), card, {ONNX_FILE: tmp_path / ONNX_FILE})
    with pytest.raises(ModelError, match=r"a@000000000000 has no weights\.safetensors: .* can predict, but not learn"):
        starting_state("a", "resnet18", "finetune", str(tmp_path / "mill"))


def test_a_model_with_other_weights_than_its_card_says_is_refused(state, tmp_path):
    save_file(state, tmp_path / WEIGHTS_FILE)
    card = Card("a", "0" * 12, Task.CLASSIFY, "mobilenet_v3_small", ("cat", "dog"), RULE, weights_sha256="0" * 64)
    registry.publish(str(tmp_path / "mill"), card, {WEIGHTS_FILE: tmp_path / WEIGHTS_FILE})
    with pytest.raises(ModelError, match="is not the file that its card describes"):
        starting_state("a", "mobilenet_v3_small", "finetune", str(tmp_path / "mill"))


# What cannot be


@pytest.mark.parametrize(
    ("weights", "architecture", "mode", "message"),
    [
        pytest.param(
            "imagenet", "resnet18", "scratch", "so --weights imagenet has no place: leave it out", id="scratch"
        ),
        pytest.param(
            "coco", "resnet18", "finetune", r"resnet18 .*expected imagenet, none, IMAGENET1K_V1, a w", id="coco"
        ),
        pytest.param(
            "voc",
            "fasterrcnn_resnet50",
            "finetune",
            "expected coco, imagenet, none, COCO_V1, IMAGENET1K_V1, IMAGENET1K_V2, a weights",
            id="boxes",
        ),
        pytest.param(
            "coco", "yolo_n", "finetune", "expected imagenet, none, IMAGENET1K_V1, IMAGENET1K_V2, a w", id="yolo"
        ),
        pytest.param("IMAGENET1K_V9", "resnet18", "finetune", r"\(no model 'IMAGENET1K_V9' in .*none yet", id="entry"),
        pytest.param("a/b", "resnet18", "finetune", "or a model of the store .a model's name is letters", id="name"),
        pytest.param("no.pth", "resnet18", "finetune", r"got no\.pth: no such file", id="file"),
        pytest.param("none", "resnet19", "finetune", "no architecture is named 'resnet19'", id="architecture"),
    ],
)
def test_weights_that_cannot_be_name_what_is_possible(weights, architecture, mode, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        starting_state(weights, architecture, mode, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_download_that_fails_says_what_to_do(mobilenet_v2, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ModelError, match=r"put it into .* as resnet18-f37072fd\.pth, or pass it with --weights FILE"):
        starting_state("imagenet", "resnet18", "finetune", str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda state: {k: v for k, v in state.items() if k != "features.0.0.weight"},
            r"the weights do not fit mobilenet_v3_small: parameters 1 missing \(first: features\.0\.0\.weight\)",
            id="missing",
        ),
        pytest.param(
            lambda state: state | {"features.0.0.weight": torch.zeros(1)},
            r"1 of another shape \(first: features\.0\.0\.weight, expected \[16, 3, 3, 3\], got \[1\]\)",
            id="shape",
        ),
        pytest.param(
            lambda state: state | {"neck.weight": torch.zeros(1)}, r"1 unknown \(first: neck\.w", id="unknown"
        ),
    ],
)
@pytest.mark.parametrize("labels", [("cat", "dog"), ("cat", "dog", "cow")], ids=["head kept", "new head"])
def test_a_backbone_must_fit_completely(spoil, message, labels, state):
    with pytest.raises(UsageError, match=message):
        started("mobilenet_v3_small", Start(spoil(state), None, RULE, "", ""), labels)


# The size of the input


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("mobilenet_v2", None, ResizeRule("crop", 224, 224, 256)),
        ("mobilenet_v2", 224, ResizeRule("crop", 224, 224, 256)),
        ("mobilenet_v2", 112, ResizeRule("crop", 112, 112, 128)),
        ("mobilenet_v2", 32, ResizeRule("crop", 32, 32, 37)),
        ("inception_v3", None, ResizeRule("crop", 299, 299, 342)),
        ("inception_v3", 75, ResizeRule("crop", 75, 75, 86)),
        ("efficientnet_b0", 448, ResizeRule("crop", 448, 448, 512, "bicubic")),
        ("fasterrcnn_resnet50", 512, ResizeRule("letterbox", 512, 512, pad_rgb=(124, 116, 104))),
    ],
)
def test_the_size_of_the_input_is_free(name, size, expected):
    entry = catalog.entry(name)
    assert catalog.input_rule(name, pretrained(entry.builder, entry.weights), size) == expected


def test_another_models_rule_keeps_its_proportions():
    wide = ResizeRule("crop", 60, 120, short_side=160)
    trained = pretrained("resnet18", "IMAGENET1K_V1")
    assert catalog.input_rule("resnet18", trained, rule=wide) == wide
    assert catalog.input_rule("resnet18", trained, 240, wide) == replace(wide, height=120, width=240, short_side=320)


@pytest.mark.parametrize(("name", "least"), [("inception_v3", 75), ("vgg16", 32), ("convnext_tiny", 32)])
def test_an_input_that_is_too_small_says_so(name, least):
    trained = pretrained(name, catalog.entry(name).weights)
    assert catalog.input_rule(name, trained, least).height == least
    with pytest.raises(
        UsageError, match=f"{name} needs images of at least {least} pixels, got --image-size {least - 1}"
    ):
        catalog.input_rule(name, trained, least - 1)
