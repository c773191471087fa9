"""Objects that follow their image: cut out, pasted elsewhere, mirrored, turned.

The objects of an image are a dict with a row per object in each value: boxes_xyxy f32 [n, 4] in pixels of the image,
labels i64 [n], ignored bool [n], and perhaps masks bool [n, height, width]. An object that has a mask gets the box of
what is left of the mask; others get the frame of what became of their box.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Objects = dict[str, Any]

_LEAST_VISIBLE = 0.25  # share of an object; of one that a cut leaves less of, nobody can say what it is


def cut_out(target: Objects, top: int, left: int, height: int, width: int, size_hw: tuple[int, int]) -> Objects:
    """The objects of a part of an image that is resized to `size_hw`, without those of which little is left.

    Of an ignored region every rest is kept.
    """
    boxes = target["boxes_xyxy"]  # [n, 4]
    inside = boxes - boxes.new_tensor([left, top, left, top])
    inside = inside.minimum(inside.new_tensor([width, height, width, height])).clamp(min=0)
    visible = _areas(inside) / _areas(boxes).clamp(min=1e-6)
    scale = inside.new_tensor([size_hw[1] / width, size_hw[0] / height] * 2)
    masks = target.get("masks")
    if masks is not None:
        parts = masks[:, top : top + height, left : left + width]  # [n, height, width]
        cut = torch.nonzero(visible < 1).flatten()
        visible = visible.index_put((cut,), _shares(parts[cut], masks[cut], visible[cut]))
        masks = resized(parts, size_hw)
    return _followed(target, inside * scale, visible, masks)


def pasted(target: Objects, top: int, left: int, size_hw: tuple[int, int]) -> Objects:
    """The objects of an image that becomes a part, whole, of one of `size_hw`."""
    moved = {**target, "boxes_xyxy": target["boxes_xyxy"] + target["boxes_xyxy"].new_tensor([left, top] * 2)}
    if (masks := target.get("masks")) is not None:
        moved["masks"] = masks.new_zeros((len(masks), *size_hw))
        moved["masks"][:, top : top + masks.shape[1], left : left + masks.shape[2]] = masks
    return moved


def mirrored(target: Objects, width: int) -> Objects:
    """The objects of an image that is `width` wide, with left and right exchanged."""
    x_min, y_min, x_max, y_max = target["boxes_xyxy"].unbind(dim=1)
    moved = {**target, "boxes_xyxy": torch.stack([width - x_max, y_min, width - x_min, y_max], dim=1)}
    return moved | {"masks": target["masks"].flip(-1)} if "masks" in target else moved


def joined(targets: Sequence[Objects]) -> Objects:
    """The objects of several images that have become one."""
    return {name: torch.cat([target[name] for target in targets]) for name in targets[0]}


def warped(target: Objects, matrix: NDArray[np.float64], size_hw: tuple[int, int]) -> Objects:
    """The objects of an image of `size_hw` that is warped in place; without those of which little is left.

    matrix [2, 3]: where a point (x, y, 1) comes to lie, in pixels. A box becomes the frame of its four corners.
    """
    boxes = target["boxes_xyxy"]  # [n, 4]
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    linear, shift = torch.from_numpy(matrix.astype(np.float32)).split([2, 1], dim=1)
    moved = corners @ linear.T + shift.T  # [n, 4, 2]
    frames = torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1)  # [n, 4]
    inside = frames.minimum(frames.new_tensor([size_hw[1], size_hw[0]] * 2)).clamp(min=0)
    visible = _areas(inside) / _areas(frames).clamp(min=1e-6)
    masks = target.get("masks")
    if masks is not None:
        rows, columns, is_inside = _sources(matrix, size_hw)
        before, masks = masks, masks[:, rows, columns] & is_inside
        cut = torch.nonzero(visible < 1).flatten()
        visible = visible.index_put((cut,), _shares(masks[cut], before[cut], visible[cut]))
    return _followed(target, inside, visible, masks)


def resized(masks: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Masks [n, height, width] → [n, *size_hw]; each pixel is what the mask is at its centre."""
    rows, columns = (
        ((torch.arange(size, device=masks.device) + 0.5) * (source / size)).long().clamp(max=source - 1)
        for size, source in zip(size_hw, masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns]


def framed(masks: Tensor) -> Tensor:
    """boxes_xyxy f32 [n, 4] of masks [n, height, width]; of an empty one without area."""
    sides = []
    for of_side in (masks.any(dim=1), masks.any(dim=2)):  # [n, width], then [n, height]
        set_ = of_side.to(torch.uint8)
        sides.append((set_.argmax(dim=1), (of_side.shape[1] - set_.flip(1).argmax(dim=1)) * of_side.any(dim=1)))
    (x_min, x_max), (y_min, y_max) = sides
    return torch.stack([x_min, y_min, x_max, y_max], dim=1).float()


def _followed(target: Objects, boxes: Tensor, visible: Tensor, masks: Tensor | None) -> Objects:
    """What remains of the objects; boxes [n, 4] and masks as they are now, visible [n]: what share of them is seen."""
    kept = (_areas(boxes) > 0) & ((visible >= _LEAST_VISIBLE) | target["ignored"])
    moved = {}
    if masks is not None:
        frames = framed(masks)
        shown, had = _areas(frames) > 0, target["masks"].flatten(1).any(dim=1)
        kept &= shown | ~had  # a region may have a box alone
        boxes = torch.where(shown[:, None], frames, boxes)
        moved["masks"] = masks[kept]
    rest = {name: value[kept] for name, value in target.items() if name not in ("boxes_xyxy", "masks")}
    return {"boxes_xyxy": boxes[kept], **rest, **moved}


def _shares(parts: Tensor, masks: Tensor, otherwise: Tensor) -> Tensor:
    """How much of each mask [n, …] its part is; where it is empty, `otherwise` [n]."""
    whole = masks.flatten(1).sum(dim=1)
    return torch.where(whole > 0, parts.flatten(1).sum(dim=1) / whole.clamp(min=1), otherwise)


def _areas(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1)


def _sources(matrix: NDArray[np.float64], size_hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of a warped image the row and the column that its centre comes from, and whether these exist."""
    height, width = size_hw
    linear = np.linalg.inv(matrix[:, :2])
    y, x = np.mgrid[:height, :width] + 0.5
    points = np.stack([x, y], axis=-1) - matrix[:, 2]  # [height, width, 2]
    columns, rows = np.floor(points @ linear.T).astype(np.int64).transpose(2, 0, 1)
    is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    sources = rows.clip(0, height - 1), columns.clip(0, width - 1), is_inside
    return torch.from_numpy(sources[0]), torch.from_numpy(sources[1]), torch.from_numpy(sources[2])
