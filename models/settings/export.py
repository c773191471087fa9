"""The settings of `export`, `evaluate` and `promote`."""

from typing import Annotated

from pydantic import Field

from models.settings.fields import Device, Engine, Precision, Settings

_MODEL = "NAME (newest version), NAME@production, NAME@VERSION or NAME@VERSION.int8."


Tolerance = Annotated[
    float,
    Field(ge=0, le=1, description="How far the main metric may fall, as a share: .01 is one point of a hundred."),
]


class ExportSettings(Settings):
    """Which model to export, and how exactly."""

    model: Annotated[str, Field(min_length=1, description=_MODEL)]
    precision: Annotated[
        Precision, Field(description="fp16 for GPUs; int8 (calibrated on the training split) for CPUs.")
    ] = "fp32"
    tolerance: Tolerance = 0.01
    dataset: Annotated[
        str | None,
        Field(description="The data set to calibrate and to measure on; by default the one it was trained on."),
    ] = None
    split: Annotated[str, Field(description="The split to measure on.", pattern="^(train|val|test)$")] = "val"
    calibration_images: Annotated[int, Field(ge=1, description="int8: images of the training split to look at.")] = 200


class EvaluateSettings(Settings):
    """Which model to measure on what."""

    model: Annotated[str, Field(min_length=1, description=_MODEL)]
    dataset: Annotated[str, Field(min_length=1, description="NAME (newest version) or NAME@VERSION of a data set.")]
    split: Annotated[str, Field(description="The split to measure on.", pattern="^(train|val|test)$")] = "test"
    table: Annotated[
        str | None,
        Field(
            description="Keep the predictions in this table, for queries; by default only the metrics are kept.",
            pattern=r"^[A-Za-z][A-Za-z0-9_]*$",
        ),
    ] = None
    engine: Annotated[
        Engine, Field(description="What runs the model: onnxruntime answers exactly; auto takes what predict would.")
    ] = "onnxruntime"
    judge: Annotated[
        str | None,
        Field(
            description="Generators: what compares made images with real ones: a classifier of the store, imagenet or "
            "pixels; by default that of its training."
        ),
    ] = None
    device: Annotated[Device, Field(description="auto takes a GPU when the installed engine can use one.")] = "auto"


class PromoteSettings(Settings):
    """Which version to make the promoted one."""

    model: Annotated[str, Field(min_length=1, description=_MODEL)]
