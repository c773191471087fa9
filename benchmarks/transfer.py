"""What transfer learning is worth: the three modes of training at a few images per class, over several seeds.

    npm pack emoji-datasource-google && tar xf emoji-datasource-google-*.tgz
    python -m benchmarks.transfer --emoji ./package    pictures by their Unicode category (animals, food, flags …)
    python -m benchmarks.transfer --source FOLDER      any folder of one folder per class
    python -m benchmarks.transfer                      scikit-learn's digits

Each seed draws other training images; the test images are the same for all. Test top-1 is that of the exported ONNX
file, through the path that predicts in bulk.
"""

import argparse
import json
import logging
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks.datasets.ingest import ingest
from tasks.demo import ARCHITECTURE, weights_file
from tasks.digits import write_digits
from tasks.train import train

MODES = ("scratch", "features", "finetune")


def draw(source: Path, folder: Path, per_class: int, test_per_class: int, seed: int) -> None:
    """Copies images into train/ and test/ of a new folder: the last `test_per_class` of each class are the test."""
    for label in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(label.iterdir())
        rest, test = files[:-test_per_class], files[-test_per_class:]
        chosen = np.random.default_rng(seed).permutation(len(rest))[:per_class]
        for split, paths in (("train", [rest[i] for i in chosen]), ("test", test)):
            (folder / split / label.name).mkdir(parents=True)
            for path in paths:
                shutil.copy(path, folder / split / label.name)


def write_emoji(package: Path, folder: Path) -> None:
    """The pictures of the npm package, in a folder per category; letters, digits and skin tones are left out."""
    for emoji in json.loads((package / "emoji.json").read_text()):
        if emoji["has_img_google"] and emoji["category"] not in ("Component", "Symbols", "People & Body"):
            (folder / emoji["category"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(package / "img/google/64" / emoji["image"], folder / emoji["category"])


def main() -> None:
    """Prints one row per mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder per class; by default digits")
    parser.add_argument("--emoji", type=Path, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--test-per-class", type=int, default=50)
    parser.add_argument("--model", default=ARCHITECTURE)
    parser.add_argument("--weights", default=str(weights_file() or "imagenet"))
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--no-flip", action="store_true", help="left and right differ, as in digits")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    with tempfile.TemporaryDirectory(prefix="pixelmill-transfer-") as scratch:
        source = arguments.source or Path(scratch, "source")
        if arguments.emoji:
            write_emoji(arguments.emoji, source)
        elif not arguments.source:
            write_digits(source)
        store = str(Path(scratch, "mill"))
        print(f"| mode | test top-1 of {arguments.seeds} seeds | mean | seconds |\n|---|---|---|---|", flush=True)
        results: dict[str, list] = {mode: [] for mode in MODES}
        for seed in range(arguments.seeds):
            drawn = Path(scratch, f"drawn-{seed}")
            draw(source, drawn, arguments.per_class, arguments.test_per_class, seed)
            dataset = ingest(store, IngestSettings(source=str(drawn), name=f"drawn{seed}", format="folder")).dataset
            for mode in arguments.modes:
                settings = TrainSettings(
                    dataset=dataset,
                    model=arguments.model,
                    name=f"{mode}{seed}",
                    mode=mode,
                    weights=None if mode == "scratch" else arguments.weights,
                    image_size=arguments.image_size,
                    flip=bool(arguments.source or arguments.emoji) and not arguments.no_flip,
                    seed=seed,
                )
                results[mode].append(train(store, settings))
        for mode in arguments.modes:
            top1 = [trained.metrics["test"]["top1"] for trained in results[mode]]
            seconds = statistics.median(trained.seconds for trained in results[mode])
            shown = " ".join(f"{value:.3f}" for value in top1)
            print(f"| {mode} | {shown} | {statistics.mean(top1):.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
