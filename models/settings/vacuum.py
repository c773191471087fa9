"""The settings of `vacuum`."""

import re
from typing import Annotated

from pydantic import Field

from models.settings.fields import Settings

_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_AGE = r"^[0-9]{1,6}[mhd]$"


class VacuumSettings(Settings):
    """What is old enough to go, and whether it goes."""

    older_than: Annotated[
        str,
        Field(pattern=_AGE, description="Leave alone what was touched more recently: 45m, 12h or 7d."),
    ] = "7d"
    delete: Annotated[bool, Field(description="Delete what is found; without it, it is only shown.")] = False
    keep_versions: Annotated[
        int | None,
        Field(
            ge=1,
            description="Of each model keep so many of its newest versions, and all that an alias, a table or another "
            "card names; by default all versions are kept.",
        ),
    ] = None

    @property
    def older_than_s(self) -> int:
        """The age in seconds."""
        assert re.fullmatch(_AGE, self.older_than)
        return int(self.older_than[:-1]) * _SECONDS[self.older_than[-1]]
