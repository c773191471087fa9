"""Real images to check an export on: the user's own, else what installed packages ship, else made ones."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.errors import Rejected, UsageError
from models.imaging.geometry import ResizeRule
from models.imaging.prepare import Preparer


def prepared_photographs(
    rule: ResizeRule, count: int, folder: Path | None = None
) -> tuple[NDArray[np.uint8], list[str]]:
    """`count` different images, prepared by a model's rule: [count, height, width, 3], and what each of them is.

    Images of `folder` come first. Raises UsageError if it has none that can be read.
    """
    preparer = Preparer(rule)
    images = np.empty((count, rule.height, rule.width, 3), np.uint8)
    names: list[str] = []
    for source in (_of_folder(folder) if folder else iter(()), _of_packages(), _synthetic()):
        for name, data in source:
            if len(names) == count:
                return images, names
            try:
                preparer.prepare(data, images[len(names)])
            except Rejected:
                continue
            names.append(name)
        if folder and not names:
            raise UsageError(f"expected images to check the export on in {folder}, found none that can be read")
    return images, names


def _of_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    if not folder.is_dir():
        raise UsageError(f"expected a folder of images, got {folder}")
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path.name, path.read_bytes()


def _of_packages() -> Iterator[tuple[str, bytes]]:
    """Photographs that scikit-image and scikit-learn carry in their wheels."""
    try:
        from skimage import data
    except ImportError:
        pass
    else:
        for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field"):
            yield f"scikit-image {name}", encode_png(getattr(data, name)())
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return
    sample = load_sample_images()
    for path, pixels in zip(sample.filenames, sample.images, strict=True):
        yield f"scikit-learn {Path(path).stem}", encode_png(pixels)


def _synthetic(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Noise at all scales, as in photographs (half the strength with each octave), under flat shapes with edges."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:384, :512]
    for number in range(1000):
        pixels = np.zeros((384, 512, 3))
        for cell in (128, 64, 32, 16, 8, 4, 2):
            coarse = generator.normal(0, cell / 3, (384 // cell, 512 // cell, 3))
            pixels += coarse.repeat(cell, axis=0).repeat(cell, axis=1)
        for _ in range(6):
            row, column, radius = generator.uniform(0, 384), generator.uniform(0, 512), generator.uniform(20, 90)
            pixels[np.hypot(rows - row, columns - column) < radius] = generator.uniform(-128, 128, 3)
        yield f"synthetic {number}", encode_png(np.clip(pixels + 128, 0, 255).astype(np.uint8))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file with these pixels [height, width, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
