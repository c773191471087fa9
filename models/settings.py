"""The settings of a command, each declared once: its flag, its help, its validation and its place in Prefect's form."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Engine = Literal["auto", "onnxruntime", "openvino"]
Device = Literal["auto", "cpu", "cuda"]

# Settings are shown in Prefect, in logs and in plans, so a URI must not hold `user:password@`. A path may contain an @.
_NO_CREDENTIALS = r"^(?![^/?#]+://[^/?#]*@)"


def _without_credentials(uri: str) -> str:
    if not re.match(_NO_CREDENTIALS, uri):
        raise ValueError(
            "credentials do not belong in a URI: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return uri


def _uri(description: str) -> tuple:
    """What makes a string a URI: the same rule for Python, and as a JSON schema for Prefect's form and server."""
    return Field(min_length=1, description=description, json_schema_extra={"pattern": _NO_CREDENTIALS})


class PredictSettings(BaseModel):
    """What to predict, with which model, into which table, and how to use the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[
        str,
        _uri("A folder or bucket prefix, one image, or a .txt/.csv/.parquet list of image URIs."),
        AfterValidator(_without_credentials),
    ]
    model: Annotated[str, Field(description="NAME (newest version), NAME@production or NAME@VERSION.", min_length=1)]
    table: Annotated[
        str,
        Field(
            description="The table that receives the rows; made when it is new. A letter, then letters, digits and _.",
            pattern=r"^[A-Za-z][A-Za-z0-9_]*$",
        ),
    ]
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
    max_pixels: Annotated[int, Field(ge=1, description="Refuse images with more pixels, by their header.")] = (
        100_000_000
    )
    limit: Annotated[int | None, Field(ge=1, description="Claim at most this many new images; by default all.")] = None
    retry_unreadable: Annotated[
        bool, Field(description="Claim again the images whose last row is unreadable or missing.")
    ] = False
    engine: Annotated[
        Engine, Field(description="What runs the model; auto takes the fastest that agrees with PyTorch.")
    ] = "auto"
    device: Annotated[Device, Field(description="auto takes a GPU when the installed engine can use one.")] = "auto"
    batch_size: Annotated[
        int | None, Field(ge=1, description="Images per call of the model; by default chosen from task and device.")
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


class StoreSettings(BaseModel):
    """Where everything lives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[
        str,
        _uri("The store: a folder or a bucket prefix (s3://bucket/mill) that holds data sets, models and tables."),
        AfterValidator(_without_credentials),
    ] = "./mill"


class ImportSettings(BaseModel):
    """What to adopt as a model of the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[
        str,
        _uri("torchvision:ARCHITECTURE, or an ONNX file that keeps the contract of the README."),
        AfterValidator(_without_credentials),
    ]
    name: Annotated[str, Field(description="The model's name: letters, digits, _, - and '.'.", min_length=1)]
    weights: Annotated[
        str,
        Field(
            description="For torchvision: default (the pretrained ones), none (random), the name of a weights entry, "
            "or a file."
        ),
    ] = "default"
    card: Annotated[str | None, Field(description="For an ONNX file: a JSON file with task, labels and input.")] = None
    parity_images: Annotated[
        str | None, Field(description="A folder of images to check the export on; by default made-up and shipped ones.")
    ] = None
