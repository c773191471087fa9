"""How an image of any size, or a tile of it, becomes the fixed-size input of a network, and the way back for boxes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """The rule of one model; it stands in the model's card, because the wrong one changes its answers.

    crop: scale the short side to `short_side`, then cut `height`×`width` from the centre (classifiers).
    letterbox: scale to fit inside `height`×`width`, keep the aspect ratio, pad right and bottom with `pad_rgb`
    (detectors).
    stretch: scale both sides to `height`×`width`.
    All are antialiased, as in Pillow.

    Raises ValueError where the rule cannot be carried out on every image.
    """

    mode: Literal["crop", "letterbox", "stretch"]
    height: int
    width: int
    short_side: int | None = None
    interpolation: Interpolation = "bilinear"
    pad_rgb: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if self.mode not in ("crop", "letterbox", "stretch"):
            raise ValueError(f"resize mode is crop, letterbox or stretch, not {self.mode!r}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is bilinear or bicubic, not {self.interpolation!r}")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"the input of a model is at least 1×1 pixels, not {self.height}×{self.width}")
        if self.mode == "crop" and (self.short_side is None or self.short_side < max(self.height, self.width)):
            raise ValueError(
                f"crop needs a short_side of at least {max(self.height, self.width)}, the longer side of what it cuts, "
                f"not {self.short_side}"
            )
        if len(self.pad_rgb) != 3 or not all(0 <= level <= 255 for level in self.pad_rgb):
            raise ValueError(f"pad_rgb is three levels from 0 to 255, not {self.pad_rgb}")


Rectangle = tuple[int, int, int, int]  # x_min, y_min, x_max, y_max, in pixels of the oriented original


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of an image that the model sees by itself."""

    shown_xyxy: Rectangle
    cell_xyxy: Rectangle  # of what is shown, the pixels that are nearer to this tile's centre than to another's


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where an image lies in the model's input: x_input = x_original · scale_x + offset_x, and so for y."""

    width: int  # of the original, after EXIF orientation
    height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    tile: Tile | None = None  # what the input shows of the original; None: all of it

    @property
    def shown_xyxy(self) -> Rectangle:
        """The part of the original that the input shows."""
        return self.tile.shown_xyxy if self.tile else (0, 0, self.width, self.height)

    @property
    def cell_xyxy(self) -> Rectangle:
        """The part of the original for which this input answers, pixel by pixel."""
        return self.tile.cell_xyxy if self.tile else (0, 0, self.width, self.height)

    def sources_yx(self, size_hw: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each row and each column of an input of this size the one of the original that its centre falls into;
        none for the padding at the end."""
        y = _sources(self.height, self.scale_y, self.offset_y)
        x = _sources(self.width, self.scale_x, self.offset_x)
        return y[: size_hw[0]], x[: size_hw[1]]

    def of_tile(self, tile: Tile, height: int, width: int) -> "Geometry":
        """The same input, seen as the tile of an image of this size: its own geometry is that of the tile alone."""
        left, top, _, _ = tile.shown_xyxy
        return Geometry(
            width=width,
            height=height,
            scale_x=self.scale_x,
            scale_y=self.scale_y,
            offset_x=self.offset_x - left * self.scale_x,
            offset_y=self.offset_y - top * self.scale_y,
            tile=tile,
        )


def _sources(size: int, scale: float, offset: float) -> NDArray[np.int64]:
    count = max(1, round(size * scale + offset))
    return ((np.arange(count) + 0.5 - offset) / scale).astype(np.int64).clip(0, size - 1)


@dataclass(frozen=True, slots=True)
class Span:
    """One side of a resize: `source` pixels become `scaled` pixels, of which `count` from `start` on are kept."""

    source: int
    scaled: int
    start: int
    count: int

    def mirrored(self) -> "Span":
        """The same pixels, counted from the other end."""
        return Span(self.source, self.scaled, self.scaled - self.start - self.count, self.count)


def spans_yx(rule: ResizeRule, height: int, width: int) -> tuple[Span, Span]:
    """What the rule does to the rows and to the columns of an oriented image of this size.

    Sizes and centre are rounded as by torchvision's Resize and CenterCrop, whose weights are in use everywhere.
    """
    match rule.mode:
        case "stretch":
            return Span(height, rule.height, 0, rule.height), Span(width, rule.width, 0, rule.width)
        case "letterbox":
            scale = min(rule.height / height, rule.width / width)
            scaled_height = min(max(round(height * scale), 1), rule.height)
            scaled_width = min(max(round(width * scale), 1), rule.width)
            return Span(height, scaled_height, 0, scaled_height), Span(width, scaled_width, 0, scaled_width)
        case "crop":
            assert rule.short_side is not None  # ResizeRule holds it
            short = min(height, width)
            scaled_height = int(rule.short_side * height / short)
            scaled_width = int(rule.short_side * width / short)
            top = round((scaled_height - rule.height) / 2.0)
            left = round((scaled_width - rule.width) / 2.0)
            return Span(height, scaled_height, top, rule.height), Span(width, scaled_width, left, rule.width)


def geometry_of(y: Span, x: Span) -> Geometry:
    """The way back from the model's input, for an image that was resized along these spans."""
    return Geometry(
        width=x.source,
        height=y.source,
        scale_x=x.scaled / x.source,
        scale_y=y.scaled / y.source,
        offset_x=float(-x.start),
        offset_y=float(-y.start),
    )
