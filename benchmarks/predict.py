"""Throughput of the whole `predict` command against what the cores could do at best; memory by number of images.

The ideal is cores ÷ (decode seconds + inference seconds per image), where each is measured alone, on all cores at once:
decoding of the same files already in memory, and the engine on ready tensors. All three take turns in every round.
What the command does with the answers, boxes and masks in pixels of the original, is in neither: it has to be cheap.

Weights are random, but detectors find some twenty objects in an image, and segmenters tell regions apart.

    python -m benchmarks.predict [--images 2000] [--engine auto] [--models mobilenet_v2 yolo_s …] [--memory]
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
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.photographs import write_photographs
from models import catalog
from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.imaging.prepare import Limits, Preparer
from models.records import Task
from models.runtime.engine import Engine, open_engine
from tasks import registry
from tasks.slot import default_batch_size
from tasks.work import cores

CLASSES = {Task.DETECT: 20, Task.INSTANCE: 20, Task.SEMANTIC: 5}
OBJECTS = 20  # per image
LONGEST_S = 60.0  # of one run: slow models see fewer images


def pixelmill(*arguments: str) -> tuple[dict, float, float]:
    """Runs one command; its JSON result, wall seconds, and the peak memory of its largest process in MB.

    The system counts what this process has held in the child's peak: it means something only where no torch was loaded.
    """
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


def inference_seconds(engine: Engine, images: NDArray[np.uint8], batch_size: int) -> float:
    """Core seconds per image of the engine on ready images [n, height, width, 3], in batches as the command makes."""

    def work(number: int) -> None:
        for start in range(0, len(images), batch_size):
            engine.run(images[start : start + batch_size])

    return on_all_cores(work) / len(images)


def prepared(files: list[bytes], card: Card) -> NDArray[np.uint8]:
    """The images of the files as the model takes them [n, height, width, 3]."""
    images = np.empty((len(files), card.input.height, card.input.width, 3), np.uint8)
    preparer = Preparer(card.input, Limits())
    for data, image in zip(files, images, strict=True):
        preparer.prepare(data, image)
    return images


def publish_untrained(store: str, name: str, files: list[bytes]) -> None:
    """Publishes an architecture with random weights that finds about OBJECTS objects in each of these images."""
    import torch
    from safetensors.torch import save_file

    from models.nets.untrained import build_untrained
    from models.runtime.export import export_onnx
    from models.runtime.parity import check_parity

    entry = catalog.entry(name)
    family = entry.family_module()
    labels = tuple(f"class {number}" for number in range(CLASSES[entry.task]))
    assert entry.input is not None
    card = Card(name, "", entry.task, name, labels, entry.input, score_floor=entry.score_floor)
    images = prepared(files, card)
    network = build_untrained(lambda: family.build(entry.builder, len(labels)))
    family.wake(network, card, images)
    if entry.task is not Task.SEMANTIC:
        with torch.no_grad():
            scores = family.reference(network, card)(torch.from_numpy(images))["scores"].sort(descending=True).values
        last = min(OBJECTS * len(images), len(scores)) - 1
        card = replace(card, score=max(card.score_floor, round(float(scores[last]), 4)))
    with tempfile.TemporaryDirectory(prefix="pixelmill-benchmark-") as folder:
        weights, onnx_file = Path(folder, WEIGHTS_FILE), Path(folder, ONNX_FILE)
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, weights)
        card = replace(card, weights_sha256=registry.sha256_of(weights)).with_version()
        export_onnx(family.graph(network, card), card, onnx_file, images[:2])
        parity = check_parity(network, family, card, onnx_file, images)
        for engine, record in parity.items():
            if engine.startswith("openvino"):
                print(f"{name:20} {engine}: {record}", flush=True)
        registry.publish(store, replace(card, parity=parity), {WEIGHTS_FILE: weights, ONNX_FILE: onnx_file})


def throughput(scratch: Path, name: str, options: argparse.Namespace) -> None:
    """Prints one line for one model."""
    store, photographs = str(scratch / "mill"), scratch / f"photographs-{options.images}"
    card = registry.resolve(store, name)
    engine = open_engine(registry.fetch_model(store, card), card, engine=options.engine, threads=cores())
    batch_size = default_batch_size(card.task, engine.device)
    files = [path.read_bytes() for path in sorted(photographs.iterdir())[:400]]
    images = prepared(files[: (96 if card.task == Task.CLASSIFY else 24)], card)
    rows = []
    for number in range(options.rounds):
        decode = decode_seconds(files, card)
        infer = inference_seconds(engine, images, batch_size)
        ideal = cores() / (decode + infer)
        count = min(options.images, max(len(files), int(LONGEST_S * ideal)))
        result, wall, _ = pixelmill(
            "predict", str(photographs), "--model", name, "--table", f"{name}_{number}", "--store", store,
            "--engine", options.engine, "--limit", str(count), "--direct",
        )  # fmt: skip
        run = count / wall / ideal
        rows.append((decode * 1e3, infer * 1e3, ideal, count / wall, run, work_ratio(result, ideal)))
    decode, infer, ideal, whole, ratio, working = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{name:20} {engine.name:28} decode {decode:6.2f} ms  infer {infer:6.2f} ms  ideal {ideal:7.1f}/s  "
        f"command {whole:7.1f}/s = {ratio:.3f} of the ideal, {working:.3f} without start and end",
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
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet50", "yolo_s", "unet_resnet34", "unet"])
    parser.add_argument("--memory", action="store_true", help="measure memory with the first model instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pixelmill-benchmark-") as folder:
        scratch, store = Path(folder), f"{folder}/mill"
        photographs = scratch / f"photographs-{options.images}"
        write_photographs(photographs, options.images)
        for name in options.models:  # speed does not depend on the weights
            if catalog.entry(name).weights is not None:
                pixelmill("import", f"torchvision:{name}", "--name", name, "--weights", "none", "--store", store)
            else:
                publish_untrained(store, name, [path.read_bytes() for path in sorted(photographs.iterdir())[:6]])
        if options.memory:
            memory(scratch, options.models[0], options)
            return
        for name in options.models:
            throughput(scratch, name, options)


if __name__ == "__main__":
    main()
