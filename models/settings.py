"""The settings of a command, each declared once: its flag, its help, its validation and its place in Prefect's form."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Engine = Literal["auto", "onnxruntime", "openvino"]
Device = Literal["auto", "cpu", "cuda"]


class PredictSettings(BaseModel):
    """What to predict, with which model, into which table, and how to use the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Field(description="A folder or bucket prefix, one image, or a .txt/.csv/.parquet list of image URIs.")]
    model: Annotated[str, Field(description="NAME (newest version), NAME@production or NAME@VERSION.")]
    table: Annotated[str, Field(description="The table that receives the rows; made when it is new.", pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    recursive: Annotated[bool, Field(description="Descend into sub-folders.")] = True
    score: Annotated[float | None, Field(ge=0, le=1, description="Drop findings scored lower; by default the model's own threshold (detection).")] = None
    top_k: Annotated[int, Field(ge=1, description="Labels kept per image, best first (classification).")] = 5
    max_pixels: Annotated[int, Field(ge=1, description="Refuse images with more pixels, by their header.")] = 100_000_000
    limit: Annotated[int | None, Field(ge=1, description="Claim at most this many new images.")] = None
    retry_unreadable: Annotated[bool, Field(description="Claim again the images whose last row is unreadable or missing.")] = False
    engine: Annotated[Engine, Field(description="What runs the model; auto takes the fastest that agrees with PyTorch.")] = "auto"
    device: Annotated[Device, Field(description="auto takes a GPU when the installed engine can use one.")] = "auto"
    batch_size: Annotated[int | None, Field(ge=1, description="Images per call of the model; by default chosen from task and device.")] = None
    shard_size: Annotated[int | None, Field(ge=1, description="Images per shard: computed, written and retried as one; by default 64 to 1024, by the number of images.")] = None
    slots: Annotated[int, Field(ge=1, description="Worker processes, each with one model loaded and its share of the cores.")] = 1
    runner: Annotated[str, Field(description="Where the slots run.", pattern=r"^local$")] = "local"
