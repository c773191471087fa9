"""Real photographs for benchmarks: crops of those that scikit-image and scikit-learn ship, as JPEG files."""

import os
from pathlib import Path

import numpy as np
from PIL import Image


def sources() -> list[Image.Image]:
    """The photographs of the installed packages that are large enough to crop."""
    import skimage.data

    found = [
        getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
    ]
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return [Image.fromarray(array) for array in found]
    return [Image.fromarray(array) for array in [*found, *load_sample_images().images]]


def write_photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375), distinct: int = 2000) -> None:
    """Writes `count` JPEGs of `size` (width, height): random crops at random scales; past `distinct`, hard links."""
    folder.mkdir(parents=True, exist_ok=True)
    originals = sources()
    rng = np.random.default_rng(0)
    for index in range(min(count, distinct)):
        original = originals[index % len(originals)]
        fit = max(size[0] / original.width, size[1] / original.height)
        scale = fit * rng.uniform(1.05, 1.6)
        scaled = original.resize(
            (round(original.width * scale), round(original.height * scale)), Image.Resampling.BICUBIC
        )
        left = int(rng.integers(scaled.width - size[0] + 1))
        top = int(rng.integers(scaled.height - size[1] + 1))
        scaled.crop((left, top, left + size[0], top + size[1])).save(folder / f"{index:06d}.jpg", quality=90)
    for index in range(distinct, count):
        os.link(folder / f"{index % distinct:06d}.jpg", folder / f"{index:06d}.jpg")
