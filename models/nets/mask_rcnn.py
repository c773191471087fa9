"""torchvision's Mask R-CNN: Faster R-CNN with a mask for each object; what differs is here."""

from typing import TYPE_CHECKING, Any

from models.card import Card
from models.nets.faster_rcnn import (
    IGNORED_PREFIXES,
    backbone_state,
    build,
    build_for_training,
    losses,
    parts,
    published_state,
    reference,
    wake,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "IGNORED_PREFIXES",
    "backbone_state",
    "build",
    "build_for_training",
    "graph",
    "losses",
    "parts",
    "published_state",
    "reference",
    "wake",
]


def graph(network: Any, card: Card) -> "nn.Module":
    """images [batch, height, width, 3] uint8 → boxes_xyxy [n, 4], scores [n], labels [n], batch_index [n], masks."""
    from models.nets.mask_rcnn_graph import MaskRcnnGraph

    return MaskRcnnGraph(network, card.input.height, card.input.width, card.score_floor).eval()
