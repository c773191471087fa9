"""A folder through `predict` against PyTorch with Pillow: the same boxes, labels, scores and masks in the table.

The reference shares nothing with the bulk path but the weights: Pillow decodes, turns and resizes; the network runs in
PyTorch with torchvision's NMS; masks are drawn by torch's grid_sample. Images are resized with the cubic filter, which
is Pillow's to the bit: of the bilinear one a twentieth of the samples differ by a level, and random networks make much
of that. Pillow 13 chooses which side it resizes first by the size; here it is the width.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from models import catalog
from models.card import ONNX_FILE, Card
from models.nets import unet
from models.nets.untrained import build_untrained
from models.runtime.export import export_onnx
from models.settings.predict import PredictSettings
from tasks import predict, registry
from tasks.photographs import prepared_photographs
from tests.tiny_rcnn import LABELS, awake

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]

SIDE = 96
SCORE = 0.3  # both sides drop what is less sure
DOUBT = 0.001  # so near to it either side may drop what the other keeps, and so far may scores differ
# File → crop of a photograph (x, y, width, height), EXIF orientation, options of Pillow's save.
FILES: dict[str, tuple[str, tuple[int, int, int, int], int, dict]] = {
    "wide.png": ("chelsea", (0, 0, 451, 300), 1, {}),
    "high.png": ("astronaut", (100, 20, 140, 400), 1, {}),
    "small.png": ("coffee", (200, 150, 60, 50), 1, {}),
    "exact.png": ("chelsea", (100, 50, SIDE, SIDE), 1, {}),
    "turned.png": ("chelsea", (60, 10, 300, 200), 6, {}),
    "mirrored.png": ("astronaut", (20, 0, 300, 350), 5, {}),
    "wide.jpg": ("coffee", (0, 0, 600, 400), 1, {"quality": 92}),
    "turned.jpg": ("chelsea", (30, 20, 400, 250), 8, {"quality": 90}),
    "fine.jpg": ("astronaut", (0, 0, 512, 512), 1, {"quality": 95, "subsampling": 0}),
    "progressive.jpg": ("coffee", (100, 50, 333, 251), 3, {"quality": 85, "progressive": True}),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    for name, (source, (x, y, width, height), orientation, options) in FILES.items():
        exif = Image.Exif()
        exif[274] = orientation
        cut = getattr(data, source)()[y : y + height, x : x + width]
        Image.fromarray(cut).save(folder / name, exif=exif, **options)
    return folder


def opened(path: Path, card: Card) -> tuple[Tensor, int, int]:
    """The model's input [1, height, width, 3], and width and height of the upright image."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    rule = card.input
    scale = min(rule.height / image.height, rule.width / image.width)
    scaled = (round(image.width * scale), round(image.height * scale))
    canvas = Image.new("RGB", (rule.width, rule.height), rule.pad_rgb)
    narrow = image.resize((scaled[0], image.height), Image.Resampling.BICUBIC)
    canvas.paste(narrow.resize(scaled, Image.Resampling.BICUBIC), (0, 0))
    return torch.from_numpy(np.asarray(canvas).copy())[None], image.width, image.height


def predicted(network: nn.Module, card: Card, images: np.ndarray, photos: Path, folder: Path) -> dict[str, dict]:
    """The rows of a table, by file, of the network's export."""
    store, onnx_file = str(folder / "mill"), folder / ONNX_FILE
    export_onnx(catalog.entry(card.architecture).family_module().graph(network, card), card, onnx_file, images[:2])
    registry.publish(store, card, {ONNX_FILE: onnx_file})
    score = None if card.task == "semantic" else SCORE
    settings = PredictSettings(
        source=str(photos), model=card.name, table="t", score=score, engine="onnxruntime", batch_size=3
    )
    predict.work(store, settings, predict.plan(store, settings))
    rows = duckdb.sql(f"FROM read_parquet('{store}/tables/t/parts/**/*.parquet')").to_arrow_table().to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    return {Path(row["image"]).name: row for row in rows}


