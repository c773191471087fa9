"""Our own YOLO: an anchor-free single-shot detector on torchvision's classifiers.

Every cell of three feature maps (strides 8, 16 and 32 pixels) says what is there and where its four sides are:

backbone  a classifier without its end, which can start from its ImageNet weights: details are in its early maps,
          meaning is in its late ones
neck      a path aggregation network (Liu et al., PANet, arXiv 1803.01534): meaning goes down to the fine maps, places
          go back up to the coarse ones, so that every map knows both
head      two towers, one for the class and one for the box, since they want different features (Ge et al., YOLOX, arXiv
          2107.08430, section 2.1), as in FCOS (Tian et al., arXiv 1904.01355). Their convolutions are the same for all
          maps, their BatchNorms are not (Lyu et al., RTMDet, arXiv 2212.07784, section 3.2): objects of all sizes teach
          them, which helps where there are few

There is no objectness: the score of a class is trained to be the quality of the cell's box for it (VarifocalNet), and
so ranks boxes by themselves. A side is the mean of a distribution over the distances 0, 1, … 16 cells (Generalized
Focal Loss), so that an unclear edge may be spread out. Objects are told to cells by task-aligned assignment. See
models.nets.yolo_assignment for these, with their equations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.card import Card
from models.nets.backbone import STRIDES, Backbone, backbone_state, stages
from models.nets.classifiers import MEAN_RGB, STD_RGB
from models.nets.dense_detections import Dense, Detections, detections
from models.nets.normalisation import Normalise
from models.nets.parts import Parts
from models.nets.untrained import measure_batch_norms
from models.nets.yolo_assignment import Assignment, assign, complete_iou_loss, distribution_focal_loss, varifocal_loss

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

BINS = 17  # distances from a cell's centre to a side: 0 to 16 cells
IOU_THRESHOLD = 0.65  # of the suppression
# Of the losses of scores, boxes and distributions, as in PP-YOLOE (Xu et al., arXiv 2203.16250).
_SCORE_WEIGHT, _BOX_WEIGHT, _DISTRIBUTION_WEIGHT = 1.0, 2.5, 0.5

_PRIOR = 0.01  # the score of an untrained cell: section 4.1 of Focal Loss (Lin et al., arXiv 1708.02002)
_PRIOR_DECAY = 0.5  # from bin to bin, of an untrained cell's distributions: it reaches 1.5 cells to each side
_LOGIT_SPREAD = 1.0  # standard deviation of an awake, untrained detector's logits: more would magnify rounding


@dataclass(frozen=True)
class Size:
    """How large neck and head are."""

    width: int  # channels of the neck's and the head's maps
    depth: int  # bottlenecks in each block of the neck
    tower: int = 2  # convolutions in each tower of the head


# By what the backbone is made of.
SIZES = {
    "mobilenet_v2": Size(width=64, depth=1),
    "resnet18": Size(width=128, depth=1),
    "resnet50": Size(width=192, depth=2),
}


class Convolution(nn.Sequential):
    """Convolution, BatchNorm, SiLU; the sides stay as they are, or are halved by a stride of 2."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(inplace=True),
        )


class Bottleneck(nn.Module):
    """x + convolutions of x."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolve = nn.Sequential(Convolution(channels, channels, 1), Convolution(channels, channels, 3))

    def forward(self, features: Tensor) -> Tensor:
        """[batch, channels, h, w] → the same shape."""
        return features + self.convolve(features)


class Fusion(nn.Module):
    """Makes one map of two of the same size; half of the channels takes the long way through bottlenecks, as in CSPNet
    (Wang et al., arXiv 1911.11929)."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        half = channels // 2
        self.short = Convolution(2 * channels, half, 1)
        self.long = nn.Sequential(Convolution(2 * channels, half, 1), *(Bottleneck(half) for _ in range(depth)))
        self.join = Convolution(2 * half, channels, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Twice [batch, channels, h, w] → the same shape."""
        both = torch.cat([one, other], dim=1)
        return self.join(torch.cat([self.short(both), self.long(both)], dim=1))


class Neck(nn.Module):
    """The backbone's maps → as many of the same sizes, all with `width` channels."""

    def __init__(self, channels: Sequence[int], width: int, depth: int):
        super().__init__()
        steps = len(channels) - 1
        self.lateral = nn.ModuleList(Convolution(inputs, width, 1) for inputs in channels)
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.down = nn.ModuleList(Fusion(width, depth) for _ in range(steps))
        self.halve = nn.ModuleList(Convolution(width, width, 3, stride=2) for _ in range(steps))
        self.up = nn.ModuleList(Fusion(width, depth) for _ in range(steps))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """From the finest to the coarsest, as they come."""
        maps = [lateral(one) for lateral, one in zip(self.lateral, maps, strict=True)]
        for finer in reversed(range(len(self.down))):
            maps[finer] = self.down[finer](maps[finer], self.enlarge(maps[finer + 1]))
        for finer, (halve, up) in enumerate(zip(self.halve, self.up, strict=True)):
            maps[finer + 1] = up(maps[finer + 1], halve(maps[finer]))
        return maps


class Tower(nn.Module):
    """3×3 convolutions that all maps share, each followed by the BatchNorm of the map's own level and SiLU."""

    def __init__(self, width: int, length: int, levels: int):
        super().__init__()
        self.convolve = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(length))
        self.norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(width) for _ in range(length)) for _ in range(levels))
        self.activate = nn.SiLU(inplace=True)

    def forward(self, features: Tensor, level: int) -> Tensor:
        """[batch, width, h, w] → the same shape."""
        of_level: Any = self.norms[level]
        for convolve, norm in zip(self.convolve, of_level, strict=True):
            features = self.activate(norm(convolve(features)))
        return features


