"""What a file is, from its first bytes, before any decoder sees it."""

import struct
from dataclasses import dataclass
from typing import Literal

from models.errors import Rejected
from models.records import Status

Format = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]

_ALLOWED: list[tuple[bytes, Format]] = [
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
]

_KNOWN: list[tuple[bytes, str]] = [
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "Photoshop"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"PK\x03\x04", "ZIP"),
    (b"Rar!", "RAR"),
    (b"\x1f\x8b", "gzip"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"OggS", "Ogg"),
    (b"ID3", "MP3"),
    (b"\x7fELF", "program"),
    (b"MZ", "program"),
    (b"\0\0\x01\0", "icon"),
    (b"qoif", "QOI"),
    (b"SIMPLE", "FITS"),
    (b"DDS ", "DDS"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"PAR1", "Parquet"),
    (b"\x93NUMPY", "NumPy array"),
    (b"\x89HDF", "HDF5"),
    (b"P6", "PPM"),
    (b"P5", "PGM"),
]

# The major brand of an ISO base media file (ISO/IEC 14496-12, section 4.3).
_BRANDS: dict[bytes, str] = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"hevc": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"crx ": "Canon raw",
}


def sniff(data: bytes) -> Format:
    """The format on the allow-list whose signature the data begins with.

    Raises Rejected: empty for zero bytes, unsupported for everything else, with what it looks like.
    """
    if not data:
        raise Rejected(Status.EMPTY, "zero bytes")
    for signature, name in _ALLOWED:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise Rejected(Status.UNSUPPORTED, f"not an image format that is read here: looks like {_looks_like(data)}")


def _looks_like(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "MP4 or QuickTime video")
    for signature, name in _KNOWN:
        if data.startswith(signature):
            return name
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return "SVG"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML"
    if start.startswith((b"<?xml", b"<")):
        return "XML"
    if start.startswith((b"{", b"[")):
        return "JSON"
    head = data[:512]
    if not any(head):
        return "zeros only"
    try:
        text = head.decode("utf-8", errors="strict" if len(data) <= 512 else "ignore")
    except UnicodeDecodeError:
        return "unknown binary data"
    binary = sum(not character.isprintable() and character not in "\t\r\n\f" for character in text)
    return "unknown binary data" if binary or len(text.encode()) < len(head) - 3 else "text"


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels as stored, before orientation."""

    width: int
    height: int


def webp_canvas(data: bytes) -> Size | None:
    """The canvas of a WebP file, whose decoder allocates it on opening; None where the first chunk is none of three.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return Size(1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"))
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 1)
        return Size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return Size(width & 0x3FFF, height & 0x3FFF)
    return None
