"""From the bytes of one image to the pixels that a network takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import Rejected
from models.imaging.geometry import Geometry, ResizeRule, geometry_of, spans_yx
from models.imaging.header import sniff, webp_canvas
from models.imaging.jpeg_decode import decode_jpeg
from models.imaging.jpeg_header import has_more_scans, read_jpeg_header
from models.imaging.orientation import orient, stored_spans_yx, swaps_sides
from models.imaging.pillow_decode import decode_image, open_image
from models.imaging.resize import resize
from models.imaging.tiles import Tiling, tiles_of
from models.records import Status

_KEPT_BYTES = 64 * 2**20  # one huge photograph must not hold its memory until the run ends
_LONGEST_SIDE = 1_000_000  # pixels; the weights of a resize grow with it


@dataclass(frozen=True)
class Limits:
    """What an image may cost, judged by its header before it is decoded."""

    max_pixels: int = 100_000_000
    max_jpeg_scans: int = 100


class Preparer:
    """Decodes, turns and resizes images one after the other. It reuses its memory: one for each thread."""

    def __init__(self, rule: ResizeRule, limits: Limits | None = None, tiling: Tiling | None = None):
        self.rule = rule
        self.limits = limits or Limits()
        self.tiling = tiling
        self._pixels = np.empty(0, np.uint8)

    def prepare(self, data: bytes, out: NDArray[np.uint8]) -> Geometry:
        """Fills `out` [height, width, 3] with RGB pixels of the whole image as the rule wants them.

        Raises Rejected with status empty, unsupported, too_large or corrupt, and then `out` holds nothing of use.
        """
        self._check(out)
        with self._guarded():
            pixels, orientation = self._decode(data)  # [height, width, 3] as stored
            return self._fit(pixels, orientation, out)

    def views(self, data: bytes, next_out: Callable[[], NDArray[np.uint8]]) -> Iterator[Geometry]:
        """What the model shall see of an image, one after the other: the whole image, its tiles, or both.

        Each view fills what `next_out` gives as in `prepare`; the image is decoded once, before the first. Raises as
        `prepare`, perhaps after some views.
        """
        if self.tiling is None:
            yield self.prepare(data, next_out())
            return
        with self._guarded():
            pixels, orientation = self._decode(data)  # [height, width, 3] as stored
            upright = orient(pixels, orientation)
            height, width = upright.shape[:2]
            tiles = tiles_of(height, width, self.tiling)
            if not tiles or self.tiling.and_whole:
                yield self._fit(pixels, orientation, self._check(next_out()))
            for tile in tiles:
                left, top, right, bottom = tile.shown_xyxy
                alone = np.ascontiguousarray(upright[top:bottom, left:right])
                yield self._fit(alone, 1, self._check(next_out())).of_tile(tile, height, width)

    def _check(self, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if out.shape != (self.rule.height, self.rule.width, 3) or out.dtype != np.uint8:
            raise ValueError(f"out is uint8 {(self.rule.height, self.rule.width, 3)}, not {out.dtype} {out.shape}")
        return out

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise Rejected(Status.CORRUPT, "it needs more memory than there is") from error
        finally:
            if self._pixels.nbytes > _KEPT_BYTES:
                self._pixels = np.empty(0, np.uint8)

    def _decode(self, data: bytes) -> tuple[NDArray[np.uint8], int]:
        name = sniff(data)
        if name == "JPEG":
            header = read_jpeg_header(data)
            self._check_size(header.width, header.height)
            if has_more_scans(data, header, self.limits.max_jpeg_scans):
                raise Rejected(Status.TOO_LARGE, f"more than {self.limits.max_jpeg_scans} JPEG scans")
            return decode_jpeg(
                data, header, self._buffer(header.height * header.width * max(3, header.components))
            ), header.orientation
        if name == "WEBP" and (canvas := webp_canvas(data)):
            self._check_size(canvas.width, canvas.height)
        image = open_image(data, name)
        self._check_size(*image.size)
        return decode_image(image)

    def _fit(self, pixels: NDArray[np.uint8], orientation: int, out: NDArray[np.uint8]) -> Geometry:
        height, width = pixels.shape[:2]
        if swaps_sides(orientation):
            height, width = width, height
        y, x = spans_yx(self.rule, height, width)
        stored_y, stored_x = stored_spans_yx(y, x, orientation)
        target = out[: y.count, : x.count]
        if orientation == 1:
            resize(pixels, stored_y, stored_x, self.rule.interpolation, target)
        else:
            small = np.empty((stored_y.count, stored_x.count, 3), np.uint8)
            resize(pixels, stored_y, stored_x, self.rule.interpolation, small, lying=swaps_sides(orientation))
            target[:] = orient(small, orientation)
        out[y.count :] = self.rule.pad_rgb
        out[: y.count, x.count :] = self.rule.pad_rgb
        return geometry_of(y, x)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise Rejected(Status.TOO_LARGE, f"{width}×{height} pixels; the limit is {self.limits.max_pixels:,} pixels")
        if max(width, height) > _LONGEST_SIDE:
            raise Rejected(Status.TOO_LARGE, f"{width}×{height} pixels; the limit of one side is {_LONGEST_SIDE:,}")

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        if self._pixels.nbytes < size:
            self._pixels = np.empty(size, np.uint8)
        return self._pixels
