"""What preparing one JPEG costs, against the other ways to the same pixels. Run: python -m benchmarks.decoding [FOLDER]

Each way decodes a file, resizes its short side to 256 pixels with antialiasing and cuts 224×224 from the centre, on one
thread. Rounds are interleaved, so that a busy machine burdens all ways alike: the ratios count, more than the times.
FOLDER: JPEG files of your own instead of the photographs that packages ship, one row for each.
"""

import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.photographs import sources
from models.imaging.geometry import Interpolation, ResizeRule, spans_yx
from models.imaging.prepare import Preparer
from models.imaging.resize import resize_with_pillow

SIZES = {"500×375": (500, 375), "1920×1080": (1920, 1080), "12 MP": (4000, 3000)}
ROUNDS = 9
ROUND_S = 0.1  # at least, for each way


def main() -> None:
    """Prints one table: milliseconds, and in brackets the time as a multiple of ours."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.jp*g"))} if folder else _photographs()
    for interpolation in ("bilinear", "bicubic"):
        for name, data in files.items():
            times = measure(ways(data, interpolation))
            ours = times["pixelmill"]
            row = "   ".join(f"{way} {1000 * time_s:.2f} ({time_s / ours:.2f})" for way, time_s in times.items())
            print(f"{name:12} {interpolation:9} {row}", flush=True)


def _photographs() -> dict[str, bytes]:
    """One photograph at each size, at quality 90: enlarged, where packages ship none so large."""
    photograph = max(sources(), key=lambda image: image.width * image.height)
    files = {}
    for name, size in SIZES.items():
        file = io.BytesIO()
        photograph.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files[name] = file.getvalue()
    return files


def ways(data: bytes, interpolation: Interpolation) -> dict[str, Callable[[], object]]:
    """All ways that are installed here, by name."""
    import simplejpeg

    rule = ResizeRule("crop", 224, 224, 256, interpolation)
    preparer, out = Preparer(rule), np.empty((224, 224, 3), np.uint8)

    def simplejpeg_and_pillow() -> None:
        pixels = simplejpeg.decode_jpeg(data)
        y, x = spans_yx(rule, *pixels.shape[:2])
        resize_with_pillow(pixels, y, x, interpolation, out)

    def pillow() -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        y, x = spans_yx(rule, image.height, image.width)
        resized = image.resize((x.scaled, y.scaled), Image.Resampling[interpolation.upper()])
        np.asarray(resized.crop((x.start, y.start, x.start + x.count, y.start + y.count)))

    found: dict[str, Callable[[], object]] = {
        "pixelmill": lambda: preparer.prepare(data, out),
        "decoding alone": lambda: simplejpeg.decode_jpeg(data),
        "simplejpeg+Pillow": simplejpeg_and_pillow,
        "Pillow": pillow,
    }
    try:
        import torch
        from torchvision.io import ImageReadMode, decode_image
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2.functional import center_crop, resize
    except ImportError:
        return found
    torch.set_num_threads(1)
    mode = InterpolationMode(interpolation)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def shrink(pixels: torch.Tensor) -> torch.Tensor:
        return center_crop(resize(pixels, [256], mode, antialias=True), [224, 224])

    found["simplejpeg+torch"] = lambda: shrink(torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1))
    found["torchvision"] = lambda: shrink(decode_image(encoded, ImageReadMode.RGB))
    return found


def measure(found: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median over the rounds, in seconds for one call."""
    repeats = {}
    for name, way in found.items():
        way()
        started = time.perf_counter()
        way()
        repeats[name] = max(1, round(ROUND_S / (time.perf_counter() - started)))
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(ROUNDS):
        for name, way in found.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                way()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return {name: statistics.median(each) for name, each in seconds.items()}


if __name__ == "__main__":
    main()
