"""The settings of `neighbours`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.settings.fields import Settings, uri_field, without_credentials


class NeighboursSettings(Settings):
    """Whose neighbours to find, where, and how near is measured."""

    image: Annotated[
        str,
        uri_field("An image of the table, or any other file or s3:// object, which the table's model then embeds."),
        AfterValidator(without_credentials),
    ]
    table: Annotated[str, Field(min_length=1, description="A table of embeddings.")]
    count: Annotated[int, Field(ge=1, le=100_000, description="Neighbours to find; the image itself is the first.")] = (
        10
    )
    model: Annotated[
        str | None, Field(description="NAME or NAME@VERSION, where the table holds the embeddings of several models.")
    ] = None
    by: Annotated[
        Literal["cosine", "l2"], Field(description="cosine: 1 minus the cosine of the angle; l2: Euclidean distance.")
    ] = "cosine"
