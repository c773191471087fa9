"""From a labelled source to a version of a data set: read labels, open images, check regions, split, publish."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from models.dataset import ANNOTATIONS_SCHEMA, IMAGES_SCHEMA, REJECTS_SCHEMA, Dataset, version_of
from models.errors import NotFound, UsageError
from models.progress import Report, Step, silent
from models.settings.ingest import SPLITS, IngestSettings, parse_split
from tasks.datasets import datasets, formats
from tasks.datasets.grouping import earlier_splits, group_copies, place
from tasks.datasets.images import Kept, copy_name, put_copy, see_images
from tasks.datasets.labelled import Labelled, LabelledImage, LabelledRegion, Reject
from tasks.datasets.regions import check_regions
from tasks.datasets.summary import summarise
from tasks.datasets.tree import Tree, archive_state, open_annotations, open_tree
from tasks.storage import FileState, join, normalise, open_storage
from tasks.work import cores

logger = logging.getLogger("pixelmill.datasets")


@dataclass(frozen=True)
class Ingested:
    """What an ingest made, or found made; the keys of `ingest --json`."""

    dataset: str  # NAME@VERSION
    images: int
    annotations: int
    rejected: int  # by this run
    classes: list[str]
    splits: dict[str, int]
    format: str
    saw: str
    has_labels: bool  # of whole images: a classifier can be trained on it
    new: bool  # False: this version was there, and nothing was written
    summary: dict[str, Any]


def ingest(
    store: str,
    settings: IngestSettings,
    report: Report = silent,
    *,
    read: Callable[[Tree], Labelled] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Ingested:
    """Makes a data set of a source, or finds that it is made already.

    read: says what the images are, in place of the formats. provenance: of images that were made, for the record.
    Whatever cannot be used becomes a row of rejects.parquet. Raises NotFound and UsageError for a source that yields
    nothing, StorageError; then nothing is published, and nothing that is shows.
    """
    store = normalise(store)
    archive = archive_state(settings.source)
    source_state = _state(settings, {"": archive}) if archive else ""
    if archive and (found := _found(store, settings, source_state)):
        return found
    with open_tree(settings.source, exclude=store, report=report) as tree:
        if not archive:
            source_state = _state(settings, tree.files | _outside(tree, settings.annotations))
            if found := _found(store, settings, source_state):
                return found
        report(Step("reading labels", 0, None))
        if read is not None:
            labelled = read(tree)
        else:
            name = formats.recognise(tree, settings.annotations) if settings.format == "auto" else settings.format
            labelled = formats.reader(name).read(tree, settings.annotations)
        copies = datasets.copies_uri(store, settings.name) if settings.copy_images or tree.is_archive else None
        kept, rejects = _open_images(tree, labelled, settings, copies, report)
        listed = len(labelled.images) + sum(reject.kind == "image" for reject in labelled.rejects)
        if not kept:
            raise _nothing_left(tree, listed, rejects)
        rejects += _check_regions(labelled, kept, report)
    assert listed == len(kept) + sum(reject.kind == "image" for reject in rejects), (
        "every image listed is accounted for"
    )

    shares = parse_split(settings.split)
    near = group_copies(kept, report)
    placed_earlier = earlier_splits(store, settings.name, shares, settings.seed)
    moved = place(kept, shares, settings.seed, placed_earlier)
    kept.sort(key=lambda each: each.uri)

    classes = labelled.classes or tuple(sorted(set().union(*(each.labels for each in kept))))
    images, annotations, rejected = _images_table(kept), _annotations_table(kept), _rejects_table(rejects)
    content = version_of(classes, images, annotations)
    dataset = Dataset(
        name=settings.name,
        version=content,
        source=tree.name,
        format=labelled.format,
        saw=labelled.saw,
        source_state=source_state,
        classes=classes,
        has_labels=any(each.image.label is not None for each in kept),
        has_boxes=labelled.has_boxes and annotations.num_rows > 0,
        has_masks=labelled.has_masks and annotations.num_rows > 0,
        listed=listed,
        images=images.num_rows,
        annotations=annotations.num_rows,
        rejected=rejected.num_rows,
        splits={split: count for split in SPLITS if (count := sum(each.split == split for each in kept))},
        split_given=any(each.image.split is not None for each in kept),
        shares=shares,
        seed=settings.seed,
        provenance=dict(provenance or {}),
        summary=summarise(kept, rejects, classes, near=near, moved=moved, ignored=_left_out(tree, labelled)),
    )
    report(Step("writing", 0, None))
    existing = datasets.find_version(store, settings.name, content)
    published = existing or datasets.publish(store, dataset, images, annotations, rejected)
    if existing is not None:
        logger.info("%s is already in the store", existing.reference)
        if existing.rejected != dataset.rejected:
            logger.warning(
                "%d files or annotations were rejected now, %d when %s was made; it stays as it is",
                dataset.rejected,
                existing.rejected,
                existing.reference,
            )
    return _ingested(published, dataset, new=existing is None)


def _state(settings: IngestSettings, files: Mapping[str, FileState]) -> str:
    """A SHA-256 over all that decides what is made: the program, the settings, and every file as it is listed."""
    try:
        program = version("pixelmill")
    except PackageNotFoundError:  # a checkout that is not installed
        program = ""
    digest = hashlib.sha256(f"{program} {settings.model_dump_json(exclude={'name'})}\n".encode())
    for path, state in files.items():
        digest.update(f"{path}\0{state.uri}\0{state.fingerprint}\0{state.bytes}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _outside(tree: Tree, annotations: str | None) -> dict[str, FileState]:
    """The annotation files that lie elsewhere."""
    if annotations is None:
        return {}
    with open_annotations(tree, annotations) as other:
        return {f"annotations {path}": state for path, state in other.files.items()}


def _found(store: str, settings: IngestSettings, source_state: str) -> Ingested | None:
    """The version that was made of this very source, no image opened; None if there is none."""
    for dataset in reversed(datasets.list_datasets(store, settings.name)):
        if dataset.source_state == source_state:
            logger.info("%s: the source is as it was", dataset.reference)
            return _ingested(dataset, dataset, new=False)
    return None


def _ingested(published: Dataset, made: Dataset, *, new: bool) -> Ingested:
    return Ingested(
        dataset=published.reference,
        images=published.images,
        annotations=published.annotations,
        rejected=made.rejected,
        classes=list(published.classes),
        splits=published.splits,
        format=published.format,
        saw=made.saw,
        has_labels=published.has_labels,
        new=new,
        summary=made.summary,
    )


def _open_images(
    tree: Tree, labelled: Labelled, settings: IngestSettings, copies: str | None, report: Report
) -> tuple[list[Kept], list[Reject]]:
    """Every image that is listed, as kept or rejected."""
    rejects = list(labelled.rejects)
    there: dict[str, LabelledImage] = {}
    for image in labelled.images:
        if image.path in there:
            split = f"; there it is in {there[image.path].split}" if image.split != there[image.path].split else ""
            source = image.source or tree.uri(image.path)
            rejects.append(Reject("image", source, image.line, "image named twice", f"{image.path}{split}"))
        elif image.path not in tree.files:
            source = image.source or tree.uri(image.path)
            rejects.append(Reject("image", source, image.line, "missing image", f"{image.path} is not in {tree.name}"))
        else:
            there[image.path] = image
    kept: list[Kept] = []
    same: Counter[str] = Counter()
    images = sorted(there.values(), key=lambda image: image.path)
    seeing = see_images(tree, images, max_pixels=settings.max_pixels, copies=copies, threads=cores())
    for done, (image, seen) in enumerate(seeing, 1):
        if isinstance(seen, Reject):
            rejects.append(seen)
        elif copies is None:
            kept.append(Kept(image, seen, tree.files[image.path].uri))
        else:
            same[seen.sha256] += 1
            uri = join(copies, *copy_name(seen.sha256, seen.format, same[seen.sha256]))
            if same[seen.sha256] > 1:
                put_copy(uri, open_storage(copies).read(join(copies, *copy_name(seen.sha256, seen.format))))
            kept.append(Kept(image, seen, uri))
        if done % 32 == 0 or done == len(images):
            refused = f"{done - len(kept):,} rejected" if done > len(kept) else ""
            report(Step("reading images", done, len(images), refused))
    return kept, rejects


def _check_regions(labelled: Labelled, kept: list[Kept], report: Report) -> list[Reject]:
    """Gives each image its annotations; returns the rejects."""
    regions: dict[str, list[LabelledRegion]] = defaultdict(list)
    for region in labelled.regions:
        regions[region.image].append(region)
    rejects = []
    for done, each in enumerate(kept, 1):
        of_image = regions.pop(each.image.path, None)
        if of_image:
            each.annotations, refused = check_regions(of_image, each.seen.width, each.seen.height, labelled.classes)
            rejects += refused
        if done % 256 == 0:
            report(Step("checking annotations", done, len(kept)))
    for path, of_image in regions.items():
        rejects += [Reject("annotation", each.source, each.line, "its image was rejected", path) for each in of_image]
    return rejects


def _nothing_left(tree: Tree, listed: int, rejects: list[Reject]) -> UsageError:
    if not listed:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(tree.ignored.items()))
        return NotFound(f"no images in {tree.name}" + (f" (ignored: {counts})" if counts else ""))
    of_images = [reject for reject in rejects if reject.kind == "image"]
    reasons = ", ".join(
        f"{count} {reason}" for reason, count in Counter(each.reason for each in of_images).most_common()
    )
    first = of_images[0]
    return UsageError(
        f"none of the {listed} images in {tree.name} can be used: {reasons}; the first: {first.source}: {first.detail}"
    )


def _left_out(tree: Tree, labelled: Labelled) -> dict[str, int]:
    """Files that nobody took for an image of the data set, by reason."""
    named = {tree.uri(image.path) for image in labelled.images} | {reject.source for reject in labelled.rejects}
    others = sum(tree.uri(path) not in named for path in tree.images())
    return tree.ignored | ({"images_elsewhere": others} if others else {})


def _images_table(kept: list[Kept]) -> pa.Table:
    sizes = Counter(each.group for each in kept)
    numbers: dict[int, int] = {}
    for each in kept:
        if sizes[each.group] > 1:
            numbers.setdefault(each.group, len(numbers) + 1)
    columns: dict[str, Callable[[Kept], Any]] = {
        "image": lambda each: each.uri,
        "sha256": lambda each: each.seen.sha256,
        "bytes": lambda each: each.seen.bytes,
        "width": lambda each: each.seen.width,
        "height": lambda each: each.seen.height,
        "format": lambda each: each.seen.format,
        "split": lambda each: each.split,
        "label": lambda each: each.image.label,
        "duplicate_group": lambda each: numbers.get(each.group),
    }
    return pa.table({name: [value(each) for each in kept] for name, value in columns.items()}, schema=IMAGES_SCHEMA)


def _annotations_table(kept: list[Kept]) -> pa.Table:
    """By image, and within it in an order that does not depend on the source's."""
    columns: dict[str, list[Any]] = {name: [] for name in ANNOTATIONS_SCHEMA.names}
    for each in kept:
        for row in sorted(each.annotations, key=_order):
            columns["image"].append(each.uri)
            for name, value in row.items():
                columns[name].append(value)
    return pa.table(columns, schema=ANNOTATIONS_SCHEMA)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["label"] or "", row["x_min"], row["y_min"], row["x_max"], row["y_max"], row["mask"] or "", str(row))


def _rejects_table(rejects: list[Reject]) -> pa.Table:
    rows = sorted((each.kind, each.source, each.line or 0, each.reason, each.detail) for each in rejects)
    columns = list(zip(*rows, strict=True)) or [()] * len(REJECTS_SCHEMA)
    table = dict(zip(REJECTS_SCHEMA.names, map(list, columns), strict=True))
    table["line"] = [line or None for line in table["line"]]
    return pa.table(table, schema=REJECTS_SCHEMA)
