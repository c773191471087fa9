"""How an image of any size becomes the fixed-size input of a network, and the way back for boxes."""

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """The rule of one model; it stands in the model's card, because the wrong one changes its answers.

    crop: scale the short side to `short_side`, then cut `height`×`width` from the centre (classifiers).
    letterbox: scale to fit inside `height`×`width`, keep the aspect ratio, pad right and bottom with `pad_rgb` (detectors).
    stretch: scale both sides to `height`×`width`.
    All are antialiased, as in Pillow.
    """

    mode: Literal["crop", "letterbox", "stretch"]
    height: int
    width: int
    short_side: int | None = None
    interpolation: Interpolation = "bilinear"
    pad_rgb: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the pixels of one image lie in the model's input: x_input = x_original · scale_x + offset_x, and so for y."""

    width: int  # of the original, after EXIF orientation
    height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
