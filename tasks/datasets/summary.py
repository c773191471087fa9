"""What a data set is like, for people: how its images spread over classes and splits, and what is odd about them."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from models.settings.ingest import SPLITS
from tasks.datasets.images import Kept
from tasks.datasets.labelled import Reject

if TYPE_CHECKING:
    from tasks.datasets.ingest import Ingested

EXAMPLES = 20
_CLASSES_SHOWN = 12


def summarise(
    kept: Sequence[Kept],
    rejects: Sequence[Reject],
    classes: Sequence[str],
    *,
    near: int,
    moved: int,
    ignored: dict[str, int],
) -> dict[str, Any]:
    """The summary in dataset.json. `near`: images near another, not identical to it; `moved`: to another split."""
    by_class: dict[str, Counter[str]] = {label: Counter() for label in classes}
    annotations: Counter[str] = Counter()
    for each in kept:
        for label in each.labels:
            by_class.setdefault(label, Counter())[each.split] += 1
        annotations.update(row["label"] or "(ignored)" for row in each.annotations)
    sizes = {label: sum(counts.values()) for label, counts in by_class.items()}
    same = _groups(kept, lambda each: each.seen.sha256)
    alike = _groups(kept, lambda each: each.group)
    conflicts = [group for group in same if len({each.image.label for each in group} - {None}) > 1]
    leaks = [group for group in alike if len({each.image.split for each in group} - {None}) > 1]
    return {
        "images_by_class": {
            label: {split: counts[split] for split in SPLITS if counts[split]} for label, counts in by_class.items()
        },
        "largest_class": _with_count(max(sizes, key=lambda label: sizes[label], default=None), sizes),
        "smallest_class": _with_count(min(sizes, key=lambda label: sizes[label], default=None), sizes),
        "images_without_label": sum(not each.labels for each in kept),
        "annotations_by_class": dict(sorted(annotations.items())),
        "width": _spread([each.seen.width for each in kept]),
        "height": _spread([each.seen.height for each in kept]),
        "bytes": _spread([each.seen.bytes for each in kept]),
        "formats": dict(Counter(each.seen.format for each in kept).most_common()),
        "duplicates": {
            "groups": len(alike),
            "identical": sum(map(len, same)),  # images that another one equals byte by byte
            "near": near,
        },
        "label_conflicts": {
            "groups": len(conflicts),
            "examples": [
                [{"image": each.uri, "label": each.image.label} for each in group] for group in conflicts[:EXAMPLES]
            ],
        },
        "leaks": {
            "groups": len(leaks),
            "examples": [[{"image": each.uri, "split": each.split} for each in group] for group in leaks[:EXAMPLES]],
        },
        "moved_to_another_split": moved,
        "rejects": {
            kind: dict(Counter(reject.reason for reject in rejects if reject.kind == kind).most_common())
            for kind in ("image", "annotation")
        },
        "ignored_files": dict(sorted(ignored.items())),
    }


def describe(ingested: "Ingested") -> list[str]:
    """The summary as lines of text."""
    return list(_lines(ingested))


def _lines(ingested: "Ingested") -> Iterator[str]:
    summary = ingested.summary
    yield f"{ingested.dataset}{'' if ingested.new else ' (it was there already; nothing was written)'}"
    yield f"  {ingested.format}: {ingested.saw}"
    splits = ", ".join(f"{split} {count:,}" for split, count in ingested.splits.items())
    counts = [f"{ingested.images:,} images ({splits})"]
    if ingested.annotations:
        counts.append(f"{ingested.annotations:,} annotations")
    yield f"  {', '.join(counts)}"
    if ingested.classes:
        yield from _class_lines(ingested.classes, summary)
    if summary["images_without_label"] and ingested.classes:
        yield f"  {summary['images_without_label']:,} images without any label"
    spreads = [f"{side} {_shown(summary[side])} pixels" for side in ("width", "height")]
    formats = ", ".join(f"{count:,} {name}" for name, count in summary["formats"].items())
    yield f"  {', '.join(spreads)} (smallest, median, largest); {formats}"
    duplicates = summary["duplicates"]
    if duplicates["groups"]:
        yield (
            f"  copies: {duplicates['groups']:,} groups that stay in one split; "
            f"{duplicates['identical']:,} images identical to another, {duplicates['near']:,} nearly so"
        )
    yield from _warning_lines(summary)
    for kind, reasons in summary["rejects"].items():
        if reasons:
            listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            yield f"  rejected {kind}s: {listed}"
    if summary["ignored_files"]:
        ignored = ", ".join(
            f"{count:,} {reason.replace('_', ' ')}" for reason, count in summary["ignored_files"].items()
        )
        yield f"  files passed over: {ignored}"


def _class_lines(classes: Sequence[str], summary: dict[str, Any]) -> Iterator[str]:
    largest, smallest = summary["largest_class"], summary["smallest_class"]
    balance = f"; images per class from {smallest['images']:,} ({smallest['label']}) to {largest['images']:,}"
    yield f"  {len(classes):,} {'classes' if len(classes) > 1 else 'class'}{balance} ({largest['label']}):"
    width = max(map(len, classes[:_CLASSES_SHOWN]))
    for label in classes[:_CLASSES_SHOWN]:
        splits = summary["images_by_class"][label]
        parts = [f"{split} {count:,}" for split, count in splits.items()]
        if label in summary["annotations_by_class"]:
            parts.append(f"{summary['annotations_by_class'][label]:,} annotations")
        yield f"    {label:<{width}}  {', '.join(parts) or 'no image'}"
    if len(classes) > _CLASSES_SHOWN:
        yield f"    and {len(classes) - _CLASSES_SHOWN:,} more"


def _warning_lines(summary: dict[str, Any]) -> Iterator[str]:
    if conflicts := summary["label_conflicts"]["groups"]:
        example = summary["label_conflicts"]["examples"][0]
        shown = ", ".join(f"{each['image']} is {each['label']}" for each in example[:2])
        yield f"  warning: {conflicts:,} times identical images have different labels, such as: {shown}"
    if leaks := summary["leaks"]["groups"]:
        example = summary["leaks"]["examples"][0]
        shown = ", ".join(f"{each['image']} in {each['split']}" for each in example[:2])
        yield f"  warning: {leaks:,} times copies of an image are in different given splits, such as: {shown}"
    if moved := summary["moved_to_another_split"]:
        yield f"  warning: {moved:,} images left their earlier split to join a copy of themselves"


def _groups(kept: Sequence[Kept], key: Any) -> list[list[Kept]]:
    """Images that share a key, those that are alone left out."""
    groups: dict[Any, list[Kept]] = defaultdict(list)
    for each in kept:
        groups[key(each)].append(each)
    return [group for group in groups.values() if len(group) > 1]


def _with_count(label: str | None, sizes: dict[str, int]) -> dict[str, Any] | None:
    return None if label is None else {"label": label, "images": sizes[label]}


def _spread(values: list[int]) -> list[float]:
    """Smallest, median and largest."""
    return [min(values), median(values), max(values)]


def _shown(spread: list[float]) -> str:
    return " / ".join(f"{value:,.6g}" for value in spread)
