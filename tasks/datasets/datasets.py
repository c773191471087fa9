"""Data sets in the store: publish, resolve, list and read. dataset.json is written last; it is the commit of a version.

datasets/NAME/VERSION/dataset.json  images.parquet  annotations.parquet  rejects.parquet
datasets/NAME/images/ab/ab…ef.jpg   copied images, by their content, shared by all versions
"""

import hashlib
import logging
import re
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from models.dataset import ANNOTATIONS_FILE, DATASET_FILE, IMAGES_FILE, REJECTS_FILE, Dataset
from models.errors import NotFound, StorageError, UsageError
from tasks.registry import sha256_of
from tasks.storage import join, normalise, open_storage
from tasks.table import write_parquet

logger = logging.getLogger("pixelmill.datasets")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[0-9a-f]{12}")  # what tells a version from the folder of copied images


def publish(store: str, dataset: Dataset, images: pa.Table, annotations: pa.Table, rejects: pa.Table) -> Dataset:
    """Puts a version into the store and returns it as it stands there; writes nothing if the version exists.

    Raises StorageError if an unfinished attempt left other files there.
    """
    store = normalise(store)
    if (existing := find_version(store, dataset.name, dataset.version)) is not None:
        return existing
    storage = open_storage(store)
    folder = _folder(store, dataset)
    facts, contents = {}, {}
    for name, rows in ((IMAGES_FILE, images), (ANNOTATIONS_FILE, annotations), (REJECTS_FILE, rejects)):
        data = contents[name] = write_parquet(rows)
        facts[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        if not storage.put_if_absent(join(folder, name), data):
            raise StorageError(
                f"{join(folder, name)} is left from an ingest that did not finish, and differs: "
                f"delete {folder} and try again"
            )
    dataset = replace(dataset, files=facts, created_at=datetime.now(UTC).isoformat(timespec="microseconds"))
    if not storage.put_if_absent(join(folder, DATASET_FILE), dataset.to_json().encode()):
        return _read(store, dataset.name, dataset.version)  # another process was first with the same version
    for name in contents.keys() - set(storage.names(folder)):  # it lay there from an earlier attempt, and was removed
        storage.put_if_absent(join(folder, name), contents[name])
    logger.info("published %s", dataset.reference)
    return dataset


def resolve(store: str, reference: str) -> Dataset:
    """The data set for NAME (newest version) or NAME@VERSION. Raises UsageError, or NotFound that lists what exists."""
    store = normalise(store)
    name, at, version = reference.partition("@")
    if not _NAME.fullmatch(name):
        raise UsageError(f"expected a data set as NAME or NAME@VERSION, got {reference!r}")
    if at and _VERSION.fullmatch(version) and (found := find_version(store, name, version)) is not None:
        return found
    versions = list_datasets(store, name)
    if not versions:
        known = ", ".join(dict.fromkeys(dataset.name for dataset in list_datasets(store)))
        raise NotFound(
            f"no data set {name!r} in {store}; data sets there: {known or 'none yet: see pixelmill ingest --help'}"
        )
    if not at:
        return versions[-1]
    known = ", ".join(dataset.version for dataset in versions)
    raise NotFound(f"no {reference!r} in {store}; versions of {name}: {known} (newest last)")


def list_datasets(store: str, name: str | None = None) -> list[Dataset]:
    """All versions of one data set or of all, by name, then from old to new."""
    store = normalise(store)
    storage = open_storage(store)
    datasets = []
    for each in [name] if name is not None else dataset_names(store):
        versions = [v for v in storage.names(join(store, "datasets", each)) if _VERSION.fullmatch(v)]
        found = [dataset for v in versions if (dataset := find_version(store, each, v)) is not None]
        datasets += sorted(found, key=lambda dataset: (dataset.created_at, dataset.version))
    return datasets


def dataset_names(store: str) -> list[str]:
    """The names that the store has folders for; one may hold no finished version yet."""
    return [name for name in open_storage(store).names(join(store, "datasets")) if _NAME.fullmatch(name)]


def find_version(store: str, name: str, version: str) -> Dataset | None:
    """One version; None if it was never published, or not completely."""
    try:
        return _read(store, name, version)
    except FileNotFoundError:
        return None


def images_uri(store: str, dataset: Dataset) -> str:
    """Where images.parquet lies; a list of images that `predict` takes as its source."""
    return file_uri(store, dataset, IMAGES_FILE)


def file_uri(store: str, dataset: Dataset, file: str) -> str:
    """Where one of the files of a version lies."""
    return join(_folder(normalise(store), dataset), file)


def copies_uri(store: str, name: str) -> str:
    """The folder of the copied images of all versions."""
    return join(normalise(store), "datasets", name, "images")


def read_images(store: str, dataset: Dataset, split: str | None = None) -> pa.Table:
    """The rows of images.parquet, all or those of one split. Raises StorageError for a file that is damaged."""
    filters = None if split is None else [("split", "==", split)]
    return _read_table(store, dataset, IMAGES_FILE, filters)


def read_annotations(store: str, dataset: Dataset) -> pa.Table:
    """The rows of annotations.parquet, by image."""
    return _read_table(store, dataset, ANNOTATIONS_FILE)


def read_rejects(store: str, dataset: Dataset) -> pa.Table:
    """The rows of rejects.parquet."""
    return _read_table(store, dataset, REJECTS_FILE)


def _read_table(store: str, dataset: Dataset, file: str, filters: list[tuple] | None = None) -> pa.Table:
    uri = file_uri(store, dataset, file)
    try:
        with open_storage(uri).fetch(uri) as path:
            # The checksums of Parquet cover its pages, not what says how to read them.
            if sha256_of(path) != dataset.files[file]["sha256"]:
                raise StorageError(f"{uri} is damaged: it is not the file that {DATASET_FILE} describes")
            return pq.read_table(path, filters=filters)
    except FileNotFoundError:
        raise StorageError(f"{uri} is missing, though its {DATASET_FILE} is there") from None


def _folder(store: str, dataset: Dataset) -> str:
    return join(store, "datasets", dataset.name, dataset.version)


def _read(store: str, name: str, version: str) -> Dataset:
    uri = join(store, "datasets", name, version, DATASET_FILE)
    data = open_storage(store).read(uri)
    try:
        return Dataset.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{uri} is damaged: {type(error).__name__}: {error}") from None
