"""Generating: the set is a function of model, seed and number, whatever was killed, repeated or raced."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.__main__ import main
from models.errors import ModelError, NotFound, PixelmillError, UsageError
from models.runtime.latents import draw
from models.settings.generate import GenerateSettings
from tasks import generate as generating
from tasks import registry
from tasks.datasets import datasets
from tasks.generate import BLOCK, MANIFEST_FILE, generate
from tasks.storage import join, open_storage
from tests.tiny_models import SIDE, publish_classifier, publish_embedder, publish_generator

CLASSES = ("cat", "dog", "a/b")


@pytest.fixture
def store(tmp_path) -> str:
    """A store with a generator, and one that is told classes."""
    store = str(tmp_path / "mill")
    publish_generator(store, tmp_path)
    publish_generator(store, tmp_path, "tiny_conditional", CLASSES)
    return store


def make(store: str, out: str, model: str = "tiny_generator", count: int = 40, **settings) -> generating.Generated:
    return generate(store, GenerateSettings(model=model, count=count, out=out, **settings))


def files_of(out: str) -> dict[str, bytes]:
    storage = open_storage(out)
    found = {}
    for name in storage.names(out):
        uri = join(out, name)
        found |= (
            {name: storage.read(uri)}
            if storage.exists(uri)
            else {f"{name}/{inner}": storage.read(join(uri, inner)) for inner in storage.names(uri)}
        )
    return found


def images_of(out: str) -> dict[str, bytes]:
    return {name: data for name, data in files_of(out).items() if name.endswith(".png")}


def test_the_images_are_those_of_the_graph_and_the_manifest_names_them(store, root):
    made = make(store, join(root, "out"), count=2 * BLOCK + 3)
    assert (made.images, made.new, made.classes) == (2 * BLOCK + 3, 2 * BLOCK + 3, {})
    files = images_of(made.out)
    assert sorted(files) == [f"{number:08d}.png" for number in range(2 * BLOCK + 3)]
    card = registry.resolve(store, "tiny_generator")
    latent = draw(card, 0, [17]).latent
    levels = (100 / (1 + np.exp(-latent[0]))).astype(np.uint8)
    pixels = np.asarray(Image.open(BytesIO(files["00000017.png"])))
    assert pixels.shape == (SIDE, SIDE, 3)
    assert np.abs(pixels[0, :, 0].astype(int) - levels).max() <= 1
    assert len(set(files.values())) == len(files)
    manifest = pq.read_table(BytesIO(open_storage(made.manifest).read(made.manifest))).to_pylist()
    assert [row["number"] for row in manifest] == list(range(2 * BLOCK + 3))
    assert {row["image"]: row["bytes"] for row in manifest} == {
        join(made.out, name): len(data) for name, data in files.items()
    }
    assert {(row["model"], row["seed"], row["label"]) for row in manifest} == {(card.reference, 0, None)}


def test_an_image_depends_on_its_number_alone(store, tmp_path):
    few, many = make(store, str(tmp_path / "few"), count=5), make(store, str(tmp_path / "many"), count=50)
    assert images_of(few.out).items() <= images_of(many.out).items()
    other = make(store, str(tmp_path / "other"), count=5, seed=1)
    assert not set(images_of(other.out).values()) & set(images_of(many.out).values())
    card = registry.resolve(store, "tiny_generator")
    together = draw(card, 7, range(6), truncation=0.5).latent
    assert np.array_equal(together[3:4], draw(card, 7, [3], truncation=0.5).latent)
    assert np.abs(together).max() <= 0.5


def test_the_same_again_makes_nothing_and_what_is_lost_is_made_again(store, tmp_path):
    out = tmp_path / "out"
    make(store, str(out))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = make(store, str(out))
    assert (again.new, again.engine) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    lost = (out / "00000031.png").read_bytes()
    (out / "00000031.png").unlink()
    assert make(store, str(out)).new == 1
    assert (out / "00000031.png").read_bytes() == lost


@pytest.mark.parametrize(
    ("classes", "counts"),
    [(None, {"cat": 4, "dog": 3, "a/b": 3}), ("dog", {"dog": 10}), ("a/b, cat,cat", {"a/b": 5, "cat": 5})],
)
def test_classes_come_in_turn(store, tmp_path, classes, counts):
    made = make(store, str(tmp_path / "out"), "tiny_conditional", 10, classes=classes)
    assert made.classes == counts
    manifest = pq.read_table(made.manifest).to_pylist()
    assert Counter(row["label"] for row in manifest) == counts
    for row in manifest:
        pixels = np.asarray(Image.open(row["image"]))
        floor = 40 * CLASSES.index(row["label"])
        assert floor <= pixels.min() <= pixels.max() <= floor + 100
        assert Path(row["image"]).parent.name == {"a/b": "class-0002"}.get(row["label"], row["label"])


def wait_for_images(out: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.png"))) < count:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_half_way_and_repeated_gives_the_full_set_byte_for_byte(store, tmp_path):
    count = 3000
    undisturbed = make(store, str(tmp_path / "undisturbed"), count=count)
    out = tmp_path / "killed"
    command = [
        *(sys.executable, "-m", "flows", "generate", "tiny_generator", "--count", str(count), "--out", str(out)),
        *("--store", store, "--direct", "--json"),
    ]
    for share in (0.2, 0.6):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wait_for_images(out, int(share * count), process)
            process.send_signal(signal.SIGKILL)
    assert not (out / MANIFEST_FILE).exists()
    there = len(list(out.glob("*.png")))
    assert there < count
    done = subprocess.run(command, capture_output=True, check=True)
    result = json.loads(done.stdout)
    assert (result["images"], result["new"]) == (count, count - there)
    whole, again = files_of(undisturbed.out), files_of(str(out))
    assert whole.keys() == again.keys()  # a kill may leave a temporary file; it lies under no name that is listed
    names = {name for name in whole if name != MANIFEST_FILE}
    assert {name: whole[name] for name in names} == {name: again[name] for name in names}
    rows, rows_again = (pq.read_table(join(folder, MANIFEST_FILE)) for folder in (undisturbed.out, str(out)))
    assert rows.drop_columns("image").equals(rows_again.drop_columns("image"))


def test_two_at_once_make_one_set(store, root):
    out, errors = join(root, "out"), []

    def run() -> None:
        try:
            make(store, out, count=200)
        except PixelmillError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(images_of(out)) == 200
    assert make(store, out, count=200).new == 0


def test_the_result_is_a_data_set_with_labels_and_provenance(store, tmp_path):
    made = make(store, str(tmp_path / "out"), "tiny_conditional", 30, classes="dog", as_dataset="dogs", seed=4)
    dataset = datasets.resolve(store, "dogs")
    assert made.dataset == dataset.reference
    assert (dataset.images, dataset.splits, dataset.classes) == (30, {"train": 30}, CLASSES)
    assert dataset.provenance["model"] == made.model
    assert dataset.provenance["seed"] == 4
    assert dataset.provenance["manifest"] == made.manifest
    rows = datasets.read_images(store, dataset).to_pylist()
    assert {row["label"] for row in rows} == {"dog"}
    manifest = {row["image"]: row["sha256"] for row in pq.read_table(made.manifest).to_pylist()}
    assert {row["image"]: row["sha256"] for row in rows} == manifest
    again = make(store, str(tmp_path / "out"), "tiny_conditional", 30, classes="dog", as_dataset="dogs", seed=4)
    assert again.dataset == made.dataset
    unlabelled = make(store, str(tmp_path / "plain"), count=9, as_dataset="plain")
    assert not datasets.resolve(store, unlabelled.dataset or "").has_labels


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param({"model": "nobody"}, NotFound, "no model 'nobody'", id="unknown model"),
        pytest.param({"model": "tiny"}, UsageError, "task classify and makes no images.*tiny_conditional", id="task"),
        pytest.param({"classes": "cat"}, UsageError, "--classes has no meaning", id="unconditional"),
        pytest.param(
            {"model": "tiny_conditional", "classes": "cow,cat"},
            UsageError,
            "knows no class 'cow'; its classes: cat, dog",
            id="class",
        ),
        pytest.param({"seed": 1}, UsageError, r"another set \(seed 0 there, 1 now\)", id="seed"),
        pytest.param({"count": 41}, UsageError, "count 40 there, 41 now", id="count"),
        pytest.param({"model": "tiny_conditional"}, UsageError, "another set .*model tiny_generator@", id="model"),
        pytest.param({"out": "other"}, UsageError, r"holds other files \(photo.jpg", id="other files"),
        pytest.param({"out": "other/photo.jpg"}, UsageError, "photo.jpg is a file: name a new folder", id="file"),
        pytest.param({"out": "mill/images"}, UsageError, "lies in the store", id="store"),
    ],
)
def test_what_cannot_be_made_is_one_line(store, tmp_path, settings, error, message):
    publish_classifier(store, tmp_path)
    make(store, str(tmp_path / "out"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_bytes(b"")
    before = files_of(str(tmp_path / "out"))
    settings = settings | {"out": str(tmp_path / settings.get("out", "out"))}
    with pytest.raises(error, match=message) as raised:
        make(store, **settings)
    assert "\n" not in str(raised.value)
    assert files_of(str(tmp_path / "out")) == before


def test_a_model_that_embeds_but_has_no_decoder_says_so(store, tmp_path):
    from dataclasses import replace

    card = replace(publish_embedder(store, tmp_path), latent_size=8)
    with pytest.raises(ModelError, match=r"has no decoder.onnx: it was trained without an export: pixelmill export"):
        generating._check_generates(store, card)


def test_the_command_says_what_it_made(store, tmp_path, capsys):
    out = str(tmp_path / "out")
    code = main(["generate", "tiny_conditional", "--count", "6", "--out", out, "--store", store, "--direct", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (code, result["images"], result["out"]) == (0, 6, out)
    assert main(["generate", "tiny_conditional", "--count", "6", "--out", out, "--store", store, "--direct"]) == 0
    assert "all of them were there" in capsys.readouterr().out
    assert main(["generate", "tiny_conditional", "--count", "0", "--out", out, "--store", store]) == 2
    assert os.listdir(out)