class Answers(NamedTuple):
    """What the network says of every cell; finest map first, row by row."""

    logits: Tensor  # [batch, cells, classes]
    distributions: Tensor  # [batch, cells, 4, BINS], logits: left, top, right, bottom
    centres_xy: Tensor  # f32 [cells, 2], pixels of the input
    strides: Tensor  # f32 [cells], pixels


class Yolo(nn.Module):
    """images uint8 [batch, height, width, 3], sides that divide by 32 → Answers."""

    def __init__(self, classifier: str, num_classes: int, size: Size):
        super().__init__()
        self.normalise = Normalise(MEAN_RGB, STD_RGB)
        self.backbone = Backbone(classifier)
        self.neck = Neck(self.backbone.layout.channels, size.width, size.depth)
        self.class_tower = Tower(size.width, size.tower, len(STRIDES))
        self.box_tower = Tower(size.width, size.tower, len(STRIDES))
        self.classify = nn.Conv2d(size.width, num_classes, 1)
        self.locate = nn.Conv2d(size.width, 4 * BINS, 1)
        for predictor in (self.classify, self.locate):
            nn.init.normal_(predictor.weight, std=0.01)
        nn.init.constant_(self.classify.bias, float(np.log(_PRIOR / (1 - _PRIOR))))  # type: ignore[arg-type]
        with torch.no_grad():
            self.locate.bias.copy_((-_PRIOR_DECAY * torch.arange(BINS)).repeat(4))  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Answers:
        """See the class."""
        logits, distributions = [], []
        maps = self.neck(self.backbone(self.normalise(images)))
        for level, features in enumerate(maps):
            of_classes = self.classify(self.class_tower(features, level))  # [batch, classes, h, w]
            of_sides = self.locate(self.box_tower(features, level))  # [batch, 4 · BINS, h, w]
            logits.append(of_classes.flatten(2).transpose(1, 2))
            distributions.append(of_sides.flatten(2).transpose(1, 2).unflatten(2, (4, BINS)))
        centres, strides = cells([(one.shape[2], one.shape[3]) for one in maps], images.device)
        return Answers(torch.cat(logits, dim=1), torch.cat(distributions, dim=1), centres, strides)


