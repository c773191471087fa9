"""What long work tells of itself while it goes on."""

from collections.abc import Callable
from typing import NamedTuple


class Step(NamedTuple):
    """How far one stage of the work is."""

    stage: str  # what is being done, for people: "reading images", "epoch 3 of 10"
    done: int
    total: int | None  # None: nobody knows
    text: str = ""  # what else is worth seeing: "loss 0.31 · accuracy .94"


Report = Callable[[Step], None]


def silent(step: Step) -> None:
    """Hears nothing."""
