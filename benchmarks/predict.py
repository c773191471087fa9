"""Throughput of the whole `predict` command against what the cores could do at best; memory by number of images.

The ideal is cores ÷ (decode seconds + inference seconds per image), where each is measured alone, on all cores at once:
decoding of the same files already in memory, and the engine on ready tensors. All three take turns in every round.

    python -m benchmarks.predict [--images 2000] [--engine auto] [--models mobilenet_v2 resnet50] [--memory]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.photographs import write_photographs
from models.imaging.prepare import Limits, Preparer
from models.runtime.engine import Engine, open_engine
from tasks import registry
from tasks.slot import default_batch_size
from tasks.work import cores


def pixelmill(*arguments: str) -> tuple[dict, float, float]:
    """Runs one command; its JSON result, wall seconds, and the peak memory of its largest process in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"pixelmill {' '.join(arguments)} ended with status {status}")
    return json.loads(output), seconds, usage.ru_maxrss / 1024


def on_all_cores(work: Callable[[int], None]) -> float:
    """Wall seconds of `work(thread)` run once on each core at the same time."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(cores())]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def decode_seconds(files: list[bytes], card) -> float:
    """Core seconds per image of decoding and resizing, files in memory."""

    def work(number: int) -> None:
        preparer = Preparer(card.input, Limits())
        out = np.empty((card.input.height, card.input.width, 3), np.uint8)
        for data in files[number :: cores()]:
            preparer.prepare(data, out)

    return on_all_cores(work) * cores() / len(files)


def inference_seconds(engine: Engine, card, batch_size: int, batches: int) -> float:
    """Core seconds per image of the engine on ready tensors, in batches as the command makes them."""
    images = np.random.default_rng(0).integers(
        0, 255, (batch_size, card.input.height, card.input.width, 3), dtype=np.uint8
    )

    def work(number: int) -> None:
        for _ in range(batches):
            engine.run(images)

    return on_all_cores(work) / (batches * batch_size)


def throughput(scratch: Path, name: str, options: argparse.Namespace) -> None:
    """Prints one line for one model."""
    store, photographs = str(scratch / "mill"), scratch / f"photographs-{options.images}"
    card = registry.resolve(store, name)
    engine = open_engine(registry.fetch_model(store, card), card, engine=options.engine, threads=cores())
    batch_size = default_batch_size(card.task, engine.device)
    files = [path.read_bytes() for path in sorted(photographs.iterdir())[:400]]
    rows = []
    for number in range(options.rounds):
        decode = decode_seconds(files, card)
        infer = inference_seconds(engine, card, batch_size, 12)
        result, wall, memory = pixelmill(
            "predict", str(photographs), "--model", name, "--table", f"{name}_{number}", "--store", store,
            "--engine", options.engine, "--direct",
        )  # fmt: skip
        ideal = cores() / (decode + infer)
        run = options.images / wall / ideal
        rows.append((decode * 1e3, infer * 1e3, ideal, options.images / wall, run, work_ratio(result, ideal), memory))
    decode, infer, ideal, whole, ratio, working, memory = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    print(
        f"{name:20} {engine.name:28} decode {decode:6.2f} ms  infer {infer:6.2f} ms  ideal {ideal:7.1f}/s  "
        f"command {whole:7.1f}/s = {ratio:.3f} of the ideal, {working:.3f} without start and end  {memory:.0f} MB",
        flush=True,
    )


def work_ratio(result: dict, ideal: float) -> float:
    """Throughput while the slot was at work, as a share of the ideal."""
    return result["rows"] / result["working_seconds"] / ideal


def memory(scratch: Path, name: str, options: argparse.Namespace) -> None:
    """Prints the peak memory of the command at 200, 2,000 and 20,000 images."""
    for count in (200, 2000, 20000):
        folder = scratch / f"photographs-{count}"
        if not folder.exists():
            write_photographs(folder, count)
        peaks = [
            pixelmill(
                "predict", str(folder), "--model", name, "--table", f"memory_{count}_{number}",
                "--store", str(scratch / "mill"), "--engine", options.engine, "--direct",
            )[2]
            for number in range(3 if count < 20000 else 1)
        ]  # fmt: skip
        print(f"{name:20} {count:6} images: peak {statistics.median(peaks):.0f} MB", flush=True)


def main() -> None:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--memory", action="store_true", help="measure memory with the first model instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pixelmill-benchmark-") as folder:
        scratch = Path(folder)
        for name in options.models:  # speed does not depend on the weights
            pixelmill("import", f"torchvision:{name}", "--name", name, "--weights", "none", "--store", f"{folder}/mill")
        if options.memory:
            memory(scratch, options.models[0], options)
            return
        write_photographs(scratch / f"photographs-{options.images}", options.images)
        for name in options.models:
            throughput(scratch, name, options)


if __name__ == "__main__":
    main()
