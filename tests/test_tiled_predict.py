"""Tiled prediction, from files to rows: engines whose answer on a large image is known, and a real slot process."""

import functools
import io
from pathlib import Path

import duckdb
import numpy as np
import pytest
from PIL import Image
from protocol_rounds import Heard
from pycocotools import mask as coco_mask
from scipy import ndimage

from flows.__main__ import main
from models.card import Card
from models.errors import TableMismatch, UsageError
from models.imaging.geometry import ResizeRule
from models.imaging.prepare import Limits, Preparer
from models.imaging.tiles import Tiling
from models.records import Task
from models.runtime.predictor import Predictor
from models.settings.predict import PredictSettings
from tasks import predict, registry
from tasks.isolation import IsolatedPreparer
from tasks.pipeline import Pipeline
from tasks.table import Table
from tests.tiny_models import publish_classifier, publish_detector, publish_instances, publish_segmenter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")

SIDE = 64  # of the model's input, and of tiles: objects are seen at their own size
OVERLAP = 0.3
WIDTH, HEIGHT = 230, 170
MASK = 28
TURNED = 6  # EXIF: stored lying, shown upright


class RectangleFinder:
    """Finds each bright rectangle of an image, red ones of class 0 and green ones of class 1, and draws its mask.

    How sure it is of one seems random, but depends only on where it sees it.
    """

    name = "rectangles"
    device = "cpu"
    concurrency = 2

    def __init__(self, poison: int | None = None):
        self.poison = poison  # a level of blue that it cannot bear

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if self.poison is not None and (images[..., 2] == self.poison).any():
            raise RuntimeError("too blue")
        found = []
        for index, image in enumerate(images):
            for label in (0, 1):
                parts, _ = ndimage.label(image[..., label] > 127)
                for number, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
                    box = (columns.start, rows.start, columns.stop, rows.stop)
                    score = 0.3 + (7 * box[0] + 13 * box[1] + 3 * box[2]) % 97 / 150
                    found.append((box, score, label, index, parts[rows, columns] == number))
        return {
            "boxes_xyxy": np.array([box for box, *_ in found], np.float32).reshape(-1, 4),
            "scores": np.array([score for _, score, *_ in found], np.float32),
            "labels": np.array([label for _, _, label, *_ in found], np.int64),
            "batch_index": np.array([index for *_, index, _ in found], np.int64),
            "masks": np.array([_sampled(pixels) for *_, pixels in found], np.float32).reshape(-1, MASK, MASK),
        }

    def close(self) -> None:
        pass


