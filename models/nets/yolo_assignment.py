"""Which place of a single-shot detector learns which object, and the losses of its boxes.

The assignment is task-aligned (Feng et al., TOOD, arXiv 2108.07755, section 3.2): the places that already see an object
best, by the score of its class and by the overlap of their box, are those that learn it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchvision.ops import box_iou

SCORE_POWER = 1.0  # of the alignment metric; the paper's alpha
IOU_POWER = 6.0  # and its beta
PLACES_PER_OBJECT = 13  # m
_EPS = 1e-7
_LEAST = 1e-5  # of score and IoU in the alignment: its sixth power is still a normal float


class Assignment(NamedTuple):
    """What each place of one image is to learn."""

    objects: Tensor  # i64 [places], which object; -1: none
    quality: Tensor  # f32 [places], 0 to 1: the target of the score of the object's class
    ignored: Tensor  # bool [places]: no object, and no example of the background either


def assign(
    scores: Tensor, boxes_xyxy: Tensor, centres_xy: Tensor, target: dict[str, Tensor], smallest_side: float
) -> Assignment:
    """Task-aligned assignment for one image; nothing of it is differentiated.

    scores [places, classes], 0 to 1, and boxes_xyxy [places, 4] are what the network says now; centres_xy [places, 2]
    pixels; target: boxes_xyxy [n, 4], labels [n], ignored [n]. An object is learned by places whose centre lies in it;
    one that is smaller than the distance `smallest_side` of the centres is widened to that, so that there is one.

    t = score · IoU⁶ ranks the places of an object, the first m of which learn it. The quality of these is t, scaled
    so that the best place of an object has the largest IoU that the object meets.
    """
    regions = target["boxes_xyxy"][target["ignored"]]
    objects_xyxy = target["boxes_xyxy"][~target["ignored"]]  # [n, 4]
    labels = target["labels"][~target["ignored"]]
    num_places, num_objects = len(centres_xy), len(objects_xyxy)
    ignored = _inside(centres_xy, regions).any(dim=0)  # [places]
    if num_objects == 0:
        none = torch.full((num_places,), -1, dtype=torch.int64, device=scores.device)
        return Assignment(none, scores.new_zeros(num_places), ignored)

    candidate = _inside(centres_xy, widened(objects_xyxy, smallest_side))  # [n, places]
    iou = box_iou(objects_xyxy, boxes_xyxy)  # [n, places]
    iou = torch.where(iou.isfinite(), iou, 0.0)  # two boxes without area
    alignment = scores[:, labels].T.clamp(min=_LEAST) ** SCORE_POWER * iou.clamp(min=_LEAST) ** IOU_POWER
    alignment = torch.where(candidate, alignment, 0.0)
    best = alignment.topk(min(PLACES_PER_OBJECT, num_places), dim=1).indices  # [n, m]
    chosen = torch.zeros_like(candidate).scatter(1, best, True) & candidate  # [n, places]
    # A place that several objects want learns the one that it overlaps most.
    most = torch.where(chosen, iou, -1.0).argmax(dim=0)  # [places]
    chosen &= torch.arange(num_objects, device=most.device)[:, None] == most

    alignment, iou = torch.where(chosen, alignment, 0.0), torch.where(chosen, iou, 0.0)
    scale = iou.amax(dim=1) / alignment.amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)  # [n]
    quality = (alignment * scale[:, None]).amax(dim=0)  # [places]
    is_object = chosen.any(dim=0)
    return Assignment(torch.where(is_object, most, -1), quality, ignored & ~is_object)


def widened(boxes_xyxy: Tensor, side: float) -> Tensor:
    """The same boxes [n, 4] with sides of at least so many pixels, around the same centres."""
    centres, sides = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    half = sides.clamp(min=side) / 2
    return torch.cat([centres - half, centres + half], dim=1)


def _inside(points_xy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Which boxes [n, 4] hold which points [p, 2] → bool [n, p]; the sides belong to them."""
    after, before = points_xy >= boxes_xyxy[:, None, :2], points_xy <= boxes_xyxy[:, None, 2:]  # [n, p, 2]
    return (after & before).all(dim=2)


def varifocal_loss(logits: Tensor, quality: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """The loss of each score: equation 2 of VarifocalNet (Zhang et al., arXiv 2008.13367), by element.

    logits and quality of one shape; quality q is 0 for the background. With p = sigmoid(logit): -q (q log p + (1 - q)
    log (1 - p)) where q > 0, and -alpha p² log (1 - p) elsewhere with gamma = 2, so that easy background hardly counts.
    """
    weight = torch.where(quality > 0, quality, alpha * logits.detach().sigmoid() ** gamma)
    return weight * binary_cross_entropy_with_logits(logits, quality, reduction="none")


def complete_iou_loss(boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """1 - IoU + d²/c² + a v for each pair of boxes [n, 4] → [n]: equation 10 of Zheng et al., arXiv 1911.08287.

    d is the distance of the centres, c the diagonal of what encloses both, v = 4/π² (arctan w'/h' - arctan w/h)² and
    a = v / (1 - IoU + v), which is a constant to the gradient. Boxes without area have finite losses and gradients too.
    """
    sides, target_sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], targets_xyxy[:, 2:] - targets_xyxy[:, :2]
    top_left = torch.maximum(boxes_xyxy[:, :2], targets_xyxy[:, :2])
    overlap = (torch.minimum(boxes_xyxy[:, 2:], targets_xyxy[:, 2:]) - top_left).clamp(min=0).prod(dim=1)
    iou = overlap / (sides.prod(dim=1) + target_sides.prod(dim=1) - overlap).clamp(min=_EPS)
    enclosing = torch.maximum(boxes_xyxy[:, 2:], targets_xyxy[:, 2:]) - torch.minimum(
        boxes_xyxy[:, :2], targets_xyxy[:, :2]
    )
    between = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:] - targets_xyxy[:, :2] - targets_xyxy[:, 2:]) / 2
    distance = between.square().sum(dim=1) / enclosing.square().sum(dim=1).clamp(min=_EPS)
    angles = [torch.atan(s[:, 0] / s[:, 1].clamp(min=1e-3)) for s in (sides, target_sides)]  # of a thousandth pixel
    aspect = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():
        alpha = aspect / (1 - iou + aspect).clamp(min=_EPS)
    return 1 - iou + distance + alpha * aspect


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """How well distributions meet distances: equation 6 of Generalized Focal Loss (Li et al., arXiv 2006.04388).

    logits [n, bins] over the distances 0, 1, … bins - 1; distances [n], 0 to bins - 1 → [n]: the cross entropies of the
    two whole distances on either side, the nearer the heavier.
    """
    last = logits.shape[1] - 1
    distances = distances.clamp(0, last)
    below = distances.floor().clamp(max=last - 1).long()
    share = distances - below  # of the one above
    return (1 - share) * cross_entropy(logits, below, reduction="none") + share * cross_entropy(
        logits, below + 1, reduction="none"
    )
