"""Labels by folders: one folder per class, with or without a folder per split; or images without labels.

    cats/1.jpg   dogs/2.jpg                 classes
    train/cats/1.jpg   test/dogs/2.jpg      splits of classes
    cats/train/1.jpg   dogs/test/2.jpg      the same, the other way round
    1.jpg   2.jpg                           no labels

Folders that only wrap the others, as archives have them, are looked through.
"""

import unicodedata
from dataclasses import dataclass

from tasks.datasets.labelled import Labelled, LabelledImage, Reject
from tasks.datasets.tree import Tree

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# A single folder of such a name holds images of no class.
_NO_CLASS = {"images", "image", "imgs", "img", "jpegimages", "photos", "pictures", "data"}

Folders = tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """What the folders on the way to an image mean."""

    wrappers: int  # leading folders that mean nothing
    split_at: int | None = None  # which of the others names the split
    label_at: int | None = None  # which of the others names the class


def recognise(tree: Tree, annotations: str | None) -> str | None:
    """Any images will do, unless a file of annotations was named."""
    if annotations is not None or not tree.images():
        return None
    return read(tree, None).saw


def read(tree: Tree, annotations: str | None) -> Labelled:
    """The images with the labels and splits that their folders say; `annotations` has no meaning here."""
    paths = tree.images()
    folders = {path: tuple(path.split("/")[:-1]) for path in paths}
    layout = _layout(list(folders.values()))
    labelled = Labelled("folder", "")
    for path in paths:
        names = folders[path][layout.wrappers :]
        split = _at(names, layout.split_at)
        label = _at(names, layout.label_at)
        if layout.split_at is not None and (split is None or split.lower() not in SPLIT_FOLDERS):
            labelled.rejects.append(Reject("image", tree.uri(path), None, "outside the split folders", path))
        elif layout.label_at is not None and label is None:
            labelled.rejects.append(Reject("image", tree.uri(path), None, "outside the class folders", path))
        else:
            labelled.images.append(
                LabelledImage(
                    path,
                    split=SPLIT_FOLDERS[split.lower()] if split is not None else None,
                    # The same name has two spellings in Unicode, and file systems differ in which they keep.
                    label=unicodedata.normalize("NFC", label) if label is not None else None,
                )
            )
    labelled.saw = _describe(labelled)
    return labelled


def _layout(folders: list[Folders]) -> _Layout:
    wrappers = _wrappers(folders)
    folders = [names[wrappers:] for names in folders]
    tops = {names[0].lower() for names in folders if names}
    if not tops or sum(not names for names in folders) > sum(map(bool, folders)):
        return _Layout(wrappers)  # more images beside the folders than in them
    is_split = tops & SPLIT_FOLDERS.keys()
    if is_split == tops or ("train" in {SPLIT_FOLDERS[name] for name in is_split} and len(is_split) > 1):
        inside = [names[1:] for names in folders if names and names[0].lower() in SPLIT_FOLDERS]
        more = _wrappers(inside)
        inside = [names[more:] for names in inside]
        has_classes = any(inside) and not _is_no_class(inside)
        return _Layout(wrappers, split_at=0, label_at=1 + more if has_classes else None)
    if all(len(names) > 1 and names[1].lower() in SPLIT_FOLDERS for names in folders):
        return _Layout(wrappers, split_at=1, label_at=0)
    return _Layout(wrappers, label_at=None if _is_no_class(folders) else 0)


def _wrappers(folders: list[Folders]) -> int:
    """How many leading folders hold all others, down to those of classes or splits. A few images may stray."""
    count = 0
    while True:
        tops = {names[count] for names in folders if len(names) > count}
        below = [names[count + 1] for names in folders if len(names) > count + 1]
        parts = len(below) == len(folders) or (2 * len(below) > len(folders) and len(set(below)) > 1)
        if len(tops) != 1 or tops.pop().lower() in SPLIT_FOLDERS or not parts:
            return count
        count += 1


def _is_no_class(folders: list[Folders]) -> bool:
    tops = {names[:1] for names in folders}
    return len(tops) == 1 and all(name.lower() in _NO_CLASS for top in tops for name in top)


def _at(names: Folders, index: int | None) -> str | None:
    return names[index] if index is not None and len(names) > index else None


def _describe(labelled: Labelled) -> str:
    images = labelled.images
    labels = {image.label for image in images} - {None}
    splits = [name for name in ("train", "val", "test") if any(image.split == name for image in images)]
    return (
        f"{len(images):,} images "
        + (f"in folders of {len(labels):,} classes" if labels else "without labels")
        + (f", split into {', '.join(splits)}" if splits else "")
    )
