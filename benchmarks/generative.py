"""What generative models learn of digits, with fixed epochs and seeds, and judges that have not seen what they made.

    python -m benchmarks.generative                           all models
    python -m benchmarks.generative --models dcgan --size 16  one kind of generator, of another size
    python -m benchmarks.generative --models vae --left-out none 0 1
    python -m benchmarks.generative --models cyclegan --styles ink --seeds 0 1
    python -m benchmarks.generative --source FOLDER           a folder per class, such as MNIST as PNG files
    python -m benchmarks.generative --augmentation            a classifier with and without generated images

Everything goes through what the commands call, and figures are those of test images, by the exported ONNX files. The
judge of the generators is a classifier of the same store, trained on the training split. `halves` is the Fréchet
distance between two halves of the real test images: what a perfect generator of half as many images would have. Seconds
are those of the processor, start to end, with what the judge and the export take, so that others at work hardly change
them. For vae and cyclegan see benchmarks.generative_vae and benchmarks.generative_cyclegan.
"""

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import generative_cyclegan, generative_vae
from models.settings.generate import GenerateSettings
from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks.datasets.ingest import ingest
from tasks.digits import write_digits
from tasks.generate import generate
from tasks.train import train

JUDGE = "judge"
DATASET = "digits"
SIDE = 32  # pixels of what the judge sees
SPLIT = "train=.7,val=.15,test=.15"


class Place(NamedTuple):
    """A store with the data set and the judge, and where other files lie: the images in source/, by class."""

    store: str
    scratch: Path
    arguments: argparse.Namespace


Row = Mapping[str, object]  # one line of the result, by column

_GAN_COLUMNS = ("accuracy", "class_coverage", "frechet", "frechet_halves", "kid", "precision", "recall", "diversity")


def gan(place: Place, model: str, seed: int) -> Iterator[Row]:
    """Trains one generator; its figures on the test split."""
    asked = {name: getattr(place.arguments, name) for name in ("epochs", "augment", "lr", "precision")}
    chosen = {name: value for name, value in asked.items() if value is not None}
    began = time.process_time()
    trained = train(
        place.store,
        TrainSettings(
            dataset=DATASET,
            model=model,
            name=model,
            judge=JUDGE,
            image_size=place.arguments.size,
            seed=seed,
            **chosen,
        ),
        on_epoch=lambda row: _say(f"{model} {seed}", row),
    )
    seconds = time.process_time() - began
    test = trained.metrics["test"]
    yield {
        "pixels": place.arguments.size,
        "epochs (best)": f"{trained.epochs} ({trained.best_epoch})",
        **{name: test.get(name) for name in _GAN_COLUMNS},
        "CPU seconds": round(seconds),
    }


def vae(place: Place, model: str, seed: int) -> Iterator[Row]:
    """Trains one autoencoder for each class that is left out, and one for none."""
    source = place.scratch / "source"
    classes = sorted(path.name for path in source.iterdir() if path.is_dir())
    for name in place.arguments.left_out or ["none", *classes]:
        left_out = None if name == "none" else name
        epochs = place.arguments.epochs or generative_vae.EPOCHS
        yield generative_vae.vae(place.store, source, place.scratch, left_out, seed, epochs)


def cyclegan(place: Place, model: str, seed: int) -> Iterator[Row]:
    """Trains one translator for each style."""
    for style in place.arguments.styles:
        epochs = place.arguments.epochs or generative_cyclegan.EPOCHS
        yield generative_cyclegan.cyclegan(place.store, place.scratch, style, seed, epochs)


# Model → what trains and measures it; another kind of generative model is one more function.
RUNS: dict[str, Callable[[Place, str, int], Iterator[Row]]] = {
    "conditional_gan": gan,
    "wgan_gp": gan,
    "dcgan": gan,
    "vae": vae,
    "cyclegan": cyclegan,
}


