"""Small files of every kind that a folder of images has in store for a reader; made here, from a real photograph."""

import functools
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from models.records import Status

WIDTH, HEIGHT = 451, 300


@dataclass(frozen=True, eq=False)
class OddImage:
    """One file, what has to become of it, and the upright pixels [height, width, 3] where it is readable."""

    name: str
    data: bytes
    status: Status = Status.OK
    reason: str = ""  # part of the reason
    pixels: NDArray[np.uint8] | None = None


@functools.cache
def photograph() -> Image.Image:
    """A real photograph, 451×300."""
    from skimage import data

    return Image.fromarray(data.chelsea())


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    """The file as bytes."""
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    """Metadata with this orientation and nothing else."""
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def overwritten(data: bytes, at: float, size: int, filling: bytes = b"\0") -> bytes:
    """The file with `size` bytes replaced from the fraction `at` of its length on."""
    start = int(len(data) * at)
    return data[:start] + (filling * size)[:size] + data[start + size :]


def png(bits: int, colour_type: int, rows: NDArray[Any], size_hw: tuple[int, int] | None = None) -> bytes:
    """A PNG of these big-endian rows: of a kind that Pillow does not write, or that lies about its size_hw."""
    height, width = size_hw or (
        len(rows),
        rows.nbytes // len(rows) * 8 // bits // {0: 1, 2: 3, 4: 2, 6: 4}[colour_type],
    )

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def with_no_frames(data: bytes) -> bytes:
    """A PNG that announces an animation of no frames, at which Pillow warns."""
    chunk = b"acTL" + bytes(8)
    return data[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def _decoded(data: bytes) -> NDArray[np.uint8]:
    return _rgb(Image.open(io.BytesIO(data)))


def _turned() -> list[OddImage]:
    """The stored pixels are such that each file shows the same upright photograph."""
    upright = _rgb(photograph())
    lying = upright.transpose(1, 0, 2)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: lying,
        6: lying[::-1],  # to be turned clockwise
        7: lying[::-1, ::-1],
        8: lying[:, ::-1],  # to be turned anticlockwise
    }
    odd = []
    for orientation, pixels in stored.items():
        image = Image.fromarray(np.ascontiguousarray(pixels))
        tags = exif(orientation)
        jpeg = encode(image, "JPEG", quality=100, subsampling=0, exif=tags)
        odd += [
            OddImage(f"orientation-{orientation}.jpg", jpeg, pixels=upright),
            OddImage(f"orientation-{orientation}.png", encode(image, "PNG", exif=tags), pixels=upright),
            OddImage(f"orientation-{orientation}.tif", encode(image, "TIFF", exif=tags), pixels=upright),
            OddImage(
                f"orientation-{orientation}.webp",
                encode(image, "WEBP", exif=tags, lossless=True, method=0, quality=0),
                pixels=upright,
            ),
        ]
    return odd


