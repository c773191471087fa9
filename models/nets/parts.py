"""Which modules of a network are which, for transfer learning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Which modules of a network are its new head, and the backbone in order; names as in named_modules()."""

    # They learn in every mode; weights of another number of classes leave them out. The first gives the answer, others
    # are the last layers of auxiliary heads.
    head: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]  # the backbone from the input to the head; together they cover the rest
