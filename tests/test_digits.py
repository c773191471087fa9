"""The labelled images that the demo makes of what scikit-learn ships."""

from collections import Counter

import numpy as np
from PIL import Image

from models.imaging.masks import decode
from models.settings.ingest import IngestSettings
from tasks.datasets import datasets
from tasks.datasets.ingest import ingest
from tasks.digits import DIGIT_SIDE, SCENE_SIDE, write_digits, write_scenes


def test_digits_are_folders_by_class(tmp_path):
    assert write_digits(tmp_path, per_class=3) == 30
    found = Counter(path.parent.name for path in tmp_path.rglob("*.png"))
    assert found == {str(digit): 3 for digit in range(10)}
    first = tmp_path / "0" / "0000.png"
    with Image.open(first) as image:
        assert image.size == (DIGIT_SIDE, DIGIT_SIDE)
    before = first.stat().st_mtime_ns
    assert write_digits(tmp_path, per_class=3) == 30
    assert first.stat().st_mtime_ns == before


def test_scenes_hold_what_their_annotations_say(tmp_path):
    count = write_scenes(tmp_path / "scenes", 4)
    store = str(tmp_path / "mill")
    ingested = ingest(store, IngestSettings(source=str(tmp_path / "scenes"), name="scenes"))
    assert (ingested.format, ingested.images, ingested.annotations, ingested.rejected) == ("coco", 4, count, 0)
    taken = {path: np.zeros((SCENE_SIDE, SCENE_SIDE), int) for path in (tmp_path / "scenes" / "images").iterdir()}
    for row in datasets.read_annotations(store, datasets.resolve(store, "scenes")).to_pylist():
        mask = decode(row["mask"], SCENE_SIDE, SCENE_SIDE)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert (row["x_min"], row["y_min"]) == (columns[0], rows[0])
        assert (row["x_max"], row["y_max"]) == (columns[-1] + 1, rows[-1] + 1)
        assert row["area"] == mask.sum() > 0
        taken[next(path for path in taken if str(path) == row["image"])] += mask
    assert all(mask.max() == 1 for mask in taken.values())  # none covers another

    as_masks = IngestSettings(source=str(tmp_path / "scenes"), name="ink", format="masks")
    ingested = ingest(store, as_masks)
    assert (ingested.images, ingested.annotations, ingested.rejected, ingested.classes) == (4, 4, 0, ["ink"])
    for row in datasets.read_annotations(store, datasets.resolve(store, "ink")).to_pylist():
        inked = next(taken[path] for path in taken if str(path) == row["image"])
        assert np.array_equal(decode(row["mask"], SCENE_SIDE, SCENE_SIDE), inked)
