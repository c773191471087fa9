"""Small labelled data sets from what scikit-learn ships: 1,797 handwritten digits, and scenes that hold some of them.

The digits are those of the UCI repository: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits" (1998).
"""

import io
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import PixelmillError

DIGIT_SIDE = 32  # pixels; the originals have 8
SCENE_SIDE = 320
_INK = 0.35  # of the darkest level: from here on a pixel belongs to the digit


def write_digits(folder: Path, per_class: int | None = None) -> int:
    """Writes digits as PNG files into a folder per class, the first `per_class` of each, and returns how many.

    Files that are there stay. Raises PixelmillError when scikit-learn is not installed.
    """
    levels, classes = _digits()
    written = 0
    for digit in range(10):
        for number in np.flatnonzero(classes == digit)[:per_class]:
            pixels = Image.fromarray((levels[number] * 255).astype(np.uint8)).resize(
                (DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC
            )
            _write(folder / str(digit) / f"{number:04d}.png", _encoded(pixels, "PNG"))
            written += 1
    return written


def write_scenes(folder: Path, count: int, seed: int = 0) -> int:
    """Writes photographs with digits pasted onto them, labelled twice, and returns how many digits.

    images/0000.jpg …; instances.json: which digit is where, as COCO; masks/0000.png … and classes.txt: which pixels
    are ink. Files that are there stay. Raises PixelmillError as `write_digits` does.
    """
    levels, classes = _digits()
    photographs = _photographs()
    generator = np.random.default_rng(seed)
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top, left = (generator.integers(0, side - SCENE_SIDE) for side in photograph.shape[:2])
        scene = photograph[top : top + SCENE_SIDE, left : left + SCENE_SIDE].copy()  # [side, side, 3]
        taken = np.zeros((SCENE_SIDE, SCENE_SIDE), bool)
        inked = np.zeros((SCENE_SIDE, SCENE_SIDE), bool)
        name = f"{number:04d}.jpg"
        images.append({"id": number + 1, "file_name": name, "width": SCENE_SIDE, "height": SCENE_SIDE})
        for _ in range(int(generator.integers(8, 25))):  # many find no place
            chosen = int(generator.integers(len(levels)))
            side = int(generator.integers(56, 112))
            ink = _enlarged(levels[chosen], side)  # [side, side], 0…1
            y, x = (int(generator.integers(0, SCENE_SIDE - side)) for _ in range(2))
            if taken[y : y + side, x : x + side].any():
                continue
            taken[y : y + side, x : x + side] = True
            place = scene[y : y + side, x : x + side]
            dark, light = generator.integers(0, 100, 3), generator.integers(156, 256, 3)
            colour = dark if place.mean() > 110 else light
            place[:] = (place * (1 - ink[..., None]) + colour * ink[..., None]).astype(np.uint8)
            inked[y : y + side, x : x + side] = ink > _INK
            annotations.append(_annotation(len(annotations) + 1, number + 1, int(classes[chosen]), ink > _INK, y, x))
        _write(folder / "images" / name, _encoded(Image.fromarray(scene), "JPEG"))
        mask = Image.fromarray(inked.astype(np.uint8) * 255)
        _write(folder / "masks" / f"{number:04d}.png", _encoded(mask, "PNG"))
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    _write(folder / "instances.json", json.dumps(coco).encode())
    _write(folder / "classes.txt", b"ink,255\n")
    return len(annotations)


def _annotation(number: int, image: int, digit: int, shape: NDArray[np.bool_], y: int, x: int) -> dict:
    """A COCO annotation of a digit whose pixels, seen from (y, x) of the scene, are `shape`."""
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    mask = np.zeros((SCENE_SIDE, SCENE_SIDE), bool)
    mask[y : y + shape.shape[0], x : x + shape.shape[1]] = shape
    height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
    return {
        "id": number,
        "image_id": image,
        "category_id": digit + 1,
        "bbox": [x + int(columns[0]), y + int(rows[0]), width, height],
        "area": int(shape.sum()),
        "iscrowd": 0,
        "segmentation": {"size": [SCENE_SIDE, SCENE_SIDE], "counts": _runs(mask)},
    }


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """Uncompressed COCO counts: lengths of runs in column order, the first of zeros."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Ink [1797, 8, 8] from 0 to 1, and the digit that each is."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise PixelmillError("the digits are scikit-learn's: pip install scikit-learn") from None
    digits = load_digits()
    return digits.images / 16, digits.target


def _photographs() -> list[NDArray[np.uint8]]:
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def _enlarged(ink: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    return np.asarray(Image.fromarray(ink.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 92} if form == "JPEG" else {}))
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{os.getpid()}"
    unfinished.write_bytes(data)
    unfinished.replace(path)
