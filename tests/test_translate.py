"""Translating and embedding in bulk: real files, a real slot process, hand-made ONNX models, one row per image."""

import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import Rejected, UsageError
from models.imaging.encode import encode
from models.imaging.geometry import ResizeRule
from models.imaging.prepare import Limits, Preparer
from models.imaging.restore import composed
from models.imaging.tiles import Tiling
from models.settings.predict import PredictSettings
from tasks import predict
from tasks.query import ask
from tasks.storage import join, local_path, open_storage
from tasks.verify import verify
from tests.tiny_models import publish_embedder, publish_generator, publish_translator


def run(store: str, source: str, model: str, table: str, **settings) -> predict.Summary:
    chosen = PredictSettings(source=source, model=model, table=table, **settings)
    planned = predict.plan(store, chosen)
    return predict.summarise(store, chosen, planned, [predict.work(store, chosen, planned)], 1.0)


def gradient(height: int, width: int) -> np.ndarray:
    """An image without a sharp edge, so that a resize there and back keeps it within a few levels."""
    y, x = np.mgrid[:height, :width]
    planes = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), np.full((height, width), 90)]
    return np.stack(planes, axis=2).astype(np.uint8)


def png(pixels: np.ndarray, **options) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "png", **options)
    return buffer.getvalue()


def put_photos(folder: str) -> None:
    """Odd, tiny, long and broken ones."""
    storage = open_storage(folder)
    exif = Image.Exif()
    exif[274] = 6  # stored lying, shown upright
    files = {
        "plain.png": png(gradient(40, 60)),
        "turned.png": png(gradient(20, 50), exif=exif.tobytes()),
        "dot.png": png(gradient(1, 1)),
        "line.png": png(gradient(1, 300)),
        "a b?#[1].png": png(gradient(33, 31)),
        "broken.png": png(gradient(64, 64))[:60],
        "text.jpg": b"not an image",
        "empty.png": b"",
        "large.png": png(gradient(200, 260)),
    }
    for name, data in files.items():
        assert storage.put_if_absent(join(folder, name), data)


def pixels_at(uri: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(open_storage(uri).read(uri))))


@pytest.mark.parametrize("tile", [None, 64])
def test_every_image_gets_one_of_its_own_size_and_a_row(root, tmp_path, tile):
    store, photos = join(root, "mill"), join(root, "photos")
    put_photos(photos)
    card = publish_translator(store, tmp_path)
    summary = run(store, photos, "tiny_negative", "negatives", tile=tile, max_pixels=60_000)
    assert summary.by_status == {"ok": 6, "corrupt": 1, "unsupported": 1, "empty": 1}
    assert summary.stages["encode"] > 0
    assert summary.stages["store"] > 0
    answer = ask(store, "select image, status, width, height, output, model from negatives order by image")
    assert len(answer.rows) == 9
    for image, status, width, height, output, model in answer.rows:
        assert model == card.reference
        if status != "ok":
            assert output is None
            continue
        assert output.startswith(join(store, "tables", "negatives", "outputs", f"model={model}"))
        original = np.asarray(Image.open(BytesIO(open_storage(image).read(image))))
        made = pixels_at(output)
        assert made.shape == (height, width, 3)
        if image.endswith("turned.png"):
            assert (height, width) == (50, 20)
            original = np.rot90(original, -1)
        assert np.abs(made.astype(int) - (255 - original.astype(int))).mean() < 6, image
    assert verify(store, "negatives").problems == []
    assert run(store, photos, "tiny_negative", "negatives", tile=tile, max_pixels=60_000).rows == 0


def test_an_output_that_is_gone_is_found_by_verify(tmp_path):
    store, photos = str(tmp_path / "mill"), tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(png(gradient(20, 20)))
    publish_translator(store, tmp_path)
    run(store, str(photos), "tiny_negative", "negatives", image_format="webp")
    ((output,),) = ask(store, "select output from negatives").rows
    assert output.endswith(".webp")
    Path(local_path(output)).unlink()
    (problem,) = verify(store, "negatives").problems
    assert "1 images" in problem
    assert output in problem


