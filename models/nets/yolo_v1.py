"""The grid detector: Redmon et al., You Only Look Once, arXiv 1506.02640; the first YOLO, for comparison and to learn.

The image is a grid of S×S cells. The cell in which the centre of an object falls is to find it. Every cell says

* for each of B boxes: x and y, the centre of the box within the cell, 0 to 1; w and h, its sides as shares of the
  image; and a confidence, which is to be Pr(object) · IoU(box, object)
* once, for all of its boxes, the C probabilities Pr(class | object)

so that S×S×(5B + C) numbers are the whole answer. The score of a box for a class is (equation 1)

    Pr(class | object) · Pr(object) · IoU = probability of the class · confidence

and greedy suppression leaves one box of those that overlap. Training minimises the sum of squares of equation 3, with
1_i: an object has its centre in cell i, and 1_ij: box j of cell i is responsible for it, because it overlaps it most:

    λ_coord Σ 1_ij [(x - x̂)² + (y - ŷ)²]  +  λ_coord Σ 1_ij [(√w - √ŵ)² + (√h - √ĥ)²]
    + Σ 1_ij (c - ĉ)²  +  λ_noobj Σ (1 - 1_ij) (c - ĉ)²  +  Σ 1_i Σ_classes (p - p̂)²

Square roots, because an error of some pixels matters less in a large box than in a small one; λ_coord = 5 because a
wrong place matters more than a wrong class; λ_noobj = .5 because nearly all cells are empty, and would drown the rest.
The network gives √w and √h themselves, so that no root is ever differentiated at 0.

Of two objects with their centres in one cell the smaller one is lost; this is the weakness of the method with flocks.

What differs from the paper: the backbone is one of torchvision's, with its ImageNet weights; convolutions stand in
place of the two fully connected layers, so that any size of input works, and BatchNorm in place of dropout; cells are
32 pixels wide (S = 14 at 448 pixels) where the paper's are 64 (S = 7), because fewer objects then share one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import box_iou

from models.card import Card
from models.nets.backbone import STRIDES, Backbone, backbone_state, stages
from models.nets.classifiers import MEAN_RGB, STD_RGB
from models.nets.dense_detections import Dense, Detections, detections
from models.nets.normalisation import Normalise
from models.nets.parts import Parts
from models.nets.untrained import measure_batch_norms

__all__ = [
    "IGNORED_PREFIXES",
    "backbone_state",
    "build",
    "build_for_training",
    "graph",
    "losses",
    "parts",
    "reference",
    "wake",
]

IGNORED_PREFIXES = ()

STRIDE = STRIDES[-1]  # pixels: the side of a cell
BOXES = 2  # B: boxes of each cell
LAMBDA_COORD, LAMBDA_NOOBJ = 5.0, 0.5
IOU_THRESHOLD = 0.5  # of the suppression
WIDTH = 256  # channels of the convolutions that stand for the fully connected layers
LEAK = 0.1  # of the activation: the paper's equation 2

_PRIOR_CENTRE, _PRIOR_ROOT = 0.5, 0.4  # of an untrained cell's boxes: in its middle, sides of .16 of the image
_MIDDLE, _SPREAD = 0.5, 0.4  # mean and standard deviation of an awake, untrained detector's numbers


class Answers(NamedTuple):
    """What the cells say, row by row; plain numbers, which training brings between 0 and 1."""

    boxes: Tensor  # [batch, cells, B, 5]: x, y in the cell, √w, √h of the image, confidence
    classes: Tensor  # [batch, cells, C]
    corners_xy: Tensor  # f32 [cells, 2], pixels: the upper left corner of each cell
    size_wh: Tensor  # f32 [2], pixels of the input


class YoloV1(nn.Module):
    """images uint8 [batch, height, width, 3], sides that divide by 32 → Answers."""

    def __init__(self, classifier: str, num_classes: int):
        super().__init__()
        self.normalise = Normalise(MEAN_RGB, STD_RGB)
        self.backbone = Backbone(classifier)
        layers: list[nn.Module] = []
        for inputs in (self.backbone.layout.channels[-1], WIDTH):
            layers += [nn.Conv2d(inputs, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.LeakyReLU(LEAK)]
        self.neck = nn.Sequential(*layers)
        self.locate = nn.Conv2d(WIDTH, BOXES * 5, 1)
        self.classify = nn.Conv2d(WIDTH, num_classes, 1)
        for predictor in (self.locate, self.classify):
            nn.init.normal_(predictor.weight, std=0.01)
        nn.init.constant_(self.classify.bias, 1 / num_classes)  # type: ignore[arg-type]
        prior = [_PRIOR_CENTRE, _PRIOR_CENTRE, _PRIOR_ROOT, _PRIOR_ROOT, 0.0]
        with torch.no_grad():
            self.locate.bias.copy_(torch.tensor(prior * BOXES))  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Answers:
        """See the class."""
        features = self.neck(self.backbone(self.normalise(images))[-1])
        rows, columns = features.shape[2:]
        boxes = self.locate(features).flatten(2).transpose(1, 2).unflatten(2, (BOXES, 5))  # [batch, cells, B, 5]
        classes = self.classify(features).flatten(2).transpose(1, 2)  # [batch, cells, C]
        x = torch.arange(columns, device=images.device, dtype=torch.float32) * STRIDE
        y = torch.arange(rows, device=images.device, dtype=torch.float32) * STRIDE
        corners = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=2).flatten(0, 1)
        size = torch.tensor([columns * STRIDE, rows * STRIDE], dtype=torch.float32, device=images.device)
        return Answers(boxes, classes, corners, size)


def decode(answers: Answers) -> Tensor:
    """The boxes [batch, cells, B, 4] as x_min, y_min, x_max, y_max in pixels."""
    boxes = answers.boxes.float()
    centres = answers.corners_xy[:, None] + boxes[..., 0:2] * STRIDE
    sides = boxes[..., 2:4].clamp(0, 1).square() * answers.size_wh
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)


def _dense(answers: Answers) -> Dense:
    """All boxes with their scores: equation 1."""
    confidence = answers.boxes[..., 4].float().clamp(0, 1)  # [batch, cells, B]
    probabilities = answers.classes.float().clamp(0, 1)  # [batch, cells, C]
    scores = confidence[..., None] * probabilities[:, :, None]  # [batch, cells, B, C]
    return Dense(decode(answers).flatten(1, 2), scores.flatten(1, 2))


def losses(network: nn.Module, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of equation 3, per image: loss_place, loss_size, loss_object, loss_no_object and loss_class.

    images uint8 [batch, height, width, 3]; per image boxes_xyxy f32 [n, 4] in its pixels, labels i64 [n], ignored bool
    [n]. An empty cell whose middle lies in an ignored region is no example of one without an object.
    """
    answers: Answers = network(images)
    boxes, classes = answers.boxes.float(), answers.classes.float()
    decoded = decode(answers).detach()
    sums = [
        _equation_3(boxes[number], classes[number], decoded[number], answers, target)
        for number, target in enumerate(targets)
    ]
    return {name: torch.stack([of_image[name] for of_image in sums]).mean() for name in sums[0]}


