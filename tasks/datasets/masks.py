"""Pairs of images and masks, as semantic segmentation has them: for each image a picture whose pixels name classes.

Images lie in images/, imgs/, JPEGImages/ or anywhere else; masks in masks/, labels/, SegmentationClass/ or the like, at
the same place below and under the same name, or with _mask, _gt or so behind it. Pixels are indices (of a palette, or
grey), or colours where the class list has colours; `class_list` says how it is written.

Which class a pixel's value means:
* with a list, the one that the list says. A class called background gives no region; one called void, ignore or
  unlabelled gives regions without label, which are not to be judged. Where the list names no background and gives no
  values, and some mask holds the value one beyond its end, then 0 is background and the list begins at 1;
* without, its value: "1", "2" …;
* 0 that no list names is background; 255 is void, unless the masks hold nothing but 0 and 255: then it is the one
  class, called "foreground" if no list has a name for it.

There is one region for each image and class. Its box says where the class is, not where one object is, so such a data
set has masks, but no boxes to train a detector with.
"""

import posixpath
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from models.errors import UsageError
from models.imaging import masks
from tasks.datasets.class_list import ClassList, find_class_list
from tasks.datasets.label_files import read_ahead, split_named, stem_of
from tasks.datasets.labelled import Labelled, LabelledImage, LabelledRegion, Reject
from tasks.datasets.mask_values import MOST_VALUES, BadMask, MaskValues, NeedsColours, read_mask
from tasks.datasets.tree import Tree, open_annotations

VOID = 255

_IMAGE_FOLDERS = ("images", "imgs", "image", "img", "jpegimages")
_MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass", "segmentation", "gt",
    "ground_truth", "groundtruth",
)  # fmt: skip
_SUFFIX = re.compile(r"(.+?)[_-](masks?|gt|labels?|seg|segmentation|l|p|labelids|labeltrainids)", re.I)
_BACKGROUND = re.compile(r"[_ ]*(background|bg)[_ ]*", re.I)
_IGNORED = re.compile(r"[_ ]*(void|ignored?|unlabell?ed)[_ ]*", re.I)

# The label of a value, and whether it gives a region at all.
_LabelOf = Callable[[MaskValues, int], tuple[str | None, bool]]


def recognise(tree: Tree, annotations: str | None) -> str | None:
    """What was seen, where some image has its mask in a folder for masks; else None. Opens no image."""
    with ExitStack() as stack:
        found = _pair(tree, _mask_tree(tree, annotations, stack))
    likely = {image: mask for image, mask in found.pairs.items() if not mask.lower().endswith((".jpg", ".jpeg"))}
    if not likely:
        return None
    image, mask = next(iter(likely.items()))
    return f"image/mask pairs: {len(likely)}, such as {image} and {mask}"


def read(tree: Tree, annotations: str | None) -> Labelled:
    """All pairs. Images without a mask, masks without an image, and masks that cannot be read are rejected.

    `annotations` is the class list, or the folder of the masks, with or without a list in it. Raises UsageError where
    there are no pairs, or the masks need a class list or another one; NotFound and StorageError.
    """
    with ExitStack() as stack:
        mask_tree = _mask_tree(tree, annotations, stack)
        classes = None
        if annotations is not None:
            files = stack.enter_context(open_annotations(tree, annotations))
            classes = find_class_list(files, named=len(files.files) == 1 and not files.images())
        classes = classes or find_class_list(tree, named=False)
        return _Reader(tree, mask_tree, classes).read()


