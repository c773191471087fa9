"""The settings of `backfill`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.partitions import parse_bound, parse_pattern
from models.settings.predict import PredictSettings


def _is_pattern(text: str) -> str:
    if not is_list(text):
        parse_pattern(text)
    return text


def _is_bound(text: str | None) -> str | None:
    if text is not None:
        parse_bound(text)
    return text


def is_list(partitions: str) -> bool:
    """Whether partitions are named by a file rather than by a pattern."""
    return partitions.endswith(".txt")


class BackfillSettings(PredictSettings):
    """Which partitions of a source to predict, and where; the rest is as for `predict`."""

    partitions: Annotated[
        str,
        Field(
            min_length=1,
            description="Folders below the source: date=2026-01-*, year=*/month=*, 2026-01-01..2026-03-31, "
            "or a .txt file with one per line.",
        ),
        AfterValidator(_is_pattern),
    ]
    from_: Annotated[
        str | None,
        Field(description="Only partitions of this date and later: 2026-01-15, 2026-01 or 2026."),
        AfterValidator(_is_bound),
    ] = None
    to: Annotated[
        str | None,
        Field(description="Only partitions up to this date, included: 2026-03-31, 2026-03 or 2026."),
        AfterValidator(_is_bound),
    ] = None
    deployment: Annotated[
        str | None,
        Field(
            description="Run each partition on this deployment, e.g. predict/backfill; by default here.",
            pattern=r"^[^/]+/[^/]+$",
        ),
    ] = None
    concurrency: Annotated[
        int,
        Field(ge=1, description="Partitions at work at once on the deployment; without one, slots here."),
    ] = 1
    plan_only: Annotated[bool, Field(description="Only say what there is to do, and how long it will take.")] = False
    scope: Annotated[Literal["source"], Field(description="A run keeps to its partition.")] = "source"
    limit: Annotated[
        int | None, Field(ge=1, description="Claim at most this many new images of each partition; by default all.")
    ] = None
