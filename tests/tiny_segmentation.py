"""Images of a disc and a square each, and the maps of their classes, that a small network learns in seconds."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISC, SQUARE = 1, 2  # values of the maps


def scenes(count: int, side: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Dark noise with a reddish disc at the left and a bluish square at the right [count, side, side, 3], and the maps
    [count, side, side]."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 60, (count, side, side, 3), np.uint8)
    maps = np.zeros((count, side, side), np.uint8)
    rows, columns = np.mgrid[:side, :side] + 0.5
    for image, drawn in zip(images, maps, strict=True):
        radius = side / 6
        x, y = generator.uniform(radius, side / 2 - radius), generator.uniform(radius, side - radius)
        drawn[np.hypot(columns - x, rows - y) < radius] = DISC
        left, top = (int(generator.integers(low, side - side // 4)) for low in (side // 2, 0))
        drawn[top : top + side // 4, left : left + side // 4] = SQUARE
        noise = generator.integers(-30, 31, (side, side, 3))
        for value, colour in ((DISC, (200, 80, 80)), (SQUARE, (80, 80, 200))):
            image[drawn == value] = (np.array(colour) + noise)[drawn == value]
    return images, maps


def write_pairs(folder: Path, images: NDArray[np.uint8], maps: NDArray[np.uint8], split: str = "train") -> None:
    """PNG files images/train/000.png and masks/train/000.png …, as `ingest` reads them."""
    for kind, arrays in (("images", images), ("masks", maps)):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(folder / kind / split / f"{number:03d}.png")
