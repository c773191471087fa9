"""Graphs of generators, translators, embedders and decoders: exported, compared with PyTorch, refused when wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from models.card import DECODER_FILE, ONNX_FILE, Card
from models.errors import ModelError, ParityError, UsageError
from models.imaging.geometry import ResizeRule
from models.records import Task
from models.runtime.engine import OnnxRuntimeEngine, open_engine
from models.runtime.export import export_onnx
from models.runtime.latents import draw
from models.runtime.parity import check_parity, parity_latents
from models.runtime.publishable import export_graphs
from models.settings.export import ExportSettings
from models.settings.generate import GenerateSettings
from tasks import registry
from tasks.adopt import import_model
from tasks.export import export
from tasks.generate import generate

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, SIZE = 16, 8


def levels(images: torch.Tensor) -> torch.Tensor:
    """Planes [batch, 3, h, w], -1 to 1, as uint8 [batch, h, w, 3]."""
    return ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def planes(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class Decoder(nn.Module):
    """From latents, and perhaps classes, to images, as the small generators of the papers do."""

    def __init__(self, num_classes: int = 0):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, SIZE) if num_classes else None
        self.first = nn.Linear(SIZE, 32 * 4 * 4)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.third = nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, latent: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if self.embedding is not None:
            latent = latent * self.embedding(labels)
        x = torch.relu(self.norm(self.first(latent).unflatten(1, (32, 4, 4))))
        return levels(torch.tanh(self.third(torch.relu(self.second(x)))))


class Translator(nn.Module):
    """A convolution there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return levels(torch.tanh(self.up(torch.relu(self.down(planes(images))))))


