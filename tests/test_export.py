"""Exports: the exact one of a model that has none, and its variants, each published only behind its gate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import catalog
from models.card import CARD_FILE, ONNX_FILE, WEIGHTS_FILE, Card
from models.dataset import Dataset
from models.errors import ModelError, NotFound, ParityError, PixelmillError, UsageError
from models.imaging.geometry import ResizeRule
from models.imaging.prepare import Preparer
from models.nets.untrained import build_untrained
from models.records import Task
from models.runtime import layers
from models.runtime.engine import OnnxRuntimeEngine, open_engine
from models.runtime.export import METADATA_KEY
from models.settings.export import ExportSettings
from models.settings.predict import PredictSettings
from tasks import predict, registry
from tasks.digits import write_digits
from tasks.evaluate import find_metrics
from tasks.export import export
from tasks.storage import open_storage
from tasks.table import Table
from tests.tiny_datasets import COLOURS, publish_colour_model, publish_dataset, square
from tests.tiny_models import SIDE, publish_detector

DIGITS = tuple("0123456789")
RULE = ResizeRule("stretch", 48, 48)


def digit_dataset(store: str, folder: Path) -> Dataset:
    """30 real digits of each class: 20 to learn from, 6 to validate and 4 to test on."""
    write_digits(folder / "digits", per_class=30)
    splits = ["train"] * 20 + ["val"] * 6 + ["test"] * 4
    examples = [
        (split, digit, path.read_bytes())
        for digit in DIGITS
        for split, path in zip(splits, sorted((folder / "digits" / digit).iterdir()), strict=True)
    ]
    return publish_dataset(store, folder / "images", examples, "digits", DIGITS)


def publish_resnet(store: str, folder: Path, dataset: Dataset) -> Card:
    """ResNet-18 with random features and a head fitted to the training split by least squares; without an export."""
    import torch
    from safetensors.torch import save_file

    from tasks.datasets.datasets import read_images

    entry = catalog.entry("resnet18")
    family = entry.family_module()
    network = build_untrained(lambda: family.build(entry.builder, len(DIGITS)))
    card = Card("digits", "", Task.CLASSIFY, "resnet18", DIGITS, RULE, training={"dataset": dataset.reference})
    rows = read_images(store, dataset, "train")
    images = np.empty((rows.num_rows, RULE.height, RULE.width, 3), np.uint8)
    for image, path in zip(images, rows.column("image").to_pylist(), strict=True):
        Preparer(RULE).prepare(Path(path).read_bytes(), image)
    family.wake(network, card, images[:20])
    head, network.fc = network.fc, torch.nn.Identity()
    with torch.no_grad():
        features = network((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.45) / 0.225).double()
        target = torch.nn.functional.one_hot(
            torch.tensor([DIGITS.index(label) for label in rows.column("label").to_pylist()])
        ).double()
        mean = features.mean(dim=0)
        centred = features - mean
        gram = centred @ centred.T + 0.1 * torch.eye(len(centred))
        weight = (centred.T @ torch.linalg.solve(gram, target - 0.1)) * 8
        head.weight.copy_(weight.T)
        head.bias.copy_(-(mean @ weight))
    network.fc = head
    path = folder / WEIGHTS_FILE
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    card = replace(card, weights_sha256=registry.sha256_of(path)).with_version()
    return registry.publish(store, card, {WEIGHTS_FILE: path})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Card, Dataset]:
    folder = tmp_path_factory.mktemp("digits")
    store = str(folder / "mill")
    dataset = digit_dataset(store, folder)
    return store, publish_resnet(store, folder, dataset), dataset


@pytest.fixture(scope="module")
def exact(trained: tuple[str, Card, Dataset]) -> dict[str, Any]:
    """The exact export, and how things stood before it."""
    store, card, _ = trained
    folder = Path(registry.version_folder(store, card))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ModelError, match=f"trained without an export: pixelmill export {card.reference}"):
        predict.plan(store, predict_settings(store, "digits", "early"))
    assert not Path(store, "tables").exists()
    return {"before": before, "exported": export(store, ExportSettings(model="digits"))}


def predict_settings(store: str, model: str, table: str) -> PredictSettings:
    return PredictSettings(source=str(Path(store).parent / "images"), model=model, table=table)


def predicted(store: str, settings: PredictSettings) -> tuple[dict[str, str], str]:
    """The best label of each image, and the engine that found it."""
    planned = predict.plan(store, settings)
    report = predict.work(store, settings, planned)
    assert not predict.summarise(store, settings, planned, [report], 1.0).open_shards
    table = Table(store, settings.table)
    assert table.models() == [planned.model]
    parts = [f"{table.uri}/parts/model={planned.model}/{name}" for name in table.part_names(planned.model)]
    rows = [row for part in parts for row in table.read_part(part).to_pylist()]
    return {row["image"]: row["labels"][0]["label"] for row in rows}, report.engine


def files_of(store: str, card: Card) -> dict[str, bytes]:
    folder = Path(registry.version_folder(store, card))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_exact_export_of_a_model_that_was_trained_without(trained, exact):
    store, card, dataset = trained
    exported = exact["exported"]
    found = registry.resolve(store, "digits")
    assert exported.model == found.reference == card.reference
    assert found == registry.find_version(store, "digits", card.version)
    assert exported.file == str(registry.fetch_model(store, found))
    assert found.parity["agrees"]
    assert found.parity["images"][0].endswith(".png")
    assert set(found.files) == {WEIGHTS_FILE, ONNX_FILE}
    assert found.metrics["dataset"] == dataset.reference
    assert found.metrics["val"]["top1"] > 0.8
    assert set(found.metrics) == {"dataset", "val", "test", "temperature"}
    after = files_of(store, card)
    assert {name: after[name] for name in exact["before"]} == exact["before"]
    assert set(after) - set(exact["before"]) >= {ONNX_FILE, "card.fp32.json"}


def test_int8_of_resnet18_holds_and_predicts(trained, exact):
    store, card, dataset = trained
    exported = export(store, ExportSettings(model="digits", precision="int8", tolerance=0.05, calibration_images=60))
    variant = registry.resolve(store, exported.model)
    assert exported.model == f"{card.reference}.int8"
    assert Path(exported.file).stat().st_size < 0.35 * len(files_of(store, card)[ONNX_FILE])
    assert (variant.precision, variant.version) == ("int8", f"{card.version}.int8")
    assert variant.conversion["quantised"] == "all layers"
    assert variant.conversion["calibration"] == {"dataset": dataset.reference, "split": "train", "images": 60}
    gate = variant.metrics["gate"]
    assert gate["fp32"] - gate["int8"] == gate["fall"] <= 0.05
    assert set(gate["per_class"]) == set(DIGITS)
    assert variant.metrics["val"]["engine"] == "onnxruntime cpu int8"
    assert 0 < variant.parity["from_exact"]["probabilities"] < 0.5
    graph = onnx.load(exported.file)
    assert {node.op_type for node in graph.graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Softmax"}
    assert registry.resolve(store, "digits").precision == "fp32"
    assert registry.list_models(store, "digits") == [registry.resolve(store, "digits"), variant]

    labels, engine = predicted(store, predict_settings(store, exported.model, "digits_int8"))
    assert engine in ("onnxruntime cpu int8", "openvino cpu int8")
    right = [label == DIGITS[int(Path(image).stem) // 30] for image, label in labels.items()]
    assert np.mean(right) > 0.8

    before = files_of(store, card)
    assert export(store, ExportSettings(model="digits", precision="int8", tolerance=0.05)) == exported
    assert files_of(store, card) == before
    if gate["fall"] > 0:
        with pytest.raises(ModelError, match=r"is in the store, published with --tolerance 0\.05"):
            export(store, ExportSettings(model="digits", precision="int8", tolerance=0))


def test_fp16_of_resnet18_agrees(trained, exact):
    store, card, _ = trained
    exported = export(store, ExportSettings(model=card.reference, precision="fp16"))
    variant = registry.resolve(store, f"{card.reference}.fp16")
    assert 0.45 < Path(exported.file).stat().st_size / len(files_of(store, card)[ONNX_FILE]) < 0.55
    assert variant.parity["compared_with"] == "the exact export"
    assert 0 < variant.parity["largest"]["probabilities"] < 0.02
    assert open_engine(exported.file, variant, engine="onnxruntime").name == "onnxruntime cpu fp16"


# --- graphs that one of the precisions cannot bear


def publish_layers(store: str, folder: Path, scales: list[list[float]], name: str = "layers") -> Card:
    """Mean of red, green and blue, 0…1; then a MatMul per entry of `scales` (and a Relu), each undone by the next."""
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        node("Mul", ["means", "unit"], ["x0"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
        numpy_helper.from_array(np.array(scales[0], np.float32) / np.float32(255), "unit"),
    ]
    for number, scale in enumerate(scales):
        following = scales[number + 1] if number + 1 < len(scales) else [8.0, 8.0, 8.0]
        weights = np.diag(np.array(following) / np.array(scale)).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, f"w{number}"))
        nodes.append(node("MatMul", [f"x{number}", f"w{number}"], [f"m{number}"], name=f"layer{number}"))
        nodes.append(node("Relu", [f"m{number}"], [f"x{number + 1}"]))
    nodes.append(node("Softmax", [f"x{len(scales)}"], ["probabilities"], axis=1))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "layers", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    rule = ResizeRule("stretch", SIDE, SIDE)
    card = Card(name, "", Task.CLASSIFY, "layers", tuple(COLOURS), rule, weights_sha256=str(scales)).with_version()
    return registry.publish(store, card, {ONNX_FILE: path})


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "mill")


@pytest.fixture
def squares(store: str, tmp_path: Path) -> Dataset:
    examples = [
        (split, colour, square(colour, seed)) for split in ("train", "val") for colour in COLOURS for seed in range(4)
    ]
    return publish_dataset(store, tmp_path / "squares", examples)


EVEN = [1.0, 1.0, 1.0]
UNEVEN = [3000.0, 1.0, 1.0]  # rounded in common, green and blue vanish beside red


def test_an_export_that_loses_too_much_is_not_published(store, squares, tmp_path):
    card = publish_layers(store, tmp_path, [UNEVEN])
    before = files_of(store, card)
    with pytest.raises(ModelError) as refused:
        export(store, ExportSettings(model="layers", precision="int8", dataset="squares"))
    said = str(refused.value)
    assert f"{card.reference}.int8 was not published: on {squares.reference} val it loses more than" in said
    assert "top1 1.0000 → 0." in said
    assert "worst classes" in said
    assert "1.00 → 0.00" in said
    assert {name for name in files_of(store, card) if not name.startswith("evaluations/")} == set(before)
    with pytest.raises(NotFound, match="to make it: pixelmill export layers@"):
        registry.resolve(store, f"{card.reference}.int8")


@pytest.mark.parametrize(
    ("scales", "what", "exact"),
    [
        pytest.param([EVEN] * 4, "all layers", [], id="nothing is sensitive"),
        pytest.param([UNEVEN, EVEN, EVEN], "all but the first and the last layer", [0, 2], id="the first layer is"),
        pytest.param(
            [EVEN, EVEN, UNEVEN, EVEN, EVEN, EVEN],
            "all but the first, the last and the 2 most sensitive layers",
            [0, 1, 2, 5],
            id="one in the middle is",
        ),
    ],
)
def test_layers_that_lose_too_much_stay_exact(store, squares, tmp_path, scales, what, exact):
    card = publish_layers(store, tmp_path, scales)
    exported = export(store, ExportSettings(model="layers", precision="int8", dataset="squares"))
    variant = registry.resolve(store, exported.model)
    assert variant.conversion["quantised"] == what
    layers = [name for name in variant.conversion["exact_nodes"] if name.startswith("layer")]
    assert layers == [f"layer{number}" for number in exact]
    assert exported.metrics["gate"]["int8"] == 1.0
    assert find_metrics(store, card, squares, "val") is not None  # the exact one's figures are kept, too


def test_the_bar_is_what_onnx_runtime_answers(store, squares, tmp_path):
    """Figures that another engine left in the card are not compared with."""
    card = publish_layers(store, tmp_path, [EVEN, EVEN])
    low = {"dataset": squares.reference, "val": {"top1": 0.1, "per_class": {}, "engine": "openvino cpu bf16"}}
    path = Path(registry.version_folder(store, card), CARD_FILE)
    path.write_text(replace(card, metrics=low).to_json())
    exported = export(store, ExportSettings(model="layers", precision="int8", dataset="squares"))
    assert exported.metrics["gate"]["fp32"] == 1.0


def test_half_precision_that_overflows_is_not_published(store, squares, tmp_path):
    publish_layers(store, tmp_path, [EVEN, [300.0] * 3, [90_000.0] * 3, EVEN])
    with pytest.raises(
        PixelmillError, match=r"m1 reaches 7\.\d+e\+04 in the exact export, and half precision ends at 65504"
    ):
        export(store, ExportSettings(model="layers", precision="fp16", dataset="squares"))
    assert len(registry.list_models(store)) == 1


def test_the_normalisation_and_the_answer_stay_exact(store, squares, tmp_path):
    """In half precision 1/255 and the probabilities would be rounded; only what lies between the layers is."""
    card = publish_layers(store, tmp_path, [EVEN, EVEN, EVEN])
    half = onnx.load(export(store, ExportSettings(model="layers", precision="fp16", dataset="squares")).file)
    types = {constant.name: constant.data_type for constant in half.graph.initializer}
    assert (types["unit"], types["w0"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    assert [node.op_type for node in half.graph.node].count("Cast") == 3  # of the images, to half, and back
    onnx.checker.check_model(half, full_check=True)
    assert registry.fetch_model(store, card).is_file()


def test_a_killed_export_leaves_nothing_half_published(store, squares, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    card = publish_layers(store, tmp_path, [EVEN, EVEN])
    storage = open_storage(store)
    put = storage.put_if_absent

    def die_at_the_card(uri: str, data: bytes) -> bool:
        if uri.endswith("card.int8.json") and uri.startswith(store):
            raise Killed
        return put(uri, data)

    settings = ExportSettings(model="layers", precision="int8", dataset="squares")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_if_absent", die_at_the_card)
        with pytest.raises(Killed):
            export(store, settings)
    assert "model.int8.onnx" in files_of(store, card)
    assert registry.list_models(store) == [card]
    exported = export(store, settings)
    assert [found.reference for found in registry.list_models(store)] == [card.reference, exported.model]
    assert json.loads(files_of(store, card)["card.int8.json"])["version"] == f"{card.version}.int8"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param(
            {"precision": "int8"}, UsageError, "was not trained here, so an export as int8 needs --dataset", id="none"
        ),
        pytest.param({"precision": "fp16", "dataset": "circles"}, NotFound, "no data set 'circles'", id="unknown"),
        pytest.param(
            {"precision": "int8", "dataset": "squares", "split": "test"},
            UsageError,
            "no labelled images in its split test; its splits: train 12, val 12",
            id="no such split",
        ),
        pytest.param(
            {"precision": "int8", "dataset": "onlyval"}, UsageError, "no image in its split train", id="no calibration"
        ),
        pytest.param(
            {"precision": "int8", "dataset": "others"}, UsageError, "have no class in common", id="other classes"
        ),
    ],
)
def test_what_an_export_needs(store, squares, tmp_path, settings, error, message):
    publish_colour_model(store, tmp_path)
    publish_dataset(store, tmp_path / "onlyval", [("val", "red", square("red"))], "onlyval")
    publish_dataset(
        store, tmp_path / "others", [(s, "cat", square("red", n)) for n, s in enumerate(("train", "val"))], "others"
    )
    with pytest.raises(error, match=message):
        export(store, ExportSettings(model="colours", **settings))
    assert len(registry.list_models(store)) == 1


def test_a_data_set_that_says_nothing_of_the_task_is_refused(store, squares, tmp_path):
    publish_detector(store, tmp_path)
    with pytest.raises(UsageError, match=r"is a model of task detect, and the images of squares@\w+ have no boxes"):
        export(store, ExportSettings(model="tiny_detector", precision="int8", dataset="squares"))


def test_the_exact_export_of_a_model_that_has_one_is_found(store, tmp_path):
    card = publish_colour_model(store, tmp_path)
    before = files_of(store, card)
    assert export(store, ExportSettings(model="colours")).model == card.reference
    assert files_of(store, card) == before


def test_openvino_is_refused_where_it_disagrees_on_int8(store, squares, tmp_path):
    publish_layers(store, tmp_path, [EVEN, EVEN])
    exported = export(store, ExportSettings(model="layers", precision="int8", dataset="squares"))
    variant = registry.resolve(store, exported.model)
    records = {key: {"agrees": False} for key in variant.parity if key.startswith("openvino_")}
    assert records
    doubtful = replace(variant, parity=variant.parity | records)
    assert isinstance(open_engine(exported.file, doubtful), OnnxRuntimeEngine)
    with pytest.raises(ModelError, match="disagrees with ONNX Runtime beyond its tolerance; use --engine onnxruntime"):
        open_engine(exported.file, doubtful, engine="openvino")
    if all(variant.parity[key]["agrees"] for key in records):
        assert open_engine(exported.file, variant).name == "openvino cpu int8"


def test_what_is_before_and_after_the_layers():
    nodes = [
        helper.make_node("Cast", ["images"], ["a"], name="cast"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="conv"),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("Gemm", ["c", "v"], ["d"], name="gemm"),
        helper.make_node("Softmax", ["d"], ["e"], name="softmax"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert layers.before_layers(model) == {"cast"}
    assert layers.after_layers(model) == {"softmax"}


def test_the_metadata_of_a_variant_has_its_own_card_once(store, squares, tmp_path):
    publish_layers(store, tmp_path, [EVEN, EVEN])
    exported = export(store, ExportSettings(model="layers", precision="int8", dataset="squares"))
    cards = [entry.value for entry in onnx.load(exported.file).metadata_props if entry.key == METADATA_KEY]
    assert [Card.from_json(card).reference for card in cards] == [exported.model]
    assert CARD_FILE in files_of(store, registry.resolve(store, exported.model))


def test_a_variant_that_disagrees_with_itself_is_refused(store, squares, tmp_path, monkeypatch):
    from models.runtime import parity

    publish_layers(store, tmp_path, [EVEN, EVEN])
    measured = {"agrees": False, "reason": "top_label by 1 from itself in a batch, where 0 is allowed"}
    monkeypatch.setattr(parity, "_measure", lambda *_: measured)
    with pytest.raises(ParityError, match=r"onnxruntime cpu fp16 differs: top_label by 1") as refused:
        parity.check_variant(
            registry.resolve(store, "layers").variant("fp16"),
            registry.fetch_model(store, registry.resolve(store, "layers")),
            registry.fetch_model(store, registry.resolve(store, "layers")),
            np.zeros((5, SIDE, SIDE, 3), np.uint8),
        )
    assert "was not published" in str(refused.value)
