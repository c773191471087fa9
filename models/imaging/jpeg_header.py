"""The markers of a JPEG file: its size, its kind, its scans and its orientation, without decoding it.

Source: ITU-T T.81, annex B; Exif 2.32, section 4.5.4.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from models.errors import Rejected
from models.imaging.orientation import exif_orientation
from models.records import Status

_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_PROGRESSIVE = {0xC2, 0xCA}
_HIERARCHICAL = {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF}  # or differential: no decoder here knows them
_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}  # TEM, restarts, start and end of image

_MARKER = re.compile(rb"\xff[^\x00\xff]")  # 0xFF 0 is data of a scan, 0xFF 0xFF is fill


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The frame header, and what else precedes the first scan."""

    width: int  # as stored, before orientation
    height: int
    components: int
    sampling: str  # horizontal x vertical factors of each component
    orientation: int
    one_scan: bool  # all components in the first, and not progressive: a decoder reads no other
    first_scan: int  # offset of its marker in the file


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Walks the markers up to the first scan.

    Raises Rejected: corrupt where no frame precedes the scan, unsupported for the kinds that no decoder here knows.
    """
    frame: tuple[int, int, int, int] | None = None  # bits, height, width, components
    sampling = ""
    progressive = False
    orientation = 1
    for marker, start, end in segments(data, 2):
        if marker in _FRAMES and frame is None and start + 6 <= len(data):
            frame = struct.unpack_from(">BHHB", data, start)
            sampling = ",".join(f"{factors >> 4}x{factors & 15}" for factors in data[start + 7 : end : 3])
            progressive = marker in _PROGRESSIVE
            if marker in _HIERARCHICAL:
                raise Rejected(Status.UNSUPPORTED, f"JPEG of a kind that no decoder here knows (SOF{marker - 0xC0})")
            if frame[0] != 8:
                raise Rejected(Status.UNSUPPORTED, f"JPEG with {frame[0]} bits per sample; 8 are read here")
        elif marker == _APP1 and data.startswith(b"Exif\0\0", start):
            orientation = exif_orientation(data[start:end])
        elif marker == _SCAN:
            break
    else:
        raise Rejected(Status.CORRUPT, "JPEG: it ends before its first scan")
    if frame is None:
        raise Rejected(Status.CORRUPT, "JPEG: a scan comes before the frame header")
    _, height, width, components = frame
    if not height or not width:
        raise Rejected(Status.CORRUPT, f"JPEG: its header claims {width}×{height} pixels")
    one_scan = not progressive and data[start : start + 1] == bytes([components])
    return JpegHeader(width, height, components, sampling, orientation, one_scan, start - 4)


def has_more_scans(data: bytes, header: JpegHeader, limit: int) -> bool:
    """Whether the first image in the file has more than `limit` scans: each costs a decoder a pass over all pixels."""
    if header.one_scan or data.count(b"\xff\xda", header.first_scan) <= limit:  # quick, and never too low
        return False
    scans = 0
    for marker, _, _ in segments(data, header.first_scan):
        scans += marker == _SCAN
        if marker == _END or scans > limit:
            break
    return scans > limit


def segments(data: bytes, offset: int) -> Iterator[tuple[int, int, int]]:
    """Each marker with start and end of its payload; what lies between segments (scans too) is passed over."""
    while found := _MARKER.search(data, offset):
        marker, start = data[found.end() - 1], found.end()
        if marker in _WITHOUT_LENGTH:
            yield marker, start, start
            offset = start
        else:
            if start + 2 > len(data):
                return
            end = start + int.from_bytes(data[start : start + 2], "big")
            yield marker, start + 2, end
            offset = max(end, start + 2)
