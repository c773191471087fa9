"""The images that a translator makes: one file per row of its table.

tables/NAME/outputs/model=M@V/3f/lisbon-3f9c….png

The name follows from the image and its fingerprint, so that a shard that is computed again writes the same files. A
file lies in the store before the part that names it: a kill leaves files without a row, never a row without its file.
"""

import hashlib
import re

from models.imaging.encode import SUFFIX
from models.records import ListedImage
from models.settings.fields import ImageFormat
from tasks.storage import join
from tasks.table import Table

_DIGITS = 24  # of the SHA-256: enough for 10^12 images
_STEM = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_STEM = 60


def outputs_uri(table: Table, model: str) -> str:
    """The folder of what one model (NAME@VERSION) made."""
    return join(table.uri, "outputs", f"model={model}")


def output_uri(table: Table, model: str, image: ListedImage, image_format: ImageFormat) -> str:
    """Where the file made of this version of an image lies."""
    digest = hashlib.sha256(f"{image.image}\n{image.fingerprint}".encode()).hexdigest()[:_DIGITS]
    stem = image.image.rsplit("/", 1)[-1].rpartition(".")[0] or image.image.rsplit("/", 1)[-1]
    stem = _STEM.sub("_", stem)[:_LONGEST_STEM].strip("._") or "image"
    return join(outputs_uri(table, model), digest[:2], f"{stem}-{digest}.{SUFFIX[image_format]}")


def missing_outputs(table: Table, model: str, outputs: set[str]) -> list[str]:
    """Those of these URIs that no file lies at, sorted; each folder is listed once."""
    folder = outputs_uri(table, model)
    present = {
        join(folder, fan, name)
        for fan in sorted({uri.rsplit("/", 2)[-2] for uri in outputs if uri.startswith(f"{folder}/")})
        for name in table.storage.names(join(folder, fan))
    }
    return sorted(outputs - present)
