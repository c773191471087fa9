"""The images that a training learns from and is validated on, and their files, read as they were ingested."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from models.dataset import NEEDED, Dataset
from models.errors import UsageError
from models.records import Task
from models.splits import Group, assign
from tasks.datasets import datasets
from tasks.storage import open_storage

logger = logging.getLogger("pixelmill.train")

_CARVED = 0.1  # share of the training images that validates where the data set has no validation split
_SHOWN = 5  # names in one message


class _Needs(NamedTuple):
    """What a model learns from, for people."""

    learner: str
    what: str
    sources: str  # that have it


_NEEDS: dict[Task, _Needs] = {
    Task.DETECT: _Needs("a detector", "boxes", "COCO, VOC or YOLO"),
    Task.INSTANCE: _Needs(
        "a model that draws each object",
        "masks of single objects",
        "COCO with polygons or RLE, or YOLO with polygons",
    ),
    Task.SEMANTIC: _Needs("a segmenter", "masks", "polygons, RLE or pairs of image and mask"),
}


class TrainingImages(NamedTuple):
    """Rows of images.parquet."""

    train: pa.Table
    val: pa.Table
    carved: bool  # the validation images are some of the split train, which has that many fewer


@dataclass(frozen=True)
class ImageFiles:
    """Reads image files by index, from any thread or process, and only what was ingested."""

    dataset: str  # NAME@VERSION
    images: tuple[str, ...]  # URIs
    sha256: tuple[str, ...]

    def __call__(self, index: int) -> bytes:
        """Raises UsageError that names an image which is gone or has another content now, and StorageError."""
        uri = self.images[index]
        try:
            data = open_storage(uri).read(uri)
        except FileNotFoundError:
            raise UsageError(f"{uri} is missing, and {self.dataset} needs it: put it back, or ingest again") from None
        if hashlib.sha256(data).hexdigest() != self.sha256[index]:
            raise UsageError(f"{uri} has changed since it became part of {self.dataset}: ingest again")
        return data


def image_files(dataset: Dataset, images: pa.Table, extra: Sequence[Dataset] = ()) -> ImageFiles:
    """The files of some rows of images.parquet, of this data set and of extra ones."""
    return ImageFiles(
        " or ".join(each.reference for each in (dataset, *extra)),
        tuple(images.column("image").to_pylist()),
        tuple(images.column("sha256").to_pylist()),
    )


def training_images(store: str, dataset: Dataset, task: Task, conditional: bool = False) -> TrainingImages:
    """The rows of the splits train and val; where there is no val, a tenth of train, by content and class.

    `conditional`: the model is a generator that is told a class, so that each image needs its label.
    Raises UsageError where nothing can be learned from them.
    """
    if task == Task.CLASSIFY:
        _check_labels(dataset)
    elif task == Task.GENERATE:
        if conditional:
            _check_labels_to_make(dataset)
    elif task in _NEEDS:
        _check_annotations(dataset, task)
    needs_label = task == Task.CLASSIFY or conditional
    train = _usable(datasets.read_images(store, dataset, "train"), dataset, "train", needs_label)
    if not train.num_rows:
        has = ", ".join(f"{name} {count}" for name, count in dataset.splits.items()) or "none"
        raise UsageError(
            f"{dataset.reference} has no images in its split train to learn from; its splits: {has}; "
            "ingest it with --split, e.g. --split train=.8,val=.1,test=.1"
        )
    val = _usable(datasets.read_images(store, dataset, "val"), dataset, "val", needs_label)
    carved = not val.num_rows
    if carved:
        train, val = _carve(train, dataset)
    if task == Task.CLASSIFY:
        _check_classes(train, dataset)
    elif conditional:
        _warn_of_absent(
            [name for name in dataset.classes if name not in set(train.column("label").to_pylist())], dataset, "made"
        )
    elif task in _NEEDS:
        _check_objects(train, val, datasets.read_annotations(store, dataset), dataset, task)
    return TrainingImages(train, val, carved)


def with_extra_data(
    store: str, images: TrainingImages, dataset: Dataset, names: str | None, task: Task, conditional: bool = False
) -> tuple[TrainingImages, tuple[Dataset, ...]]:
    """The images with the training images of other data sets (`names`, with commas) behind their own, and these.

    What is validated and tested on stays as it is; an extra image that is, byte for byte, among the validation or test
    images is left out. Raises NotFound, and UsageError for data that does not fit.
    """
    wanted = dict.fromkeys(name.strip() for name in (names or "").split(",") if name.strip())
    extra = tuple({found.reference: found for found in (datasets.resolve(store, name) for name in wanted)}.values())
    if not extra:
        return images, ()
    held_out = set(images.val.column("sha256").to_pylist())
    held_out |= set(datasets.read_images(store, dataset, "test").column("sha256").to_pylist())
    seen = set(images.train.column("image").to_pylist()) | set(images.val.column("image").to_pylist())
    parts = [images.train]
    for each in extra:
        _check_fits(each, dataset, task, conditional)
        needs_label = task == Task.CLASSIFY or conditional
        rows = _usable(datasets.read_images(store, each, "train"), each, "train", needs_label)
        keep = [
            uri not in seen and digest not in held_out
            for uri, digest in zip(rows.column("image").to_pylist(), rows.column("sha256").to_pylist(), strict=True)
        ]
        if left_out := keep.count(False):
            logger.info("%d images of %s are in %s already, and left out", left_out, each.reference, dataset.reference)
        rows = rows.filter(pa.array(keep, pa.bool_()))
        if not rows.num_rows:
            raise UsageError(f"--extra-data {each.reference} brings no training image that {dataset.reference} lacks")
        seen |= set(rows.column("image").to_pylist())
        logger.info("%d training images of %s are learned from too", rows.num_rows, each.reference)
        parts.append(rows)
    return images._replace(train=pa.concat_tables(parts)), extra


def _check_fits(extra: Dataset, dataset: Dataset, task: Task, conditional: bool) -> None:
    """Raises UsageError where the images of `extra` do not say what those of `dataset` teach."""
    if extra.reference == dataset.reference:
        raise UsageError(f"--extra-data {extra.reference} is the data set itself: name another one")
    lacking = extra.lacks(task) or (["labels"] if conditional and not extra.has_labels else [])
    if lacking:
        raise UsageError(
            f"--extra-data {extra.reference} has no {' and no '.join(lacking)}, "
            f"which a model of task {task} learns from"
        )
    if (NEEDED[task] or conditional) and (unknown := sorted(set(extra.classes) - set(dataset.classes))):
        raise UsageError(
            f"--extra-data {extra.reference} has classes that {dataset.reference} does not have: "
            f"{', '.join(unknown[:_SHOWN])}; those there are {', '.join(dataset.classes[:_SHOWN])}"
        )


def training_annotations(store: str, sources: Sequence[Dataset]) -> pa.Table:
    """The annotations of all of these data sets."""
    return pa.concat_tables([datasets.read_annotations(store, dataset) for dataset in sources])


def _usable(images: pa.Table, dataset: Dataset, split: str, needs_label: bool) -> pa.Table:
    """Without the images that have no label, where each needs one."""
    if not needs_label:
        return images
    labelled = images.filter(pc.is_valid(images.column("label")))
    if left_out := images.num_rows - labelled.num_rows:
        logger.warning("%d images of %s %s have no label and are left out", left_out, dataset.reference, split)
    return labelled


def _check_labels(dataset: Dataset) -> None:
    if not dataset.has_labels:
        raise UsageError(
            f"a classifier learns from images with one label each, and those of {dataset.reference} have none: "
            "ingest a folder with one folder of images per class"
        )
    if len(dataset.classes) < 2:
        raise UsageError(
            f"a classifier tells two classes or more apart, and {dataset.reference} has {len(dataset.classes)}: "
            f"{', '.join(dataset.classes)}"
        )


def _check_labels_to_make(dataset: Dataset) -> None:
    if not dataset.has_labels:
        raise UsageError(
            f"a conditional generator learns from images with one label each, and those of {dataset.reference} have "
            "none: ingest a folder with one folder of images per class, or use --model dcgan or wgan_gp"
        )


def _check_annotations(dataset: Dataset, task: Task) -> None:
    needs = _NEEDS[task]
    if dataset.lacks(task):
        raise UsageError(
            f"{needs.learner} learns from {needs.what}, and {dataset.reference} has none: ingest {needs.sources}"
        )


def labels_of_objects(images: pa.Table, annotations: pa.Table) -> list[set[str]]:
    """The labels of what each image shows, by row of `images`; without crowds and what has none."""
    found: dict[str, set[str]] = {image: set() for image in images.column("image").to_pylist()}
    columns = (annotations.column(name).to_pylist() for name in ("image", "label", "crowd"))
    for image, label, crowd in zip(*columns, strict=True):
        if image in found and label is not None and not crowd:
            found[image].add(label)
    return list(found.values())


def _check_objects(train: pa.Table, val: pa.Table, annotations: pa.Table, dataset: Dataset, task: Task) -> None:
    if task != Task.DETECT:
        annotations = annotations.filter(pc.is_valid(annotations.column("mask")))
    shown = labels_of_objects(train, annotations)
    present = set().union(*shown)
    if not present:
        raise UsageError(
            f"none of the {train.num_rows} training images of {dataset.reference} shows an object that "
            f"{_NEEDS[task].learner} can learn from: ingest it with another --split, or with more annotations"
        )
    if empty := sum(not labels for labels in shown):
        logger.info("%d of %d training images show no object, and teach what none looks like", empty, train.num_rows)
    if not any(labels_of_objects(val, annotations)):
        logger.warning("no validation image shows an object: which epoch is best cannot be told, and the last is kept")
    _warn_of_absent([name for name in dataset.classes if name not in present], dataset)


def _check_classes(train: pa.Table, dataset: Dataset) -> None:
    present = set(train.column("label").to_pylist())
    if len(present) < 2:
        raise UsageError(
            f"all {train.num_rows} training images of {dataset.reference} are of the class {present.pop()}: "
            "there is nothing to tell apart"
        )
    _warn_of_absent([name for name in dataset.classes if name not in present], dataset)


def _warn_of_absent(absent: Sequence[str], dataset: Dataset, missed: str = "recognised") -> None:
    if absent:
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        logger.warning(
            "%d of %d classes have no training image, and will not be %s: %s%s",
            len(absent),
            len(dataset.classes),
            missed,
            ", ".join(absent[:_SHOWN]),
            more,
        )


def _carve(train: pa.Table, dataset: Dataset) -> tuple[pa.Table, pa.Table]:
    """Training images to validate on: always the same, at least one, and no copies of those that remain."""
    numbers = train.column("duplicate_group").to_pylist()
    hashes = train.column("sha256").to_pylist()
    labels = train.column("label").to_pylist()
    members: dict[str, list[int]] = {}
    for row, (number, digest) in enumerate(zip(numbers, hashes, strict=True)):
        members.setdefault(digest if number is None else f"group {number}", []).append(row)
    groups = [
        Group(min(hashes[row] for row in rows), len(rows), _most_common([labels[row] for row in rows]))
        for rows in members.values()
    ]
    splits = assign(groups, {"train": 1 - _CARVED, "val": _CARVED}, dataset.seed)
    chosen = [row for rows, split in zip(members.values(), splits, strict=True) if split == "val" for row in rows]
    if not chosen:
        chosen = min(members.values(), key=lambda rows: min(hashes[row] for row in rows))
    rest = sorted(set(range(train.num_rows)) - set(chosen))
    if not rest:
        raise UsageError(
            f"{dataset.reference} has no split val, and too few different training images to do without some of them: "
            "ingest more images"
        )
    logger.info(
        "%s has no split val: %d of its %d training images, chosen by content, are kept for validation",
        dataset.reference,
        len(chosen),
        train.num_rows,
    )
    return train.take(rest), train.take(sorted(chosen))


def _most_common(labels: Sequence[str | None]) -> str | None:
    return Counter(labels).most_common(1)[0][0]
