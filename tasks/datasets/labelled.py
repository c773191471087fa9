"""What a reader of one format finds in a source, before any image is opened."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image file that the source has, or that its annotations name."""

    path: str  # below the source, with slashes
    split: str | None = None  # train, val or test, where the source says so
    label: str | None = None  # of the whole image
    width: int | None = None  # as the annotations claim; None: they do not say
    height: int | None = None
    source: str = ""  # URI of the file that names it; "": it was found
    line: int | None = None


@dataclass(frozen=True, slots=True)
class LabelledRegion:
    """One box or mask in an image, as the source has it, right or wrong."""

    image: str  # path of its LabelledImage
    label: str | None  # None: a region to be ignored
    source: str  # URI of the file where it stands
    line: int | None = None
    box_xyxy: tuple[float, float, float, float] | None = None
    polygons: tuple[tuple[float, ...], ...] | None = None  # x and y in turn
    relative: bool = False  # box and polygons are shares of width and height, as in YOLO's files
    rle: str | None = None  # COCO compressed counts
    rle_size_hw: tuple[int, int] | None = None
    area: float | None = None
    crowd: bool = False
    difficult: bool = False


@dataclass(frozen=True, slots=True)
class Reject:
    """One row of rejects.parquet."""

    kind: str  # image or annotation
    source: str  # URI of the file at fault
    line: int | None
    reason: str  # a few words, the same for all of a kind, so that they can be counted
    detail: str = ""


@dataclass
class Labelled:
    """A source as a reader understood it."""

    format: str
    saw: str  # for people: "COCO: 2 annotation files, 80 images"
    classes: tuple[str, ...] | None = None  # in the order of the source; None: it has no order of its own
    images: list[LabelledImage] = field(default_factory=list)
    regions: list[LabelledRegion] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    has_boxes: bool = False
    has_masks: bool = False
