"""Sampling: images of a generator, as many as asked for, each a function of the model, the seed and its number alone.

OUT/generated.json                 what is made here: model, seed, count …; written first, it claims the folder
OUT/00000041.png                   image 41; of a conditional generator OUT/CLASS/00000041.png
OUT/manifest.parquet               one row per image, written last: the set is complete

Images are computed in blocks that always hold the same numbers, because a sum's last digit may hang on how many images
a call computes. So a run that was killed and one that was not write the same bytes, and so do two at once.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from models.card import Card
from models.errors import ModelError, StorageError, UsageError
from models.imaging.encode import SUFFIX, encode
from models.progress import Report, Step, silent
from models.runtime.engine import Engine, open_engine
from models.runtime.latents import draw
from models.settings.generate import GenerateSettings
from models.settings.ingest import IngestSettings
from tasks import registry
from tasks.datasets.ingest import ingest
from tasks.datasets.labelled import Labelled, LabelledImage
from tasks.datasets.tree import Tree
from tasks.storage import Storage, join, normalise, open_storage
from tasks.table import write_parquet
from tasks.work import cores

RECORD_FILE = "generated.json"
MANIFEST_FILE = "manifest.parquet"
BLOCK = 16  # images per call of the model
_WRITERS = 16  # threads; on S3 most of them wait

MANIFEST_SCHEMA = pa.schema(
    [
        ("image", pa.string()),  # URI
        ("number", pa.int64()),  # of its latent vector, from 0
        ("label", pa.string()),  # null: the generator is not told classes
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("model", pa.string()),  # NAME@VERSION
        ("seed", pa.int64()),
    ]
)

_FOLDER = re.compile(r"[A-Za-z0-9][\w .+-]{0,100}")
_FILE = re.compile(r"(\d{8})\.(?:png|jpg|webp)")


@dataclass(frozen=True)
class Generated:
    """What a run made, or found made; the keys of `generate --json`."""

    images: int  # in the set
    out: str
    model: str  # NAME@VERSION
    seed: int
    new: int  # made by this run
    classes: dict[str, int]  # images by class; {} of a generator that is not told any
    manifest: str  # URI
    dataset: str | None  # NAME@VERSION, where it was asked for
    engine: str  # "" where nothing was left to make
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class _Set:
    """What the images of one folder are, by number."""

    out: str
    card: Card  # of the generator's graph
    seed: int
    count: int
    chosen: tuple[int, ...]  # indices into the card's labels, in turn; () of a generator that is not told any
    truncation: float | None
    image_format: Any

    def label_of(self, number: int) -> int | None:
        return self.chosen[number % len(self.chosen)] if self.chosen else None

    def name_of(self, number: int) -> tuple[str, ...]:
        """Folder, if any, and file."""
        file = f"{number:08d}.{SUFFIX[self.image_format]}"
        label = self.label_of(number)
        return (file,) if label is None else (self._folder_of[label], file)

    @cached_property
    def _folder_of(self) -> list[str]:
        """By label; worked out once, for it is asked for each image."""
        same = Counter(name.lower() for name in self.card.labels)
        return [
            name if _FOLDER.fullmatch(name) and same[name.lower()] == 1 else f"class-{label:04d}"
            for label, name in enumerate(self.card.labels)
        ]

    def folders(self) -> list[tuple[str, ...]]:
        return [(self._folder_of[label],) for label in self.chosen] or [()]

    def record(self) -> dict[str, Any]:
        return {
            "model": self.card.reference,
            "seed": self.seed,
            "count": self.count,
            "classes": [self.card.labels[label] for label in self.chosen],
            "truncation": self.truncation,
            "image_format": self.image_format,
        }


def generate(store: str, settings: GenerateSettings, report: Report = silent) -> Generated:
    """Makes what is missing of the set; a set that is complete is left as it is.

    Raises UsageError for a model that makes no images, classes that it does not know, and a folder with other files;
    ModelError, StorageError.
    """
    store = normalise(store)
    began = time.perf_counter()
    card = registry.resolve(store, settings.model)
    file = _check_generates(store, card)
    out = normalise(settings.out)
    if out == store or out.startswith(f"{store}/"):
        raise UsageError(f"--out {out} lies in the store: name a folder outside of it")
    generator = card.as_generator
    chosen = _chosen(generator, settings.classes)
    wanted = _Set(out, generator, settings.seed, settings.count, chosen, settings.truncation, settings.image_format)
    storage = open_storage(out)
    _claim(storage, wanted)
    present = _present(storage, wanted)
    missing = set(range(wanted.count)) - present
    engine_name, digests = "", {}
    if missing:
        path = registry.fetch_model(store, card, file)
        engine = open_engine(path, generator, engine="onnxruntime", device=settings.device, threads=cores())
        try:
            engine_name = engine.name
            digests = _make(storage, wanted, engine, missing, report)
        finally:
            engine.close()
    manifest = join(out, MANIFEST_FILE)
    if missing or not storage.exists(manifest):
        _write_manifest(storage, wanted, digests, report)
    dataset = None
    if settings.as_dataset is not None:
        dataset = _as_dataset(store, wanted, settings.as_dataset, report)
    seconds = time.perf_counter() - began
    counts = Counter(wanted.label_of(number) for number in range(wanted.count)) if chosen else {}
    return Generated(
        images=wanted.count,
        out=out,
        model=card.reference,
        seed=settings.seed,
        new=len(missing),
        classes={card.labels[label]: counts[label] for label in chosen},
        manifest=manifest,
        dataset=dataset,
        engine=engine_name,
        seconds=round(seconds, 3),
        images_per_second=round(len(missing) / seconds, 2),
    )


def _check_generates(store: str, card: Card) -> str:
    """The file of the graph that makes images. Raises UsageError or ModelError that says what is missing."""
    file = card.generator_file
    if file is None:
        able = ", ".join(dict.fromkeys(other.name for other in registry.list_models(store) if other.latent_size))
        raise UsageError(
            f"{card.reference} is a model of task {card.task} and makes no images from nothing; models of "
            f"{store} that do: {able or 'none yet: pixelmill train … --model dcgan'}"
        )
    if file not in card.files:
        base = f"{card.name}@{card.base_version}"
        raise ModelError(
            f"{card.reference} has no {file}: "
            + (f"use {base}" if card.is_variant else f"it was trained without an export: pixelmill export {base}")
        )
    return file


def _chosen(card: Card, classes: str | None) -> tuple[int, ...]:
    """The classes to make in turn, each once."""
    if not card.is_conditional:
        if classes is not None:
            raise UsageError(f"{card.reference} is not told classes, so --classes has no meaning: leave it out")
        return ()
    if classes is None:
        return tuple(range(len(card.labels)))
    names = list(dict.fromkeys(name.strip() for name in classes.split(",")))
    if unknown := [name for name in names if name not in card.labels]:
        raise UsageError(
            f"{card.reference} knows no class {', '.join(map(repr, unknown))}; its classes: {', '.join(card.labels)}"
        )
    return tuple(card.labels.index(name) for name in names)


def _claim(storage: Storage, wanted: _Set) -> None:
    """Writes what is made here. Raises UsageError where the folder holds anything else."""
    if storage.exists(wanted.out):
        raise UsageError(f"--out {wanted.out} is a file: name a new folder")
    uri = join(wanted.out, RECORD_FILE)
    record = wanted.record()
    others = [name for name in storage.names(wanted.out) if not name.startswith(".")]
    if others and RECORD_FILE not in others:
        raise UsageError(f"--out {wanted.out} holds other files ({others[0]} …): name a new folder")
    if storage.put_if_absent(uri, json.dumps(record, indent=2, ensure_ascii=False).encode()):
        return  # it is new, or says the same
    try:
        found = json.loads(storage.read(uri))
        differing = [
            f"{name.replace('_', '-')} {found.get(name)} there, {value} now"
            for name, value in record.items()
            if found.get(name) != value
        ]
    except (ValueError, AttributeError):
        raise UsageError(f"{uri} was not written by pixelmill: name another folder for --out") from None
    raise UsageError(
        f"--out {wanted.out} holds another set ({'; '.join(differing) or 'of another version of pixelmill'}): "
        "name another folder, or repeat the command that made it"
    )


def _present(storage: Storage, wanted: _Set) -> set[int]:
    """The numbers of the images that are there."""
    found: set[int] = set()
    for folder in wanted.folders():
        for name in storage.names(join(wanted.out, *folder)):
            match = _FILE.fullmatch(name)
            if match and int(match[1]) < wanted.count and wanted.name_of(int(match[1])) == (*folder, name):
                found.add(int(match[1]))
    return found


def _make(
    storage: Storage, wanted: _Set, engine: Engine, missing: set[int], report: Report
) -> dict[int, tuple[str, int]]:
    """Computes, encodes and writes the missing images; SHA-256 and size of each that now lies there, by number."""
    blocks = sorted({number // BLOCK for number in missing})
    device = threading.Semaphore(engine.concurrency)
    digests: dict[int, tuple[str, int]] = {}

    def make(block: int) -> dict[int, tuple[str, int]]:
        numbers = range(block * BLOCK, (block + 1) * BLOCK)  # beyond the count, too: see above
        with device:
            images = _images(wanted, engine, numbers)
        files = {
            number: encode(image, wanted.image_format)
            for number, image in zip(numbers, images, strict=True)
            if number in missing
        }
        made = {}
        for number, data in files.items():
            # Where another run was first, its file stays: on other hardware it may differ in a last digit.
            if storage.put_if_absent(join(wanted.out, *wanted.name_of(number)), data):
                made[number] = hashlib.sha256(data).hexdigest(), len(data)
        return made

    done = wanted.count - len(missing)
    report(Step("generating", done, wanted.count))
    with ThreadPoolExecutor(_WRITERS) as threads:
        for made, block in _bounded(threads, make, blocks):
            digests |= made
            done += sum(number in missing for number in range(block * BLOCK, (block + 1) * BLOCK))
            report(Step("generating", done, wanted.count))
    return digests


def _images(wanted: _Set, engine: Engine, numbers: Sequence[int]) -> Any:
    labels = [wanted.label_of(number) for number in numbers] if wanted.chosen else None
    latents = draw(wanted.card, wanted.seed, numbers, labels, wanted.truncation)  # type: ignore[arg-type]
    try:
        return engine.run(latents)["images_out"]  # [BLOCK, height, width, 3]
    except Exception as error:
        raise ModelError(f"{wanted.card.reference} failed on {engine.name}: {' '.join(str(error).split())}") from error


def _bounded(threads: ThreadPoolExecutor, work: Any, blocks: Sequence[int]) -> Iterator[tuple[Any, int]]:
    """The results of all blocks as they come, of which only so many are under way that memory stays flat."""
    running: dict[Future, int] = {}
    waiting = iter(blocks)
    try:
        while True:
            for block in waiting:
                running[threads.submit(work, block)] = block
                if len(running) >= 2 * _WRITERS:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield future.result(), running.pop(future)
    finally:
        for future in running:
            future.cancel()


def _write_manifest(storage: Storage, wanted: _Set, digests: dict[int, tuple[str, int]], report: Report) -> None:
    """One row per image; those of earlier runs are read for it."""
    uris = [join(wanted.out, *wanted.name_of(number)) for number in range(wanted.count)]

    def facts(number: int) -> tuple[str, int]:
        if number in digests:
            return digests[number]
        try:
            data = storage.read(uris[number])
        except FileNotFoundError:
            raise StorageError(f"{uris[number]} vanished while the set was made: run the same command again") from None
        return hashlib.sha256(data).hexdigest(), len(data)

    hashes, sizes = [], []
    with ThreadPoolExecutor(_WRITERS) as threads:
        for done, (digest, size) in enumerate(threads.map(facts, range(wanted.count)), 1):
            hashes.append(digest)
            sizes.append(size)
            if done % 256 == 0:
                report(Step("writing the manifest", done, wanted.count))
    rule = wanted.card.input
    labels = [wanted.label_of(number) for number in range(wanted.count)]
    columns = {
        "image": uris,
        "number": range(wanted.count),
        "label": [None if label is None else wanted.card.labels[label] for label in labels],
        "sha256": hashes,
        "bytes": sizes,
        "width": [rule.width] * wanted.count,
        "height": [rule.height] * wanted.count,
        "model": [wanted.card.reference] * wanted.count,
        "seed": [wanted.seed] * wanted.count,
    }
    data = write_parquet(pa.table({name: list(values) for name, values in columns.items()}, schema=MANIFEST_SCHEMA))
    uri = join(wanted.out, MANIFEST_FILE)
    if not storage.put_if_absent(uri, data):
        raise StorageError(f"{uri} describes other files than are there now: delete {wanted.out} and run it again")


def _as_dataset(store: str, wanted: _Set, name: str, report: Report) -> str:
    """The images as a data set whose only split is train; the number of an image's latent is its file's name."""

    def read(tree: Tree) -> Labelled:
        labelled = Labelled("generated", f"images of {wanted.card.reference}", classes=wanted.card.labels or None)
        for number in range(wanted.count):
            label = wanted.label_of(number)
            path = "/".join(wanted.name_of(number))
            labelled.images.append(LabelledImage(path, "train", None if label is None else wanted.card.labels[label]))
        return labelled

    provenance = {**wanted.record(), "manifest": join(wanted.out, MANIFEST_FILE)}
    settings = IngestSettings(source=wanted.out, name=name, split="train=1")
    return ingest(store, settings, report, read=read, provenance=provenance).dataset
