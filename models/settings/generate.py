"""The settings of `generate`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from models.settings.fields import STORE_NAME, Device, ImageFormat, Settings, uri_field, without_credentials


class GenerateSettings(Settings):
    """What to make, with which model, and where it goes."""

    model: Annotated[
        str, Field(description="NAME (newest version), NAME@production or NAME@VERSION of a generator.", min_length=1)
    ]
    count: Annotated[int, Field(ge=1, le=10**8, description="Images to make.")]
    out: Annotated[
        str,
        uri_field("The folder or bucket prefix that receives the images: a new one, or that of the same command."),
        AfterValidator(without_credentials),
    ]
    classes: Annotated[
        str | None,
        Field(description="Of a conditional generator: the classes to make in turn, with commas; by default all."),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Another seed, other images.")] = 0
    truncation: Annotated[
        float | None,
        Field(ge=0.1, le=10, description="Draw latent values no further from 0: more usual images, less varied ones."),
    ] = None
    image_format: Annotated[ImageFormat, Field(description="Of the files; png and webp keep every pixel.")] = "png"
    as_dataset: Annotated[
        str | None,
        Field(
            description="Make the images a data set of this name, labels and provenance included; all of it train.",
            pattern=STORE_NAME,
        ),
    ] = None
    device: Annotated[Device, Field(description="auto takes a GPU when ONNX Runtime can use one.")] = "auto"
