"""What a translator makes of digits: as they were drawn into another style, judged by a classifier of that style.

Part of benchmarks.generative. The two data sets show different digits: what of one image belongs to another is never
shown. Of the test images: `accuracy`, how many translated digits are recognised by a support vector machine that has
learnt real digits of the target's style and no translated ones, beside `real`, that of real digits of that style;
`L1 to true`, how far a translation is from the same digit in the target's style, which no training sees. `cycle L1` is
that of the last validation; both are of levels from 0 to 1. No weight keeps colours as they are: they are to change.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.runtime.engine import open_engine
from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks import registry
from tasks.datasets.ingest import ingest
from tasks.digits import DIGIT_SIDE, write_digits
from tasks.photographs import encode_png
from tasks.train import train

SIDE = 16  # pixels
EPOCHS = 12
_TEST = 0.2  # share of the digits

Row = Mapping[str, object]  # one line of the result, by column
Style = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]  # ink [n, side, side] → images [n, side, side, 3]


def drawn(ink: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """White on black."""
    return np.repeat(ink[..., None], 3, axis=3)


def _coloured(paper: tuple[int, int, int], pen: tuple[int, int, int]) -> Style:
    def style(ink: NDArray[np.uint8]) -> NDArray[np.uint8]:
        share = ink[..., None] / 255
        return np.round(np.array(paper) * (1 - share) + np.array(pen) * share).astype(np.uint8)

    return style


STYLES: dict[str, Style] = {
    "coloured": _coloured((20, 30, 90), (250, 220, 60)),
    "ink": _coloured((235, 225, 200), (30, 20, 120)),
    "inverted": _coloured((255, 255, 255), (0, 0, 0)),
}


def cyclegan(store: str, scratch: Path, style: str, seed: int, epochs: int = EPOCHS) -> Row:
    """Trains one translator, and returns its figures on digits that neither data set has shown."""
    ink, classes = digits(scratch / "source")
    order = np.random.default_rng(seed).permutation(len(ink))
    test, rest = np.split(order, [round(_TEST * len(order))])
    of_a, of_b = np.array_split(rest, 2)
    for name, rows, render in (("a", of_a, drawn), ("b", of_b, STYLES[style])):
        folder = scratch / f"{name}-{style}-{seed}"
        folder.mkdir()
        for number, image in zip(rows, render(ink[rows]), strict=True):
            (folder / f"{number:04d}.png").write_bytes(encode_png(image))
        split = "train=.9,val=.1"
        ingest(store, IngestSettings(source=str(folder), name=folder.name, format="folder", split=split))
    began = time.process_time()
    trained = train(
        store,
        TrainSettings(
            dataset=f"a-{style}-{seed}",
            target=f"b-{style}-{seed}",
            model="cyclegan",
            name=f"{style}-{seed}",
            image_size=SIDE,
            epochs=epochs,
            flip=False,
            judge="pixels",
            seed=seed,
        ),
    )
    seconds = time.process_time() - began
    card = registry.resolve(store, trained.model)
    engine = open_engine(registry.fetch_model(store, card), card, engine="onnxruntime", device="cpu")
    small = halved(drawn(ink))
    made = engine.run(small[test])["images_out"]
    real = halved(STYLES[style](ink))
    recognise = recogniser(real[rest], classes[rest])
    validation = card.training["validation"]
    return {
        "style": style,
        "seed": seed,
        "accuracy": float((recognise(made) == classes[test]).mean()),
        "real": float((recognise(real[test]) == classes[test]).mean()),
        "as drawn": float((recognise(small[test]) == classes[test]).mean()),
        "L1 to true": float(np.abs(made.astype(float) - real[test]).mean() / 255),
        "cycle L1": validation["cycle_l1"],
        "identity L1": validation["identity_l1"],
        "frechet": validation["frechet"],
        "epochs (best)": f"{trained.epochs} ({trained.best_epoch})",
        "CPU seconds": round(seconds),
    }


def digits(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Ink [n, 32, 32] of scikit-learn's digits, and which digit each is."""
    from PIL import Image

    write_digits(folder)
    paths = sorted(folder.glob("*/*.png"))
    ink = np.stack([np.asarray(Image.open(path)) for path in paths])
    return ink, np.array([int(path.parent.name) for path in paths])


def halved(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, 32, 32, 3] → [n, 16, 16, 3], as the model's rule does it."""
    from models.imaging.geometry import ResizeRule
    from models.imaging.prepare import Preparer

    preparer = Preparer(ResizeRule("stretch", SIDE, SIDE))
    out = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for image, into in zip(images, out, strict=True):
        preparer.prepare(encode_png(image), into)
    assert images.shape[1] == DIGIT_SIDE
    return out


def recogniser(images: NDArray[np.uint8], classes: NDArray[np.int64]) -> Callable[[NDArray[np.uint8]], NDArray]:
    """A support vector machine that has learnt these images."""
    from sklearn.svm import SVC

    machine = SVC(C=10, gamma="scale").fit(images.reshape(len(images), -1) / 255.0, classes)
    return lambda seen: machine.predict(seen.reshape(len(seen), -1) / 255.0)
