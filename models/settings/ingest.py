"""The settings of `ingest`."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.settings.fields import Settings, StoreName, uri_field, without_credentials

Format = Literal["auto", "folder", "coco", "voc", "yolo", "masks"]
SPLITS = ("train", "val", "test")


def parse_split(text: str) -> dict[str, float]:
    """`train=.8,val=.1,test=.1` as shares by split, in the order of SPLITS, zeros left out. Raises ValueError."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            share = float(value)
        except ValueError:
            raise ValueError(f"expected like train=.8,val=.1,test=.1, got {part.strip()!r}") from None
        if name not in SPLITS or name in shares:
            raise ValueError(f"the splits are {', '.join(SPLITS)}, each at most once, got {name!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"a share is between 0 and 1, got {name}={value}")
        shares[name] = share
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"the shares must add up to 1, got {sum(shares.values()):g}")
    return {name: shares[name] for name in SPLITS if shares.get(name)}


def _is_split(text: str) -> str:
    parse_split(text)
    return text


class IngestSettings(Settings):
    """What to make a data set of, and how."""

    source: Annotated[
        str,
        uri_field("A folder, a bucket prefix, or a .zip or .tar archive with images and their labels."),
        AfterValidator(without_credentials),
    ]
    name: StoreName
    format: Annotated[
        Format, Field(description="How the labels are written; auto looks at the source and says what it saw.")
    ] = "auto"
    annotations: Annotated[
        str | None,
        uri_field("The annotation file or folder, where it does not lie at its usual place in the source."),
        AfterValidator(lambda uri: uri if uri is None else without_credentials(uri)),
    ] = None
    split: Annotated[
        str,
        Field(description="Shares of the splits, where the source brings none of its own."),
        AfterValidator(_is_split),
    ] = "train=.8,val=.1,test=.1"
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Another seed, other splits.")] = 0
    copy_images: Annotated[
        bool,
        Field(description="Copy the images into the store; else the data set points to where they are."),
    ] = False
    max_pixels: Annotated[int, Field(ge=1, description="Refuse images with more pixels, by their header.")] = (
        100_000_000
    )
