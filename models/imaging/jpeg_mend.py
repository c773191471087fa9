"""Flaws of a JPEG file that a strict decoder refuses although no pixel depends on them.

They are mended in a copy, which is decoded strictly again: nothing else in the file is let pass.
"""

from models.imaging.jpeg_header import JpegHeader, segments

_SCAN, _END, _JFIF, _ICC, _ADOBE = 0xDA, 0xD9, 0xE0, 0xE2, 0xEE


def mend(data: bytes, header: JpegHeader, warning: str) -> bytes | None:
    """The file without the flaw that libjpeg's warning names; None where it names none of the harmless ones."""
    if "Invalid SOS parameters for sequential JPEG" in warning:
        return _with_sequential_parameters(data, header)
    if "unknown JFIF revision number" in warning:
        return _with_byte(data, _JFIF, b"JFIF\0", 5, 1)
    if "Unknown Adobe color transform code" in warning:
        return _with_byte(data, _ADOBE, b"Adobe", 11, 2 if header.components == 4 else 1)
    if "bad ICC marker" in warning:
        return _without_icc_profile(data)
    if "extraneous bytes before marker 0xd9" in warning:
        return _without_padding(data, header)
    return None


def _with_sequential_parameters(data: bytes, header: JpegHeader) -> bytes:
    """Some encoders leave out the three bytes that mean something in progressive files only: 0, 63, 0."""
    patched = bytearray(data)
    for marker, _, end in segments(data, header.first_scan):
        if marker == _END:
            break
        if marker == _SCAN:
            patched[end - 3 : end] = b"\x00\x3f\x00"
    return bytes(patched)


def _with_byte(data: bytes, segment: int, name: bytes, position: int, value: int) -> bytes | None:
    for marker, start, end in segments(data, 2):
        if marker == segment and data.startswith(name, start) and start + position < end:
            return data[: start + position] + bytes([value]) + data[start + position + 1 :]
        if marker == _SCAN:
            break
    return None


def _without_icc_profile(data: bytes) -> bytes | None:
    """Colours are taken as sRGB, so a profile in pieces that do not fit together changes nothing."""
    kept, offset = [], 0
    for marker, start, end in segments(data, 2):
        if marker == _SCAN:
            break
        if marker == _ICC and data.startswith(b"ICC_PROFILE\0", start):
            kept.append(data[offset : start - 4])
            offset = end
    return b"".join([*kept, data[offset:]]) if offset else None


def _without_padding(data: bytes, header: JpegHeader) -> bytes | None:
    """Cameras that fill up to a sector leave zeros between the last pixel and the end marker."""
    for marker, start, _ in segments(data, header.first_scan):
        if marker == _END:
            body = data[: start - 2].rstrip(b"\0")
            if body.endswith(b"\xff"):  # 0xFF 0 is one byte of the scan
                body += b"\0"
            return body + data[start - 2 :] if len(body) < start - 2 else None
    return None
