"""Neighbours: an image is nearest to itself, and the rest come in the order that NumPy finds."""

import json

import numpy as np
import pytest
from PIL import Image

from flows.__main__ import main
from models.errors import NotFound, UsageError
from models.settings.neighbours import NeighboursSettings
from models.settings.predict import PredictSettings
from tasks import predict
from tasks.neighbours import find_neighbours
from tasks.query import ask
from tests.tiny_models import publish_classifier, publish_embedder


def run(store: str, source: str, model: str, table: str) -> None:
    settings = PredictSettings(source=source, model=model, table=table)
    planned = predict.plan(store, settings)
    predict.work(store, settings, planned)


@pytest.fixture(scope="module")
def mill(tmp_path_factory) -> tuple[str, str]:
    """A store with a table of embeddings, of which one image is corrupt, one black and one was changed."""
    folder = tmp_path_factory.mktemp("neighbours")
    store, photos = str(folder / "mill"), folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        Image.new("RGB", (20, 20), tuple(map(int, rng.integers(1, 255, 3)))).save(photos / f"{number:02d}.png")
    Image.new("RGB", (20, 20), "black").save(photos / "black.png")
    (photos / "broken.png").write_bytes((photos / "00.png").read_bytes()[:40])
    publish_embedder(store, folder)
    run(store, str(photos), "tiny_embedder", "vectors")
    Image.new("RGB", (20, 20), (200, 10, 10)).save(photos / "29.png")
    run(store, str(photos), "tiny_embedder", "vectors")
    publish_classifier(store, folder)
    run(store, str(photos), "tiny", "labels")
    return store, str(photos)


def find(mill, image: str, **settings):
    return find_neighbours(mill[0], NeighboursSettings(image=image, **{"table": "vectors", **settings}))


@pytest.mark.parametrize("by", ["cosine", "l2"])
def test_an_image_of_the_table_is_its_own_first_neighbour(mill, by):
    store, photos = mill
    found = find(mill, f"{photos}/07.png", by=by, count=40)
    rows = ask(store, "select image, embedding from vectors where status = 'ok' and model like 'tiny_embedder@%'").rows
    assert (found.in_table, found.compared, len(rows)) == (True, 31, 31)
    assert found.neighbours[0].image == f"{photos}/07.png"
    assert found.neighbours[0].distance == pytest.approx(0, abs=1e-6)
    own = next(np.array(vector) for image, vector in rows if image == f"{photos}/07.png")
    expected = {}
    for image, vector in rows:
        other = np.array(vector)
        norms = np.linalg.norm(own) * np.linalg.norm(other)
        if by == "l2":
            expected[image] = np.linalg.norm(own - other)
        elif norms:  # black has no direction, so it is nobody's neighbour
            expected[image] = 1 - own @ other / norms
    assert [each.distance for each in found.neighbours] == pytest.approx(sorted(expected.values()), abs=1e-5)
    assert {each.image for each in found.neighbours} == expected.keys()


def test_another_file_is_embedded_by_the_table_s_model(mill, tmp_path):
    _, photos = mill
    Image.open(f"{photos}/11.png").save(tmp_path / "copy.bmp")
    found = find(mill, str(tmp_path / "copy.bmp"), count=1)
    assert (found.in_table, [each.image for each in found.neighbours]) == (False, [f"{photos}/11.png"])


def test_an_image_that_changed_is_compared_in_its_newest_version(mill):
    _, photos = mill
    found = find(mill, f"{photos}/29.png", by="l2", count=1)
    assert found.neighbours[0].image == f"{photos}/29.png"
    assert found.neighbours[0].anomaly == pytest.approx((200 + 10 + 10) / 3 / 255, abs=1e-4)


@pytest.mark.parametrize(
    ("image", "settings", "error", "message"),
    [
        pytest.param("nowhere.png", {}, NotFound, "neither an image of table 'vectors' nor a file", id="missing"),
        pytest.param(".", {}, UsageError, "is a folder: name one image", id="folder"),
        pytest.param("broken.png", {}, UsageError, "broken.png is corrupt", id="corrupt"),
        pytest.param("black.png", {}, UsageError, "all zeros.*--by l2", id="no direction"),
        pytest.param("00.png", {"table": "labels"}, UsageError, "holds results of task classify", id="task"),
        pytest.param("00.png", {"table": "none"}, NotFound, "no table 'none'", id="table"),
        pytest.param("00.png", {"model": "other"}, NotFound, "no rows of the model 'other'", id="model"),
    ],
)
def test_what_cannot_be_compared_is_one_line(mill, image, settings, error, message):
    with pytest.raises(error, match=message):
        find(mill, f"{mill[1]}/{image}", **settings)


def test_the_command(mill, capsys):
    store, photos = mill
    image = f"{photos}/03.png"
    assert main(["neighbours", image, "--table", "vectors", "--count", "3", "--store", store, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["neighbours"]), result["neighbours"][0]["image"]) == (3, image)
    assert main(["neighbours", image, "--table", "vectors", "--store", store]) == 0
    assert image in capsys.readouterr().out