class _Reader:
    def __init__(self, tree: Tree, mask_tree: Tree, classes: ClassList | None):
        self.tree = tree
        self.mask_tree = mask_tree
        self.classes = classes
        self.out = Labelled("masks", "", has_masks=True)

    def read(self) -> Labelled:
        found = _pair(self.tree, self.mask_tree)
        if not found.pairs:
            raise UsageError(
                f"expected images and, under the same names, their masks in a folder {', '.join(_MASK_FOLDERS[:3])} or "
                f"such below {self.tree.name}, found no pair: name the folder of the masks with --annotations"
            )
        for image in found.images_alone:
            self._reject("image", self.tree.uri(image), "no mask", "")
        for path in found.masks_alone:
            self._reject("annotation", self.mask_tree.uri(path), "missing image", "no other image has this mask's name")
        read = self._read_masks(found.pairs)
        label_of, meaning = self._labels(read)
        for path, (image, mask) in read.items():
            self._add_regions(path, image, mask, label_of)
        listed = f"classes from {self.classes.uri}" if self.classes else "classes called by their values"
        self.out.saw = f"image/mask pairs: {len(read)}, {len(self.out.regions)} regions, {listed}; {meaning}"
        return self.out

    def _read_masks(self, pairs: dict[str, str]) -> dict[str, tuple[str, MaskValues]]:
        """Image and mask by the mask's path."""
        read: dict[str, tuple[str, MaskValues]] = {}
        in_colours = ""
        images = {mask: image for image, mask in pairs.items()}
        for path, data in read_ahead(self.mask_tree, images):
            image, source = images[path], self.mask_tree.uri(path)
            try:
                if data is None:
                    raise BadMask("unreadable mask", "it has gone since it was listed")
                mask = read_mask(data, has_colours=bool(self.classes and self.classes.by_colour))
            except BadMask as error:
                in_colours = in_colours or (source if isinstance(error, NeedsColours) else "")
                self._reject("annotation", source, error.reason, error.detail)
                self._reject("image", self.tree.uri(image), "its mask cannot be read", source)
                continue
            read[path] = (image, mask)
            self.out.images.append(LabelledImage(image, split_named(image) or split_named(path), source=source))
        if in_colours and not read:
            raise UsageError(
                f"{in_colours} is a mask in colours, and no list says which is which class: "
                "give a table of name, r, g, b with --annotations"
            )
        return read

    def _labels(self, read: dict[str, tuple[str, MaskValues]]) -> tuple[_LabelOf, str]:
        """What values mean, and the same for people; sets the classes."""
        values = {value for _, mask in read.values() if not mask.is_colour for value in mask.counts}
        by_colour = self.classes.by_colour if self.classes else {}
        names, meaning = self._names(values)
        known = [*by_colour.values()] if by_colour else [names[value] for value in sorted(names)]
        self.out.classes = tuple(
            dict.fromkeys(name for name in known if not _BACKGROUND.fullmatch(name) and not _IGNORED.fullmatch(name))
        )

        def label_of(mask: MaskValues, value: int) -> tuple[str | None, bool]:
            name = (by_colour if mask.is_colour else names).get(value)
            if name is None:
                if value == 0:
                    return None, False
                if value == VOID and not mask.is_colour:
                    return None, True
                return (f"#{value:06x}" if mask.is_colour else str(value)), True
            return (None if _IGNORED.fullmatch(name) else name), not _BACKGROUND.fullmatch(name)

        return label_of, meaning

    def _names(self, values: set[int]) -> tuple[dict[int, str], str]:
        """Names by value for all values that are no colours, and what that means for 0 and 255."""
        names = self.classes.by_value if self.classes else {}
        if values <= {0, VOID} and VOID in values and VOID not in names:
            usable = [name for name in names.values() if not _BACKGROUND.fullmatch(name)]
            if self.classes and len(usable) != 1:
                raise UsageError(
                    f"{self.classes.uri} names {len(usable)} classes, but the masks hold nothing but 0 and 255: "
                    "give a list of one class, or of names and values"
                )
            return {VOID: usable[0] if usable else "foreground"}, "255 is the one class"
        if self.classes is None:
            if len(values) > MOST_VALUES:
                raise UsageError(
                    f"the masks below {self.mask_tree.name} hold {len(values)} different values: too many to be "
                    "classes (are they numbers of instances?): give a class list with --annotations"
                )
            return {value: str(value) for value in values - {0, VOID}}, "0 is background, 255 is void"
        beyond = max(values - {VOID}, default=0) == len(names)
        if not self.classes.values_stated and beyond and not any(map(_BACKGROUND.fullmatch, names.values())):
            return {value + 1: name for value, name in names.items()}, f"0 is background, 1 is {names[0]}"
        return names, f"0 is {names.get(0, 'background')}"

    def _add_regions(self, path: str, image: str, mask: MaskValues, label_of: _LabelOf) -> None:
        by_label: dict[str | None, str] = {}
        height, width = mask.size_hw
        for value, counts in mask.counts.items():
            label, is_region = label_of(mask, value)
            if is_region and label in by_label:  # several colours of one class
                both = masks.decode(by_label[label], height, width) | masks.decode(counts, height, width)
                by_label[label] = masks.encode(both)
            elif is_region:
                by_label[label] = counts
        source = self.mask_tree.uri(path)
        for label, counts in by_label.items():
            self.out.regions.append(LabelledRegion(image, label, source, rle=counts, rle_size_hw=mask.size_hw))

    def _reject(self, kind: str, source: str, reason: str, detail: str) -> None:
        self.out.rejects.append(Reject(kind, source, None, reason, detail))


@dataclass(frozen=True)
class _Pairs:
    pairs: dict[str, str]  # image → mask
    images_alone: list[str]
    masks_alone: list[str]


def _mask_tree(tree: Tree, annotations: str | None, stack: ExitStack) -> Tree:
    if annotations is not None:
        files = stack.enter_context(open_annotations(tree, annotations))
        if files.images():
            return files
    return tree


def _pair(tree: Tree, mask_tree: Tree) -> _Pairs:
    """Images and masks with the same path below their folders, but for endings of the name."""
    apart = mask_tree is not tree
    mask_paths = [path for path in mask_tree.images() if apart or _is_mask(path)]
    if not mask_paths:
        return _Pairs({}, tree.images(), [])
    shown = {mask_tree.uri(path) for path in mask_paths}
    images: dict[tuple[str, str], str] = {}
    for path in tree.images():
        if not _is_mask(path) and tree.uri(path) not in shown:
            images.setdefault(_key(path, _IMAGE_FOLDERS), path)
    pairs: dict[str, str] = {}
    alone = []
    exact = [path for path in mask_paths if _key(path, _MASK_FOLDERS) in images]
    for path in dict.fromkeys((*exact, *mask_paths)):
        folder, stem = _key(path, _MASK_FOLDERS)
        suffix = _SUFFIX.fullmatch(stem)
        image = images.get((folder, stem)) or (images.get((folder, suffix[1])) if suffix else None)
        if image is None or image in pairs:
            alone.append(path)
        else:
            pairs[image] = path
    others = [path for path in tree.images() if not _is_mask(path) and tree.uri(path) not in shown]
    in_order = {image: pairs[image] for image in others if image in pairs}
    return _Pairs(in_order, [path for path in others if path not in pairs], alone)


def _is_mask(path: str) -> bool:
    return any(part.lower() in _MASK_FOLDERS for part in path.split("/")[:-1])


def _key(path: str, folders: tuple[str, ...]) -> tuple[str, str]:
    """The folders on the way but for the one that says what is in it, and the name without extension."""
    kept = [part for part in posixpath.dirname(path).split("/") if part.lower() not in folders]
    return "/".join(kept), stem_of(path)