def _sampled(pixels: np.ndarray) -> np.ndarray:
    """[h, w] → [28, 28], relative to the box."""
    rows, columns = ((np.arange(MASK) + 0.5) * size // MASK for size in pixels.shape)
    return pixels[np.ix_(rows.astype(int), columns.astype(int))]


# Colour, and box in pixels of the upright image.
OBJECTS = [
    (0, (5, 5, 15, 12)),  # in one tile
    (0, (40, 4, 60, 18)),  # over a border, seen whole by a neighbour
    (1, (58, 30, 66, 70)),  # over two borders
    (0, (90, 40, 100, 50)),  # where four tiles look
    (1, (130, 20, 131, 21)),  # one pixel
    (0, (150, 10, 180, 30)),  # longer than the overlap
    (1, (90, 110, 220, 160)),  # larger than a tile
    (0, (20, 90, 60, 150)),  # larger than the overlap, both ways
    (1, (226, 0, 230, 4)),  # in a corner of the image
]


def picture(objects=OBJECTS) -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for colour, (x_min, y_min, x_max, y_max) in objects:
        pixels[y_min:y_max, x_min:x_max, colour] = 255
    return Image.fromarray(pixels)


class Mill:
    """A store with models that tests answer for, and a folder of images."""

    def __init__(self, folder: Path, task: Task = Task.INSTANCE):
        self.store, self.photos = str(folder / "mill"), folder / "photos"
        self.photos.mkdir()
        publish = {Task.DETECT: publish_detector, Task.INSTANCE: publish_instances}[task]
        self.published = publish(self.store, folder, "finder")
        rule = ResizeRule("letterbox", SIDE, SIDE)
        self.card = Card("finder", self.published.version, task, "finder", ("red", "green"), rule)

    def predict(
        self, table: str, *, tile: int | None = SIDE, batch_size: int = 4, isolated: bool = False, engine=None
    ) -> dict[str, dict]:
        """The rows of a table that is made now, by the stem of the image."""
        settings = PredictSettings(
            source=str(self.photos), model="finder", table=table, tile=tile, overlap=tile and OVERLAP
        )
        predict.plan(self.store, settings)
        tiling = tile and Tiling(tile, OVERLAP, and_whole=True)
        heard = Heard()
        shards = Table(self.store, table)
        Pipeline(
            shards,
            Predictor(self.card, engine or RectangleFinder()),
            functools.partial(IsolatedPreparer if isolated else Preparer, self.card.input, Limits(), tiling or None),
            heard,
            batch_size=batch_size,
            workers=2,
            readers=2,
            announce=isolated,
        ).run(shards.open_shards(self.card.reference))
        assert not heard.failures
        return self.rows(table)

    def rows(self, table: str) -> dict[str, dict]:
        parts = f"{self.store}/tables/{table}/parts/**/*.parquet"
        found = duckdb.sql(f"FROM read_parquet('{parts}')").to_arrow_table().drop_columns(["predicted_at"]).to_pylist()
        rows = {Path(row["image"]).stem: row for row in found}
        assert len(rows) == len(found)
        return rows


@pytest.fixture
def mill(tmp_path) -> Mill:
    return Mill(tmp_path)


def box_of(found: dict) -> tuple[float, ...]:
    return tuple(found[side] for side in ("x_min", "y_min", "x_max", "y_max"))


def check_objects(row: dict, objects=OBJECTS) -> None:
    """Every object once: exactly where a tile shows it whole, else as the whole image shows it, 4 times smaller."""
    assert (row["status"], row["width"], row["height"]) == ("ok", WIDTH, HEIGHT)
    assert len(row["objects"]) == len(objects)
    left = list(objects)
    for found in row["objects"]:
        near = [
            one
            for one in left
            if one[0] == ("red", "green").index(found["label"])
            and np.abs(np.subtract(one[1], box_of(found))).max() <= (4 if is_large(one[1]) else 0)
        ]
        assert len(near) == 1, found
        left.remove(near[0])
        x_min, y_min, x_max, y_max = (round(side) for side in box_of(found))
        mask = coco_mask.decode({"size": [HEIGHT, WIDTH], "counts": found["mask"]})
        assert found["area"] == mask.sum() == mask[y_min:y_max, x_min:x_max].sum()
        width, height = x_max - x_min, y_max - y_min
        assert abs(int(mask.sum()) - width * height) <= (width + height if is_large(near[0][1]) else 0)


def is_large(box) -> bool:
    """Whether it may be that no tile shows it whole."""
    return max(box[2] - box[0], box[3] - box[1]) > OVERLAP * SIDE


def test_every_object_is_found_once_with_its_mask(mill):
    picture().save(mill.photos / "upright.png")
    lying = picture().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = TURNED
    lying.save(mill.photos / "turned.png", exif=exif)
    rows = mill.predict("t")
    check_objects(rows["upright"])
    check_objects(rows["turned"])
    assert rows["turned"]["objects"] == rows["upright"]["objects"]


def test_rows_depend_neither_on_the_batch_nor_on_isolation(mill):
    rng = np.random.default_rng(3)
    for number in range(4):
        boxes = []
        for x in range(4, WIDTH - 50, 58):
            for y in range(4, HEIGHT - 50, 58):
                left, top = x + int(rng.integers(14)), y + int(rng.integers(14))
                boxes.append((int(rng.integers(2)), (left, top, left + int(rng.integers(1, 20)), top + 9)))
        picture(boxes).save(mill.photos / f"{number}.png")
    picture().resize((40, 30)).save(mill.photos / "small.png")
    Image.new("RGB", (1, 1), "red").save(mill.photos / "pixel.png")
    Image.new("RGB", (300, 3), "red").save(mill.photos / "strip.png")
    (mill.photos / "broken.png").write_bytes((mill.photos / "0.png").read_bytes()[:-60])
    reference = mill.predict("reference", batch_size=1)
    assert {name: row["status"] for name, row in reference.items()} == dict.fromkeys(reference, "ok") | {
        "broken": "corrupt"
    }
    assert len(reference) == 8
    assert [box_of(found) for found in reference["strip"]["objects"]] == [(0, 0, 300, 3)]
    assert mill.predict("three", batch_size=3) == reference
    assert mill.predict("many", batch_size=64) == reference
    assert mill.predict("isolated", batch_size=2, isolated=True) == reference


def test_images_no_larger_than_a_tile_have_the_untiled_answer(mill):
    for name, size in (("large", (WIDTH, HEIGHT)), ("wide", (WIDTH, 20)), ("pixel", (1, 1))):
        picture().crop((0, 0, *size)).save(mill.photos / f"{name}.png")
    untiled = mill.predict("untiled", tile=None)
    assert mill.predict("tiled", tile=WIDTH) == untiled
    assert mill.predict("beyond", tile=10 * WIDTH) == untiled


def test_a_tile_that_the_model_fails_on_fails_its_image_alone(mill):
    for name in ("good", "bad", "other"):
        image = picture()
        if name == "bad":
            image.putpixel((WIDTH - 3, HEIGHT - 3), (0, 0, 77))
        image.save(mill.photos / f"{name}.png")
    rows = mill.predict("t", engine=RectangleFinder(poison=77), batch_size=8)
    check_objects(rows["good"])
    check_objects(rows["other"])
    assert (rows["bad"]["status"], rows["bad"]["objects"]) == ("failed", None)
    assert rows["bad"]["error"] == "the model failed on this image: too blue"


def test_an_image_that_breaks_between_its_tiles_is_one_row(mill, monkeypatch):
    for name in ("good", "other", "worse"):
        picture().save(mill.photos / f"{name}.png")
    calls = 0
    fit = Preparer._fit

    def sabotaged(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise MemoryError
        return fit(self, *arguments)

    monkeypatch.setattr(Preparer, "_fit", sabotaged)
    rows = mill.predict("t", batch_size=2)
    assert sorted(row["status"] for row in rows.values()) == ["corrupt", "ok", "ok"]
    for row in rows.values():
        if row["status"] == "ok":
            check_objects(row)


# --- through a real slot process


def command(store: str, photos: Path, model: str, table: str, **settings) -> dict[str, dict]:
    chosen = PredictSettings(source=str(photos), model=model, table=table, **settings)
    planned = predict.plan(store, chosen)
    predict.work(store, chosen, planned)
    parts = f"{store}/tables/{table}/parts/**/*.parquet"
    rows = duckdb.sql(f"FROM read_parquet('{parts}')").to_arrow_table().to_pylist()
    return {Path(row["image"]).stem: row for row in rows}


def test_a_slot_sees_tiles(tmp_path):
    store, photos = str(tmp_path / "mill"), tmp_path / "photos"
    photos.mkdir()
    publish_detector(store, tmp_path)
    publish_segmenter(store, tmp_path)
    pixels = np.zeros((40, 72, 3), np.uint8)
    pixels[:, 40:] = 255
    pixels[5, 3] = 150
    Image.fromarray(pixels).save(photos / "half.png")
    broken = io.BytesIO()
    Image.fromarray(pixels).save(broken, "PNG")
    (photos / "broken.png").write_bytes(broken.getvalue()[:60])

    rows = command(store, photos, "tiny_detector", "objects", tile=32, overlap=0.0)
    assert rows["broken"]["status"] == "corrupt"
    # The detector marks (8, 4, 24, 12) of each light input: those are the two tiles of the last of three columns.
    found = sorted(box_of(one) for one in rows["half"]["objects"])
    assert found == [(48, 4, 64, 12), (48, 12, 64, 20)]

    rows = command(store, photos, "tiny_segmenter", "segments", tile=32)
    grey, light = rows["half"]["segments"]
    assert (grey["label"], grey["area"], light["label"], light["area"]) == ("grey", 1, "light", 40 * 32)
    drawn = coco_mask.decode({"size": [40, 72], "counts": light["mask"]})
    np.testing.assert_array_equal(drawn, pixels[..., 0] == 255)
    with pytest.raises(TableMismatch, match=r"--overlap 0\.2 there, 0\.5 now"):
        command(store, photos, "tiny_segmenter", "segments", tile=32, overlap=0.5)
    with pytest.raises(TableMismatch, match=r"--overlap 0\.2 there, None now; --tile 32 there, None now"):
        command(store, photos, "tiny_segmenter", "segments")


def test_tiles_are_refused_where_they_make_no_sense(tmp_path):
    store, photos = str(tmp_path / "mill"), tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (9, 9)).save(photos / "a.png")
    publish_classifier(store, tmp_path)
    with pytest.raises(UsageError, match=r"^--tile does not apply to models of task classify$"):
        command(store, photos, "tiny", "t", tile=640)
    cropping = Card("cropping", "c" * 12, Task.DETECT, "x", ("a",), ResizeRule("crop", 32, 32, short_side=32))
    onnx_file = tmp_path / f"tiny-{'0' * 12}.onnx"
    registry.publish(store, cropping, {"model.onnx": onnx_file})
    with pytest.raises(UsageError, match="--tile needs a model that sees the whole of a tile"):
        command(store, photos, "cropping", "t", tile=640)
    assert not Table(store, "t").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--overlap", "0.2"], "--overlap: it is the overlap of tiles, so it needs --tile", id="alone"),
        pytest.param(["--tile", "640", "--overlap", "0.9"], "--overlap 0.9: input should be less than 0.9", id="large"),
        pytest.param(
            ["--tile", "640", "--overlap", "-0.1"], "--overlap -0.1: input should be greater than or", id="negative"
        ),
        pytest.param(["--tile", "31"], "--tile 31: input should be greater than or equal to 32", id="small tiles"),
    ],
)
@pytest.mark.parametrize("how", [["--direct"], []], ids=["direct", "recorded"])
def test_wrong_tiles_are_one_line(tmp_path, capsys, flags, message, how):
    arguments = ["predict", str(tmp_path), "--model", "m", "--table", "t", "--store", str(tmp_path / "mill")]
    assert main([*arguments, *flags, *how]) == 2
    assert capsys.readouterr().err.startswith(f"pixelmill: {message}")
