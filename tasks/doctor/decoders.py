"""What opens images: the strict JPEG decoder, Pillow's formats, and the resize kernel in C."""

import io

import numpy as np

from tasks.doctor.finding import Finding, ok, problem, warning

# Our formats that Pillow may have been built without.
_FEATURES = {"jpg": "JPEG", "zlib": "PNG", "webp": "WebP", "libtiff": "compressed TIFF"}


def check_decoders() -> list[Finding]:
    """A JPEG there and back, each format that Pillow opens, and which resize kernel is there."""
    return [_jpeg(), _pillow(), _resize()]


def _jpeg() -> Finding:
    import simplejpeg

    grey = np.full((16, 16, 3), 128, np.uint8)
    pixels = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(grey), "RGB", strict=True)
    if np.abs(pixels.astype(int) - 128).max() > 2:
        return problem("decoders", "simplejpeg decodes wrongly", "pip install --force-reinstall simplejpeg")
    return ok("decoders", "JPEG strictly, by simplejpeg")


def _pillow() -> Finding:
    from PIL import Image, features

    missing = [name for feature, name in _FEATURES.items() if not features.check(feature)]
    if missing:
        mend = "pip install --force-reinstall --only-binary :all: pillow"
        return warning("decoders", f"this Pillow was built without {', '.join(missing)}", mend)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, "PNG")
    with Image.open(buffer, formats=["PNG"]) as image:
        pixel = image.getpixel((0, 0))
    if pixel != (1, 2, 3):
        return problem("decoders", "Pillow decodes wrongly", "pip install --force-reinstall pillow")
    return ok("decoders", "PNG, WebP, TIFF, GIF and BMP, by Pillow")


def _resize() -> Finding:
    from models.imaging import resize

    if resize._resize is None:
        mend = "install a C compiler (apt-get install gcc), then pip install --force-reinstall --no-deps pixelmill"
        return warning(
            "resize kernel", "the one in C is not there; Pillow resizes, slower and to the same pixels", mend
        )
    return ok("resize kernel", "the one in C is there")
