"""The settings of `predict`."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo

from models.settings.fields import (
    Device,
    Engine,
    ImageFormat,
    Scope,
    Settings,
    TableName,
    uri_field,
    without_credentials,
)

OVERLAP = 0.2  # of tiles, unless the settings say otherwise


def _of_tiles(overlap: float | None, info: ValidationInfo) -> float | None:
    if overlap is not None and info.data.get("tile") is None:
        raise ValueError("it is the overlap of tiles, so it needs --tile")
    return overlap


def _of_runners(*runners: str) -> Callable[[Any, ValidationInfo], Any]:
    def check(value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("runner", runners[0]) not in runners:
            raise ValueError(f"it needs {' or '.join(f'--runner {runner}' for runner in runners)}")
        return value

    return check


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
    image_format: Annotated[
        ImageFormat, Field(description="Of the images that a translator makes; png and webp keep every pixel.")
    ] = "png"
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
    runner: Annotated[
        str,
        Field(
            description="Where the slots run: local (this machine), ray, dask, or pool:NAME, a work pool of Prefect.",
            pattern=r"^(local|ray|dask|pool:[^/]+)$",
        ),
    ] = "local"
    cluster: Annotated[
        str | None,
        uri_field(
            "The Ray or Dask cluster: ray://host:10001, host:6379, tcp://host:8786; by default RAY_ADDRESS or "
            "DASK_SCHEDULER_ADDRESS, else one is started on this machine."
        ),
        AfterValidator(lambda uri: uri and without_credentials(uri)),
        AfterValidator(_of_runners("ray", "dask")),
    ] = None
    gpus_per_slot: Annotated[
        float | None,
        Field(
            ge=0,
            description="GPUs that Ray or Dask keeps free for each slot, or a share of one; by default 1, or 0 where "
            "the model runs on cores.",
        ),
        AfterValidator(_of_runners("ray", "dask")),
    ] = None