def _equation_3(
    boxes: Tensor, classes: Tensor, decoded: Tensor, answers: Answers, target: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The terms for one image: boxes [cells, B, 5], classes [cells, C], decoded [cells, B, 4] pixels."""
    device = boxes.device
    given, ignored = target["boxes_xyxy"].to(device), target["ignored"].to(device)
    regions, objects, labels = given[ignored], given[~ignored], target["labels"].to(device)[~ignored]
    # The largest object comes last, and so keeps the cell.
    order = (objects[:, 2:] - objects[:, :2]).prod(dim=1).argsort(stable=True)
    objects, labels = objects[order], labels[order]
    columns = int(answers.size_wh[0]) // STRIDE
    rows = int(answers.size_wh[1]) // STRIDE
    centres = (objects[:, :2] + objects[:, 2:]) / 2
    limits = torch.tensor([columns - 1, rows - 1], device=device)
    place = torch.minimum((centres / STRIDE).floor().long().clamp(min=0), limits)  # [n, 2]: column, row
    owner = torch.full((len(boxes),), -1, dtype=torch.int64, device=device)  # [cells]: which object
    for number, cell in enumerate((place[:, 1] * columns + place[:, 0]).tolist()):
        owner[cell] = number
    cell = torch.nonzero(owner >= 0).flatten()  # [k]: 1_i
    wanted, label = objects[owner[cell]], labels[owner[cell]]

    overlap = torch.stack([box_iou(decoded[cell, b], wanted).diagonal() for b in range(BOXES)], dim=1)  # [k, B]
    iou, responsible = torch.where(overlap.isfinite(), overlap, 0.0).max(dim=1)  # 1_ij
    mine = boxes[cell, responsible]  # [k, 5]
    centre = ((wanted[:, :2] + wanted[:, 2:]) / 2 - answers.corners_xy[cell]) / STRIDE
    root = ((wanted[:, 2:] - wanted[:, :2]) / answers.size_wh).clamp(min=0).sqrt()
    probability = torch.nn.functional.one_hot(label, classes.shape[1]).to(classes.dtype)

    is_empty = torch.ones(boxes.shape[:2], dtype=torch.bool, device=device)  # [cells, B]
    middle = answers.corners_xy + STRIDE / 2
    inside = ((middle >= regions[:, None, :2]) & (middle <= regions[:, None, 2:])).all(dim=2).any(dim=0)  # [cells]
    is_empty[inside & (owner < 0)] = False
    is_empty[cell, responsible] = False
    return {
        "loss_place": LAMBDA_COORD * (mine[:, 0:2] - centre).square().sum(),
        "loss_size": LAMBDA_COORD * (mine[:, 2:4] - root).square().sum(),
        "loss_object": (mine[:, 4] - iou).square().sum(),
        "loss_no_object": LAMBDA_NOOBJ * (boxes[..., 4].square() * is_empty).sum(),
        "loss_class": (classes[cell] - probability).square().sum(),
    }


# The family; see models.nets


def build(builder: str, num_classes: int) -> YoloV1:
    """An untrained detector on the backbone that `builder` names."""
    return YoloV1(builder, num_classes).eval()


def build_for_training(builder: str, num_classes: int) -> YoloV1:
    """The same: nothing of it serves training alone."""
    return build(builder, num_classes)


def parts(network: nn.Module, builder: str) -> Parts:
    """Head: the last layer of the classes. Neck: all between it and the backbone, and the boxes."""
    return Parts(("classify",), stages(builder), ("neck", "locate"))


class YoloV1Graph(nn.Module):
    """images [batch, height, width, 3] uint8 → boxes_xyxy [n, 4], scores [n], labels [n], batch_index [n]."""

    def __init__(self, network: nn.Module, card: Card):
        super().__init__()
        self.network = network
        self.detections = Detections(card.input.height, card.input.width, card.score_floor, IOU_THRESHOLD)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        return self.detections(*_dense(self.network(images)))


def graph(network: nn.Module, card: Card) -> YoloV1Graph:
    """See YoloV1Graph."""
    return YoloV1Graph(network, card).eval()


def reference(network: nn.Module, card: Card) -> Callable[[Tensor], dict[str, Tensor]]:
    """The network's answers for images [batch, height, width, 3] uint8, suppressed by torchvision, image by image."""

    def found(images: Tensor) -> dict[str, Tensor]:
        return detections(_dense(network(images)), (images.shape[1], images.shape[2]), card.score_floor, IOU_THRESHOLD)

    return found


def wake(network: YoloV1, card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained detector find objects, of random kinds and sizes, in `images` [n, height, width, 3]."""
    measure_batch_norms(network, network, images)
    with torch.no_grad():
        boxes, classes, *_ = network(torch.from_numpy(images))
        for predictor, answers in ((network.locate, boxes), (network.classify, classes)):
            assert predictor.bias is not None
            values = answers.flatten(2).flatten(0, 1)  # [batch · cells, channels]
            factor = _SPREAD / values.std(dim=0).mean()
            predictor.weight.mul_(factor)
            predictor.bias.copy_(_MIDDLE - factor * (values.mean(dim=0) - predictor.bias))
