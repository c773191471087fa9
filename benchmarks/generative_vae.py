"""What an autoencoder keeps of digits, beside PCA of the same dimension, and how strange a digit is that it never saw.

Part of benchmarks.generative. Of a class that is left out all images are test images, and their AUROC is against the
other test images. `nearest` is that of the distance to the nearest training image, pixel by pixel: what needs all of
them at hand.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.learning.embedding_metrics import auroc
from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks import registry
from tasks.calibration import prepared_images
from tasks.datasets import datasets
from tasks.datasets.ingest import ingest
from tasks.train import train

SIDE = 16  # pixels
LATENT = 8
EPOCHS = 40
_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
_ALL = 10**9

Row = Mapping[str, object]  # one line of the result, by column


def draw(source: Path, folder: Path, left_out: str | None, seed: int) -> None:
    """Copies images into train/, val/ and test/ of a new folder; those of the class left out are all test images."""
    for label in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(label.iterdir())
        order = np.random.default_rng((seed, len(files))).permutation(len(files))
        bounds = np.cumsum([0, *(round(share * len(files)) for share in _SHARES.values())])
        for split, first, last in zip(_SHARES, bounds, (*bounds[1:-1], len(files)), strict=False):
            split = "test" if label.name == left_out else split
            (folder / split / label.name).mkdir(parents=True, exist_ok=True)
            for number in order[first:last]:
                shutil.copy(files[number], folder / split / label.name)


def vae(store: str, source: Path, scratch: Path, left_out: str | None, seed: int, epochs: int = EPOCHS) -> Row:
    """Trains one autoencoder, and returns its figures on the test split."""
    name = f"without-{left_out}-{seed}" if left_out is not None else f"all-{seed}"
    draw(source, scratch / name, left_out, seed)
    ingest(store, IngestSettings(source=str(scratch / name), name=name, format="folder"))
    began = time.process_time()
    trained = train(
        store,
        TrainSettings(
            dataset=name, model="vae", name=name, image_size=SIDE, latent_size=LATENT, epochs=epochs, seed=seed
        ),
    )
    seconds = time.process_time() - began
    test = trained.metrics["test"]
    card, dataset = registry.resolve(store, trained.model), datasets.resolve(store, name)
    learnt, _ = prepared_images(store, dataset, "train", card, _ALL)
    seen, names = prepared_images(store, dataset, "test", card, _ALL)
    is_strange = np.array([Path(uri).parent.name == left_out for uri in names])
    distances = nearest(learnt, seen)
    return {
        "left out": left_out or "none",
        "seed": seed,
        "mse": test["mse"],
        "PCA mse": pca_error(learnt, seen, LATENT),
        "elbo": test["elbo"],
        "kl": trained.metrics.get("val", {}).get("kl") or card.training["validation"]["kl"],
        "active": card.training["validation"]["active_units"],
        "AUROC": test["auroc"],
        "nearest": auroc(distances[~is_strange], distances[is_strange]),
        "epochs (best)": f"{trained.epochs} ({trained.best_epoch})",
        "CPU seconds": round(seconds),
    }


def pca_error(learnt: NDArray[np.uint8], seen: NDArray[np.uint8], dimension: int) -> float:
    """The mean squared error of images uint8 [n, height, width, 3], of values 0 to 1, by components of others."""
    from sklearn.decomposition import PCA

    fitted = PCA(dimension, random_state=0).fit(_flat(learnt))
    flat = _flat(seen)
    return float(np.square(fitted.inverse_transform(fitted.transform(flat)) - flat).mean())


def nearest(learnt: NDArray[np.uint8], seen: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The distance of each image that is seen to the nearest that was learnt [n]."""
    a, b = _flat(seen), _flat(learnt)
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0)).min(axis=1)


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return images.reshape(len(images), -1) / 255.0