def augmentation(place: Place, seed: int, per_class: int = 10, made_per_class: int = 100) -> dict[str, float]:
    """Test top-1 of a classifier that knows a few real images per class, without and with images made from these few.

    The conditional generator learns from the same few images, so that nothing else is known. What it makes
    becomes a data set, which is added to the training split.
    """
    few = place.scratch / f"few-{seed}"
    _draw(place.scratch / "source", few / "folder", per_class, seed)
    store = str(few / "mill")
    ingest(store, IngestSettings(source=str(few / "folder"), name="few", format="folder"))
    generator = train(
        store,
        TrainSettings(
            dataset="few",
            model="conditional_gan",
            name="made",
            epochs=place.arguments.epochs or 400,
            augment="strong",
            judge="pixels",
            seed=seed,
        ),
        on_epoch=lambda row: _say(f"few {seed}", row) if row["epoch"] % 20 == 0 else None,
    )
    made = GenerateSettings(
        model=generator.model, count=made_per_class * 10, out=str(few / "made"), as_dataset="made", seed=seed
    )
    generate(store, made)
    found = {}
    for name, extra, epochs in (("real", None, 88), ("real and made", "made", 8)):  # 352 and 280 updates
        settings = TrainSettings(
            dataset="few",
            extra_data=extra,
            model="resnet18",
            name=f"classifier-{epochs}",
            mode="scratch",
            image_size=SIDE,
            flip=False,
            epochs=epochs,
            seed=seed,
        )
        found[name] = train(store, settings).metrics["test"]["top1"]
    return found


def _draw(source: Path, folder: Path, per_class: int, seed: int) -> None:
    """train/, val/ and test/ of a new folder: of each class a few images, ten and fifty."""
    for label in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(label.iterdir())
        rest, test = files[:-50], files[-50:]
        order = np.random.default_rng(seed).permutation(len(rest))
        chosen = {"train": order[:per_class], "val": order[per_class : per_class + 10]}
        for split, paths in ({name: [rest[i] for i in each] for name, each in chosen.items()} | {"test": test}).items():
            (folder / split / label.name).mkdir(parents=True)
            for path in paths:
                shutil.copy(path, folder / split / label.name)


def _say(which: str, row: Mapping[str, Any]) -> None:
    """One line per epoch on stderr."""
    named = ("val_frechet", "val_accuracy", "val_class_coverage", "val_diversity")
    figures = " ".join(f"{name.removeprefix('val_')} {row[name]:.3f}" for name in named if name in row)
    print(f"{which}: epoch {row['epoch']}, {figures}", file=sys.stderr, flush=True)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(cells: Sequence[object]) -> None:
    print(f"| {' | '.join(_shown(cell) for cell in cells)} |", flush=True)


def main() -> None:
    """Prints one row per model and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder per class; by default digits")
    parser.add_argument("--models", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="by default those of pixelmill train; vae 40, cyclegan 12")
    parser.add_argument("--size", type=int, default=SIDE, help="of what the generators make, in pixels")
    parser.add_argument("--left-out", nargs="+", help="vae: classes, and none; by default all of them")
    parser.add_argument(
        "--styles", nargs="+", choices=generative_cyclegan.STYLES, default=[*generative_cyclegan.STYLES]
    )
    parser.add_argument("--augment", choices=("none", "light", "strong"))
    parser.add_argument("--lr", type=float)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--judge-epochs", type=int, default=6)
    parser.add_argument("--augmentation", action="store_true", help="only the experiment with a classifier")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory(prefix="pixelmill-generative-") as folder:
        scratch = Path(folder)
        os.environ["PIXELMILL_TRAINING"] = str(scratch / "training")
        source = scratch / "source"
        if arguments.source:
            source.symlink_to(arguments.source.resolve())
        else:
            write_digits(source)
        place = Place(str(scratch / "mill"), scratch, arguments)
        if arguments.augmentation:
            _print(["seed", "real", "real and made"])
            _print(["---"] * 3)
            rows = []
            for seed in arguments.seeds:
                rows.append(augmentation(place, seed))
                _print([seed, *rows[-1].values()])
            _print(["mean", *(statistics.mean(column) for column in zip(*(row.values() for row in rows), strict=True))])
            return
        if any(RUNS[model] is gan for model in arguments.models):
            _prepare_judge(place)
        header: list[str] = []
        for model in arguments.models:
            for seed in arguments.seeds:
                for row in RUNS[model](place, model, seed):
                    columns = list(dict.fromkeys(("model", "seed", *row)))
                    if columns != header:
                        header = columns
                        _print(header)
                        _print(["---"] * len(header))
                    named = {"model": model, "seed": seed, **row}
                    _print([named[column] for column in columns])


def _prepare_judge(place: Place) -> None:
    """The data set and its judge in the store."""
    ingest(
        place.store,
        IngestSettings(source=str(place.scratch / "source"), name=DATASET, format="folder", split=SPLIT),
    )
    settings = TrainSettings(
        dataset=DATASET,
        model="resnet18",
        name=JUDGE,
        mode="scratch",
        image_size=SIDE,
        flip=False,
        augment="none",
        epochs=place.arguments.judge_epochs,
        export=False,
    )
    trained = train(place.store, settings)
    print(f"judge: validation top-1 {trained.metrics['val']['top1']:.3f}\n", flush=True)


if __name__ == "__main__":
    main()
