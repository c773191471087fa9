"""The settings of `import`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from models.settings.fields import Settings, uri_field, without_credentials


class ImportSettings(Settings):
    """What to adopt as a model of the store."""

    source: Annotated[
        str,
        uri_field("torchvision:ARCHITECTURE, or an ONNX file that keeps the contract of the README."),
        AfterValidator(without_credentials),
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
