"""The frame of benchmarks that train: a folder of labelled images, a fixed number of epochs, figures of the test split.

Everything goes through what the commands call: ingest, train with its export, and the measuring of the ONNX file
through the path that predicts in bulk. Minutes are those of the processor, start to end, so that others at work hardly
change them; compare only rows of one machine.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from models import catalog
from models.errors import PixelmillError
from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks.datasets.ingest import ingest
from tasks.demo import ARCHITECTURE, weights_file
from tasks.train import train

MODES = ("finetune", "features", "scratch")
QUICK_EPOCHS = 1

Figures = Callable[[Mapping[str, Any]], dict[str, float | None]]


def options(description: str, folder: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of each of them. `folder` says what is expected there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=folder)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--weights",
        help=f"of finetune and features: as for pixelmill train; by default those of {ARCHITECTURE} that a package "
        "ships, and for other backbones imagenet, which is downloaded",
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="by default that of pixelmill train")
    parser.add_argument("--augment", choices=("none", "light", "strong"), help="by default that of pixelmill train")
    parser.add_argument("--ema", type=float, help="by default that of pixelmill train")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epoch: does it run?")
    parser.set_defaults(**defaults)
    return parser


def compare(arguments: argparse.Namespace, ingesting: Mapping[str, Any], figures: Figures) -> None:
    """Prints one row per model, mode and seed as a Markdown table. What cannot be had is a row that says why."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory(prefix="pixelmill-training-") as scratch:
        os.environ["PIXELMILL_TRAINING"] = str(Path(scratch, "training"))
        store = str(Path(scratch, "mill"))
        source = IngestSettings(source=str(arguments.folder), name="benchmark", **ingesting)
        ingested = ingest(store, source)
        shares = ", ".join(f"{count} {split}" for split, count in ingested.splits.items())
        print(
            f"{ingested.annotations:,} annotations of {len(ingested.classes)} classes; images: {shares}\n", flush=True
        )
        header: list[str] = []
        for name in arguments.models:
            for mode in arguments.modes:
                for seed in arguments.seeds:
                    began = time.process_time()
                    try:
                        trained = train(
                            store,
                            _settings(arguments, name, mode, seed),
                            on_epoch=partial(_say, f"{name} {mode} {seed}"),
                        )
                    except PixelmillError as error:
                        print(f"\n{name}, {mode}: {error}\n", flush=True)
                        continue
                    found = figures(trained.metrics["test"])
                    columns = ["model", "mode", "seed", "epochs (best)", *found, "CPU minutes"]
                    if columns != header:
                        header = columns
                        print(_row(header) + "\n" + "|---" * len(header) + "|", flush=True)
                    minutes = f"{(time.process_time() - began) / 60:.1f}"
                    epochs = f"{trained.epochs} ({trained.best_epoch})"
                    shown = ["" if value is None else f"{value:.3f}" for value in found.values()]
                    print(_row([name, mode, str(seed), epochs, *shown, minutes]), flush=True)


def _say(which: str, row: Mapping[str, Any]) -> None:
    """One line per epoch on stderr."""
    measured = " ".join(
        f"{key} {value:.3f}" for key, value in row.items() if key.startswith("val_") and value is not None
    )
    print(f"{which}: epoch {row['epoch']}, {measured}", file=sys.stderr, flush=True)


def _settings(arguments: argparse.Namespace, name: str, mode: str, seed: int) -> TrainSettings:
    weights = None if mode == "scratch" else (arguments.weights or _usual_weights(name))
    chosen = {
        key: value
        for key in ("image_size", "batch_size", "lr", "augment", "ema")
        if (value := getattr(arguments, key)) is not None
    }
    return TrainSettings(
        dataset="benchmark",
        model=name,
        name=f"{name}-{mode}-{seed}",
        mode=mode,
        weights=weights,
        epochs=QUICK_EPOCHS if arguments.quick else arguments.epochs,
        seed=seed,
        **chosen,
    )


def _usual_weights(name: str) -> str:
    shipped = weights_file() if catalog.entry(name).backbone == ARCHITECTURE else None
    return str(shipped or "imagenet")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
