"""A network of a thousand weights, and images by colour that it learns in seconds."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.imaging.geometry import ResizeRule
from models.learning.augment import augmentation
from models.learning.classification import Classification
from models.learning.recipe import Recipe
from models.learning.samples import Samples
from models.nets.parts import Parts
from models.settings.train import Augment
from tasks.photographs import encode_png

SIDE = 32  # pixels
COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 40))
RULE = ResizeRule("crop", SIDE, SIDE, short_side=36)


def tiny_learner(num_classes: int = 4, norm: bool = True, smoothing: float = 0.0, seed: int = 0) -> Classification:
    """Two convolutions and a linear head."""

    def stage(inputs: int, outputs: int) -> nn.Sequential:
        layers = [nn.Conv2d(inputs, outputs, 3, stride=2), nn.ReLU()]
        return nn.Sequential(*([layers[0], nn.BatchNorm2d(outputs), layers[1]] if norm else layers))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            OrderedDict(
                stem=stage(3, 8),
                body=stage(8, 16),
                pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                head=nn.Linear(16, num_classes),
            )
        )
    return Classification(network, Parts(("head",), (("stem",), ("body", "pool"))), num_classes, smoothing)


@dataclass(frozen=True)
class Files:
    """Reads what it holds; it travels to another process."""

    data: tuple[bytes, ...]

    def __call__(self, index: int) -> bytes:
        return self.data[index]


def coloured(
    per_class: int | tuple[int, ...], seed: int = 0, augment: Augment | None = None, noise: int = 40
) -> Samples:
    """Noisy images of one colour each, whose class it is."""
    random = np.random.default_rng(seed)
    counts = (per_class,) * len(COLOURS) if isinstance(per_class, int) else per_class
    targets = [number for number, count in enumerate(counts) for _ in range(count)]
    files = []
    for target in targets:
        pixels = np.array(COLOURS[target]) + random.integers(-noise, noise + 1, (36, 40, 3))
        files.append(encode_png(np.clip(pixels, 0, 255).astype(np.uint8)))
    return Samples(
        names=[f"/images/{number:03d}.png" for number in range(len(targets))],
        targets=targets,
        read=Files(tuple(files)),
        rule=RULE,
        augmentation=augmentation(augment, RULE, True) if augment else None,
        groups=targets,
    )


def recipe(**changes) -> Recipe:
    """Three quick epochs."""
    usual = {"mode": "scratch", "epochs": 3, "batch_size": 8, "lr": 0.01, "augment": "light", "label_smoothing": 0.0}
    return Recipe(**{**usual, **changes})


def write_files(samples: Samples, folder: Path) -> None:
    """The image files, one folder per class."""
    for number, target in enumerate(samples.targets):
        path = folder / f"class{target}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(samples.read(number))