def cells(sizes_hw: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The centres [cells, 2] and the strides [cells] of maps of these sizes, in pixels of the input."""
    centres, strides = [], []
    for (rows, columns), stride in zip(sizes_hw, STRIDES, strict=True):
        x = (torch.arange(columns, device=device) + 0.5) * stride
        y = (torch.arange(rows, device=device) + 0.5) * stride
        centres.append(torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=2).flatten(0, 1))
        strides.append(torch.full((rows * columns,), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)


def decode(answers: Answers) -> Tensor:
    """The boxes [batch, cells, 4] in pixels: each side is the mean of its distribution, counted in cells."""
    bins = torch.arange(BINS, dtype=torch.float32, device=answers.centres_xy.device)
    distances = (answers.distributions.float().softmax(dim=3) * bins).sum(dim=3)  # [batch, cells, 4]
    distances = distances * answers.strides[:, None]
    return torch.cat([answers.centres_xy - distances[..., :2], answers.centres_xy + distances[..., 2:]], dim=2)


# Learning


def losses(network: nn.Module, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """loss_score, loss_box and loss_distribution.

    images uint8 [batch, height, width, 3]; per image boxes_xyxy f32 [n, 4] in its pixels, labels i64 [n], ignored bool
    [n]. All three are sums over the batch, divided by the sum of the qualities that are to be learned, and cells
    that see an object better count for more in the last two, as in TOOD (section 3.3).
    """
    answers: Answers = network(images)
    logits, boxes_xyxy = answers.logits.float(), decode(answers)
    scores = logits.detach().sigmoid()
    targets = [{name: value.to(images.device) for name, value in target.items()} for target in targets]
    assigned = [
        assign(scores[number], boxes_xyxy[number].detach(), answers.centres_xy, target, STRIDES[0])
        for number, target in enumerate(targets)
    ]
    total = torch.stack([of_image.quality.sum() for of_image in assigned]).sum().clamp(min=1.0)

    quality = torch.stack(
        [_by_class(of_image, target, logits.shape[2]) for of_image, target in zip(assigned, targets, strict=True)]
    )  # [batch, cells, classes]
    counted = ~torch.stack([of_image.ignored for of_image in assigned])  # [batch, cells]
    of_scores = (varifocal_loss(logits, quality) * counted[:, :, None]).sum()

    image, cell = torch.nonzero(torch.stack([of_image.objects for of_image in assigned]) >= 0).unbind(dim=1)  # [p]
    wanted_xyxy = torch.cat(
        [
            _objects(target)[of_image.objects[of_image.objects >= 0]]
            for of_image, target in zip(assigned, targets, strict=True)
        ]
    )  # [p, 4]
    weight = torch.stack([of_image.quality for of_image in assigned])[image, cell]  # [p]
    of_boxes = (complete_iou_loss(boxes_xyxy[image, cell], wanted_xyxy) * weight).sum()
    centres = answers.centres_xy[cell]
    distances = torch.cat([centres - wanted_xyxy[:, :2], wanted_xyxy[:, 2:] - centres], dim=1)  # [p, 4]
    distances = distances / answers.strides[cell][:, None]
    of_sides = distribution_focal_loss(answers.distributions[image, cell].float().flatten(0, 1), distances.flatten())
    of_distributions = (of_sides.reshape(-1, 4).mean(dim=1) * weight).sum()
    return {
        "loss_score": _SCORE_WEIGHT * of_scores / total,
        "loss_box": _BOX_WEIGHT * of_boxes / total,
        "loss_distribution": _DISTRIBUTION_WEIGHT * of_distributions / total,
    }


def _objects(target: dict[str, Tensor]) -> Tensor:
    return target["boxes_xyxy"][~target["ignored"]]


def _by_class(assigned: Assignment, target: dict[str, Tensor], num_classes: int) -> Tensor:
    """The targets of one image's scores [cells, classes]: the quality at the object's class, else 0."""
    quality = assigned.quality.new_zeros(len(assigned.quality), num_classes)
    learns = assigned.objects >= 0
    labels = target["labels"][~target["ignored"]][assigned.objects[learns]]
    quality[learns, labels] = assigned.quality[learns]
    return quality


# The family; see models.nets


def build(builder: str, num_classes: int) -> Yolo:
    """An untrained detector on the backbone that `builder` names."""
    return Yolo(builder, num_classes, SIZES[builder]).eval()


def build_for_training(builder: str, num_classes: int) -> Yolo:
    """The same: nothing of it serves training alone."""
    return build(builder, num_classes)


def parts(network: nn.Module, builder: str) -> Parts:
    """Head: the last layer of the classes. Neck: all between it and the backbone, and the boxes."""
    return Parts(("classify",), stages(builder), ("neck", "class_tower", "box_tower", "locate"))


class YoloGraph(nn.Module):
    """images [batch, height, width, 3] uint8 → boxes_xyxy [n, 4], scores [n], labels [n], batch_index [n]."""

    def __init__(self, network: nn.Module, card: Card):
        super().__init__()
        self.network = network
        self.detections = Detections(card.input.height, card.input.width, card.score_floor, IOU_THRESHOLD)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        answers = self.network(images)
        return self.detections(decode(answers), answers.logits.sigmoid())


def graph(network: nn.Module, card: Card) -> YoloGraph:
    """See YoloGraph."""
    return YoloGraph(network, card).eval()


def reference(network: nn.Module, card: Card) -> Callable[[Tensor], dict[str, Tensor]]:
    """The network's answers for images [batch, height, width, 3] uint8, suppressed by torchvision, image by image."""

    def found(images: Tensor) -> dict[str, Tensor]:
        answers = network(images)
        dense = Dense(decode(answers), answers.logits.float().sigmoid())
        return detections(dense, (images.shape[1], images.shape[2]), card.score_floor, IOU_THRESHOLD)

    return found


def wake(network: Yolo, card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained detector find objects, of random kinds and sizes, in `images` [n, height, width, 3]."""
    measure_batch_norms(network, network, images)
    with torch.no_grad():
        answers = network(torch.from_numpy(images))
        for predictor, logits in ((network.classify, answers.logits), (network.locate, answers.distributions)):
            assert predictor.bias is not None
            values = logits.flatten(2).flatten(0, 1)  # [batch · cells, channels]
            factor = _LOGIT_SPREAD / values.std(dim=0).mean()
            predictor.weight.mul_(factor)
            # Around the bias as it was, so that images do not differ by all of their scores being high.
            predictor.bias.sub_(factor * (values.mean(dim=0) - predictor.bias))
