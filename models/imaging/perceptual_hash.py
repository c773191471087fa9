"""What an image looks like, in 324 bytes: enough to find its re-encoded, resized and slightly brightened copies.

The hash is of the usual kind (signs of low frequencies of a cosine transform; Zauner, "Implementation and benchmarking
of perceptual image hash functions", 2010). Alone it takes all handwritten zeros for one image and all dark microscope
fields for another, so it only proposes: a small thumbnail decides, by what differs relative to its own contrast.
"""

import numpy as np
from numpy.typing import NDArray

from models.imaging.geometry import ResizeRule

SIDE = 16
THUMBNAIL_RULE = ResizeRule("stretch", SIDE, SIDE)  # what `signature` takes; antialiased

BANDS = 2  # words of the hash, each to be found alone
BITS = 32  # of a word
DOUBTFUL = 6  # bits of each word that are nearest to the other value

SIGNATURE = np.dtype(
    [
        ("words", np.uint32, BANDS),
        ("doubtful", np.uint8, (BANDS, DOUBTFUL)),  # which bits a copy may have otherwise, most doubtful first
        ("position", np.float32),  # -1 to 1; copies are near each other
        ("mean", np.float32),  # grey levels
        ("contrast", np.float32),  # standard deviation of the thumbnail, grey levels
        ("detail", np.float32),  # of it what a smooth surface does not explain: shading does not count
        ("grey", np.int8, SIDE * SIDE),  # deviation from the mean, scaled to the largest
        ("chroma", np.int8, (2, 16)),  # half of R-G and of B-G, over 4×4 fields
    ]
)

# Below this an image is flat or a mere gradient, and looks like every other one: grey levels.
LEAST_DETAIL = 1.5

# What copies may differ by, in grey levels of the thumbnail: noise of JPEG, and a share of the contrast. Of 1,797
# handwritten digits no two are nearer than .085 of their contrast and .096 of their detail. Of 744 copies of digits
# (64×64), microscope fields and photographs, at JPEG quality 30, at .3 of the size, or 10 % brighter, all but one are
# within these bounds.
_NOISE = 0.6
_OF_CONTRAST = 0.05
_OF_DETAIL = 0.075
_BRIGHTER = 40.0  # grey levels
_STEEPER = 1.35
_CHROMA = 3.0
_OF_CHROMA = 0.25

_SHADING_DEGREE = 3
_DEAD_ZONE = 0.02  # of the contrast: where an image is symmetric, half of its frequencies are nothing but noise

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def _cosines() -> NDArray[np.float32]:
    """The orthonormal DCT-II: [SIDE frequencies, SIDE samples]."""
    frequency, sample = np.mgrid[:SIDE, :SIDE]
    basis = np.cos(np.pi * (2 * sample + 1) * frequency / (2 * SIDE)) * np.sqrt(2 / SIDE)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _polynomials() -> NDArray[np.float32]:
    """Orthonormal products of powers of y and x of at most _SHADING_DEGREE, but the constant: [SIDE * SIDE, 9]."""
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE * 2 - 1
    degrees = [(of_y, of_x) for of_y in range(_SHADING_DEGREE + 1) for of_x in range(_SHADING_DEGREE + 1 - of_y)]
    powers = np.stack([(y**of_y * x**of_x).ravel() for of_y, of_x in degrees], axis=1)  # the first is constant
    return np.linalg.qr(powers)[0][:, 1:].astype(np.float32)


_DCT = _cosines()
_SHADING = _polynomials()
# The lowest 64 frequencies but the mean and the one that gives the position, in turns to either word.
_HASHED = sorted(
    ((y, x) for y in range(9) for x in range(9) if (y, x) not in ((0, 0), (0, 1))), key=lambda at: (sum(at), at)
)[: BANDS * BITS]


def signature(thumbnail: NDArray[np.uint8]) -> NDArray[np.void]:
    """The SIGNATURE [] of an upright image, from its RGB pixels [SIDE, SIDE, 3] resized by THUMBNAIL_RULE."""
    rgb = thumbnail.astype(np.float32)
    grey = rgb @ _GREY  # [SIDE, SIDE]
    deviation = grey - grey.mean()
    frequencies = _DCT @ deviation @ _DCT.T
    contrast = float(deviation.std())
    scale = max(contrast * SIDE, 1e-6)  # the length of all frequencies
    margins = np.array([frequencies[at] for at in _HASHED], np.float32) - _DEAD_ZONE * scale
    margins = margins.reshape(BITS, BANDS).T  # [BANDS, BITS]
    shading = deviation.ravel() @ _SHADING
    halves = (rgb[..., [0, 2]] - rgb[..., [1]]) / 2  # [SIDE, SIDE, 2]
    fields = halves.reshape(4, SIDE // 4, 4, SIDE // 4, 2).mean(axis=(1, 3)).reshape(16, 2)

    record = np.zeros((), SIGNATURE)
    record["words"] = (margins > 0).astype(np.uint32) @ (np.uint32(1) << np.arange(BITS, dtype=np.uint32))
    record["doubtful"] = np.argsort(np.abs(margins), axis=1, kind="stable")[:, :DOUBTFUL]
    record["position"] = frequencies[0, 1] / scale
    record["mean"] = grey.mean()
    record["contrast"] = contrast
    record["detail"] = np.sqrt(max(contrast**2 - float(shading @ shading) / SIDE**2, 0.0))
    record["grey"] = np.rint(deviation.ravel() * (127 / max(float(np.abs(deviation).max()), 1e-6)))
    record["chroma"] = np.rint(fields.T)
    return record


def reach(signatures: NDArray[np.void]) -> NDArray[np.float32]:
    """How far from its position a copy of each image may be."""
    return _OF_CONTRAST + _NOISE / np.maximum(signatures["contrast"], 1e-6)


def are_copies(left: NDArray[np.void], right: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether the images of each pair of SIGNATUREs [n] show the same; never for what has too little detail."""
    contrast = np.minimum(left["contrast"], right["contrast"])
    detail = np.minimum(left["detail"], right["detail"])
    steeper = np.maximum(left["contrast"], right["contrast"]) / np.maximum(contrast, 1e-6)
    ours, theirs = _unit(left["grey"]), _unit(right["grey"])  # [n, SIDE * SIDE]
    apart = np.linalg.norm(ours - theirs, axis=1) * contrast
    ours, theirs = _unit(_without_shading(ours)), _unit(_without_shading(theirs))
    details_apart = np.linalg.norm(ours - theirs, axis=1) * detail
    chromas = [side["chroma"].reshape(-1, 32).astype(np.float32) for side in (left, right)]
    chroma = np.minimum(*(np.sqrt((each**2).mean(axis=1)) for each in chromas))
    chroma_apart = np.sqrt(((chromas[0] - chromas[1]) ** 2).mean(axis=1))
    return (
        (detail >= LEAST_DETAIL)
        & (apart <= _NOISE + _OF_CONTRAST * contrast)
        & (details_apart <= _NOISE + _OF_DETAIL * detail)
        & (np.abs(left["mean"] - right["mean"]) <= _BRIGHTER)
        & (steeper <= _STEEPER)
        & (chroma_apart <= _CHROMA + _OF_CHROMA * chroma)
    )


def _unit(vectors: NDArray) -> NDArray[np.float32]:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _without_shading(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.subtract(vectors, (vectors @ _SHADING) @ _SHADING.T, dtype=np.float32)
