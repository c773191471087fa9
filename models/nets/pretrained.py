"""torchvision's own weight entries: where their file is, what their outputs mean, and how they want their images."""

from dataclasses import dataclass

from models.errors import UsageError
from models.imaging.geometry import Interpolation, ResizeRule


@dataclass(frozen=True)
class Pretrained:
    """One weights entry of torchvision."""

    name: str  # e.g. IMAGENET1K_V1
    url: str
    megabytes: float
    labels: tuple[str, ...]  # by output index, without the background of detectors
    input: ResizeRule | None  # None for detectors, which take images of any size
    min_side: int  # pixels; the network cannot work with less
    others: tuple[str, ...]  # all entries of this builder

    @property
    def file_name(self) -> str:
        """As torchvision caches it: name-SHA256PREFIX.pth."""
        return self.url.rsplit("/", 1)[1]


def pretrained(builder: str, name: str) -> Pretrained:
    """An entry by its name. Raises UsageError that lists the known ones. Reads nothing from disk or network."""
    from torchvision.models import get_model_weights

    try:
        entries = get_model_weights(builder)
    except ValueError:
        raise UsageError(f"torchvision has no weights of {builder}: train one, or import an ONNX file") from None
    known = tuple(entry.name for entry in entries)
    if name not in known:
        raise UsageError(f"{builder} has no weights named {name!r}; known are {', '.join(known)}, default and none")
    weights = entries[name]
    labels = tuple(weights.meta["categories"])
    if labels[0] == "__background__":
        labels = labels[1:]
    return Pretrained(
        name,
        weights.url,
        weights.meta["_file_size"],
        labels,
        _rule(weights.transforms()),
        max(weights.meta.get("min_size", (1, 1))),
        known,
    )


def _rule(transforms) -> ResizeRule | None:
    """The resize and crop of torchvision's preset for a classifier."""
    if not hasattr(transforms, "crop_size"):
        return None
    interpolations: dict[str, Interpolation] = {"bilinear": "bilinear", "bicubic": "bicubic"}
    crop = transforms.crop_size[0]
    return ResizeRule(
        "crop",
        height=crop,
        width=crop,
        short_side=transforms.resize_size[0],
        interpolation=interpolations[transforms.interpolation.value],
    )