def _readable_jpegs() -> list[OddImage]:
    image = photograph()
    plain = encode(image, "JPEG", quality=90)
    cmyk = encode(image.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe")
    ycck = cmyk[: adobe + 11] + b"\x02" + cmyk[adobe + 12 :]  # the same numbers, declared as YCCK
    jfif = plain.index(b"JFIF\0")
    scan = plain.index(b"\xff\xda")
    end_of_scan_header = scan + 2 + plain[scan + 3]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {
        "plain.jpg": plain,
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": cmyk,
        "ycck.jpg": ycck,
        "profile.jpg": encode(image, "JPEG", icc_profile=profile),
        "two-pictures.mpo": encode(image, "MPO", save_all=True, append_images=[image.rotate(180)]),
        "one-pixel.jpg": encode(image.resize((1, 1)), "JPEG"),
        "strip.jpg": encode(image.resize((8000, 16)), "JPEG"),
        "pole.jpg": encode(image.resize((16, 8000)), "JPEG"),
        "jpeg-named.png": plain,
    }
    # Flaws that no pixel depends on; strict decoders stumble over the last four.
    flawed = {
        "garbage-after-the-end.jpg": plain + b"\xff\xda\xff" * 500,
        "unknown-revision.jpg": plain[: jfif + 5] + b"\x09" + plain[jfif + 6 :],
        "no-scan-parameters.jpg": plain[: end_of_scan_header - 3] + b"\0\0\0" + plain[end_of_scan_header:],
        "padded.jpg": plain[:-2] + b"\0" * 100 + plain[-2:],
        "broken-profile.jpg": plain[:2] + b"\xff\xe2\0\x12ICC_PROFILE\0\x07\x02ab" + plain[2:],
    }
    return [OddImage(name, data, pixels=_decoded(data)) for name, data in files.items()] + [
        OddImage(name, data, pixels=_decoded(plain)) for name, data in flawed.items()
    ]


def _readable_others() -> list[OddImage]:
    image = photograph()
    rgb, grey = _rgb(image), np.asarray(image.convert("L"))
    alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))  # [height, width]
    share = alpha[..., None] / 255
    on_white = (rgb * share + 255 * (1 - share) + 0.5).astype(np.uint8)
    grey_on_white = np.repeat((grey[..., None] * share + 255 * (1 - share) + 0.5).astype(np.uint8), 3, axis=2)
    greys = np.repeat(grey[..., None], 3, axis=2)
    deep = grey.astype(np.uint16) * 257  # the full range: clipping at 255 would make it white
    deep_rgb = (rgb.astype(">u2") * 257).reshape(HEIGHT, WIDTH * 3)
    grey_alpha = Image.merge("LA", [image.convert("L"), Image.fromarray(alpha)])
    with_alpha = Image.fromarray(np.dstack([rgb, alpha]))
    palette = image.quantize(64)
    holes = bytes([0, 128] + [255] * 62)
    hole = np.array([*holes] + [255] * 192)[np.asarray(palette)][..., None] / 255
    palette_on_white = (_rgb(palette) * hole + 255 * (1 - hole) + 0.5).astype(np.uint8)
    lossless = {"lossless": True, "method": 0, "quality": 0}
    animated = {"save_all": True, "append_images": [image.rotate(angle) for angle in (90, 180)]}
    bilevel = image.convert("1")
    return [
        OddImage("plain.png", encode(image, "PNG"), pixels=rgb),
        OddImage("plain.bmp", encode(image, "BMP"), pixels=rgb),
        OddImage("plain.tif", encode(image, "TIFF"), pixels=rgb),
        OddImage("deflated.tif", encode(image, "TIFF", compression="tiff_adobe_deflate"), pixels=rgb),
        OddImage("plain.webp", encode(image, "WEBP", **lossless), pixels=rgb),
        OddImage("png-named.jpg", encode(image, "PNG"), pixels=rgb),
        OddImage("no-extension", encode(image, "PNG"), pixels=rgb),
        OddImage("one-pixel.png", encode(Image.fromarray(rgb[:1, :1]), "PNG"), pixels=rgb[:1, :1]),
        OddImage("grey-16-bit.png", encode(Image.fromarray(deep), "PNG"), pixels=greys),
        OddImage("grey-16-bit.tif", encode(Image.fromarray(deep), "TIFF"), pixels=greys),
        OddImage("rgb-16-bit.png", png(16, 2, deep_rgb), pixels=rgb),
        OddImage("float.tif", encode(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"), pixels=greys),
        OddImage("32-bit.tif", encode(Image.fromarray(deep.astype(np.int32)), "TIFF"), pixels=greys),
        OddImage("alpha.png", encode(with_alpha, "PNG"), pixels=on_white),
        OddImage("alpha.webp", encode(with_alpha, "WEBP", lossless=True, method=0, exact=True), pixels=on_white),
        OddImage("alpha.tif", encode(with_alpha, "TIFF"), pixels=on_white),
        OddImage("grey-alpha.png", encode(grey_alpha, "PNG"), pixels=grey_on_white),
        OddImage("palette.png", encode(palette, "PNG"), pixels=_rgb(palette)),
        OddImage("palette-alpha.png", encode(palette, "PNG", transparency=holes), pixels=palette_on_white),
        OddImage("one-bit.png", encode(bilevel, "PNG"), pixels=_rgb(bilevel)),
        OddImage("one-bit.tif", encode(bilevel, "TIFF", compression="group4"), pixels=_rgb(bilevel)),
        OddImage("cmyk.tif", encode(image.convert("CMYK"), "TIFF"), pixels=_rgb(image.convert("CMYK"))),
        OddImage("animated.gif", encode(palette, "GIF", **animated), pixels=_rgb(palette)),
        OddImage("animated.webp", encode(image, "WEBP", **animated, **lossless), pixels=rgb),
        OddImage("animated.png", encode(image, "PNG", **animated), pixels=rgb),
        OddImage("no-frames.png", with_no_frames(encode(image, "PNG")), pixels=rgb),
        OddImage("pages.tif", encode(image, "TIFF", **animated), pixels=rgb),
    ]  # fmt: skip


def _corrupt() -> list[OddImage]:
    image = photograph()
    writers: dict[str, Callable[[], bytes]] = {
        "jpg": lambda: encode(image, "JPEG", quality=95),
        "progressive.jpg": lambda: encode(image, "JPEG", quality=95, progressive=True),
        "png": lambda: encode(image, "PNG"),
        "gif": lambda: encode(image.quantize(), "GIF"),
        "webp": lambda: encode(image, "WEBP"),
        "bmp": lambda: encode(image, "BMP"),
        "tif": lambda: encode(image, "TIFF", compression="tiff_lzw"),
    }
    files = {}
    for kind, write in writers.items():
        data = write()
        for percent in (1, 50, 90, 99):
            files[f"cut-at-{percent}.{kind}"] = data[: len(data) * percent // 100]
    jpeg, lossless = writers["jpg"](), writers["png"]()
    files |= {
        "no-end-marker.jpg": jpeg[:-2],
        "only-the-first-bytes.jpg": jpeg[:3],
        "no-end-chunk.png": lossless[:-12],
        "half-a-signature.png": lossless[:9],
        "rot-in-the-middle.jpg": overwritten(jpeg, 0.5, 4096),
        "rot-and-padding.jpg": overwritten(jpeg, 0.5, 4096)[:-2] + b"\0" * 100 + jpeg[-2:],
        "rot-in-the-middle.progressive.jpg": overwritten(writers["progressive.jpg"](), 0.4, 4096),
        "rot-in-the-middle.png": overwritten(lossless, 0.5, 1, b"\x55"),
        "no-pixels.jpg": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "zero-height.jpg": _with_jpeg_size(jpeg, 0, WIDTH),
    }
    return [OddImage(name, data, Status.CORRUPT) for name, data in files.items()]


def _with_jpeg_size(data: bytes, height: int, width: int) -> bytes:
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def _too_large() -> list[OddImage]:
    image = photograph()
    progressive = encode(image, "JPEG", progressive=True)
    scan = progressive.index(b"\xff\xda")
    next_scan = progressive.index(b"\xff\xc4", scan)
    many_scans = progressive[:scan] + progressive[scan:next_scan] * 101 + progressive[next_scan:]
    plain = encode(image, "JPEG")
    grey_scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(9)  # of the first component alone
    many_grey_scans = plain[: plain.index(b"\xff\xda")] + grey_scan * 101 + b"\xff\xd9"
    gif = encode(image.quantize(), "GIF")
    bmp = encode(image, "BMP")
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBP" + canvas
    files = {
        "claims-60000.jpg": _with_jpeg_size(plain, 60000, 60000),
        "claims-60000.png": png(8, 2, np.zeros((1, 3), np.uint8), (60000, 60000)),
        "claims-60000.gif": gif[:6] + struct.pack("<HH", 60000, 60000) + gif[10:],
        "claims-60000.bmp": bmp[:18] + struct.pack("<ii", 60000, 60000) + bmp[26:],
        "claims-16383.webp": webp,
        "claims-50-million-in-a-row.png": png(8, 2, np.zeros((1, 3), np.uint8), (1, 50_000_000)),
    }
    return [OddImage(name, data, Status.TOO_LARGE, "the limit") for name, data in files.items()] + [
        OddImage("many-scans.jpg", many_scans, Status.TOO_LARGE, "more than 100 JPEG scans"),
        OddImage("many-grey-scans.jpg", many_grey_scans, Status.TOO_LARGE, "more than 100 JPEG scans"),
    ]


def _unsupported() -> list[OddImage]:
    twelve_bits = encode(photograph(), "JPEG")
    frame = twelve_bits.index(b"\xff\xc0")
    files = {
        "text.jpg": (b"This is not a picture.\n" * 40, "text"),
        "short-text.jpg": ("Käse\n".encode(), "text"),
        "page.jpg": (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        "document.jpg": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "PDF"),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        "drawing.jpg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        "answer.jpg": (b'{"error": "not found"}', "JSON"),
        "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        "web.jpg": (b"\0\0\0\x1cftypavif\0\0\0\0mif1avif", "AVIF"),
        "film.jpg": (b"\0\0\0\x18ftypisom\0\0\2\0isommp42", "video"),
        "layers.jpg": (b"8BPS\0\1" + bytes(20), "Photoshop"),
        "archive.jpg": (b"PK\3\4" + bytes(30), "ZIP"),
        "zeros.jpg": (bytes(4096), "zeros"),
        "noise.jpg": (np.random.default_rng(0).bytes(4096), "unknown binary data"),
        "riff.webp": (b"RIFF\x24\0\0\0WAVEfmt ", "unknown binary data"),
        "twelve-bits.jpg": (twelve_bits[: frame + 4] + b"\x0c" + twelve_bits[frame + 5 :], "12 bits"),
        "hierarchical.jpg": (twelve_bits[: frame + 1] + b"\xc5" + twelve_bits[frame + 2 :], "SOF5"),
    }
    return [OddImage(name, data, Status.UNSUPPORTED, reason) for name, (data, reason) in files.items()]


@functools.cache
def odd_images() -> tuple[OddImage, ...]:
    """All of them; names are unique."""
    empty = [OddImage("empty.jpg", b"", Status.EMPTY, "zero bytes")]
    return (
        *empty,
        *_readable_jpegs(),
        *_readable_others(),
        *_turned(),
        *_corrupt(),
        *_too_large(),
        *_unsupported(),
    )
