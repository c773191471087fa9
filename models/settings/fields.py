"""What the settings of several commands share: URIs without credentials, the store, where and how things run."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Engine = Literal["auto", "onnxruntime", "openvino"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]
ImageFormat = Literal["png", "jpeg", "webp"]
Scope = Literal["table", "source"]

# Settings are shown in Prefect, in logs and in plans, so a URI must not hold `user:password@`. A path may contain an @.
_NO_CREDENTIALS = r"^(?![^/?#]+://[^/?#]*@)"


def without_credentials(uri: str) -> str:
    if not re.match(_NO_CREDENTIALS, uri):
        raise ValueError(
            "credentials do not belong in a URI: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return uri


def uri_field(description: str) -> tuple:
    """What makes a string a URI: the same rule for Python, and as a JSON schema for Prefect's form and server."""
    return Field(min_length=1, description=description, json_schema_extra={"pattern": _NO_CREDENTIALS})


class Settings(BaseModel):
    """Checked on construction, never changed, without a field that it does not know, and every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StoreSettings(Settings):
    """Where everything lives."""

    store: Annotated[
        str,
        uri_field("The store: a folder or a bucket prefix (s3://bucket/mill) that holds data sets, models and tables."),
        AfterValidator(without_credentials),
    ] = "./mill"


TableName = Annotated[
    str,
    Field(
        description="The table that receives the rows; made when it is new. A letter, then letters, digits and _.",
        pattern=r"^[A-Za-z][A-Za-z0-9_]*$",
    ),
]
STORE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
StoreName = Annotated[
    str, Field(description="The name it gets in the store: letters, digits, _, - and '.'.", pattern=STORE_NAME)
]
