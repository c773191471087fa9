"""Back from what a model made of the views of an image to one image of the original's size.

What was made of a letterboxed view is cut out of its padding first. Tiles overlap: there one fades into the next, so
that no border shows.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.imaging.geometry import Geometry, Interpolation, Span
from models.imaging.resize import resize

_BAND = 128  # rows that are blended at once: floats of a whole large image would take twelve bytes a pixel

Views = Sequence[tuple[Geometry, NDArray[np.uint8]]]


def composed(views: Views, interpolation: Interpolation) -> NDArray[np.uint8]:
    """The image [height, width, 3] that the views [h, w, 3] are of; together they show all of it.

    Where several show a pixel, each counts by the distance to its own border, the last pixel within it counting 1.
    """
    image = views[0][0]
    whole = np.empty((image.height, image.width, 3), np.uint8)
    contents = [_content(geometry, made) for geometry, made in views]
    if len(views) == 1:
        span_y, span_x = _way_back(image, contents[0], 0, image.height)
        resize(contents[0], span_y, span_x, interpolation, whole)
        return whole
    for top in range(0, image.height, _BAND):
        bottom = min(top + _BAND, image.height)
        blended = np.zeros((bottom - top, image.width, 3), np.float32)
        weights = np.zeros((bottom - top, image.width, 1), np.float32)
        for (geometry, _), content in zip(views, contents, strict=True):
            left, tile_top, right, tile_bottom = geometry.shown_xyxy
            first, last = max(top, tile_top), min(bottom, tile_bottom)
            if first >= last:
                continue
            rows = np.empty((last - first, right - left, 3), np.uint8)
            span_y, span_x = _way_back(geometry, content, first - tile_top, last - first)
            resize(content, span_y, span_x, interpolation, rows)
            fade_y = _fade(tile_bottom - tile_top)[first - tile_top : last - tile_top]
            weight = (fade_y[:, None] * _fade(right - left)[None, :])[..., None]  # [rows, columns, 1]
            blended[first - top : last - top, left:right] += rows * weight
            weights[first - top : last - top, left:right] += weight
        whole[top:bottom] = np.rint(blended / weights)
    return whole


def _content(geometry: Geometry, made: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Without the padding."""
    left, top, right, bottom = geometry.shown_xyxy
    rows = min(max(round((bottom - top) * geometry.scale_y), 1), made.shape[0])
    columns = min(max(round((right - left) * geometry.scale_x), 1), made.shape[1])
    return np.ascontiguousarray(made[:rows, :columns])


def _way_back(geometry: Geometry, content: NDArray[np.uint8], start: int, count: int) -> tuple[Span, Span]:
    """The resize to the size of what the view shows, of which `count` rows from `start` on are wanted."""
    left, top, right, bottom = geometry.shown_xyxy
    return Span(content.shape[0], bottom - top, start, count), Span(content.shape[1], right - left, 0, right - left)


def _fade(size: int) -> NDArray[np.float32]:
    """The weight of each pixel along one side: its distance to the nearer border."""
    steps = np.arange(1, size + 1)
    return np.minimum(steps, steps[::-1]).astype(np.float32)