def test_of_a_shard_that_died_before_its_part_the_files_are_there_and_taken(tmp_path):
    store, photos = str(tmp_path / "mill"), tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.png").write_bytes(png(gradient(20 + number, 20)))
    publish_translator(store, tmp_path)
    run(store, str(photos), "tiny_negative", "negatives")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "mill").rglob("*.png")}
    (part,) = (tmp_path / "mill").rglob("parts/*/*.parquet")
    part.unlink()  # as a kill between the last file and the part leaves it
    assert run(store, str(photos), "tiny_negative", "negatives").by_status == {"ok": 4}
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "mill").rglob("*.png")}
    assert (len(before), before) == (4, after)
    assert verify(store, "negatives").problems == []


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(32, 32), (7, 90), (90, 7), (1, 1), (100, 130), (33, 32)])
@pytest.mark.parametrize("tile", [None, 32, 48])
def test_what_is_cut_and_fitted_comes_back_as_it_was(mode, size, tile):
    rule = ResizeRule(mode, 32, 32, pad_rgb=(255, 0, 0))
    original = gradient(*size)
    views = []

    def next_out() -> np.ndarray:
        views.append(np.empty((32, 32, 3), np.uint8))
        return views[-1]

    tiling = None if tile is None else Tiling(tile, 0.2, and_whole=False)
    geometries = list(Preparer(rule, Limits(), tiling).views(png(original), next_out))
    back = composed(list(zip(geometries, views, strict=True)), "bilinear")
    assert back.shape == original.shape
    if tile == 32 and min(size) >= 32:
        assert np.array_equal(back, original)
    assert np.abs(back.astype(int) - original.astype(int)).mean() < 12


def test_tiles_fade_into_each_other():
    rule = ResizeRule("stretch", 32, 32)
    out = np.empty((32, 32, 3), np.uint8)
    tiling = Tiling(32, 0.25, and_whole=False)
    geometries = list(Preparer(rule, Limits(), tiling).views(png(gradient(32, 56)), lambda: out))
    assert len(geometries) == 2
    dark, light = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 200, np.uint8)
    row = composed([(geometries[0], dark), (geometries[1], light)], "bilinear")[16, :, 0].astype(int)
    assert (row[:24] == 0).all()
    assert (row[32:] == 200).all()
    assert (np.diff(row[23:33]) > 0).all()


@pytest.mark.parametrize(
    ("image_format", "side", "message"),
    [("webp", 16_384, "16,383 pixels a side"), ("jpeg", 65_536, "65,535 pixels a side")],
)
def test_an_image_that_its_format_cannot_hold_is_rejected(image_format, side, message):
    with pytest.raises(Rejected, match=message):
        encode(np.zeros((1, side, 3), np.uint8), image_format)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_same_pixels_are_the_same_file(image_format):
    image = gradient(20, 30)
    data = encode(image, image_format)
    assert data == encode(image, image_format)
    decoded = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded - image).max() <= (0 if image_format != "jpeg" else 8)


def test_what_cannot_be_translated_is_said(tmp_path):
    store, photos = str(tmp_path / "mill"), tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(png(gradient(20, 20)))
    publish_generator(store, tmp_path)
    publish_embedder(store, tmp_path)
    card = publish_translator(store, tmp_path)
    with pytest.raises(UsageError, match=r"makes images and is shown none: pixelmill generate tiny_generator@"):
        run(store, str(photos), "tiny_generator", "t")
    with pytest.raises(UsageError, match="--image-format does not apply to models of task embed"):
        run(store, str(photos), "tiny_embedder", "t", image_format="webp")
    with pytest.raises(UsageError, match="cannot translate the whole of an image"):
        predict._check_sees(replace(card, input=ResizeRule("crop", 32, 32, short_side=32)))


def test_embeddings_are_vectors_and_null_for_what_is_not_ok(root, tmp_path):
    store, photos = join(root, "mill"), join(root, "photos")
    put_photos(photos)
    publish_embedder(store, tmp_path)
    run(store, photos, "tiny_embedder", "vectors")
    rows = ask(store, "select image, status, embedding, anomaly from vectors").rows
    assert sum(status == "ok" for _, status, _, _ in rows) == 6
    for image, status, embedding, anomaly in rows:
        if status != "ok":
            assert (embedding, anomaly) == (None, None)
            continue
        mean = np.asarray(Image.open(BytesIO(open_storage(image).read(image)))).mean(axis=(0, 1)) / 255
        assert np.abs(np.array(embedding) - mean).max() < 0.02
        assert math.isclose(anomaly, sum(embedding) / 3, abs_tol=1e-5)
    assert verify(store, "vectors").problems == []
