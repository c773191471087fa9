"""The settings of `predict`."""

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from models.settings.fields import Device, Engine, Scope, Settings, TableName, uri_field, without_credentials

OVERLAP = 0.2  # of tiles, unless the settings say otherwise


def _of_tiles(overlap: float | None, info: ValidationInfo) -> float | None:
    if overlap is not None and info.data.get("tile") is None:
        raise ValueError("it is the overlap of tiles, so it needs --tile")
    return overlap


class PredictSettings(Settings):
    """What to predict, with which model, into which table, and how to use the machine."""

    source: Annotated[
        str,
        uri_field("A folder or bucket prefix, one image, or a .txt/.csv/.parquet list of image URIs."),
        AfterValidator(without_credentials),
    ]
    model: Annotated[str, Field(description="NAME (newest version), NAME@production or NAME@VERSION.", min_length=1)]
    table: TableName
    recursive: Annotated[bool, Field(description="Descend into sub-folders.")] = True
    score: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Drop findings scored lower, 0 to 1; by default the model's own threshold (detection).",
        ),
    ] = None
    top_k: Annotated[int, Field(ge=1, description="Labels kept per image, best first (classification).")] = 5
    tile: Annotated[
        int | None,
        Field(
            ge=32,
            description="Cut larger images into overlapping tiles, so many pixels a side; by default none are cut.",
        ),
    ] = None
    overlap: Annotated[
        float | None,
        Field(ge=0, lt=0.9, description=f"Share of a tile's side that its neighbour shows too; {OVERLAP} by default."),
        AfterValidator(_of_tiles),
    ] = None
    max_pixels: Annotated[int, Field(ge=1, description="Refuse images with more pixels, by their header.")] = (
        100_000_000
    )
    limit: Annotated[int | None, Field(ge=1, description="Claim at most this many new images; by default all.")] = None
    retry_unreadable: Annotated[
        bool, Field(description="Claim again the images whose last row is unreadable or missing.")
    ] = False
    scope: Annotated[
        Scope,
        Field(
            description="table: finish whatever earlier runs left open in the table; source: only what they claimed "
            "from this very source."
        ),
    ] = "table"
    engine: Annotated[
        Engine, Field(description="What runs the model; auto takes the fastest that agrees with PyTorch.")
    ] = "auto"
    device: Annotated[Device, Field(description="auto takes a GPU when the installed engine can use one.")] = "auto"
    batch_size: Annotated[
        int | None,
        Field(ge=1, description="Images or tiles per call of the model; by default chosen from task and device."),
    ] = None
    shard_size: Annotated[
        int | None,
        Field(
            ge=1,
            description="Images per shard: computed, written and retried as one; 64 to 1024 by default.",
        ),
    ] = None
    slots: Annotated[
        int, Field(ge=1, description="Worker processes, each with one model loaded and its share of the cores.")
    ] = 1
    runner: Annotated[str, Field(description="Where the slots run.", pattern=r"^local$")] = "local"
