"""From what a model found in the tiles of one image, and in the whole of it, to one answer: each object once.

Plain NMS over all tiles goes wrong where a border cuts an object: what one tile shows of it overlaps little with the
whole. So two findings are compared where both of their tiles look, and one that is cut gives way to one that is not.
Source: Akyon, Altinuc, Temizel, arXiv 2202.06934, whose merging goes by the intersection over the smaller box.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from models.errors import Rejected
from models.imaging.geometry import Geometry
from models.records import Task
from models.runtime.results import Detection, Finding, Instances, Segments, Translation

SAME_IOU = 0.5  # of two findings of one class, within what both of their tiles show
SAME_SHARE = 0.5  # of the smaller box, where the lower ranked one may not be the whole object, or was seen coarsely
BORDER = 0.01  # a box that ends within this share of its tile from an inner border is taken to be cut by it

Views = Sequence[tuple[Geometry, Finding]]


def merge_views(task: Task, views: Sequence[tuple[Geometry, Finding | Rejected]]) -> Finding | Rejected:
    """The one answer for an image that the model saw in one or more views.

    Of one view it is that view's. An image of which the model failed on a view is Rejected.
    """
    found: list[tuple[Geometry, Finding]] = []
    for geometry, finding in views:
        if isinstance(finding, Rejected):
            return finding
        found.append((geometry, finding))
    return found[0][1] if len(found) == 1 else MERGES[task](found)


def merge_detections(views: Views) -> Detection:
    """The objects of all views, best first; those of which only pieces were seen are put together."""
    boxes_xyxy, scores, labels, _ = _objects(views)
    return Detection(labels, scores, boxes_xyxy)


def merge_instances(views: Views) -> Instances:
    """As `merge_detections`; the mask of an object of pieces is the union of theirs."""
    from models.imaging.mask_runs import united

    boxes_xyxy, scores, labels, groups = _objects(views)
    masks = [mask for _, finding in views for mask in finding.masks]  # type: ignore[union-attr]
    areas = [area for _, finding in views for area in finding.areas]  # type: ignore[union-attr]
    image = views[0][0]
    drawn = [
        (masks[group[0]], areas[group[0]])
        if len(group) == 1
        else united([masks[row] for row in group], image.height, image.width)
        for group in groups
    ]
    return Instances(
        labels, scores, boxes_xyxy, np.array([area for _, area in drawn], np.float32), [counts for counts, _ in drawn]
    )


def merge_segments(views: Views) -> Segments:
    """Each class over all tiles: their cells share no pixel."""
    from models.imaging.mask_runs import united

    image = views[0][0]
    by_class: dict[int, list[str]] = {}
    for _, finding in views:
        for label, counts in zip(finding.labels, finding.masks, strict=True):  # type: ignore[union-attr]
            by_class.setdefault(int(label), []).append(counts)
    labels = sorted(by_class)
    drawn = [united(by_class[label], image.height, image.width) for label in labels]
    return Segments(
        np.array(labels, np.int64), np.array([area for _, area in drawn], np.float32), [counts for counts, _ in drawn]
    )


def merge_translations(views: Views) -> Translation:
    """What was made of each tile; `models.imaging.restore` blends them."""
    return Translation([view for _, finding in views for view in finding.views])  # type: ignore[union-attr]


MERGES: dict[Task, Callable[[Views], Finding]] = {
    Task.DETECT: merge_detections,
    Task.INSTANCE: merge_instances,
    Task.SEMANTIC: merge_segments,
    Task.TRANSLATE: merge_translations,
}


def _objects(
    views: Views,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], list[list[int]]]:
    """Boxes [k, 4], scores [k] and labels [k] of the objects, best first, and the findings that each is made of.

    Findings are numbered through all views. The first of each group has the best score.
    """
    per_view: list[Detection | Instances] = [finding for _, finding in views]  # type: ignore[misc]
    boxes = np.concatenate([finding.boxes_xyxy for finding in per_view])  # [n, 4]
    scores = np.concatenate([finding.scores for finding in per_view])  # [n]
    labels = np.concatenate([finding.labels for finding in per_view])  # [n]
    groups = group_findings(boxes, scores, labels, [geometry for geometry, _ in views], _view_of(per_view))
    firsts = np.array([group[0] for group in groups], np.int64)
    whole = np.array(
        [[*boxes[group, :2].min(axis=0), *boxes[group, 2:].max(axis=0)] for group in groups], np.float32
    ).reshape(-1, 4)
    order = np.lexsort((*whole.T[::-1], labels[firsts], -scores[firsts]))  # as a view orders its own
    return whole[order], scores[firsts][order], labels[firsts][order], [groups[index] for index in order]


def _view_of(per_view: Sequence[Detection | Instances]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(per_view)), [len(finding.labels) for finding in per_view])


def group_findings(
    boxes_xyxy: NDArray[np.float32],  # [n, 4], pixels of the original
    scores: NDArray[np.float32],  # [n]
    labels: NDArray[np.int64],  # [n]
    geometries: Sequence[Geometry],  # of the views
    view: NDArray[np.int64],  # [n], in which each was found
) -> list[list[int]]:
    """Which findings to keep: one for each object, or several where no view shows it whole.

    A finding is *cut* where it ends at an inner border of its tile. One that another tile shows with room to spare is
    left to that tile. Of the rest, those that are not cut come first, then what the whole image shows of objects that
    some tile must show whole, then those that are cut; each by score. A finding is the same object as one before it, of
    its class and another view, if within what both views show their IoU is over a half; or, but for the first kind, if
    more than half of the smaller box lies in the other. It is dropped; but pieces that are cut, and the same, are kept
    together.
    """
    image = geometries[0]
    shown = np.array([geometry.shown_xyxy for geometry in geometries], np.float64)  # [views, 4]
    edges = np.array([0, 0, image.width, image.height], np.float64)
    outwards = np.array([-1, -1, 1, 1])
    size = shown[:, 2:] - shown[:, :2]
    margin = np.maximum(1.0, BORDER * np.tile(size, 2)) * (shown != edges)  # [views, 4]; none at the image's edge
    inner = shown - outwards * margin
    boxes = boxes_xyxy.astype(np.float64)
    is_cut_at = ((boxes - inner[view]) * outwards >= 0) & (margin[view] > 0)  # [n, 4]
    is_cut = is_cut_at.any(axis=1)
    is_tile = np.array([geometry.tile is not None for geometry in geometries])
    dropped = np.zeros(len(boxes), bool)
    for tile in np.flatnonzero(is_tile):
        has_room = (((inner[tile] - boxes) * outwards > 0) | (margin[tile] == 0)).all(axis=1)
        dropped |= is_cut & has_room & (view != tile)
    fits_a_tile = (boxes[:, 2:] - boxes[:, :2] <= _smallest_overlap(shown[is_tile])).all(axis=1)
    rank = np.where(is_cut, 2, np.where(~is_tile[view] & fits_a_tile, 1, 0))
    # An object goes on where it is cut: without an overlap its pieces meet only there.
    reach = np.where(is_cut_at, shown[view] + outwards * margin[view], boxes)
    seen = shown + outwards * margin
    groups = []
    for first in np.lexsort((np.arange(len(boxes)), -scores, rank)):
        if dropped[first]:
            continue
        dropped[first] = True
        group = [int(first)]
        for member in group:  # it grows
            others = np.flatnonzero(~dropped & (labels == labels[member]) & (view != view[member]))
            same = others[_is_same(member, others, boxes, reach, seen[view], rank)]
            dropped[same] = True
            if rank[first] == 2:
                group += same.tolist()
        groups.append(group)
    return groups


def _is_same(
    one: int,
    others: NDArray[np.int64],
    boxes: NDArray[np.float64],
    reach: NDArray[np.float64],
    seen: NDArray[np.float64],
    rank: NDArray[np.int64],
) -> NDArray[np.bool_]:
    low, high = np.maximum(seen[one, :2], seen[others, :2]), np.minimum(seen[one, 2:], seen[others, 2:])
    mine = np.concatenate([np.maximum(reach[one, :2], low), np.minimum(reach[one, 2:], high)], axis=1)
    theirs = np.concatenate([np.maximum(reach[others, :2], low), np.minimum(reach[others, 2:], high)], axis=1)
    shared = _intersection(mine, theirs)
    iou = _divided(shared, _area(mine) + _area(theirs) - shared)
    smaller = np.minimum(_area(boxes[[one]]), _area(boxes[others]))
    share = _divided(_intersection(boxes[[one]], boxes[others]), smaller)
    return (iou > SAME_IOU) | ((rank[others] > 0) & (share > SAME_SHARE))


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def _intersection(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    return np.prod(np.maximum(high - low, 0), axis=1)


def _divided(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return part / np.where(whole > 0, whole, 1.0)


def _smallest_overlap(tiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Width and height [2] up to which every object lies whole within some tile."""
    found = []
    for axis in (0, 1):
        starts = np.unique(tiles[:, axis])
        side = tiles[0, axis + 2] - tiles[0, axis]
        found.append(side - np.diff(starts).max() if len(starts) > 1 else np.inf)
    return np.array(found)
