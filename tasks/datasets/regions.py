"""From a region as the source has it to a row of the annotations table, or to the reason why it gets none.

Nothing is repaired on the way, with one exception: what lies outside the image by no more than rounding explains is
brought back to its edge. That is 1 pixel, as between tools that count from 0 and from 1, or a thousandth of the side
where that is more, as in YOLO's files with three decimals. What reaches further is refused: cut to the image it would
be another box, and left as it is it would teach a model to look where no pixel is.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any

from models.imaging import masks
from tasks.datasets.labelled import LabelledRegion, Reject

ROUNDING_PX = 1.0
ROUNDING_SHARE = 0.001  # of the side

_SIDES = ("x_min", "y_min", "x_max", "y_max")


class _Refused(Exception):
    """The reason, and the detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def check_regions(
    regions: Iterable[LabelledRegion], width: int, height: int, classes: Collection[str] | None = None
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """The rows and the rejects of all regions of one image, which has this size in pixels.

    Of regions with the same label and geometry the first is kept, the others are rejected as "duplicate". `classes`
    are the labels that there are; None: any.
    """
    rows: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    first: dict[tuple[Any, ...], LabelledRegion] = {}
    for region in regions:
        row = annotation_row(region, width, height, classes)
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        same = first.setdefault(_identity(row), region)
        if same is region:
            rows.append(row)
        else:
            where = "" if same.line is None else f" at {same.line}"
            rejects.append(_reject(region, _Refused("duplicate", f"as{where} in {same.source}")))
    return rows, rejects


def annotation_row(
    region: LabelledRegion, width: int, height: int, classes: Collection[str] | None = None
) -> dict[str, Any] | Reject:
    """A row of ANNOTATIONS_SCHEMA, but for `image`; or the reason why there is none. The size is in pixels.

    Polygons are kept as the source has them, in pixels; the mask is drawn from them. The box is the source's own, else
    that of the polygons or the mask.
    """
    try:
        return _row(region, width, height, classes)
    except _Refused as refused:
        return _reject(region, refused)


def _row(region: LabelledRegion, width: int, height: int, classes: Collection[str] | None) -> dict[str, Any]:
    if region.label is not None and (not region.label or (classes is not None and region.label not in classes)):
        raise _Refused("unknown label", _short(region.label))
    box = None if region.box_xyxy is None else _box(_scaled(region.box_xyxy, region, width, height), width, height)
    polygons, counts = None, None
    if region.polygons is not None:
        polygons = [_polygon(_scaled(polygon, region, width, height), width, height) for polygon in region.polygons]
        counts = _drawn(polygons, width, height)
        box = box or _box(_extent(polygons), width, height)
    elif region.rle is not None:
        counts = region.rle
        if region.rle_size_hw is not None and region.rle_size_hw != (height, width):
            mask_height, mask_width = region.rle_size_hw
            raise _Refused("mask of another size", f"{mask_width}×{mask_height}, the image {width}×{height}")
    pixels = None if counts is None else _pixels(counts, width, height)
    if box is None and counts is not None:
        whole = masks.box_xyxy(counts, height, width)
        box = None if whole is None else (float(whole[0]), float(whole[1]), float(whole[2]), float(whole[3]))
    if box is None:
        raise _Refused("no box and no mask")
    return {
        "label": region.label,
        **dict(zip(_SIDES, box, strict=True)),
        "mask": counts,
        "polygons": polygons,
        "area": _area(region.area, pixels, box),
        "crowd": region.crowd,
        "difficult": region.difficult,
    }


def _scaled(numbers: Iterable[float], region: LabelledRegion, width: int, height: int) -> list[float]:
    """Pixels, all finite; x and y in turn."""
    sides = (width, height) if region.relative else (1, 1)
    pixels = [float(number) * sides[index % 2] for index, number in enumerate(numbers)]
    if not all(map(math.isfinite, pixels)):
        raise _Refused("not finite", ", ".join(f"{number:g}" for number in pixels[:8]))
    return pixels


def _box(box_xyxy: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    x_min, y_min, x_max, y_max = box_xyxy
    shown = f"{x_min:g}, {y_min:g}, {x_max:g}, {y_max:g}"
    if x_max < x_min or y_max < y_min:
        raise _Refused("inverted box", shown)
    if x_max == x_min or y_max == y_min:
        raise _Refused("zero area", shown)
    inside = _inside([x_min, y_min, x_max, y_max], width, height, f"box {shown}")
    if inside[0] == inside[2] or inside[1] == inside[3]:
        raise _Refused("outside the image", f"box {shown}, the image {width}×{height}")
    return (inside[0], inside[1], inside[2], inside[3])


def _polygon(points_xy: list[float], width: int, height: int) -> list[float]:
    if len(points_xy) % 2:
        raise _Refused("malformed polygon", f"{len(points_xy)} numbers are no pairs of x and y")
    if len(points_xy) < 6:
        raise _Refused("too few polygon points", f"{len(points_xy) // 2}, and a polygon has three or more")
    _inside(points_xy, width, height, "polygon")
    return points_xy


def _inside(numbers_xy: list[float], width: int, height: int, what: str) -> list[float]:
    """The same, with what rounding has put outside on the edge; refused where rounding does not explain it."""
    inside = []
    for index, number in enumerate(numbers_xy):
        side = (width, height)[index % 2]
        allowed = max(ROUNDING_PX, ROUNDING_SHARE * side)
        if not -allowed <= number <= side + allowed:
            raise _Refused("outside the image", f"{what}, {'xy'[index % 2]} {number:g} in an image {width}×{height}")
        inside.append(min(max(number, 0.0), float(side)))
    return inside


def _extent(polygons: list[list[float]]) -> list[float]:
    x = [number for polygon in polygons for number in polygon[::2]]
    y = [number for polygon in polygons for number in polygon[1::2]]
    return [min(x), min(y), max(x), max(y)]


def _drawn(polygons: list[list[float]], width: int, height: int) -> str:
    if not polygons:
        raise _Refused("too few polygon points", "no polygon")
    try:
        return masks.encode_polygons(polygons, height, width)
    except ValueError as error:
        raise _Refused("malformed polygon", str(error)) from None


def _pixels(counts: str, width: int, height: int) -> int:
    try:
        pixels = masks.area(counts, height, width)
    except ValueError as error:
        raise _Refused("corrupt mask", str(error)) from None
    if not pixels:
        raise _Refused("empty mask", "no pixel is on")
    return pixels


def _area(stated: float | None, pixels: int | None, box_xyxy: tuple[float, float, float, float]) -> float:
    if stated is None:
        x_min, y_min, x_max, y_max = box_xyxy
        return float(pixels) if pixels is not None else (x_max - x_min) * (y_max - y_min)
    if not math.isfinite(stated):
        raise _Refused("not finite", f"area {stated:g}")
    if stated < 0:
        raise _Refused("negative area", f"{stated:g}")
    return float(stated)


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    polygons = row["polygons"]
    outline = None if polygons is None else tuple(map(tuple, polygons))
    return (row["label"], *(row[side] for side in _SIDES), row["mask"], outline)


def _reject(region: LabelledRegion, refused: _Refused) -> Reject:
    return Reject("annotation", region.source, region.line, refused.reason, refused.detail)


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"
