"""Small detectors on small images: photographs for what they answer, and made ones with objects for what they learn."""

import numpy as np
import torch
from torch import Tensor, nn

from models import catalog
from models.card import Card
from models.imaging.geometry import ResizeRule
from models.nets.untrained import build_untrained
from tasks.photographs import prepared_photographs

LABELS = ("round", "square", "neither", "both")


def awake(name: str, side: int, images: int = 5) -> tuple[nn.Module, Card, np.ndarray]:
    """A random network that finds objects in photographs [images, side, side, 3]."""
    entry = catalog.entry(name)
    rule = ResizeRule("letterbox", side, side, pad_rgb=(124, 116, 104))
    card = Card(name, "0" * 12, entry.task, name, LABELS, rule, score_floor=entry.score_floor)
    photographs, _ = prepared_photographs(rule, images)
    family = entry.family_module()
    network = build_untrained(lambda: family.build(entry.builder, len(LABELS)))
    network.rpn._post_nms_top_n["testing"] = 60  # torchvision is slow at what it does one by one
    network.roi_heads.detections_per_img = 30
    family.wake(network, card, photographs)
    return network, card, photographs


def shapes(count: int, side: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Dark images with one light disc and one light square each: uint8 [count, side, side, 3], and their targets."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 40, (count, side, side, 3), np.uint8)
    rows, columns = np.mgrid[:side, :side] + 0.5
    targets = []
    for image in images:
        radius = side // 8
        x, y = generator.uniform(radius, side / 2 - radius), generator.uniform(radius, side - radius)
        disc = np.hypot(columns - x, rows - y) < radius
        left, top = round(side / 2 + generator.uniform(0, side / 4)), round(generator.uniform(0, side * 3 / 4))
        square = (columns > left) & (columns < left + side // 4) & (rows > top) & (rows < top + side // 4)
        image[disc], image[square] = (220, 60, 60), (60, 60, 220)
        boxes = [(x - radius, y - radius, x + radius, y + radius), (left, top, left + side // 4, top + side // 4)]
        targets.append(target(boxes, [0, 1], masks=np.stack([disc, square])))
    return torch.from_numpy(images), targets


def target(boxes, labels, ignored=None, masks=None) -> dict[str, Tensor]:
    """The target of one image; boxes [n, 4] in pixels, masks [n, side, side]."""
    found = {
        "boxes_xyxy": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "ignored": torch.tensor(ignored or [False] * len(labels), dtype=torch.bool),
        "difficult": torch.zeros(len(labels), dtype=torch.bool),
    }
    return found if masks is None else found | {"masks": torch.from_numpy(masks)}
