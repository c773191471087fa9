"""What a slot elsewhere is told."""

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Any

from models.settings.predict import PredictSettings
from tasks.predict import Planned


@dataclass(frozen=True)
class SlotOrder:
    """Names and numbers only; credentials are those of the machine on which the slot runs."""

    store: str
    settings: PredictSettings
    planned: Planned
    slot: int  # from 0
    slots: int
    run: str  # noted in the parts
    version: str  # of pixelmill where the run was started

    def parameters(self) -> dict[str, Any]:
        """As plain values, which any serialiser takes."""
        return {**self.__dict__, "settings": self.settings.model_dump(), "planned": asdict(self.planned)}

    @staticmethod
    def of(parameters: dict[str, Any]) -> "SlotOrder":
        """The inverse of `parameters`."""
        settings, planned = PredictSettings(**parameters["settings"]), Planned(**parameters["planned"])
        return SlotOrder(**{**parameters, "settings": settings, "planned": planned})


def our_version() -> str:
    """Of pixelmill as it is installed here; "" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("pixelmill")
    except importlib.metadata.PackageNotFoundError:
        return ""
