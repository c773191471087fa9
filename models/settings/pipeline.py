"""The settings of `pipeline`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from models.settings.export import Tolerance
from models.settings.fields import Precision, TableName, uri_field, without_credentials
from models.settings.ingest import IngestSettings
from models.settings.train import Training


class PipelineSettings(Training, IngestSettings):
    """From a labelled source to a table of predictions; the data set and the model both get the name."""

    images: Annotated[
        str,
        uri_field("What to predict: a folder or bucket prefix, one image, or a list of image URIs."),
        AfterValidator(without_credentials),
    ]
    table: TableName
    export_precision: Annotated[
        Precision, Field(description="Predict with this export of the model: fp16 for GPUs, int8 for CPUs.")
    ] = "fp32"
    tolerance: Tolerance = 0.01