def reference(network: nn.Module, card: Card) -> Callable[[Tensor], dict[str, Tensor]]:
    answer = catalog.entry(card.architecture).family_module().reference(network.eval(), card)

    def without_gradients(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return answer(images)

    return without_gradients


def detector(name: str) -> tuple[nn.Module, Card, np.ndarray]:
    if name == "maskrcnn_resnet18":
        network, card, images = awake(name, 128)
        return network, replace(card, input=replace(card.input, interpolation="bicubic")), images
    entry = catalog.entry(name)
    assert entry.input is not None
    rule = replace(entry.input, height=SIDE, width=SIDE, interpolation="bicubic")
    card = Card(name, "0" * 12, entry.task, name, LABELS, rule, score_floor=entry.score_floor)
    images, _ = prepared_photographs(rule, 5)
    family = entry.family_module()
    network = build_untrained(lambda: family.build(entry.builder, len(LABELS)))
    family.wake(network, card, images)
    return network, card, images


def drawn(masks: Tensor, boxes_xyxy: Tensor, width: int, height: int) -> Tensor:
    """Masks [n, m, m] interpolated at the centre of each pixel of the image, zero outside their box: bool [n, h, w]."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    low, size = boxes_xyxy[:, None, :2], (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2])[:, None]
    u = 2 * (x[None] - low[..., 0]) / size[..., 0] - 1  # [n, w]
    v = 2 * (y[None] - low[..., 1]) / size[..., 1] - 1  # [n, h]
    grid = torch.stack(torch.broadcast_tensors(u[:, None, :], v[:, :, None]), dim=-1)  # [n, h, w, 2]
    return grid_sample(masks[:, None].double(), grid.double(), padding_mode="zeros", align_corners=False)[:, 0] > 0.5


def of_row(row: dict) -> dict[str, Tensor]:
    objects = row["objects"]
    return {
        "boxes": torch.tensor([[one[side] for side in ("x_min", "y_min", "x_max", "y_max")] for one in objects]),
        "scores": torch.tensor([one["score"] for one in objects]),
        "labels": torch.tensor([LABELS.index(one["label"]) for one in objects]),
    }


@pytest.mark.parametrize("name", ["yolo_n", "maskrcnn_resnet18"])
def test_objects_in_the_table_are_those_of_pytorch(name, photos, tmp_path):
    network, card, images = detector(name)
    rows = predicted(network, card, images, photos, tmp_path)
    answer = reference(network, card)
    assert rows.keys() == FILES.keys()
    compared, missing, pixels, wrong_pixels = 0, [], 0, 0
    for file, row in rows.items():
        prepared, width, height = opened(photos / file, card)
        assert (row["width"], row["height"]) == (width, height)
        outputs = answer(prepared)
        scale = min(card.input.height / height, card.input.width / width)
        whole = outputs["boxes_xyxy"] / torch.tensor([round(width * scale) / width, round(height * scale) / height] * 2)
        boxes = whole.clamp(min=0).minimum(torch.tensor([width, height] * 2))
        shows = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        tolerance = 0.05 * max(1, max(width, height) / card.input.width)  # pixels; of the input where that is smaller
        found = of_row(row)
        assert (found["scores"].diff() <= 0).all()
        left = set(range(len(found["scores"])))
        for index in torch.argsort(outputs["scores"], descending=True).tolist():
            score = outputs["scores"][index]
            if score < SCORE or not shows[index]:
                continue
            match = next(
                (
                    one
                    for one in sorted(left)
                    if found["labels"][one] == outputs["labels"][index]
                    and abs(found["scores"][one] - score) < DOUBT
                    and (found["boxes"][one] - boxes[index]).abs().max() < tolerance
                ),
                None,
            )
            if match is None:
                missing += [(file, float(score))] if score > SCORE + DOUBT else []
                continue
            left.remove(match)
            compared += 1
            if "masks" in outputs:
                one = row["objects"][match]
                mask = coco_mask.decode({"size": [height, width], "counts": one["mask"]}).astype(bool)
                expected = drawn(outputs["masks"][[index]], whole[[index]], width, height)[0].numpy()
                assert one["area"] == mask.sum()
                pixels += int(expected.sum())
                wrong_pixels += int((mask != expected).sum())
        missing += [(file, float(found["scores"][one])) for one in left if found["scores"][one] > SCORE + DOUBT]
    assert compared > 150
    assert missing == []
    assert (pixels > 0) == (name == "maskrcnn_resnet18")
    assert wrong_pixels <= 0.001 * pixels


@pytest.mark.parametrize("name", ["unet", "unet_resnet34"])
def test_segments_in_the_table_are_the_map_of_pytorch(name, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(unet, "WIDTH", 8)
    network, card, images = detector(name)
    rows = predicted(network, card, images, photos, tmp_path)
    answer = reference(network, card)
    for file, row in rows.items():
        prepared, width, height = opened(photos / file, card)
        class_map = answer(prepared)["class_map"][0]
        scale = min(card.input.height / height, card.input.width / width)
        across = ((torch.arange(width) + 0.5) * round(width * scale) / width).long()
        down = ((torch.arange(height) + 0.5) * round(height * scale) / height).long()
        expected = class_map[down][:, across].numpy()  # [height, width]
        found = np.zeros((height, width), np.uint8)
        for segment in row["segments"]:
            mask = coco_mask.decode({"size": [height, width], "counts": segment["mask"]}).astype(bool)
            assert segment["area"] == mask.sum()
            assert not found[mask].any()
            found[mask] = 1 + LABELS.index(segment["label"])
        assert len(np.unique(expected)) > 2
        assert (found != expected).mean() < 0.001, file