class Autoencoder(nn.Module):
    """Its graph embeds; its decoder makes images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3 * SIDE * SIDE, SIZE)
        self.decoder = Decoder()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.encoder(planes(images).flatten(1))
        error = (planes(self.decoder(mean)) - planes(images)).square().flatten(1).mean(dim=1)
        return mean, error


def family(network: nn.Module, names: tuple[str, ...]) -> SimpleNamespace:
    """The functions that a module of models.nets has."""

    def answers(module: nn.Module, names: tuple[str, ...]):
        def reference(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            found = module(*inputs)
            return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

        return reference

    found = SimpleNamespace(
        graph=lambda network, card: network, reference=lambda network, card: answers(network, names)
    )
    if isinstance(network, Autoencoder):
        found.decoder_graph = lambda network, card: network.decoder
        found.decoder_reference = lambda network, card: answers(network.decoder, ("images_out",))
    return found


def card_of(task: Task, labels: tuple[str, ...] = (), latent_size: int = 0) -> Card:
    rule = ResizeRule("stretch", SIDE, SIDE)
    return Card("toy", "a" * 12, task, "toy", labels, rule, latent_size=latent_size)


CASES = {
    "generate": (lambda: Decoder(), card_of(Task.GENERATE, latent_size=SIZE), ("images_out",), {ONNX_FILE}),
    "conditional": (
        lambda: Decoder(3),
        card_of(Task.GENERATE, ("a", "b", "c"), SIZE),
        ("images_out",),
        {ONNX_FILE},
    ),
    "translate": (Translator, card_of(Task.TRANSLATE), ("images_out",), {ONNX_FILE}),
    "embed": (
        Autoencoder,
        card_of(Task.EMBED, latent_size=SIZE),
        ("embedding", "anomaly"),
        {ONNX_FILE, DECODER_FILE},
    ),
}


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3)).astype(np.uint8)


def awake(make) -> nn.Module:
    torch.manual_seed(0)
    network = make()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.parametrize("case", CASES)
def test_every_graph_is_published_only_as_pytorch_answers(case, photos, tmp_path):
    make, card, names, files = CASES[case]
    network = awake(make)
    found, record = export_graphs(network, family(network, names), card, photos, ["photo"] * 6, tmp_path)
    assert set(found) == files
    assert record["agrees"]
    assert record["compared"] >= 6
    assert ("images" in record) == (card.task is not Task.GENERATE)
    assert set(record["largest"]) == set(record["tolerance"])
    if DECODER_FILE in files:
        assert record["decoder"]["agrees"]
    published = registry.publish(str(tmp_path / "mill"), card, found)
    assert set(published.files) == files
    if card.latent_size:
        settings = GenerateSettings(model="toy", count=20, out=str(tmp_path / "out"))
        assert generate(str(tmp_path / "mill"), settings).new == 20


@pytest.mark.parametrize("case", CASES)
def test_a_graph_that_was_sabotaged_is_refused(case, photos, tmp_path):
    make, card, names, _ = CASES[case]
    network = awake(make)
    batch = photos if card.task is not Task.GENERATE else parity_latents(card)
    path = tmp_path / ONNX_FILE
    export_onnx(network, card, path, batch[:2])
    assert check_parity(network, family(network, names), card, path, batch)["agrees"]
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda one: int(np.prod(one.dims)))
    spoiled = numpy_helper.to_array(weights).copy()
    spoiled.flat[: spoiled.size // 4] *= 0.9
    weights.CopyFrom(numpy_helper.from_array(spoiled, weights.name))
    onnx.save(model, path)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        check_parity(network, family(network, names), card, path, batch)


def test_a_decoder_that_differs_keeps_the_whole_model_back(photos, tmp_path):
    network = awake(Autoencoder)
    lying = family(network, ("embedding", "anomaly"))
    other = awake(Decoder)
    nn.init.normal_(other.first.weight, std=0.31)
    lying.decoder_graph = lambda network, card: other
    with pytest.raises(ParityError, match=r"differs from PyTorch: (mean_level|levels) by"):
        export_graphs(network, lying, CASES["embed"][1], photos, [], tmp_path)


def test_a_network_that_makes_one_image_of_everything_is_refused(tmp_path):
    network = awake(Decoder)
    nn.init.zeros_(network.first.weight)
    card = CASES["generate"][1]
    with pytest.raises(ParityError, match="nothing could be compared"):
        export_graphs(network, family(network, ("images_out",)), card, np.empty(0), [], tmp_path)


@pytest.mark.parametrize(
    ("published", "read_as", "message"),
    [
        pytest.param("generate", "conditional", "expected the input latent.*labels.*the file has latent", id="labels"),
        pytest.param("translate", "generate", "expected the input latent.*the file has images", id="images"),
        pytest.param("embed", "translate", "a translate model needs the output images_out", id="output"),
    ],
)
def test_a_graph_of_another_kind_is_not_loaded(published, read_as, message, photos, tmp_path):
    make, card, names, _ = CASES[published]
    network = awake(make)
    files, _ = export_graphs(network, family(network, names), card, photos, [], tmp_path)
    with pytest.raises(ModelError, match=message):
        OnnxRuntimeEngine(files[ONNX_FILE], CASES[read_as][1], concurrency=1)


def test_images_of_another_size_than_the_card_says_are_refused(photos, tmp_path):
    network = awake(Decoder)
    card = Card("toy", "a" * 12, Task.GENERATE, "toy", (), ResizeRule("stretch", 32, 32), latent_size=SIZE)
    with pytest.raises(ModelError, match=r"expected images_out of the card's size \[batch, 32, 32, 3\]"):
        export_graphs(network, family(network, ("images_out",)), card, photos, [], tmp_path)


def test_the_card_tells_what_a_model_can_make():
    generator, embedder, translator = (CASES[name][1] for name in ("conditional", "embed", "translate"))
    assert (generator.generator_file, generator.is_conditional) == (ONNX_FILE, True)
    assert (embedder.generator_file, embedder.as_generator.task) == (DECODER_FILE, Task.GENERATE)
    assert (translator.generator_file, translator.is_conditional) == (None, False)
    assert Card.from_json(embedder.to_json()) == embedder
    assert generator.with_version().version != CASES["generate"][1].with_version().version
    latents = draw(generator, 0, range(5))
    assert latents.labels.tolist() == [0, 1, 2, 0, 1]
    assert len(latents[1:3]) == 2


def test_a_generator_runs_on_onnx_runtime_only(photos, tmp_path):
    make, card, names, _ = CASES["generate"]
    network = awake(make)
    files, _ = export_graphs(network, family(network, names), card, photos, [], Path(tmp_path))
    engine = open_engine(files[ONNX_FILE], card, device="cpu")
    assert engine.name == "onnxruntime cpu fp32"
    assert engine.run(draw(card, 0, range(3)))["images_out"].shape == (3, SIDE, SIDE, 3)


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_file_is_adopted_after_its_trial(case, photos, tmp_path):
    make, card, _, _ = CASES[case]
    batch = photos if card.task is not Task.GENERATE else parity_latents(card)
    export_onnx(awake(make), card, tmp_path / "foreign.onnx", batch[:2])
    rule = {"mode": "stretch", "height": SIDE, "width": SIDE}
    described = {"task": card.task, "labels": card.labels, "input": rule}
    if card.task is Task.GENERATE:
        described["latent_size"] = SIZE
    (tmp_path / "card.json").write_text(json.dumps(described))
    store = str(tmp_path / "mill")
    adopted = import_model(str(tmp_path / "foreign.onnx"), "mine", store, card_file=str(tmp_path / "card.json"))
    assert (adopted.task, adopted.labels, adopted.parity["agrees"]) == (card.task, card.labels, True)
    (tmp_path / "card.json").write_text(json.dumps(described | {"latent_size": 0 if "latent_size" in described else 4}))
    with pytest.raises(UsageError, match="latent_size of a model of task"):
        import_model(str(tmp_path / "foreign.onnx"), "mine", store, card_file=str(tmp_path / "card.json"))


@pytest.mark.parametrize("case", CASES)
def test_a_less_exact_export_is_refused_in_one_line(case, photos, tmp_path):
    make, card, names, _ = CASES[case]
    network = awake(make)
    files, _ = export_graphs(network, family(network, names), card, photos, [], tmp_path)
    store = str(tmp_path / "mill")
    registry.publish(store, card, files)
    with pytest.raises(UsageError, match=f"is a model of task {card.task}.*use --precision fp32"):
        export(store, ExportSettings(model="toy", precision="int8"))
